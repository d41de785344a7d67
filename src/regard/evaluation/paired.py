"""Paired comparison of two networks on the same images in any metric, with detectable differences.

The difference has a paired bootstrap interval (each sample has both networks on the same images
or groups), at each end the wider of expanded percentiles and Student's t with the samples'
standard error, and the p-value at which this interval touches 0.
If the metric is for one class against the rest, or a mean over two classes, the samples' variance
is corrected for the number of units of the rarer of the two kinds (by n / (n - 1)).
Some metrics have a better one: top1 the test of `compare`, and the ROC AUC of the positive class,
without groups, DeLong's. Areas near 1, or of few images of a kind, hardly vary in samples: their
interval is at each end the wider of this and of what the two areas' own intervals tell
(`areas_compared`), and the p-value the larger; ROC AUCs are left as they are if the wrong pairs
amount to 5 or more units of the rarer kind (units times 1 - AUC); means over three and more classes
are not. Areas over all classes that would take minutes are not compared.
The balanced accuracy is the mean of the classes' recalls, each with
Bonett and Price's interval of a paired difference (`mean_of_differences`); where groups have images
of several classes, its interval and p-value are the larger of these and the bootstrap's.
Sensitivity and specificity have that interval too, and the test of `compare` on the images of their
kind. The p-values are adjusted by Holm's correction over the metrics.

The smallest detectable difference is the one that Student's t test shows with a power of 80 %,
given the bootstrap's standard error and as many degrees of freedom as images (groups) less one;
with DeLong's test, (z(1 - alpha/2) + z(0.8)) times its standard error. If samples do not vary, the
interval and the detectable difference of a share are Wilson's for none of as many images (groups).
Where the interval is not the bootstrap's, its width may tell of a larger standard error.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import NormalDist
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation.areas import ClassAreas, areas_compared
from regard.evaluation.comparison import common_groups, compare, exact_test, name_of_test
from regard.evaluation.intervals import (
    NAN,
    Estimate,
    bootstrap_test,
    check_settings,
    detectable_factor,
    finite_or_none,
    quantile,
    reach_of_none,
    standard_error,
)
from regard.evaluation.metrics import ClassificationStatistics
from regard.evaluation.paired_shares import PairedShare, mean_of_differences, p_value_of
from regard.evaluation.predictions import Floats, Ints, Predictions, rarer_units, units_of
from regard.evaluation.significance import delong, holm
from regard.evaluation.statistics import (
    LabelStatistics,
    OneClassStatistics,
    RankStatistics,
    Statistic,
    Values,
    class_index,
    resampled,
)
from regard.files import signed_range

_OVER_CLASSES = (
    "balanced_accuracy", "macro_", "roc_auc", "average_precision", "mcc", "kappa",
    "quadratic_kappa", "brier",
)  # fmt: skip
_OF_RECALLS = (
    "balanced_accuracy", "macro_recall", "positive/sensitivity", "positive/specificity",
)  # fmt: skip
LOWER_IS_BETTER = ("nll", "ece", "brier", "lr_negative")
_LARGEST = {"nll": math.inf, "lr_positive": math.inf, "lr_negative": math.inf,
            "mcc": 2.0, "kappa": 2.0, "quadratic_kappa": 2.0, "brier": 2.0}  # fmt: skip
"""The largest possible differences of metrics that are not shares; shares differ by at most 1."""
_DELONG = "DeLong test"
_TOO_LONG = "none, as it would take too long"
_ENOUGH = 5  # units of the rarer kind that the wrong pairs of a ROC AUC must amount to
POWER = 0.8  # power for the smallest detectable difference


@dataclass(frozen=True)
class MetricComparison:
    """One metric of two networks, a and b, on the same n images; see `compare_metrics`.

    metric: its name; "positive/..." for the positive class against the rest.
    a, b: the values.
    difference: a's value minus b's, with its interval.
    p_value: two-sided; probability of such a difference if both networks were equal.
    adjusted: the p-value after Holm's correction over several comparisons.
    detectable: smallest difference that these images would have shown with 80 % power; infinite
        if no possible difference would have been shown, NaN if it is not known.
    test: name of the test.
    """

    metric: str
    n: int
    a: float
    b: float
    difference: Estimate
    p_value: float
    adjusted: float
    detectable: float
    test: str
    confidence: float = 0.95

    @property
    def shown(self) -> str:
        """ "better", "worse", or "not shown": a compared with b."""
        if not self.adjusted <= 1 - self.confidence or not self.difference.value:
            return "not shown"
        higher = self.difference.value > 0
        lower_is_better = self.metric.rpartition("/")[2] in LOWER_IS_BETTER
        return "better" if higher != lower_is_better else "worse"

    def sentence(self, a: str = "a", b: str = "b") -> str:
        """The result in one sentence; `a` and `b` are the names of the networks."""
        name = self.metric.replace("_", " ")
        d = self.difference
        value, low, high = signed_range(d.value, d.low, d.high, 4)
        interval = (
            f"{100 * self.confidence:g} % interval {low} to {high}, " if d.has_interval else ""
        )
        how = "no test is possible"
        if self.test == _TOO_LONG:
            how = "not compared: it would take minutes"
        elif not math.isnan(self.p_value):
            how = f"{interval}p = {self.p_value:.3g}, {self.test}"
            if self.adjusted != self.p_value:
                how += f"; {self.adjusted:.3g} after Holm's correction"
        by = "difference not defined" if math.isnan(d.value) else f"difference {value}"
        numbers = f"{self.a:.4f} and {self.b:.4f}, {by} ({how})"
        if self.shown != "not shown":
            return f"{a} is shown to be {self.shown} than {b} in {name}: {numbers}."
        could = "these images cannot tell how large a difference they could have shown"
        if self.test == _TOO_LONG:
            could = "with fewer resamples, or fewer images or classes, it is compared"
        elif math.isfinite(self.detectable):
            could = f"these {self.n:,} images could have shown one of {self.detectable:.4f} or more"
        elif math.isinf(self.detectable):
            could = f"with these {self.n:,} images no difference could have been shown"
        return f"No difference between {a} and {b} in {name} is shown: {numbers}; {could}."

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        numbers = {
            k: finite_or_none(getattr(self, k))
            for k in ("a", "b", "p_value", "adjusted", "detectable")
        }
        return {
            "metric": self.metric, "n": self.n, "confidence": self.confidence,
            "difference": self.difference.to_dict(), "test": self.test, "shown": self.shown,
            **numbers,
        }  # fmt: skip


def compare_metrics(
    a: Predictions,
    b: Predictions,
    *,
    metrics: Sequence[str] | None = None,
    positive: str | None = None,
    thresholds: tuple[float | None, float | None] = (None, None),
    ordered: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[MetricComparison]:
    """Compares two networks on the same images in each metric of `evaluate` and `diagnose`.

    See the module's docstring for the tests, and `adjust` for comparisons of several networks.

    Args:
        a, b: predictions for the same images in the same order; groups with either or both.
        metrics: names; default: all available ones, each once: of two classes, some metrics of
            both are those of the positive one.
        positive: class of a diagnostic test, whose metrics are named "positive/...".
        thresholds: on its probability, for a and for b; default: the top-1 class decides.
        ordered: all classes from lowest to highest, for the quadratic kappa.
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: images, classes or groups differ, or an argument is not among its choices.
    """
    check_settings(resamples, confidence)
    groups = common_groups(a, b)
    a, b = replace(a, groups=groups), replace(b, groups=groups)
    one, other = (
        _statistics(p, positive, threshold, ordered, metrics)
        for p, threshold in zip((a, b), thresholds, strict=True)
    )
    values_a, values_b = _values(one, len(a)), _values(other, len(a))
    again = _second_names(len(a.classes), positive, thresholds)
    chosen = [n for n in _metrics(values_a) if n not in again] if metrics is None else list(metrics)
    for name in chosen:
        if name not in _metrics(values_a):
            every = _values(_statistics(a, positive, thresholds[0], ordered, None), len(a))
            known = ", ".join(n for n in _metrics(every) if n != "macro_recall")
            if name.startswith("positive/") and positive is None:
                raise UsageError(f"metric={name}: needs positive, the class that it is of")
            more = "" if positive else "; and positive/sensitivity and the like, given positive"
            raise UsageError(f"metric={name}: choose {known}{more}")
    compared, (unit, n_units) = [], units_of(a)
    areas, needed = None, dict.fromkeys(chosen)
    if any(map(_is_area, chosen)):
        kind = None if positive is None else a.labels == class_index(a, positive)
        areas = ClassAreas(RankStatistics(a), unit, kind)
        needed |= dict.fromkeys(chain.from_iterable(map(areas.needs, chosen)))
    drawn_a, drawn_b = (_samples(each, a, needed, resamples, seed) for each in (one, other))
    for name in chosen:
        counts = len(a), n_units, _units_behind(name, a, unit, positive)
        if name not in drawn_a:
            nothing = np.array([])
            c = _by_bootstrap(name, counts, values_a[name], values_b[name], nothing, confidence)
            compared.append(replace(c, test=_TOO_LONG))
            continue
        with np.errstate(invalid="ignore"):
            differences = drawn_a[name] - drawn_b[name]
        c = _by_bootstrap(name, counts, values_a[name], values_b[name], differences, confidence)
        if name == "top1":
            c = _by_mcnemar(c, a, b, resamples, seed)
        elif name in _OF_RECALLS and c.test != "none":
            shares = _shares(name, a, b, positive, thresholds)
            c = _by_recalls(c, shares, groups is not None, n_units)
        elif areas is not None and _is_area(name) and c.test != "none":
            if name == "positive/roc_auc" and groups is None and positive is not None:
                c = _by_delong(c, a, b, positive)
            c = _by_areas(c, areas, (values_a, values_b), (drawn_a, drawn_b))
        compared.append(c)
    return adjust(compared)


def _second_names(
    classes: int, positive: str | None, thresholds: tuple[float | None, float | None]
) -> set[str]:
    """Names of metrics that have another name too, and would count twice in a correction."""
    names = {"macro_recall"}  # balanced accuracy
    if classes == 2:
        names.add("roc_auc_weighted")
        if positive is not None:
            names |= {"roc_auc_macro", "brier"}
            names |= {"mcc"} if thresholds == (None, None) else set()
    return names


def adjust(comparisons: Iterable[MetricComparison]) -> list[MetricComparison]:
    """The comparisons with p-values adjusted by Holm's correction over all of them."""
    comparisons = list(comparisons)
    adjusted = holm([c.p_value for c in comparisons])
    return [replace(c, adjusted=p) for c, p in zip(comparisons, adjusted, strict=True)]


def _statistics(
    predictions: Predictions,
    positive: str | None,
    threshold: float | None,
    ordered: Sequence[str] | None,
    metrics: Sequence[str] | None,
) -> list[tuple[str, Statistic]]:
    """All statistics, with what their names begin with; areas only if they may be needed."""
    found: list[tuple[str, Statistic]] = [
        ("", ClassificationStatistics(predictions)),
        ("", LabelStatistics(predictions, ordered)),
    ]
    if metrics is None or any(_is_area(m) and "/" not in m for m in metrics):
        found.append(("", RankStatistics(predictions)))
    if positive is not None:
        found.append(("positive/", OneClassStatistics(predictions, positive, threshold)))
    return found


def _values(statistics: Sequence[tuple[str, Statistic]], n: int) -> Values:
    """The values for n images, also of single classes' areas, see `_metrics`."""
    found: Values = {}
    for prefix, statistic in statistics:
        found |= {f"{prefix}{name}": value for name, value in statistic(np.ones(n)).items()}
    return found


def _is_area(name: str) -> bool:
    return name.removeprefix("positive/").startswith(("roc_auc", "average_precision"))


def _metrics(values: Values) -> list[str]:
    """The names of metrics, without the areas of single classes, of which some are means."""
    return [name for name in values if name.startswith("positive/") or "/" not in name]


def _samples(
    statistics: Sequence[tuple[str, Statistic]],
    predictions: Predictions,
    names: Iterable[str],
    resamples: int,
    seed: int,
) -> dict[str, Floats]:
    """(resamples,) values by name, without areas that would take too long."""
    unit, n_units = units_of(predictions)
    found: dict[str, Floats] = {}
    for prefix, statistic in statistics:
        if isinstance(statistic, RankStatistics) and statistic.takes_long(resamples):
            continue
        drawn = resampled(statistic, unit, n_units, resamples, seed)
        found |= {f"{prefix}{name}": values for name, values in drawn.items()}
    return {name: found[name] for name in names if name in found}


def _units_behind(name: str, predictions: Predictions, unit: Ints, positive: str | None) -> int:
    """Number of units with images of the rarer of the two kinds that a metric depends on.

    All units, if the metric depends on all images alike, or is a mean over more than two classes.
    """
    kinds = predictions.labels
    if name.startswith("positive/") and positive is not None:
        kinds = kinds == class_index(predictions, positive)
    elif not name.startswith(_OVER_CLASSES):
        return len(np.unique(unit))
    if len(np.unique(kinds)) != 2:
        return len(np.unique(unit))
    if name in ("positive/sensitivity", "positive/specificity"):
        return len(np.unique(unit[kinds == (name == "positive/sensitivity")]))
    return rarer_units(kinds, unit)


def _by_bootstrap(
    name: str, counts: tuple[int, int, int], a: float, b: float, drawn: Floats, confidence: float
) -> MetricComparison:
    """Compares by (resamples,) differences; counts: images, independent units, `_units_behind`."""
    n, n_units, rarer = counts
    value = a - b if math.isfinite(a) and math.isfinite(b) else NAN
    drawn = drawn[np.isfinite(drawn)]
    if math.isnan(value) or len(drawn) < 2 or rarer < 2:
        nothing = Estimate(value, NAN, NAN)
        return MetricComparison(name, n, a, b, nothing, NAN, NAN, NAN, "none", confidence)
    test, largest = "paired bootstrap", _LARGEST.get(name.rpartition("/")[2], 1.0)
    if drawn.std() < 1e-12:  # up to rounding, samples do not vary, though other images might
        reach = reach_of_none(rarer, confidence) if math.isfinite(largest) else NAN
        interval, p = Estimate(value, value - reach, value + reach), 1.0 if value == 0 else NAN
        detectable = reach
    else:
        interval, p = bootstrap_test(value, drawn, confidence, n_units, rarer)
        error = standard_error(drawn, rarer)
        detectable = detectable_factor(n_units - 1, confidence) * error
        detectable = detectable if detectable <= largest else math.inf
    low, high = max(interval.low, -largest), min(interval.high, largest)
    return MetricComparison(
        name, n, a, b, Estimate(value, low, high), p, p, detectable, test, confidence
    )


def _factor(confidence: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(0.5 + confidence / 2) + normal.inv_cdf(POWER)


def _by_mcnemar(
    c: MetricComparison, a: Predictions, b: Predictions, resamples: int, seed: int
) -> MetricComparison:
    exact = compare(a, b, resamples=resamples, seed=seed, confidence=c.confidence)
    p, d, test = exact.p_value, exact.difference, name_of_test(a.groups is not None)
    return replace(c, difference=d, p_value=p, adjusted=p, test=test)


def _shares(
    name: str,
    a: Predictions,
    b: Predictions,
    positive: str | None,
    thresholds: tuple[float | None, float | None],
) -> list[tuple[Ints, Ints]]:
    """For each share whose mean the metric is, its images' outcomes and units.

    An outcome is 1 if only a is right, -1 if only b is, and 0 if both are or neither is.
    """
    unit = units_of(a)[0]
    if positive is None or not name.startswith("positive/"):
        one, other = (p.probabilities.argmax(axis=1) == p.labels for p in (a, b))
        kinds = [a.labels == c for c in np.unique(a.labels)]
    else:
        both = zip((a, b), thresholds, strict=True)
        tests = [OneClassStatistics(p, positive, threshold) for p, threshold in both]
        one, other = (test.called == test.positive for test in tests)
        kinds = [tests[0].positive == (name == "positive/sensitivity")]
    difference = one.astype(np.int64) - other
    return [(difference[kind], unit[kind]) for kind in kinds]


def _by_recalls(
    c: MetricComparison, shares: Sequence[tuple[Ints, Ints]], grouped: bool, n_units: int
) -> MetricComparison:
    """Replaces the bootstrap's interval and test; shares: of `_shares`."""
    parts = [PairedShare.of(*share, grouped=grouped) for share in shares]

    def interval(confidence: float) -> Estimate:
        if len(parts) == 1:
            return parts[0].at(confidence)
        return mean_of_differences(parts, n_units, confidence)

    estimate = interval(c.confidence)
    if c.metric.startswith("positive/"):
        difference, unit = shares[0]
        p, test = exact_test(difference, unit if grouped else None), name_of_test(grouped)
    else:
        p, test = p_value_of(interval), "paired recalls"
        if sum(len(np.unique(unit)) for _, unit in shares) > n_units:  # groups of several classes
            low, high = min(estimate.low, c.difference.low), max(estimate.high, c.difference.high)
            estimate, p = Estimate(estimate.value, low, high), max(p, c.p_value)
    detectable = max(c.detectable, _detectable(estimate, n_units, c.confidence))
    return replace(
        c, difference=replace(estimate, value=c.difference.value), p_value=p, adjusted=p, test=test,
        detectable=detectable if detectable <= 1 else math.inf,
    )  # fmt: skip


def _by_areas(
    c: MetricComparison,
    areas: ClassAreas,
    values: Sequence[Values],
    drawn: Sequence[Mapping[str, Floats]],
) -> MetricComparison:
    """Widens an interval, and the p-value with it, to what the two areas' own intervals tell.

    That of ROC AUCs is left as it is where enough pairs are wrong for a normal distribution.
    values, drawn: of both networks; all images', and of samples.
    """
    name, part = c.metric, areas.parts.get(c.metric)
    if part is not None and part.kinds is not None:
        wrong = min(min(v, 1 - v) for v in (c.a, c.b)) * min(part.kinds.units)
        if wrong >= _ENOUGH:
            return c
    one, other = (partial(areas.interval, name, v, d) for v, d in zip(values, drawn, strict=True))
    interval = areas_compared((drawn[0][name], drawn[1][name]), (one, other))
    estimate, d = interval(c.confidence), c.difference
    if not estimate.has_interval:
        return c
    p = p_value_of(interval)
    if not p < c.p_value:  # also where the bootstrap has none
        c = replace(c, p_value=p, adjusted=p, test="intervals of both areas")
    detectable = max(c.detectable, _detectable(estimate, areas.units_of(name), c.confidence))
    return replace(
        c, difference=Estimate(d.value, min(d.low, estimate.low), max(d.high, estimate.high)),
        detectable=detectable if detectable <= 1 else math.inf,
    )  # fmt: skip


def _detectable(estimate: Estimate, n_units: int, confidence: float) -> float:
    """The smallest detectable difference by the width of an interval."""
    error = (estimate.high - estimate.low) / 2 / quantile(confidence, n_units - 1)
    return detectable_factor(n_units - 1, confidence) * error


def _by_delong(
    c: MetricComparison, a: Predictions, b: Predictions, positive: str
) -> MetricComparison:
    column = a.classes.index(positive)
    is_positive = a.labels == column
    if min(is_positive.sum(), (~is_positive).sum()) < 2:
        return c
    scores = (a.probabilities[:, column], b.probabilities[:, column])
    _, covariance = delong(is_positive, *scores)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance <= 1e-16:
        return c
    error, normal = math.sqrt(variance), NormalDist()
    p = 2 * normal.cdf(-abs(c.difference.value) / error)
    half = normal.inv_cdf(0.5 + c.confidence / 2) * error
    low, high = max(c.difference.value - half, -1.0), min(c.difference.value + half, 1.0)
    return replace(
        c, difference=Estimate(c.difference.value, low, high), p_value=p, adjusted=p,
        detectable=_factor(c.confidence) * error, test=_DELONG,
    )  # fmt: skip
