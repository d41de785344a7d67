"""Differences of shares of the same images, such as two networks' recalls, and their intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.evaluation.intervals import NAN, Estimate, mean_of_shares, quantile


@dataclass(frozen=True)
class PairedShare:
    """The difference of two shares of the same images, such as the recalls of two networks.

    value, variance: of the difference; the variance is NaN for a single image or group.
    only_a, only_b: shares of the images that only one of the two has.
    size: number of images, or that of independent images with the same variance.
    df: degrees of freedom of that variance; infinite for images without groups.
    """

    value: float
    variance: float
    only_a: float
    only_b: float
    size: float
    df: float

    @classmethod
    def of(cls, difference: NDArray[Any], unit: NDArray[Any], *, grouped: bool) -> "PairedShare":
        """The difference of one or more images.

        Args:
            difference: (N,) -1, 0 or 1: a's outcome minus b's; the mean of several trainings may
                be in between.
            unit: (N,) the group of each image.
            grouped: whether units are groups; their effective size is that of
                `share_of_groups`.
        """
        n, value = len(difference), float(difference.mean())
        only_a = float(np.maximum(difference, 0).mean())
        only_b = float(np.maximum(-difference, 0).mean())
        variance = max(float(np.square(difference).mean()) - value**2, 0.0) / n
        if not grouped:
            variance = variance * n / (n - 1) if n > 1 else NAN
            return cls(value, variance, only_a, only_b, n, math.inf)
        whole = np.unique(unit, return_inverse=True)[1]
        k = int(whole.max()) + 1
        if k < 2:
            return cls(value, NAN, only_a, only_b, 1, 0)
        between = float(np.square(np.bincount(whole, difference - value)).sum()) * k / (k - 1)
        unlike = (difference != np.median(difference)).sum()
        alike = n / k if variance == 0 else max(between / n**2 / variance, n / k / (unlike + 1), 1)
        return cls(value, variance * alike, only_a, only_b, n / alike, k - 1)

    def at(self, confidence: float) -> Estimate:
        """The difference with its interval; NaN for a single image or group.

        Of Bonett & Price (Journal of Educational and Behavioral Statistics 2012): Wald's with one
        more image that only a has and one that only b has; in groups with Student's t.
        """
        if math.isnan(self.variance):
            return Estimate(self.value, NAN, NAN)
        n = self.size + 2
        a, b = ((self.size * share + 1) / n for share in (self.only_a, self.only_b))
        half = quantile(confidence, self.df) * math.sqrt((a + b - (a - b) ** 2) / n)
        low, high = max(a - b - half, -1.0), min(a - b + half, 1.0)
        return Estimate(self.value, min(low, self.value), max(high, self.value))


def mean_of_differences(parts: Sequence[PairedShare], n_units: int, confidence: float) -> Estimate:
    """The mean of independent paired differences, as of two networks' recalls of several classes.

    By `mean_of_shares`: the difference of a class of few images that both networks classify alike
    does not vary in samples, though it may be far from 0.
    """
    halved = []  # (1 + difference) / 2 is between 0 and 1
    for part in parts:
        e = part.at(confidence)
        ends = ((1 + end) / 2 for end in (e.value, e.low, e.high))
        halved.append((Estimate(*ends), part.variance / 4))
    mean = mean_of_shares(halved, n_units, confidence)
    return Estimate(*(2 * end - 1 for end in (mean.value, mean.low, mean.high)))


def p_value_of(interval: Callable[[float], Estimate]) -> float:
    """The two-sided p-value at which an interval touches 0.

    interval: by confidence; wider for a higher one.
    """
    from scipy.optimize import brentq

    value = interval(0.5).value
    if value == 0:
        return 1.0

    def end(log_p: float) -> float:
        e = interval(1 - math.exp(log_p))
        return e.low if value > 0 else -e.high

    least, most = math.log(1e-12), math.log(1 - 1e-9)
    if end(least) > 0:
        return math.exp(least)
    return math.exp(float(brentq(end, least, most))) if end(most) > 0 else 1.0
