"""Looks at every image of a table before anything is trained on it. Never writes.

Each image is decoded once, in worker processes, and leaves behind a 16-byte hash and a few
sums; the memory needed does not depend on the images' size.
"""

import hashlib
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.data.images import Stored, is_gray, read_stored
from regard.data.sources import ImageTable, class_counts
from regard.errors import FileError, ImageError, UsageError

_CHUNK = 32  # images a worker is given at a time
_ALONE = 200  # up to so many files, starting workers takes longer than reading
_DEPTHS = {
    "uint8": "8 bit", "uint16": "16 bit", "float32": "float",
    "int64": "signed or 32 bit", "float64": "float",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What was found.

    Attributes:
        name: DATA.
        images, checked: in the table; decoded, readable or not.
        counts: {split: {class: images}} of the whole table.
        sizes: height, width: {min, median, max}; common: the 5 most frequent
            [height, width, images].
        channels: {"1" or "3": images}.
        depths: {"8 bit", "16 bit", "signed or 32 bit" or "float": images}.
        unreadable: (path, reason).
        leaks: the same picture in more than one split: for each its (path, split)s.
        duplicates: the same picture several times in one split.
        mean, std: over all pixels of the training images (of all, where there are no splits),
            values of 0 to 1, for each of the suggested channels.
        value_range: lowest and highest value of signed, 32-bit and float images among those, which
            become 0 and 1 in every image; None: there are no such images.
        groups: number, smallest, median, largest (images of a group), divided (names of those
            that are in more than one split), or None.
        warnings: sentences.
        suggestion: size (pixels), channels, class_weights ({class: float}, mean 1 over the
            training images), resize: "none", "crop" (shorter side, then the center) or
            "pad" (longer side, then a border).
    """

    name: str
    images: int
    checked: int
    counts: dict[str, dict[str, int]]
    sizes: dict[str, Any]
    channels: dict[str, int]
    depths: dict[str, int]
    unreadable: list[tuple[str, str]]
    leaks: list[list[tuple[str, str]]]
    duplicates: list[list[tuple[str, str]]]
    mean: list[float]
    std: list[float]
    value_range: tuple[float, float] | None
    groups: dict[str, Any] | None
    warnings: list[str]
    suggestion: dict[str, Any]


class _Look(NamedTuple):
    """What one image leaves behind.

    Attributes:
        lowest, highest: of the finite values, as stored.
        finite: how many values a channel are finite.
        sums: (channels, 2) of values from 0 to 1 and of their squares; of measurements as stored.
    """

    shape: tuple[int, int, int]
    dtype: str
    gray: bool  # one channel, or three that are equal
    lowest: float
    highest: float
    finite: int
    digest: bytes
    sums: NDArray[np.float64]


def check_data(
    table: ImageTable,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    limit: int | None = None,
) -> DataCheck:
    """Decodes the images and says what they are, and what is wrong with them.

    Duplicates are told by a hash of shape and pixels, so the same picture saved twice without
    loss is found under any name or format.

    Args:
        table: of `open_data`, with splits or without.
        progress: is called with (images done, images in all).
        workers: processes; None: one a core where there are many files. A script that
            asks for more than one needs `if __name__ == "__main__":`.
        limit: look at so many images only, evenly spaced over the table.

    Raises:
        UsageError: limit or workers is less than 1.
        OSError: a worker process died.
    """
    for name, value in (("limit", limit), ("workers", workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: at least 1")
    total = len(table) if limit is None else min(limit, len(table))
    indices = np.linspace(0, len(table) - 1, total).round().astype(np.int64)
    seen = _Seen(table, indices)
    for done, (i, look) in enumerate(_looks(table, indices, workers), start=1):
        seen.add(done - 1, i, look)
        if progress is not None:
            progress(done, total)
    return seen.result()


# ---- looking at one image


def _look(stored: Stored) -> _Look:
    pixels = np.ascontiguousarray(stored.pixels)
    height, width, channels = pixels.shape
    hashed = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    hashed.update(pixels.data)
    known = pixels if pixels.dtype.kind != "f" else pixels[np.isfinite(pixels)]
    return _Look(
        (height, width, channels),
        pixels.dtype.name,
        is_gray(pixels),
        float(known.min()) if known.size else 0.0,
        float(known.max()) if known.size else 0.0,
        known.size // channels,
        hashed.digest(),
        np.array([_sums(pixels[..., c]) for c in range(channels)]),
    )


def _sums(values: NDArray[Any]) -> tuple[float, float]:
    """(H, W) -> sum and sum of squares of values as 0 to 1, of measurements as they are."""
    if values.dtype not in (np.uint8, np.uint16):
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
        return float(values.sum()), float(np.square(values).sum())
    if values.dtype == np.uint8:  # PIL counts several times faster than numpy
        counts = np.array(Image.fromarray(np.ascontiguousarray(values)).histogram(), np.float64)
    else:
        counts = np.bincount(values.ravel(), minlength=65536).astype(np.float64)
    levels = np.linspace(0, 1, len(counts))
    return float(counts @ levels), float(counts @ levels**2)


def _look_at_files(paths: list[str]) -> list[_Look | str]:
    """In a worker: what each file holds, or why it can't be read."""
    found: list[_Look | str] = []
    for path in paths:
        try:
            found.append(_look(read_stored(path)))
        except ImageError as error:
            found.append(str(error).removeprefix(f"{path}: "))
    return found


def _looks(
    table: ImageTable, indices: NDArray[np.int64], workers: int | None
) -> Iterator[tuple[int, _Look | str]]:
    """(index, look or reason) of each image, in order."""
    if table.files is None:
        yield from ((int(i), _look(Stored(table.read(int(i))))) for i in indices)
        return
    if workers is None:
        workers = _cores() if len(indices) > _ALONE else 1
    files = table.files
    chunks = (indices[at : at + _CHUNK].tolist() for at in range(0, len(indices), _CHUNK))
    if workers == 1:
        for i in itertools.chain.from_iterable(chunks):
            yield i, _look_at_files([files[i]])[0]
        return
    # never fork: the caller may have threads (torch's) that a forked child would wait for
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting: list[tuple[list[int], Future[list[_Look | str]]]] = []
    try:
        for chunk in itertools.chain(chunks, [None] * (2 * workers)):
            if chunk is not None:
                paths = [files[i] for i in chunk]
                waiting.append((chunk, pool.submit(_look_at_files, paths)))
            if waiting and (chunk is None or len(waiting) >= 2 * workers):
                first, future = waiting.pop(0)
                yield from zip(first, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise FileError("a process that read images died (memory?); try one worker") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- adding up


class _Seen:
    """Sums over the images looked at; 16 bytes of each are kept."""

    def __init__(self, table: ImageTable, indices: NDArray[np.int64]) -> None:
        self.table = table
        self.indices = indices
        self.digests = np.zeros((len(indices), 2), np.uint64)
        self.readable = np.zeros(len(indices), bool)
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.channels: Counter[int] = Counter()
        self.depths: Counter[str] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.colored = 0
        self.highest16 = 0.0
        self.train = bool(np.any(table.splits == "train"))
        self.pixels = 0
        self.sums = np.zeros((3, 2))  # grayscale counts three times, equally
        self.measured = 0  # finite values of measurements, whose range is known at the end
        self.measured_sums = np.zeros((3, 2))
        self.ranges: list[tuple[float, float]] = []
        self.training_range: tuple[float, float] | None = None

    def add(self, place: int, i: int, look: _Look | str) -> None:
        """The look at image i, the place-th of those looked at."""
        if isinstance(look, str):
            self.unreadable.append((self.table.path(i), look))
            return
        self.readable[place] = True
        self.digests[place] = np.frombuffer(look.digest, np.uint64)
        height, width, channels = look.shape
        self.sizes[height, width] += 1
        self.channels[channels] += 1
        self.depths[_DEPTHS.get(look.dtype, look.dtype)] += 1
        self.colored += not look.gray
        if look.dtype == "uint16":
            self.highest16 = max(self.highest16, look.highest)
        training = not self.train or self.table.splits[i] == "train"
        measurement = look.dtype in ("int64", "float64")
        if measurement and look.finite:
            self.ranges.append((look.lowest, look.highest))
        if not training:
            return
        self.pixels += height * width
        if not measurement:
            self.sums += look.sums  # (1, 2) or (3, 2)
        elif look.finite:
            self.measured += look.finite
            self.measured_sums += look.sums
            low, high = self.training_range or (look.lowest, look.highest)
            self.training_range = min(low, look.lowest), max(high, look.highest)

    def _all_sums(self) -> NDArray[np.float64]:
        """(3, 2) sums of all values as 0 to 1, and of their squares."""
        if self.training_range is None or self.training_range[0] == self.training_range[1]:
            return self.sums
        low, high = self.training_range
        values, squares = self.measured_sums.T
        shifted = squares - 2 * low * values + low**2 * self.measured
        scaled = [(values - low * self.measured) / (high - low), shifted / (high - low) ** 2]
        return self.sums + np.stack(scaled, axis=1)

    def result(self) -> DataCheck:
        """Everything, once all are added."""
        leaks, duplicates, conflicts = self._same_pictures()
        channels = 3 if self.colored else 1
        mean, squares = (self._all_sums()[:channels] / max(self.pixels, 1)).T
        groups = _groups(self.table)
        counts = class_counts(self.table)
        sizes = _sizes(self.sizes)
        return DataCheck(
            name=self.table.name,
            images=len(self.table),
            checked=len(self.indices),
            counts=counts,
            sizes=sizes,
            channels={str(c): n for c, n in sorted(self.channels.items())},
            depths=dict(sorted(self.depths.items())),
            unreadable=self.unreadable,
            leaks=leaks,
            duplicates=duplicates,
            mean=mean.tolist(),
            std=np.sqrt(np.maximum(squares - mean**2, 0)).tolist(),
            value_range=self.training_range,
            groups=groups,
            warnings=[
                *self.table.warnings,
                *_warn_of_pictures(self, leaks, duplicates, conflicts),
                *_warn_of_counts(counts, groups),
            ],
            suggestion={
                "size": _input_size(self.sizes),
                "channels": channels,
                "class_weights": _class_weights(counts),
                "resize": _resize(self.sizes),
            },
        )

    def _same_pictures(self) -> tuple[list[Any], list[Any], int]:
        """Leaks, duplicates, and how many of both carry different labels."""
        at = np.flatnonzero(self.readable)
        if not len(at):
            return [], [], 0
        order = at[np.lexsort(self.digests[at].T)]  # stable: equal ones in the table's order
        keys = self.digests[order]
        starts = np.flatnonzero(np.r_[True, np.any(keys[1:] != keys[:-1], axis=1)])
        ends = np.r_[starts[1:], len(keys)]
        found = [self.indices[order[a:b]] for a, b in zip(starts, ends, strict=True) if b > a + 1]
        leaks: list[Any] = []
        duplicates: list[Any] = []
        conflicts = 0
        for same in sorted(found, key=lambda g: int(g[0])):
            told = [(self.table.path(int(i)), str(self.table.splits[i])) for i in same]
            (leaks if len({s for _, s in told}) > 1 else duplicates).append(told)
            conflicts += len(set(self.table.labels[same].tolist())) > 1
        return leaks, duplicates, conflicts


def _sizes(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    if not sizes:
        return {"height": None, "width": None, "common": []}
    told: dict[str, Any] = {}
    for axis, name in enumerate(("height", "width")):
        values = np.array([size[axis] for size in sizes])
        median = _median(values, np.array(list(sizes.values())))
        told[name] = {"min": int(values.min()), "median": median, "max": int(values.max())}
    told["common"] = [[h, w, n] for (h, w), n in sizes.most_common(5)]
    return told


def _median(values: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
    """The lower median of values that occur so many times."""
    order = np.argsort(values)
    below = np.cumsum(counts[order])
    return int(values[order][np.searchsorted(below, (below[-1] + 1) // 2)])


def _groups(table: ImageTable) -> dict[str, Any] | None:
    if table.groups is None:
        return None
    names, group, counts = np.unique(table.groups, return_inverse=True, return_counts=True)
    _, split = np.unique(table.splits, return_inverse=True)
    first = np.zeros(len(names), np.int64)
    first[group] = split
    divided = np.unique(group[first[group] != split])
    return {
        "number": len(names),
        "smallest": int(counts.min()),
        "median": int(np.median(counts)),
        "largest": int(counts.max()),
        "divided": names[divided].tolist(),
    }


# ---- what follows from it


def _warn_of_pictures(seen: _Seen, leaks: list[Any], duplicates: list[Any], n: int) -> list[str]:
    lines = []
    if seen.unreadable:
        lines.append(f"{len(seen.unreadable)} images can't be read")
    if leaks:
        lines.append(f"{len(leaks)} pictures are in more than one split: results would flatter")
    if duplicates:
        lines.append(f"{len(duplicates)} pictures are several times in one split")
    if n:
        lines.append(f"{n} pictures carry different labels in different places")
    if len(seen.channels) > 1 and seen.colored:
        lines.append(f"{seen.channels[1]} images are grayscale, {seen.channels[3]} have colors")
    if len(seen.depths) > 1:
        told = ", ".join(f"{n} {depth}" for depth, n in sorted(seen.depths.items()))
        lines.append(f"images of different depth: {told}")
    if seen.training_range is not None:
        low, high = seen.training_range
        if beyond := sum(a < low or b > high for a, b in seen.ranges):
            lines.append(
                f"{beyond} images have values outside {low:.6g} to {high:.6g}, the range of the "
                "training images: these are clipped"
            )
    if 0 < seen.highest16 < 2**15:
        lines.append(
            f"16-bit images use values up to {seen.highest16:.0f} only, so they are dark: "
            "rely on the mean and deviation measured here"
        )
    return lines


def _warn_of_counts(counts: dict[str, dict[str, int]], groups: dict[str, Any] | None) -> list[str]:
    lines = []
    if groups and groups["divided"]:
        lines.append(f"{len(groups['divided'])} groups are in more than one split")
    for split, classes in counts.items():
        empty = [c for c, n in classes.items() if n == 0]
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            lines.append(f"{split or 'the data'} has no images of {', '.join(empty[:3])}{more}")
    train = _train_counts(counts)
    few = [c for c, n in train.items() if 0 < n < 20]
    if few:
        lines.append(f"{len(few)} classes have fewer than 20 images to train on")
    some = [n for n in train.values() if n]
    if some and max(some) >= 10 * min(some):
        lines.append(
            f"unbalanced: {min(some)} to {max(some)} images a class; see the class weights"
        )
    return lines


def _train_counts(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    return counts.get("train") or counts.get("") or {}


def _class_weights(counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """Images / (classes * images of the class), as scikit-learn's "balanced"."""
    train = {c: n for c, n in _train_counts(counts).items() if n}
    return {c: sum(train.values()) / (len(train) * n) for c, n in train.items()}


def _input_size(sizes: Counter[tuple[int, int]]) -> int | None:
    """The side of the input: small images as they are, others a multiple of 32 up to 224."""
    if not sizes:
        return None
    shorter = np.array([min(size) for size in sizes])
    side = _median(shorter, np.array(list(sizes.values())))
    return side if side <= 64 else min(224, round(side / 32) * 32)


def _resize(sizes: Counter[tuple[int, int]]) -> str:
    """How to make all images square."""
    if all(h == w == _input_size(sizes) for h, w in sizes):
        return "none"
    long = sum(n for (h, w), n in sizes.items() if max(h, w) > 2 * min(h, w))
    return "pad" if 20 * long > sizes.total() else "crop"  # a crop would lose over half of those
