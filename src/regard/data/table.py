"""`ImageTable`: N labeled images as arrays of labels, splits and groups, and lazy paths."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.data.images import ValueRange, read_image, to_channels
from regard.data.paths import PathList
from regard.errors import UsageError
from regard.files import plural, shortened

SPLITS = ("train", "val", "test")


class StackedArrays:
    """Several (N, ...) arrays that act as if concatenated, without a copy."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: Any) -> NDArray[np.uint8]:
        """One row by index; several by a slice, mask or list, as a copy."""
        if isinstance(i, int | np.integer):
            part = int(np.searchsorted(self._ends, i, side="right"))
            return self.parts[part][int(i) - (int(self._ends[part - 1]) if part else 0)]
        return np.stack([self[row] for row in np.arange(len(self))[i]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.concatenate(self.parts).astype(dtype or np.uint8)


@dataclass(frozen=True, eq=False)
class ImageTable:
    """N labeled images: where they are and what they belong to, but no pixels of files.

    Attributes:
        name: DATA as given.
        classes: class names.
        labels: (N,) int64, indices into classes.
        splits: (N,) of '', 'train', 'val' or 'test'.
        groups: (N,) names, such as patients, that must not be divided between splits; or None.
        files: N paths that open() accepts, or None; a list becomes a `PathList`.
        arrays: the images themselves, (M, H, W) or (M, H, W, C) uint8; or None. Selections share
            them: image i is arrays[rows[i]].
        base: the folder that the paths in a splits file are relative to; absolute or relative as
            the files are.
        rows: (N,) rows of arrays; None: all of them, in order.
        reading: the argument `splits` of `open_data`.
        location: absolute path of the folder or file that DATA names; '' if it names none.
        warnings: what the user should know about how the table was made, one line each.
        columns: further cells of each image, such as its site: (N,) strings by column.
    """

    name: str
    classes: list[str]
    labels: NDArray[np.int64]
    splits: NDArray[np.str_]
    groups: NDArray[np.str_] | None = None
    files: Sequence[str] | None = None
    arrays: NDArray[np.uint8] | StackedArrays | None = None
    base: str = ""
    rows: NDArray[np.int64] | None = None
    reading: str = "auto"
    location: str = ""
    warnings: tuple[str, ...] = ()
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.files is not None and not isinstance(self.files, PathList):
            object.__setattr__(self, "files", PathList.of(self.files))

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self,
        i: int,
        *,
        channels: int | None = None,
        at_least: int | None = None,
        value_range: ValueRange | None = None,
    ) -> NDArray[Any]:
        """Image i as (H, W, C); see `read_image`.

        Raises:
            ImageError: its file can't be read.
        """
        if self.files is not None:
            return read_image(
                self.files[i], channels=channels, at_least=at_least, value_range=value_range
            )
        pixels = self.stored(i)
        return to_channels(pixels if pixels.ndim == 3 else pixels[..., None], channels)

    def stored(self, i: int) -> NDArray[np.uint8]:
        """Image i of a table of arrays, (H, W) or (H, W, C), without a copy."""
        assert self.arrays is not None
        return self.arrays[self.row(i)]

    def row(self, i: int) -> int:
        """The row of `arrays` that holds image i."""
        return int(i if self.rows is None else self.rows[i])

    def path(self, i: int) -> str:
        """The file of image i, or its place in the data set, such as 'digits[12]'."""
        return self.files[i] if self.files is not None else f"{self.name}[{self.row(i)}]"

    def key(self, i: int) -> str:
        """A name of image i that stays the same when the data is moved.

        For files outside `base` it is their path.
        """
        return self.key_of(self.path(i))

    def key_of(self, path: str) -> str:
        """The key of the image with this path."""
        if self.files is not None:
            return path.removeprefix(os.path.join(self.base, ""))
        name = os.path.basename(self.name.rpartition(":")[2])
        return name + path.removeprefix(self.name)

    def select(self, indices: Sequence[int] | NDArray[Any]) -> "ImageTable":
        """The table of these images, in this order; also accepts a mask of N booleans."""
        at = np.asarray(indices)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        files, rows = self.files, self.rows
        if isinstance(files, PathList):
            files = files.select(at)
        if self.arrays is not None:
            rows = at if rows is None else rows[at]
        return replace(
            self,
            labels=self.labels[at],
            splits=self.splits[at],
            groups=None if self.groups is None else self.groups[at],
            files=files,
            rows=rows,
            columns={name: values[at] for name, values in self.columns.items()},
        )


def all_or_no_groups(name: str, groups: list[str]) -> NDArray[np.str_] | None:
    """(N,) groups of images; None if all are "".

    Raises:
        UsageError: some are "".
    """
    if not any(groups):
        return None
    if missing := groups.count(""):
        count = plural(missing, "image")
        raise UsageError(f"{name}: {count} without a group, but others have one")
    return np.array(groups)


def class_counts(table: ImageTable) -> dict[str, dict[str, int]]:
    """Number of images per class in each split of the table: {split: {class: images}}."""
    present = [s for s in ("", *SPLITS) if np.any(table.splits == s)]
    counts = {
        s: np.bincount(table.labels[table.splits == s], minlength=len(table.classes)).tolist()
        for s in present
    }
    return {s: dict(zip(table.classes, counts[s], strict=True)) for s in present}


def as_known(
    table: ImageTable, classes: Sequence[str], renamed: Mapping[str, str] | None = None
) -> ImageTable:
    """The images of the classes that a network knows, labeled by its class indices.

    Images of other classes are left out, with a line in `warnings`.

    Args:
        table: images of any classes.
        classes: the network's classes.
        renamed: {class of the table: class of the network}; '' leaves its images out.

    Raises:
        UsageError: no class is known, or `renamed` names a class that does not exist.
    """
    renamed = renamed or {}
    index = {c: i for i, c in enumerate(classes)}
    for old, new in renamed.items():
        if old not in table.classes:
            raise UsageError(f"{old}={new}: {table.name} has {shortened(table.classes, 10)}")
        if new and new not in index:
            raise UsageError(f"{old}={new}: the network knows {shortened(classes, 10)}")
    names = [renamed.get(c, c) for c in table.classes]
    labels = np.array([index.get(c, -1) for c in names], np.int64)[table.labels]
    counts = np.bincount(table.labels, minlength=len(names))
    strange = {
        c: int(n) for c, new, n in zip(table.classes, names, counts, strict=True)
        if new and new not in index and n
    }  # fmt: skip
    known = labels >= 0
    if not known.any():
        raise UsageError(
            f"{table.name} has no image of a class that the network knows: it has "
            f"{shortened(table.classes, 10)}; the network knows {shortened(classes, 10)}"
        )
    warnings = table.warnings
    if strange:
        listed = shortened([f"{c} ({n})" for c, n in strange.items()], 10)
        warnings += (f"images of classes that the network does not know are left out: {listed}",)
    return replace(
        table if known.all() else table.select(known),
        classes=list(classes), labels=labels[known], warnings=warnings,
    )  # fmt: skip
