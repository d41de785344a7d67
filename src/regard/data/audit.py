"""Checks every image of a table before training; writes nothing.

Each image is decoded once and leaves a 16-byte hash, a thumbnail of 1 KB and a few sums, so the
memory needed does not depend on the size of the images. Possible near-duplicates are read once
more.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.data.advice import (
    class_weights,
    group_risk,
    group_sizes,
    input_size,
    resize_mode,
    summary,
    warn_of_counts,
)
from regard.data.inspection import Inspection, inspect_images
from regard.data.near_duplicates import (
    Thumbnails,
    describe_pair,
    find_near_duplicates,
    near_duplicate_lines,
)
from regard.data.sources import ImageTable, class_counts
from regard.errors import UsageError
from regard.files import plural, spread
from regard.log import Heartbeat

_DEPTHS = {
    "uint8": "8 bit", "uint16": "16 bit", "float32": "float",
    "int64": "signed or 32 bit", "float64": "float",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """The result of a check.

    Attributes:
        name: DATA.
        images, checked: images in the table; images decoded, whether readable or not.
        counts: {split: {class: images}} of the whole table.
        sizes: height, width: {min, median, max}; common: the 5 most frequent
            [height, width, images].
        channels: {"1" or "3": images}.
        depths: {"8 bit", "16 bit", "signed or 32 bit" or "float": images}.
        unreadable: (path, reason).
        leaks: pictures that are in more than one split, each as a list of (path, split).
        duplicates: pictures that are in one split several times.
        near_duplicates: pairs of images that show the same picture with different pixels; first
            those with different labels, then those in different splits, then the rest. Each has
            paths, labels and splits (of both), reason ("labels", "splits" or "copies"),
            similarity (0 to 1) and mirrored.
        mean, std: over all pixels of the training images (of all images if there are no splits),
            scaled to 0 to 1, for each of the suggested channels.
        value_range: lowest and highest value of the signed, 32-bit and float images among them,
            which become 0 and 1 in every image; None if there are no such images.
        groups: number, smallest, median, largest (images per group), divided (names of the
            groups that are in more than one split), or None.
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
    near_duplicates: list[dict[str, Any]]
    mean: list[float]
    std: list[float]
    value_range: tuple[float, float] | None
    groups: dict[str, Any] | None
    warnings: list[str]
    suggestion: dict[str, Any]


def check_data(
    table: ImageTable,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    limit: int | None = None,
    near_duplicates: bool = True,
) -> DataCheck:
    """Decodes all images and reports their properties and faults.

    Duplicates are recognized by a hash of shape and pixels, so two lossless files of the same
    picture match whatever their names and formats.

    Args:
        table: from `open_data`, with splits or without.
        progress: called with (images done, images in total).
        workers: processes; default: one per core where there are many files. A script that
            asks for more than one needs `if __name__ == "__main__":`.
        limit: inspect only this many images, evenly spread over the table.
        near_duplicates: whether to look for near-duplicates.

    Raises:
        UsageError: limit or workers is less than 1.
        OSError: a worker process died.
    """
    for name, value in (("limit", limit), ("workers", workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name}={value}: at least 1")
    indices = spread(len(table), len(table) if limit is None else limit)
    totals = _Totals(table, indices)
    for done, (i, image) in enumerate(inspect_images(table, indices, workers), start=1):
        totals.add(done - 1, i, image)
        if progress is not None:
            progress(done, len(indices))
    return totals.result(near_duplicates)


class _Totals:
    """Sums over the images; about 1 KB is stored per image."""

    def __init__(self, table: ImageTable, indices: NDArray[np.int64]) -> None:
        self.table = table
        self.indices = indices
        self.digests = np.zeros((len(indices), 2), np.uint64)
        self.readable = np.zeros(len(indices), bool)
        self.thumbnails = Thumbnails(len(table))
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.channels: Counter[int] = Counter()
        self.depths: Counter[str] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self.colored = 0
        self.highest16 = 0.0
        self.train = bool(np.any(table.splits == "train"))
        self.pixels = 0
        self.sums = np.zeros((3, 2))  # grayscale counts three times, equally
        self.measured = 0  # finite values of measurements, whose range is only known at the end
        self.measured_sums = np.zeros((3, 2))
        self.ranges: list[tuple[float, float]] = []
        self.training_range: tuple[float, float] | None = None

    def add(self, place: int, i: int, image: Inspection | str) -> None:
        """Adds image i, the one at position `place` among those inspected."""
        if isinstance(image, str):
            self.unreadable.append((self.table.path(i), image))
            return
        self.readable[place] = True
        self.digests[place] = np.frombuffer(image.digest, np.uint64)
        height, width, channels = image.shape
        self.thumbnails.add(i, image.thumbnail, min(height, width))
        self.sizes[height, width] += 1
        self.channels[channels] += 1
        self.depths[_DEPTHS.get(image.dtype, image.dtype)] += 1
        self.colored += not image.gray
        if image.dtype == "uint16":
            self.highest16 = max(self.highest16, image.highest)
        training = not self.train or self.table.splits[i] == "train"
        measurement = image.dtype in ("int64", "float64")
        if measurement and image.finite:
            self.ranges.append((image.lowest, image.highest))
        if not training:
            return
        self.pixels += height * width
        if not measurement:
            self.sums += image.sums  # (1, 2) or (3, 2)
        elif image.finite:
            self.measured += image.finite
            self.measured_sums += image.sums
            low, high = self.training_range or (image.lowest, image.highest)
            self.training_range = min(low, image.lowest), max(high, image.highest)

    def _all_sums(self) -> NDArray[np.float64]:
        """(3, 2) sums of all values as 0 to 1, and of their squares."""
        if self.training_range is None or self.training_range[0] == self.training_range[1]:
            return self.sums
        low, high = self.training_range
        values, squares = self.measured_sums.T
        shifted = squares - 2 * low * values + low**2 * self.measured
        scaled = [(values - low * self.measured) / (high - low), shifted / (high - low) ** 2]
        return self.sums + np.stack(scaled, axis=1)

    def result(self, near_duplicates: bool) -> DataCheck:
        """The result, once all images are added."""
        same = self._same_pictures()
        leaks, duplicates, conflicts = self._described(same)
        near = self._near_duplicates(same) if near_duplicates else []
        channels = 3 if self.colored else 1
        mean, squares = (self._all_sums()[:channels] / max(self.pixels, 1)).T
        groups = group_sizes(self.table)
        counts = class_counts(self.table)
        sizes = summary(self.sizes)
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
            near_duplicates=near,
            mean=mean.tolist(),
            std=np.sqrt(np.maximum(squares - mean**2, 0)).tolist(),
            value_range=self.training_range,
            groups=groups,
            warnings=list(
                dict.fromkeys(
                    [
                        *self.table.warnings,
                        *self._warnings(leaks, duplicates, conflicts),
                        *near_duplicate_lines(near),
                        *warn_of_counts(counts, groups),
                        *filter(None, [group_risk(self.table)]),
                    ]
                )
            ),
            suggestion={
                "size": input_size(self.sizes),
                "channels": channels,
                "class_weights": class_weights(counts),
                "resize": resize_mode(self.sizes),
            },
        )

    def _same_pictures(self) -> list[NDArray[np.int64]]:
        """Groups of images with identical pixels, in the table's order."""
        at = np.flatnonzero(self.readable)
        if not len(at):
            return []
        order = at[np.lexsort(self.digests[at].T)]  # stable: equal ones in the table's order
        keys = self.digests[order]
        starts = np.flatnonzero(np.r_[True, np.any(keys[1:] != keys[:-1], axis=1)])
        ends = np.r_[starts[1:], len(keys)]
        groups = [self.indices[order[a:b]] for a, b in zip(starts, ends, strict=True) if b > a + 1]
        return sorted(groups, key=lambda g: int(g[0]))

    def _described(self, groups: list[NDArray[np.int64]]) -> tuple[list[Any], list[Any], int]:
        """Leaks, duplicates, and how many of both have different labels."""
        leaks: list[Any] = []
        duplicates: list[Any] = []
        conflicts = 0
        for same in groups:
            places = [(self.table.path(int(i)), str(self.table.splits[i])) for i in same]
            (leaks if len({s for _, s in places}) > 1 else duplicates).append(places)
            conflicts += len(set(self.table.labels[same].tolist())) > 1
        return leaks, duplicates, conflicts

    def _near_duplicates(self, same: list[NDArray[np.int64]]) -> list[dict[str, Any]]:
        compared = Heartbeat("images compared", level=logging.WARNING)  # stdout is for results
        pairs = find_near_duplicates(
            self.table, self.thumbnails, same=[g.tolist() for g in same], progress=compared
        )
        return [describe_pair(self.table, pair) for pair in pairs]

    def _warnings(self, leaks: list[Any], duplicates: list[Any], conflicts: int) -> list[str]:
        lines = []
        if self.unreadable:
            lines.append(f"{plural(len(self.unreadable), 'image')} can't be read")
        if leaks:
            lines.append(
                f"{plural(len(leaks), 'picture')} in more than one split: scores would be too good"
            )
        if duplicates:
            lines.append(f"{plural(len(duplicates), 'picture')} more than once in one split")
        if conflicts:
            lines.append(
                f"{plural(conflicts, 'picture')} with different labels in different places"
            )
        if len(self.channels) > 1 and self.colored:
            lines.append(
                f"grayscale: {plural(self.channels[1], 'image')}, in color: {self.channels[3]:,}"
            )
        if len(self.depths) > 1:
            depths = ", ".join(f"{n} {depth}" for depth, n in sorted(self.depths.items()))
            lines.append(f"images of different depth: {depths}")
        if self.training_range is not None:
            low, high = self.training_range
            if beyond := sum(a < low or b > high for a, b in self.ranges):
                lines.append(
                    f"{plural(beyond, 'image')} with values outside {low:.6g} to {high:.6g}, the "
                    "range of the training images: these are clipped"
                )
        if 0 < self.highest16 < 2**15:
            lines.append(
                f"16-bit images use values up to {self.highest16:.0f} only, so they are dark: "
                "rely on the mean and deviation measured here"
            )
        return lines
