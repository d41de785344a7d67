"""The training curves of the report, as coordinates for its SVG drawings."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from matplotlib.ticker import MaxNLocator

from regard.report.words import percent

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 352.0, 10.0, 178.0  # of the curves, in a 360 x 216 drawing

History = list[dict[str, float]]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(t) for t in ticks]


def _limits(values: Iterable[float], *, from_zero: bool = True) -> tuple[float, float]:
    """Lowest and highest; from 0 where the lowest is less than half of the highest."""
    finite = list(values)
    low, high = min(finite), max(finite)
    if from_zero and 0 < low < high / 2:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _runs(points: Iterable[tuple[float, float] | None]) -> Iterator[list[tuple[float, float]]]:
    for some, run in itertools.groupby(points, key=lambda p: p is not None):
        if some:
            yield [p for p in run if p is not None]


def _words(y: float, as_percent: bool) -> str:
    if not math.isfinite(y):
        return "not finite"
    return percent(y) if as_percent else f"{y:.3g}"


def chart(
    history: History,
    title: str,
    keys: dict[str, str],
    *,
    as_percent: bool = False,
    chosen: float | None = None,
) -> dict[str, Any] | None:
    """A quantity by epoch; None where the history has none of it.

    Args:
        keys: history's columns by the line's name; all of one quantity, on one axis.
        as_percent: shares are shown as percentages.
        chosen: the epoch that is marked.
    """
    lines = {
        name: [(row["epoch"], row[key]) for row in history if key in row]
        for name, key in keys.items()
    }
    lines = {n: v for n, v in lines.items() if any(math.isfinite(y) for _, y in v)}
    if not lines:
        return None
    x_low, x_high = _limits((row["epoch"] for row in history), from_zero=False)
    y_ticks = _ticks(*_limits(y for v in lines.values() for _, y in v if math.isfinite(y)))
    if as_percent:
        y_ticks = [t for t in y_ticks if -1e-9 <= t <= 1 + 1e-9] or [0.0, 1.0]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across, down = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return _LEFT + (_RIGHT - _LEFT) * across, _BOTTOM - (_BOTTOM - _TOP) * down

    def drawn(name: str, values: list[tuple[float, float]]) -> dict[str, Any]:
        runs = list(_runs(at(x, y) if math.isfinite(y) else None for x, y in values))
        first, last = (_words(values[i][1], as_percent) for i in (0, -1))
        return {
            "name": name,
            "runs": [" ".join(f"{x:.1f},{y:.1f}" for x, y in run) for run in runs],
            "dots": [p for run in runs for p in run if len(values) <= 15 or len(run) == 1],
            "last": last,
            "words": f"{name} from {first} to {last}",
        }

    return {
        "title": title,
        "lines": [drawn(name, values) for name, values in lines.items()],
        "x": [(at(t, 0)[0], f"{t:g}") for t in _ticks(x_low, x_high, True) if x_low <= t <= x_high],
        "y": [(at(0, t)[1], f"{100 * t:g}\u00a0%" if as_percent else f"{t:g}") for t in y_ticks],
        "chosen": None if chosen is None or len(history) < 2 else at(chosen, 0)[0],
    }


def charts(history: History, chosen: float | None) -> list[dict[str, Any]]:
    """Loss, accuracy and learning rate.

    Training and validation loss share an axis only where they are the same quantity: where the
    history has the minimized objective in a column of its own, `loss` is the cross entropy of
    the prediction, as `val_loss` is.
    """
    both = {"training": "loss", "validation": "val_loss"}
    accuracies = {"training": "accuracy", "validation": "val_accuracy"}
    rows = history[0] if history else {}
    if "objective" in rows:
        losses = [chart(history, "Loss", both, chosen=chosen)]
        if any(not math.isclose(r["objective"], r["loss"], rel_tol=1e-3) for r in history):
            title = "Training objective"
            losses.append(chart(history, title, {"training": "objective"}, chosen=chosen))
    else:
        losses = [
            chart(history, "Training loss", {"training": "loss"}, chosen=chosen),
            chart(history, "Validation loss", {"validation": "val_loss"}, chosen=chosen),
        ]
    more = [
        chart(history, "Accuracy", accuracies, as_percent=True, chosen=chosen),
        chart(history, "Learning rate", {"learning rate": "learning_rate"}, chosen=chosen),
    ]
    return [each for each in [*losses, *more] if each]
