"""The results of a study's finished runs, with a conclusion in one sentence per row.

study.json holds what is the same whenever the same runs are evaluated; what depends on the machine
and its load (times) is in study.csv and on the page.
"""

import contextlib
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from regard.errors import UsageError
from regard.evaluation import Estimate, Predictions
from regard.evaluation.intervals import finite_or_none
from regard.evaluation.repeats import (
    LOWER_IS_BETTER,
    METRICS,
    RepeatedDifference,
    contributions,
    repeated_difference,
    repeated_value,
)
from regard.evaluation.significance import holm
from regard.files import signed_range, write_atomically
from regard.papers import Row, Table
from regard.runs import RunFolder
from regard.studies.facts import (
    MAPS,
    Length,
    as_printed,
    by_map,
    check_alike,
    check_same_data,
    check_sizes,
    faithfulness_of,
    length_of,
    medians,
    recalls_of,
)
from regard.studies.plan import PlannedRun
from regard.studies.runner import failure_of, is_finished

ALPHA = 0.05
_SIZES = ("parameters", "multiply_adds")


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One row of a study.

    Attributes:
        row: the row, with the paper's numbers.
        seeds: the seeds for which all folds are finished.
        values: by metric, the value of each seed, over all folds together.
        intervals: by metric, the mean over seeds with its interval over seeds and images.
        printed: by the paper's metric, in the paper's unit, the value of each seed.
        recalls: by class, the recall of each seed.
        differences: to the reference, by metric; empty for the reference itself.
        p_values: adjusted by Holm's correction over the compared rows, by metric.
        verdict: the conclusion on accuracy, in one sentence.
        facts: parameters, multiply-adds, and medians of measured times, of the finished runs.
        curves: metrics.csv of each finished run.
        faithfulness: by map, the value of each seed: see `facts.faithfulness_of`.
        length: how long it was trained, and its recipe's length; None: nothing is finished.
    """

    row: Row
    seeds: tuple[int, ...]
    values: dict[str, list[float]]
    intervals: dict[str, Estimate] = field(default_factory=dict)
    printed: dict[str, list[float]] = field(default_factory=dict)
    recalls: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, RepeatedDifference] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    curves: list[list[dict[str, float]]] = field(default_factory=list)
    faithfulness: dict[str, list[float]] = field(default_factory=dict)
    length: Length | None = None

    @property
    def _all(self) -> dict[str, list[float]]:
        return self.values | self.printed | self.faithfulness

    def mean(self, metric: str) -> float:
        """The mean over seeds of a metric or of a map's faithfulness; NaN if none is finished."""
        values = self._all.get(metric, [])
        return float(np.mean(values)) if values else math.nan

    def sd(self, metric: str) -> float:
        """The standard deviation over seeds; NaN for fewer than two."""
        values = self._all.get(metric, [])
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The results of a study so far.

    Attributes:
        table: the study.
        rows: in the table's order; the first is the reference.
        seeds, folds: as planned.
        done, total: numbers of runs.
        failed: the reason for each failed run.
        precisions: in how many runs each precision was used, if there are several.
        temperatures: at how many temperatures the faithfulness of maps was measured.
        runs: all of them, with their commands.
        images: number of test images, over all folds; 0 if nothing is finished.
        groups: number of their groups, or None.
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
    precisions: dict[str, int] = field(default_factory=dict)
    temperatures: int = 1

    @property
    def caution(self) -> str:
        """What differs between the runs: precisions, and the temperatures of faithfulness.

        A sentence for each, empty if the runs are alike.
        """
        said = []
        if self.precisions:
            shares = " and ".join(f"{n} in {name}" for name, n in self.precisions.items())
            said.append(
                f"The runs were not computed alike ({shares}): unless this is what the rows "
                "compare, set the precision, as a difference between them may come from it."
            )
        if self.temperatures > 1:
            said.append(
                f"The faithfulness of maps was measured at {self.temperatures} temperatures (of "
                "`regard calibrate`): a difference between rows may come from them."
            )
        return " ".join(said)


def gather(
    table: Table,
    runs: Sequence[PlannedRun],
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
) -> StudyResult:
    """Reads the finished runs and compares each row with the first.

    Args:
        table: the study.
        runs: all of its runs, whichever process or machine trained them.
        recipes: by row, the values of its unchanged recipe, to say what was shortened.

    Raises:
        UsageError: the runs were tested on different images or chose different sizes, or those
            of a row were trained with different recipes.
    """
    seeds = sorted({run.seed for run in runs})
    folds = max(1, len({run.fold for run in runs}))
    read = {row.name: _read_row(row, runs, seeds, folds) for row in table.rows}
    folders = [folder for each in read.values() for folder in each.folders]
    check_sizes(folders)
    check_same_data(folders)
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
        _row_result(
            row, read[row.name], differences.get(row.name, {}), p_values,
            (recipes or {}).get(row.name, {}),
        )
        for row in table.rows
    ]  # fmt: skip
    first = next((p for each in read.values() for p in each.predictions.values()), None)
    groups = None if first is None or first.groups is None else len(np.unique(first.groups))
    return StudyResult(
        table=table, rows=rows, seeds=len(seeds), folds=folds,
        done=sum(is_finished(run) for run in runs), total=len(runs), runs=list(runs),
        images=0 if first is None else len(first), groups=groups,
        failed={run: why for run in runs if (why := failure_of(run)) and not is_finished(run)},
        precisions=_precisions(read.values()),
        temperatures=_temperatures(read.values()),
    )  # fmt: skip


@dataclass
class _Read:
    """A row's finished seeds: predictions of all folds together, and the fold of each image."""

    predictions: dict[int, Predictions] = field(default_factory=dict)
    fold: Any = None
    facts: list[dict[str, Any]] = field(default_factory=list)
    curves: list[list[dict[str, float]]] = field(default_factory=list)
    faithfulness: dict[int, dict[str, float]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)


def _read_row(row: Row, runs: Sequence[PlannedRun], seeds: list[int], folds: int) -> _Read:
    read = _Read()
    for seed in seeds:
        mine = [r for r in runs if r.row == row.name and r.seed == seed]
        finished = [r for r in mine if is_finished(r)]
        for run in finished:
            folder = RunFolder(run.folder)
            read.facts.append(folder.read_facts())
            read.curves.append(folder.read_metrics())
            read.recipe = folder.read_recipe()
            read.folders.append(run.folder)
        if len(finished) == len(mine) == folds:
            parts = [RunFolder(r.folder).read_named(r.predictions)[1] for r in finished]
            read.predictions[seed], read.fold = _joined(parts)
            read.faithfulness[seed] = faithfulness_of([r.folder for r in finished])
    check_alike(row.name, read.folders)
    return read


def _precisions(rows: Iterable[_Read]) -> dict[str, int]:
    """In how many runs each precision was used; empty if it is the same in all."""
    used = Counter(
        facts["precision"] for row in rows for facts in row.facts if "precision" in facts
    )
    return dict(sorted(used.items())) if len(used) > 1 else {}


def _temperatures(rows: Iterable[_Read]) -> int:
    """At how many temperatures the faithfulness of the runs' maps was measured, at least 1."""
    stored = [RunFolder(f).read_faithfulness() for row in rows for f in row.folders]
    return max(1, len({found.get("temperature", 1.0) for found in stored if found["maps"]}))


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
    first: tuple[str, Predictions, Any] | None = None
    for name, each in read.items():
        for predictions in each.predictions.values():
            if first is None:
                first = name, predictions, each.fold
            elif predictions.paths != first[1].paths or not np.array_equal(each.fold, first[2]):
                raise UsageError(
                    f"{name!r} and {first[0]!r} were tested on different images, or in different "
                    "folds: their differences would not be paired"
                )


def _compare(each: _Read, reference: _Read) -> dict[str, RepeatedDifference]:
    seeds = sorted(set(each.predictions) & set(reference.predictions))
    if not seeds:
        return {}
    a, b = [each.predictions[s] for s in seeds], [reference.predictions[s] for s in seeds]
    trained = _trained(each, reference)
    return {
        m: repeated_difference(a, b, metric=m, folds=each.fold, trained=trained) for m in METRICS
    }


def _trained(*rows: _Read) -> float:
    """Mean number of images that trained a network of these rows."""
    return float(np.mean([facts["counts"]["train"] for row in rows for facts in row.facts]))


def _row_result(
    row: Row,
    read: _Read,
    differences: dict[str, RepeatedDifference],
    p_values: dict[str, dict[str, float]],
    base: Mapping[str, Any],
) -> RowResult:
    seeds = tuple(sorted(read.predictions))
    said = [read.predictions[s] for s in seeds]
    values = {m: [float(contributions(p, m).mean()) for p in said] for m in METRICS}
    mine = {m: p[row.name] for m, p in p_values.items() if row.name in p}
    verdict = ""
    if differences:
        verdict = sentence(row.name, differences["accuracy"], mine["accuracy"])
    return RowResult(
        row=row, seeds=seeds, values=values, differences=differences, p_values=mine,
        verdict=verdict, facts=medians(read.facts), curves=read.curves,
        intervals={
            m: repeated_value(said, metric=m, folds=read.fold, trained=_trained(read))
            for m in METRICS if said
        },
        printed=as_printed(said, row.paper), recalls=recalls_of(said),
        faithfulness=by_map([read.faithfulness[s] for s in seeds]),
        length=length_of(row, read.facts, read.recipe, base) if read.facts else None,
    )  # fmt: skip


def sentence(name: str, d: RepeatedDifference, p_value: float) -> str:
    """What a difference in accuracy shows, and the smallest that this study would have shown."""
    value, low, high = signed_range(100 * d.value, 100 * d.low, 100 * d.high, 1)
    shown = f"{value} points (95 % interval {low} to {high})"
    better = d.value > 0 if d.metric not in LOWER_IS_BETTER else d.value < 0
    if not d.claims:
        return (
            f"{name}: {shown} with one training of each: another seed may well say otherwise, so "
            "nothing is shown."
        )
    if p_value <= ALPHA:
        return f"{name} is shown to be {'better' if better else 'worse'}: {shown}."
    needed = d.seeds_needed()
    more = (
        f"about {needed} seeds would settle a difference of this size"
        if needed is not None and needed > d.seeds
        else "more seeds would not settle it, but more test images might"
    )
    could = "no difference could have been shown by this study"
    if math.isfinite(d.minimal_effect):
        points = 100 * d.minimal_effect
        could = f"this study could have shown a difference of {points:.1f} points"
    return f"{name} is not shown to be better or worse: {shown}; {could}, and {more}."


def to_dict(result: StudyResult) -> dict[str, Any]:
    """A dict for study.json: the same for the same runs, whatever the machine's load was."""
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
        "precisions": result.precisions,
        "failed": {str(run): why for run, why in result.failed.items()},
        "commands": [str(run) for run in result.runs],
    }


def _row_dict(row: RowResult) -> dict[str, Any]:
    return {
        "name": row.row.name,
        "network": row.row.network,
        "evaluation": dict(row.row.evaluation),
        "paper": dict(row.row.paper),
        **{k: int(row.facts[k]) if k in row.facts else None for k in _SIZES},
        "length": None if row.length is None else asdict(row.length),
        "seeds": list(row.seeds),
        "values": row.values,
        "intervals": {m: e.to_dict() for m, e in row.intervals.items()},
        "printed": row.printed,
        "recall": row.recalls,
        "faithfulness": {
            name: {"mean": row.mean(name), "sd": finite_or_none(row.sd(name)), "values": values}
            for name, values in row.faithfulness.items()
        },
        "differences": {
            m: {**d.to_dict(), "p_value_holm": finite_or_none(row.p_values[m])}
            for m, d in row.differences.items()
        },
        "verdict": row.verdict,
    }


@contextlib.contextmanager
def results_lock(out: Path) -> Iterator[None]:
    """While held, no other part of the study reads the runs and writes the results.

    So the last part to end writes the results of all of them.
    """
    lock = FileLock(out / ".study.lock")
    try:
        lock.acquire(timeout=60)
    except (Timeout, NotImplementedError, OSError):  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def write_results(result: StudyResult, out: Path) -> None:
    """Writes study.json and study.csv, one line per row.

    Raises:
        StateError: they can't be written.
    """
    text = json.dumps(to_dict(result), indent=2, allow_nan=False) + "\n"
    write_atomically(out / "study.json", lambda path: path.write_text(text, encoding="utf-8"))
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(_HEAD)
    writer.writerows(_line(row) for row in result.rows)
    write_atomically(
        out / "study.csv", lambda path: path.write_text(buffer.getvalue(), encoding="utf-8")
    )


_FACTS = {
    "parameters": "parameters",
    "multiply-adds": "multiply_adds",
    "training seconds": "seconds",
    "training images/s": "images_a_second",
}
_OF_A_METRIC = ("{}", "{} low", "{} high", "{} sd")
_OF_A_DIFFERENCE = ("{} difference", "{} difference low", "{} difference high", "{} p (Holm)")
_HEAD = [
    "row", "network", "seeds", *_FACTS,
    *(name.format(m) for m in METRICS for name in (*_OF_A_METRIC, *_OF_A_DIFFERENCE)),
    *(name.format(f"{m} faithfulness") for m in MAPS for name in ("{}", "{} sd")), "verdict",
]  # fmt: skip


def _line(row: RowResult) -> list[Any]:
    """A row of study.csv, in the order of _HEAD."""
    numbers: list[float | None] = [row.facts.get(key) for key in _FACTS.values()]
    for metric in METRICS:
        own, d = row.intervals.get(metric), row.differences.get(metric)
        numbers += [own.value, own.low, own.high] if own else [None] * 3
        numbers += [row.sd(metric)]
        ends = [round(float(x), 12) + 0.0 for x in (d.value, d.low, d.high)] if d else []
        numbers += [*ends, row.p_values[metric]] if d else [None] * 4
    numbers += [number for name in MAPS for number in (row.mean(name), row.sd(name))]
    cells = [_cell(number) for number in numbers]
    return [row.row.name, row.row.network, len(row.seeds), *cells, row.verdict]


def _cell(number: float | None) -> str:
    return "" if number is None or not math.isfinite(number) else f"{number:.6g}"
