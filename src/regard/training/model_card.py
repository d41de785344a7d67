"""The model card of a run: README.md in its folder, as the Hugging Face Hub shows it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from regard.evaluation import Evaluation
from regard.evaluation.display import cell
from regard.files import about, markdown, plural, shortened, write_text
from regard.runs import RunFolder, data_name
from regard.training.run_plan import Plan

CLASSES_SHOWN = 50
METRICS = {
    "top1": "accuracy", "top5": "top-5 accuracy", "macro_f1": "macro F1",
    "ece": "expected calibration error", "nll": "log loss (nats)",
}  # fmt: skip


def write_model_card(
    folder: RunFolder, plan: Plan, facts: dict[str, Any], evaluation: Evaluation
) -> None:
    """Writes README.md: data, classes, metrics with intervals, command, versions, intended use."""
    top1 = evaluation.metrics["top1"]
    data = Path(plan.data).name
    data = data if data.strip(".") else data_name(plan.data)  # "." and ".." name no data
    metadata = ModelCardData(
        library_name="timm",
        tags=["image-classification", "regard", "timm"],
        pipeline_tag="image-classification",
        model_name=f"{plan.network} on {data}",
        eval_results=[
            EvalResult(
                task_type="image-classification", dataset_type=data, dataset_name=data,
                dataset_split=facts["tested_on"], metric_type="accuracy",
                metric_value=round(top1.value, 4),
            )
        ],
    )  # fmt: skip
    body = "\n\n".join([
        f"# {markdown(f'{plan.network} on {data}')}", _network(plan, facts), _data(plan, facts),
        _metrics(facts, evaluation), _use(), _command(folder, plan, facts), _intended(),
    ])  # fmt: skip
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")
    write_text(folder.path / "README.md", str(card))


def _network(plan: Plan, facts: dict[str, Any]) -> str:
    c, h, w = plan.preprocess.input_size
    chosen = facts["selected"]
    average = "moving averages up to" if plan.recipe.ema_decay else "those of"
    return (
        f"An image classification network with {facts['parameters']:,} parameters, for images of "
        f"{c} x {h} x {w} (channels, height, width). Training started from {plan.start} and "
        f"took {plural(facts['steps'], 'step')} ({about(facts['epochs'], 'epoch')}). The weights "
        f"are {average} epoch {chosen['epoch']:.4g} (selected: {chosen['by']}).{_gates(facts)}"
    )


def _gates(facts: dict[str, Any]) -> str:
    """A note on channel gates that don't attend; "" if all do, or there are none."""
    found = facts["channel_gates"]
    same = any(gate["same"] for gate in found.get("gates", {}).values())
    return f"\n\nNote: {found['verdict']}" if same else ""


def _data(plan: Plan, facts: dict[str, Any]) -> str:
    counts = ", ".join(f"{n:,} {split}" for split, n in facts["counts"].items())
    lines = [
        "## Data", "",
        f"`{plan.data}`: {counts} images. `splits.csv` says which image was where.", "",
        f"{len(plan.classes)} classes: {markdown(shortened(plan.classes, CLASSES_SHOWN))}.",
    ]  # fmt: skip
    lines += [f"\nNote: {markdown(warning)}" for warning in facts["warnings"]]
    return "\n".join(lines)


def _metrics(facts: dict[str, Any], evaluation: Evaluation) -> str:
    rows = [
        f"| {METRICS.get(name, name.replace('_', ' '))} | {' | '.join(cell(m, 4))} |"
        for name, m in evaluation.metrics.items()
    ]
    chosen = facts["selected"]["by"] != "the last epoch"
    note = {
        "test": "No image of the test split was used in training or to choose the weights.",
        "val": "There was no test split. The weights were chosen on these images, so that the "
        "numbers are too good."
        if chosen
        else "There was no test split. The weights are the last epoch's: these images didn't "
        "choose them.",
        "train": "There was no other split: the network was trained on these images.",
    }[facts["tested_on"]]
    if not evaluation.metrics["top1"].has_interval:
        why = no_interval(evaluation)
        note += f" {why[0].upper()}{why[1:]}."
    images = plural(evaluation.n, "image")
    return "\n".join([
        "## Metrics", "", f"On the {images} of the {facts['tested_on']} split. {note}", "",
        "| metric | value | 95 % interval |", "|---|---:|---|", *rows,
    ])  # fmt: skip


def no_interval(evaluation: Evaluation) -> str:
    """Why the metrics have no interval where there is one image, or one group of images."""
    return f"no interval: that needs more {'images' if evaluation.n_groups is None else 'groups'}"


def _use() -> str:
    return (
        "## How to use it\n\nFOLDER is the folder of this card:\n\n```python\nimport regard\n\n"
        'classifier = regard.load("FOLDER")\n'
        'print(classifier.predict("photo.jpg"))\n```\n\n'
        "timm loads it too, after `import regard`: "
        '`timm.create_model("local-dir:FOLDER", pretrained=True)`.'
    )


def _command(folder: RunFolder, plan: Plan, facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    command = folder.read_command()  # this process may be resuming, with another command
    return f"## How it was made\n\n```\n{command}\n```\n\nWith {versions}; seed {plan.recipe.seed}."


def _intended() -> str:
    return (
        "## Intended use\n\n"
        "For images like those it was trained on, taken in the same way, of the same classes: it "
        "names one of its classes for any image, and its probabilities are only as good as the "
        "calibration error says. It is a research model and no medical device; nothing that it "
        "answers is a diagnosis. Check it on your own data before you rely on it."
    )
