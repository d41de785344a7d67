"""The end of a run: tests the network, and writes it and the results."""

import logging
import platform
from typing import Any

import numpy as np
import torch

from regard.data.loading import StreamingLoader
from regard.data.sources import ImageTable
from regard.errors import ResourceError, UsageError
from regard.evaluation import Evaluation, Predictions, evaluate
from regard.evaluation.familiarity import write_familiarity
from regard.explanations.channel_gates import (
    channel_gates,
    compare_gates,
    has_channel_gates,
    verdict,
)
from regard.familiarity import measure_familiarity, read_some
from regard.files import plural
from regard.models.counting import count_multiply_adds, count_parameters
from regard.models.io import save_model
from regard.predict import Classifier
from regard.runs import VALIDATION, RunFolder, write_predictions
from regard.training.graphs import Graphed
from regard.training.loop import Trainer
from regard.training.model_card import no_interval, write_model_card
from regard.training.run_plan import Plan
from regard.training.splits import LoadedSplit
from regard.version import __version__

log: logging.Logger = logging.getLogger(__name__)

MUCH = 0.2  # share of the time spent waiting for images
SOME = 32  # images on which channel gates are compared
NAMES = {"test": "test", "val": "validation", "train": "training"}


def tested_split(parts: dict[str, LoadedSplit]) -> str:
    """The split that the finished network is tested on: test, else validation, else training."""
    return next(split for split in NAMES if split in parts)


def finish_run(
    folder: RunFolder,
    plan: Plan,
    trainer: Trainer,
    parts: dict[str, LoadedSplit],
    predictions: dict[str, Predictions],
    facts: dict[str, Any],
) -> None:
    """Evaluates the predictions, and writes network, evaluation, model card and run.json.

    `predictions` are by split; those of the validation images are stored for calibration.
    """
    split = facts["tested_on"]
    evaluation = evaluate(predictions[split], seed=plan.recipe.seed)
    _write_network(folder, plan, trainer, evaluation)
    folder.write_evaluation(split, evaluation, predictions[split])
    if split != "val" and "val" in predictions:
        write_predictions(folder.path / VALIDATION, "val", predictions["val"])
    classifier = Classifier(trainer.weights, plan.classes, plan.preprocess)
    _write_familiarity(folder, classifier, parts)
    facts["channel_gates"] = _checked_gates(classifier, parts[split])
    write_model_card(folder, plan, facts, evaluation)
    folder.finish(facts)
    _report(folder, trainer, split, evaluation)


def _write_network(folder: RunFolder, plan: Plan, trainer: Trainer, evaluation: Evaluation) -> None:
    top1 = evaluation.metrics["top1"].value
    save_model(
        trainer.weights, folder.path, class_names=plan.classes,
        data_config=plan.preprocess.data_config(),
        extra={"regard": {**plan.preprocess.regard_config(), "top1": top1}},
    )  # fmt: skip


def _write_familiarity(
    folder: RunFolder, classifier: Classifier, parts: dict[str, LoadedSplit]
) -> None:
    """Writes what flags images unlike the training images; needs some validation images."""
    if "val" not in parts:
        return
    tables = (parts["train"].table, parts["val"].table)
    try:
        write_familiarity(folder.path, measure_familiarity(classifier, *tables, folder.path))
    except UsageError as error:
        log.debug("familiarity: %s", error)


def _checked_gates(classifier: Classifier, part: LoadedSplit) -> dict[str, Any]:
    """What a few images show about the channel gates, for run.json; warns if some don't attend."""
    if not has_channel_gates(classifier.model):
        return {}
    each, images = [], 0
    device = next(classifier.model.parameters()).device
    try:
        for batch, _ in read_some(classifier, part.table, SOME):
            x = classifier.preprocess.normalize(batch.to(device))
            each.append(channel_gates(classifier.model, x))
            images += len(batch)
    except ResourceError as error:  # the run is done: this check must not end it
        log.debug("channel gates: %s", error)
    if not each:
        return {}
    gates = compare_gates({name: np.concatenate([e[name] for e in each]) for name in each[0]})
    if any(gate.same for gate in gates):
        log.warning(verdict(gates, images))
    return {
        "images": images, "verdict": verdict(gates, images),
        "gates": {gate.name: gate.to_dict() for gate in gates},
    }  # fmt: skip


def run_facts(
    plan: Plan,
    table: ImageTable,
    trainer: Trainer,
    parts: dict[str, LoadedSplit],
    best: dict[str, float],
) -> dict[str, Any]:
    """What a finished run measured, for run.json.

    `selected` names the epoch whose weights were used, and by what it was chosen.
    """
    t = trainer
    return {
        "tested_on": tested_split(parts),
        "counts": {split: len(p.table) for split, p in parts.items()},
        "parameters": count_parameters(t.model),
        "multiply_adds": count_multiply_adds(t.weights, plan.preprocess.input_size),
        "steps": t.total,
        "epochs": t.total / t.steps_an_epoch,
        "seconds": t.seconds,
        "waited": t.waited / max(t.seconds, 1e-9),
        "images_a_second": t.steps.images_in(0, t.total) / max(t.seconds, 1e-9),
        "best": best,
        "selected": selected(plan, trainer, best),
        "warnings": list(table.warnings),
        "precision": t.precision,
        "bf16": t.precision == "bf16",
        "compiled": t.compiled is not None and not isinstance(t.compiled, Graphed),
        "cuda_graphs": isinstance(t.compiled, Graphed),
        "batches": [t.batch, t.recipe.accumulate],
        "threads": torch.get_num_threads(),
        "device": str(t.accelerator.device),
        "processes": t.accelerator.num_processes,
        "unreadable": sum(
            len(part.left_out) + len(_lost(part, t.unreadable if split == "train" else []))
            for split, part in parts.items()
        ),
        "versions": {
            "regard": __version__, "torch": torch.__version__,
            "Python": platform.python_version(),
        },
    }  # fmt: skip


def _lost(part: LoadedSplit, in_training: list[tuple[int, str]]) -> set[int]:
    """Rows of a split's images that were lost after the run was started."""
    return {*part.missing, *(row for row, _ in part.lost), *(row for row, _ in in_training)}


def selected(plan: Plan, trainer: Trainer, best: dict[str, float]) -> dict[str, Any]:
    """The epoch and step of the run's final weights, and by what they were chosen."""
    if plan.recipe.select == "best" and best:
        by = "highest validation accuracy, of equal ones the lowest validation loss"
        return {"by": by, **best}
    return {
        "by": "the last epoch",
        "epoch": round(trainer.total / trainer.steps_an_epoch, 3),
        "step": trainer.total,
    }


def accuracy_words(evaluation: Evaluation, split: str) -> str:
    """The accuracy on a split's images with its interval, or with the reason why it has none."""
    top1 = evaluation.metrics["top1"]
    spread = (
        f"95 % interval {top1.low:.2%} to {top1.high:.2%}" if top1.has_interval
        else no_interval(evaluation)
    )  # fmt: skip
    images = plural(evaluation.n, f"{NAMES[split]} image")
    return f"accuracy on the {images}: {top1.value:.2%} ({spread})"


def _report(folder: RunFolder, trainer: Trainer, split: str, evaluation: Evaluation) -> None:
    wrong = round(evaluation.n * (1 - evaluation.metrics["top1"].value))
    waiting = trainer.waited / max(trainer.seconds, 1e-9)
    log.info(
        f"{accuracy_words(evaluation, split)}, {wrong} wrong; trained in {trainer.seconds:.0f} s, "
        f"{waiting:.0%} of it waiting for images"
    )
    if waiting > MUCH and isinstance(trainer.source, StreamingLoader):
        log.info("smaller copies of large images are read faster: `regard shrink` makes them")
    log.info(f"the network: {folder.path}")
