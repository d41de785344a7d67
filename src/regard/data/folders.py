"""A folder of class folders as a table, with or without split folders on top.

Where the top folders could be splits as well as classes, the user has to say which: a network
that learned to distinguish training from test images would look like a good one.
"""

import itertools
import os
import re
from collections.abc import Mapping

import numpy as np

from regard.data.paths import PathList
from regard.data.table import SPLITS, ImageTable
from regard.data.walk import (
    Skipped,
    has_images,
    is_mask_folder,
    is_result,
    list_images,
    masks_among,
    subfolders,
)
from regard.errors import UsageError
from regard.files import plural, shortened

READINGS = ("auto", "yes", "no")
CONTAINERS = {".parquet": "hf:", ".tar": "wds:"}  # of many images; how such DATA is given
SPLIT_WORDS = {**{s: s for s in SPLITS}, "valid": "val", "validation": "val"}  # taken unasked
_WORDS = {
    "train": "train|training|trn|learning",
    "val": "val|valid|validation|validate|validating|dev|development",
    "test": "test|testing|tst|eval|evaluation|holdout|heldout",
}
_THINGS = "(?:sets?|data|dataset|images?|imgs?|split|fold|samples?|ing)?"
_PATTERNS = {s: re.compile(f"(?:{words}){_THINGS}") for s, words in _WORDS.items()}


def split_word(name: str) -> str | None:
    """The split that a name stands for, such as test for `my_TestSet2`; or None."""
    if name.lower() in SPLIT_WORDS:
        return SPLIT_WORDS[name.lower()]
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)  # trainImages
    for word in re.split(r"[\W\d_]+", f"{apart} {name}".lower()):
        for split, pattern in _PATTERNS.items():
            if pattern.fullmatch(word):
                return split
    last = (apart.lower().split() or [""])[-1]
    return {"tr": "train", "ts": "test"}.get(last)  # imagesTr, imagesTs


def split_cell(cell: str) -> str | None:
    """The split that a table's cell stands for, as a whole: test for `Test set`; or None."""
    word = re.sub(r"[\W_]+", "", cell.lower())
    return next((split for split, p in _PATTERNS.items() if p.fullmatch(word)), None)


def unlike_name(cell: str, split: str, split_of: Mapping[str, str | None]) -> str | None:
    """Another cell of the same split, if the two may mean different ones: dev, eval and test.

    Args:
        cell: in lower case.
        split: that it stands for.
        split_of: the splits of other cells, in lower case.
    """
    sure = {"training", "testing", *SPLIT_WORDS}
    others = [other for other, its in split_of.items() if its == split and other != cell]
    return next((other for other in others if not {cell, other} <= sure), None)


def two_names(cell: str, other: str, split: str) -> str:
    """What is wrong where `unlike_name` found another cell."""
    return f"splits {cell!r} and {other!r} are both a {split} split: name one"


def open_folder(name: str, root: str, splits: str = "auto") -> ImageTable:
    """The images of ROOT/CLASS or ROOT/SPLIT/CLASS.

    Args:
        name: DATA as given, for messages.
        root: the folder.
        splits: whether the top folders are splits: yes, no, or auto, which refuses to guess.

    Raises:
        UsageError: no class folders, or both readings are possible.
    """
    skipped = Skipped()
    tops, warnings = _with_images(root, skipped)
    split_of = _splits_of(name, tops, splits)
    listed: dict[str, dict[str, PathList]] = {}
    if split_of is None:
        listed[""] = _listed(root, tops, skipped, above=(root,))
    else:
        for top in sorted(split_of, key=lambda top: SPLITS.index(split_of[top])):
            folders, lines = _with_images(tops[top], skipped)
            above = (root, tops[top])
            listed[split_of[top]] = _listed(tops[top], folders, skipped, above=above)
            warnings += lines
        if others := [top for top in tops if top not in split_of]:
            warnings.append(f"{name}: not splits, left out: {shortened(others)}")
    if not any(listed.values()):
        message = f"{name}: has no class folders with images (FOLDER/CLASS/IMAGE)"
        raise UsageError(message + _instead(name, root))
    return _table(name, root, listed, (*warnings, *skipped.lines()))


def _instead(name: str, root: str) -> str:
    """What to give for a folder of files that hold many images each; "" for another folder."""
    files = (file for _, _, files in os.walk(root) for file in files)
    suffixes = {os.path.splitext(file)[1].lower() for file in itertools.islice(files, 10_000)}
    found = [suffix for suffix in CONTAINERS if suffix in suffixes]
    return f"; for its {found[0]} files, give {CONTAINERS[found[0]]}{name}" if found else ""


def _with_images(folder: str, skipped: Skipped) -> tuple[dict[str, str], list[str]]:
    """{name: path} of the subfolders that hold images, and a line for each thing left out."""
    with_images, empty = {}, []
    for name, path in subfolders(folder).items():
        if is_result(path):
            skipped.results.append(path)
        elif has_images(path):
            with_images[name] = path
        else:
            empty.append(path)
    lines = [f"without images, left out: {shortened(empty)}"] if empty else []
    if with_images and has_images(folder, below=False):
        lines.append(f"images directly in {folder} have no class: left out")
    return with_images, lines


def _listed(
    parent: str, folders: Mapping[str, str], skipped: Skipped, *, above: tuple[str, ...]
) -> dict[str, PathList]:
    """{class: its images}."""
    listed = {
        c: PathList.of(list_images(path, skipped, above=above)) for c, path in folders.items()
    }
    for c in [c for c in listed if is_mask_folder(c)]:  # masks/x.png for benign/x.png
        masks = masks_among(parent, [path for files in listed.values() for path in files])
        if masks.issuperset(listed[c]):
            skipped.masks += listed.pop(c)
    return {c: files for c, files in listed.items() if files}


def _table(
    name: str, root: str, listed: Mapping[str, Mapping[str, PathList]], warnings: tuple[str, ...]
) -> ImageTable:
    classes = sorted(set().union(*listed.values()))
    index = {c: i for i, c in enumerate(classes)}
    runs = [(index[c], s, files) for s, by_class in listed.items() for c, files in by_class.items()]
    counts = [len(files) for _, _, files in runs]
    lacking = [
        f"{split} has no images of {shortened([c for c in classes if c not in by_class])}"
        for split, by_class in listed.items() if len(by_class) < len(classes)
    ]  # fmt: skip
    return ImageTable(
        name=name,
        classes=classes,
        labels=np.repeat(np.array([label for label, _, _ in runs], np.int64), counts),
        splits=np.repeat(np.array([split for _, split, _ in runs], "U5"), counts),
        files=PathList.joined([files for _, _, files in runs]),
        base=root,
        location=os.path.abspath(root),
        warnings=(*lacking, *warnings),
    )


# ---- splits or classes


def _splits_of(name: str, tops: Mapping[str, str], splits: str) -> dict[str, str] | None:
    """The split of each top folder; None if they are classes.

    Raises:
        UsageError: both readings are possible, or two folders name the same split.
    """
    named = {top: split for top in tops if (split := split_word(top)) is not None}
    if splits == "no" or not tops:
        return None
    if splits == "yes":
        if not named:
            raise UsageError(
                f"{name}: splits=yes, but none of {shortened(tops, 6)} is called train, val or test"
            )
    elif not _clearly_splits(name, tops, named):
        return None
    for split in set(named.values()):
        if len(same := [top for top, s in named.items() if s == split]) > 1:
            raise UsageError(f"{name}: two folders for one split ({split}): {shortened(same, 6)}")
    return named


def _clearly_splits(name: str, tops: Mapping[str, str], named: Mapping[str, str]) -> bool:
    """True if they are splits, False if they are classes.

    Raises:
        UsageError: both readings are possible.
    """
    inside = {top: _classes_in(path) for top, path in tops.items()} if named else {}
    usual = all(top.lower() in SPLIT_WORDS for top in tops)
    if usual and all(inside.values()):
        return True
    if not named:
        first, *others = tops.values()
        shared = _classes_in(first) if others else []
        asked = len(shared) > 1 and all(_classes_in(path) == shared for path in others)
    else:
        all_named = len(named) == len(tops) and len(tops) > 1
        same = len(tops) > 1 and len({tuple(c) for c in inside.values()}) == 1
        several = "train" in named.values() and len(set(named.values())) > 1
        asked = all_named or several or (same and len(next(iter(inside.values()))) > 1)
        asked = asked or any(len(inside[top]) > 1 for top in named)
    if asked:
        _ask(name, tops, named)
    return False


def _classes_in(folder: str) -> list[str]:
    """The subfolders that may be classes: with images, and not named as masks."""
    by_class = subfolders(folder).items()
    return [name for name, path in by_class if not is_mask_folder(name) and has_images(path)]


def _ask(name: str, tops: Mapping[str, str], named: Mapping[str, str]) -> None:
    classes = f"{plural(len(tops), 'class')} ({shortened(tops, 6)}): give splits=no"
    if named:
        meant = shortened([f"{top} as {split}" for top, split in named.items()], 6)
        reading = f"splits ({meant}): give splits=yes"
    else:
        reading = "splits: rename them to train, val and test"
    raise UsageError(f"{name}: its top folders can be read as {reading}; or as {classes}")
