"""Whether two thumbnails show the same picture: aligns them, then compares their details.

The alignment is Lucas and Kanade's (1981), with a scale and a shift for each axis, on thumbnails
that are standardized, so that brightness and contrast don't matter. Details are what a blur of a
few pixels removes: two scans from the same device, or two photographs of the same kind of scene,
agree in their coarse structure but not in their details. These are compared tile by tile, so that
burnt-in text affects only the tiles that it covers.

Every function works on a batch of P pairs.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Images = NDArray[np.float32]
"""(P, side, side), gray values of 0 to 255."""

Windows = NDArray[np.float32]
"""(P, 4) scale and shift in x, scale and shift in y: point (u, v) of the second image, with
coordinates from -1 to 1, is point (sx u + tx, sy v + ty) of the first. (1, 0, 1, 0): all of it."""

_OUTLIER = 0.5  # standard deviations: larger differences lose weight
_LARGEST_STEP = 0.1  # per iteration
_NOISE = 1.5  # gray levels: a tile with a smaller standard deviation shows nothing
_AGREES = 0.6  # correlation from which a tile agrees


class Agreement(NamedTuple):
    """How well the details of aligned pairs agree, each (P,).

    Attributes:
        tiles: number of tiles that show details in either image.
        share: the share of these that agree.
        median: median correlation of these.
        inner_tiles, inner_share, inner_median: the same without the tiles near the border, as a
            frame, a scanner's texts and the edge of its sector are the same in different images.
        overlap: the share of the second image that the first one covers.
    """

    tiles: NDArray[np.int64]
    share: NDArray[np.float64]
    median: NDArray[np.float64]
    inner_tiles: NDArray[np.int64]
    inner_share: NDArray[np.float64]
    inner_median: NDArray[np.float64]
    overlap: NDArray[np.float64]


def register(
    first: Images, second: Images, windows: Windows, blurs: tuple[float, ...], steps: int
) -> Windows:
    """The windows of the first images that match the second ones.

    Args:
        first, second: P pairs.
        windows: initial windows.
        blurs: standard deviations of the Gaussian blurs, in pixels, applied in this order.
        steps: iterations for each blur.
    """
    for sigma in blurs:
        a, b = _blurred(first, sigma), _blurred(second, sigma)
        for _ in range(steps):
            windows = _step(a, b, windows)
    return windows


def _step(a: Images, b: Images, windows: Windows) -> Windows:
    """One Gauss-Newton iteration on robustly weighted squared differences."""
    side = b.shape[1]
    warped, inside = warp(a, windows)
    weight = inside.astype(np.float32)
    x, y = _standardized(warped, weight), _standardized(b, weight)
    difference = y - x
    weight /= 1 + np.square(difference / _OUTLIER)
    u = _coordinates(side)
    along_x = np.zeros_like(x)  # central differences per unit of the first image's coordinates
    along_x[:, :, 1:-1] = (x[:, :, 2:] - x[:, :, :-2]) * (side / 4)
    along_x /= windows[:, 0, None, None]
    along_y = np.zeros_like(x)
    along_y[:, 1:-1] = (x[:, 2:] - x[:, :-2]) * (side / 4)
    along_y /= windows[:, 2, None, None]
    jacobian = np.stack([along_x * u, along_x, along_y * u[:, None], along_y], axis=1)
    jacobian = jacobian.reshape(len(x), 4, -1)  # (P, 4, side, side) -> (P, 4, pixels)
    weighted = jacobian * weight.reshape(len(x), 1, -1)
    hessian = weighted @ jacobian.transpose(0, 2, 1)
    hessian += np.float32(1e-3 * side * side) * np.eye(4, dtype=np.float32)
    change = np.linalg.solve(hessian, weighted @ difference.reshape(len(x), -1, 1))[..., 0]
    moved = windows + np.clip(change, -_LARGEST_STEP, _LARGEST_STEP)
    moved[:, 0::2] = np.clip(moved[:, 0::2], 0.5, 2.0)
    moved[:, 1::2] = np.clip(moved[:, 1::2], -0.5, 0.5)
    return moved


def warp(images: Images, windows: Windows) -> tuple[Images, NDArray[np.bool_]]:
    """The windows cut out and resized to full size, and a mask of the pixels inside the images."""
    side = images.shape[1]
    u = _coordinates(side)
    x = windows[:, 0, None] * u + windows[:, 1, None]  # (P, side)
    y = windows[:, 2, None] * u + windows[:, 3, None]
    warped: Any = _interpolation(y, side) @ images @ _interpolation(x, side).transpose(0, 2, 1)
    return warped, (np.abs(x) <= 1)[:, None, :] & (np.abs(y) <= 1)[:, :, None]


def _coordinates(side: int) -> NDArray[np.float32]:
    return (2 * (np.arange(side, dtype=np.float32) + 0.5) / side - 1).astype(np.float32)


def _interpolation(positions: NDArray[np.float32], side: int) -> Images:
    """(P, m) positions from -1 to 1 -> (P, m, side) weights of linear interpolation."""
    pixels = np.clip((positions + 1) / 2 * side - 0.5, 0, side - 1)[..., None]
    return np.maximum(0, 1 - np.abs(pixels - np.arange(side, dtype=np.float32))).astype(np.float32)


def _blurred(images: Images, sigma: float) -> Images:
    return gaussian_filter(images, (0, sigma, sigma), mode="nearest") if sigma else images


def _standardized(images: Images, weight: Images) -> Images:
    """Mean 0 and standard deviation 1 over the weighted pixels of each image."""
    total = weight.sum((1, 2), keepdims=True) + 1e-6
    centered = images - (images * weight).sum((1, 2), keepdims=True) / total
    deviation = np.sqrt((weight * np.square(centered)).sum((1, 2), keepdims=True) / total)
    return centered / np.maximum(deviation, 1e-3)


def correlation(first: Images, second: Images, windows: Windows) -> NDArray[np.float32]:
    """(P,) correlation of all pixels of aligned pairs."""
    warped, inside = warp(first, windows)
    weight = inside.astype(np.float32)
    x, y = _standardized(warped, weight), _standardized(second, weight)
    return (weight * x * y).sum((1, 2)) / np.maximum(weight.sum((1, 2)), 1)


def agreement(first: Images, second: Images, windows: Windows, *, sigma: float) -> Agreement:
    """How well the details of aligned pairs agree.

    Args:
        first, second: P pairs; their side is a multiple of 8.
        windows: from `register`.
        sigma: the blur that removes details, in pixels.
    """
    warped, inside = warp(first, windows)
    mask = inside.astype(np.float32)
    a, b = _details(warped, sigma) * mask, _details(second, sigma) * mask
    pixels = np.maximum(_tiles(mask), 1)
    energies = [_tiles(np.square(x)) / pixels for x in (a, b)]
    correlations = (_tiles(a * b) / pixels) / np.sqrt(
        (energies[0] + 0.1 * _NOISE**2) * (energies[1] + 0.1 * _NOISE**2)
    )
    shown = np.zeros(pixels.shape, bool)
    for x, energy in zip((a, b), energies, strict=True):
        whole = np.square(x).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)
        shown |= energy > np.maximum(_NOISE**2, whole / 16)[:, None, None]
    shown &= pixels > 0.6 * pixels.max()
    places = np.abs(np.arange(pixels.shape[1]) - (pixels.shape[1] - 1) / 2)
    inner = np.maximum(places[:, None], places) <= pixels.shape[1] / 4 + 0.75
    return Agreement(
        *_summary(correlations, shown), *_summary(correlations, shown & inner), mask.mean((1, 2))
    )


def _details(images: Images, sigma: float) -> Images:
    smooth = _blurred(images, sigma / 4)
    return smooth - _blurred(smooth, sigma)


def _tiles(images: Images) -> Images:
    """(P, side, side) -> (P, 7, 7) sums over tiles of a quarter of the side, half overlapping."""
    pairs, side, _ = images.shape
    blocks = images.reshape(pairs, 8, side // 8, 8, side // 8).sum((2, 4))
    return blocks[:, 1:, 1:] + blocks[:, :-1, 1:] + blocks[:, 1:, :-1] + blocks[:, :-1, :-1]


def _summary(
    correlations: NDArray[np.floating], used: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Number of tiles used, share of them that agree, and their median correlation."""
    count = used.sum((1, 2))
    share = ((correlations > _AGREES) & used).sum((1, 2)) / np.maximum(count, 1)
    values = np.where(used, correlations, np.nan).reshape(len(used), -1)
    values[count == 0] = 0  # numpy would warn, and warnings' filters belong to all threads
    return count, share, np.nanmedian(values, axis=1)
