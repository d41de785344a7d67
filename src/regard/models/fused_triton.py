# mypy: disable-error-code="no-untyped-def"
"""The passes of the fused CBAM block as Triton kernels, for GPUs; the functions of fused_torch.py.

A kernel's program has one tile of TILE positions of an image and iterates over its channels in
blocks, which are contiguous in memory. Sums over channels stay in its registers; for sums over
positions it writes one partial sum per tile, and these are added up afterwards. Arithmetic is in
float32. `tl.fma` makes z the same number in each kernel, so that the maximum is found again.

Checked against float64 on an H200, and under Triton's interpreter (TRITON_INTERPRET=1) on a CPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# the fastest of nine pairs on an H200, for maps of 256x56x56 and 1024x14x14 (docs/performance.md)
TILE = 64  # positions per program
BLOCK = 64  # channels read at a time


@triton.jit
def _tile(P, C, start_c, T: tl.constexpr, B: tl.constexpr):
    """A tile's image and tile number, offsets in the map, channels, and masks of both."""
    image, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tile * T + tl.arange(0, T)
    c = start_c + tl.arange(0, B)
    rows = image * P + p
    return rows[:, None] * C + c[None, :], c, (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def _positions(P, T: tl.constexpr):
    """A tile's rows in (B, P), and a mask of those that exist."""
    p = tl.program_id(1) * T + tl.arange(0, T)
    return tl.program_id(0).to(tl.int64) * P + p, p < P


@triton.jit
def _by_image(pointer, c, C):
    """The values for channels `c` in (B, C), as a row."""
    return tl.load(pointer + tl.program_id(0).to(tl.int64) * C + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _by_channel(pointer, c, C):
    """The values for channels `c` in (C,), as a row."""
    return tl.load(pointer + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def _store_partial(pointer, c, C, values):
    """Stores a tile's partial sums for channels `c` in (B, tiles, C)."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(pointer + row * C + c, values, mask=c < C)


@triton.jit
def _by_mean(dpooled, rows, there, C):
    """The gradient of each z of a position through their mean, as a column."""
    return tl.load(dpooled + rows * 2 + 1, mask=there, other=0.0).to(tl.float32)[:, None] / C


@triton.jit
def _statistics(y, shift, sign, total, squares, largest, P, C, T: tl.constexpr, B: tl.constexpr):
    for start in range(0, C, B):
        at, c, inside = _tile(P, C, start, T, B)
        value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        signs = _by_channel(sign, c, C)
        off = tl.where(inside, value - _by_channel(shift, c, C), 0.0)
        _store_partial(total, c, C, tl.sum(off, 0))
        _store_partial(squares, c, C, tl.sum(off * off, 0))
        _store_partial(largest, c, C, tl.max(tl.where(inside, value * signs, float("-inf")), 0))


@triton.jit
def _pooled(y, mean, gc, bc, out, P, C, T: tl.constexpr, B: tl.constexpr):
    rows, there = _positions(P, T)
    largest = tl.full((T,), float("-inf"), tl.float32)
    total = tl.zeros((T,), tl.float32)
    for start in range(0, C, B):
        at, c, inside = _tile(P, C, start, T, B)
        off = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - _by_channel(mean, c, C)
        gains, offsets = _by_image(gc, c, C), _by_image(bc, c, C)
        z = tl.fma(off, gains + tl.zeros_like(off), offsets + tl.zeros_like(off))
        largest = tl.maximum(largest, tl.max(tl.where(inside, z, float("-inf")), 1))
        total += tl.sum(tl.where(inside, z, 0.0), 1)
    tl.store(out + rows * 2, largest, mask=there)
    tl.store(out + rows * 2 + 1, total / C, mask=there)


@triton.jit
def _output(y, k, mean, gc, bc, s, out, P, C, T: tl.constexpr, B: tl.constexpr):
    rows, there = _positions(P, T)
    gate = tl.load(s + rows, mask=there, other=0.0)[:, None]
    for start in range(0, C, B):
        at, c, inside = _tile(P, C, start, T, B)
        off = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - _by_channel(mean, c, C)
        gains, offsets = _by_image(gc, c, C), _by_image(bc, c, C)
        z = tl.fma(off, gains + tl.zeros_like(off), offsets + tl.zeros_like(off))
        value = z * gate + tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(value > 0, value, tl.where(value == value, 0.0, value))  # NaN stays
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _output_backward(
    y, out, go, mean, gc, bc, s, q, plain, times_y, over, P, C, T: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    rows, there = _positions(P, T)
    gate = tl.load(s + rows, mask=there, other=0.0)[:, None]
    total = tl.zeros((T,), tl.float32)
    for start in range(0, C, B):
        at, c, inside = _tile(P, C, start, T, B)
        gradient = tl.load(go + at, mask=inside, other=0.0)
        positive = tl.load(out + at, mask=inside, other=0.0) > 0
        gradient = tl.where(positive, gradient, 0.0)
        tl.store(q + at, gradient.to(q.dtype.element_ty), mask=inside)
        part = gradient.to(tl.float32)
        off = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - _by_channel(mean, c, C)
        gains, offsets = _by_image(gc, c, C), _by_image(bc, c, C)
        total += tl.sum(part * (off * gains + offsets), 1)
        _store_partial(plain, c, C, tl.sum(part * gate, 0))
        _store_partial(times_y, c, C, tl.sum(part * gate * off, 0))
    tl.store(over + rows, total, mask=there)


@triton.jit
def _pooled_backward(
    y, mean, gc, bc, largest, pooled, dpooled, plain, times_y, count, shared, P, C,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    rows, there = _positions(P, T)
    top = tl.load(pooled + rows * 2, mask=there, other=0.0)[:, None]
    by_mean = _by_mean(dpooled, rows, there, C)
    several = tl.zeros((T,), tl.float32)
    for start in range(0, C, B):
        at, c, inside = _tile(P, C, start, T, B)
        off = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - _by_channel(mean, c, C)
        gains, offsets = _by_image(gc, c, C), _by_image(bc, c, C)
        z = tl.fma(off, gains + tl.zeros_like(off), offsets + tl.zeros_like(off))
        several += tl.sum(tl.where(inside & (z == top), 1.0, 0.0), 1)
    dmax = tl.load(dpooled + rows * 2, mask=there, other=0.0).to(tl.float32)
    share = dmax / tl.maximum(several, 1.0)
    tl.store(shared + rows, share, mask=there)
    for start in range(0, C, B):  # a second time, from the cache
        at, c, inside = _tile(P, C, start, T, B)
        off = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - _by_channel(mean, c, C)
        gains, offsets = _by_image(gc, c, C), _by_image(bc, c, C)
        z = tl.fma(off, gains + tl.zeros_like(off), offsets + tl.zeros_like(off))
        dz = tl.where(inside, by_mean + tl.where(z == top, share[:, None], 0.0), 0.0)
        _store_partial(plain, c, C, tl.sum(dz, 0))
        _store_partial(times_y, c, C, tl.sum(dz * off, 0))
        found = inside & (off == _by_image(largest, c, C))
        _store_partial(count, c, C, tl.sum(tl.where(found, 1.0, 0.0), 0))


@triton.jit
def _input_backward(
    y, q, mean, gc, bc, s, pooled, dpooled, shared, largest, at_largest, by_y, plain, out, P, C,
    T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    rows, there = _positions(P, T)
    gate = tl.load(s + rows, mask=there, other=0.0)[:, None]
    top = tl.load(pooled + rows * 2, mask=there, other=0.0)[:, None]
    share = tl.load(shared + rows, mask=there, other=0.0)[:, None]
    by_mean = _by_mean(dpooled, rows, there, C)
    for start in range(0, C, B):
        at, c, inside = _tile(P, C, start, T, B)
        off = tl.load(y + at, mask=inside, other=0.0).to(tl.float32) - _by_channel(mean, c, C)
        gains, offsets = _by_image(gc, c, C), _by_image(bc, c, C)
        z = tl.fma(off, gains + tl.zeros_like(off), offsets + tl.zeros_like(off))
        dz = tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * gate + by_mean
        dz += tl.where(z == top, share, 0.0)
        value = dz * gains + off * _by_channel(by_y, c, C) + _by_image(plain, c, C)
        more = off == _by_image(largest, c, C)
        value += tl.where(more, _by_image(at_largest, c, C), 0.0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


# --------------------------------------------------------------- as fused_torch.py has them
def _launch(kernel: Any, y: Tensor, *arguments: Tensor) -> None:
    batch, positions, channels = y.shape
    whole = [argument.contiguous() for argument in arguments]
    kernel[(batch, triton.cdiv(positions, TILE))](
        y, *whole, positions, channels, T=TILE, B=min(BLOCK, triton.next_power_of_2(channels))
    )


def _partial(y: Tensor, count: int) -> Tensor:
    """A buffer for `count` sums per tile of positions: (count, B, tiles, C)."""
    tiles = triton.cdiv(y.shape[1], TILE)
    return y.new_empty((count, len(y), tiles, y.shape[2]), dtype=torch.float32)


def statistics(y: Tensor, shift: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """See fused_torch.py."""
    partial = _partial(y, 3)
    _launch(_statistics, y, shift, sign, *partial)
    return partial[:2].sum(2, keepdim=True), partial[2].amax(1, keepdim=True).mul_(sign)


def pooled(y: Tensor, mean: Tensor, gc: Tensor, bc: Tensor) -> Tensor:
    """See fused_torch.py."""
    out = y.new_empty((*y.shape[:2], 2), dtype=torch.float32)
    _launch(_pooled, y, mean, gc, bc, out)
    return out


def output(y: Tensor, k: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor) -> Tensor:
    """See fused_torch.py."""
    out = torch.empty_like(y)
    _launch(_output, y, k, mean, gc, bc, s, out)
    return out


def output_backward(
    y: Tensor, out: Tensor, go: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See fused_torch.py."""
    q, over = torch.empty_like(y), torch.empty_like(s, memory_format=torch.contiguous_format)
    partial = _partial(y, 2)
    _launch(_output_backward, y, out, go, mean, gc, bc, s, q, *partial, over)
    return q, partial.sum(2, keepdim=True), over


def pooled_backward(
    y: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, largest: Tensor,
    pooled: Tensor, dpooled: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See fused_torch.py."""
    partial = _partial(y, 3)
    share = y.new_empty((*y.shape[:2], 1), dtype=torch.float32)
    _launch(_pooled_backward, y, mean, gc, bc, largest, pooled, dpooled, *partial, share)
    sums = partial.sum(2, keepdim=True)
    return sums[:2], sums[2].clamp_min_(1), share


def input_backward(
    y: Tensor, q: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor,
    pooled: Tensor, dpooled: Tensor, share: Tensor,
    largest: Tensor, at_largest: Tensor, by_y: Tensor, plain: Tensor,
) -> Tensor:  # fmt: skip
    """See fused_torch.py."""
    out = torch.empty_like(y)
    _launch(
        _input_backward, y, q, mean, gc, bc, s, pooled, dpooled, share, largest, at_largest, by_y,
        plain, out,
    )  # fmt: skip
    return out
