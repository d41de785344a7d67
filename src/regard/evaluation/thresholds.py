"""Decision thresholds chosen on validation predictions, and decision curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.cells import number_of
from regard.errors import UsageError
from regard.evaluation.intervals import check_settings, draws, finite_or_none, percentile_band
from regard.evaluation.predictions import Floats, Predictions, rarer_units, units_of
from regard.evaluation.statistics import Curve, Ranking, class_index

_RULES = "sensitivity=0.95, specificity=0.9, youden, cost=5:1 (false negative : false positive)"


@dataclass(frozen=True)
class Threshold:
    """A threshold on the probability of a class, and its results on the validation images.

    positive: the class.
    rule: as given to `choose_threshold`.
    value: an image is called positive if its probability is at least this; infinite if the rule
        is satisfied by calling no image positive.
    sensitivity, specificity: on the validation images.
    images: number of validation images.
    """

    positive: str
    rule: str
    value: float
    sensitivity: float
    specificity: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        return {**vars(self), "value": finite_or_none(self.value)}

    def sentence(self) -> str:
        """ "melanoma from a probability of 0.25 on (youden)"."""
        return f"{self.positive} {from_probability(self.value)} ({self.rule})"


def from_probability(value: float) -> str:
    """ "from a probability of 0.25 on"; no image reaches an infinite threshold."""
    if math.isinf(value):
        return "at no probability (the threshold is infinite)"
    return f"from a probability of {value:.4g} on"


def choose_threshold(validation: Predictions, positive: str, rule: str) -> Threshold:
    """Chooses a threshold for one class on validation predictions.

    Args:
        validation: predictions of images used neither to train nor to test the network.
        positive: the class.
        rule: "sensitivity=S": the highest threshold with at least that sensitivity;
            "specificity=S": the lowest threshold with at least that specificity; "youden": the
            largest sensitivity + specificity; "cost=A:B": the lowest cost if a false negative
            costs A and a false positive B. Of equally good thresholds the highest is used.

    Raises:
        UsageError: no such class or rule, or images of one kind only.
    """
    c = class_index(validation, positive)
    ranking = Ranking(validation.labels == c, validation.probabilities[:, c])
    exact = ranking.curve(np.ones(len(validation)))
    last = ranking.reaching(exact.scores) - 1  # what is equal up to rounding is called alike
    curve = Curve(exact.scores, exact.tp[last], exact.fp[last])
    if curve.tp[-1] == 0 or curve.fp[-1] == 0:
        has = "no image" if curve.tp[-1] == 0 else "only images"
        raise UsageError(f"{has} of {positive!r} for validation: no threshold can be chosen")
    sensitivity = np.append(0.0, curve.tp / curve.tp[-1])  # first: no image is called positive
    specificity = np.append(1.0, 1 - curve.fp / curve.fp[-1])
    best = _best(rule, sensitivity, specificity, curve)
    value = math.inf if best == 0 else float(curve.scores[best - 1])
    return Threshold(
        positive, rule, value, float(sensitivity[best]), float(specificity[best]), len(validation)
    )


def check_rule(rule: str) -> None:
    """Checks a rule without predictions.

    Raises:
        UsageError: there is no such rule.
    """
    ends = np.array([0.0, 1.0])
    _best(rule, ends, 1 - ends, Curve(ends[:1], ends[1:], ends[1:]))


def _best(rule: str, sensitivity: Floats, specificity: Floats, curve: Curve) -> int:
    """The index of the chosen point; points are in descending order of threshold."""
    name, _, argument = rule.partition("=")
    if name in ("sensitivity", "specificity"):
        target = _number(argument)
        if not 0 < target <= 1:
            raise UsageError(f"rule={rule!r}: give a {name} above 0 and at most 1")
        # 1e-12: 0.9 is reached by 9 of 10, whatever the rounding
        if name == "sensitivity":
            return int(np.flatnonzero(sensitivity >= target - 1e-12)[0])
        return int(np.flatnonzero(specificity >= target - 1e-12)[-1])
    if rule == "youden":
        return int(np.argmax(np.round(sensitivity + specificity, 12)))
    if name == "cost":
        fn, fp = (_number(part) for part in argument.partition(":")[::2])
        if fn > 0 and fp > 0:
            costs = fn * (1 - sensitivity) * curve.tp[-1] + fp * (1 - specificity) * curve.fp[-1]
            return int(np.argmin(np.round(costs, 9)))
    raise UsageError(f"rule={rule!r}: choose one like {_RULES}")


def _number(text: str) -> float:
    try:
        number = number_of(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


@dataclass(frozen=True, eq=False)
class DecisionCurve:
    """Net benefit over threshold probabilities (Vickers & Elkin 2006), per image.

    thresholds: (T,) threshold probabilities.
    model, low, high: (T,) net benefit of treating if p is at least the threshold, with its
        interval.
    treat_all: (T,) net benefit of treating every image; that of treating none is 0.
    """

    thresholds: Floats
    model: Floats
    low: Floats
    high: Floats
    treat_all: Floats

    def to_dict(self) -> dict[str, list[float]]:
        """A dict for JSON."""
        return {name: values.tolist() for name, values in vars(self).items()}


def decision_curve(
    predictions: Predictions,
    positive: str,
    *,
    thresholds: Sequence[float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> DecisionCurve:
    """The decision curve of one class: true positives - odds * false positives, per image.

    Args:
        predictions: of test images.
        positive: the class.
        thresholds: between 0 and 1; default: 0.01 to 0.99.
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: no such class, or an argument out of range.
    """
    check_settings(resamples, confidence)
    at = np.arange(1, 100) / 100 if thresholds is None else np.asarray(thresholds, np.float64)
    if at.ndim != 1 or not len(at) or not ((at > 0) & (at < 1)).all():
        raise UsageError("thresholds: numbers between 0 and 1 are needed")
    c = class_index(predictions, positive)
    ranking = Ranking(predictions.labels == c, predictions.probabilities[:, c])
    odds = at / (1 - at)
    last = ranking.reaching(at)  # number of scores

    def net_benefit(weights: Floats) -> Floats:
        curve = ranking.curve(weights)
        tp, fp = np.append(0.0, curve.tp), np.append(0.0, curve.fp)
        return (tp[last] - odds * fp[last]) / weights.sum()

    unit, n_units = units_of(predictions)
    model = net_benefit(np.ones(len(predictions)))
    drawn = np.stack([net_benefit(t[unit]) for t in draws(n_units, resamples, seed)])
    low, high = percentile_band(drawn, confidence, rarer_units(predictions.labels == c, unit))
    share = float((predictions.labels == c).mean())
    treat_all = share - odds * (1 - share)
    return DecisionCurve(at, model, np.minimum(low, model), np.maximum(high, model), treat_all)
