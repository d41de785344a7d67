"""The report of a run, made from its folder: `regard report RUN`, and the end of every training."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.attention import attention_kinds
from regard.data.loading import Reader
from regard.data.table import ImageTable
from regard.errors import ImageError, UsageError
from regard.evaluation import Predictions, evaluate
from regard.explanations.explanation import METHODS, Explanation, as_picture, explain_batch
from regard.explanations.faithfulness import Faithfulness, Scorer, summarize
from regard.explanations.gradcam import default_layer, gradcam
from regard.files import plural, spread
from regard.predict import Classifier, load
from regard.report.page import Report, write_report
from regard.runs import RunFolder
from regard.trained_on import own_table

MOST_WRONG, LEAST_SURE, MOST_CLASSES = 12, 6, 12
_SIDE = 576  # of the gallery's images, in pixels: twice as large as they are shown


def report_run(folder: str | Path, device: str = "cpu") -> Path:
    """Writes report.html into a finished run's folder, and returns its path.

    The scores of the maps are written before it, as faithfulness.json.

    Args:
        folder: of the run.
        device: where the network computes, as for `regard.load`.

    Raises:
        UsageError: the folder holds no finished run, or this machine has no such device.
        FileError: the page can't be written.
    """
    run = RunFolder(Path(folder))
    if not run.finished:
        raise UsageError(f"{folder} holds no finished run")
    plan, facts, recipe = run.read_plan(), run.read_facts(), run.read_recipe()
    split, predictions = run.read_predictions()
    source = _Source(run, plan, split, predictions, device)
    shown = list(source.gallery())
    faithfulness = source.faithfulness(recipe["faithfulness_images"], recipe["seed"])
    run.write_faithfulness(None if faithfulness is None else faithfulness.to_dict())
    inserted = recipe.get("graft", "none")
    network = plan["model"] + (f" + {inserted.upper()}" if inserted != "none" else "")
    write_report(
        Report(
            title=f"{network} on {Path(plan['data']).name}: how well, and where it looks",
            model=network,
            summary=_summary(plan, facts, recipe),
            evaluation=evaluate(predictions, seed=recipe["seed"]),
            split=split,
            explanations=shown,
            history=run.read_metrics(),
            chosen=_chosen(facts, recipe),
            versions=facts["versions"],
            command=_command(run.path),
            notes=_notes(split, facts, predictions, len(choose(predictions)) - len(shown)),
            faithfulness=faithfulness,
        ),
        run.path / "report.html",
    )
    return run.path / "report.html"


def _command(folder: Path) -> str:
    """The command of the run, from the header of its recipe."""
    lines = (folder / "recipe.toml").read_text(encoding="utf-8").splitlines()
    return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("# ") else ""


def _summary(plan: dict[str, Any], facts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, str]:
    c, h, w = plan["preprocess"]["input_size"]
    counts = ", ".join(f"{n:,} {split}" for split, n in facts["counts"].items())
    return {
        "Network": f"{plan['model']}, {facts['parameters']:,} parameters, input {c}x{h}x{w}",
        "Images": f"{plan['data']}: {counts}",
        "Starting weights": plan.get("start", ""),
        "Training": f"{plural(facts['steps'], 'step')}, batch size {recipe['batch_size']} "
        f"({facts['epochs']:.3g} epochs) in {facts['seconds']:.0f} s on {facts['device']}, "
        f"{plural(facts['threads'], 'thread')}, seed {recipe['seed']}",
        "Optimizer": f"{recipe['optimizer']}, learning rate {recipe['lr']:g}, {recipe['schedule']}",
    }


def _chosen(facts: dict[str, Any], recipe: dict[str, Any]) -> tuple[float, str] | None:
    """The epoch whose weights were evaluated, and how it was chosen."""
    best = facts.get("best") or {}
    if recipe.get("select") == "best" and best:
        return best["epoch"], (
            f"The weights are those of epoch {best['epoch']:g}, which has the highest validation "
            f"accuracy ({best['val_accuracy']:.1%}; ties go to the lower validation loss)."
        )
    return facts[
        "epochs"
    ], "The weights are those of the last epoch; none was chosen by validation."


def _notes(split: str, facts: dict[str, Any], said: Predictions, left_out: int) -> list[str]:
    notes = []
    if split != "test":
        name = {"val": "validation", "train": "training"}[split]
        notes.append(f"There was no test split: the numbers are those of the {name} images.")
    if split == "val":
        notes.append(
            "The weights were chosen on these images, so the accuracy is higher than on new ones "
            "can be expected."
        )
    if split == "train":
        notes.append("The network was trained on these images: the numbers say little.")
    notes += [
        f"The gallery follows a rule: of the images evaluated it shows the wrong ones (at most "
        f"{MOST_WRONG}, those of highest probability first), the {LEAST_SURE} right ones of lowest "
        f"probability, and the first right one of each class (of at most {MOST_CLASSES} classes).",
        "One split and one seed: how much the numbers vary between seeds was not measured.",
    ]
    notes += [f"The data: {warning}" for warning in facts.get("warnings", [])]
    if facts["unreadable"]:
        notes.append(f"{plural(facts['unreadable'], 'image')} can't be read; see unreadable.csv.")
    if left_out:
        notes.append(f"{plural(left_out, 'image')} of the gallery can't be read any more.")
    if said.groups is not None:
        notes.append(f"Intervals are over groups: the images come in {len(set(said.groups))}.")
    return notes


def choose(predictions: Predictions) -> list[int]:
    """The images of the gallery, by the rule that the report's notes state."""
    predicted = predictions.probabilities.argmax(axis=1)
    top = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != predictions.labels)
    right = np.flatnonzero(predicted == predictions.labels)
    surest = wrong[np.argsort(-top[wrong], kind="stable")][:MOST_WRONG]
    unsure = right[np.argsort(top[right], kind="stable")][:LEAST_SURE]
    classes = range(min(len(predictions.classes), MOST_CLASSES))
    first = [right[predictions.labels[right] == c][:1] for c in classes]
    return list(dict.fromkeys(np.concatenate([surest, unsure, *first]).tolist()))


class _Source:
    """The network and the images of a run; without images where its data has moved."""

    def __init__(
        self,
        run: RunFolder,
        plan: dict[str, Any],
        split: str,
        predictions: Predictions,
        device: str = "cpu",
    ) -> None:
        self.classifier = load(run.path, device)
        self.predictions = predictions
        self.table: ImageTable | None = None
        try:
            table = own_table(run.path, plan)
        except (ValueError, OSError):  # the numbers still stand
            return
        self.table = table.select(table.splits == split)
        self.reader = Reader(self.table, self.classifier.preprocess)
        self.methods = usable_methods(self.classifier)

    def gallery(self) -> Iterator[Explanation]:
        """The chosen images that can still be read, as `regard explain` explains them."""
        table, predictions = self.table, self.predictions
        if table is None or predictions.paths is None:
            return
        rows = {table.path(i): i for i in range(len(table))}
        for i in choose(predictions):
            row = rows.get(predictions.paths[i], i if len(table) == len(predictions) else None)
            if row is None:
                continue
            try:
                shown = self._explained(row, int(predictions.probabilities[i].argmax()))
            except ImageError:
                continue
            yield replace(
                shown, true=predictions.classes[predictions.labels[i]],
                classes=_ranked(predictions, i),  # as they were evaluated
            )  # fmt: skip

    def _explained(self, row: int, target: int) -> Explanation:
        assert self.table is not None
        pixels = self.table.read(row, value_range=self.classifier.preprocess.value_range)
        box = self.classifier.preprocess.seen(*pixels.shape[:2])
        x, picture = self._input(row), as_picture(pixels)
        if not self.methods:
            return Explanation(
                path=self.table.path(row), image=picture, box=box, classes=[], target=("", 0.0),
                maps=[],
            ).reduced(_SIDE)  # fmt: skip
        (shown,) = explain_batch(
            self.classifier.model, x, [picture], [box], classes=self.classifier.class_names,
            target=target, methods=self.methods, paths=[self.table.path(row)],
        )  # fmt: skip
        return shown.reduced(_SIDE)

    def _input(self, row: int) -> Tensor:
        preprocess, device = self.classifier.preprocess, next(self.classifier.model.parameters())
        return preprocess.normalize(preprocess.fit(self.reader.decode(row))[None].to(device.device))

    def faithfulness(self, count: int, seed: int) -> Faithfulness | None:
        """Scores on `count` images, evenly spread; None without images or maps."""
        if self.table is None or count == 0 or not self.methods:
            return None
        scorer = Scorer(self.classifier.model, methods=self.methods, seed=seed, steps=10, repeats=1)
        each = []
        for row in spread(len(self.table), count).tolist():
            try:
                each.append(scorer.score(self._input(row)))
            except ImageError:
                continue
        return summarize(each, seed=seed) if each else None


def _ranked(predictions: Predictions, i: int) -> list[tuple[str, float]]:
    p = predictions.probabilities[i]
    order = np.argsort(-p, kind="stable")[:5].tolist()
    return [(predictions.classes[k], float(p[k])) for k in order]


def usable_methods(classifier: Classifier) -> Sequence[str]:
    """The methods that work on this network: not every network has a layer for Grad-CAM."""
    methods = ["attention"] if attention_kinds(classifier.model) else []
    x = torch.zeros(1, *classifier.preprocess.input_size)
    x = x.to(next(classifier.model.parameters()).device)
    try:
        gradcam(classifier.model, x, layer=default_layer(classifier.model, x))
    except UsageError:
        return methods
    return [m for m in METHODS if m in (*methods, "gradcam")]
