"""What the images of a data set have in common: whether any is in color, and the value range.

The whole data set is treated alike: measurements (signed, 32-bit and float images, see
`read_image`) are scaled to 0..1 by the range of the training images, so that brightness remains
comparable between images.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.data.images import FORMATS, Stored, ValueRange, is_gray, read_stored
from regard.data.loading import default_workers
from regard.data.members import open_binary
from regard.data.table import ImageTable
from regard.errors import ImageError, UsageError
from regard.files import spread

LIMIT = 20_000  # images to look at, evenly spread
SAMPLE = 64  # images whose size is looked at, if only sizes are needed
_GRAY_MODES = ("1", "L", "LA", "I;16", "I;16B")
_PLAIN = tuple(f for f in FORMATS if f not in ("TIFF", "PPM"))  # formats without measurements
_EVERY = 30.0  # seconds between progress messages

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """The result of a survey.

    Attributes:
        channels: 3 if any image is in color, else 1.
        value_range: lowest and highest value of the training images' measurements (of all
            images' if there are no splits); None if there are no measurements.
        shorter_sides: in pixels, of up to SAMPLE images.
    """

    channels: int
    value_range: ValueRange | None
    shorter_sides: list[int]


class _Look(NamedTuple):
    gray: bool
    value_range: ValueRange | None
    shorter_side: int


def survey(table: ImageTable, limit: int = LIMIT) -> Survey:
    """Looks at up to `limit` images; for most, the header is enough.

    Raises:
        UsageError: none of the images can be read.
    """
    rows = spread(len(table), limit)
    training = bool(np.any(table.splits == "train"))
    colored, lows, highs, fault = False, [], [], ""
    sides: dict[int, int] = {}
    started = said = time.monotonic()
    for done, (row, look) in enumerate(_looks(table, rows), start=1):
        if isinstance(look, str):
            fault = fault or look
            continue
        colored = colored or not look.gray
        sides[row] = look.shorter_side
        if look.value_range is not None and (not training or table.splits[row] == "train"):
            lows.append(look.value_range[0])
            highs.append(look.value_range[1])
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            log.info("looked at %d of %d images in %.0f s", done, len(rows), said - started)
    if not sides:
        raise UsageError(f"{table.name}: none of the images tried can be read; {fault}")
    values = list(sides.values())
    return Survey(
        channels=3 if colored else 1,
        value_range=(min(lows), max(highs)) if lows else None,
        shorter_sides=[values[k] for k in spread(len(sides), SAMPLE)],
    )


def range_of(stored: Stored) -> ValueRange | None:
    """Lowest and highest finite value of measurements; None for other images."""
    if not stored.is_measurement:
        return None
    finite = stored.pixels[np.isfinite(stored.pixels)]
    return (float(finite.min()), float(finite.max())) if finite.size else None


def _looks(table: ImageTable, rows: NDArray[np.int64]) -> Iterator[tuple[int, _Look | str]]:
    color_seen = False

    def look(row: int) -> _Look | str:
        nonlocal color_seen
        try:
            found = (
                _look_at_array(table, row)
                if table.files is None
                else _look_at_file(table.files[row], color_seen)
            )
        except ImageError as error:
            return str(error)
        color_seen = color_seen or not found.gray
        return found

    with ThreadPoolExecutor(default_workers()) as pool:
        for start in range(0, len(rows), 256):  # in parts: results are consumed as they come
            part = rows[start : start + 256].tolist()
            yield from zip(part, pool.map(look, part), strict=True)


def _look_at_array(table: ImageTable, row: int) -> _Look:
    pixels = table.read(row)
    return _Look(is_gray(pixels), None, min(pixels.shape[:2]))


def _look_at_file(path: str, color_seen: bool) -> _Look:
    """From the header if that is enough, else from the pixels; JPEGs at an eighth of their size."""
    side = None
    try:
        with open_binary(path) as file, Image.open(file, formats=_PLAIN) as image:
            side = min(image.size)
            if image.mode in _GRAY_MODES:
                return _Look(True, None, side)
            if color_seen:
                return _Look(False, None, side)
    except Exception:  # another format, or broken: read_stored says what it is
        side = None
    stored = read_stored(path, at_least=1)
    return _Look(is_gray(stored.pixels), range_of(stored), side or min(stored.pixels.shape[:2]))
