"""study.html: the table of a study, its differences as a forest plot, curves and commands.

One self-contained file without scripts; it follows the reader's light or dark mode.
"""

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from regard.evaluation.repeats import METRICS
from regard.files import write_atomically
from regard.papers import PAPERS
from regard.studies.results import RowResult, StudyResult

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#a6761d")
"""Okabe and Ito's, which people with any color vision can tell apart; they repeat after eight."""

_WIDTH, _LEFT, _RIGHT, _ROW = 640.0, 190.0, 620.0, 26.0  # of the forest plot
_CURVE = (46.0, 470.0, 10.0, 220.0)  # left, right, top, bottom of the learning curves


def write_page(result: StudyResult, out: Path) -> None:
    """Writes study.html.

    Raises:
        StateError: it can't be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, p=_p)
    text = resources.files("regard.studies").joinpath("page.html").read_text(encoding="utf-8")
    page = environment.from_string(text).render(
        study=result,
        metrics=METRICS,
        paper=PAPERS.get(result.table.paper or ""),
        rows=[_row(row, result) for row in result.rows],
        columns=_paper_columns(result),
        forest=forest(result.rows),
        curves=learning_curves(result.rows),
        colors=COLORS,
        classes=_classes(result.rows),
    )
    write_atomically(out / "study.html", lambda path: path.write_text(page, encoding="utf-8"))


def _percent(value: float, digits: int = 1) -> str:
    return "–" if not math.isfinite(value) else f"{100 * value:.{digits}f}"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _paper_columns(result: StudyResult) -> list[str]:
    """The paper's metrics that any row prints, in the table's order."""
    printed = {key for row in result.rows for key in row.row.paper}
    order = [m for m in result.table.metrics if m in printed]
    return [*order, *sorted(printed - set(order))]


def _row(row: RowResult, result: StudyResult) -> dict[str, Any]:
    difference = row.differences.get("accuracy")
    return {
        "name": row.row.name,
        "network": row.row.network,
        "note": row.row.note,
        "paper": row.row.paper,
        "seeds": len(row.seeds),
        "planned": result.seeds,
        "mean": {m: row.mean(m) for m in METRICS},
        "sd": {m: row.sd(m) for m in METRICS},
        "difference": difference,
        "p": row.p_values.get("accuracy", math.nan),
        "verdict": row.verdict,
        "facts": row.facts,
    }


def forest(rows: Sequence[RowResult]) -> dict[str, Any] | None:
    """Positions of the forest plot: each row's difference of accuracy to the first, in points."""
    drawn = [(r, r.differences["accuracy"]) for r in rows if "accuracy" in r.differences]
    drawn = [(r, d) for r, d in drawn if math.isfinite(d.low)]
    if not drawn:
        return None
    low = min(0.0, *(100 * d.low for _, d in drawn))
    high = max(0.0, *(100 * d.high for _, d in drawn))
    step = _step(high - low)
    low = step * math.floor(low / step)
    high = max(step * math.ceil(high / step), low + step)  # also where nothing differs

    def at(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (x - low) / (high - low)

    ticks = [low + step * i for i in range(round((high - low) / step) + 1)]
    lines = [
        {
            "name": r.row.name, "y": 20 + _ROW * i, "x": at(100 * d.value),
            "low": at(100 * d.low), "high": at(100 * d.high),
            "words": f"{100 * d.value:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
            "each": [at(min(max(100 * e, low), high)) for e in d.each] if len(d.each) > 1 else [],
        }
        for i, (r, d) in enumerate(drawn)
    ]  # fmt: skip
    bottom = 20 + _ROW * len(drawn)
    return {
        "width": _WIDTH, "height": bottom + 34, "bottom": bottom, "zero": at(0.0),
        "left": _LEFT, "right": _RIGHT, "lines": lines,
        "ticks": [(at(t), f"{t:+g}" if t else "0") for t in ticks],
    }  # fmt: skip


def _step(span: float) -> float:
    """A round distance between about five ticks."""
    raw = max(span, 0.1) / 5
    power = 10 ** math.floor(math.log10(raw))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= raw)


def learning_curves(rows: Sequence[RowResult]) -> dict[str, Any] | None:
    """Accuracy by epoch: each row's mean over its runs, with the band from lowest to highest."""
    key = "val_accuracy" if any("val_accuracy" in c[0] for r in rows for c in r.curves if c) else ""
    key = key or "accuracy"
    drawn = []
    for n, row in enumerate(rows):
        curves = [c for c in row.curves if c and key in c[0]]
        if not curves:
            continue
        length = min(map(len, curves))
        values = np.array([[point[key] for point in c[:length]] for c in curves])
        epochs = [point["epoch"] for point in curves[0][:length]]
        drawn.append((n, row.row.name, epochs, values))
    if not drawn:
        return None
    last = max(epochs[-1] for _, _, epochs, _ in drawn)
    low = min(float(v.min()) for *_, v in drawn)
    low, high = 0.1 * math.floor(10 * low), 1.0
    left, right, top, bottom = _CURVE

    def x(epoch: float) -> float:
        return left + (right - left) * epoch / last

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    lines = []
    for n, name, epochs, values in drawn:
        mean, least, most = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
        upper = [f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, most, strict=True)]
        lower = [f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, least, strict=True)]
        lines.append({
            "name": name, "color": COLORS[n % len(COLORS)],
            "mean": " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, mean, strict=True)),
            "band": " ".join([*upper, *reversed(lower)]), "last": _percent(float(mean[-1])),
        })  # fmt: skip
    step = _step(100 * (high - low)) / 100
    marks = [low + step * i for i in range(round((high - low) / step) + 1)]
    return {
        "title": "Validation accuracy" if key == "val_accuracy" else "Training accuracy",
        "lines": lines, "left": left, "right": right, "top": top, "bottom": bottom,
        "y": [(y(m), f"{100 * m:g}") for m in marks if m <= 1 + 1e-9],
        "x": [(x(last * f), f"{last * f:.3g}") for f in (0, 0.25, 0.5, 0.75, 1)],
    }  # fmt: skip


def _classes(rows: Sequence[RowResult]) -> dict[str, Any] | None:
    """Recall of every class by row, for the first seed; None for more than 30 classes."""
    with_results = [r for r in rows if r.evaluation is not None]
    if not with_results or len(with_results[0].evaluation.classes) > 30:  # type: ignore[union-attr]
        return None
    found: dict[str, list[float]] = {}
    for row in with_results:
        for each in row.evaluation.per_class:  # type: ignore[union-attr]
            found.setdefault(each.name, []).append(each.recall.value)
    return {"names": [r.row.name for r in with_results], "recalls": found}
