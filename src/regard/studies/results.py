"""What a study's finished runs say, and what follows from it in one sentence a row.

study.json holds what the same runs always give again; what depends on the machine and the hour
(times) is in study.csv and on the page.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation import Evaluation, Predictions, evaluate
from regard.evaluation.repeats import (
    LOWER_IS_BETTER,
    METRICS,
    RepeatedDifference,
    contributions,
    repeated_difference,
)
from regard.evaluation.significance import holm
from regard.files import write_atomically
from regard.papers import Row, Table
from regard.runs import RunFolder
from regard.studies.plan import PlannedRun
from regard.studies.runner import is_finished

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One row of a study.

    Attributes:
        row: the row, with the paper's numbers.
        seeds: the seeds of which all folds are finished.
        values: by metric, the value of each seed, over all folds together.
        evaluation: the first seed's, for the table by class; None: nothing is finished.
        differences: to the reference, by metric; empty for the reference itself.
        p_values: Holm's, by metric, over the rows that are compared.
        verdict: what follows for accuracy, in one sentence.
        facts: parameters, and medians of measured times, of the finished runs.
        curves: metrics.csv of each finished run.
    """

    row: Row
    seeds: tuple[int, ...]
    values: dict[str, list[float]]
    evaluation: Evaluation | None = None
    differences: dict[str, RepeatedDifference] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    curves: list[list[dict[str, float]]] = field(default_factory=list)

    def mean(self, metric: str) -> float:
        """Over seeds; NaN where none is finished."""
        values = self.values.get(metric, [])
        return float(np.mean(values)) if values else math.nan

    def sd(self, metric: str) -> float:
        """The standard deviation over seeds; NaN for fewer than two."""
        values = self.values.get(metric, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study as far as it is done.

    Attributes:
        table: the study.
        rows: in the table's order; the first is the reference.
        seeds, folds: as planned.
        done, total: runs.
        failed: by run, why.
        runs: all of them, with their commands.
        images: test images, over all folds; 0 where nothing is finished.
        groups: of these images, or None.
    """

    table: Table
    rows: list[RowResult]
    seeds: int
    folds: int
    done: int
    total: int
    runs: list[PlannedRun]
    images: int
    groups: int | None
    failed: dict[PlannedRun, str] = field(default_factory=dict)


def gather(
    table: Table, runs: Sequence[PlannedRun], failed: dict[PlannedRun, str] | None = None
) -> StudyResult:
    """Reads the finished runs and compares each row with the first.

    Raises:
        UsageError: the runs were tested on different images.
    """
    seeds = sorted({run.seed for run in runs})
    folds = max(1, len({run.fold for run in runs}))
    read = {row.name: _read_row(row, runs, seeds, folds) for row in table.rows}
    _check_same_images(read)
    reference = read[table.rows[0].name]
    differences = {
        name: _compare(each, reference) for name, each in read.items() if each is not reference
    }
    p_values = {
        metric: dict(
            zip(
                differences,
                holm([d[metric].p_value if d else math.nan for d in differences.values()]),
                strict=True,
            )
        )
        for metric in METRICS
    }
    rows = [
        _row_result(row, read[row.name], differences.get(row.name, {}), p_values)
        for row in table.rows
    ]
    first = next((p for each in read.values() for p in each.predictions.values()), None)
    groups = None if first is None or first.groups is None else len(np.unique(first.groups))
    return StudyResult(
        table=table, rows=rows, seeds=len(seeds), folds=folds,
        done=sum(is_finished(run) for run in runs), total=len(runs), runs=list(runs),
        images=0 if first is None else len(first), groups=groups, failed=failed or {},
    )  # fmt: skip


@dataclass
class _Read:
    """A row's finished seeds: predictions of all folds together, and the fold of each image."""

    predictions: dict[int, Predictions] = field(default_factory=dict)
    fold: Any = None
    facts: list[dict[str, Any]] = field(default_factory=list)
    curves: list[list[dict[str, float]]] = field(default_factory=list)


def _read_row(row: Row, runs: Sequence[PlannedRun], seeds: list[int], folds: int) -> _Read:
    read = _Read()
    for seed in seeds:
        mine = [r for r in runs if r.row == row.name and r.seed == seed]
        finished = [r for r in mine if is_finished(r)]
        for run in finished:
            folder = RunFolder(run.folder)
            read.facts.append(folder.read_facts())
            read.curves.append(folder.read_metrics())
        if len(finished) == len(mine) == folds:
            parts = [RunFolder(r.folder).read_predictions(r.predictions)[1] for r in finished]
            read.predictions[seed], read.fold = _joined(parts)
    return read


def _joined(parts: list[Predictions]) -> tuple[Predictions, Any]:
    """Predictions of several folds as one, sorted by path, and the fold of each image."""
    fold = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
    paths = [path for p in parts for path in (p.paths or [])]
    order = np.array(sorted(range(len(paths)), key=paths.__getitem__), dtype=np.int64)
    groups = None
    if all(p.groups is not None for p in parts):
        groups = np.concatenate([np.asarray(p.groups) for p in parts])[order]
    joined = Predictions(
        np.concatenate([p.probabilities for p in parts])[order],
        np.concatenate([p.labels for p in parts])[order],
        parts[0].classes, groups, [paths[i] for i in order.tolist()],
    )  # fmt: skip
    return joined, fold[order]


def _check_same_images(read: dict[str, _Read]) -> None:
    first: tuple[str, Predictions] | None = None
    for name, each in read.items():
        for predictions in each.predictions.values():
            if first is None:
                first = name, predictions
            elif predictions.paths != first[1].paths:
                raise UsageError(
                    f"{name!r} and {first[0]!r} were tested on different images: their "
                    "differences would not be paired"
                )


def _compare(each: _Read, reference: _Read) -> dict[str, RepeatedDifference]:
    seeds = sorted(set(each.predictions) & set(reference.predictions))
    if not seeds:
        return {}
    a, b = [each.predictions[s] for s in seeds], [reference.predictions[s] for s in seeds]
    return {m: repeated_difference(a, b, metric=m, folds=each.fold) for m in METRICS}


def _row_result(
    row: Row,
    read: _Read,
    differences: dict[str, RepeatedDifference],
    p_values: dict[str, dict[str, float]],
) -> RowResult:
    seeds = tuple(sorted(read.predictions))
    values = {
        m: [float(contributions(read.predictions[s], m).mean()) for s in seeds] for m in METRICS
    }
    mine = {m: p[row.name] for m, p in p_values.items() if row.name in p}
    verdict = ""
    if differences:
        verdict = sentence(row.name, differences["accuracy"], mine["accuracy"])
    return RowResult(
        row=row, seeds=seeds, values=values, differences=differences, p_values=mine,
        verdict=verdict, facts=_facts(read.facts), curves=read.curves,
        evaluation=evaluate(read.predictions[seeds[0]]) if seeds else None,
    )  # fmt: skip


def _facts(facts: list[dict[str, Any]]) -> dict[str, float]:
    """Parameters, and the medians of what was measured, over runs."""
    found: dict[str, float] = {}
    for key in ("parameters", "seconds", "images_a_second"):
        values = [float(f[key]) for f in facts if key in f]
        if values:
            found[key] = float(np.median(values))
    return found


def sentence(name: str, d: RepeatedDifference, p_value: float) -> str:
    """What a difference of accuracy shows, and how large a one this study could have shown."""
    told = f"{100 * d.value:+.1f} points (95 % interval {100 * d.low:+.1f} to {100 * d.high:+.1f})"
    better = d.value > 0 if d.metric not in LOWER_IS_BETTER else d.value < 0
    if not d.claims:
        return (
            f"{name}: {told} with one training of each: another seed may well say otherwise, so "
            "nothing is shown."
        )
    if p_value <= ALPHA:
        return f"{name} is shown to be {'better' if better else 'worse'}: {told}."
    needed = d.seeds_needed()
    more = (
        f"about {needed} seeds would settle a difference of this size"
        if needed is not None and needed > d.seeds
        else "more seeds would not settle it, more test images might"
    )
    return (
        f"{name} is not shown to be better or worse: {told}; this study could have shown a "
        f"difference of {100 * d.minimal_effect:.1f} points, and {more}."
    )


def to_dict(result: StudyResult) -> dict[str, Any]:
    """For study.json: the same runs give the same content, whatever the machine did meanwhile."""
    return {
        "study": result.table.key,
        "title": result.table.title,
        "seeds": result.seeds,
        "folds": result.folds,
        "done": result.done,
        "total": result.total,
        "images": result.images,
        "groups": result.groups,
        "rows": [_row_dict(row) for row in result.rows],
        "failed": {str(run): why for run, why in result.failed.items()},
        "commands": [str(run) for run in result.runs],
    }


def _row_dict(row: RowResult) -> dict[str, Any]:
    return {
        "name": row.row.name,
        "network": row.row.network,
        "evaluation": dict(row.row.evaluation),
        "paper": dict(row.row.paper),
        "parameters": row.facts.get("parameters"),
        "seeds": list(row.seeds),
        "values": row.values,
        "differences": {
            m: {**d.to_dict(), "p_value_holm": _finite(row.p_values[m])}
            for m, d in row.differences.items()
        },
        "verdict": row.verdict,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_results(result: StudyResult, out: Path) -> None:
    """Writes study.json and study.csv, a line per row.

    Raises:
        StateError: they can't be written.
    """
    text = json.dumps(to_dict(result), indent=2, allow_nan=False) + "\n"
    write_atomically(out / "study.json", lambda path: path.write_text(text, encoding="utf-8"))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    head = ["row", "network", "seeds", "parameters", "training seconds", "training images/s"]
    for metric in METRICS:
        head += [metric, f"{metric} sd", f"{metric} difference", "low", "high", "p (Holm)"]
    writer.writerow([*head, "verdict"])
    for row in result.rows:
        cells: list[Any] = [row.row.name, row.row.network, len(row.seeds)]
        cells += [_cell(row.facts.get(k)) for k in ("parameters", "seconds", "images_a_second")]
        for metric in METRICS:
            d = row.differences.get(metric)
            numbers = [row.mean(metric), row.sd(metric)]
            numbers += [d.value, d.low, d.high, row.p_values[metric]] if d else [math.nan] * 4
            cells += [_cell(n) for n in numbers]
        writer.writerow([*cells, row.verdict])
    write_atomically(
        out / "study.csv", lambda path: path.write_text(buffer.getvalue(), encoding="utf-8")
    )


def _cell(number: float | None) -> str:
    return "" if number is None or not math.isfinite(number) else f"{number:.6g}"
