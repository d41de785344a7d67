"""ROC, precision-recall and their pointwise intervals, as arrays to draw."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from regard.evaluation import Predictions
from regard.evaluation.intervals import draws, percentile_band
from regard.evaluation.predictions import Floats, rarer_units, units_of
from regard.evaluation.statistics import Curve, Ranking, class_index

RESAMPLES = 300
MOST_WORK = 10**8  # images x resamples: about 5 s
GRID = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class Band:
    """A curve over x with its 95 % pointwise interval.

    Attributes:
        x, y: (T,) the curve itself, at every distinct score.
        grid, low, high: (101,) the band; empty if there is none.
    """

    x: Floats
    y: Floats
    grid: Floats
    low: Floats
    high: Floats


def roc_of(
    predictions: Predictions, name: str, *, seed: int = 0, interval: bool = True
) -> Band | None:
    """The ROC curve of a class against the rest; None without images of both kinds."""
    return _band(predictions, name, seed if interval else None, _roc, "right")


def precision_recall_of(
    predictions: Predictions, name: str, *, seed: int = 0, interval: bool = True
) -> Band | None:
    """Precision against recall of a class; None without images of both kinds."""
    return _band(predictions, name, seed if interval else None, _precision_recall, "left")


def _roc(curve: Curve) -> tuple[Floats, Floats]:
    return np.append(0.0, curve.fp / curve.fp[-1]), np.append(0.0, curve.tp / curve.tp[-1])


def _precision_recall(curve: Curve) -> tuple[Floats, Floats]:
    """Recall and precision, up to the threshold where the recall is 1.

    The first point repeats the precision of the highest score.
    """
    called = curve.tp + curve.fp
    last = int(np.argmax(curve.tp == curve.tp[-1]))
    some = np.flatnonzero(called[: last + 1] > 0)
    precision, recall = curve.tp[some] / called[some], curve.tp[some] / curve.tp[-1]
    return np.append(0.0, recall), np.append(precision[0], precision)


def _band(
    predictions: Predictions,
    name: str,
    seed: int | None,
    points: Callable[[Curve], tuple[Floats, Floats]],
    side: Literal["left", "right"],
) -> Band | None:
    c = class_index(predictions, name)
    positive = predictions.labels == c
    if positive.all() or not positive.any():
        return None
    ranking = Ranking(positive, predictions.probabilities[:, c])
    x, y = points(ranking.curve(np.ones(len(predictions))))
    unit, n_units = units_of(predictions)
    drawn = []
    if seed is not None and n_units > 1 and len(predictions) * RESAMPLES <= MOST_WORK:
        for times in draws(n_units, RESAMPLES, seed):
            sample = ranking.curve(times[unit])
            if sample.tp[-1] and sample.fp[-1]:
                drawn.append(_at(*points(sample), side))
    rarer = rarer_units(positive, unit)
    if len(drawn) < RESAMPLES // 2 or rarer < 2:
        nothing = np.empty(0)
        return Band(x, y, nothing, nothing, nothing)
    low, high = percentile_band(np.stack(drawn), 0.95, rarer)
    return Band(x, y, GRID, low, high)


def _at(x: Floats, y: Floats, side: Literal["left", "right"]) -> Floats:
    """(101,) the value of a step curve at each x of the grid.

    That of the last point up to x ("right"), or of the first point from x on ("left").
    """
    shift = 1e-12 if side == "right" else -1e-12
    at = np.searchsorted(x, GRID + shift, side=side) - (side == "right")
    return y[np.minimum(at, len(y) - 1)]
