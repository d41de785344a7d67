"""What the intervals are made of: resamples of images or groups, and Wilson's interval."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from regard.errors import UsageError
from regard.evaluation.predictions import Floats

NAN = math.nan


@dataclass(frozen=True)
class Estimate:
    """A number and its interval, of 95 % unless another confidence was asked for.

    `low` and `high` are NaN where the images cannot tell (see `evaluate`), and all three where
    there is nothing to measure.
    """

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        return {
            "value": finite_or_none(self.value),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
        }


def finite_or_none(number: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(number) if math.isfinite(number) else None


def check_settings(resamples: int, confidence: float) -> None:
    """Refuses with a ValueError what no interval can be made with."""
    if resamples < 2:
        raise UsageError(f"resamples={resamples}: at least 2, and 1000 for a steady interval")
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence={confidence}: between 0 and 1, as 0.95")


def draws(n_units: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn, (n_units,), when as many are drawn with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = generator.integers(n_units, size=n_units)
        yield np.bincount(drawn, minlength=n_units).astype(np.float64)


def percentile(value: float, drawn: Floats, confidence: float) -> Estimate:
    """The middle part of the resamples' values, NaN among them left out; it holds `value`."""
    drawn = drawn[~np.isnan(drawn)]
    if drawn.size == 0:
        return Estimate(value, NAN, NAN)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value))


def calibration(gaps: Floats, drawn: Floats, confidence: float) -> Estimate:
    """The calibration error Σ |gap| of the bins, and an interval that allows for its bias.

    Noise adds to the error, and in a resample once more, so that percentiles would lie too
    high. The high end is as far above the error as the resamples' upper part reaches above
    their median. The low end is as far below as noise alone can lift it: by the triangle
    inequality the error is off by at most Σ |gap - true gap|, whose quantile the resamples
    give. So the interval reaches 0 for a calibrated network, and is wide for others.

    Args:
        gaps: (bins,) of confidence less accuracy, each times its share of the images.
        drawn: (resamples, bins) the same of the resamples.
        confidence: of the interval.
    """
    value = float(abs(gaps).sum())
    upper = (1 + confidence) / 2
    noise = float(np.quantile(abs(drawn - gaps).sum(axis=1), upper))
    errors = abs(drawn).sum(axis=1)
    above = float(np.quantile(errors, upper) - np.quantile(errors, 0.5))
    return Estimate(value, max(value - noise, 0.0), min(value + above, 1.0))


def wilson(share: float, units: int, confidence: float) -> Estimate:
    """Wilson's interval of a share of `units`."""
    low, high = wilson_interval(round(share * units), units, confidence)
    return Estimate(share, min(low, share), max(high, share))


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, JASA 1927), without continuity correction.

    Args:
        correct: of `total`, counts.
        total: at least 1.
        confidence: between 0 and 1.

    Returns:
        The low and the high end, 0 to 1.

    Raises:
        UsageError: counts or a confidence out of range.
    """
    if not 0 <= correct <= total or total < 1:
        raise UsageError(f"{correct} correct of {total}: 0 to total, and a total of 1 or more")
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence={confidence}: between 0 and 1, as 0.95")
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    share = correct / total
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    # exact at the ends, where rounding would leave 1e-17
    low = 0.0 if correct == 0 else center - half
    high = 1.0 if correct == total else center + half
    return low, high
