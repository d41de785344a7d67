"""Intervals of areas under curves, such as the ROC AUC, and of the differences of two networks'."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regard.evaluation.intervals import (
    Estimate,
    percentile,
    quantile,
    wilson,
    wilson_of_variance,
)
from regard.evaluation.predictions import Floats, Ints


@dataclass(frozen=True)
class Kinds:
    """How many images a ROC curve tells apart: positive, and negative.

    images: of either kind.
    units: groups with images of either kind; the images, if they are independent.
    """

    images: tuple[int, int]
    units: tuple[int, int]

    @classmethod
    def of(cls, positive: NDArray[np.bool_], unit: Ints) -> "Kinds":
        """positive: (N,) whether each image is; unit: (N,) its group, or its own number."""
        both = positive, ~positive
        images, units = zip(
            *((int(kind.sum()), len(np.unique(unit[kind]))) for kind in both), strict=True
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

    def end(edge: float) -> float:
        """Between the estimate and 0 or 1; not the estimate, where 0 or 1 solves it too."""
        near = area + (edge - area) * 1e-9

        def beyond(true: float) -> float:
            return (area - true) ** 2 - q * q * _variance(true, m, n)

        return float(brentq(beyond, near, edge)) if beyond(near) < 0 < beyond(edge) else edge

    return end(0.0), end(1.0)


def area(
    value: float,
    drawn: Floats,
    confidence: float,
    n_units: int,
    kinds: Kinds | None = None,
) -> Estimate:
    """An area between 0 and 1 with Wilson's interval for the variance of bootstrap samples.

    Percentiles are too narrow for few images of a kind, and near 1.

    Args:
        value: the area.
        drawn: (resamples,) areas of the samples; NaN ones are left out.
        confidence: between 0 and 1.
        n_units: independent units of the rarer kind of images, at least 2.
        kinds: of a ROC AUC: its interval is at least as wide as `newcombe`'s, as few images near
            1 hardly vary in samples.
    """
    drawn = drawn[~np.isnan(drawn)]
    variance = float(drawn.var(ddof=1)) * n_units / (n_units - 1) if drawn.size > 1 else 0.0
    if drawn.size < 2 or not 0 < value < 1:
        estimate = percentile(value, drawn, confidence, n_units)
    else:
        estimate = wilson_of_variance(value, variance, n_units, confidence)
    if kinds is None or not estimate.has_interval:
        return estimate
    low, high = newcombe(value, *kinds.effective(value, variance), confidence)
    return Estimate(value, min(estimate.low, low), max(estimate.high, high))


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


def areas_compared(
    drawn: tuple[Floats, Floats],
    values: tuple[float, float],
    n_units: int,
    kinds: Kinds | None,
) -> Callable[[float], Estimate]:
    """The interval of the difference of two networks' areas, by confidence.

    Args:
        drawn: (resamples,) areas of the same samples, for each network.
        values: the areas.
        n_units: independent units of the rarer kind of images, at least 2.
        kinds: of a ROC AUC.
    """
    finite = np.isfinite(drawn).all(axis=0)
    both = [each[finite] for each in drawn]
    vary = all(each.std() > 1e-12 for each in both)
    a, b = (each - each.mean() for each in both)
    correlation = float(a @ b / math.sqrt((a @ a) * (b @ b))) if vary else 0.0

    def single(value: float, samples: Floats, confidence: float) -> Estimate:
        estimate = area(value, samples, confidence, n_units, kinds)
        end = round(value, 12)
        if end not in (0.0, 1.0):
            return estimate
        alike = wilson(end, n_units, confidence)  # samples do not vary
        return Estimate(value, min(estimate.low, alike.low), max(estimate.high, alike.high))

    def interval(confidence: float) -> Estimate:
        one, other = (single(v, d, confidence) for v, d in zip(values, both, strict=True))
        return difference_of_areas(one, other, correlation)

    return interval
