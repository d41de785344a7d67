"""An attention map laid over its image, with the range of values that the colors stand for.

The image stays underneath in gray, slightly compressed so that black and white can also show
color. The attention is color on top, and the stronger the more opaque: nothing at the low end
of its range, then teal, green and yellow. The colors are the upper part of matplotlib's
viridis, which is perceptually uniform, survives grayscale printing and is readable for
color-blind people; a thin white outline can mark a level without any color.

A color shows where a value lies in the picture's range, not the value: `describe` gives the
true numbers, to be printed with every picture. A map with few cells is drawn as those cells:
a smooth picture would look finer than what the network saw.
"""

import math
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from regard.errors import UsageError

Picture = NDArray[np.uint8]
Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
_GRAY = (0.10, 0.80)  # black and white of the image, of 0..1: color must show on both
_OPACITY = 0.75  # of the strongest attention: a quarter of the image always shows through
VIRIDIS_FROM = 0.30  # below is a violet too dark to tell from a dark image
_FADED = 0.5  # towards white, for the part that the network did not see
FEW_CELLS = 16  # a map of at most this many is drawn as cells, not smoothly
_ROUNDING = 1e-6  # a relative spread below this is float32 rounding, not attention


def _as_image(image: ArrayLike) -> Image.Image:
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UsageError(f"image of {array.dtype}: must be uint8, 0 to 255")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise UsageError(f"image of shape {array.shape}: must be (H, W) or (H, W, 3)")
    return Image.fromarray(np.ascontiguousarray(array))


def _as_map(attention: ArrayLike) -> Floats:
    array = np.asarray(attention, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(f"attention of shape {array.shape}: must be (h, w)")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise UsageError(f"attention has {bad} values of {array.size} that are not finite")
    return array


def _is_flat(attention: Floats) -> bool:
    return bool(np.ptp(attention) <= _ROUNDING * np.abs(attention).max())


def _relative(attention: Floats, limits: tuple[float, float] | None) -> Floats:
    """The map scaled from 0 at the low limit to 1 at the high one; a constant map becomes 0."""
    if limits is None:
        if _is_flat(attention):
            return np.zeros_like(attention)
        limits = (attention.min(), attention.max())
    low, high = limits
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise UsageError(f"limits={limits}: give two finite numbers, the lower first")
    return np.clip((attention - low) / (high - low), 0.0, 1.0)


def resize_image(image: ArrayLike, size: tuple[int, int]) -> Picture:
    """An image at `size` (height, width): pixels are repeated to enlarge, averaged to reduce.

    Args:
        image: (H, W) or (H, W, 3), uint8.
        size: in pixels.

    Returns:
        (height, width) or (height, width, 3), uint8.

    Raises:
        UsageError: the array is not such an image, or a size is below 1.
    """
    picture = _as_image(image)
    height, width = size
    if height < 1 or width < 1:
        raise UsageError(f"size={size}: give a height and a width of at least 1 pixel")
    enlarge = height >= picture.height and width >= picture.width
    how = Image.Resampling.NEAREST if enlarge else Image.Resampling.BOX
    return np.asarray(picture.resize((width, height), how))


def shrink_mask(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask (H, W) at a smaller size (height, width): a pixel is marked if any part of it is.

    So nothing that is marked disappears, however small.
    """
    height, width = size
    shares = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(shares) > 0


def has_few_cells(attention: ArrayLike) -> bool:
    """Whether a map (h, w) is so coarse that it is drawn as cells."""
    return np.size(attention) <= FEW_CELLS


def _covered(low: float, high: float, size: int, cells: int) -> tuple[slice, tuple[float, float]]:
    """The pixels of `size`, at least one, between `low` and `high`, and their part of the cells."""
    first = min(max(round(low), 0), math.ceil(high) - 1, size - 1)
    pixels = slice(first, max(min(round(high), size), first + 1))
    ends = [cells * (at - low) / (high - low) for at in (pixels.start, pixels.stop)]
    return pixels, (max(ends[0], 0.0), min(ends[1], float(cells)))


def place(
    attention: ArrayLike,
    size: tuple[int, int],
    *,
    box: Box | None = None,
    outside: float = 0.0,
    smooth: bool = True,
) -> Floats:
    """Places a map where it belongs in the image, upsampled bilinearly (align_corners=False).

    Args:
        attention: (h, w) floats.
        size: (height, width) of the image, in pixels.
        box: left, top, right and bottom of what the map covers, in the same pixels, of which whole
            ones are covered. It may reach beyond the image, where a network saw padding. Default:
            the whole image.
        outside: the value of pixels that the map does not cover.
        smooth: if False, each value becomes a rectangle.

    Returns:
        (height, width).

    Raises:
        UsageError: the array is not such a map, or the box covers no pixel of the image.
    """
    height, width = size
    values = _as_map(attention)
    left, top, right, bottom = box or (0.0, 0.0, float(width), float(height))
    if (
        not (left < right and top < bottom and left < width and top < height)
        or min(right, bottom) <= 0
    ):
        raise UsageError(f"box={box}: it holds no pixel of an image {width} wide, {height} high")
    columns, across = _covered(left, right, width, values.shape[1])
    rows, down = _covered(top, bottom, height, values.shape[0])
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    large = Image.fromarray(values.astype(np.float32)).resize(
        (columns.stop - columns.start, rows.stop - rows.start), how,
        box=(across[0], down[0], across[1], down[1]),
    )  # fmt: skip
    placed = np.full(size, outside, np.float64)
    placed[rows, columns] = np.asarray(large)
    return placed


def _colors(gray: Floats, strength: Floats) -> Floats:
    """Gray image and attention, each (H, W) in 0..1 -> colors (H, W, 3) in 0..1.

    out = (1 - w) gray + w viridis(strength), w = 0.75 strength.
    """
    low, high = _GRAY
    viridis = matplotlib.colormaps["viridis"]
    color = viridis(VIRIDIS_FROM + (1.0 - VIRIDIS_FROM) * strength)[..., :3]
    weight = (_OPACITY * strength)[..., None]
    return (1.0 - weight) * (low + (high - low) * gray)[..., None] + weight * color


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1, constant_values=True)  # a region at the border stays open there
    center = padded[1:-1, 1:-1]
    rows = padded[:-2, 1:-1] & padded[2:, 1:-1]
    return center & rows & padded[1:-1, :-2] & padded[1:-1, 2:]


def overlay(
    image: ArrayLike,
    attention: ArrayLike,
    *,
    size: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
    outline: float | None = None,
    box: Box | None = None,
    smooth: bool | None = None,
) -> Picture:
    """An attention map in color over its image in gray.

    The map is scaled to 0..1 by its limits, then resized bilinearly with Pillow (pixel centers at
    half pixels, corners not aligned; triangle-filtered if it is reduced). Map and image cover the
    same field, whatever their shapes: the result has the image's aspect. A map that is constant
    within rounding highlights nothing: the result is the gray image.

    Args:
        image: (H, W) or (H, W, 3), uint8.
        attention: (h, w), real numbers of any range.
        size: (height, width) of the result in pixels; default: the image's own. A small image
            enlarged here keeps its square pixels under a smooth map.
        limits: the attention values without color and with the strongest color; default: the
            map's own minimum and maximum. Use the same limits for pictures to be compared.
        outline: a level of 0..1 between the limits around which a white line is drawn, 2 pixels
            wide; for results of about 100 pixels and more. Default: none.
        box: left, top, right, bottom of what the map covers, in the image's own pixels; the
            rest of the image is faded. Default: the whole image.
        smooth: interpolate, or draw each value as a rectangle; default: interpolate maps of more
            than 16 values.

    Returns:
        (height, width, 3), uint8.

    Raises:
        UsageError: an image or a map of another kind, values that are not finite, limits that
            are not ascending, an outline outside 0..1, or a box outside the image.
    """
    if outline is not None and not 0.0 < outline < 1.0:
        raise UsageError(f"outline={outline}: give a level between 0 and 1")
    picture = _as_image(image)
    height, width = size if size is not None else (picture.height, picture.width)
    gray = resize_image(np.asarray(picture.convert("L")), (height, width)) / 255.0
    if box is not None:
        across, down = width / picture.width, height / picture.height
        box = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    relative = _relative(_as_map(attention), limits)
    if smooth is None:
        smooth = not has_few_cells(relative)
    placed = place(relative, (height, width), box=box, outside=np.nan, smooth=smooth)
    unseen = np.isnan(placed)
    strength = np.clip(np.nan_to_num(placed), 0.0, 1.0)
    colors = _colors(gray, strength)
    colors[unseen] += _FADED * (1.0 - colors[unseen])
    if outline is not None:
        inside = strength >= outline
        colors[inside & ~_eroded(_eroded(inside))] = 1.0
    return np.rint(255.0 * colors).astype(np.uint8)


def _decimals(value: float) -> int:
    """Decimals that show two digits of a number, or more where it is large."""
    return max(1 - math.floor(math.log10(abs(value))), 0) if value else 0


def _numbers(low: float, high: float, between: float) -> list[str]:
    """Three numbers with equal decimals, enough to distinguish `low` from `high`."""
    decimals = _decimals(high - low)
    if decimals > 5:  # longer ones would overlap below a scale
        digits = 2 + math.floor(math.log10(max(abs(low), abs(high)) / (high - low)))
        return [f"{value:.{max(digits, 2)}g}" for value in (low, high, between)]
    decimals = min(max(decimals, min(_decimals(between), decimals + 1)), 5)
    return [f"{value:.{decimals}f}" for value in (low, high, between)]


def describe(attention: ArrayLike) -> str:
    """A map's true range in words, for the picture's caption.

    "attention 0.0002–0.0031; uniform would be 0.0010" for a map that sums to 1 (within 1 %, for
    half precision), "attention 0.12–0.93; mean 0.40" for others, and "attention 0.0069
    everywhere" for a constant map.

    Raises:
        UsageError: not an (h, w) map of finite numbers.
    """
    array = _as_map(attention)
    if _is_flat(array):
        return f"attention {array.mean():.2g} everywhere"
    numbers = spread(array)
    assert numbers is not None
    low, high, third = numbers
    return f"attention {low}–{high}; {third.replace('uniform', 'uniform would be')}"


def sums_to_one(attention: ArrayLike) -> bool:
    """Whether a map of finite numbers sums to 1, within 1 % (for half precision)."""
    array = np.asarray(attention, np.float64)
    return bool(array.min() >= 0 and abs(array.sum() - 1.0) < 0.01)


def spread(attention: ArrayLike) -> tuple[str, str, str] | None:
    """A map's lowest and highest value, and "mean 0.40" or "uniform 0.0069", for a scale.

    None for a map that is constant within rounding.

    Raises:
        UsageError: not an (h, w) map of finite numbers.
    """
    array = _as_map(attention)
    if _is_flat(array):
        return None
    a_share = sums_to_one(array)
    third = 1.0 / array.size if a_share else float(array.mean())
    low, high, other = _numbers(float(array.min()), float(array.max()), third)
    return low, high, f"{'uniform' if a_share else 'mean'} {other}"


def color_key(width: int, height: int) -> Picture:
    """A key to the colors: attention from least (left) to most, over black (top) to white.

    Returns:
        (height, width, 3), uint8.
    """
    strength, gray = np.meshgrid(np.linspace(0.0, 1.0, width), np.linspace(0.0, 1.0, height))
    return np.rint(255.0 * _colors(gray, strength)).astype(np.uint8)


def color_bar(low: float, high: float, *, width: int = 240) -> Picture:
    """A color scale for figures: the colors over black to white, with `low` and `high` below.

    Args:
        low: the attention value without color.
        high: the attention value with the strongest color.
        width: in pixels; the height is a sixth of it, and at least 40.

    Returns:
        (height, width, 3), uint8, on white.

    Raises:
        UsageError: low is not below high, or the width is under 120.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise UsageError(f"low={low}, high={high}: give finite numbers, the lower first")
    if width < 120:
        raise UsageError(f"width={width}: give at least 120 pixels, to keep numbers legible")
    height = max(width // 6, 40)
    text_height = height * 2 // 5
    bar = Image.new("RGB", (width, height), "white")
    bar.paste(Image.fromarray(color_key(width, height - text_height - 2)))
    draw = ImageDraw.Draw(bar)
    font: Any = ImageFont.load_default(size=text_height * 0.8)
    left, right, _ = _numbers(low, high, high)
    draw.text((0, height), left, fill="black", font=font, anchor="ld")
    draw.text((width, height), right, fill="black", font=font, anchor="rd")
    return np.asarray(bar)
