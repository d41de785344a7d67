"""What the folders of a row's runs contain besides predictions: cost, length, and faithfulness of
the maps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm

from regard.data.splits_file import Row as ImageRow
from regard.data.splits_file import read_rows
from regard.errors import UsageError
from regard.evaluation import Predictions
from regard.evaluation.metrics import ClassificationStatistics
from regard.files import plural
from regard.papers import Row
from regard.runs import RunFolder

MAPS = ("attention", "Grad-CAM")
"""Maps whose faithfulness is reported: the mean over a network's own maps, and Grad-CAM's."""

FAITHFULNESS = (
    "Faithfulness: how much higher the probability of the class stays while the pixels that a map "
    "ranks highest are inserted into a blurred image than while they are deleted from the image "
    "(mean height of both curves, 0 to 1), above the same difference for random maps; 0 is no "
    "better than random, and a network without maps over positions has a dash."
)


def medians(facts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Parameters, multiply-adds, and the medians over runs of measured values."""
    found: dict[str, float] = {}
    for key in ("parameters", "multiply_adds", "seconds", "images_a_second"):
        values = [float(f[key]) for f in facts if key in f]
        if values:
            found[key] = float(np.median(values))
    return found


# ---- predictions -------------------------------------------------------------------------
_PRINTED = {  # the papers' metrics: the name in `evaluate`, and from it to the paper's unit
    "top1_error": ("top1", lambda share: 100 * (1 - share)),
    "top5_error": ("top5", lambda share: 100 * (1 - share)),
    "accuracy": ("top1", lambda share: share),
    "f1": ("macro_f1", lambda share: share),
    "precision": ("macro_precision", lambda share: share),
    "recall": ("macro_recall", lambda share: share),
}


def as_printed(seeds: Sequence[Predictions], paper: Iterable[str]) -> dict[str, list[float]]:
    """The paper's metrics for each seed, in the paper's unit; unmeasured ones are omitted."""
    wanted = [name for name in paper if name in _PRINTED]
    found: dict[str, list[float]] = {}
    for one in seeds if wanted else ():
        values = ClassificationStatistics(one)(np.ones(len(one)))
        for name in wanted:
            ours, unit = _PRINTED[name]
            if ours in values:  # five classes have no top5
                found.setdefault(name, []).append(float(unit(values[ours])))
    return found


def recalls_of(seeds: Sequence[Predictions]) -> dict[str, list[float]]:
    """For each class that has images, the recall of each seed."""
    found: dict[str, list[float]] = {}
    for one in seeds:
        correct = one.probabilities.argmax(axis=1) == one.labels
        counts = np.bincount(one.labels, minlength=len(one.classes))
        hits = np.bincount(one.labels, correct, len(one.classes))
        for k in np.flatnonzero(counts).tolist():
            found.setdefault(one.classes[k], []).append(float(hits[k] / counts[k]))
    return found


# ---- faithfulness --------------------------------------------------------------------------
def faithfulness_of(folders: Iterable[Path]) -> dict[str, float]:
    """Faithfulness above random maps, by map, as the mean over the runs of a seed's folds.

    "attention" is the mean over the network's own maps, which are listed as well; none is
    selected by its score. Empty for runs without scores.
    """
    found: dict[str, list[float]] = {}
    for folder in folders:
        own = []
        for name, scores in RunFolder(folder).read_faithfulness()["maps"].items():
            if (value := (scores.get("over_random") or {}).get("value")) is None:
                continue
            found.setdefault(name, []).append(value)
            if scores.get("kind") == "attention":
                own.append(value)
        if own:
            found.setdefault("attention", []).append(float(np.mean(own)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def by_map(seeds: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """By map, the values of the seeds that have it; the attention first."""
    names = dict.fromkeys([*MAPS, *(name for each in seeds for name in each)])
    values = {name: [each[name] for each in seeds if name in each] for name in names}
    return {name: found for name, found in values.items() if found}


# ---- length --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Length:
    """How long a row was trained, and the length of its recipe.

    Attributes:
        recipe: its name.
        steps, epochs: of a run; of the shortest if they differ, as for folds.
        images: number of training images; the lowest.
        most: steps, epochs and images of the longest run.
        recipe_length: as text, such as "160,000 steps"; empty if it depends on the images.
        milestones: the epochs after which the learning rate changes.
    """

    recipe: str
    steps: int
    epochs: float
    images: int
    recipe_length: str
    milestones: tuple[float, ...]
    most: tuple[int, float, int]

    def sentence(self) -> str:
        """How long the row was trained, and what was shortened."""
        steps, epochs, images = (
            one if one == other else f"{one} to {other}"
            for one, other in (
                (f"{self.steps:,}", f"{self.most[0]:,}"),
                (f"{self.epochs:.3g}", f"{self.most[1]:.3g}"),
                (f"{self.images:,}", f"{self.most[2]:,}"),
            )
        )
        told = f"{epochs} epochs ({steps} steps) of {images} images with the recipe {self.recipe}"
        if self.recipe_length:
            told += f", whose own length is {self.recipe_length}"
        if self.milestones:
            epochs = ", ".join(f"{m:.3g}" for m in self.milestones)
            told += f"; the learning rate changes after epoch {epochs}"
        return f"{told}."


def length_of(
    row: Row,
    facts: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    base: Mapping[str, Any],
) -> Length | None:
    """The length of a row's runs.

    Args:
        row: the row.
        facts: measured by its finished runs.
        recipe: of one of them, as it was trained.
        base: values of the unchanged recipe, with its `name`; empty if not known.
    """
    if not all(f.get("steps") and f.get("epochs") for f in facts):
        return None
    steps = [int(f["steps"]) for f in facts]
    epochs = [round(f["epochs"], 4) for f in facts]
    images = [int(f.get("counts", {}).get("train", 0)) for f in facts]
    first = facts[0]
    unit = first["epochs"] / first["steps"] if recipe.get("schedule_unit") == "steps" else 1.0
    own = ""
    if base.get("steps"):
        own = plural(base["steps"], "step")
    elif base.get("epochs"):
        own = f"{base['epochs']:g} epoch" + "s" * (base["epochs"] != 1)
    return Length(
        base.get("name") or row.recipe or "", min(steps), min(epochs), min(images), own,
        tuple(round(m * unit, 4) for m in recipe.get("milestones", ())),
        (max(steps), max(epochs), max(images)),
    )  # fmt: skip


# ---- one recipe ----------------------------------------------------------------------------
OF_THE_MACHINE = (
    "workers", "save_minutes", "memory", "compile", "fuse", "grad_checkpointing",
)  # fmt: skip
"""Recipe values that depend only on the machine: they change no result."""


def check_alike(row: str, folders: Sequence[Path]) -> None:
    """Checks that finished runs, whose results form one row, were trained alike.

    Raises:
        UsageError: two recipes differ in more than seed, fold and values that depend only on the
            machine; or the runs started from different weights.
    """
    recipes = [
        {**RunFolder(folder).read_recipe(), "weights": RunFolder(folder).read_plan().get("weights")}
        for folder in folders
    ]
    for folder, recipe in zip(folders, recipes, strict=True):
        for name in {**recipes[0], **recipe}:
            first, this = recipes[0].get(name), recipe.get(name)
            if name in ("seed", "fold", *OF_THE_MACHINE) or first == this:
                continue
            # a schedule scaled to another number of images, such as that of a fold
            if name in ("milestones", "warmup") and _in_proportion(first, this):
                continue
            raise UsageError(
                f"{row}: {folder} was trained with {name}={shown(this)}, and {folders[0]} with "
                f"{name}={shown(first)}: they can't share a row"
            )


def check_same_data(folders: Iterable[Path]) -> None:
    """Checks that finished runs had the same images under the same names, with the same labels.

    They may have been trained on different parts of the images.

    Raises:
        UsageError: an image's label, group or content differs between two runs.
    """
    known: dict[str, tuple[ImageRow, Path]] = {}
    for folder in folders:
        splits = RunFolder(folder).path / "splits.csv"
        for row in read_rows(splits) if splits.is_file() else ():
            first, where = known.setdefault(row.key, (row, folder))
            if row.label != first.label:
                differ = f"the label {first.label!r} in one and {row.label!r} in the other"
            elif row.group != first.group:
                differ = f"the group {first.group!r} in one and {row.group!r} in the other"
            elif row.content and first.content and row.content != first.content:
                differ = "another content in each"
            else:
                continue
            raise UsageError(
                f"{where} and {folder} were trained on different data: {row.key} has {differ}; "
                "remove the runs of one of them, or give --out another folder"
            )


def check_sizes(folders: Iterable[Path]) -> None:
    """Checks that networks with the same default size were trained on images of one size.

    A run without a given size chooses a larger one if there is a GPU, so parts of a study on
    several machines may differ.

    Raises:
        UsageError: two finished runs chose different sizes.
    """
    first: dict[Any, tuple[Path, list[int]]] = {}
    for folder in folders:
        plan = RunFolder(folder).read_plan()
        if RunFolder(folder).read_recipe().get("size") or "preprocess" not in plan:
            continue
        cfg = timm.models.get_pretrained_cfg(plan["model"])
        own = cfg and cfg.input_size, str(plan["model_args"].get("img_size"))
        size = plan["preprocess"]["input_size"][1:]
        other, before = first.setdefault(own, (folder, size))
        if size != before:
            raise UsageError(
                f"{folder} was trained at {size[0]}x{size[1]} pixels, but {other} at "
                f"{before[0]}x{before[1]} (machines with a GPU choose a larger size): give --size, "
                "and another folder as --out"
            )


def _in_proportion(one: Any, other: Any) -> bool:
    a, b = (np.atleast_1d(np.asarray(v or 0.0, float)) for v in (one, other))
    return a.shape == b.shape and np.allclose(a * b[-1], b * a[-1])


def shown(value: Any) -> str:
    """A recipe's value as text for a message."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value)) or "none"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
