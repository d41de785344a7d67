"""A run's folder: its files, its plan and its splits."""

import contextlib
import csv
import json
import os
import re
import shutil
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import nn

from regard.data.content import UNREADABLE, content_hashes, original_hashes
from regard.data.sources import ImageTable
from regard.data.splits_file import rows_of, write_splits
from regard.errors import FileError, StateError, UsageError
from regard.evaluation import Evaluation, Predictions, evaluate_subgroups, subgroup_columns
from regard.files import lacking, read_npz, reason, write_atomically
from regard.log import Heartbeat

RUNS = Path("runs")
VALIDATION = "validation.npz"  # probabilities of the validation images, as predictions.npz
COLUMN = "column/"  # prefix of further columns' names in predictions.npz
PROGRESS = "REGARD_PROGRESS"  # environment variable with the path for `note_progress`
NOBODYS = (
    ".probe",
    ".regard-demo",
    ".run.json.writing",
    ".lock",
)  # files that make a folder nobody's run


def data_name(data: str | os.PathLike[str]) -> str:
    """A name derived from the data that every file system accepts."""
    named = os.fspath(data).rstrip("/") or "/"
    named = os.path.basename(os.path.abspath(named)) if named in (".", "..", "~") else named
    return re.sub(r"[^\w.-]+", "-", Path(named).stem).strip("-.") or "data"


def choose_out(
    out: str | Path | None, data: str | os.PathLike[str], model: str | None, resume: bool
) -> Path:
    """The run's folder: as given, or runs/DATA-MODEL, with a number if that is taken.

    Raises:
        UsageError: a run is to be resumed, but there is none.
    """
    if out is not None:
        path = Path(out).expanduser()
        if resume and not (path / "run.json").is_file():
            raise UsageError(f"{path} holds no run to resume")
        return path
    base = RUNS / f"{data_name(data)}-{model or 'cbam_resnet18'}"
    taken = [base, *(base.with_name(f"{base.name}-{n}") for n in range(2, 10_000))]
    free = next(i for i, path in enumerate(taken) if not path.exists())
    if not resume:
        return taken[free]
    if free == 0:
        raise UsageError(f"{base} does not exist: no run to resume; give its folder as out")
    return taken[free - 1]


def note_progress(step: int, total: int) -> None:
    """Writes a run's progress to the file in the environment variable, for its parent process."""
    path = os.environ.get(PROGRESS)
    if path:
        beside = f"{path}.writing"
        with contextlib.suppress(OSError):  # a full disk must not end a training
            Path(beside).write_text(f"{step} {total}\n", encoding="utf-8")
            os.replace(beside, path)


def read_progress(path: Path) -> tuple[int, int] | None:
    """The steps done and the total steps of a run, written by `note_progress`, or None."""
    try:
        step, total = map(int, path.read_text(encoding="utf-8").split())
    except (OSError, ValueError):
        return None
    return step, total


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether a run has been started there, with everything needed to continue."""
        return (self.path / "run.json").is_file() and self._run()["status"] != "starting"

    @property
    def finished(self) -> bool:
        """Whether that run has finished, with its network written."""
        return self.exists and self._run()["status"] == "finished"

    def require_finished(self) -> None:
        """Refuses a folder without a finished run.

        Raises:
            UsageError: there is none; the message says what is there.
        """
        if not self.exists:
            raise UsageError(lacking(self.path, "finished run"))
        if not self.finished:
            raise UsageError(f"{self.path} holds a run that has not ended: resume it first")

    def refuse_others(self) -> None:
        """Refuses a folder that holds anything but a run that ended before it started.

        Raises:
            UsageError: it does; the message says what to do.
        """
        if self.exists:
            kind = "a finished run" if self.finished else "a run that has not ended"
            hint = "" if self.finished else "resume it, or "
            raise UsageError(f"{self.path} holds {kind}: {hint}choose another folder as out")
        if self.path.is_file():
            raise UsageError(f"{self.path} is a file: out must be a folder")
        if (self.path / "run.json").is_file() or not self.path.is_dir():
            return
        if any(p.name not in NOBODYS for p in self.path.iterdir()):
            raise UsageError(f"{self.path} holds something else: choose a new folder as out")

    def _run(self) -> dict[str, Any]:
        path = self.path / "run.json"
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
            raise UsageError(f"{path} can't be read ({error})") from error
        if not isinstance(run, dict):
            raise UsageError(f"{path} is damaged: a JSON object is expected")
        kinds: dict[str, type] = {"status": str}
        if run.get("status") != "starting":
            kinds |= {"plan": dict, "facts": dict}
        for key, kind in kinds.items():
            if not isinstance(run.get(key), kind):
                raise UsageError(f"{path} is damaged: it has no {key}")
        return run

    def read_plan(self) -> dict[str, Any]:
        """The plan as a dictionary, as given to `start`."""
        return self._run()["plan"]

    def read_started(self) -> str:
        """When the run was started, in local time."""
        return str(self._run()["started"])

    def read_measured(self) -> dict[str, Any]:
        """What was determined by measuring when the run was started."""
        return self._run().get("measured", {})

    def read_facts(self) -> dict[str, Any]:
        """The measurements of a finished run."""
        return self._run()["facts"]

    def read_recipe(self) -> dict[str, Any]:
        """The resolved recipe, as in its TOML file."""
        return tomllib.loads((self.path / "recipe.toml").read_text(encoding="utf-8"))

    def read_command(self) -> str:
        """The command that started the run, from the header of its recipe; '' if there is none."""
        lines = (self.path / "recipe.toml").read_text(encoding="utf-8").splitlines()
        return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("# ") else ""

    # --------------------------------------------------------------------------- writing
    def _write_run(self, run: dict[str, Any]) -> None:
        self.write_text("run.json", json.dumps(run, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a file in the folder; characters that UTF-8 lacks, as in paths, are escaped."""
        data = text.encode("utf-8", "backslashreplace")
        write_atomically(self.path / name, lambda beside: beside.write_bytes(data))

    def claim(self) -> None:
        """Marks the folder as a run's; until `start`, another run may replace it."""
        if not self.exists:
            self._write_run({"status": "starting"})

    def leave(self) -> None:
        """Undoes `claim` of a run that did not start."""
        with contextlib.suppress(OSError):
            found = {p.name for p in self.path.iterdir()} - set(NOBODYS)
            if not self.exists and found <= {"run.json", "unreadable.csv"}:
                for name in found:
                    (self.path / name).unlink()

    def start(
        self,
        plan: dict[str, Any],
        recipe_text: str,
        table: ImageTable,
        measured: dict[str, Any] | None = None,
    ) -> None:
        """Writes what the run is, run.json last; a resumed run is not changed.

        `measured` is what was determined by measuring, for `read_measured`.
        """
        if self.exists:
            return
        plan = {k: v for k, v in plan.items() if k != "recipe"}
        plan |= {"location": table.location, "reading": table.reading}
        self.write_text("recipe.toml", recipe_text)
        contents = content_hashes(table, Heartbeat("images read to know them again"))
        write_splits(table, self.path / "splits.csv", contents, original_hashes(table))
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write_run({
            "status": "running", "started": started, "plan": plan, "measured": measured or {},
            "facts": {},
        })  # fmt: skip

    def attach(self, table: ImageTable) -> None:
        """Records where the run's data is now, if it was moved."""
        run = self._run()
        before = run["plan"].get("location")
        if before and table.location and not os.path.exists(before):
            run["plan"] |= {"location": table.location, "reading": table.reading}
            with contextlib.suppress(FileError):  # a read-only folder is no obstacle
                self._write_run(run)

    def note_failure(self, failure: dict[str, Any]) -> None:
        """Records in run.json why the run ended early."""
        if self.exists:
            self._write_run({**self._run(), "failure": failure})

    def finish(self, facts: dict[str, Any]) -> None:
        """Records that the run has finished, and its measurements."""
        run = {k: v for k, v in self._run().items() if k != "failure"}  # of an earlier attempt
        self._write_run({**run, "status": "finished", "facts": facts})
        self.keep_best(())
        (self.path / "best.safetensors").unlink(missing_ok=True)  # of an earlier version
        for left in self.path.glob(".writing-*"):  # a whole network of a killed process
            shutil.rmtree(left, ignore_errors=True)
        for left in self.path.glob(".*.writing"):
            left.unlink(missing_ok=True)

    def write_metrics(self, history: list[dict[str, float]]) -> None:
        """metrics.csv: a row for each evaluation."""

        def write(beside: Path) -> None:
            with beside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(history[0]))
                writer.writeheader()
                writer.writerows({k: f"{v:.8g}" for k, v in row.items()} for row in history)

        write_atomically(self.path / "metrics.csv", write)

    def read_metrics(self) -> list[dict[str, float]]:
        """metrics.csv as written."""
        with (self.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

    def write_unreadable(self, found: Iterable[tuple[str, str]]) -> None:
        """unreadable.csv: unreadable images and the reasons; existing entries are kept."""
        path = self.path / "unreadable.csv"
        known: dict[str, str] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
                known = {row["path"]: row["reason"] for row in csv.DictReader(file)}
        known |= dict(found)

        def write(beside: Path) -> None:
            # surrogateescape: a file name may not be UTF-8
            with beside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(["path", "reason"])
                writer.writerows(known.items())

        write_atomically(path, write)

    def write_best(self, model: nn.Module, step: int) -> None:
        """Writes the weights after a step, the best so far; those of states on disk are kept."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        write_atomically(self._best(step), lambda beside: save_file(tensors, beside))

    def read_best(self, model: nn.Module, step: int) -> None:
        """Loads the best weights, those after this step, into the network."""
        path, before = self._best(step), self.path / "best.safetensors"  # without its step
        model.load_state_dict(load_file(before if before.exists() and not path.exists() else path))

    def keep_best(self, steps: Iterable[int]) -> None:
        """Removes the best weights after other steps than these, which no state names any more."""
        kept = {self._best(step) for step in steps}
        for path in self.path.glob("best-*.safetensors"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _best(self, step: int) -> Path:
        return self.path / f"best-{step:09d}.safetensors"

    def write_evaluation(self, split: str, evaluation: Evaluation, said: Predictions) -> None:
        """evaluation.json with the subgroups, and predictions.npz."""
        content = {"split": split, **evaluation.to_dict()}
        if columns := subgroup_columns(said):
            content["subgroups"] = [
                evaluate_subgroups(said, name, bands=bands).to_dict()
                for name, bands in columns.items()
            ]
        self.write_text("evaluation.json", json.dumps(content, indent=1) + "\n")
        write_predictions(self.path / "predictions.npz", split, said)

    def write_faithfulness(self, content: dict[str, Any] | None) -> None:
        """faithfulness.json: how faithful the network's maps are; None removes the file."""
        if content is None:
            (self.path / "faithfulness.json").unlink(missing_ok=True)
        else:
            self.write_text("faithfulness.json", json.dumps(content, indent=1) + "\n")

    def read_faithfulness(self) -> dict[str, Any]:
        """faithfulness.json; without maps if the file is missing or damaged."""
        try:
            content = json.loads((self.path / "faithfulness.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        valid = isinstance(content, dict) and isinstance(content.get("maps"), dict)
        return content if valid else {"images": 0, "maps": {}}

    def read_predictions(self, name: str = "predictions.npz") -> tuple[str, Predictions]:
        """The split, and the probabilities of each of its images.

        Raises:
            StateError: there is no such file, or it is damaged.
        """
        found = read_npz(self.path / name)
        try:
            columns = {k.removeprefix(COLUMN): v for k, v in found.items() if k.startswith(COLUMN)}
            return str(found["split"]), Predictions(
                found["probabilities"], found["labels"], found["classes"].tolist(),
                found.get("groups"), found["paths"].tolist(), columns or None,
            )  # fmt: skip
        except (ValueError, KeyError) as error:
            raise StateError(f"{self.path / name} can't be read ({reason(error)})") from error

    def read_named(self, name: str = "predictions.npz") -> tuple[str, Predictions]:
        """Like `read_predictions`, with names from the images' contents instead of paths.

        Two runs have the same names for the same images, wherever they were. Paths remain if the
        run has no hashes of its images.

        Raises:
            StateError: as in `read_predictions`.
            UsageError: the file of splits is damaged.
        """
        split, said = self.read_predictions(name)
        splits = self.path / "splits.csv"
        rows = rows_of(said.paths or [], splits) if splits.is_file() else None
        if rows is None:
            return split, said
        copies: Counter[int] = Counter()
        names = {}
        for row in sorted(rows, key=lambda row: (row.label, row.key)):
            copies[row.content] += 1
            known = f"{row.content:016x} {copies[row.content]}"
            names[row.key] = known if row.content != UNREADABLE else row.key
        return split, replace(said, paths=[names[row.key] for row in rows])

    def read_validation(self) -> Predictions | None:
        """The stored probabilities of the validation images; None if there are none."""
        for name in (VALIDATION, "predictions.npz"):
            try:
                split, predictions = self.read_predictions(name)
            except StateError:  # they can be computed again
                continue
            if split == "val":
                return predictions
        return None


def write_predictions(path: Path, split: str, said: Predictions) -> None:
    """Writes the predictions for each image of a split, for `RunFolder.read_predictions`.

    Of the further columns, only those that `subgroup_columns` evaluates are stored.

    Raises:
        StateError: the file can't be written.
    """
    arrays: dict[str, Any] = {
        "probabilities": said.probabilities.astype(np.float32, copy=False),
        "labels": said.labels,
        "paths": np.array(said.paths),
        "classes": np.array(said.classes),
        "split": np.array(split),
    }
    if said.groups is not None:
        arrays["groups"] = said.groups
    for name in subgroup_columns(said):
        arrays[COLUMN + name] = np.array([str(v) for v in (said.columns or {})[name]])

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, **arrays)

    write_atomically(path, write)
