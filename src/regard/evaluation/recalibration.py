"""Calibration: its slope and intercept, reliability diagrams, and temperature scaling."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError
from regard.evaluation.intervals import NAN, Estimate, share_of_groups, wilson_interval
from regard.evaluation.predictions import (
    BINS,
    Floats,
    Ints,
    Predictions,
    bin_of,
    rarer_units,
    units_of,
)
from regard.evaluation.statistics import class_index

_STEPS, _TOLERANCE = 50, 1e-7  # for Newton's method


def calibration_line(
    predictions: Predictions, positive: str, confidence: float = 0.95
) -> dict[str, Estimate]:
    """Calibration slope and intercept of a class's probability (Cox 1958; Steyerberg 2019).

    calibration_slope: b in the logistic regression of the class on a + b logit(p); 1 is ideal,
        below 1 is overconfident.
    calibration_intercept: a with b fixed to 1 (calibration in the large); 0 is ideal, below 0
        means that probabilities are too high.
    Both are NaN if the class is separated perfectly or has none or all of the images; the slope
    also if all probabilities are equal. Their intervals are Student's t with the robust standard
    errors of the images or groups (Liang & Zeger, Biometrika 1986), and as many degrees of freedom
    as there are units of the rarer kind, less one.

    Raises:
        UsageError: no such class.
    """
    c = class_index(predictions, positive)
    # float32 softmax rounds to 0 and 1; 1e-7 is about its resolution
    p = np.clip(predictions.probabilities[:, c].astype(np.float64), 1e-7, 1 - 1e-7)
    logit = np.log(p / (1 - p))
    is_positive = predictions.labels == c
    if is_positive.all() or not is_positive.any():
        nothing = Estimate(NAN, NAN, NAN)
        return {"calibration_slope": nothing, "calibration_intercept": nothing}
    unit, _ = units_of(predictions)
    ones, y = np.ones_like(logit), is_positive.astype(np.float64)
    regressions = {
        "calibration_slope": _logistic(np.stack([logit, ones], axis=1), y, 0.0, unit),
        "calibration_intercept": _logistic(ones[:, None], y, logit, unit),
    }
    rarer = rarer_units(is_positive, unit)
    return {
        name: _students(value, error, rarer, confidence)
        for name, (value, error) in regressions.items()
    }


def _students(value: float, error: float, units: int, confidence: float) -> Estimate:
    from scipy.stats import t

    if units < 2:
        return Estimate(value, NAN, NAN)
    half = float(t.ppf((1 + confidence) / 2, units - 1)) * error
    return Estimate(value, value - half, value + half)


def _logistic(x: Floats, y: Floats, offset: Floats | float, unit: Ints) -> tuple[float, float]:
    """A logistic regression's first coefficient and its robust standard error.

    NaN if the likelihood has no maximum, or no unique one.
    """

    def likelihood(beta: Floats) -> float:
        eta = np.clip(x @ beta + offset, -30, 30)
        return float(y @ eta - np.logaddexp(0, eta).sum())

    if np.linalg.matrix_rank(x) < x.shape[1]:
        return NAN, NAN
    beta = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ beta + offset, -30, 30)))
        scores = x * (y - p)[:, None]
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        try:
            step = np.linalg.solve(hessian, scores.sum(axis=0))
        except np.linalg.LinAlgError:
            break
        largest, size = np.abs(step).max(), 1.0
        while size > 1e-6 and likelihood(beta + size * step) < likelihood(beta):
            size /= 2  # far from the maximum a full step overshoots
        beta = beta + size * step
        if np.abs(beta).max() > 100:  # separated
            break
        if largest < _TOLERANCE * (1 + np.abs(beta).max()):
            of_units = np.stack([np.bincount(unit, score) for score in scores.T], axis=1)
            moved = of_units @ np.linalg.inv(hessian)[0]  # influence of each unit
            n_units = len(moved)
            scale = n_units / (n_units - 1) if n_units > 1 else NAN
            return float(beta[0]), float(np.sqrt(scale * moved @ moved))
    return NAN, NAN


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram: mean confidence, and the share of correct images.

    For one class: its mean probability, and the share of images of that class.
    """

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float
    interval: tuple[float, float]


def reliability(
    predictions: Predictions,
    *,
    bins: int = BINS,
    confidence: float = 0.95,
    positive: str | None = None,
) -> list[ReliabilityBin]:
    """The nonempty bins of a reliability diagram of the top-1 probability.

    Intervals are Wilson's; for images in groups `share_of_groups`, and 0 to 1 in a bin with one
    group.

    Args:
        predictions: of any images.
        bins: number of bins of equal width.
        confidence: of the intervals.
        positive: a class whose probability is compared with its share instead.

    Raises:
        UsageError: no such class.
    """
    if positive is None:
        top = predictions.probabilities.max(axis=1).astype(np.float64)
        right = predictions.probabilities.argmax(axis=1) == predictions.labels
    else:
        c = class_index(predictions, positive)
        top = predictions.probabilities[:, c].astype(np.float64)
        right = predictions.labels == c
    index = bin_of(top, bins)
    rows = []
    for b in np.unique(index).tolist():
        inside = index == b
        n, hits = int(inside.sum()), int(right[inside].sum())
        interval = wilson_interval(hits, n, confidence)
        if predictions.groups is not None:
            share = share_of_groups(right[inside], predictions.groups[inside], confidence)
            interval = (share.low, share.high) if share.has_interval else (0.0, 1.0)
        mean = float(top[inside].mean())
        low, high = b / bins, (b + 1) / bins
        rows.append(ReliabilityBin(low, high, n, mean, hits / n, interval))
    return rows


def fit_temperature(validation: Predictions) -> float:
    """The temperature that minimizes the negative log-likelihood (Guo et al., ICML 2017).

    Following Platt (1999), each target is that of n images with this label and one image spread
    equally over all classes, with n validation images: if all n are right, the likelihood would
    otherwise keep growing with the confidence.

    Args:
        validation: predictions of images used neither to train nor to test the network.

    Returns:
        The temperature, 0.01 to 100; above 1 if the network is overconfident.

    Raises:
        UsageError: fewer than 2 images.
    """
    if len(validation) < 2:
        raise UsageError(f"{len(validation)} validation image: a temperature needs 2 or more")
    from scipy.optimize import minimize_scalar

    logits, n = _logits(validation.probabilities), len(validation)
    rows = np.arange(n)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        of_true = (n * scaled[rows, validation.labels] + scaled.mean(axis=1)) / (n + 1)
        return float((np.log(np.exp(scaled).sum(axis=1)) - of_true).mean())

    bounds = (np.log(0.01), np.log(100.0))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The predictions as softmax(logits / temperature); the top-1 class does not change."""
    if not temperature > 0:
        raise UsageError(f"temperature={temperature}: must be above 0")
    scaled = _logits(predictions.probabilities) / temperature
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    scaled /= scaled.sum(axis=1, keepdims=True)
    dtype = predictions.probabilities.dtype
    return replace(predictions, probabilities=scaled.astype(dtype))


def _logits(probabilities: NDArray[np.floating]) -> Floats:
    """Logits up to a constant per row."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
