"""Statistics of predictions as functions of image weights.

A bootstrap sample counts each image 0, 1, 2, ... times. Each class below prepares the predictions
once, and is then called with the image weights, thousands of times; scikit-learn's functions,
with which the tests compare every number, validate and sort at each call and would take
minutes. With weights of 1 they give the plain values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError
from regard.evaluation.intervals import NAN, draws
from regard.evaluation.predictions import Floats, Ints, Predictions

MOST_WORK = 4 * 10**8  # limit of `RankStatistics.work` times resamples: about 20 s
Values = dict[str, float]
Statistic = Callable[[Floats], Values]
OF_PAIRS = "roc_auc_of_pairs"
"""Kind of the values whose mean is Hand and Till's, see `RankStatistics`."""


def class_index(predictions: Predictions, name: str, argument: str = "positive") -> int:
    """The index of a class.

    Raises:
        UsageError: there is no such class.
    """
    if name not in predictions.classes:
        some = ", ".join(predictions.classes[:20])
        raise UsageError(f"{argument}={name!r}: choose one of {some}")
    return predictions.classes.index(name)


def divide(part: float, whole: float) -> float:
    """part / whole, infinite for x / 0 and NaN for 0 / 0."""
    if whole:
        return float(part / whole)
    return math.inf if part > 0 else NAN


def ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """part / whole, NaN if the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


@dataclass(frozen=True, eq=False)
class Curve:
    """Weighted counts at or above each distinct score, in descending order of score.

    Leading axes, if any, run over several sets of weights.

    scores: (T,) distinct scores.
    tp, fp: (..., T) weights of positive and negative images with at least that score.
    """

    scores: Floats
    tp: Floats
    fp: Floats

    def roc_auc(self) -> Floats:
        """(...,) area under the ROC curve; NaN without positive or negative images."""
        tp_step, fp_step = (np.diff(x, prepend=0.0, axis=-1) for x in (self.tp, self.fp))
        area = (fp_step * (self.tp - tp_step / 2)).sum(axis=-1)
        return ratio(area, self.tp[..., -1] * self.fp[..., -1])

    def average_precision(self) -> Floats:
        """(...,) sum of precision times increase of recall, without interpolation."""
        called = self.tp + self.fp
        precision = np.divide(self.tp, called, out=np.zeros_like(called), where=called > 0)
        area = (np.diff(self.tp, prepend=0.0, axis=-1) * precision).sum(axis=-1)
        return ratio(area, self.tp[..., -1])

    def partial_auc(self, max_fpr: float) -> float:
        """Area for false positive rates up to `max_fpr`, standardized as by McClish (1989).

        0.5 is chance and 1 is perfect, as in scikit-learn's roc_auc_score(max_fpr=...). For one set
        of weights only.
        """
        if self.tp[-1] * self.fp[-1] == 0:
            return NAN
        tpr, fpr = (np.append(0.0, x) / x[-1] for x in (self.tp, self.fp))
        stop = int(np.searchsorted(fpr, max_fpr, "right"))
        last = tpr[-1]
        if stop < len(fpr):
            last = np.interp(max_fpr, fpr[stop - 1 : stop + 1], tpr[stop - 1 : stop + 1])
        area = np.trapezoid(np.append(tpr[:stop], last), np.append(fpr[:stop], max_fpr))
        chance = max_fpr**2 / 2
        return float(0.5 * (1 + (area - chance) / (max_fpr - chance)))


class Ranking:
    """How scores rank positive images relative to the others."""

    def __init__(self, positive: NDArray[np.bool_], scores: NDArray[np.floating]) -> None:
        self.order: NDArray[np.intp] = np.argsort(-scores, kind="stable")
        self.positive: NDArray[np.float64] = positive[self.order].astype(np.float64)
        ranked = scores[self.order]
        self.ends: NDArray[np.intp] = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
        self.scores: NDArray[np.float64] = ranked[self.ends].astype(np.float64)

    def reaching(self, thresholds: Floats) -> NDArray[np.intp]:
        """How many of `scores`, the highest first, reach each threshold, see `reaches`."""
        return np.searchsorted(-self.scores, -tolerated(thresholds), side="right")

    def curve(self, weights: Floats) -> Curve:
        """The curve for weights (..., N)."""
        ranked = weights[..., self.order]
        tp = np.cumsum(ranked * self.positive, axis=-1)[..., self.ends]
        return Curve(self.scores, tp, np.cumsum(ranked, axis=-1)[..., self.ends] - tp)


class LabelStatistics:
    """MCC, Cohen's kappa, quadratic kappa and Brier score of all classes together.

    mcc: multi-class Matthews correlation (Gorodkin 2004).
    kappa, quadratic_kappa: Cohen's, plain and with quadratic weights for the order in `ordered`.
    brier: mean squared error of the probabilities, summed over classes; halved for two classes,
        as usual. Equal to scikit-learn's brier_score_loss.
    """

    def __init__(self, predictions: Predictions, ordered: Sequence[str] | None = None) -> None:
        p, true = predictions.probabilities, predictions.labels
        self.true: Ints = true
        self.predicted: NDArray[np.intp] = p.argmax(axis=1)
        self.n_classes: int = p.shape[1]
        of_true = p[np.arange(len(true)), true].astype(np.float64)
        squares = np.einsum("ij,ij->i", p, p, dtype=np.float64)
        self.brier: Floats = (squares - 2 * of_true + 1) / (2 if self.n_classes == 2 else 1)
        self.rank: Ints | None = None if ordered is None else _ranks(predictions, ordered)

    def __call__(self, weights: Floats) -> Values:
        total = weights.sum()
        t = np.bincount(self.true, weights, self.n_classes) / total
        p = np.bincount(self.predicted, weights, self.n_classes) / total
        agreement, chance = weights @ (self.true == self.predicted) / total, t @ p
        spread = math.sqrt(max(1 - t @ t, 0.0) * max(1 - p @ p, 0.0))
        values = {
            "mcc": float((agreement - chance) / spread) if spread else 0.0,
            "kappa": float((agreement - chance) / (1 - chance)) if chance < 1 else NAN,
            "brier": float(weights @ self.brier / total),
        }
        if self.rank is not None:
            values["quadratic_kappa"] = self._quadratic_kappa(self.rank, weights / total)
        return values

    def _quadratic_kappa(self, rank: Ints, share: Floats) -> float:
        a, b = rank[self.true], rank[self.predicted]
        observed = share @ (a - b) ** 2
        expected = share @ a**2 + share @ b**2 - 2 * (share @ a) * (share @ b)
        return float(1 - observed / expected) if expected else NAN


def _ranks(predictions: Predictions, ordered: Sequence[str]) -> Ints:
    """(C,) the position of each class in the given order."""
    if sorted(ordered) != sorted(predictions.classes):
        raise UsageError(
            f"ordered={','.join(ordered)}: name each class once: {', '.join(predictions.classes)}"
        )
    return np.array([list(ordered).index(name) for name in predictions.classes])


class RankStatistics:
    """ROC AUC and average precision of each class against the rest, and their means.

    Classes without images, or with all images, are left out. Means: macro (unweighted), weighted
    by the number of images, and for 3 to 100 classes Hand & Till's M (Machine Learning 2001),
    the mean AUC over ordered pairs of classes. Empty for more than 2e8 images x classes.

    Values of single classes are named "roc_auc/CLASS", "average_precision/CLASS", and
    "roc_auc_of_pairs/CLASS": the mean AUC of the class against each other one.
    """

    MOST_PAIRED, MOST_STORED, MOST = 100, 2 * 10**7, 2 * 10**8

    def __init__(self, predictions: Predictions) -> None:
        self.p: Floats = predictions.probabilities
        self.true: Ints = predictions.labels
        self.names: list[str] = predictions.classes
        self.n_classes: int = self.p.shape[1]
        present: list[int] = np.unique(self.true).tolist()
        work = len(self.true) * len(present)
        self.present: list[int] = present if len(present) > 1 and work <= self.MOST else []
        pairs = 3 <= len(self.present) <= self.MOST_PAIRED
        self.pairs: list[tuple[int, int]] = [
            (c, d) for c in self.present for d in self.present if pairs and c != d
        ]
        self.stored: bool = work * (3 if pairs else 1) <= self.MOST_STORED
        # images that one call processes; ranking itself takes as long as 200 calls
        self.work: int = work * (3 if pairs else 1) + 200 * (len(self.present) + len(self.pairs))
        self._stored: dict[tuple[int, int | None], tuple[Ints, Ranking]] = {}

    def takes_long(self, resamples: int) -> bool:
        """Whether so many samples would take much more than 20 s."""
        return self.work * resamples > MOST_WORK

    def means(self) -> dict[str, tuple[str, Floats]]:
        """For each mean the kind of value of the classes (K present) it is of, and their weights.

        The weights, (K,), are those of all images.
        """
        same, counts = np.ones(len(self.present)), np.bincount(self.true)[self.present]
        found: dict[str, tuple[str, Floats]] = {}
        for kind in ("roc_auc", "average_precision") if self.present else ():
            found[f"{kind}_macro"] = kind, same
            found[f"{kind}_weighted"] = kind, counts.astype(np.float64)
        if self.pairs:
            found["roc_auc_hand_till"] = OF_PAIRS, same
        return found

    def _auc_inputs(self, c: int, other: int | None) -> tuple[Ints, Ranking]:
        """The images of class c and of another, or all images, and their ranking by p of c."""
        if (c, other) in self._stored:
            return self._stored[c, other]
        of_c = self.true == c
        images = np.flatnonzero(of_c | (self.true == other) if other is not None else of_c >= 0)
        pair = images, Ranking(of_c[images], self.p[images, c])
        if self.stored:  # otherwise each call sorts again, in bounded memory
            self._stored[c, other] = pair
        return pair

    def _curve(self, weights: Floats, c: int, other: int | None = None) -> Curve:
        images, ranking = self._auc_inputs(c, other)
        return ranking.curve(weights[..., images])

    def __call__(self, weights: Floats) -> dict[str, Any]:
        """The values for weights (N,), or arrays (B,) of them for weights (B, N)."""
        if not self.present:
            return {}
        values: dict[str, Any] = {}
        areas: dict[str, list[Floats]] = {"roc_auc": [], "average_precision": []}
        counts = []
        for c in self.present:
            curve = self._curve(weights, c)
            counts.append(curve.tp[..., -1])
            for kind, each in areas.items():
                each.append(getattr(curve, kind)())
                values[f"{kind}/{self.names[c]}"] = each[-1]
        for kind, each in areas.items():
            values[f"{kind}_macro"] = _mean(each, np.ones_like(counts))
            values[f"{kind}_weighted"] = _mean(each, np.array(counts))
        if self.pairs:
            pairs = np.stack([self._curve(weights, c, d).roc_auc() for c, d in self.pairs])
            values["roc_auc_hand_till"] = _mean(pairs, np.ones_like(pairs))
            of_class = pairs.reshape(len(self.present), -1, *pairs.shape[1:])
            for c, each in zip(self.present, of_class, strict=True):
                values[f"{OF_PAIRS}/{self.names[c]}"] = _mean(each, np.ones_like(each))
        return values if weights.ndim > 1 else {k: float(v) for k, v in values.items()}


def _mean(values: Sequence[Floats] | Floats, weights: Floats) -> Floats:
    """(K, ...) -> (...), the weighted mean of the values that are not NaN."""
    known = ~np.isnan(values)
    total = np.where(known, np.nan_to_num(values) * weights, 0.0).sum(axis=0)
    return ratio(total, np.where(known, weights, 0.0).sum(axis=0))


def resampled(
    statistic: Statistic, unit: Ints, n_units: int, resamples: int, seed: int
) -> dict[str, Floats]:
    """(resamples,) values of each number of a statistic, in bootstrap samples of the units.

    Args:
        statistic: one of this module's, or the like.
        unit: (N,) the unit of each image: its group, or its own number.
        n_units: their number.
        resamples, seed: of the bootstrap.
    """
    found: dict[str, list[Any]] = {}
    each = (times[unit] for times in draws(n_units, resamples, seed))
    for weights in _stacked(each, len(unit)) if isinstance(statistic, RankStatistics) else each:
        for name, value in statistic(weights).items():
            found.setdefault(name, []).append(value)
    return {name: np.hstack(values) for name, values in found.items()}


def _stacked(each: Iterator[Floats], length: int) -> Iterator[Floats]:
    """(B, N) weights of several samples at once, at most 1 MB."""
    while block := list(islice(each, max(1, 2**17 // length))):
        yield np.stack(block)


def reaches(probability: Any, threshold: float) -> Any:
    """Whether a probability, or each in an array, is at least a threshold, up to rounding.

    The same image in another batch, or in another program, has a logit that differs by less than
    1e-5, and a probability near 1 that differs by two units in the last place of a float32. Near 0
    the tolerance is negligible, so that thresholds of 1e-9 decide like any other.
    """
    if threshold == math.inf:  # no image is called positive
        return probability == math.inf
    return probability >= tolerated(threshold)


def tolerated(threshold: Any) -> Any:
    """The smallest probability that reaches a finite threshold, or each in an array."""
    return threshold - 1e-5 * threshold * (1 - threshold) - 1.5e-7 * threshold


class OneClassStatistics:
    """The statistics of a diagnostic test: one class, positive, against the rest.

    The test is positive if the probability of the class is at least `threshold`, or without
    a threshold if the class is the top-1 class.
    """

    def __init__(
        self,
        predictions: Predictions,
        positive: str,
        threshold: float | None = None,
        max_fpr: float | None = None,
    ) -> None:
        c = class_index(predictions, positive)
        if max_fpr is not None and not 0 < max_fpr <= 1:
            raise UsageError(f"max_fpr={max_fpr}: must be above 0 and at most 1")
        score = predictions.probabilities[:, c]
        self.positive: NDArray[np.bool_] = predictions.labels == c
        top = predictions.probabilities.argmax(axis=1) == c
        self.called: NDArray[np.bool_] = top if threshold is None else reaches(score, threshold)
        self.score: NDArray[np.float64] = score.astype(np.float64)
        self.max_fpr: float | None = max_fpr
        self.ranking: Ranking = Ranking(self.positive, score)

    def counts(self, weights: Floats) -> tuple[float, float, float, float]:
        """True positives, false positives, true negatives, false negatives."""
        tp = float(weights @ (self.positive & self.called))
        fp = float(weights @ (~self.positive & self.called))
        fn = float(weights @ (self.positive & ~self.called))
        return tp, fp, float(weights.sum()) - tp - fp - fn, fn

    def __call__(self, weights: Floats) -> Values:
        tp, fp, tn, fn = self.counts(weights)
        curve = self.ranking.curve(weights)
        values = {
            "roc_auc": float(curve.roc_auc()),
            "average_precision": float(curve.average_precision()),
            **decision_values(tp, fp, tn, fn),
            "brier": float(weights @ (self.score - self.positive) ** 2 / weights.sum()),
        }
        if self.max_fpr is not None:
            values["partial_roc_auc"] = curve.partial_auc(self.max_fpr)
        return values


def decision_values(tp: float, fp: float, tn: float, fn: float) -> Values:
    """The statistics of a 2 x 2 table."""
    sensitivity, specificity = divide(tp, tp + fn), divide(tn, tn + fp)
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": divide(tp, tp + fp),
        "npv": divide(tn, tn + fn),
        "lr_positive": divide(sensitivity, 1 - specificity),
        "lr_negative": divide(1 - sensitivity, specificity),
        "f1": divide(2 * tp, 2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / math.sqrt(margins) if margins > 0 else 0.0,
    }
