"""Calibration: its slope and intercept, reliability diagrams, and temperature scaling."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError
from regard.evaluation.intervals import NAN, share_of_groups, wilson_interval
from regard.evaluation.predictions import BINS, Floats, Predictions
from regard.evaluation.statistics import Values, class_index

_STEPS, _TOLERANCE = 50, 1e-10  # of Newton's method


class CalibrationStatistics:
    """Calibration slope and intercept of a class's probability (Cox 1958; Steyerberg 2019).

    calibration_slope: b of the logistic regression of the class on a + b logit(p); 1 is ideal,
        below 1 is overconfident.
    calibration_intercept: a where b is 1 (calibration in the large); 0 is ideal, below 0 is
        probabilities that are too high.
    Both are NaN where the class is separated perfectly, or is absent.
    """

    def __init__(self, predictions: Predictions, positive: str) -> None:
        c = class_index(predictions, positive)
        p = predictions.probabilities[:, c].astype(np.float64)
        # float32 softmax rounds to 0 and 1; 1e-7 is its resolution
        p = np.clip(p, 1e-7, 1 - 1e-7)
        self.logit: Floats = np.log(p / (1 - p))
        self.y: Floats = (predictions.labels == c).astype(np.float64)

    def __call__(self, weights: Floats) -> Values:
        y, logit = self.y, self.logit
        if not 0 < weights @ y < weights.sum():
            return {"calibration_slope": NAN, "calibration_intercept": NAN}
        slope = _logistic(np.stack([np.ones_like(y), logit], axis=1), y, weights, 0.0)[1]
        intercept = _logistic(np.ones((len(y), 1)), y, weights, logit)[0]
        return {"calibration_slope": float(slope), "calibration_intercept": float(intercept)}


def _logistic(x: Floats, y: Floats, weights: Floats, offset: Floats | float) -> Floats:
    """Maximum-likelihood coefficients of a logistic regression, NaN if there are none."""
    beta = np.zeros(x.shape[1])
    nothing = np.full_like(beta, NAN)
    for _ in range(_STEPS):
        eta = np.clip(x @ beta + offset, -30, 30)
        p = 1 / (1 + np.exp(-eta))
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x
        try:
            step = np.linalg.solve(hessian, x.T @ (weights * (y - p)))
        except np.linalg.LinAlgError:
            return nothing
        beta = beta + np.clip(step, -5, 5)
        if np.abs(beta).max() > 100:  # separated: the likelihood has no maximum
            return nothing
        if np.abs(step).max() < _TOLERANCE:
            return beta
    return nothing


@dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram: mean confidence, and the share that is right.

    Of one class's probability: its mean, and the share of images of that class.
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
    """The bins with images of a reliability diagram of the top-1 probability.

    Intervals are Wilson's; of images in groups `share_of_groups`, from 0 to 1 in a bin of one
    group.

    Args:
        predictions: of any images.
        bins: of equal width.
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
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.digitize(top, edges, right=True) - 1, 0, bins - 1)
    rows = []
    for b in np.unique(index).tolist():
        inside = index == b
        n, hits = int(inside.sum()), int(right[inside].sum())
        interval = wilson_interval(hits, n, confidence)
        if predictions.groups is not None:
            share = share_of_groups(right[inside], predictions.groups[inside], confidence)
            interval = (share.low, share.high) if share.has_interval else (0.0, 1.0)
        mean = float(top[inside].mean())
        rows.append(ReliabilityBin(edges[b], edges[b + 1], n, mean, hits / n, interval))
    return rows


def fit_temperature(validation: Predictions) -> float:
    """The temperature that minimizes the negative log-likelihood (Guo et al., ICML 2017).

    Args:
        validation: predictions of images that neither trained the network nor test it.

    Returns:
        The temperature, 0.01 to 100; above 1 where the network is overconfident.

    Raises:
        UsageError: fewer than 2 images.
    """
    if len(validation) < 2:
        raise UsageError(f"{len(validation)} validation image: a temperature needs 2 or more")
    from scipy.optimize import minimize_scalar

    logits, rows = _logits(validation.probabilities), np.arange(len(validation))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        scaled -= scaled.max(axis=1, keepdims=True)
        of_true = scaled[rows, validation.labels]
        return float((np.log(np.exp(scaled).sum(axis=1)) - of_true).mean())

    bounds = (np.log(0.01), np.log(100.0))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def with_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """The predictions with softmax(logits / temperature); the top-1 class does not change."""
    if not temperature > 0:
        raise UsageError(f"temperature={temperature}: above 0")
    scaled = _logits(predictions.probabilities) / temperature
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    scaled /= scaled.sum(axis=1, keepdims=True)
    dtype = predictions.probabilities.dtype
    return replace(predictions, probabilities=scaled.astype(dtype))


def _logits(probabilities: NDArray[np.floating]) -> Floats:
    """Logits up to a constant per row."""
    return np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
