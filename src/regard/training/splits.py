"""The images of each split: in memory or streamed, without those that can't be read."""

import dataclasses
import logging
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.loading import (
    MEMORY_LIMIT,
    Reader,
    Spans,
    StreamingLoader,
    fits_in_memory,
)
from regard.data.preprocess import Preprocess
from regard.data.table import SPLITS, ImageTable
from regard.data.workers import default_workers, read_ahead
from regard.errors import ImageError, UsageError
from regard.files import plural, spread
from regard.log import counting
from regard.machine import free_memory
from regard.training.config import Recipe
from regard.training.distributed import Ranks
from regard.training.sharing import decode_together, rows_of

log: logging.Logger = logging.getLogger(__name__)

CHECKED = 20_000  # images that are decoded as a check before training if they are streamed
MEASURED = 2_000  # images from which mean and standard deviation are computed


@dataclass
class LoadedSplit:
    """One split.

    Attributes:
        reader: reads its images, without those left out.
        images: the decoded images: (N, C, H, W), or a list of (C, H, W) if the crop is random;
            None if they are streamed.
        left_out: (path, reason) of unreadable images, which are not part of the split.
        missing: reasons by row, for images of the split that can't be read now: they were
            readable when the run was started, and keep their positions in the sample order.
        lost: (row, reason) of images that the last evaluation could not read.
    """

    reader: Reader
    images: Tensor | list[Tensor] | None
    left_out: list[tuple[str, str]]
    missing: dict[int, str] = field(default_factory=dict)
    lost: list[tuple[int, str]] = field(default_factory=list)

    @property
    def table(self) -> ImageTable:
        """The split's images."""
        return self.reader.table

    @property
    def nbytes(self) -> int:
        """Size of the decoded images in memory, in bytes."""
        if self.images is None:
            return 0
        if isinstance(self.images, Tensor):
            return self.images.nbytes
        return sum(image.nbytes for image in self.images)


def load_splits(
    table: ImageTable,
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    left_out: dict[str, str] | None = None,
    show: bool = True,
    ranks: Ranks | None = None,
) -> dict[str, LoadedSplit]:
    """Loads every split of the table that has images.

    Args:
        table: all images, with their splits.
        preprocess: to the network's input size.
        recipe: its augmentation is for the training split; its `memory` is for all splits together.
        left_out: reasons by key, for images that a resumed run left out when it was started
            (default: a new run; those that can't be read now are left out).
        show: whether to show progress.
        ranks: the processes that train: all of them leave out what one of them can't read.

    Raises:
        UsageError: more images are unreadable than recipe.max_unreadable allows, or no training
            image is readable.
    """
    ranks = ranks or Ranks()
    # with several processes the shares exist twice while they are copied to shared memory
    limit = min(MEMORY_LIMIT, free_memory() / (2 if ranks.local == 1 else 4))
    parts: dict[str, LoadedSplit] = {}
    for split in SPLITS:
        rows = np.flatnonzero(table.splits == split)
        if len(rows) == 0:
            continue
        augmentation = recipe.augmentation if split == "train" else None
        reader = Reader(table.select(rows), preprocess, augmentation)
        parts[split] = load_split(
            reader, recipe, split, limit=limit, left_out=left_out, show=show, ranks=ranks
        )
        limit -= parts[split].nbytes
    _check_unreadable(table, recipe, parts, new=left_out is None)
    for split, part in parts.items():
        check_deviation(part, split)
    return parts


def _check_unreadable(
    table: ImageTable, recipe: Recipe, parts: dict[str, LoadedSplit], *, new: bool
) -> None:
    unreadable = [entry for part in parts.values() for entry in part.left_out]
    if unreadable and new:
        share = len(unreadable) / len(table)
        count = f"{len(unreadable)} of {len(table)} images can't be read ({share:.1%})"
        if share > recipe.max_unreadable:
            raise UsageError(
                f"{count}, more than max_unreadable={recipe.max_unreadable:g}: "
                + "; ".join(why for _, why in unreadable[:3])
            )
        log.info(f"note: {count}; they are left out and listed in unreadable.csv")
    if missing := sum(len(part.missing) for part in parts.values()):
        log.info(f"note: not there any more since the run started: {plural(missing, 'image')}")
    for split in dict.fromkeys(("train", *parts)):
        if split not in parts or len(parts[split].table) == len(parts[split].missing):
            first = parts[split].left_out[:1] if split in parts else []
            why = f" ({first[0][1]})" if first else ""
            raise UsageError(f"{table.name}: no {split} image can be read{why}")


def load_split(
    reader: Reader,
    recipe: Recipe,
    split: str,
    *,
    limit: float = MEMORY_LIMIT,
    left_out: dict[str, str] | None = None,
    show: bool = True,
    ranks: Ranks | None = None,
) -> LoadedSplit:
    """Decodes a split into memory where it fits, or checks which of its images can be read.

    Args:
        reader: of all its images.
        recipe: its `memory` decides whether images are held.
        split: its name.
        limit: bytes that memory="auto" may use.
        left_out: as for `load_splits`.
        show: whether to show progress.
        ranks: as for `load_splits`.
    """
    ranks = ranks or Ranks()
    known = left_out or {}
    table = reader.table
    paths = [table.key(i) for i in range(len(table))] if known else []
    skip = {i for i, path in enumerate(paths) if path in known}
    images, bad = None, None
    fits = recipe.memory == "auto" and all(ranks.all(fits_in_memory(reader, limit)))
    if recipe.memory == "yes" or fits:
        most = limit if recipe.memory == "auto" else float("inf")
        count = len(range(ranks.place, len(table), ranks.local))
        with counting(f"reading {split} images", count, show=show) as on_image:
            images, bad = decode_together(reader, ranks, skip=skip, limit=most, on_image=on_image)
        if any(ranks.all(images is None)):
            images = None
    if images is None:
        rows = spread(len(table), CHECKED)[ranks.rank :: ranks.count]
        with counting(f"checking {split} images", len(rows), show=show) as on_image:
            bad = _unreadable(reader, rows, skip, on_image)
    assert bad is not None
    if ranks.local < ranks.count:  # the file may be there on another machine
        bad = [(row, f"{why} (on {socket.gethostname()})") for row, why in bad]
    bad = sorted({row: (row, why) for found in ranks.all(bad) for row, why in found}.values())
    if left_out is None:
        return _without(reader, images, bad, ranks)
    part = _without(reader, images, [(i, known[paths[i]]) for i in sorted(skip)], ranks)
    if images is not None:  # streamed ones are found when they are read
        new_rows = np.cumsum([i not in skip for i in range(len(table))]) - 1
        part.missing = {int(new_rows[row]): why for row, why in bad}
    return part


def _without(
    reader: Reader, images: Tensor | list[Tensor] | None, bad: list[tuple[int, str]], ranks: Ranks
) -> LoadedSplit:
    table = reader.table
    if not bad:
        return LoadedSplit(reader, images, [])
    good = np.setdiff1d(np.arange(len(table)), [row for row, _ in bad])
    if isinstance(images, Tensor):
        images = rows_of(images, good, ranks)
    elif images is not None:
        images = [images[i] for i in good.tolist()]
    readable = dataclasses.replace(reader, table=table.select(good))
    return LoadedSplit(readable, images, [(table.path(row), why) for row, why in bad])


def _unreadable(
    reader: Reader, rows: NDArray[np.int64], skip: set[int], on_image: Callable[[int], None]
) -> list[tuple[int, str]]:
    """(row, reason) of the unreadable images among these rows."""
    table, value_range = reader.table, reader.preprocess.value_range

    def check(row: int) -> tuple[int, str] | None:
        try:
            if row not in skip:
                # a JPEG at an eighth of its size: the whole file is still read
                table.read(row, at_least=1, value_range=value_range)
        except ImageError as error:
            return row, str(error)
        return None

    bad = []
    threads = default_workers()
    for result in read_ahead(rows.tolist(), check, threads, 64 * threads):
        on_image(1)
        if result is not None:
            bad.append(result)
    return bad


def check_deviation(part: LoadedSplit, split: str) -> None:
    """Refuses a split whose images, or MEASURED of them, all have one single pixel value.

    Raises:
        UsageError: they do: nothing can be learned from them or tested on them.
    """
    low, high = math.inf, -math.inf
    for row in spread(len(part.table), MEASURED).tolist():
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
    """`preprocess` with the channels' mean and standard deviation of up to MEASURED images."""
    rows = spread(len(part.table), MEASURED)
    spans = Spans(range(0, len(rows), 64), 64, len(rows))
    if isinstance(part.images, Tensor):
        images, at = part.images, torch.from_numpy(rows)
        batches = (images[at[start : start + count]] for start, count in spans)
    else:
        reader = Reader(part.table.select(rows), preprocess)
        batches = (batch.images for batch in StreamingLoader(reader, None, 0, 0).batches(spans))
    pixels, total, squares = 0, torch.zeros(1).double(), torch.zeros(1).double()
    for some in batches:  # batch by batch: all of them as float64 could be gigabytes
        values = some.double() / 255
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
