"""The runs of a study: its rows, from the papers' tables, from twins, or from a file."""

import logging
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from regard.errors import UsageError
from regard.papers import Row, Table, evaluate_words, load_table, tables, train_command

log: logging.Logger = logging.getLogger(__name__)

SHIPPED = ("twins", "insert")
DEFAULT_MODEL = "cbam_resnet18"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training of a study.

    Attributes:
        row: the name of its row.
        seed: of weights and sample order.
        fold: the test fold, from 1; None: one split.
        folder: the run's folder.
        command: the arguments of `regard` that train it.
        test: the arguments of `regard` that test it afterwards; empty: training tests it.
        predictions: the file in its folder with its test predictions.
    """

    row: str
    seed: int
    fold: int | None
    folder: Path
    command: tuple[str, ...]
    test: tuple[str, ...] = ()
    predictions: str = "predictions.npz"

    def __str__(self) -> str:
        return shlex.join(["regard", *self.command])

    @property
    def log(self) -> Path:
        """The log file of the run's output."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def progress_file(self) -> Path:
        """The file in which a run writes its progress."""
        return self.folder.with_name(f"{self.folder.name}.progress")

    @property
    def failure_file(self) -> Path:
        """The file with the reason why the run failed, shared by all parts of a study."""
        return self.folder.with_name(f"{self.folder.name}.failed")


def open_study(study: str, model: str | None = None) -> Table:
    """A study by name: twins, insert, a paper's table, or a TOML file.

    Args:
        study: its name or path.
        model: the network of twins, or the plain timm network of insert.

    Raises:
        UsageError: no such study, or the network has no twins or can't be grafted.
    """
    if study == "twins":
        return _twins(model or DEFAULT_MODEL)
    if study == "insert":
        return _insert(model or "resnet18")
    if model is not None:
        raise UsageError(f"model={model!r}: only {' and '.join(SHIPPED)} take a network")
    if study not in tables() and not study.endswith(".toml"):
        raise UsageError(
            f"no study {study!r}; choose {', '.join([*SHIPPED, *tables()])}, or a TOML file"
        )
    return load_table(study)


def _twins(name: str) -> Table:
    from regard.models.zoo import twins

    family = twins(name)
    order = [k for k in ("plain", "se") if k in family and family[k] != name]
    rows = [Row(name=f"{k} twin ({family[k]})", network=family[k]) for k in order]
    rows.append(Row(name=name, network=name))
    return Table(key="twins", title=f"{name} and its twins without attention", rows=tuple(rows))


def _insert(name: str) -> Table:
    rows = (
        Row(name=name, network=name),
        Row(name=f"{name} + SE", network=name, changes={"graft": "se"}),
        Row(name=f"{name} + CBAM", network=name, changes={"graft": "cbam"}),
    )
    return Table(key="insert", title=f"{name} with and without inserted attention", rows=rows)


def choose_rows(table: Table, wanted: Sequence[str]) -> Table:
    """The table with only the rows of these names or numbers (from 1); all if none is named.

    Raises:
        UsageError: no row has this name or number.
    """
    if not wanted:
        return table
    names = [row.name for row in table.rows]
    chosen = []
    for word in wanted:
        if word in names:
            chosen.append(names.index(word))
        elif word.isdecimal() and 1 <= int(word) <= len(names):
            chosen.append(int(word) - 1)
        else:
            listed = ", ".join(f"{n} {name!r}" for n, name in enumerate(names, start=1))
            raise UsageError(f"no row {word!r}; the rows are {listed}")
    rows = tuple(table.rows[i] for i in sorted(set(chosen)))
    return replace(table, rows=rows, names=tuple(names))


def with_recipe(table: Table, recipe: str) -> Table:
    """The table with another recipe for all rows; the rows' own changes still apply."""
    rows = tuple(replace(row, recipe=None) for row in table.rows)
    return replace(table, recipe=recipe, rows=rows)


def on_one_data_set(table: Table, data: str | None) -> Table:
    """The table with comparable rows: all of them are tested on the same data set.

    With `data`, rows that differ from an earlier one only in their data set are left out.

    Raises:
        UsageError: the rows' own data sets differ, or there is none.
    """
    if data is None:
        sets = {row.data or table.data for row in table.rows}
        if None in sets:
            raise UsageError(f"study {table.key} needs DATA")
        if len(sets) > 1:
            parts = "; ".join(f"{name}: {_rows_of(table, name)}" for name in sorted(map(str, sets)))
            raise UsageError(
                f"study {table.key} has rows of several data sets, whose images can't be paired: "
                f"name DATA, or the rows of one set ({parts})"
            )
        return table
    kept: list[Row] = []
    for row in table.rows:
        one = _network_of(row)
        if row.data is not None and any(one == _network_of(earlier) for earlier in kept):
            log.info(f"{row.name!r} is left out: on {data} it is the same as an earlier row")
        else:
            kept.append(row)
    return replace(table, rows=tuple(kept))


def _network_of(row: Row) -> Row:
    """The training and test of a row, without its data set and descriptions."""
    return replace(row, data=None, name="", paper={}, note="")


def _rows_of(table: Table, data: str) -> str:
    numbers = [n for n, r in enumerate(table.rows, start=1) if (r.data or table.data) == data]
    return f"rows {' '.join(map(str, numbers))}"


def plan_study(
    table: Table, data: str | None, out: Path, *, seeds: int, folds: int, flags: Sequence[str] = ()
) -> list[PlannedRun]:
    """Every run of a study: row by row within each fold and seed, so that pairs finish together.

    Args:
        table: the study's rows.
        data: for all rows; None: the table's own data set.
        out: the study's folder.
        seeds: number of trainings of each row; seeds 0, 1, ...
        folds: number of cross-validation folds; 1: one split.
        flags: further flags of `regard train`, for all rows.

    Raises:
        UsageError: fewer than one seed or fold.
    """
    if seeds < 1 or folds < 1:
        raise UsageError(f"seeds={seeds}, folds={folds}: give at least 1 of each")
    taken: set[str] = set()
    # of all rows, so that a row's folder does not depend on which others are chosen
    slugs = {name: _slug(name, taken) for name in table.names or [r.name for r in table.rows]}
    runs = []
    for seed in range(seeds):
        for fold in range(1, folds + 1):
            for row in table.rows:
                name = f"seed-{seed}" if folds == 1 else f"fold-{fold}-seed-{seed}"
                folder = out / "runs" / slugs[row.name] / name
                words = [*train_command(table, row, data), *flags, "--seed", str(seed)]
                if folds > 1:
                    words += ["--fold", f"{fold}/{folds}"]
                words += ["--out", str(folder)]
                test, predictions = _test_of(row, folder)
                runs.append(
                    PlannedRun(
                        row=row.name, seed=seed, fold=fold if folds > 1 else None, folder=folder,
                        command=tuple(words), test=test, predictions=predictions,
                    )
                )  # fmt: skip
    return runs


def _test_of(row: Row, folder: Path) -> tuple[tuple[str, ...], str]:
    """The command that tests a row differently from its training, and the predictions' file."""
    words = evaluate_words(row)
    if not words:
        return (), "predictions.npz"
    size = "x".join(w for w in words if w.isdecimal())
    parts = ["predictions", size, "ten-crop" if "--ten-crop" in words else ""]
    name = "-".join(filter(None, parts)) + ".npz"
    return ("evaluate", str(folder), *words, "--predictions", str(folder / name)), name


def _slug(name: str, taken: set[str]) -> str:
    """A folder name for a row, different for each."""
    base = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "row"
    if re.fullmatch(r"(con|prn|aux|nul|(com|lpt)\d)(\..*)?", base):  # Windows device names
        base = f"row-{base}"
    slug, n = base, 2
    while slug in taken:
        slug, n = f"{base}-{n}", n + 1
    taken.add(slug)
    return slug


def choose_part(runs: Sequence[PlannedRun], part: str | None) -> list[PlannedRun]:
    """The i-th of n parts of the runs, "i/n" with i from 1, for a SLURM array; all for None.

    Raises:
        UsageError: `part` is not i/n.
    """
    if part is None:
        return list(runs)
    i, slash, n = part.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise UsageError(f"only={part!r}: give i/n with i from 1 to n, such as 1/8")
    return list(runs)[int(i) - 1 :: int(n)]


def slurm_script(command: Sequence[str], parts: int) -> str:
    """A SLURM array of `parts` jobs, each with its share of the runs."""
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --array=1-{parts}",
            "#SBATCH --cpus-per-task=8",
            "#SBATCH --time=24:00:00",
            "#SBATCH --signal=B:TERM@120",
            "#SBATCH --requeue",
            f"exec regard {shlex.join(command)} --only $SLURM_ARRAY_TASK_ID/{parts}",
            "",
        ]
    )
