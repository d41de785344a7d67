"""Divides a table into train, val and test, stratified by class and without dividing groups.

The same images, fractions and seed give the same splits, whatever the order of the images and
the machine.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from regard.data.sources import ImageTable
from regard.errors import UsageError
from regard.files import plural

_PASSES = 5
_SWAPPED = 200  # with more groups, single moves are enough
_MOST_LISTED = 10  # warnings about single classes

Members = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""For each group its classes and how many images of each."""


def assign_splits(table: ImageTable, *, val: float, test: float, seed: int) -> ImageTable:
    """The table with the missing splits added, taken from its training images.

    Without any splits, all images are divided; with train and test, val is taken from train; with
    train and val, test is. Existing splits stay the same. Each class is divided in the same
    proportions; a class with at least as many images as there are splits is in each of them, a
    smaller one only in train. No group is divided: with groups, the fractions are met as closely as
    the sizes of the groups allow, and a class is in as many splits as its groups allow. Classes
    that a new split lacks are listed in the table's `warnings`.

    Args:
        table: its splits are all empty or all filled.
        val: fraction of the images for validation, 0 to 1; 0: no validation split.
        test: the same for the test split.
        seed: random seed of the shuffling.

    Raises:
        UsageError: a fraction is out of range, only some images have splits, there are no
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
    pool = pool[_canonical_order(table, pool)]
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
                f"{table.name}: {plural(len(pool), 'image')} can't be divided into "
                f"{', '.join(shares)}"
            )
    done = replace(table, splits=splits)
    check_groups(done)
    lines = _missing_classes(table, labels, chosen, list(shares))
    return replace(done, warnings=(*table.warnings, *lines))


def assign_folds(table: ImageTable, *, fold: int, folds: int, val: float, seed: int) -> ImageTable:
    """The table with one fold of a cross-validation as its test split, and val from the rest.

    Over all folds every image is tested once. Folds are stratified by class, and no group is
    divided.

    Args:
        table: without splits.
        fold: the test fold, 1 to `folds`.
        folds: number of folds, at least 2.
        val: fraction of the images outside the fold that are for validation.
        seed: random seed of the folds; use the same one for all folds of a cross-validation.

    Raises:
        UsageError: the table has splits, or fewer groups or images of a class than folds.
    """
    if not 1 <= fold <= folds or folds < 2:
        raise UsageError(f"fold={fold}/{folds}: 1/{folds} to {folds}/{folds}, of at least 2 folds")
    if (table.splits != "").any():
        raise UsageError(f"{table.name}: already has splits, which folds would mix")
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    order = _canonical_order(table, np.arange(len(table)))
    labels = table.labels[order]
    groups = None if table.groups is None else table.groups[order]
    counts = np.bincount(labels, minlength=len(table.classes))
    if counts.min() < folds:
        small = table.classes[int(counts.argmin())]
        images = plural(int(counts.min()), "image")
        raise UsageError(f"{table.name}: class {small} has {images}, fewer than {folds} folds")
    if groups is not None and len(np.unique(groups)) < folds:
        raise UsageError(f"{table.name}: fewer groups than {folds} folds")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    parts = kind(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
    _, test = list(parts)[fold - 1]
    splits = np.full(len(table), "train", dtype="U5")
    splits[order[test]] = "test"
    divided = replace(table, splits=splits)
    check_groups(divided)
    return assign_splits(divided, val=val, test=0.0, seed=seed)


def limit_training(table: ImageTable, limit: int, seed: int) -> ImageTable:
    """The table with `limit` of its training images, with the classes in proportion.

    Raises:
        UsageError: `limit` is less than one image per class.
    """
    train = np.flatnonzero(table.splits == "train")
    if limit >= len(train):
        return table
    present = len(np.unique(table.labels[train]))
    if limit < present:
        raise UsageError(
            f"limit={limit}: at least one training image for each of {present} classes"
        )
    order = train[_canonical_order(table, train)]
    order = order[np.random.default_rng(seed).permutation(len(order))]
    labels = table.labels[order]
    # an image's rank within its class, as a fraction of the class: the smallest are proportional
    rank = np.zeros(len(order))
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        rank[members] = np.arange(len(members)) / len(members)
    chosen = order[np.argsort(rank, kind="stable")[:limit]]
    rows = np.sort(np.concatenate([chosen, np.flatnonzero(table.splits != "train")]))
    return table.select(rows)


def _canonical_order(table: ImageTable, pool: NDArray[np.int64]) -> NDArray[np.int64]:
    """These images ordered by class and name, or by row, independently of the table's order."""
    if table.files is None:
        return np.argsort(pool if table.rows is None else table.rows[pool], kind="stable")
    labels = table.labels.tolist()
    names = [(labels[i], table.key(i)) for i in pool.tolist()]
    return np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)


def check_groups(table: ImageTable) -> None:
    """Checks that no group is in two splits.

    Raises:
        UsageError: one is; the message names it.
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
        present = sorted(set(table.splits[table.groups == name]))
        raise UsageError(f"{table.name}: group {name!r} is in {' and in '.join(present)}")


def _pool(table: ImageTable) -> tuple[NDArray[np.int64], set[str]]:
    """The images to divide, and the splits that exist."""
    empty = table.splits == ""
    if empty.all():
        return np.arange(len(table)), set()
    if empty.any():
        without = plural(int(empty.sum()), "image")
        raise UsageError(f"{table.name}: {without} without a split, but the others have one")
    present = set(table.splits.tolist())
    if "train" not in present:
        raise UsageError(f"{table.name}: has no train images, only {' and '.join(sorted(present))}")
    return np.flatnonzero(table.splits == "train"), present


def _divide_images(
    labels: NDArray[np.int64], shares: dict[str, float], rng: np.random.Generator
) -> NDArray[np.int64]:
    """(N,) classes -> (N,) indices into shares, where 0 is train."""
    chosen = np.zeros(len(labels), np.int64)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # shuffled within each class
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        if len(members) < len(shares):
            continue
        taken = 0
        for k, share in enumerate(list(shares.values())[1:], start=1):
            others = len(shares) - 1 - k  # later splits and train get at least one image each
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
    """Like _divide_images, but all images of a group go to one split.

    Greedy, largest groups first: each goes where it most reduces the sum over splits and classes
    of (actual images - wanted images)^2 / wanted images. scikit-learn's StratifiedGroupKFold does
    the same, but only for equal folds.
    """
    unique, group = np.unique(names, return_inverse=True)
    if len(unique) < len(shares):
        raise UsageError(
            f"{plural(len(unique), 'group')} can't be divided into {', '.join(shares)}"
        )
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
    _Coverage(split_of, members, wanted).improve()
    return split_of[group]


def _classes_of_groups(labels: NDArray[np.int64], group: NDArray[np.int64]) -> Members:
    """Each group's classes, stored sparsely, as both may be many."""
    width = int(labels.max()) + 1
    pairs, counts = np.unique(group * width + labels, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs // width, prepend=-1))[1:]
    return list(zip(np.split(pairs % width, starts), np.split(counts, starts), strict=True))


def _fill_gaps(
    split_of: NDArray[np.int64],
    members: Members,
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
    members: Members,
    smallest_first: list[int],
    splits: int,
) -> None:
    """Gives train a few groups that cover every class, and each other split one of the rest."""
    missing = set().union(*(at.tolist() for at, _ in members))
    rest = list(smallest_first)
    while missing:
        best = max(rest, key=lambda g: len(missing.intersection(members[g][0].tolist())))
        rest.remove(best)
        missing.difference_update(members[best][0].tolist())
    split_of[:] = 0
    for k, g in zip(range(1, splits), rest, strict=False):
        split_of[g] = k


class _Coverage:
    """Tracks which classes each split has, and moves groups until each has as many as possible.

    A change is made only if it puts more classes into splits and train keeps all of its own; among
    such changes, the one with image counts nearest to those wanted is made.
    """

    def __init__(
        self, split_of: NDArray[np.int64], members: Members, wanted: NDArray[np.float64]
    ) -> None:
        self.split_of, self.members, self.wanted = split_of, members, wanted
        self.counts = np.zeros(wanted.shape, np.int64)  # groups; (splits, classes)
        self.surplus = -wanted  # images in excess of those wanted
        self.groups_of: dict[int, list[int]] = {}
        for g, (at, n) in enumerate(members):
            self.counts[split_of[g], at] += 1
            self.surplus[split_of[g], at] += n
            for c in at.tolist():
                self.groups_of.setdefault(c, []).append(g)

    def improve(self) -> None:
        """Moves or swaps groups until no more classes are covered, or after a few passes."""
        for _ in range(_PASSES):
            before = np.count_nonzero(self.counts)
            for k, c in np.argwhere(self.counts == 0).tolist():
                if self.counts[k, c] == 0 and len(self.groups_of.get(c, ())) > 1:
                    self._cover(k, c)
            if np.count_nonzero(self.counts) == before:
                return

    def _cover(self, k: int, c: int) -> None:
        """Brings a group of class c into split k, by a move or a swap."""
        back = np.flatnonzero(self.split_of == k).tolist()
        back = back if len(self.members) <= _SWAPPED else []
        best_cost, best = np.inf, []
        for g in self.groups_of[c]:
            for moves in ([(g, k)], *([(g, k), (h, int(self.split_of[g]))] for h in back)):
                cost = self._cost(moves)
                if cost < best_cost:
                    best_cost, best = cost, moves
        for g, to in best:
            at, n = self.members[g]
            for split, sign in ((self.split_of[g], -1), (to, 1)):
                self.counts[split, at] += sign
                self.surplus[split, at] += sign * n
            self.split_of[g] = to

    def _cost(self, moves: list[tuple[int, int]]) -> float:
        """How much further from the wanted counts the moves lead; inf if no more is covered."""
        columns = np.unique(np.concatenate([self.members[g][0] for g, _ in moves]))
        counts, surplus = self.counts[:, columns], self.surplus[:, columns]
        wanted, before = self.wanted[:, columns], np.count_nonzero(counts)
        old = (surplus**2 / wanted).sum()
        for g, to in moves:
            at, n = self.members[g]
            at = np.searchsorted(columns, at)
            for split, sign in ((self.split_of[g], -1), (to, 1)):
                counts[split, at] += sign
                surplus[split, at] += sign * n
        if np.count_nonzero(counts) <= before or not counts[0].all():
            return np.inf
        return float((surplus**2 / wanted).sum() - old)


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
        lines.append(f"class {table.classes[c]!r} ({plural(n, 'image')}{of}) is not in {lacking}")
    if len(lines) > _MOST_LISTED:
        lines[_MOST_LISTED:] = [
            f"{len(lines) - _MOST_LISTED} further classes are not in every split"
        ]
    return lines
