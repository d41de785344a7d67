"""The same metrics in parts of the images, such as each site or device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation.intervals import finite_or_none
from regard.evaluation.metrics import Evaluation, evaluate
from regard.evaluation.predictions import Predictions

MISSING = "(missing)"


@dataclass(frozen=True, eq=False)
class Subgroups:
    """The evaluation of each part of the images.

    column: what the images are split by.
    evaluations: by value, the most images first.
    """

    column: str
    evaluations: dict[str, Evaluation]

    def gap(self, metric: str = "top1", *, at_least: int = 2) -> tuple[str, str, float] | None:
        """The values with the highest and the lowest metric, and their difference.

        None with fewer than 2 parts of `at_least` images. The gap of many small parts is large
        by chance alone: read it with their intervals.
        """
        values = {
            name: e.metrics[metric].value for name, e in self.evaluations.items() if e.n >= at_least
        }
        values = {name: value for name, value in values.items() if not np.isnan(value)}
        if len(values) < 2:
            return None
        high, low = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        return high, low, values[high] - values[low]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts, and each metric with its interval."""
        gap = self.gap()
        return {
            "column": self.column,
            "parts": {
                name: {
                    "n": e.n,
                    "n_groups": e.n_groups,
                    "metrics": {m: estimate.to_dict() for m, estimate in e.metrics.items()},
                }
                for name, e in self.evaluations.items()
            },
            "largest_gap": None if gap is None else [gap[0], gap[1], finite_or_none(gap[2])],
        }


def evaluate_subgroups(
    predictions: Predictions,
    column: str,
    values: Sequence[Any],
    *,
    bands: Sequence[float] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Subgroups:
    """Evaluates each part of the images.

    Args:
        predictions: of all images.
        column: name of what the images are split by, such as "site".
        values: one for each image; None, NaN and "" are a part of their own.
        bands: for numbers: increasing limits; 40, 60 makes "<40", "40 to <60" and ">=60".
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: not one value per image, or values that are no numbers with bands.
    """
    if len(values) != len(predictions):
        raise UsageError(f"{column}: {len(values)} values for {len(predictions)} images")
    names = np.array([_name(column, value, bands) for value in values], dtype=object)
    counts = {name: int((names == name).sum()) for name in dict.fromkeys(names.tolist())}
    evaluations = {}
    for name in sorted(counts, key=lambda n: (-counts[n], n)):
        rows = np.flatnonzero(names == name)
        part = Predictions(
            predictions.probabilities[rows], predictions.labels[rows], predictions.classes,
            None if predictions.groups is None else predictions.groups[rows],
        )  # fmt: skip
        evaluations[name] = evaluate(part, resamples=resamples, seed=seed, confidence=confidence)
    return Subgroups(column, evaluations)


def _name(column: str, value: Any, bands: Sequence[float] | None) -> str:
    if value is None or value != value or str(value).strip() == "":
        return MISSING
    if bands is None:
        return str(value)
    try:
        number = float(value)
    except ValueError:
        raise UsageError(f"{column}: {value!r} is no number, as bands need") from None
    limits = list(bands)
    if not limits or limits != sorted(set(limits)):
        raise UsageError(f"bands={limits}: give increasing limits")
    above = [limit for limit in limits if number >= limit]
    if not above:
        return f"<{limits[0]:g}"
    if len(above) == len(limits):
        return f">={limits[-1]:g}"
    return f"{above[-1]:g} to <{limits[len(above)]:g}"
