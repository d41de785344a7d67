"""`regard evaluate`: a run's network, or any other, on labelled images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm

from regard.data.loading import Reader, Streamed, default_workers
from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable, open_data
from regard.data.splits import read_splits
from regard.evaluation.predictions import Predictions
from regard.prediction import Classifier, load, probabilities_of
from regard.training.choices import make_model
from regard.training.folder import RunFolder


def predictions_of(
    run: str | Path,
    data: str | None = None,
    *,
    split: str | None = None,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    complain: Callable[[str], None] = print,
    prepare: Callable[[Classifier, Reader], None] = lambda classifier, reader: None,
) -> tuple[str, Predictions]:
    """What a network says of labelled images, and the split they are of ("all": no splits).

    Args:
        run: a run's folder, or a network's name with `weights`.
        data: as for training; without it the run's own, split as it was for training.
        split: train, val or test; without it test where there is one, else all.
        weights: for a network's name: a run's folder or an authors' checkpoint.
        root: where cifar10 and cifar100 are.
        complain: is told of each image that can't be read.
        prepare: may give the network an engine; gets what reads the images.

    Raises:
        ValueError: no such network, data, split, or classes that the network does not know.
        OSError: no image can be read.
    """
    if weights is None and Path(run).is_dir():
        classifier = load(run)
        table = run_table(Path(run), data, root)
    else:
        if data is None:
            raise ValueError(f"{run} is no run's folder: a network's name needs DATA and --weights")
        table = open_data(data, root=root)
        classifier = _named(str(run), table, weights)
    named, table = _split(table, split)
    table = as_known(table, classifier.class_names)
    reader = Reader(table, classifier.preprocess)
    prepare(classifier, reader)
    source = Streamed(reader, None, 0, default_workers())
    rows, found, unreadable = probabilities_of(classifier, source, len(table))
    for _, reason in unreadable:
        complain(reason)
    if len(rows) == 0:
        raise OSError(f"{table.name}: none of its {len(table)} {named} images can be read")
    kept = table.select(rows)
    paths = [kept.path(i) for i in range(len(kept))]
    return named, Predictions(found, kept.labels, kept.classes, kept.groups, paths)


def run_table(run: Path, data: str | None, root: str | Path | None) -> ImageTable:
    """The images of a run, split as they were for training; or other data.

    Raises:
        ValueError: the folder does not say what it was trained on, or the data is not as it was.
    """
    folder = RunFolder(run)
    if data is not None:
        return open_data(data, root=root)
    if not folder.exists:
        raise ValueError(f"{run} does not say what it was trained on: give DATA")
    plan = folder.read_plan()
    return read_splits(open_data(plan["data"], root=root or plan["root"]), run / "splits.csv")


def _named(name: str, table: ImageTable, weights: str | Path | None) -> Classifier:
    """A network by its name, with weights from elsewhere."""
    if weights is None:
        raise ValueError(f"{name} is no run's folder: to test a network by its name give --weights")
    if Path(weights).is_dir():  # a run's folder: its images are prepared as they were there
        other = load(weights)
        arguments: Any = getattr(other.model, "_model_args", None) or {}
        kept = {k: v for k, v in arguments.items() if k not in ("num_classes", "in_chans")}
        size = other.preprocess.input_size
        model = make_model(name, kept, len(other.class_names), size, False, str(weights))
        return Classifier(model, other.class_names, other.preprocess)
    cfg = timm.models.get_pretrained_cfg(name)
    size = (3, 224, 224) if cfg is None else tuple(cfg.input_size)
    model = make_model(name, {}, len(table.classes), size, False, str(weights))
    found: Any = model.pretrained_cfg
    return Classifier(model, table.classes, Preprocess.from_config(found))


def _split(table: ImageTable, split: str | None) -> tuple[str, ImageTable]:
    present = [s for s in ("test", "val", "train") if np.any(table.splits == s)]
    if not present and split in (None, "all"):
        return "all", table
    chosen = split or ("test" if "test" in present else "all")
    if chosen == "all":
        return "all", table
    if chosen not in present:
        has = ", ".join(present) or "no splits"
        raise ValueError(f"--split {chosen}: {table.name} has {has}; or choose all")
    return chosen, table.select(table.splits == chosen)


def as_known(table: ImageTable, classes: list[str]) -> ImageTable:
    """With labels as the network counts them.

    Raises:
        ValueError: the data has classes that the network was not trained on.
    """
    if strange := [c for c in table.classes if c not in classes]:
        raise ValueError(
            f"{table.name} has classes that the network does not know: {', '.join(strange[:10])}; "
            f"it knows {', '.join(classes[:10])}"
        )
    places = np.array([classes.index(c) for c in table.classes], dtype=np.int64)
    return replace(table, classes=classes, labels=places[table.labels])
