"""The same metrics for subgroups of the images, such as each site, device or age band."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.cells import is_missing, number_of
from regard.errors import UsageError
from regard.evaluation.diagnostics import diagnose_class
from regard.evaluation.intervals import Estimate, finite_or_none
from regard.evaluation.metrics import MACRO, Evaluation, evaluate
from regard.evaluation.predictions import Predictions
from regard.files import plural

MISSING = "(missing)"
SMALLEST = 10  # images, or groups if there are groups, below which a part has no metrics
CSV_HEADER = ("column", "part", "images", "groups", "metric", "value", "low", "high")
MOST_PARTS = 12  # limit for columns that are evaluated without being named


@dataclass(frozen=True, eq=False)
class Part:
    """One part of the images.

    n, n_groups: its images and groups; n_groups is None if images are independent.
    evaluation: None if the part is too small.
    metrics: of `evaluate`, and of the positive class if one was named; empty if it is too
        small.
    """

    n: int
    n_groups: int | None
    evaluation: Evaluation | None
    metrics: dict[str, Estimate]

    @property
    def too_small(self) -> bool:
        return self.evaluation is None

    @property
    def present(self) -> set[str]:
        """The classes of its images; empty if it is too small."""
        per_class = () if self.evaluation is None else self.evaluation.per_class
        return {each.name for each in per_class if each.count}

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        return {
            "n": self.n, "n_groups": self.n_groups, "too_small": self.too_small,
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subgroups:
    """The evaluation of each part of the images.

    column: what the images are split by.
    parts: by value, those with the most images first, bands in order; parts that are too small
        have only counts.
    at_least: fewest images or groups of a part with metrics.
    """

    column: str
    parts: dict[str, Part]
    at_least: int

    def gap(self, metric: str = "top1") -> tuple[str, str, float] | None:
        """The names of the parts with the highest and lowest metric, and their difference.

        None if fewer than 2 parts have the metric; a mean over classes is compared only
        among parts with images of every class, as over fewer classes it is another quantity. The
        gap of many small parts is large by chance alone: read it with their intervals.
        """
        parts = {name: part for name, part in self.parts.items() if metric in part.metrics}
        if metric in MACRO:
            every = set().union(*(part.present for part in parts.values()))
            parts = {name: part for name, part in parts.items() if part.present == every}
        values = {name: part.metrics[metric].value for name, part in parts.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if len(values) < 2:
            return None
        high, low = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        return high, low, values[high] - values[low]

    def gaps(self) -> dict[str, tuple[str, str, float]]:
        """`gap` for each metric that has one."""
        names = dict.fromkeys(name for part in self.parts.values() for name in part.metrics)
        return {name: gap for name in names if (gap := self.gap(name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON: counts, and each metric with its interval."""
        return {
            "column": self.column,
            "at_least": self.at_least,
            "parts": {name: part.to_dict() for name, part in self.parts.items()},
            "largest_gaps": {
                name: {"high": high, "low": low, "difference": finite_or_none(difference)}
                for name, (high, low, difference) in self.gaps().items()
            },
        }


def evaluate_subgroups(
    predictions: Predictions,
    column: str,
    values: Sequence[Any] | NDArray[Any] | None = None,
    *,
    bands: Sequence[float] | None = None,
    positive: str | None = None,
    threshold: float | None = None,
    at_least: int = SMALLEST,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Subgroups:
    """Evaluates each part of the images.

    Args:
        predictions: of all images.
        column: name of what the images are divided by, such as "site".
        values: one per image; None, NaN, "" and "nan", with bands also "NA" and "n/a", are
            a part of their own. Default: the predictions' column of that name.
        bands: for numbers: increasing limits; 40, 60 makes "<40", "40 to <60" and ">=60".
        positive, threshold: as for `diagnose`: adds that class's metrics.
        at_least: fewest images (groups, if there are groups) of a part that is evaluated; smaller
            ones are only counted.
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: no such column, not one value per image, or values that are not numbers with
            bands.
    """
    if values is None:
        values = _column(predictions, column)
    if len(values) != len(predictions):
        given = f"{plural(len(values), 'value')} for {plural(len(predictions), 'image')}"
        raise UsageError(f"{column}: {given}")
    names, limits = parts_of(column, values, bands)
    counts = {name: int((names == name).sum()) for name in dict.fromkeys(names.tolist())}
    settings = {"resamples": resamples, "seed": seed, "confidence": confidence}
    parts = {}
    bands_in_order = [] if limits is None else [_name(column, v, limits) for v in
                                                (-math.inf, *limits)]  # fmt: skip
    rank = {name: place for place, name in enumerate(bands_in_order)}
    for name in sorted(counts, key=lambda n: (rank.get(n, len(rank)), -counts[n], n)):
        rows = np.flatnonzero(names == name)
        part = predictions.select(rows)
        n_groups = None if part.groups is None else len(np.unique(part.groups))
        if (len(rows) if n_groups is None else n_groups) < at_least:
            parts[name] = Part(len(rows), n_groups, None, {})
            continue
        found = evaluate(part, **settings)  # type: ignore[arg-type]
        metrics = dict(found.metrics)
        if positive is not None:
            one = diagnose_class(part, positive, threshold=threshold, **settings)  # type: ignore[arg-type]
            metrics |= one.metrics
        parts[name] = Part(len(rows), n_groups, found, metrics)
    return Subgroups(column, parts, at_least)


def subgroup_columns(predictions: Predictions) -> dict[str, list[float] | None]:
    """The columns worth dividing by, each with its bands or None.

    Those with 2 to MOST_PARTS values, and numeric ones with more in three bands of equal size.
    """
    found: dict[str, list[float] | None] = {}
    for name, values in (predictions.columns or {}).items():
        present = [v for v in values.tolist() if not is_missing(v, False)]
        distinct = set(present)
        if 2 <= len(distinct) <= MOST_PARTS:
            found[name] = None
        elif len(distinct) > MOST_PARTS:
            try:
                numbers = np.array([number_of(v) for v in present if not is_missing(v, True)])
            except ValueError:
                continue
            if np.isfinite(numbers).all() and (limits := _thirds(numbers)):
                found[name] = limits
    return found


def _thirds(numbers: NDArray[np.float64]) -> list[float]:
    """The limits of three bands of nearly equal size; fewer limits for few distinct numbers.

    Equal numbers stay together. Each limit is the shortest number that separates its neighbors.
    """
    distinct, counts = np.unique(numbers, return_counts=True)
    below = np.cumsum(counts)[:-1]  # numbers below distinct[1:]
    if len(below) < 2:
        at = np.arange(len(below))
    else:
        first = np.arange(len(below) - 1)  # each first limit, with the two best second ones
        half = np.searchsorted(below, (below[first] + len(numbers)) / 2)
        pairs = np.concatenate(
            [np.stack([first, np.clip(half - k, first + 1, len(below) - 1)]) for k in (0, 1)], 1
        )  # (2, pairs)
        low, high = below[pairs]
        sizes = np.stack([low, high - low, len(numbers) - high])
        at = pairs[:, (sizes.astype(float) ** 2).sum(0).argmin()]
    return [_between(float(distinct[i]), float(distinct[i + 1])) for i in at]


def _between(low: float, high: float) -> float:
    """The number with the fewest digits that is above `low` and at most `high`."""
    ends = (high, low / 2 + high / 2)
    rounded = (float(f"{end:.{digits}g}") for digits in range(1, 17) for end in ends)
    return next((number for number in rounded if low < number <= high), high)


def subgroups_csv(subgroups: Sequence[Subgroups]) -> str:
    """A CSV table: column, part, images, groups, metric, value, low, high.

    A part that is too small has one line, with "too small" instead of the metric.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_HEADER)
    for each in subgroups:
        for name, part in each.parts.items():
            head = [each.column, name, part.n, "" if part.n_groups is None else part.n_groups]
            if part.too_small:
                writer.writerow([*head, "too small", "", "", ""])
            for metric, e in part.metrics.items():
                ends = ["" if math.isnan(v) else f"{v:.6g}" for v in (e.value, e.low, e.high)]
                writer.writerow([*head, metric, *ends])
    return text.getvalue()


def _column(predictions: Predictions, column: str) -> NDArray[Any]:
    columns: Mapping[str, NDArray[Any]] = predictions.columns or {}
    if column not in columns:
        has = f"choose one of {', '.join(columns)}" if columns else "the data has none"
        raise UsageError(f"no further column {column!r} of the images: {has}")
    return columns[column]


def parts_of(
    column: str, values: Sequence[Any] | NDArray[Any], bands: Sequence[float] | None
) -> tuple[NDArray[Any], list[float] | None]:
    """The name of each image's part, (N,), and the limits of the bands.

    Raises:
        UsageError: limits that do not increase, or values that are not numbers with bands.
    """
    limits = _limits(column, bands)
    return np.array([_name(column, value, limits) for value in values], dtype=object), limits


def _limits(column: str, bands: Sequence[float] | None) -> list[float] | None:
    if bands is None:
        return None
    limits = [float(limit) for limit in bands]
    if not limits or limits != sorted(set(limits)) or not all(map(math.isfinite, limits)):
        raise UsageError(f"bands={limits} of {column}: give increasing limits")
    return limits


def _name(column: str, value: Any, limits: list[float] | None) -> str:
    if is_missing(value, limits is not None):
        return MISSING
    if limits is None:
        return str(value)
    try:
        number = number_of(value)
    except ValueError:
        raise UsageError(f"{column}: {str(value)!r} is not a number, as bands require") from None
    above = [limit for limit in limits if number >= limit]
    if not above:
        return f"<{_shortest(limits[0])}"
    if len(above) == len(limits):
        return f">={_shortest(limits[-1])}"
    return f"{_shortest(above[-1])} to <{_shortest(limits[len(above)])}"


def _shortest(limit: float) -> str:
    """A number with the fewest digits that distinguish it."""
    short = f"{limit:g}"
    return short if float(short) == limit else repr(limit).removesuffix(".0")
