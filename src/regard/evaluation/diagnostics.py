"""Metrics of a diagnostic study: ROC, agreement, and one class against the rest.

For all classes together: roc_auc and average_precision of each class against the rest, as "_macro"
and "_weighted" means, and roc_auc_hand_till; mcc, kappa, brier, and with `ordered`
quadratic_kappa. With `positive`, for that class against the rest: roc_auc, average_precision,
sensitivity, specificity, ppv, npv, lr_positive and lr_negative (likelihood ratios), f1, mcc,
brier, calibration_slope, calibration_intercept, and with `max_fpr` partial_roc_auc.

Intervals are from bootstrap samples of images or, with groups, of whole groups: expanded
percentiles, and for areas Wilson's with the samples' variance, for ROC AUCs at least as wide as
Newcombe's (`regard.evaluation.areas.area`); for their means over classes see
`regard.evaluation.areas.ClassAreas`. Brier scores have that of
`regard.evaluation.intervals.mean_of_losses`.
Calibration slope and intercept have Student's t
(`regard.evaluation.recalibration.calibration_line`).
Metrics of one class against the rest, and of two classes, are as uncertain as the rarer of the two
kinds makes them: the number of its units counts, and a single one gives no interval. Sensitivity,
specificity, ppv and npv have Wilson's interval (with groups `share_of_groups`). Areas over all
classes have no interval if it would take much more than 20 s, which is, with 1000 resamples, from
about 10,000 images of 12 classes on.

A likelihood ratio may be infinite, and resamples do not vary if it is 0 or infinite. Its interval
then extends to the ratio obtained by replacing a sensitivity or specificity of 0 or 1 by the
other end of its Wilson interval, while the other of the two keeps its measured value. With 20 of 20
positives and a specificity of 0.5, lr_negative is 0, up to (1 - 0.839) / 0.5 = 0.32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.evaluation.areas import ClassAreas, Kinds, area
from regard.evaluation.intervals import (
    NAN,
    Estimate,
    check_settings,
    finite_or_none,
    mean_of_losses,
    percentile,
    share_of_groups,
    wilson,
)
from regard.evaluation.metrics import evaluate
from regard.evaluation.predictions import Floats, Predictions, rarer_units, units_of
from regard.evaluation.recalibration import calibration_line
from regard.evaluation.statistics import (
    OF_PAIRS,
    LabelStatistics,
    OneClassStatistics,
    RankStatistics,
    Statistic,
    resampled,
)
from regard.evaluation.thresholds import from_probability

_AREAS = {"roc_auc", "average_precision", "partial_roc_auc"}  # of one class
_ROUNDING = 1e-12


@dataclass(frozen=True)
class OneClass:
    """One class against the rest, as a diagnostic test.

    positive: the class.
    threshold: on its probability, infinite if no image reaches it; None: positive if it is the
        top-1 class.
    counts: true positives "tp", false positives "fp", true negatives "tn", false negatives "fn".
    metrics: by name.
    """

    positive: str
    threshold: float | None
    counts: dict[str, int]
    metrics: dict[str, Estimate]

    def decision(self) -> str:
        """ "positive from a probability of 0.25 on", or "the top-1 class decides"."""
        if self.threshold is None:
            return "the top-1 class decides"
        return f"positive {from_probability(self.threshold)}"

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON; "decision" tells an infinite threshold (null) from none."""
        threshold = None if self.threshold is None else finite_or_none(self.threshold)
        metrics = {name: e.to_dict() for name, e in self.metrics.items()}
        return {
            "positive": self.positive, "threshold": threshold, "decision": self.decision(),
            "counts": self.counts, "metrics": metrics,
        }  # fmt: skip


@dataclass(frozen=True)
class Diagnostics:
    """The metrics of a diagnostic study; see `diagnose`.

    metrics: of all classes together, by name.
    per_class: "roc_auc" and "average_precision" of each class with images, against the rest.
    one_class: results for the positive class, if one was named.
    """

    metrics: dict[str, Estimate]
    per_class: dict[str, dict[str, Estimate]]
    one_class: OneClass | None = None
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON, with None for values that are not finite."""
        return {
            "confidence": self.confidence,
            "metrics": {name: e.to_dict() for name, e in self.metrics.items()},
            "per_class": {
                name: {kind: e.to_dict() for kind, e in each.items()}
                for name, each in self.per_class.items()
            },
            "one_class": None if self.one_class is None else self.one_class.to_dict(),
        }


def diagnose(
    predictions: Predictions,
    *,
    positive: str | None = None,
    threshold: float | None = None,
    ordered: Sequence[str] | None = None,
    max_fpr: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Diagnostics:
    """ROC AUC, average precision, agreement, Brier score; one class as a diagnostic test.

    See the module's docstring for the metrics and their intervals.

    Args:
        predictions: of at least one image.
        positive: the class of a diagnostic test; default: none.
        threshold: on its probability, chosen on other images; default: the top-1 class decides.
        ordered: all classes from lowest to highest, for the quadratic kappa.
        max_fpr: the largest false positive rate of the partial AUC.
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: no such class, or an argument out of range.
    """
    check_settings(resamples, confidence)
    bootstrap = _Bootstrap(predictions, resamples, seed, confidence)
    ranking = RankStatistics(predictions)
    ranks = bootstrap(ranking, intervals=not ranking.takes_long(resamples))
    overall = bootstrap(LabelStatistics(predictions, ordered))
    per_class: dict[str, dict[str, Estimate]] = {}
    for name, estimate in ranks.items():
        kind, _, of = name.partition("/")
        if kind == OF_PAIRS:
            continue
        if of:
            per_class.setdefault(of, {})[kind] = estimate
        else:
            overall[name] = estimate
    one = None
    if positive is not None:
        one = _one_class(predictions, positive, threshold, max_fpr, bootstrap)
    return Diagnostics(overall, per_class, one, confidence)


def diagnose_class(
    predictions: Predictions,
    positive: str,
    *,
    threshold: float | None = None,
    max_fpr: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> OneClass:
    """The part of `diagnose` for the positive class.

    Raises:
        UsageError: no such class, or an argument out of range.
    """
    check_settings(resamples, confidence)
    bootstrap = _Bootstrap(predictions, resamples, seed, confidence)
    return _one_class(predictions, positive, threshold, max_fpr, bootstrap)


def diagnose_calibration(
    predictions: Predictions,
    positive: str | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """The metrics that a temperature changes: ece, nll, brier, and the calibration of one class.

    Args:
        predictions: of at least one image.
        positive: the class for "brier_positive", "calibration_slope", "calibration_intercept".
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: no such class, or an argument out of range.
    """
    check_settings(resamples, confidence)
    bootstrap = _Bootstrap(predictions, resamples, seed, confidence)
    metrics = evaluate(predictions, resamples=resamples, seed=seed, confidence=confidence).metrics
    found = {name: metrics[name] for name in ("ece", "nll")}
    found["brier"] = bootstrap(LabelStatistics(predictions, None))["brier"]
    if positive is not None:
        one = OneClassStatistics(predictions, positive)
        found["brier_positive"] = bootstrap(one, rare=one.positive)["brier"]
        found |= calibration_line(predictions, positive, confidence)
    return found


def _one_class(
    predictions: Predictions,
    positive: str,
    threshold: float | None,
    max_fpr: float | None,
    bootstrap: "_Bootstrap",
) -> OneClass:
    statistic = OneClassStatistics(predictions, positive, threshold, max_fpr)
    names = ("tp", "fp", "tn", "fn")
    counts = dict(zip(names, map(int, statistic.counts(np.ones(len(predictions)))), strict=True))
    metrics = bootstrap(statistic, rare=statistic.positive)
    is_positive, called = statistic.positive, statistic.called
    for name, among in (
        ("sensitivity", is_positive), ("specificity", ~is_positive), ("ppv", called),
        ("npv", ~called),
    ):  # fmt: skip
        metrics[name] = bootstrap.share(is_positive == called, among)
    sensitivity, specificity = metrics["sensitivity"], metrics["specificity"]
    for name, one, other in (
        ("lr_positive", sensitivity, _complement(specificity)),
        ("lr_negative", _complement(sensitivity), specificity),
    ):
        metrics[name] = _ratio(metrics[name], one, other)
    metrics |= calibration_line(predictions, positive, bootstrap.confidence)
    return OneClass(positive, threshold, counts, metrics)


def _complement(share: Estimate) -> Estimate:
    return Estimate(1 - share.value, 1 - share.high, 1 - share.low)


def _ratio(estimate: Estimate, one: Estimate, other: Estimate) -> Estimate:
    """The ratio of two shares; if its resamples do not vary, with the module's interval."""
    edges = [e.value in (0.0, 1.0) for e in (one, other)]
    if math.isnan(estimate.value) or not (estimate.value in (0.0, math.inf) or all(edges)):
        return estimate
    (a, b), (c, d) = (
        (e.low, e.high) if edge else (e.value, e.value)
        for e, edge in zip((one, other), edges, strict=True)
    )
    if math.isnan(a + b + c + d):
        return Estimate(estimate.value, NAN, NAN)
    return Estimate(estimate.value, a / d, b / c if c > 0 else math.inf)


class _Bootstrap:
    """Estimates of statistics, all from the same bootstrap samples."""

    def __init__(
        self, predictions: Predictions, resamples: int, seed: int, confidence: float
    ) -> None:
        self.unit, self.n_units = units_of(predictions)
        self.grouped, self.labels = predictions.groups is not None, predictions.labels
        self.resamples, self.seed, self.confidence = resamples, seed, confidence

    def __call__(
        self, statistic: Statistic, *, intervals: bool = True, rare: Any = None
    ) -> dict[str, Estimate]:
        values = statistic(np.ones(len(self.unit)))
        if not intervals or self.n_units < 2:
            return {name: Estimate(value, NAN, NAN) for name, value in values.items()}
        drawn = resampled(statistic, self.unit, self.n_units, self.resamples, self.seed)
        if isinstance(statistic, RankStatistics):
            areas = ClassAreas(statistic, self.unit)
            return {name: areas.interval(name, values, drawn, self.confidence) for name in values}
        rarest = rarer_units(self.labels if rare is None else rare, self.unit)
        two = rare is not None or len(np.unique(self.labels)) == 2
        units = rarest if two else self.n_units
        halved = not isinstance(statistic, LabelStatistics) or statistic.n_classes == 2
        largest = 1.0 if halved else 2.0
        found = {
            name: self._estimate(name, value, drawn[name], units, rarest, largest)
            for name, value in values.items()
        }
        for name in _AREAS & found.keys():
            kinds = None if name == "average_precision" else Kinds.of(rare, self.unit)
            found[name] = area(values[name], drawn[name], self.confidence, rarest, kinds)
        return found

    def _estimate(
        self, name: str, value: float, drawn: Floats, units: int, alike: int, largest: float
    ) -> Estimate:
        """The interval of a value; largest: possible mean loss, of a Brier score."""
        drawn = drawn[~np.isnan(drawn)]
        if not math.isfinite(value) or not drawn.size or units < 2:
            return Estimate(value, NAN, NAN)
        if name == "brier":
            interval = mean_of_losses(value, drawn, self.confidence, units, largest)
        else:
            interval = percentile(value, drawn, self.confidence, units)
        if interval.high - interval.low > _ROUNDING:
            return interval
        # apart from samples with one class only, all are alike, though other images might differ
        end = round(value, 12)
        if not name.endswith(("mcc", "kappa")):
            return wilson(end, alike, self.confidence) if end in (0.0, 1.0) else interval
        if abs(end) != 1:  # 0: no sample has the other class
            return interval if end else Estimate(value, NAN, NAN)
        least = 2 * wilson(1.0, alike, self.confidence).low - 1  # from -1 to 1
        if math.isnan(least):
            return Estimate(value, NAN, NAN)
        return Estimate(value, least, 1.0) if end == 1 else Estimate(value, -1.0, -least)

    def share(self, right: Any, among: Any) -> Estimate:
        """The share of some images that are right; NaN if there are none."""
        if not among.any():
            return Estimate(NAN, NAN, NAN)
        if not self.grouped:
            return wilson(float(right[among].mean()), int(among.sum()), self.confidence)
        return share_of_groups(right[among], self.unit[among], self.confidence)
