"""study.html: the table of a study, its differences as a forest plot, curves and commands.

One self-contained file without scripts; it follows the reader's light or dark mode.
"""

import math
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from regard.evaluation.predictions import Floats
from regard.evaluation.repeats import METRICS
from regard.files import signed, signed_range, write_atomically
from regard.papers import PAPERS
from regard.studies.facts import FAITHFULNESS, MAPS
from regard.studies.results import RowResult, StudyResult

COLORS = (  # on a light and on a dark page
    ("#0072b2", "#56b4e9"), ("#d55e00", "#ff8f45"), ("#009e73", "#2cc79b"), ("#cc79a7", "#e6a3c8"),
    ("#a87400", "#f0b93a"), ("#2b83ba", "#9bd5f5"), ("#6b6b6b", "#b5b5b5"), ("#8a5a10", "#d6a15a"),
)  # fmt: skip
"""After Okabe and Ito's palette, distinguishable with any color vision; repeated after eight."""

_CURVE = (34.0, 404.0, 10.0, 210.0)  # left, right, top, bottom of the learning curves


def write_page(result: StudyResult, out: Path) -> None:
    """Writes study.html.

    Raises:
        StateError: it can't be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, p=_p, spread=_spread, signed=signed)
    environment.globals["signed_range"] = signed_range
    text = resources.files("regard.studies").joinpath("page.html").read_text(encoding="utf-8")
    page = environment.from_string(text).render(
        study=result,
        metrics=METRICS,
        paper=PAPERS.get(result.table.paper or ""),
        rows=[_row(row, result) for row in result.rows],
        # rows without a finished run are not compared, and `holm` does not count them
        compared=sum(math.isfinite(row.p_values.get("accuracy", math.nan)) for row in result.rows),
        columns=_paper_columns(result),
        measured={name for row in result.rows for name in row.printed},
        forest=forest(result.rows),
        curves=learning_curves(result.rows),
        colors=COLORS,
        classes=_classes(result.rows),
        lengths=_lengths(result.rows),
        faithful=any(row.faithfulness for row in result.rows),
        about_faithfulness=FAITHFULNESS,
    )
    write_atomically(out / "study.html", lambda path: path.write_text(page, encoding="utf-8"))


def _percent(value: float, digits: int = 1) -> str:
    return "–" if not math.isfinite(value) else f"{100 * value:.{digits}f}"


def _spread(numbers: tuple[float, float, int]) -> str:
    """Mean ± standard deviation with so many digits; the mean alone for one seed."""
    mean, deviation, digits = numbers
    shown = f"{mean:.{digits}f}"
    return shown if math.isnan(deviation) else f"{shown} ± {deviation:.{digits}f}"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _paper_columns(result: StudyResult) -> list[str]:
    """The paper's metrics reported in any row, in the table's order."""
    printed = {key for row in result.rows for key in row.row.paper}
    order = [m for m in result.table.metrics if m in printed]
    return [*order, *sorted(printed - set(order))]


def _row(row: RowResult, result: StudyResult) -> dict[str, Any]:
    return {
        "name": row.row.name,
        "network": row.row.network,
        "note": row.row.note,
        "paper": row.row.paper,
        "printed": {
            name: (row.mean(name), row.sd(name), 2 if name.endswith("error") else 3)
            for name in row.printed
        },
        "seeds": len(row.seeds),
        "planned": result.seeds,
        "mean": {m: row.mean(m) for m in METRICS},
        "sd": {m: row.sd(m) for m in METRICS},
        "interval": row.intervals.get("accuracy"),
        "difference": row.differences.get("accuracy"),
        "p": row.p_values.get("accuracy", math.nan),
        "verdict": row.verdict,
        "facts": row.facts,
        "faithfulness": [
            (row.mean(name), row.sd(name)) if name in row.faithfulness else None for name in MAPS
        ],
    }


def _lengths(rows: Sequence[RowResult]) -> list[tuple[str, str]]:
    """How long rows were trained, stated once for all rows for which it is the same."""
    by_sentence: dict[str, list[str]] = {}
    for row in rows:
        if row.length is not None:
            by_sentence.setdefault(row.length.sentence(), []).append(row.row.name)
    trained = sum(map(len, by_sentence.values()))
    return [
        ("Every network" if len(names) == trained else ", ".join(names), sentence)
        for sentence, names in by_sentence.items()
    ]


def forest(rows: Sequence[RowResult]) -> dict[str, Any] | None:
    """The forest plot: each row's difference in accuracy to the first, in percentage points.

    Positions are in percent of the width.
    """
    drawn = [(r, r.differences["accuracy"]) for r in rows if "accuracy" in r.differences]
    drawn = [(r, d) for r, d in drawn if math.isfinite(d.low)]
    if not drawn:
        return None
    low = min(0.0, *(100 * d.low for _, d in drawn))
    high = max(0.0, *(100 * d.high for _, d in drawn))
    step = _step(high - low)
    low = step * math.floor(low / step)
    high = max(step * math.ceil(high / step), low + step)  # also if nothing differs

    def at(x: float) -> float:
        return round(100 * (min(max(x, low), high) - low) / (high - low), 2)

    ticks = [low + step * i for i in range(round((high - low) / step) + 1)]
    lines = [
        {
            "name": r.row.name, "at": at(100 * d.value),
            "low": at(100 * d.low), "high": at(100 * d.high),
            "words": "{} ({} to {})".format(
                *signed_range(100 * d.value, 100 * d.low, 100 * d.high, 1)
            ),
            "each": [at(100 * e) for e in d.each] if len(d.each) > 1 else [],
        }
        for r, d in drawn
    ]  # fmt: skip
    return {
        "zero": at(0.0), "lines": lines,
        "ticks": [(at(t), f"{t:+g}" if abs(t) > step / 2 else "0") for t in ticks],
    }  # fmt: skip


def _step(span: float) -> float:
    """A round distance for about five ticks."""
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
        if curves:
            length = min(map(len, curves))
            values = np.array([[point[key] for point in c[:length]] for c in curves])
            drawn.append(
                (n, row.row.name, [point["epoch"] for point in curves[0][:length]], values)
            )
    if not drawn:
        return None
    last = max(epochs[-1] for _, _, epochs, _ in drawn)
    every = np.concatenate([values.ravel() for *_, values in drawn])
    step = _step(100 * float(every.max() - every.min())) / 100
    low = step * math.floor(every.min() / step)
    high = max(step * math.ceil(every.max() / step - 1e-9), low + step)
    left, right, top, bottom = _CURVE

    def x(epoch: float) -> float:
        return left + (right - left) * epoch / last

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    marks = [low + step * i for i in range(round((high - low) / step) + 1)]
    apart = _step(last)
    return {
        "title": "Validation accuracy" if key == "val_accuracy" else "Training accuracy",
        "lines": [_curve(*one, x, y) for one in drawn],
        "left": left, "right": right, "top": top, "bottom": bottom,
        "y": [(y(m), f"{100 * m:.6g}") for m in marks],
        "x": [(x(apart * i), f"{apart * i:g}") for i in range(math.floor(last / apart + 1e-6) + 1)],
    }  # fmt: skip


def _curve(
    n: int,
    name: str,
    epochs: list[float],
    values: Floats,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> dict[str, Any]:
    """One row's mean and band, from its values (runs, epochs) and the axes."""

    def points(heights: Floats) -> list[str]:
        return [f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, heights, strict=True)]

    mean = values.mean(axis=0)
    return {
        "name": name, "color": n % len(COLORS), "mean": " ".join(points(mean)),
        "band": " ".join([*points(values.max(axis=0)), *reversed(points(values.min(axis=0)))]),
        "last": _percent(float(mean[-1])),
        "points": [(x(epochs[0]), y(mean[0]))] if len(epochs) == 1 else [],
    }  # fmt: skip


def _classes(rows: Sequence[RowResult]) -> dict[str, Any] | None:
    """Mean recall of every class by row; None for more than 30 classes."""
    tested = [row for row in rows if row.recalls]
    if not tested or len(tested[0].recalls) > 30:
        return None
    return {
        "names": [row.row.name for row in tested],
        "recalls": {
            name: [float(np.mean(row.recalls.get(name, [math.nan]))) for row in tested]
            for name in tested[0].recalls
        },
    }
