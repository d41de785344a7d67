"""Makes a run's report from its folder: for `regard report RUN`, and at the end of training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.errors import UsageError
from regard.files import about, plural, write_text
from regard.report.browse import browser_of
from regard.report.figures import charts, measure
from regard.report.methods import as_text, methods_of
from regard.report.page import Report, write_report
from regard.report.sections import calibration_section, subgroup_section
from regard.report.source import LEAST_SURE, MOST_CLASSES, MOST_WRONG, RunSource, choose
from regard.report.training_words import batches

_SIDE = 576  # side of the cards' images, in pixels: twice the size at which they are shown


def report_run(
    folder: str | Path,
    device: str = "cpu",
    *,
    masks: str | Path | None = None,
    positive: str | None = None,
    bands: Mapping[str, Sequence[float]] | None = None,
    explained: int = 0,
    precision: str = "fp32",
    methods: Path | None = None,
) -> Path:
    """Writes report.html into a finished run's folder, and returns its path.

    The faithfulness scores of the maps are written first, as faithfulness.json.

    Args:
        folder: the run's folder.
        device: where the network computes, as for `regard.load`.
        masks: regions that people marked, drawn into the images; see `open_masks`.
        positive: class for ROC, precision-recall and decision curves; see `positive_class`.
        bands: increasing limits by numeric column, whose parts are subgroups; default: three
            bands of equal size.
        explained: number of images whose maps are computed; those of the gallery always are.
        precision: "fp32" or "bf16", in which maps and their scores are computed.
        methods: also write the methods paragraph and the checklists to this .md or .txt file.

    Raises:
        UsageError: the folder holds no finished run, an argument does not fit it, or this
            machine has no such device.
        FileError: the page, or the file of `methods`, can't be written.
    """
    if explained < 0:
        raise UsageError(f"explained={explained}: at least 0")
    source = RunSource(Path(folder), None if masks is None else Path(masks), device, precision)
    plan, facts, recipe = source.plan, source.facts, source.recipe
    measured = measure(source, positive, recipe["faithfulness_images"], bands)
    faithful = measured.faithfulness
    source.run.write_faithfulness(None if faithful is None else faithful.to_dict())
    rule = choose(source.calibrated)
    order = choose(source.calibrated, max(explained, len(rule)))
    browser, cards = browser_of(source), []
    for i, shown in source.explain_all(order):  # one at a time: the images may be large
        browser.add(i, shown)
        if i in rule:
            cards.append(shown.reduced(_SIDE))
    texts = methods_of(source, measured, source.command)
    inserted = recipe.get("graft", "none")
    network = plan["model"] + (f" + {inserted.upper()}" if inserted != "none" else "")
    path = source.run.path / "report.html"
    write_report(
        Report(
            title=f"{network} on {Path(plan['data']).name}: how well, and where it looks",
            model=network,
            summary=_summary(plan, facts, recipe),
            evaluation=source.evaluation,
            split=source.split,
            explanations=cards,
            history=source.run.read_metrics(),
            charts=charts(source, measured),
            diagnostics=measured.diagnostics,
            calibration=calibration_section(source, measured),
            subgroups=subgroup_section(measured.subgroups, measured.positive),
            browser=browser,
            methods=texts,
            chosen=_chosen(facts, recipe),
            versions=facts["versions"],
            command=source.command,
            notes=_notes(source, facts, recipe, len(rule) - len(cards)),
            faithfulness=faithful,
        ),
        path,
    )
    if methods is not None:
        write_text(methods, as_text(texts, methods.suffix.lower() == ".md"))
    return path


def _summary(plan: dict[str, Any], facts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, str]:
    c, h, w = plan["preprocess"]["input_size"]
    counts = ", ".join(f"{n:,} {split}" for split, n in facts["counts"].items())
    return {
        "Network": f"{plan['model']}, {facts['parameters']:,} parameters, input {c}x{h}x{w}",
        "Images": f"{plan['data']}: {counts}",
        "Starting weights": plan.get("start", ""),
        "Training": f"{plural(facts['steps'], 'step')} ({about(facts['epochs'], 'epoch')}), "
        f"{batches(facts, recipe)}, in {facts['seconds']:.0f} s on {facts['device']}, "
        f"{plural(facts['threads'], 'thread')}, seed {recipe['seed']}",
        "Optimizer": f"{recipe['optimizer']}, learning rate {recipe['lr']:g}, {recipe['schedule']}",
    }


def _was_chosen(facts: dict[str, Any], recipe: dict[str, Any]) -> bool:
    """Whether the weights were chosen by validation images."""
    return recipe.get("select") == "best" and bool(facts.get("best"))


def _chosen(facts: dict[str, Any], recipe: dict[str, Any]) -> str:
    """How the epoch of the evaluated weights was chosen."""
    average = "moving averages up to" if recipe.get("ema_decay") else "those of"
    if _was_chosen(facts, recipe):
        best = facts["best"]
        return (
            f"The weights are {average} epoch {best['epoch']:g}, which has the highest validation "
            f"accuracy ({best['val_accuracy']:.1%}; ties go to the lower validation loss)."
        )
    return f"The weights are {average} the last epoch; none was chosen by validation."


def _notes(
    source: RunSource, facts: dict[str, Any], recipe: dict[str, Any], left_out: int
) -> list[str]:
    notes, split, said = [], source.split, source.predictions
    if split != "test":
        name = {"val": "validation", "train": "training"}[split]
        notes.append(f"There was no test split: the numbers are those of the {name} images.")
    if split == "val" and _was_chosen(facts, recipe):
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
    gates = facts.get("channel_gates", {})
    if any(gate["same"] for gate in gates.get("gates", {}).values()):
        notes.append(gates["verdict"])
    if facts["unreadable"]:
        notes.append(f"{plural(facts['unreadable'], 'image')} can't be read; see unreadable.csv.")
    if left_out:
        notes.append(f"{plural(left_out, 'image')} of the gallery can't be read any more.")
    if said.groups is not None:
        notes.append(f"Intervals are over groups: the images come in {len(set(said.groups))}.")
    return notes
