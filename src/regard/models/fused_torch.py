"""The passes of the fused CBAM block in PyTorch operators: for CPUs, but valid anywhere.

A map is processed in chunks that stay in a core's cache, in float32 (float64 for float64 maps),
so that each pass reads and writes main memory once although several operators use each chunk.
Maps are (B, P, C) here: P positions, channels last. Results of a pass are small, (B, C) or
(B, P, 1), unless stated otherwise.

Notation, as in fused.py: x = (y - mean) * g + b is the batch-normalized map, z = x * c the map
after the channel gate c (B, 1, C), out = relu(z * s + k) with the spatial gate s (B, P, 1).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**18  # values: 1 MB in float32


def _chunks(y: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of images and positions: several whole images, or a part of one."""
    images, positions, channels = y.shape
    several = max(1, CHUNK // (positions * channels))
    if several > 1 or positions * channels <= CHUNK:
        for start in range(0, images, several):
            yield slice(start, start + several), slice(None)
        return
    some = max(1, CHUNK // channels)
    for image in range(images):
        for start in range(0, positions, some):
            yield slice(image, image + 1), slice(start, start + some)


def _dtype(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _zeros(y: Tensor, count: int) -> Tensor:
    return y.new_zeros((count, len(y), 1, y.shape[2]), dtype=_dtype(y))


@dataclass(frozen=True)
class Moments:
    """A batch's statistics, in float32 (float64): see `fused.py`.

    Attributes:
        mean, deviation, variance: (C,), of y; deviation is 1 / sqrt(variance + eps).
        g, b: (C,), x = (y - mean) * g + b.
        means: (2, B, 1, C), mean of y - mean over positions, and y - mean where x is largest; bit
            for bit the passes' y - mean there, by which they find it again.
        x_means: (2, B, 1, C), mean and max of x over positions.
    """

    mean: Tensor
    deviation: Tensor
    variance: Tensor
    g: Tensor
    b: Tensor
    means: Tensor
    x_means: Tensor


def statistics(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Moments:
    """The statistics of y, (B, P, C), with BN's weight, bias and eps."""
    shift = y[0, 0].to(_dtype(y))  # near the mean, to avoid cancellation in the sums
    sign = torch.copysign(torch.ones_like(shift), weight)
    sums, largest = _sums(y, shift, sign)
    off, square = sums.sum((1, 2)) / (y.shape[0] * y.shape[1])
    variance = torch.addcmul(square, off, off, value=-1).clamp_min_(0)
    deviation = (variance + eps).rsqrt_()
    mean = shift + off
    means = torch.empty_like(sums)
    torch.div(sums[0], y.shape[1], out=means[0]).sub_(off)
    torch.sub(largest, mean, out=means[1])
    g, b = (weight * deviation).to(shift), bias.to(shift)
    return Moments(mean, deviation, variance, g, b, means, torch.addcmul(b, means, g))


def _sums(y: Tensor, shift: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of y - shift and of its square (2, B, 1, C), and the y where y * sign is largest."""
    sums = total, squares = _zeros(y, 2)
    largest = torch.full_like(total, -torch.inf)
    flipped = bool((sign < 0).any())
    for n, p in _chunks(y):
        part = y[n, p].to(total.dtype)
        signed = part * sign if flipped else part
        largest[n] = largest[n].maximum(signed.amax(1, keepdim=True))
        part = part - shift
        total[n] += part.sum(1, keepdim=True)
        squares[n] += part.square_().sum(1, keepdim=True)
    return sums, largest * sign


def pooled(y: Tensor, mean: Tensor, gc: Tensor, bc: Tensor) -> tuple[Tensor, Tensor | None]:
    """Max and mean of z = (y - mean) * gc + bc over channels, (B, P, 2).

    Also how many channels have the max, (B, P, 1), if `pooled_backward` should not count them.
    """
    out = y.new_empty((*y.shape[:2], 2), dtype=_dtype(y))
    for n, p in _chunks(y):
        z = torch.addcmul(bc[n], y[n, p] - mean, gc[n])
        out[n, p, 0], out[n, p, 1] = z.amax(2), z.mean(2)
    return out, None  # counted where z is compared with it anyway


def output(y: Tensor, k: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor) -> Tensor:
    """relu(z * s + k), (B, P, C) in y's precision."""
    out = torch.empty_like(y)
    for n, p in _chunks(y):
        z = torch.addcmul(bc[n], y[n, p] - mean, gc[n])
        out[n, p] = z.mul_(s[n, p]).add_(k[n, p]).relu_()
    return out


def output_backward(
    y: Tensor, out: Tensor, go: Tensor, mean: Tensor, gc: Tensor, bc: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the output's gradient: q, the sums of q * s and q * s * (y - mean), and that of q * z.

    Returns:
        q = go where out > 0, (B, P, C); the first two sums over positions (2, B, 1, C); the third
        over channels (B, P, 1).
    """
    q, sums = torch.empty_like(y), _zeros(y, 2)
    plain, times_y = sums
    over_channels = torch.empty_like(s)
    for n, p in _chunks(y):
        torch.ops.aten.threshold_backward.grad_input(go[n, p], out[n, p], 0, grad_input=q[n, p])
        part = q[n, p].to(plain.dtype)
        rows = s[n, p].transpose(1, 2)  # (b, 1, p)
        plain[n] += torch.bmm(rows, part)
        over_z = torch.bmm(part, bc[n].transpose(1, 2))
        part = (y[n, p] - mean).mul_(part)
        times_y[n] += torch.bmm(rows, part)
        over_channels[n, p] = over_z.add_(torch.bmm(part, gc[n].transpose(1, 2)))
    return q, sums, over_channels


def pooled_backward(
    y: Tensor,
    batch: Moments,
    gc: Tensor,
    bc: Tensor,
    pooled: Tensor,
    several: Tensor | None,
    dpooled: Tensor,
    by_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over positions of dz, z's whole gradient, and of dz * (y - mean).

    Args:
        pooled, several: from `pooled`.
        dpooled: (B, P, 2), the gradient of pooled, in any precision.
        by_output: (2, B, 1, C), the sums of what `output_backward` adds to dz.

    Returns:
        Both sums, (2, B, 1, C); the channel gate's gradient; the number of positions with the
        largest y; and the gradient of the largest z divided by the number of channels that have
        it, (B, P, 1).
    """
    all_sums = _zeros(y, 3)
    plain, times_y, count = all_sums
    zmax, (dmax, dmean) = pooled[..., :1], _by_z(dpooled, y)
    share = torch.empty_like(dmax)
    for n, p in _chunks(y):
        part = y[n, p] - batch.mean
        z = torch.addcmul(bc[n], part, gc[n])
        at = torch.eq(part, batch.means[1, n], out=torch.empty_like(z))
        count[n] += at.sum(1, keepdim=True)
        torch.eq(z, zmax[n, p], out=at)
        share[n, p] = dmax[n, p] / at.sum(2, keepdim=True).clamp_min_(1)
        rows = share[n, p].transpose(1, 2)
        plain[n] += torch.bmm(rows, at) + dmean[n, p].sum(1, keepdim=True)
        times_y[n] += torch.bmm(dmean[n, p].transpose(1, 2), part)
        times_y[n] += torch.bmm(rows, at.mul_(part))
    sums = all_sums[:2].add_(by_output)
    return sums, torch.addcmul(sums[0] * batch.b, sums[1], batch.g), count.clamp_min_(1), share


def _by_z(dpooled: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a position's largest z, and of each z through their mean: (B, P, 1) each."""
    wide = dpooled.to(_dtype(y))
    return wide[..., :1].contiguous(), wide[..., 1:] / y.shape[2]


def statistics_backward(
    batch: Moments,
    weight: Tensor,
    d: Tensor,
    c: Tensor,
    sums: Tensor,
    count: Tensor,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of BN's weight and bias, and what `input_backward` adds.

    Args:
        batch: from `statistics`.
        weight: (C,), of BN.
        d: (2, B, 1, C), the gradient of `batch.x_means`.
        c: (B, 1, C), the channel gate.
        sums, count: from `pooled_backward`.
        positions: P.

    Returns:
        dweight and dbias, (C,); `at_largest`, `by_y` and `plain` of `input_backward`.
    """
    images, g = d.shape[1] * positions, batch.g
    average, largest = batch.means
    bias_sum, weight_sum = (c * sums).sum((1, 2))
    dbias = d.sum((0, 1, 2)) + bias_sum
    # if BN's weight is 0, all values are equal, and each of them is the maximum
    at_weight = torch.where(weight == 0, average, largest)
    by_means = torch.addcmul(d[0] * average, d[1], at_weight).sum((0, 1))
    dweight = (weight_sum + by_means).mul_(batch.deviation)
    gd = g * d
    by_y = (g * batch.deviation * dweight).mul_(-1 / images)
    plain = torch.sub(gd[0] / positions, g * dbias, alpha=1 / images)
    return dweight, dbias, gd[1] / count, by_y, plain


def input_backward(
    y: Tensor,
    q: Tensor,
    mean: Tensor,
    gc: Tensor,
    bc: Tensor,
    s: Tensor,
    pooled: Tensor,
    dpooled: Tensor,
    share: Tensor,
    largest: Tensor,
    at_largest: Tensor,
    by_y: Tensor,
    plain: Tensor,
) -> Tensor:
    """dz * gc + (y - mean) * by_y + plain, plus at_largest where y - mean is `largest`.

    Here dz = q * s + the gradient of the mean by z, plus `share` where z is the largest;
    (B, P, C) in y's precision.
    """
    out = torch.empty_like(y)
    zmax, (_, dmean) = pooled[..., :1], _by_z(dpooled, y)
    for n, p in _chunks(y):
        part = y[n, p] - mean
        at = torch.addcmul(bc[n], part, gc[n])
        torch.eq(at, zmax[n, p], out=at)
        dz = torch.addcmul(dmean[n, p], q[n, p].to(at.dtype), s[n, p]).addcmul_(at, share[n, p])
        torch.eq(part, largest[n], out=at)
        total = torch.addcmul(plain[n], dz, gc[n], out=dz).addcmul_(at, at_largest[n])
        out[n, p] = total.addcmul_(part, by_y)
    return out
