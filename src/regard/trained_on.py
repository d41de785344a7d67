"""Which images a run was trained on, recognized by content, whatever their names and places.

An image that trained a network, or validated it during training, is no test of it, and neither
is another image of the same patient (the same group).
"""

import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from regard.data.content import UNREADABLE, content_hashes, file_hash
from regard.data.hugging_face import name_and_configuration
from regard.data.sources import SPLITS, ImageTable, folded, open_data
from regard.data.splits_file import Row, read_rows, read_splits
from regard.errors import StateError, UsageError
from regard.files import plural, read_npz, spread

logger: logging.Logger = logging.getLogger(__name__)
PathT = TypeVar("PathT", str, Path)
_NAMES = np.array(SPLITS, "U5")
COMPARED = 20_000  # images that `changed_line` compares
KNOWN = "images.npz"  # in folders of weights that come with Regard, instead of splits.csv
STARTED = "started.npz"  # the images of the weights that a run started from


class KnownImages:
    """The images of a run by their content hashes.

    If they are smaller copies, the originals count as well. An image with several entries counts as
    a training image of the run if one of them is, else as validation, else as test.

    Args:
        splits_csv: the run's file of splits, or the .npz file that `write` wrote.

    Raises:
        UsageError: the file of splits is damaged.
        StateError: the .npz file is damaged.
    """

    def __init__(self, splits_csv: Path) -> None:
        self.contents: NDArray[np.uint64]
        self.own: NDArray[np.uint64]  # without the originals of copies
        self.divided: NDArray[np.uint64] = np.zeros(0, np.uint64)  # in more than one split
        self._group_of: dict[int, str] = {}  # by content
        self._split_of: dict[str, str] = {}  # by the group's name
        self._split_of_folded: dict[str, str] = {}
        if splits_csv.suffix == ".npz":
            self.contents, self._codes = _read_known(splits_csv)
            self.own = self.contents
            return
        listed = list(read_rows(splits_csv))
        self.own = np.array([row.content for row in listed if row.content], np.uint64)
        rows = [
            (content, _code(row.split))
            for row in listed for content in {row.content, row.original}
        ]  # fmt: skip
        known = np.array([row for row in rows if row[0] != UNREADABLE], np.uint64).reshape(-1, 2)
        known = np.unique(known, axis=0)
        self.contents, first, splits = np.unique(known[:, 0], return_index=True, return_counts=True)
        self.divided = self.contents[splits > 1]
        self._codes = known[first, 1].astype(np.int64)
        for row in sorted((row for row in listed if row.group), key=lambda row: _code(row.split)):
            contents = {row.content, row.original} - {UNREADABLE}
            self._group_of |= dict.fromkeys(contents, row.group)
            if row.group not in self._split_of:
                split = self._split_of[row.group] = SPLITS[_code(row.split)]
                self._split_of_folded.setdefault(folded(row.group), split)

    def __len__(self) -> int:
        return len(self.contents)

    def write(self, path: Path, *more: "KnownImages") -> None:
        """Writes only hashes and splits, including those of `more`: .npz, 9 bytes per image."""
        pairs = [(k.contents, k._codes.astype(np.uint64)) for k in (self, *more)]
        rows = np.unique(np.concatenate([np.stack(pair, axis=1) for pair in pairs]), axis=0)
        contents, first = np.unique(rows[:, 0], return_index=True)  # keeps the first of its splits
        np.savez_compressed(path, contents=contents, splits=rows[first, 1].astype(np.uint8))

    def splits_of(self, hashes: NDArray[np.uint64]) -> NDArray[np.str_]:
        """(N,) train, val or test for each hash; '' for an image that is not the run's."""
        at = np.minimum(np.searchsorted(self.contents, hashes), len(self.contents) - 1)
        return np.where(self.contents[at] == hashes, _NAMES[self._codes[at]], "")

    def overlap(
        self, hashes: NDArray[np.uint64], groups: NDArray[np.str_] | None = None
    ) -> "Overlap":
        """What images with these hashes and groups have in common with the run."""
        images = self.splits_of(hashes)
        if groups is None:
            return Overlap(images)
        names, codes = np.unique(groups, return_inverse=True)
        named = [
            self._split_of.get(name) or self._split_of_folded.get(folded(name), "")
            for name in names.tolist()
        ]
        both = [
            (self._group_of[content], name)
            for content, name in zip(hashes.tolist(), groups.tolist(), strict=True)
            if content in self._group_of
        ]
        same = bool(both) and all(own == name or folded(own) == folded(name) for own, name in both)
        return Overlap(images, groups, np.array(named, "U5")[codes], same)

    def watch(self, paths: Iterable[PathT], name: str = "") -> Iterator[PathT]:
        """Yields the same paths, counting the run's own images, and logs the counts at the end.

        Args:
            paths: of images.
            name: the run's, for the line that is logged.
        """
        counts: Counter[str] = Counter()
        for path in paths:
            counts[str(self.splits_of(np.array([file_hash(path)], np.uint64))[0])] += 1
            yield path
        if line := overlap_line(counts, counts.total()):
            logger.warning(f"{name}: {line}" if name else line)


@dataclass(frozen=True, eq=False)
class Overlap:
    """What N images have in common with a run's.

    A group (a patient) is the run's if one of its images is. Its name alone counts only if every
    image that the run has too is of the same group in both: any two hospitals have patients
    called 1, 2 and 3.

    Attributes:
        images: (N,) the run's split of each image; '' for other images.
        groups: (N,) names, or None.
        named: (N,) the run's split of the group with this name; '' if there is none.
        same_names: whether the shared images show that names mean the same in both.
        started: (N,) the split of each image in the training of the weights that the run started
            from, or of those that these started from; '' for others; None if unknown.
    """

    images: NDArray[np.str_]
    groups: NDArray[np.str_] | None = None
    named: NDArray[np.str_] | None = None
    same_names: bool = False
    started: NDArray[np.str_] | None = None

    @property
    def own(self) -> bool:
        """Whether every image is the run's."""
        return bool((self.images != "").all())

    def related(self, *splits: str) -> NDArray[np.bool_]:
        """(N,) whether an image is not in these splits of the run, but its group is."""
        own = np.isin(self.images, splits)
        if self.groups is None or self.named is None:
            return np.zeros_like(own)
        found = np.isin(self.groups, np.unique(self.groups[own]))
        if self.same_names:
            found |= np.isin(self.named, splits)
        return found & ~own

    def overlap_line(self, at: NDArray[np.bool_]) -> str | None:
        """Like the function of this name, for the images in the mask."""
        related = at & self.related("train", "val")
        counts = Counter(self.images[at].tolist())
        return overlap_line(counts, int(at.sum()), int(related.sum()), self.count_groups(related))

    def count_groups(self, at: NDArray[np.bool_]) -> int:
        """Number of groups of the images in the mask."""
        return 0 if self.groups is None else len(np.unique(self.groups[at]))

    def namesakes_line(self, at: NDArray[np.bool_], *splits: str) -> str | None:
        """A warning that images in the mask are of groups that may be the run's; None if not."""
        if self.groups is None or self.named is None or self.same_names:
            return None
        alike = at & np.isin(self.named, splits) & (self.images == "") & ~self.related(*splits)
        if not alike.any():
            return None
        groups = plural(self.count_groups(alike), "group")
        return (
            f"{plural(int(alike.sum()), 'image')} of {groups} whose names the run's "
            f"{' and '.join(splits)} images have too, such as {str(self.groups[alike][0])!r}: if "
            "they are the same patients, leave their images out, as they make the scores too good; "
            "if not, rename the groups"
        )


def _read_known(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The sorted hashes and their split numbers, from a file that `KnownImages.write` wrote."""
    arrays = read_npz(path)
    contents, codes = (arrays.get(name, np.zeros(())) for name in ("contents", "splits"))
    valid = contents.dtype == np.uint64 and codes.dtype == np.uint8 and contents.ndim == 1
    if not valid or contents.shape != codes.shape or (codes >= len(SPLITS)).any():
        raise StateError(f"{path} can't be read (it holds no hashes of images)")
    return contents, codes.astype(np.int64)


def _code(split: str) -> int:
    return SPLITS.index(split) if split else 0  # without splits, all images were trained on


def known_images(run: str | os.PathLike[str]) -> KnownImages | None:
    """The images of a run; None if the folder does not say."""
    files = [Path(run, name) for name in ("splits.csv", KNOWN)]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return None
    known = KnownImages(path)
    return known if len(known) else None


def watch(
    run: str | os.PathLike[str], paths: Iterable[PathT], *, named: bool = False
) -> Iterator[PathT]:
    """Yields the same paths; counts those that trained the run and logs this at the end.

    Args:
        run: its folder.
        paths: of images.
        named: whether what is logged begins with the run.
    """
    known = known_images(run)
    return iter(paths) if known is None else known.watch(paths, os.fspath(run) if named else "")


def overlap_line(counts: Counter[str], total: int, related: int = 0, groups: int = 0) -> str | None:
    """A warning that images are the run's training or validation images; None if none are.

    Args:
        counts: number of images in each split of the run.
        total: total number of images.
        related, groups: number of other images of the same groups, and of these groups.
    """
    parts = []
    if counts["train"]:
        parts.append(f"{counts['train']:,} trained this network")
    if counts["val"]:
        parts.append(f"{counts['val']:,} validated {'it' if parts else 'this network'}")
    if related:
        came = f"{related:,} came from {plural(groups, 'group')}"
        parts.append(f"{came} that trained or validated this network")
    if not parts:
        return None
    if total == 1:
        said = parts[0].removeprefix("1 ")
        return f"the image {said}: results on it say nothing about new images"
    seen = f"of {total:,} images {' and '.join(parts)}"
    return f"{seen}: results on them say nothing about new images"


# ---- the run's own data


def own_table(run: Path, plan: dict[str, Any], root: str | Path | None = None) -> ImageTable:
    """The data of a run, with the splits that it was trained with.

    Args:
        run: the run's folder.
        plan: from its run.json.
        root: folder for downloads; default: the run's.

    Raises:
        UsageError: the data is no longer there, or has changed.
    """
    return attach_splits(own_data(run, plan, root), run / "splits.csv")


def own_data(run: Path, plan: dict[str, Any], root: str | Path | None = None) -> ImageTable:
    """The data of a run as it is, with the splits that the data itself has.

    Args:
        run: the run's folder.
        plan: from its run.json.
        root: folder for downloads; default: the run's.

    Raises:
        UsageError: the data is no longer there.
    """
    data, location = plan["data"], plan.get("location") or ""
    if location:
        kind = next((k for k in ("medmnist:", "hf:", "wds:") if data.startswith(k)), "")
        there = os.path.exists(location) or kind == "wds:"  # a pattern
        given = data.removeprefix(kind)
        given, configuration = name_and_configuration(given) if kind == "hf:" else (given, None)
        if configuration is not None and location.endswith(f":{configuration}"):
            configuration = None  # a folder with a colon in its name
        path = location if there else given
        if kind != "wds:" and not os.path.exists(os.path.expanduser(path)):
            raise UsageError(
                f"{run} was trained on {location}, which does not exist any more: give its new "
                "place as DATA"
            )
        data = kind + path + (f":{configuration}" if configuration else "")
    table = open_data(data, root=root or plan.get("root"), splits=plan.get("reading", "auto"))
    return replace(table, name=plan["data"])


def moved_table(
    run: Path, plan: dict[str, Any], data: str, root: str | Path | None
) -> tuple[ImageTable, dict[str, str]]:
    """The data of a run at its new place DATA, with the run's splits, order and classes.

    Returns:
        The table, and {earlier key: current key} of its images.

    Raises:
        UsageError: it is not the data of the run, or an image has a different label.
    """
    table = open_data(data, root=root, splits=plan.get("reading", "auto"))
    moved = table.location != (plan.get("location") or "")
    table, rows = _attach(table, run / "splits.csv", verify=moved)
    keys = [table.key(i) for i in range(len(table))]
    for key, row, label in zip(keys, rows, table.labels, strict=True):
        if (name := table.classes[label]) != row.label:
            raise UsageError(
                f"{table.name}: {key} is {name!r} now, and was {row.label!r} when {run} was "
                "started: name it as it was to resume, or start a new run"
            )
    index = {name: i for i, name in enumerate(plan["classes"])}  # others may have been added
    labels = np.array([index[row.label] for row in rows], np.int64)
    table = replace(table, classes=list(plan["classes"]), labels=labels)
    return table, {row.key: key for row, key in zip(rows, keys, strict=True)}


def changed_line(
    table: ImageTable, splits_csv: Path, left_out: Container[str] = (), most: int = COMPARED
) -> str | None:
    """A warning that images of a run have changed since it was started; None if none have.

    Args:
        table: images under the names that the run has for them.
        splits_csv: the run's file of splits.
        left_out: names of images that don't matter.
        most: number of images to compare, evenly spread.
    """
    rows = spread(len(table), most)
    names = [table.key(i) for i in rows.tolist()]
    known = {row.key: row.content for row in read_rows(splits_csv)}
    before = np.array([known.get(name, UNREADABLE) for name in names], np.uint64)
    now = content_hashes(table.select(rows))
    # unreadable images are reported elsewhere
    changed = (before != now) & (before != UNREADABLE) & (now != UNREADABLE)
    found = [name for name, other in zip(names, changed, strict=True) if other]
    found = [name for name in found if name not in left_out]
    if not found:
        return None
    return (
        f"{table.name}: {len(found):,} of {plural(len(rows), 'image')} changed since the run was "
        f"started, such as {found[0]}; its splits are assigned by file name, and a training image "
        "may have another name now"
    )


def attach_splits(table: ImageTable, splits_csv: Path, *, verify: bool = False) -> ImageTable:
    """The run's images in a table, with its splits and in its order.

    They are recognized by path, label and group, or else by content; images that are not the
    run's are left out, with a line in `warnings`.

    Args:
        table: images.
        splits_csv: the run's file of splits.
        verify: also compare the contents of images with the same path.

    Raises:
        UsageError: an image of the run is missing, or was replaced by another.
    """
    return _attach(table, splits_csv, verify)[0]


def _attach(table: ImageTable, splits_csv: Path, verify: bool) -> tuple[ImageTable, list[Row]]:
    """The table of `attach_splits`, and the row of each of its images."""
    rows = list(read_rows(splits_csv))
    try:
        table = read_splits(table, splits_csv)
    except UsageError:
        rows = [row for row in rows if row.content]
        by_content = _attached_by_content(table, rows)
        if by_content is None:
            raise
        return by_content, rows
    places = {table.key(i): i for i in range(len(table))}
    order = np.array([places[row.key] for row in rows], np.int64)
    in_order = bool((order == np.arange(len(order))).all())
    table = table if in_order else table.select(order)
    if verify:
        contents = np.array([row.content for row in rows], np.uint64)
        other = (contents != UNREADABLE) & (content_hashes(table) != contents)
        if other.any():
            raise UsageError(
                f"{table.name}: {plural(int(other.sum()), 'image')} not the same as the run was "
                f"trained with, such as {table.key(int(other.argmax()))}"
            )
    return table, rows


def _attached_by_content(table: ImageTable, rows: list[Row]) -> ImageTable | None:
    """The images of these rows; None if one is missing.

    Of several with the same content, the one with the row's path is used, else with its label.
    """
    places: dict[tuple[int, str], int] = {}
    for i, content in reversed(list(enumerate(content_hashes(table).tolist()))):
        label = table.classes[table.labels[i]]
        places |= {(content, name): i for name in ("", f"label {label}", f"path {table.key(i)}")}
    found = (
        (places.get((row.content, name)) for name in (f"path {row.key}", f"label {row.label}", ""))
        for row in rows
    )
    at = np.array([next((i for i in each if i is not None), -1) for each in found], np.int64)
    if not rows or (at < 0).any():
        return None
    warnings = table.warnings
    if left_out := len(table) - len(np.unique(at)):
        warnings += (f"{table.name}: {plural(left_out, 'image')} not of this run left out",)
    groups = np.array([row.group for row in rows]) if any(row.group for row in rows) else None
    splits = np.array([row.split for row in rows], "U5")
    return replace(table.select(at), splits=splits, groups=groups, warnings=warnings)
