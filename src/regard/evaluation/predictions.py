"""What a network said of a set of images, checked, and boiled down to a few numbers an image."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15  # of the calibration error, as Guo et al. 2017
_SUM_TOLERANCE = 0.01  # of a row: a softmax in bfloat16 is off by up to 0.004
_CHUNK = 2**20  # probabilities looked at together, so that no second matrix is made


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a network said of N images, and what they are.

    probabilities: (N, C), each row summing to 1; kept as float64.
    labels: (N,) whole numbers, 0 to C - 1.
    classes: C names.
    groups: (N,) names of what images share, such as the patient, or None where each image is
        drawn by itself. Images of a group are never counted as independent.
    paths: N of them, or None.

    Raises:
        UsageError: shapes that do not fit, no image, probabilities that are not finite, are
            negative or do not sum to 1 (within 0.01), labels out of range, classes named twice,
            images without a group.
    """

    probabilities: Floats
    labels: Ints
    classes: list[str]
    groups: NDArray[Any] | None = None
    paths: list[str] | None = None

    def __post_init__(self) -> None:
        probabilities = np.asarray(self.probabilities, dtype=np.float64)
        labels = np.asarray(self.labels)
        _check_probabilities(probabilities, self.classes)
        _check_labels(labels, *probabilities.shape)
        groups = None if self.groups is None else _as_groups(self.groups, len(labels))
        if self.paths is not None and len(self.paths) != len(labels):
            raise UsageError(f"{len(self.paths)} paths for {len(labels)} images")
        object.__setattr__(self, "probabilities", probabilities)
        object.__setattr__(self, "labels", labels.astype(np.int64))
        object.__setattr__(self, "classes", [str(name) for name in self.classes])
        object.__setattr__(self, "groups", groups)

    def __len__(self) -> int:
        return len(self.labels)


def _check_probabilities(probabilities: Floats, classes: list[str]) -> None:
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise UsageError(f"probabilities of shape {probabilities.shape}: (images, classes)")
    if len(classes) != probabilities.shape[1]:
        raise UsageError(f"{len(classes)} classes for {probabilities.shape[1]} probabilities")
    twice = [name for name, n in Counter(classes).items() if n > 1]
    if twice:
        raise UsageError(f"class {twice[0]!r} is named twice")
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of either sign in a row
        sums = probabilities.sum(axis=1)  # not finite where any of the row is not
    wrong = np.flatnonzero(~np.isfinite(sums))
    if wrong.size:
        raise UsageError(f"probabilities of image {wrong[0]} are not finite (and of {wrong.size})")
    if probabilities.min() < 0.0:
        raise UsageError(f"a probability of {probabilities.min():g}: 0 to 1 (logits? use softmax)")
    wrong = np.flatnonzero(abs(sums - 1.0) > _SUM_TOLERANCE)
    if wrong.size:
        raise UsageError(
            f"probabilities of image {wrong[0]} sum to {sums[wrong[0]]:g}, not 1 (use softmax)"
        )


def _check_labels(labels: NDArray[Any], n: int, n_classes: int) -> None:
    if labels.shape != (n,):
        raise UsageError(f"labels of shape {labels.shape}: ({n},), one an image")
    if labels.dtype.kind not in "iu":
        raise UsageError(f"labels of {labels.dtype}: whole numbers, 0 to {n_classes - 1}")
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if wrong.size:
        raise UsageError(f"label {labels[wrong[0]]} of image {wrong[0]}: 0 to {n_classes - 1}")


def _as_groups(groups: Any, n: int) -> NDArray[np.str_]:
    array = np.asarray(groups)
    if array.shape != (n,):
        raise UsageError(f"groups of shape {array.shape}: ({n},), one an image")
    if array.dtype.kind in "Of":  # None and NaN are how a table says that it is missing
        missing = [i for i, g in enumerate(array.tolist()) if g is None or g != g]
        if missing:
            raise UsageError(f"image {missing[0]} has no group; give each one, or groups=None")
    return array.astype(str)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The few numbers an image that all metrics are made of.

    true, predicted: (N,) classes; of equal probabilities the first class is predicted.
    correct, correct5: (N,) 0 or 1, the true class is the first, or among the first five.
    overconfidence: (N,) top probability - correct.
    bin: (N,) of the top probability, 0 to 14.
    nll: (N,) -ln of the true class's probability, nats.
    unit: (N,) what is drawn together: the image's group, or its own number.
    n_units: of them.
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
    """Boils the probabilities down, without a second matrix of their size."""
    probabilities, true = predictions.probabilities, predictions.labels
    images = np.arange(len(true))
    predicted = probabilities.argmax(axis=1)
    top = probabilities[images, predicted]
    correct = (predicted == true).astype(np.float64)
    # bins closed above, as Guo et al.: ((m - 1) / 15, m / 15]
    edges = np.linspace(0.0, 1.0, BINS + 1)
    bins = np.clip(np.digitize(top, edges, right=True) - 1, 0, BINS - 1)
    # as scikit-learn's log_loss: a probability of 0 costs 36 nats, not infinity
    of_true = np.maximum(probabilities[images, true], np.finfo(np.float64).eps)
    unit, n_units = images, len(true)
    if predictions.groups is not None:
        names, unit = np.unique(predictions.groups, return_inverse=True)
        n_units = len(names)
    return Outcomes(
        true=true,
        predicted=predicted,
        correct=correct,
        correct5=(_rank(probabilities, true) < 5).astype(np.float64),
        overconfidence=top - correct,
        bin=bins,
        nll=-np.log(np.minimum(of_true, 1.0)),
        unit=unit,
        n_units=n_units,
    )


def _rank(probabilities: Floats, true: Ints) -> Ints:
    """(N,) how many classes come before the true one; of equal ones the first class does."""
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
