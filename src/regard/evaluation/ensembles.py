"""Averages the predictions of several networks, such as folds or seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation.predictions import Predictions


@dataclass(frozen=True, eq=False)
class Averaged:
    """The mean of several networks' predictions.

    Attributes:
        predictions: for each image, the mean over the members that predict it.
        members: name, number of predicted images and accuracy on them, for each member.
        answered: {number of members: number of images predicted by that many}.
        sd: standard deviation over members of the true class's probability, averaged over images
            with several members; NaN if there are none.
        disagreement: the share of those images whose members differ in the top-1 class.
    """

    predictions: Predictions
    members: list[tuple[str, int, float]]
    answered: dict[int, int]
    sd: float
    disagreement: float

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        several = bool(np.isfinite(self.sd))
        return {
            "members": [{"run": r, "images": n, "top1": t} for r, n, t in self.members],
            "members_per_image": {str(k): n for k, n in self.answered.items()},
            "sd": self.sd if several else None,
            "disagreement": self.disagreement if several else None,
        }


def average(each: Sequence[Predictions], names: Sequence[str]) -> Averaged:
    """Averages, for each image, the probabilities of the members that predict it.

    Args:
        each: the members' predictions, with paths; a member has no prediction for images that
            trained it.
        names: the members' names for messages.

    Raises:
        UsageError: classes differ, or an image has two labels.
    """
    check_same_classes([p.classes for p in each], names)
    classes = each[0].classes
    rows: dict[str, int] = {}
    for p in each:
        for path in p.paths or ():
            rows.setdefault(path, len(rows))
    sums = np.zeros((len(rows), len(classes)))
    squares, counts = np.zeros_like(sums), np.zeros(len(rows), np.int64)
    votes = np.zeros_like(sums)
    first = np.full((len(rows), 2), -1, np.int64)  # member and row that group and columns are from
    labels = np.full(len(rows), -1, np.int64)
    members = []
    for k, (p, name) in enumerate(zip(each, names, strict=True)):
        order = [p.classes.index(c) for c in classes]
        label = np.argsort(order)[p.labels]
        at = np.array([rows[path] for path in p.paths or ()], np.int64)
        if (wrong := (labels[at] >= 0) & (labels[at] != label)).any():
            path = (p.paths or [])[int(wrong.argmax())]
            raise UsageError(f"{path} has a different label in {name} than in {names[0]}")
        shares = p.probabilities[:, order].astype(np.float64)
        sums[at] += shares
        squares[at] += shares**2
        votes[at, shares.argmax(axis=1)] += 1
        counts[at] += 1
        new = first[at, 0] < 0
        first[at[new]] = np.stack([np.full(new.sum(), k), np.flatnonzero(new)], axis=1)
        labels[at] = label
        members.append((name, len(p), float((shares.argmax(axis=1) == label).mean())))
    mean = sums / counts[:, None]
    groups = None
    if all(p.groups is not None for p in each):
        groups = np.array([each[k].groups[i] for k, i in first.tolist()])  # type: ignore[index]
    columns = {
        name: np.array([each[k].columns[name][i] for k, i in first.tolist()], dtype=object)  # type: ignore[index, type-var]
        for name in each[0].columns or ()
        if all(name in (p.columns or ()) for p in each)
    }
    several = counts > 1
    variance = squares - counts[:, None] * mean**2
    deviation = np.sqrt(np.maximum(variance, 0) / np.maximum(counts - 1, 1)[:, None])
    true = deviation[np.arange(len(rows)), labels]
    return Averaged(
        Predictions(mean, labels, classes, groups, list(rows), columns), members,
        {int(k): int(n) for k, n in zip(*np.unique(counts, return_counts=True), strict=True)},
        float(true[several].mean()) if several.any() else float("nan"),
        float((votes.max(axis=1) < counts)[several].mean()) if several.any() else float("nan"),
    )  # fmt: skip


def check_same_classes(each: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    """Refuses networks with different classes.

    Raises:
        UsageError: classes differ, or there are fewer than two networks.
    """
    if len(each) < 2:
        raise UsageError("an ensemble needs at least two members")
    for classes, name in zip(each[1:], names[1:], strict=True):
        if sorted(classes) != sorted(each[0]):
            more = sorted(set(classes) ^ set(each[0]))
            raise UsageError(
                f"{name} has other classes than {names[0]}: {', '.join(more[:10])} in one of them "
                "only"
            )
