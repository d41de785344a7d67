"""Confidence intervals: the bootstrap over images or groups, and Wilson's score interval."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError
from regard.evaluation.predictions import Floats, units

NAN = math.nan


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval (95 % unless another confidence was requested).

    `low` and `high` are NaN if there is no interval (one image or group; see `evaluate`), and
    all three are NaN if there is nothing to measure.
    """

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    def to_dict(self) -> dict[str, float | None]:
        """A dict for JSON, with None for numbers that are not finite."""
        return {
            "value": finite_or_none(self.value),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
        }


def finite_or_none(number: float) -> float | None:
    """The number, or None if JSON can't hold it: NaN or infinity."""
    return float(number) if math.isfinite(number) else None


def check_settings(resamples: int, confidence: float) -> None:
    """Checks the arguments common to all intervals.

    Raises:
        UsageError: resamples or confidence out of range.
    """
    if resamples < 2:
        raise UsageError(f"resamples={resamples}: give at least 2; 1000 gives a stable interval")
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence={confidence}: give a value between 0 and 1, such as 0.95")


def draws(n_units: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Bootstrap samples as counts, (n_units,): how often each unit was drawn, with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = generator.integers(n_units, size=n_units)
        yield np.bincount(drawn, minlength=n_units).astype(np.float64)


def percentile(
    value: float,
    drawn: NDArray[Any],
    confidence: float,
    n_units: int | None = None,
    rarer: int | None = None,
) -> Estimate:
    """The percentile bootstrap interval, widened to contain `value`; NaN samples are left out.

    With the number of independent units it is the expanded percentile interval (Hesterberg, The
    American Statistician 2015), which corrects for what resampling few units misses: as wide as
    Student's t interval if the samples are normal. `rarer`: see `unbounded`.
    """
    drawn = drawn[~np.isnan(drawn)]
    if drawn.size == 0 or math.isnan(value):
        return Estimate(value, NAN, NAN)
    upper = (1 + confidence) / 2 if n_units is None else _expanded(confidence, n_units, rarer)
    method: Any = "linear" if np.isfinite(drawn).all() else "nearest"  # no inf - inf
    low, high = np.quantile(drawn, [1 - upper, upper], method=method)
    return Estimate(value, min(float(low), value), max(float(high), value))


def bootstrapped_mean(
    values: Floats, groups: Sequence[str] | None = None, seed: int = 0, resamples: int = 1000
) -> Estimate:
    """A mean over images with its 95 % interval: expanded percentiles of a bootstrap.

    Args:
        values: (N,), one per image.
        groups: of the images, resampled as a whole; default: images are independent.

    Returns:
        The mean; its ends are NaN for a single image or group.
    """
    unit, n_units = units(groups, len(values))
    mean = float(values.mean())
    if n_units < 2:
        return Estimate(mean, NAN, NAN)
    drawn = [w[unit] @ values / w[unit].sum() for w in draws(n_units, resamples, seed)]
    return percentile(mean, np.array(drawn), 0.95, n_units)


def percentile_band(drawn: Floats, confidence: float, n_units: int) -> tuple[Floats, Floats]:
    """Pointwise expanded percentiles of (resamples, K) curves; plain ones for a single unit."""
    upper = (1 + confidence) / 2 if n_units < 2 else _expanded(confidence, n_units)
    low, high = np.quantile(drawn, [1 - upper, upper], axis=0)
    return low, high


def quantile(confidence: float, df: float = math.inf) -> float:
    """The quantile of Student's t, or with infinite `df` the normal's, for two sides."""
    from scipy.stats import t

    upper = (1 + confidence) / 2
    return NormalDist().inv_cdf(upper) if math.isinf(df) else float(t.ppf(upper, df))


def unbounded(
    value: float, drawn: Floats, confidence: float, n_units: int, rarer: int | None = None
) -> Estimate:
    """The interval of an unbounded number, such as a difference, a loss or a slope.

    At each end the wider of the expanded percentile interval, which follows skewed samples, and
    Student's t interval with their standard error: percentiles alone are too narrow for few units
    and miss the true value if the samples are not centered on the estimate.

    Args:
        value: the estimate.
        drawn: (resamples,) samples; those that are not finite are left out.
        confidence: between 0 and 1.
        n_units: number of independent units, at least 2.
        rarer: number of units of the rarer of two kinds, at least 2, if the number depends on
            them: a bootstrap misses more of its variance; default: n_units.
    """
    from scipy.stats import t

    drawn = drawn[np.isfinite(drawn)]
    if drawn.size < 2:
        return Estimate(value, NAN, NAN)
    interval = percentile(value, drawn, confidence, n_units, rarer)
    half = float(t.ppf((1 + confidence) / 2, n_units - 1)) * standard_error(drawn, rarer or n_units)
    return Estimate(value, min(interval.low, value - half), max(interval.high, value + half))


def mean_of_losses(
    value: float, drawn: Floats, confidence: float, n_units: int, largest: float = math.inf
) -> Estimate:
    """The interval of a mean of losses, which are not negative, and of which a few may be large.

    At each end the wider of the `unbounded` interval and, above, of Student's t for the logarithm
    of the mean: where few images have most of the loss, the mean is skewed, and so low that few of
    these were drawn just when its standard error is small. Below, it begins at 0.

    Args:
        value: the mean.
        drawn: (resamples,) means of the samples.
        confidence: between 0 and 1.
        n_units: number of independent units, at least 2.
        largest: possible loss.
    """
    interval = unbounded(value, drawn, confidence, n_units)
    if not (interval.has_interval and value > 0):
        return interval
    error = standard_error(drawn[np.isfinite(drawn)], n_units)
    times = math.exp(min(quantile(confidence, n_units - 1) * error / value, 50.0))
    high = max(interval.high, value * times)
    return Estimate(value, max(interval.low, 0.0), max(min(high, largest), value))


def bootstrap_test(
    value: float, drawn: Floats, confidence: float, n_units: int, rarer: int | None = None
) -> tuple[Estimate, float]:
    """The `unbounded` interval of a difference, and the two-sided p-value at which it touches 0.

    So p is the larger of the percentiles' and Student's t's, and at most 1 - confidence if
    the interval lies on one side of 0. The arguments are those of `unbounded`; the samples must
    vary.
    """
    from scipy.stats import norm, t

    interval = unbounded(value, drawn, confidence, n_units, rarer)
    rarer = rarer or n_units
    share = _share_below(np.sort(drawn if value > 0 else -drawn))
    sizes = abs(value) / standard_error(drawn, rarer), -norm.ppf(min(share, 0.5)) / _scale(rarer)
    return interval, 2 * float(t.sf(min(sizes), n_units - 1))


def _share_below(ordered: Floats) -> float:
    """The level at which the quantile of ascending samples is 0, with NumPy's interpolation."""
    last, below = len(ordered) - 1, int((ordered <= 0).sum())
    if below in (0, last + 1):
        return float(below > 0)
    before, after = ordered[below - 1], ordered[below]
    return float((below - 1 - before / (after - before)) / last)


def _scale(n_units: int) -> float:
    """The factor by which a bootstrap's standard error is too small."""
    return math.sqrt(n_units / (n_units - 1))


def standard_error(drawn: Floats, n_units: int) -> float:
    """The standard error estimated from (resamples,) samples of so many units."""
    return float(drawn.std(ddof=1)) * _scale(n_units)


@lru_cache
def _expanded(confidence: float, n_units: int, rarer: int | None = None) -> float:
    """The upper quantile of the expanded percentile interval."""
    from scipy.stats import norm, t

    scale = _scale(n_units if rarer is None else rarer)
    return float(norm.cdf(t.ppf((1 + confidence) / 2, n_units - 1) * scale))


def calibration_interval(gaps: Floats, drawn: Floats, confidence: float) -> Estimate:
    """The calibration error, the sum of |gap| over the bins, with a bias-corrected interval.

    Sampling noise adds to the error, and a resample adds it a second time, so plain percentiles
    are too high. The upper end is the error plus the distance from the resamples' median to their
    upper quantile. The lower end is the error minus the largest amount that noise can explain: by
    the triangle inequality the error is off by at most the sum of |gap - true gap|, whose
    quantile the resamples estimate. The interval therefore reaches 0 for a calibrated network.

    Args:
        gaps: (bins,) confidence minus accuracy, times the bin's share of the images.
        drawn: (resamples, bins) the same, for each resample.
        confidence: between 0 and 1.
    """
    value = float(abs(gaps).sum())
    upper = (1 + confidence) / 2
    noise = float(np.quantile(abs(drawn - gaps).sum(axis=1), upper))
    errors = abs(drawn).sum(axis=1)
    above = float(np.quantile(errors, upper) - np.quantile(errors, 0.5))
    return Estimate(value, max(value - noise, 0.0), min(value + above, 1.0))


def wilson(share: float, units: int, confidence: float) -> Estimate:
    """A share of `units`, whole or not, with Wilson's interval; none for a single unit."""
    if units < 2:
        return Estimate(share, NAN, NAN)
    count = share * units
    if abs(count - round(count)) > 1e-6:  # of several seeds, some are right in part
        from scipy.stats import norm

        z = float(norm.ppf((1 + confidence) / 2)) ** 2 / units
        center = (share + z / 2) / (1 + z)
        half = math.sqrt(z * share * (1 - share) + z * z / 4) / (1 + z)
        return Estimate(share, center - half, center + half)
    low, high = wilson_interval(round(count), units, confidence)
    return Estimate(share, min(low, share), max(high, share))


def share_of_groups(right: NDArray[Any], unit: NDArray[Any], confidence: float) -> Estimate:
    """A share of images that come in groups, with Wilson's interval for the effective sample size.

    That is the number of independent images with the same variance as between the groups, at most
    the number of images, with Student's t and as many degrees of freedom as groups less one (after
    Korn & Graubard, Survey Methodology 1998, and Dean & Pagano, Survey Methodology 2015). If all or
    none are right, the variance is unknown, and each group counts as one image; if only k images
    differ from the rest, at least n / groups / (k + 1) images count as one. One group has no
    interval.

    Args:
        right: (N,) whether each image is right, for at least one image.
        unit: (N,) the group of each image.
        confidence: between 0 and 1.
    """
    _, unit = np.unique(unit, return_inverse=True)
    whole = np.bincount(unit)
    n_groups, n = len(whole), len(unit)
    share = float(right.mean())
    if n_groups < 2 or share in (0.0, 1.0):
        return wilson(share, n_groups, confidence)
    between = float(np.square(np.bincount(unit, right - share)).sum()) * n_groups / (n_groups - 1)
    unlike = min(right.sum(), n - right.sum())
    fewest = max(1.0, n / n_groups / (unlike + 1))  # images that count as one
    variance = max(between / n**2, share * (1 - share) / n * fewest)
    return wilson_of_variance(share, variance, n_groups, confidence)


def wilson_of_variance(value: float, variance: float, n_units: int, confidence: float) -> Estimate:
    """Wilson's interval for as many images as would have this variance, with Student's t.

    Args:
        value: a share or an area, above 0 and below 1.
        variance: the variance of its estimate.
        n_units: independent units, at least 2.
        confidence: between 0 and 1.
    """
    from scipy.stats import t

    q = float(t.ppf((1 + confidence) / 2, n_units - 1))
    z = q * q * variance / (value * (1 - value))
    center = (value + z / 2) / (1 + z)
    half = math.sqrt(z * value * (1 - value) + z * z / 4) / (1 + z)
    return Estimate(value, max(min(center - half, value), 0.0), min(max(center + half, value), 1.0))


def mean_of_shares(
    parts: Sequence[tuple[Estimate, float]],
    n_units: int,
    confidence: float,
    *,
    weights: Floats | None = None,
    variance_of_mean: float | None = None,
) -> Estimate:
    """The mean of shares of different images, as of the recalls of several classes.

    Its variance is the sum of theirs, which is known well for many classes, but not where a class
    of few images decides: if all of these are right, they do not vary at all, though the share may
    be far from 1. The distance from a share to the end of its own interval tells how large its
    variance may be there; as the shares are independent, so are the estimates of their variances,
    and what these may lack adds up as the root of the sum of squares (the recovery of variances
    from limits of Zou & Donner, Statistics in Medicine 2008, applied to the variances). For two
    shares of which one decides, this is their method; for many it approaches the normal interval.

    Args:
        parts: for each share its estimate with interval, and its variance; NaN for a single unit,
            which tells neither: it has the mean variance of the others.
        n_units: of all shares, at least 2.
        confidence: of the intervals, between 0 and 1.
        weights: (K,) of the shares, not negative; default: equal.
        variance_of_mean: where shares depend on each other; default: of independent shares.
    """
    from scipy.stats import t

    value = np.array([share.value for share, _ in parts])
    low = np.nan_to_num([share.low for share, _ in parts], nan=0.0)
    high = np.nan_to_num([share.high for share, _ in parts], nan=1.0)
    variance = np.array([known for _, known in parts])
    weight = np.ones(len(parts)) if weights is None else np.asarray(weights, dtype=np.float64)
    weight = weight / weight.sum()
    mean = float(np.clip(weight @ value, value.min(), value.max()))  # not 1 + 2e-16
    unknown = np.isnan(variance)
    others = variance[~unknown].mean() if not unknown.all() else mean * (1 - mean)
    variance = np.where(unknown, others, variance)
    total = float(weight**2 @ variance) if variance_of_mean is None else variance_of_mean
    square = float(t.ppf((1 + confidence) / 2, n_units - 1)) ** 2

    def reach(distance: Floats) -> float:
        lacking = weight**2 * np.maximum(distance**2 - square * variance, 0.0)
        return math.sqrt(square * total + math.sqrt(np.square(lacking).sum()))

    known = low == high  # as the precision of a class that was never predicted
    least, most = (float(weight @ np.where(known, value, end)) for end in (0.0, 1.0))
    down, up = mean - reach(value - low), mean + reach(high - value)
    return Estimate(mean, min(max(down, least), mean), max(min(up, most), mean))


def reach_of_none(units: float, confidence: float) -> float:
    """Upper end of Wilson's interval for a share of 0: how far it reaches if no unit had any.

    Used as half-width of an interval where no unit differs from another, though further units
    might. NaN for fewer than two units.
    """
    return wilson(0.0, max(round(units), 1), confidence).high


@lru_cache(maxsize=2**12)
def detectable_factor(df: float, confidence: float, power: float = 0.8) -> float:
    """The effect that a t-test detects with this power, in estimated standard errors.

    From the noncentral t distribution; an estimated standard error is too small on average, by
    the factor c4 for `df` degrees of freedom.
    """
    from scipy.optimize import brentq
    from scipy.special import gammaln
    from scipy.stats import nct, t

    df = min(df, 1e4)
    critical = float(t.ppf((1 + confidence) / 2, df))
    found = brentq(lambda nc: nct.sf(critical, df, nc) - power, 0.0, 40.0 * critical)
    c4 = math.sqrt(2 / df) * math.exp(gammaln((df + 1) / 2) - gammaln(df / 2))
    return float(found / c4)


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson, JASA 1927), without continuity correction.

    Args:
        correct: count, 0 to `total`.
        total: count, at least 1.
        confidence: between 0 and 1.

    Returns:
        The lower and the upper end, 0 to 1.

    Raises:
        UsageError: counts or confidence out of range.
    """
    if not 0 <= correct <= total or total < 1:
        raise UsageError(
            f"{correct} correct of {total}: give 0 to total, and a total of at least 1"
        )
    check_settings(2, confidence)
    return _scipy_wilson(int(correct), int(total), float(confidence))


@lru_cache(maxsize=2**16)
def _scipy_wilson(correct: int, total: int, confidence: float) -> tuple[float, float]:
    from scipy.stats import binomtest  # takes half a second to import

    # the interval does not depend on the tested share, and at the observed one scipy has no
    # p-value to search for: 40 instead of 500 microseconds
    interval = binomtest(correct, total, correct / total).proportion_ci(confidence, "wilson")
    return float(interval.low), float(interval.high)
