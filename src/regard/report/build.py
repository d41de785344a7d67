"""The report of a run, made from its folder: `regard report RUN`, and the end of every training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from regard.attention import AttentionMaps, attention_kinds, record
from regard.data.preprocess import to_tensor
from regard.data.sources import ImageTable, open_data
from regard.data.splits_file import read_splits
from regard.errors import ImageError, UsageError
from regard.evaluation import Estimate, Predictions, evaluate
from regard.explanations.faithfulness import Request, judge
from regard.predict import Classifier, load
from regard.report import Belief, GalleryItem, Report, write_report
from regard.runs import RunFolder

MOST_WRONG, LEAST_SURE, MOST_CLASSES = 12, 6, 12


def report_run(folder: str | Path) -> Path:
    """Writes report.html into a finished run's folder, and returns its path.

    Raises:
        UsageError: the folder holds no finished run.
        OSError: the page can't be written.
    """
    run = RunFolder(Path(folder))
    if not run.finished:
        raise UsageError(f"{folder} holds no finished run")
    plan, facts, recipe = run.read_plan(), run.read_facts(), run.read_recipe()
    split, said = run.read_predictions()
    evaluation = evaluate(said, seed=recipe["seed"])
    classifier = load(run.path)
    table = _table(run, plan)
    gallery, left_out = _gallery(table, classifier, split, said)
    top1 = evaluation.metrics["top1"]
    write_report(
        Report(
            title=f"{plan['model']} on {Path(plan['data']).name}: how well, and where it looks",
            model=plan["model"],
            summary=_summary(plan, facts, recipe),
            classes=said.classes,
            history=run.read_metrics(),
            accuracy=top1.value,
            interval=(top1.low, top1.high),
            n_test=evaluation.n,
            confusion=evaluation.confusion.toarray(),
            gallery=gallery,
            versions=facts["versions"],
            command=_command(run.path),
            notes=_notes(split, facts, said, left_out),
            belief=_belief(table, classifier, split, recipe),
        ),
        run.path / "report.html",
    )
    return run.path / "report.html"


def _command(folder: Path) -> str:
    """The command of the run, kept in the header of its recipe."""
    lines = (folder / "recipe.toml").read_text(encoding="utf-8").splitlines()
    return lines[1].removeprefix("# ") if len(lines) > 1 and lines[1].startswith("# ") else ""


def _summary(plan: dict[str, Any], facts: dict[str, Any], recipe: dict[str, Any]) -> dict[str, str]:
    c, h, w = plan["preprocess"]["input_size"]
    counts = ", ".join(f"{n:,} {split}" for split, n in facts["counts"].items())
    return {
        "Network": f"{plan['model']}, {facts['parameters']:,} parameters, input {c}x{h}x{w}",
        "Images": f"{plan['data']}: {counts}",
        "Training": f"{facts['steps']:,} steps of {recipe['batch_size']} ({facts['epochs']:.3g} "
        f"epochs) in {facts['seconds']:.0f} s on {facts['device']}, {facts['threads']} threads, "
        f"seed {recipe['seed']}",
        "Optimizer": f"{recipe['optimizer']}, learning rate {recipe['lr']:g}, {recipe['schedule']}",
    }


def _notes(split: str, facts: dict[str, Any], said: Predictions, left_out: int) -> list[str]:
    notes = [
        f"The gallery is not picked by hand: of the {split} images it shows the wrong ones (at "
        f"most {MOST_WRONG}, the surest first), the {LEAST_SURE} right ones that the network was "
        f"least sure of, and the first right one of each class (of at most {MOST_CLASSES}).",
        "A map tells where the network weighed the image, not why it answered: read it as "
        "evidence, not proof.",
        "One split and one seed. Another seed gives a slightly different number.",
    ]
    if split != "test":
        notes.insert(0, f"There was no test split: the numbers are of the {split} images.")
    if split == "val":
        notes.insert(1, "The weights were chosen on these images, so the numbers flatter them.")
    if split == "train":
        notes.insert(1, "The network was trained on these images: the numbers say little.")
    notes += [f"The data: {warning}" for warning in facts.get("warnings", [])]
    if facts["unreadable"]:
        notes.append(f"{facts['unreadable']} images could not be read; see unreadable.csv.")
    if left_out:
        notes.append(f"{left_out} images of the gallery could not be read again.")
    if said.groups is not None:
        notes.append(f"Intervals are by group: the images come in {len(set(said.groups))} of them.")
    return notes


def choose(said: Predictions) -> list[int]:
    """Which images the gallery shows; the rule is told in the report's notes."""
    predicted = said.probabilities.argmax(axis=1)
    sure = said.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != said.labels)
    right = np.flatnonzero(predicted == said.labels)
    surest = wrong[np.argsort(-sure[wrong], kind="stable")][:MOST_WRONG]
    unsure = right[np.argsort(sure[right], kind="stable")][:LEAST_SURE]
    classes = range(min(len(said.classes), MOST_CLASSES))
    first = [right[said.labels[right] == c][:1] for c in classes]
    return list(dict.fromkeys(np.concatenate([surest, unsure, *first]).tolist()))


def _table(run: RunFolder, plan: dict[str, Any]) -> ImageTable | None:
    """The run's data as it was split; None where it has moved: the numbers still stand."""
    try:
        return read_splits(open_data(plan["data"], root=plan["root"]), run.path / "splits.csv")
    except (ValueError, OSError):
        return None


def _belief(
    table: ImageTable | None, classifier: Classifier, split: str, recipe: dict[str, Any]
) -> Belief | None:
    """Deletion, insertion and the sanity check on some images of the split, evenly spread."""
    if table is None or recipe["faithfulness_images"] == 0 or not attention_kinds(classifier.model):
        return None
    part = table.select(table.splits == split)
    preprocess, images = classifier.preprocess, []
    for row in (
        np.linspace(0, len(part) - 1, min(recipe["faithfulness_images"], len(part)))
        .astype(int)
        .tolist()
    ):
        try:
            pixels = part.read(
                row, channels=preprocess.input_size[0], value_range=preprocess.value_range
            )
        except ImageError:
            continue
        images.append(preprocess.fit(to_tensor(pixels)).float())
    if not images:
        return None
    x = preprocess.normalize(torch.stack(images))
    told: list[str] = []
    ask = Request(Path(), seed=recipe["seed"], steps=10, repeats=1, complain=told.append)
    scores, checks = judge(classifier, x, ask)
    rows = [
        (s.name, _area(s.deletion), _area(s.insertion), _area(s.over_random))
        for s in scores.values()
    ]
    sentences = [s.verdict() for s in scores.values() if s.over_random is not None]
    sentences += [check.verdict() for check in checks]
    return Belief(images=len(x), rows=rows, sentences=[*sentences, *told])


def _area(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _gallery(
    table: ImageTable | None, classifier: Classifier, split: str, said: Predictions
) -> tuple[list[GalleryItem], int]:
    """The images chosen, with the network's maps, and how many can't be read any more."""
    if table is None:
        return [], len(choose(said))
    rows = {table.path(i): i for i in np.flatnonzero(table.splits == split).tolist()}
    items, lost = [], 0
    assert said.paths is not None
    for i in choose(said):
        try:
            items.append(_item(classifier, table, rows[said.paths[i]], i, said))
        except (ImageError, KeyError):
            lost += 1
    return items, lost


def _item(
    classifier: Classifier, table: ImageTable, row: int, i: int, said: Predictions
) -> GalleryItem:
    preprocess = classifier.preprocess
    pixels = table.read(row, channels=preprocess.input_size[0], value_range=preprocess.value_range)
    image = preprocess.fit(to_tensor(pixels))
    maps = maps_of(classifier, image) if attention_kinds(classifier.model) else []
    probabilities = said.probabilities[i]
    shown = preprocess.fit(to_tensor(pixels)).clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    if max(pixels.shape[:2]) < 32:  # tiny scans are shown as they are, not smoothed
        shown = pixels
    return GalleryItem(
        image=_as_uint8(shown[..., 0] if shown.shape[2] == 1 else shown),
        true=said.classes[said.labels[i]],
        predicted=said.classes[int(probabilities.argmax())],
        probability=float(min(1.0, probabilities.max())),
        maps=maps,
    )


def _as_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    scale = 255 / 65535 if pixels.dtype == np.uint16 else 255
    return (pixels * scale).round().clip(0, 255).astype(np.uint8)


def maps_of(classifier: Classifier, image: torch.Tensor) -> list[tuple[str, NDArray[Any]]]:
    """The network's spatial maps on one image (C, H, W) in 0..255: at most four, by stage.

    A network with many is shown by the mean of each stage's (the first part of a map's name).
    """
    with record(classifier.model) as maps:
        classifier.probabilities(image[None])
    stages = spatial_by_stage(maps)
    return [(name, values[0].numpy()) for name, values in list(stages.items())[-4:]]


def spatial_by_stage(maps: AttentionMaps) -> dict[str, torch.Tensor]:
    """(B, h, w) by stage: the mean over the stage's maps, and over channels of mixed masks."""
    stages: dict[str, list[torch.Tensor]] = {}
    for name, found in maps.items():
        values = found.spatial()
        if values is not None:
            stages.setdefault(name.split(".")[0], []).append(values.float().cpu())
    return {name: torch.stack(values).mean(dim=0) for name, values in stages.items()}
