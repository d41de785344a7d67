# mypy: disable-error-code="no-untyped-def"
"""The passes of the fused CBAM block as Triton kernels, for GPUs; the functions of fused_torch.py.

There are two kinds. A program of the first has a tile of TILE positions of an image and goes
through its channels in blocks, which are contiguous in memory; sums over channels stay in its
registers. A program of the second, for sums over positions, has COLUMNS channels of an image and
goes through a span of positions, ROWS at a time; small kernels, whose programs have COLUMNS
channels of an image, add up the sums of several spans and compute all else that is needed between
the passes. Arithmetic is in float32. `tl.fma` makes z the same number in each kernel, so that the
maximum is found again.

Checked against float64 under Triton's interpreter (TRITON_INTERPRET=1) on a CPU, and compiled there
for an A100 and an H100 (tests/test_fused.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regard.models.fused_torch import Moments

# of the first kind: the fastest of nine pairs on an H200, before POOLED_TILE was a size of its own
TILE = 64  # positions per program
BLOCK = 64  # channels read at a time
POOLED_TILE = 32  # of `_pooled`, which holds three numbers for each value of a block
# of the second kind; not tuned yet (benchmarks/fused_kernels.py)
COLUMNS = 128  # channels per program
ROWS = 16  # positions read at a time
PROGRAMS = 2048  # fewer would not keep a large GPU busy
SPANS = 32  # at most, as one small program adds them up
WARPS = 4  # per program


@triton.jit
def _elements(image, p, c, P, C, end):
    """Offsets of positions `p`, channels `c` in the map (B, P, C); whether they exist."""
    rows = image.to(tl.int64) * P + p
    return rows[:, None] * C + c[None, :], (p < end)[:, None] & (c < C)[None, :]


@triton.jit
def _positions(P, T: tl.constexpr):
    """A tile's image and positions, its rows in (B, P), and whether they exist."""
    image = tl.program_id(0)
    p = tl.program_id(1) * T + tl.arange(0, T)
    return image, p, image.to(tl.int64) * P + p, p < P


@triton.jit
def _columns(C, B: tl.constexpr):
    """An image and some of its channels."""
    return tl.program_id(2), tl.program_id(0) * B + tl.arange(0, B)


@triton.jit
def _span(P, span):
    """First and last position of a program of the second kind."""
    start = tl.program_id(1) * span
    return start, tl.minimum(start + span, P)


@triton.jit
def _by_image(pointer, image, c, C):
    """The values of an image for channels `c` in (B, C), as a row."""
    return tl.load(pointer + image.to(tl.int64) * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _by_channel(pointer, c, C):
    """The values for channels `c` in (C,), as a row."""
    return tl.load(pointer + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _store_sums(pointer, image, c, C, values):
    """Stores a span's sums for channels `c` in (B, spans, C)."""
    row = image.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(pointer + row * C + c, values, mask=c < C)


@triton.jit
def _off(y, at, inside, mean):
    """y - mean."""
    return tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - mean


@triton.jit
def _z(off, gains, offsets):
    """z from y - mean: the same number in every kernel."""
    return tl.fma(off, gains + tl.zeros_like(off), offsets + tl.zeros_like(off))


@triton.jit
def _by_mean(dpooled, rows, there, C):
    """The gradient of each z of a position through their mean, as a column."""
    return tl.load(dpooled + rows * 2 + 1, mask=there, other=0.0).to(tl.float32)[:, None] / C


@triton.jit
def _added(sums, which, image, images, c, C, S, SP: tl.constexpr):
    """The sums `which` of an image over all S spans, from (count, B, S, C); SP: S or more."""
    span = tl.arange(0, SP)
    rows = (which * images + image).to(tl.int64) * S + span
    inside = (span < S)[:, None] & (c < C)[None, :]
    return tl.sum(tl.load(sums + rows[:, None] * C + c[None, :], mask=inside, other=0.0), 0)


@triton.jit
def _load(pointer, which, image, images, c, C):
    """The values for channels `c` in (count, B, C)."""
    row = (which * images + image).to(tl.int64)
    return tl.load(pointer + row * C + c, mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, which, image, images, c, C, values):
    """Stores values for channels `c` in (count, B, C)."""
    tl.store(pointer + (which * images + image).to(tl.int64) * C + c, values, mask=c < C)


@triton.jit
def _statistics(y, weight, total, squares, largest, P, C, span, T: tl.constexpr, B: tl.constexpr):
    image, c = _columns(C, B)
    start, end = _span(P, span)
    shift = _by_channel(y, c, C).to(tl.float32)
    sign = tl.where(_by_channel(weight, c, C) < 0, -1.0, 1.0)
    plain = tl.zeros((T, B), tl.float32)
    squared = tl.zeros((T, B), tl.float32)
    top = tl.full((T, B), float("-inf"), tl.float32)
    for first in range(start, end, T):
        at, inside = _elements(image, first + tl.arange(0, T), c, P, C, end)
        value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, value - shift, 0.0)
        plain += off
        squared += off * off
        top = tl.maximum(top, tl.where(inside, value * sign, float("-inf")))
    _store_sums(total, image, c, C, tl.sum(plain, 0))
    _store_sums(squares, image, c, C, tl.sum(squared, 0))
    _store_sums(largest, image, c, C, tl.max(top, 0))


@triton.jit
def _moments(
    y, sums, totals, weight, bias, by_channel, means, x_means, P, C, S, eps,
    B: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    image, images = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * B + tl.arange(0, B)
    here = c < C
    values = images.to(tl.float32) * P
    off = tl.load(totals + c, mask=here, other=0.0) / values
    square = tl.load(totals + C + c, mask=here, other=0.0) / values
    variance = tl.maximum(square - off * off, 0.0)
    deviation = 1.0 / tl.sqrt(variance + eps)
    mean = tl.load(y + c, mask=here, other=0.0).to(tl.float32) + off
    w = tl.load(weight + c, mask=here, other=0.0).to(tl.float32)
    g = w * deviation
    b = tl.load(bias + c, mask=here, other=0.0).to(tl.float32)

    span = tl.arange(0, SP)
    rows = (2 * images + image).to(tl.int64) * S + span
    inside = (span < S)[:, None] & here[None, :]
    at = rows[:, None] * C + c[None, :]
    top = tl.max(tl.load(sums + at, mask=inside, other=float("-inf")), 0)
    average = _added(sums, 0, image, images, c, C, S, SP) / P - off
    largest = tl.where(w < 0, -top, top) - mean  # bit for bit `_off` there
    _store(means, 0, image, images, c, C, average)
    _store(means, 1, image, images, c, C, largest)
    _store(x_means, 0, image, images, c, C, average * g + b)
    _store(x_means, 1, image, images, c, C, largest * g + b)
    here = here & (image == 0)
    tl.store(by_channel + c, mean, mask=here)
    tl.store(by_channel + C + c, deviation, mask=here)
    tl.store(by_channel + 2 * C + c, variance, mask=here)
    tl.store(by_channel + 3 * C + c, g, mask=here)
    tl.store(by_channel + 4 * C + c, b, mask=here)


@triton.jit
def _pooled(y, mean, gc, bc, out, several, P, C, T: tl.constexpr, B: tl.constexpr):
    image, p, rows, there = _positions(P, T)
    top = tl.full((T, B), float("-inf"), tl.float32)
    times = tl.zeros((T, B), tl.float32)  # how often it was found
    total = tl.zeros((T, B), tl.float32)
    for start in range(0, C, B):
        c = start + tl.arange(0, B)
        at, inside = _elements(image, p, c, P, C, P)
        off = _off(y, at, inside, _by_channel(mean, c, C))
        z = _z(off, _by_image(gc, image, c, C), _by_image(bc, image, c, C))
        again = tl.where(inside & (z == top), times + 1.0, times)
        times = tl.where(inside & (z > top), 1.0, again)
        top = tl.maximum(top, tl.where(inside, z, float("-inf")))
        total += tl.where(inside, z, 0.0)
    largest = tl.max(top, 1)
    tl.store(out + rows * 2, largest, mask=there)
    tl.store(out + rows * 2 + 1, tl.sum(total, 1) / C, mask=there)
    found = tl.sum(tl.where(top == largest[:, None], times, 0.0), 1)
    tl.store(several + rows, found, mask=there)


@triton.jit
def _output(y, k, mean, gc, bc, s, out, P, C, T: tl.constexpr, B: tl.constexpr):
    image, p, rows, there = _positions(P, T)
    gate = tl.load(s + rows, mask=there, other=0.0)[:, None]
    for start in range(0, C, B):
        c = start + tl.arange(0, B)
        at, inside = _elements(image, p, c, P, C, P)
        off = _off(y, at, inside, _by_channel(mean, c, C))
        z = _z(off, _by_image(gc, image, c, C), _by_image(bc, image, c, C))
        value = z * gate + tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(value > 0, value, tl.where(value == value, 0.0, value))  # NaN stays
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _output_backward(
    y, out, go, mean, gc, bc, s, q, plain, times_y, over, positions, P, C, span,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    image, c = _columns(C, B)
    start, end = _span(P, span)
    means = _by_channel(mean, c, C)
    gains, offsets = _by_image(gc, image, c, C), _by_image(bc, image, c, C)
    gated = tl.zeros((T, B), tl.float32)
    gated_y = tl.zeros((T, B), tl.float32)
    for first in range(start, end, T):
        p = first + tl.arange(0, T)
        at, inside = _elements(image, p, c, P, C, end)
        rows, there = image.to(tl.int64) * P + p, p < end
        gradient = tl.load(go + at, mask=inside, other=0.0)
        positive = tl.load(out + at, mask=inside, other=0.0) > 0
        gradient = tl.where(positive, gradient, 0.0)
        tl.store(q + at, gradient.to(q.dtype.element_ty), mask=inside)
        part = gradient.to(tl.float32)
        off = _off(y, at, inside, means)
        by_channels = tl.sum(part * (off * gains + offsets), 1)
        tl.store(over + tl.program_id(0).to(tl.int64) * positions + rows, by_channels, mask=there)
        part *= tl.load(s + rows, mask=there, other=0.0)[:, None]
        gated += part
        gated_y += part * off
    _store_sums(plain, image, c, C, tl.sum(gated, 0))
    _store_sums(times_y, image, c, C, tl.sum(gated_y, 0))


@triton.jit
def _pooled_backward(
    y, mean, gc, bc, largest, pooled, several, dpooled, plain, times_y, count, shared, P, C, span,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    image, c = _columns(C, B)
    start, end = _span(P, span)
    means = _by_channel(mean, c, C)
    gains, offsets = _by_image(gc, image, c, C), _by_image(bc, image, c, C)
    highest = _by_image(largest, image, c, C)
    total = tl.zeros((T, B), tl.float32)
    total_y = tl.zeros((T, B), tl.float32)
    found = tl.zeros((T, B), tl.float32)
    for first in range(start, end, T):
        p = first + tl.arange(0, T)
        at, inside = _elements(image, p, c, P, C, end)
        rows, there = image.to(tl.int64) * P + p, p < end
        top = tl.load(pooled + rows * 2, mask=there, other=0.0)[:, None]
        dmax = tl.load(dpooled + rows * 2, mask=there, other=0.0).to(tl.float32)
        share = dmax / tl.load(several + rows, mask=there, other=1.0)
        tl.store(shared + rows, share, mask=there & (tl.program_id(0) == 0))
        off = _off(y, at, inside, means)
        at_top = _z(off, gains, offsets) == top
        dz = _by_mean(dpooled, rows, there, C) + tl.where(at_top, share[:, None], 0.0)
        dz = tl.where(inside, dz, 0.0)
        total += dz
        total_y += dz * off
        found += tl.where(inside & (off == highest), 1.0, 0.0)
    _store_sums(plain, image, c, C, tl.sum(total, 0))
    _store_sums(times_y, image, c, C, tl.sum(total_y, 0))
    _store_sums(count, image, c, C, tl.sum(found, 0))


@triton.jit
def _gate_backward(
    of_pooled, of_output, b, g, sums, dc, count, C, S, B: tl.constexpr, SP: tl.constexpr
):
    image, images = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * B + tl.arange(0, B)
    plain = _added(of_pooled, 0, image, images, c, C, S, SP)
    plain += _added(of_output, 0, image, images, c, C, S, SP)
    times_y = _added(of_pooled, 1, image, images, c, C, S, SP)
    times_y += _added(of_output, 1, image, images, c, C, S, SP)
    _store(sums, 0, image, images, c, C, plain)
    _store(sums, 1, image, images, c, C, times_y)
    offsets = tl.load(b + c, mask=c < C, other=0.0)
    gains = tl.load(g + c, mask=c < C, other=0.0)
    _store(dc, 0, image, images, c, C, plain * offsets + times_y * gains)
    found = _added(of_pooled, 2, image, images, c, C, S, SP)
    _store(count, 0, image, images, c, C, tl.maximum(found, 1.0))


@triton.jit
def _by_norm(weight, means, d, gate, sums, terms, C, B: tl.constexpr):
    """An image's terms of the gradients of BN's weight (without the deviation) and bias."""
    image, images = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * B + tl.arange(0, B)
    d_average = _load(d, 0, image, images, c, C)
    d_largest = _load(d, 1, image, images, c, C)
    average = _load(means, 0, image, images, c, C)
    largest = _load(means, 1, image, images, c, C)
    # if BN's weight is 0, all values are equal, and each of them is the maximum
    zero = tl.load(weight + c, mask=c < C, other=0.0) == 0
    by_means = d_average * average + d_largest * tl.where(zero, average, largest)
    gates = _load(gate, 0, image, images, c, C)
    by_weight = by_means + gates * _load(sums, 1, image, images, c, C)
    by_bias = d_average + d_largest + gates * _load(sums, 0, image, images, c, C)
    _store(terms, 0, image, images, c, C, by_weight)
    _store(terms, 1, image, images, c, C, by_bias)


@triton.jit
def _by_statistics(
    totals, deviation, g, d, count, by_channel, at_largest, plain, P, C, B: tl.constexpr
):
    image, images = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) * B + tl.arange(0, B)
    here = c < C
    values = images.to(tl.float32) * P
    deviations = tl.load(deviation + c, mask=here, other=0.0)
    gains = tl.load(g + c, mask=here, other=0.0)
    dweight = tl.load(totals + c, mask=here, other=0.0) * deviations
    dbias = tl.load(totals + C + c, mask=here, other=0.0)
    d_average = _load(d, 0, image, images, c, C)
    d_largest = _load(d, 1, image, images, c, C)
    found = _load(count, 0, image, images, c, C)
    _store(at_largest, 0, image, images, c, C, gains * d_largest / found)
    _store(plain, 0, image, images, c, C, gains * (d_average / P - dbias / values))
    here = here & (image == 0)
    tl.store(by_channel + c, dweight, mask=here)
    tl.store(by_channel + C + c, dbias, mask=here)
    tl.store(by_channel + 2 * C + c, -gains * deviations * dweight / values, mask=here)


@triton.jit
def _input_backward(
    y, q, mean, gc, bc, s, pooled, dpooled, shared, largest, at_largest, by_y, plain, out, P, C,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    image, p, rows, there = _positions(P, T)
    gate = tl.load(s + rows, mask=there, other=0.0)[:, None]
    top = tl.load(pooled + rows * 2, mask=there, other=0.0)[:, None]
    share = tl.load(shared + rows, mask=there, other=0.0)[:, None]
    by_mean = _by_mean(dpooled, rows, there, C)
    for start in range(0, C, B):
        c = start + tl.arange(0, B)
        at, inside = _elements(image, p, c, P, C, P)
        off = _off(y, at, inside, _by_channel(mean, c, C))
        gains = _by_image(gc, image, c, C)
        z = _z(off, gains, _by_image(bc, image, c, C))
        dz = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * gate + by_mean
        dz += tl.where(z == top, share, 0.0)
        value = dz * gains + off * _by_channel(by_y, c, C) + _by_image(plain, image, c, C)
        more = off == _by_image(largest, image, c, C)
        value += tl.where(more, _by_image(at_largest, image, c, C), 0.0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


# --------------------------------------------------------------- as fused_torch.py has them
def _by_tiles(kernel: Any, tile: int, y: Tensor, *arguments: Tensor) -> None:
    """Runs a kernel of the first kind."""
    batch, positions, channels = y.shape
    whole = [argument.contiguous() for argument in arguments]
    kernel[(batch, triton.cdiv(positions, tile))](
        y, *whole, positions, channels, T=tile, B=min(BLOCK, triton.next_power_of_2(channels))
    )


class _Spans:
    """How the programs of a kernel of the second kind divide a map among them."""

    def __init__(self, y: Tensor) -> None:
        self.shape = batch, positions, channels = y.shape
        self.columns: int = min(COLUMNS, triton.next_power_of_2(channels))
        self.blocks: int = triton.cdiv(channels, self.columns)
        several = triton.cdiv(PROGRAMS, batch * self.blocks)
        self.span: int = max(ROWS, triton.cdiv(positions, min(several, SPANS)))
        self.count: int = triton.cdiv(positions, self.span)

    def sums(self, y: Tensor, count: int) -> Tensor:
        """A buffer for `count` sums per span: (count, B, spans, C)."""
        batch, _, channels = self.shape
        return y.new_empty((count, batch, self.count, channels), dtype=torch.float32)

    def run(self, kernel: Any, *arguments: Tensor | int) -> None:
        batch, positions, channels = self.shape
        whole = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        kernel[(self.blocks, self.count, batch)](
            *whole, positions, channels, self.span, T=ROWS, B=self.columns, num_warps=WARPS
        )


def _by_images(
    kernel: Any, batch: int, channels: int, *arguments: Tensor | int | float, **sizes: int
) -> None:
    """Runs a small kernel."""
    whole = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    columns = min(COLUMNS, triton.next_power_of_2(channels))
    kernel[(triton.cdiv(channels, columns), batch)](*whole, B=columns, **sizes)


def statistics(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Moments:
    """See fused_torch.py."""
    batch, positions, channels = y.shape
    spans = _Spans(y)
    sums = spans.sums(y, 3)
    spans.run(_statistics, y, weight, *sums)
    by_channel = y.new_empty((5, channels), dtype=torch.float32)
    means = y.new_empty((2, batch, 1, channels), dtype=torch.float32)
    x_means = torch.empty_like(means)
    _by_images(
        _moments, batch, channels, y, sums, sums[:2].sum((1, 2)), weight, bias, by_channel, means,
        x_means, positions, channels, spans.count, eps, SP=triton.next_power_of_2(spans.count),
    )  # fmt: skip
    mean, deviation, variance, g, b = by_channel
    return Moments(mean, deviation, variance, g, b, means, x_means)


def pooled(y: Tensor, mean: Tensor, gc: Tensor, bc: Tensor) -> tuple[Tensor, Tensor]:
    """See fused_torch.py."""
    out = y.new_empty((*y.shape[:2], 2), dtype=torch.float32)
    several = y.new_empty((*y.shape[:2], 1), dtype=torch.float32)
    _by_tiles(_pooled, POOLED_TILE, y, mean, gc, bc, out, several)
    return out, several


def output(y: Tensor, k: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor) -> Tensor:
    """See fused_torch.py."""
    out = torch.empty_like(y)
    _by_tiles(_output, TILE, y, k, mean, gc, bc, s, out)
    return out


def output_backward(
    y: Tensor, out: Tensor, go: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See fused_torch.py."""
    spans, q = _Spans(y), torch.empty_like(y)
    sums = spans.sums(y, 2)
    over = s.new_empty((spans.blocks, *s.shape))
    spans.run(_output_backward, y, out, go, mean, gc, bc, s, q, *sums, over, s.numel())
    return q, sums, over[0] if spans.blocks == 1 else over.sum(0)


def pooled_backward(
    y: Tensor, batch: Moments, gc: Tensor, bc: Tensor,
    pooled: Tensor, several: Tensor, dpooled: Tensor, by_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See fused_torch.py."""
    spans = _Spans(y)
    by_span = spans.sums(y, 3)
    share = torch.empty_like(several)
    spans.run(
        _pooled_backward, y, batch.mean, gc, bc, batch.means[1], pooled, several, dpooled,
        *by_span, share,
    )  # fmt: skip
    sums = torch.empty_like(batch.means)
    dc, count = torch.empty_like(gc), torch.empty_like(gc)
    _by_images(
        _gate_backward, len(y), y.shape[2], by_span, by_output, batch.b, batch.g, sums, dc, count,
        y.shape[2], spans.count, SP=triton.next_power_of_2(spans.count),
    )  # fmt: skip
    return sums, dc, count, share


def statistics_backward(
    batch: Moments, weight: Tensor, d: Tensor, c: Tensor, sums: Tensor, count: Tensor,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See fused_torch.py."""
    _, images, _, channels = batch.means.shape
    terms = torch.empty_like(batch.means)
    _by_images(
        _by_norm, images, channels, weight, batch.means, d, c, sums, terms, channels
    )  # fmt: skip
    by_channel = terms.new_empty((3, channels))
    at_largest, plain = torch.empty_like(count), torch.empty_like(count)
    _by_images(
        _by_statistics, images, channels, terms.sum((1, 2)), batch.deviation, batch.g, d, count,
        by_channel, at_largest, plain, positions, channels,
    )  # fmt: skip
    dweight, dbias, by_y = by_channel
    return dweight, dbias, at_largest, by_y, plain


def input_backward(
    y: Tensor, q: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor,
    pooled: Tensor, dpooled: Tensor, share: Tensor,
    largest: Tensor, at_largest: Tensor, by_y: Tensor, plain: Tensor,
) -> Tensor:  # fmt: skip
    """See fused_torch.py."""
    out = torch.empty_like(y)
    _by_tiles(
        _input_backward, TILE, y, q, mean, gc, bc, s, pooled, dpooled, share, largest, at_largest,
        by_y, plain, out,
    )  # fmt: skip
    return out
