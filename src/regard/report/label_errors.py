"""Labels that may be wrong: images ranked by the loss of networks that were not trained on them.

A run's test and validation images are out of sample for it. Given all folds of a cross-validation,
every image is. Images that all given runs were trained on are ranked by a loss that
training has lowered, so that many of their label errors are missed; they are marked.
"""

import csv
import io
import os
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from regard.data.content import UNREADABLE
from regard.data.sources import open_data
from regard.data.splits_file import read_rows
from regard.data.table import ImageTable
from regard.errors import UsageError
from regard.extras import is_installed
from regard.files import lacking, plural, write_text
from regard.report.data_page import Pictures
from regard.report.words import percent
from regard.run_data import predictions_of
from regard.runs import RunFolder
from regard.trained_on import Overlap, own_table

_SMALLEST = 1e-12  # lower bound of a probability


@dataclass(frozen=True)
class Suspect:
    """An image and the networks' view of its label.

    Attributes:
        rank: from 1; the highest loss first.
        path, label: of the image.
        predicted: the most probable class.
        probability, predicted_probability: of the label and of that class, averaged over the runs.
        loss: cross entropy of the label, natural logarithm.
        out_of_sample: whether neither those runs nor the weights that they started from were
            trained on the image or an exact copy of it.
        runs: number of runs whose probabilities were averaged.
        cleanlab: whether confident learning considers the label wrong; None: cleanlab is not
            installed, or can't judge, as the image is not out of sample, no other image has its
            label, or fewer than two out-of-sample images have the predicted class as theirs.
    """

    rank: int
    path: str
    label: str
    predicted: str
    probability: float
    predicted_probability: float
    loss: float
    out_of_sample: bool
    runs: int
    cleanlab: bool | None


class _Sums:
    """Probabilities by path, summed over runs, separately out of sample and in sample."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.labels: dict[str, int] = {}
        self.sums: dict[bool, dict[str, tuple[NDArray[np.float64], int]]] = {True: {}, False: {}}

    def add(
        self, paths: Iterable[str], labels: Any, probabilities: Any, in_sample: Container[str]
    ) -> None:
        """Adds one run's probabilities for images, some of which are in its sample."""
        for path, label, row in zip(paths, labels.tolist(), probabilities, strict=True):
            self.labels[path] = label
            sums = self.sums[path not in in_sample]
            total, count = sums.get(path, (np.zeros(len(self.classes)), 0))
            sums[path] = total + row, count + 1

    def take(self, path: str) -> tuple[NDArray[np.float64], int, bool]:
        """Mean probabilities, the number of runs, and whether they are out of sample; drops them.

        With ImageNet's classes they are most of the memory.
        """
        held_out = path in self.sums[True]
        total, count = self.sums[held_out].pop(path)
        return total / count, count, held_out


def runs_below(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The finished runs among these folders or below them.

    Raises:
        UsageError: a folder neither is nor contains one.
    """
    runs: list[Path] = []
    for folder in map(Path, folders):
        below = [folder] if (folder / "run.json").is_file() else sorted(
            path.parent for path in folder.rglob("run.json")
        )  # fmt: skip
        finished = [path for path in below if RunFolder(path).finished]
        if not finished:
            raise UsageError(lacking(folder, "finished run"))
        runs += [path for path in finished if path not in runs]
    return runs


def find_label_errors(
    folders: Sequence[str | os.PathLike[str]],
    *,
    data: str | None = None,
    root: str | Path | None = None,
) -> tuple[list[Suspect], ImageTable]:
    """All images of the runs' data, those with the least probable label first.

    Args:
        folders: runs on the same data, such as the folds of a cross-validation, or folders that
            contain them.
        data: where the data is now; default: where it was when the runs were trained.
        root: folder of cifar10 and cifar100.

    Returns:
        The images, and the table of the first run.

    Raises:
        UsageError: no finished run, or runs on different data or classes.
        FileError: no image can be read.
    """
    runs = runs_below(folders)
    plan = RunFolder(runs[0]).read_plan()
    sums = _Sums(plan["classes"])
    for run in runs:
        other = RunFolder(run).read_plan()
        if other["classes"] != plan["classes"] or not (data or _same_data(other, plan)):
            both = f"{run} and {runs[0]} were trained on different data"
            if other["classes"] == plan["classes"]:
                both += (
                    f", {other['data']} and {plan['data']}: if the images are the same, say with "
                )
                both += "`data` where they are"
            raise UsageError(both)
        copies = _trained_copies(run)
        for split in RunFolder(run).read_facts()["counts"]:
            used: set[str] = set()
            _, said, _ = predictions_of(
                run, data, root=root, choose=partial(_of_split, split, copies, used),
                warn=not sums.labels,
            )  # fmt: skip
            sums.add(said.paths or [], said.labels, said.probabilities, used)
    table = own_table(runs[0], plan, root) if data is None else open_data(data, root=root)
    return _ranked(sums), table


def _same_data(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two runs name the same data, however they spell its path."""
    if a["data"] == b["data"]:
        return True
    named = any(plan["data"].startswith("hf:") for plan in (a, b))  # configurations share a place
    return not named and a.get("location") == b.get("location") not in (None, "")


def _trained_copies(run: Path) -> set[str]:
    """Keys of images that did not train a run, but whose content did, under another name."""
    file = run / "splits.csv"
    rows = list(read_rows(file)) if file.is_file() else []
    trained = {row.content for row in rows if row.split == "train"} - {UNREADABLE}
    return {row.key for row in rows if row.split != "train" and row.content in trained}


def _of_split(
    split: str, copies: set[str], used: set[str], table: ImageTable, shared: Overlap | None
) -> tuple[str, ImageTable]:
    """The images of a split; those that trained the run or its starting weights go to `used`.

    Args:
        split: its name.
        copies: keys of further images that trained the run.
        used: gets paths.
        table: all images of the run.
        shared: what they have in common with the run's.
    """
    found = table.select(table.splits == split)
    if not len(found):
        raise UsageError(f"{table.name} has no {split} images, as the run had")
    trained = np.array([split == "train" or found.key(i) in copies for i in range(len(found))])
    if shared is not None and shared.started is not None:
        trained |= shared.started[table.splits == split] == "train"
    used.update(found.path(i) for i in np.flatnonzero(trained).tolist())
    return split, found


def _ranked(sums: _Sums) -> list[Suspect]:
    paths = list(sums.labels)
    labels = np.array([sums.labels[path] for path in paths], np.int64)
    probabilities = np.empty((len(paths), len(sums.classes)))
    runs, held_out = np.empty(len(paths), int), np.empty(len(paths), bool)
    for i, path in enumerate(paths):
        probabilities[i], runs[i], held_out[i] = sums.take(path)
    own = probabilities[np.arange(len(paths)), labels]
    losses = -np.log(np.maximum(own, _SMALLEST))
    confident = _confident(labels, probabilities, held_out)
    suspects = []
    for rank, i in enumerate(np.lexsort((np.arange(len(paths)), -losses)).tolist(), start=1):
        best = int(probabilities[i].argmax())
        suspects.append(Suspect(
            rank, paths[i], sums.classes[labels[i]], sums.classes[best], float(own[i]),
            float(probabilities[i, best]), float(losses[i]), bool(held_out[i]), int(runs[i]),
            confident.get(i),
        ))  # fmt: skip
    return suspects


def _confident(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], held_out: NDArray[np.bool_]
) -> dict[int, bool]:
    """cleanlab's confident learning: whether each out-of-sample image has a label error.

    Northcutt, Jiang and Chuang, Confident Learning, JAIR 2021 (arXiv 1911.00068). It compares
    classes of at least two labels: images that have or look like another one are left out.
    """
    counts = np.bincount(labels[held_out], minlength=probabilities.shape[1])
    present = np.flatnonzero(counts > 1)
    at = np.flatnonzero(held_out & np.isin(labels, present))
    if not is_installed("cleanlab") or len(present) < 2:
        return {}
    from cleanlab.filter import find_label_issues

    chosen = probabilities[np.ix_(at, present)]
    np.maximum(chosen, _SMALLEST, out=chosen)
    chosen /= chosen.sum(axis=1, keepdims=True)
    issues = find_label_issues(np.searchsorted(present, labels[at]), chosen, n_jobs=1)
    judged = np.isin(probabilities[at].argmax(axis=1), present)
    return dict(zip(at[judged].tolist(), map(bool, issues[judged].tolist()), strict=True))


# ---- as files


def to_csv(suspects: Sequence[Suspect]) -> str:
    """CSV with one line per image."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = list(Suspect.__dataclass_fields__)
    writer.writerow(columns)
    for s in suspects:
        row = [getattr(s, c) for c in columns]
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
    return file.getvalue()


def write_errors_page(
    suspects: Sequence[Suspect], table: ImageTable, path: str | os.PathLike[str]
) -> None:
    """Writes a self-contained page with the pictures of these images.

    Raises:
        StateError: it can't be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    folder = resources.files("regard.report")
    template = environment.from_string(folder.joinpath("errors_page.html").read_text("utf-8"))
    pictures = Pictures(table)
    items = [{"s": s, "picture": pictures.one(pictures.row(s.path))} for s in suspects]
    page = template.render(
        css=folder.joinpath("base.css").read_text("utf-8"), name=table.name, items=items,
        note=sample_note(suspects), others=sum(s.predicted != s.label for s in suspects),
    )  # fmt: skip
    write_text(Path(path), page.encode("utf-8", "backslashreplace").decode())


def sample_note(suspects: Sequence[Suspect]) -> str:
    """How many of the images trained every given run, and what that means for their rank."""
    inside = sum(not s.out_of_sample for s in suspects)
    if not inside:
        return "Each image is ranked by networks that were not trained on it."
    return (
        f"{plural(inside, 'image')} of {len(suspects):,} trained every network given, which may "
        "have learned their labels by heart: give the folds of a cross-validation together"
    )
