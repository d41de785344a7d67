"""Small gray copies of images, for finding near-duplicates."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.data.images import Stored, read_stored
from regard.data.table import ImageTable

SIDE = 32  # pixels; 1 KB per image


def thumbnail(pixels: NDArray[Any], side: int = SIDE) -> NDArray[np.uint8]:
    """(H, W, C) of any dtype -> (side, side) uint8 gray; the aspect ratio is not preserved.

    8-bit values stay unchanged; others are stretched from the image's own lowest to its
    highest finite value.
    """
    if pixels.dtype != np.uint8:
        pixels = as_8_bit(pixels, max(1, min(pixels.shape[:2]) // (4 * side)))
    image = Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    )
    # "L" before resizing: a third of the work; BILINEAR averages over all pixels when it reduces
    small = image.convert("L").resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(small)


def as_8_bit(pixels: NDArray[Any], step: int = 1) -> NDArray[np.uint8]:
    """Values stretched from the lowest to the highest finite one; takes every step-th pixel."""
    values = pixels[::step, ::step].astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    if low == high:
        return np.zeros(values.shape, np.uint8)
    scaled = (np.where(finite, values, low) / 2 - low / 2) / (high / 2 - low / 2)
    return np.rint(scaled * 255).astype(np.uint8)


def read_thumbnail(table: ImageTable, i: int, side: int = SIDE) -> NDArray[np.uint8]:
    """The thumbnail of image i, (side, side) uint8.

    Raises:
        ImageError: its file can't be read.
    """
    return read_thumbnail_and_side(table, i, side)[0]


def read_thumbnail_and_side(
    table: ImageTable, i: int, side: int = SIDE
) -> tuple[NDArray[np.uint8], int]:
    """The thumbnail of image i, and the shorter side, in pixels, of the image decoded for it.

    A JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size if that leaves 3 `side` pixels.

    Raises:
        ImageError: its file can't be read.
    """
    if table.files is not None:
        stored = read_stored(table.files[i], at_least=3 * side)
    else:
        stored = Stored(table.read(i))
    return thumbnail(stored.pixels, side), min(stored.pixels.shape[:2])
