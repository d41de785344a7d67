"""What the folders of a row's runs say besides predictions: cost, length, and how far its maps
can be believed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regard.evaluation import Predictions
from regard.evaluation.metrics import ClassificationStatistics
from regard.papers import Row
from regard.runs import RunFolder

MAPS = ("attention", "Grad-CAM")
"""What faithfulness is stated of: the mean over a network's own maps, and Grad-CAM's."""

FAITHFULNESS = (
    "Faithfulness: how much higher the probability of the class stays while the pixels that a map "
    "ranks highest are inserted into a blurred image than while they are deleted from the image "
    "(mean height of both curves, 0 to 1), above the same difference for random maps; 0 is no "
    "better than random, and a network without maps over positions has a dash."
)


def medians(facts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Parameters, multiply-adds, and the medians of what was measured, over runs."""
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
    """The paper's metrics of each seed, in the paper's unit; without those not measured here."""
    wanted = [name for name in paper if name in _PRINTED]
    found: dict[str, list[float]] = {}
    for one in seeds if wanted else ():
        values = ClassificationStatistics(one)(np.ones(len(one)))
        for name in wanted:
            ours, unit = _PRINTED[name]
            if ours in values:  # there is no top5 of five classes
                found.setdefault(name, []).append(float(unit(values[ours])))
    return found


def recalls_of(seeds: Sequence[Predictions]) -> dict[str, list[float]]:
    """By class that has images, the recall of each seed."""
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

    "attention" is the mean over the network's own maps, which are listed as well, and none of
    which is chosen for its score. Empty for runs without scores.
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
    """The values of each seed that has them, by map; the attention first."""
    names = dict.fromkeys([*MAPS, *(name for each in seeds for name in each)])
    values = {name: [each[name] for each in seeds if name in each] for name in names}
    return {name: found for name, found in values.items() if found}


# ---- length --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Length:
    """How long a row was trained, and how long its recipe is.

    Attributes:
        recipe: its name.
        steps, epochs: of a run.
        images: training images.
        recipe_length: in words, such as "160,000 steps"; empty: the images decide.
        milestones: the epochs after which the learning rate changes.
    """

    recipe: str
    steps: int
    epochs: float
    images: int
    recipe_length: str
    milestones: tuple[float, ...]

    def sentence(self) -> str:
        """What was trained, and what was shortened."""
        told = (
            f"{self.epochs:.3g} epochs ({self.steps:,} steps) of {self.images:,} images with the "
            f"recipe {self.recipe}"
        )
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
        facts: of its finished runs.
        recipe: of one of them, as it was trained.
        base: values of the recipe without changes, with its `name`; empty where it is not known.
    """
    first = facts[0]
    if not first.get("steps") or not first.get("epochs"):
        return None
    unit = first["epochs"] / first["steps"] if recipe.get("schedule_unit") == "steps" else 1.0
    own = ""
    if base.get("steps"):
        own = f"{base['steps']:,} steps"
    elif base.get("epochs"):
        own = f"{base['epochs']:g} epochs"
    return Length(
        base.get("name") or row.recipe or "", first["steps"], round(first["epochs"], 4),
        first.get("counts", {}).get("train", 0), own,
        tuple(round(m * unit, 4) for m in recipe.get("milestones", ())),
    )  # fmt: skip
