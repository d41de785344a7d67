"""Intervals of areas under curves, such as the ROC AUC, and of the differences of two networks'."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regard.evaluation.intervals import (
    NAN,
    Estimate,
    mean_of_shares,
    quantile,
    wilson,
    wilson_of_variance,
)
from regard.evaluation.predictions import Floats, Ints
from regard.evaluation.statistics import OF_PAIRS, RankStatistics

Interval = Callable[[float], Estimate]
"""An interval by confidence, between 0 and 1."""


@dataclass(frozen=True)
class Kinds:
    """How many images a ROC curve tells apart: positive, and negative.

    images: of either kind; weighted ones count as fewer.
    units: groups with images of either kind; the images, if they are independent.
    """

    images: tuple[float, float]
    units: tuple[float, float]

    @classmethod
    def of(cls, positive: NDArray[np.bool_], unit: Ints) -> "Kinds":
        """positive: (N,) whether each image is; unit: (N,) its group, or its own number."""
        both = positive, ~positive
        images, units = zip(
            *((int(kind.sum()), _units_with(kind, unit)) for kind in both), strict=True
        )
        return cls(images, units)

    def effective(self, area: float, variance: float) -> tuple[float, float]:
        """Numbers of independent images with this variance of the area.

        At least the units, and at most 1 + k images for each unit, where k is how many images of
        the rarer kind the wrong pairs amount to: from few wrong pairs it can't be seen how alike
        the images of a group are.
        """
        if self.units == self.images:
            return self.images
        wrong = min(self.images) * min(area, 1 - area)
        most = _variance(area, *self.units) / variance if variance > 0 else 1.0
        times = max(min(most, 1 + wrong), 1.0)
        m, n = (min(i, u * times) for i, u in zip(self.images, self.units, strict=True))
        return m, n


def _units_with(kind: NDArray[np.bool_], unit: Ints) -> int:
    return int(np.count_nonzero(np.bincount(unit[kind])))


def _variance(area: float, m: float, n: float) -> float:
    """Of an estimate of a ROC AUC from m and n images (Newcombe's method 5)."""
    mean, rest = (m + n) / 2 - 1, 1 - area
    return area * rest * (1 + mean * (rest / (2 - area) + area / (1 + area))) / (m * n)


def newcombe(area: float, m: float, n: float, confidence: float) -> tuple[float, float]:
    """The ends of the score interval of a ROC AUC.

    Newcombe's method 5 (Statistics in Medicine 2006): the areas from which the estimate is at most
    as many standard errors away as the normal's quantile, given their own variance. It does not
    take an area near 1 for certain.

    Args:
        area: the estimate.
        m, n: numbers of images of the two kinds, above 0.
        confidence: between 0 and 1.
    """
    from scipy.optimize import brentq

    q = quantile(confidence)

    def beyond(true: float) -> float:
        return (area - true) ** 2 - q * q * _variance(true, m, n)

    def end(edge: float) -> float:
        """Between the estimate and 0 or 1; not the estimate, where 0 or 1 solves it too."""
        near = area + (edge - area) * 1e-9
        if beyond(near) >= 0:  # the end is nearer, at a confidence of almost 0, or at the edge
            return near
        return float(brentq(beyond, near, edge))

    return end(0.0), end(1.0)


def area(
    value: float,
    drawn: Floats,
    confidence: float,
    n_units: int,
    kinds: Kinds | None = None,
) -> Estimate:
    """An area between 0 and 1 with Wilson's interval for the variance of bootstrap samples.

    Percentiles are too narrow for few images of a kind, and near 1. An area of 0 or 1, of which
    samples do not vary, has Wilson's interval for the share of images that are not told apart, of
    which none of as many as there are units was seen; a ROC AUC half of it, as such an image, whose
    place among the others is random, is on the wrong side of half of them.

    Args:
        value: the area.
        drawn: (resamples,) areas of the samples; NaN ones are left out.
        confidence: between 0 and 1.
        n_units: independent units of the rarer kind of images; one has no interval.
        kinds: of a ROC AUC: its interval is at least as wide as `newcombe`'s, as few images near
            1 hardly vary in samples.
    """
    variance, end = _variance_of(drawn, n_units), round(value, 12)
    if math.isnan(variance) or math.isnan(value):
        return Estimate(value, NAN, NAN)
    if end in (0.0, 1.0):
        value, estimate = end, wilson(end, n_units, confidence)
        if kinds is not None:
            reach = (estimate.high - estimate.low) / 2
            estimate = Estimate(value, max(value - reach, 0.0), min(value + reach, 1.0))
    else:
        estimate = wilson_of_variance(value, variance, n_units, confidence)
        if variance < 1e-20:  # of equal scores
            return estimate
    if kinds is None:
        return estimate
    low, high = newcombe(value, *kinds.effective(value, variance), confidence)
    return Estimate(value, min(estimate.low, low), max(estimate.high, high))


def _variance_of(drawn: Floats, n_units: int) -> float:
    """The variance that samples of so many units tell of; NaN for a single unit, or sample."""
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size < 2 or n_units < 2:
        return NAN
    return float(drawn.var(ddof=1)) * n_units / (n_units - 1)


@dataclass(frozen=True)
class _Part:
    """What an area tells apart: n_units and kinds are those of `area`."""

    n_units: int
    kinds: Kinds | None


class ClassAreas:
    """The intervals of the values of `RankStatistics`: of classes' areas, and of their means.

    A class's area has the interval of `area`, and so have both classes' means of ROC AUCs if there
    are two, which have the same. Other means have that of
    `regard.evaluation.intervals.mean_of_shares`, from the classes' intervals and the variance of
    the mean in samples: as areas of one test depend on each other, it is not the sum of theirs.
    """

    def __init__(
        self, statistic: RankStatistics, unit: Ints, positive: NDArray[np.bool_] | None = None
    ) -> None:
        """Prepares the intervals.

        Args:
            statistic: of the images.
            unit: (N,) the group of each image, or its own number.
            positive: (N,) the images of one class, for "positive/roc_auc" and
                "positive/average_precision".
        """
        labels, classes = statistic.true, statistic.present
        self.n_units: int = len(np.unique(unit))
        self.means: dict[str, tuple[list[str], Floats]] = {
            name: ([f"{kind}/{statistic.names[c]}" for c in classes], weights)
            for name, (kind, weights) in statistic.means().items()
        }
        self.parts: dict[str, _Part] = {}
        of_class = {f"/{statistic.names[c]}": labels == c for c in classes}
        one = {} if positive is None else {"": positive}
        for name, images in (of_class | one).items():
            kinds, prefix = Kinds.of(images, unit), "" if name else "positive/"
            self.parts[f"{prefix}roc_auc{name}"] = _Part(int(min(kinds.units)), kinds)
            self.parts[f"{prefix}average_precision{name}"] = _Part(int(min(kinds.units)), None)
        if len(classes) == 2:
            same = self.parts[f"roc_auc/{statistic.names[classes[0]]}"]
            for name in ("roc_auc_macro", "roc_auc_weighted"):
                self.parts[name] = same
        if statistic.pairs:
            self.parts |= self._of_pairs(statistic, unit)

    def _of_pairs(self, statistic: RankStatistics, unit: Ints) -> dict[str, _Part]:
        """A class against each other one: the others, weighted equally, count as fewer images."""
        counts = np.array(
            [
                (int((of_c := statistic.true == c).sum()), _units_with(of_c, unit))
                for c in statistic.present
            ]
        )
        parts = {}
        for i, c in enumerate(statistic.present):
            others = np.delete(counts, i, axis=0)
            rest = len(others) ** 2 / (1 / others).sum(axis=0)
            images, units = zip(counts[i].tolist(), rest.tolist(), strict=True)
            fewer = max(int(min(units)), 1)
            parts[f"{OF_PAIRS}/{statistic.names[c]}"] = _Part(fewer, Kinds(images, units))
        return parts

    def needs(self, name: str) -> list[str]:
        """The values of classes that the interval of a value is made of."""
        return self.means[name][0] if name in self.means and name not in self.parts else []

    def units_of(self, name: str) -> int:
        """Independent units that decide a value: those of the rarer kind of images, or all."""
        return self.parts[name].n_units if name in self.parts else self.n_units

    def interval(
        self, name: str, values: Mapping[str, float], drawn: Mapping[str, Floats], confidence: float
    ) -> Estimate:
        """The interval of one value.

        Args:
            name: of the value.
            values: of all images; those of the classes are needed for a mean.
            drawn: (resamples,) of each.
            confidence: between 0 and 1.
        """
        if name in self.parts:
            part = self.parts[name]
            return area(values[name], drawn[name], confidence, part.n_units, part.kinds)
        names, weights = self.means[name]
        variance = _variance_of(drawn[name], self.n_units)
        if math.isnan(variance):
            return Estimate(values[name], NAN, NAN)
        parts = [
            (
                self.interval(each, values, drawn, confidence),
                _variance_of(drawn[each], self.parts[each].n_units),
            )
            for each in names
        ]
        found = mean_of_shares(
            parts, self.n_units, confidence, weights=weights, variance_of_mean=variance
        )
        value = values[name]  # not rounded otherwise
        return Estimate(value, min(found.low, value), max(found.high, value))


def difference_of_areas(a: Estimate, b: Estimate, correlation: float) -> Estimate:
    """The difference of two areas of the same images, from their intervals.

    By the recovery of variances (Zou & Donner, Statistics in Medicine 2008, with correlation).

    Args:
        a, b: with intervals.
        correlation: of the two estimates, -1 to 1.
    """

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0))

    value = a.value - b.value
    low = value - reach(a.value - a.low, b.high - b.value)
    high = value + reach(a.high - a.value, b.value - b.low)
    return Estimate(value, max(low, -1.0), min(high, 1.0))


def areas_compared(drawn: tuple[Floats, Floats], intervals: tuple[Interval, Interval]) -> Interval:
    """The interval of the difference of two networks' areas, by confidence.

    Args:
        drawn: (resamples,) areas of the same samples, for each network.
        intervals: of the areas, by confidence.
    """
    finite = np.isfinite(drawn).all(axis=0)
    both = [each[finite] for each in drawn]
    vary = all(each.std() > 1e-12 for each in both)
    a, b = (each - each.mean() for each in both)
    correlation = float(a @ b / math.sqrt((a @ a) * (b @ b))) if vary else 0.0

    def interval(confidence: float) -> Estimate:
        one, other = (each(confidence) for each in intervals)
        return difference_of_areas(one, other, correlation)

    return interval
