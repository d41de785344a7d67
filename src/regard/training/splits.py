"""The images of one split, held in memory or streamed, with what can't be read left out."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.loading import Reader, StreamingLoader, decode_all, default_workers, fits_in_memory
from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable
from regard.errors import ImageError, UsageError
from regard.training.config import Recipe

LOOKED_AT = 20_000  # images that are decoded before training where they are streamed
MEASURED = 2_000  # images from which mean and deviation are taken


@dataclass
class LoadedSplit:
    """One split.

    Attributes:
        reader: of its readable images.
        images: those, held: (N, C, H, W), or a list of (C, H, W) where the cut is random; None
            where they are streamed.
        unreadable: (path, reason) of those left out before training.
        lost: (row, reason) of those that the last evaluation left out.
    """

    reader: Reader
    images: Tensor | list[Tensor] | None
    unreadable: list[tuple[str, str]]
    lost: list[tuple[int, str]] = field(default_factory=list)

    @property
    def table(self) -> ImageTable:
        """Of its readable images."""
        return self.reader.table


def load_split(
    reader: Reader, recipe: Recipe, say: Callable[[str], None], split: str, *, show: bool
) -> LoadedSplit:
    """Holds a split's images where they fit, or looks at them to find those that can't be read."""
    table = reader.table
    held = recipe.memory == "yes" or (recipe.memory == "auto" and fits_in_memory(reader))
    images: Tensor | list[Tensor] | None = None
    with _counting(len(table) if held else min(len(table), LOOKED_AT), split, show) as on_image:
        if held:
            images, bad = decode_all(reader, on_image=on_image)
        else:
            bad = _unreadable(reader, on_image)
    good = np.setdiff1d(np.arange(len(table)), [row for row, _ in bad])
    if isinstance(images, Tensor):
        images = images[torch.from_numpy(good)] if bad else images
    elif images is not None:
        images = [images[i] for i in good.tolist()]
    readable = dataclasses.replace(reader, table=table.select(good)) if bad else reader
    return LoadedSplit(readable, images, [(table.path(row), reason) for row, reason in bad])


@contextmanager
def _counting(total: int, split: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, for what takes longer than a moment."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (show and console.is_terminal and total > 500):
        yield lambda n: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"reading {total:,} {split} images", total=total)
        yield lambda n: bar.update(task, advance=n)


def _unreadable(reader: Reader, on_image: Any) -> list[tuple[int, str]]:
    """Rows that can't be read, of up to LOOKED_AT, evenly spread; the others when met."""

    table = reader.table

    def look(row: int) -> tuple[int, str] | None:
        try:
            # a JPEG at an eighth of its size: all of it is read
            table.read(row, at_least=1, value_range=reader.preprocess.value_range)
        except ImageError as error:
            return row, str(error)
        return None

    rows = _spread(len(table), LOOKED_AT)
    bad = []
    with ThreadPoolExecutor(default_workers()) as pool:
        for found in pool.map(look, rows.tolist()):
            on_image(1)
            if found is not None:
                bad.append(found)
    return bad


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """Up to `most` rows, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def check_deviation(part: LoadedSplit, split: str) -> None:
    """Refuses a split whose images, or up to MEASURED of them, all have one same value.

    Raises:
        UsageError: they do: nothing can be learned from them, nor tested on them.
    """
    low, high = math.inf, -math.inf
    for row in _spread(len(part.table), MEASURED).tolist():
        try:
            image = part.reader.decode(row) if part.images is None else part.images[row]
        except ImageError:
            continue
        low, high = min(low, float(image.min())), max(high, float(image.max()))
        if low < high:
            return
    if low == high:
        raise UsageError(
            f"all pixels of the {split} images have the same value (deviation 0): see them with "
            "`regard data`"
        )


def measured(part: LoadedSplit, preprocess: Preprocess) -> Preprocess:
    """With mean and deviation of the training images' channels, of up to MEASURED of them."""
    rows = np.unique(
        np.linspace(0, len(part.table) - 1, min(len(part.table), MEASURED)).astype(int)
    )
    spans = [(start, min(64, len(rows) - start)) for start in range(0, len(rows), 64)]
    if isinstance(part.images, Tensor):
        held, at = part.images, torch.from_numpy(rows)
        batches = (held[at[start : start + count]] for start, count in spans)
    else:
        reader = Reader(part.table.select(rows), preprocess)
        batches = (batch.images for batch in StreamingLoader(reader, None, 0, 0).batches(spans))
    pixels, total, squares = 0, torch.zeros(1).double(), torch.zeros(1).double()
    for images in batches:  # piece by piece: all of them as doubles could be gigabytes
        values = images.double() / 255
        pixels += values.numel() // values.shape[1]
        total = total + values.sum(dim=(0, 2, 3))
        squares = squares + values.square().sum(dim=(0, 2, 3))
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp_min(0).sqrt()
    return dataclasses.replace(
        preprocess,
        mean=tuple(round(v, 6) for v in mean.tolist()),
        std=tuple(round(max(v, 1e-3), 6) for v in std.tolist()),
    )
