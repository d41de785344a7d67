"""Divides a table into train, val and test, by class and by group, and keeps that in a file.

The same table, fractions and seed give the same splits, whatever the machine.
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regard.data.sources import SPLITS, ImageTable
from regard.errors import UsageError

_COLUMNS = ["path", "label", "split", "group"]
_MOST_TOLD = 10  # warnings about single classes


def assign_splits(table: ImageTable, *, val: float, test: float, seed: int) -> ImageTable:
    """The table with the splits that it lacks, taken from its training images.

    Without any splits all images are divided; of a table with train and test, val is taken
    from train; with train and val, test is. Splits that the table has are kept. Each class is
    divided alike; a class of at least as many images as there are splits is in each of them,
    a smaller one is in train alone. With groups, no group is divided, and the fractions are met as
    well as the groups' sizes allow. Classes that a new split lacks are told in the
    table's `warnings`.

    Args:
        table: its splits all empty or all filled.
        val: fraction of the images divided, 0 to 1; 0: no such split.
        test: likewise.
        seed: of the shuffling.

    Raises:
        UsageError: a fraction out of range, splits given for some images only, no
            training images, too few images or groups, or a group on both sides.
    """
    for name, fraction in (("val", val), ("test", test)):
        if not 0 <= fraction < 1:
            raise UsageError(f"{name}={fraction}: at least 0 and less than 1")
    if val + test >= 1:
        raise UsageError(f"val={val} and test={test} leave nothing to train on")
    pool, present = _pool(table)
    wanted = {"val": val, "test": test}
    shares = {s: f for s, f in wanted.items() if f > 0 and s not in present}
    shares = {"train": 1 - sum(shares.values()), **shares}
    rng = np.random.default_rng(seed)
    labels = table.labels[pool]
    if table.groups is None:
        chosen = _divide_images(labels, shares, rng)
    else:
        chosen = _divide_groups(labels, table.groups[pool], shares, rng)
    names = np.array(list(shares), dtype="U5")
    splits = table.splits.astype("U5")
    splits[pool] = names[chosen]
    for s in shares:
        if not np.any(splits == s):
            raise UsageError(
                f"{table.name}: {len(pool)} images are too few for {', '.join(shares)}"
            )
    done = replace(table, splits=splits)
    check_groups(done)
    lines = _missing_classes(table, labels, chosen, list(shares))
    return replace(done, warnings=(*table.warnings, *lines))


def check_groups(table: ImageTable) -> None:
    """Makes sure that no group is in two splits.

    Raises:
        UsageError: one is; it is named.
    """
    if table.groups is None:
        return
    _, group = np.unique(table.groups, return_inverse=True)
    _, split = np.unique(table.splits, return_inverse=True)
    first = np.zeros(group.max(initial=0) + 1, np.int64)
    first[group] = split
    divided = np.flatnonzero(first[group] != split)
    if len(divided):
        name = str(table.groups[divided[0]])
        found = sorted(set(table.splits[table.groups == name]))
        raise UsageError(f"{table.name}: group {name!r} is in {' and in '.join(found)}")


def _pool(table: ImageTable) -> tuple[NDArray[np.int64], set[str]]:
    """The images to divide, and the splits that are there already."""
    empty = table.splits == ""
    if empty.all():
        return np.arange(len(table)), set()
    if empty.any():
        told = f"{table.name}: {int(empty.sum())} images have no split, the others have one"
        raise UsageError(f"{told}; give all of them one, or none")
    present = set(table.splits.tolist())
    if "train" not in present:
        raise UsageError(f"{table.name}: has no train images, only {' and '.join(sorted(present))}")
    return np.flatnonzero(table.splits == "train"), present


def _divide_images(
    labels: NDArray[np.int64], shares: dict[str, float], rng: np.random.Generator
) -> NDArray[np.int64]:
    """(N,) classes -> (N,) indices into shares, of which 0 is train."""
    chosen = np.zeros(len(labels), np.int64)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # shuffled within each class
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        if len(members) < len(shares):
            continue
        taken = 0
        for k, share in enumerate(list(shares.values())[1:], start=1):
            others = len(shares) - 1 - k  # later splits and train keep one image at least
            most = len(members) - taken - others - 1
            count = min(max(1, round(share * len(members))), most)
            chosen[members[taken : taken + count]] = k
            taken += count
    return chosen


def _divide_groups(
    labels: NDArray[np.int64],
    names: NDArray[np.str_],
    shares: dict[str, float],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """As _divide_images, but all images of a group go to one split.

    Greedy, largest groups first: each goes where it most lessens the sum over splits and classes
    of (images there - images wanted)^2 / images wanted. scikit-learn's StratifiedGroupKFold
    works alike, but divides into equal folds only.
    """
    unique, group = np.unique(names, return_inverse=True)
    if len(unique) < len(shares):
        raise UsageError(f"{len(unique)} groups can't be divided into {', '.join(shares)}")
    members = _classes_of_groups(labels, group)
    wanted = np.outer(list(shares.values()), np.bincount(labels))  # (splits, classes)
    have = np.zeros_like(wanted)
    split_of = np.zeros(len(unique), np.int64)
    sizes = np.bincount(group)
    order = rng.permutation(len(unique))
    for g in order[np.argsort(-sizes[order], kind="stable")]:
        at, count = members[g]
        lack = wanted[:, at] - have[:, at]
        cost = ((count * count - 2 * count * lack) / wanted[:, at]).sum(axis=1)
        split_of[g] = int(cost.argmin())
        have[split_of[g], at] += count
    _fill_gaps(split_of, members, sizes, len(shares))
    return split_of[group]


def _classes_of_groups(
    labels: NDArray[np.int64], group: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each group its classes and how many images of each; sparse, as both may be many."""
    width = int(labels.max()) + 1
    pairs, counts = np.unique(group * width + labels, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs // width, prepend=-1))[1:]
    return list(zip(np.split(pairs % width, starts), np.split(counts, starts), strict=True))


def _fill_gaps(
    split_of: NDArray[np.int64],
    members: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    sizes: NDArray[np.int64],
    splits: int,
) -> None:
    """Moves groups, smallest first, until train has every class and no split is empty."""
    smallest_first = np.argsort(sizes, kind="stable").tolist()
    trained = set().union(*(members[g][0].tolist() for g in np.flatnonzero(split_of == 0).tolist()))
    for g in smallest_first:
        if not trained.issuperset(members[g][0].tolist()):
            split_of[g] = 0
            trained.update(members[g][0].tolist())
    in_train = np.zeros(max(int(at.max()) for at, _ in members) + 1, np.int64)
    for g in np.flatnonzero(split_of == 0).tolist():
        in_train[members[g][0]] += 1
    for k in range(1, splits):
        if np.any(split_of == k):
            continue
        spare = (
            g for g in smallest_first
            if (split_of[g] == 0 and in_train[members[g][0]].min() > 1)
            or (split_of[g] > 0 and np.sum(split_of == split_of[g]) > 1)
        )  # fmt: skip
        moved = next(spare, None)
        if moved is None:
            _few_groups(split_of, members, smallest_first, splits)
            return
        if split_of[moved] == 0:
            in_train[members[moved][0]] -= 1
        split_of[moved] = k


def _few_groups(
    split_of: NDArray[np.int64],
    members: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    smallest_first: list[int],
    splits: int,
) -> None:
    """Gives train few groups that hold every class, and each other split one of the rest."""
    missing = set().union(*(at.tolist() for at, _ in members))
    rest = list(smallest_first)
    while missing:
        best = max(rest, key=lambda g: len(missing.intersection(members[g][0].tolist())))
        rest.remove(best)
        missing.difference_update(members[best][0].tolist())
    split_of[:] = 0
    for k, g in zip(range(1, splits), rest, strict=False):
        split_of[g] = k


def _missing_classes(
    table: ImageTable, labels: NDArray[np.int64], chosen: NDArray[np.int64], names: list[str]
) -> list[str]:
    """A line for each class that is not in every new split."""
    width = len(table.classes)
    counts = np.stack(
        [np.bincount(labels[chosen == k], minlength=width) for k in range(len(names))]
    )
    lines = []
    for c in np.flatnonzero((counts == 0).any(axis=0)):
        lacking = " and ".join(name for name, n in zip(names, counts[:, c], strict=True) if n == 0)
        of = "" if table.groups is None else ", in few groups"
        n = int(counts[:, c].sum())
        lines.append(f"class {table.classes[c]!r} ({n} images{of}) is not in {lacking}")
    if len(lines) > _MOST_TOLD:
        lines[_MOST_TOLD:] = [f"{len(lines) - _MOST_TOLD} further classes are not in every split"]
    return lines


# ---- the file


def write_splits(table: ImageTable, path: str | Path) -> None:
    """Writes a CSV file of path, label, split and group, a line an image.

    Paths are told from the data's own folder, so that the data may be moved.

    Raises:
        OSError: it can't be written.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    # file names need not be UTF-8; surrogateescape gives their bytes back
    with open(beside, "w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for i in range(len(table)):
            group = "" if table.groups is None else table.groups[i]
            label = table.classes[table.labels[i]]
            writer.writerow([_key(table, i), label, table.splits[i], group])
    os.replace(beside, path)


def read_splits(table: ImageTable, path: str | Path) -> ImageTable:
    """The table with the splits of a file that write_splits wrote.

    Raises:
        UsageError: the file is of other data (what differs first is named), or broken.
        OSError: it can't be read.
    """
    told = _read_rows(path)
    keys = [_key(table, i) for i in range(len(table))]
    for i, key in enumerate(keys):
        if key not in told:
            count = sum(k not in told for k in keys)
            raise UsageError(f"{path}: {count} of {table.name}'s images are not in it, as {key}")
        label, _, group = told[key]
        if label != (mine := table.classes[table.labels[i]]):
            raise UsageError(f"{path}: {key} is {label!r}, but in {table.name} it is {mine!r}")
        if table.groups is not None and group != table.groups[i]:
            other = f"in {table.name} of {str(table.groups[i])!r}"
            raise UsageError(f"{path}: {key} is of group {group!r}, but {other}")
    if extra := set(told).difference(keys):
        raise UsageError(
            f"{path}: {len(extra)} images of it are not in {table.name}, as {min(extra)}"
        )
    return replace(table, splits=np.array([told[key][1] for key in keys], "U5"))


def _read_rows(path: str | Path) -> dict[str, tuple[str, str, str]]:
    told: dict[str, tuple[str, str, str]] = {}
    with open(path, encoding="utf-8", newline="", errors="surrogateescape") as file:
        reader = csv.reader(file)
        if next(reader, None) != _COLUMNS:
            raise UsageError(f"{path} line 1: is not {','.join(_COLUMNS)}")
        for row in reader:
            if len(row) != 4 or row[2] not in ("", *SPLITS) or row[0] in told:
                raise UsageError(f"{path} line {reader.line_num}: can't be right: {','.join(row)}")
            told[row[0]] = (row[1], row[2], row[3])
    return told


def _key(table: ImageTable, i: int) -> str:
    """What names image i whatever folder the data lies in."""
    return table.path(i).removeprefix(os.path.join(table.base, ""))
