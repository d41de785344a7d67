"""A network's predictions for a set of images, validated, and per-image statistics."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError
from regard.files import plural

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15  # calibration error, as in Guo et al. 2017
_SUM_TOLERANCE = 0.01  # a row's sum: a softmax in bfloat16 is off by up to 0.004
_CHUNK = 2**20  # probabilities processed at a time, so that no second matrix is allocated


@dataclass(frozen=True, eq=False)
class Predictions:
    """A network's probabilities for N images, and the images' labels.

    probabilities: (N, C), each row summing to 1. float32 and float64 arrays are stored without a
        copy; other types as float64.
    labels: (N,) integers, 0 to C - 1.
    classes: C names.
    groups: (N,) names of what images have in common, such as the patient; None if images are
        independent. Images of one group are never counted as independent.
    paths: N paths, or None.
    columns: (N,) further values per image, by column name, such as its site; or None.

    Raises:
        UsageError: shapes don't match, there is no image, probabilities are not finite, are
            negative or do not sum to 1 (within 0.01), labels are out of range, a class is named
            twice, or an image has no group.
    """

    probabilities: NDArray[Any]
    labels: Ints
    classes: list[str]
    groups: NDArray[Any] | None = None
    paths: list[str] | None = None
    columns: Mapping[str, NDArray[Any]] | None = None

    def __post_init__(self) -> None:
        probabilities = np.asarray(self.probabilities)
        if probabilities.dtype not in (np.float32, np.float64):
            probabilities = probabilities.astype(np.float64)
        labels = np.asarray(self.labels)
        _check_probabilities(probabilities, self.classes)
        _check_labels(labels, *probabilities.shape)
        groups = None if self.groups is None else _as_groups(self.groups, len(labels))
        if self.paths is not None and len(self.paths) != len(labels):
            raise UsageError(
                f"{plural(len(self.paths), 'path')} for {plural(len(labels), 'image')}"
            )
        for name, values in (self.columns or {}).items():
            if len(values) != len(labels):
                raise UsageError(
                    f"{name}: {plural(len(values), 'value')} for {plural(len(labels), 'image')}"
                )
        object.__setattr__(self, "probabilities", probabilities)
        object.__setattr__(self, "labels", labels.astype(np.int64))
        object.__setattr__(self, "classes", [str(name) for name in self.classes])
        object.__setattr__(self, "groups", groups)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Ints | NDArray[np.bool_]) -> "Predictions":
        """The predictions for these images, in this order."""
        rows = np.arange(len(self))[indices]
        return Predictions(
            self.probabilities[rows], self.labels[rows], self.classes,
            None if self.groups is None else self.groups[rows],
            None if self.paths is None else [self.paths[i] for i in rows.tolist()],
            self.columns and {name: np.asarray(v)[rows] for name, v in self.columns.items()},
        )  # fmt: skip


def _check_probabilities(probabilities: NDArray[Any], classes: list[str]) -> None:
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise UsageError(f"probabilities of shape {probabilities.shape}: must be (images, classes)")
    if len(classes) != probabilities.shape[1]:
        raise UsageError(
            f"{plural(len(classes), 'class')} for {probabilities.shape[1]} probabilities"
        )
    twice = [name for name, n in Counter(classes).items() if n > 1]
    if twice:
        raise UsageError(f"class {twice[0]!r} is named twice")
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of either sign in a row
        sums = probabilities.sum(axis=1, dtype=np.float64)  # finite only if the whole row is
    wrong = np.flatnonzero(~np.isfinite(sums))
    if wrong.size:
        raise UsageError(f"probabilities of image {wrong[0]} are not finite ({wrong.size} in all)")
    if probabilities.min() < 0.0:
        raise UsageError(
            f"a probability of {probabilities.min():g}: must be 0 to 1 (logits? use softmax)"
        )
    wrong = np.flatnonzero(abs(sums - 1.0) > _SUM_TOLERANCE)
    if wrong.size:
        raise UsageError(
            f"probabilities of image {wrong[0]} sum to {sums[wrong[0]]:g}, not 1 (use softmax)"
        )


def _check_labels(labels: NDArray[Any], n: int, n_classes: int) -> None:
    if labels.shape != (n,):
        raise UsageError(f"labels of shape {labels.shape}: must be ({n},), one per image")
    if labels.dtype.kind not in "iu":
        raise UsageError(f"labels of {labels.dtype}: must be integers, 0 to {n_classes - 1}")
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if wrong.size:
        raise UsageError(
            f"label {labels[wrong[0]]} of image {wrong[0]}: must be 0 to {n_classes - 1}"
        )


def _as_groups(groups: Any, n: int) -> NDArray[np.str_]:
    array = np.asarray(groups)
    if array.shape != (n,):
        raise UsageError(f"groups of shape {array.shape}: must be ({n},), one per image")
    if array.dtype.kind in "Of":  # tables mark missing values by None or NaN
        missing = [i for i, g in enumerate(array.tolist()) if g is None or g != g]
        if missing:
            raise UsageError(
                f"image {missing[0]} has no group; give each image one, or groups=None"
            )
    return array.astype(str)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Per-image statistics from which the metrics of `evaluate` are computed.

    true, predicted: (N,) class indices; the first of several equal maxima is predicted.
    correct, correct5: (N,) 0 or 1: the true class is the top 1, or among the top 5.
    overconfidence: (N,) top probability - correct.
    bin: (N,) calibration bin of the top probability, 0 to 14.
    nll: (N,) -ln of the true class's probability, nats.
    unit: (N,) index of the bootstrap unit: the image's group, or the image itself.
    n_units: number of units.
    """

    true: Ints
    predicted: Ints
    correct: Floats
    correct5: Floats
    overconfidence: Floats
    bin: Ints
    nll: Floats
    unit: Ints
    n_units: int


def outcomes(predictions: Predictions) -> Outcomes:
    """Per-image statistics from the probabilities, without allocating a second (N, C) array."""
    probabilities, true = predictions.probabilities, predictions.labels
    images = np.arange(len(true))
    predicted = probabilities.argmax(axis=1)
    top = probabilities[images, predicted].astype(np.float64)
    correct = (predicted == true).astype(np.float64)
    # A probability of 0 costs 36 nats, not infinity, as in scikit-learn's log_loss for float64. For
    # float32, scikit-learn clips at that type's resolution, so that the same 0 costs 16 nats.
    of_true = probabilities[images, true].astype(np.float64)
    unit, n_units = units_of(predictions)
    return Outcomes(
        true=true,
        predicted=predicted,
        correct=correct,
        correct5=(_rank(probabilities, true) < 5).astype(np.float64),
        overconfidence=top - correct,
        bin=bin_of(top, BINS),
        nll=-np.log(np.clip(of_true, np.finfo(np.float64).eps, 1.0)),
        unit=unit,
        n_units=n_units,
    )


def bin_of(probabilities: Floats, bins: int) -> Ints:
    """(N,) calibration bin of each probability: closed above, ((m - 1) / bins, m / bins].

    Source: Guo et al. 2017.
    """
    edges = np.linspace(0.0, 1.0, bins + 1)
    return np.clip(np.digitize(probabilities, edges, right=True) - 1, 0, bins - 1)


def units_of(predictions: Predictions) -> tuple[Ints, int]:
    """The bootstrap unit of each image, (N,), and their number: groups, or the images."""
    return units(predictions.groups, len(predictions))


def units(groups: Sequence[str] | NDArray[np.str_] | None, count: int) -> tuple[Ints, int]:
    """The bootstrap unit of each of `count` images, and their number: groups, or the images."""
    if groups is None:
        return np.arange(count), count
    names, unit = np.unique(np.array(groups), return_inverse=True)
    return unit, len(names)


def _rank(probabilities: NDArray[Any], true: Ints) -> Ints:
    """(N,) number of classes that rank before the true one; ties go to the first class."""
    n, n_classes = probabilities.shape
    rank = np.empty(n, dtype=np.int64)
    rows = max(_CHUNK // n_classes, 1)
    for start in range(0, n, rows):
        block, label = probabilities[start : start + rows], true[start : start + rows, None]
        of_true = np.take_along_axis(block, label, axis=1)  # (rows, 1)
        earlier = np.arange(n_classes) < label  # (rows, C)
        before = (block > of_true) | ((block == of_true) & earlier)
        rank[start : start + rows] = before.sum(axis=1)
    return rank


def rarer_units(kinds: NDArray[Any], unit: Ints) -> int:
    """Number of units with images of the kind that fewest units have; kinds, unit: (N,)."""
    return min(len(np.unique(unit[kinds == kind])) for kind in np.unique(kinds))
