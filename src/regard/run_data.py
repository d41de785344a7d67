"""A run's network on labeled images: its own, split as for its training, or others."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
from numpy.typing import NDArray

from regard.data.content import UNREADABLE, content_hashes
from regard.data.loading import Reader, StreamingLoader, default_workers
from regard.data.preprocess import Preprocess, TenCrop
from regard.data.sources import NAMES, ImageTable, as_known, open_data
from regard.data.splits_file import read_rows, rows_of
from regard.errors import FileError, UsageError
from regard.evaluation import Predictions
from regard.files import plural
from regard.log import Heartbeat
from regard.machine import choose_device
from regard.models.create import check_size, make_model, plain_source
from regard.models.io import find_folder, network_folder
from regard.models.original_weights import (
    arguments_of,
    authors_normalization,
    data_config_of,
    read_tensors,
)
from regard.predict import Classifier, load, probabilities_of
from regard.runs import RunFolder
from regard.trained_on import (
    STARTED,
    KnownImages,
    Overlap,
    changed_line,
    known_images,
    own_table,
)

logger: logging.Logger = logging.getLogger(__name__)
Choose = Callable[[ImageTable, Overlap | None], tuple[str, ImageTable]]


def predictions_of(
    run: str | Path,
    data: str | None = None,
    *,
    split: str | None = None,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    splits: str = "auto",
    renamed: Mapping[str, str] | None = None,
    size: tuple[int, int] | None = None,
    crop_pct: float | None = None,
    ten_crop: bool = False,
    flips: bool = False,
    device: str = "cpu",
    prepare: Callable[[Classifier, Reader], None] = lambda classifier, reader: None,
    choose: Choose | None = None,
    calibrated: bool = True,
    warn: bool = True,
) -> tuple[str, Predictions, list[str]]:
    """A network's predictions for labeled images.

    Args:
        run: a run's folder, the name of weights that come with Regard, or a network's name
            together with `weights`.
        data: as for training; default: the run's own, with the splits it was trained with, which
            also apply if all images are the run's by their content.
        split: train, val, test or all; default: test, else val, else all; from other data
            without the images that the run was trained on and others of their groups.
        weights: for a network's name: a run's folder or an authors' checkpoint.
        root: folder of cifar10 and cifar100.
        splits: whether a folder's top folders are splits, as for `open_data`.
        renamed: {class of the data: class of the network}; '' leaves its images out.
        size: height and width of the input, if other than the network's own.
        crop_pct: fraction of the shorter side that the center crop keeps, if other than the
            network's own.
        ten_crop: average the probabilities of ten crops of each image, see `TenCrop`.
        flips: average the probabilities of each image and its mirror image, see `Flips`.
        device: where the network computes, as for `regard.load`.
        prepare: may give the network an engine; called with a function that reads the images.
        choose: replaces `split`; like `choose_split`.
        calibrated: use the temperature stored in the run, if it was fitted for probabilities of
            this kind: never with another size or crop or ten crops, and with flips only one fitted
            with flips.
        warn: log the warnings of the data.

    Returns:
        The split ("all" without splits, "new" without the images trained on), the predictions,
        and a line for each image that can't be read.

    Raises:
        UsageError: no such network, data or split, no class that the network knows, a size that
            the network can't take, or a crop for images that are not cropped.
        FileError: no image can be read.
    """
    if flips and ten_crop:
        raise UsageError("ten_crop and flips: ten crops are mirrored already; give one of them")
    shared = folder = None
    if weights is None:
        folder = network_folder(run)
        classifier = load(folder, device, calibrated=calibrated, flips=flips)
        table, shared = _run_table(folder, data, root, splits)
    else:
        if Path(run).is_dir():
            raise UsageError(
                f"weights={weights}: only with the name of a network; {run} is a folder, whose "
                "weights are its own"
            )
        if data is None:
            raise UsageError(f"{run} with weights from elsewhere: give labeled images")
        table = open_data(data, root=root, splits=splits, min_classes=1)
        classifier = _named(str(run), table, weights)
        classifier.model.to(choose_device(device))
        if flips:
            classifier.use_flips()
    if size is not None:
        _resize(classifier, size)
    if crop_pct is not None:
        _crop(classifier, crop_pct)
    preprocess = classifier.preprocess
    if ten_crop:
        preprocess = TenCrop.of(preprocess)
        classifier.drop_calibration()
    named, table = choose(table, shared) if choose else choose_split(table, split, shared)
    table = as_known(table, classifier.class_names, renamed)
    if data is None and folder is not None and (folder / "splits.csv").is_file():
        line = changed_line(table, folder / "splits.csv")
        table = replace(table, warnings=(*table.warnings, line) if line else table.warnings)
    for line in table.warnings if warn else ():
        logger.warning(line)
    return named, *_predictions(classifier, Reader(table, preprocess), prepare)


def _resize(classifier: Classifier, size: tuple[int, int]) -> None:
    """Makes a network take images of this size; if not its own size, without its calibration.

    Raises:
        UsageError: it can't.
    """
    preprocess = classifier.preprocess.at_size(*size)
    name = str(classifier.model.pretrained_cfg["architecture"])  # type: ignore[index]
    check_size(classifier.model, name, preprocess.input_size)
    if preprocess.input_size != classifier.preprocess.input_size:
        classifier.drop_calibration()
    classifier.preprocess = preprocess


def _crop(classifier: Classifier, crop_pct: float) -> None:
    """Makes a network see this fraction of the shorter side; if changed, without calibration.

    Raises:
        UsageError: its images are not cropped.
    """
    preprocess = classifier.preprocess
    if preprocess.resize != "crop":
        raise UsageError(
            f"crop_pct={crop_pct:g}: images of this network are fitted by "
            f"resize={preprocess.resize!r}; only resize='crop' cuts the center"
        )
    if crop_pct != preprocess.crop_pct:
        classifier.drop_calibration()
    classifier.preprocess = replace(preprocess, crop_pct=crop_pct)


def _predictions(
    classifier: Classifier, reader: Reader, prepare: Callable[[Classifier, Reader], None]
) -> tuple[Predictions, list[str]]:
    """The predictions for the readable images, and a line for each unreadable one."""
    table = reader.table
    prepare(classifier, reader)
    source = StreamingLoader(reader, None, 0, default_workers())
    rows, probabilities, unreadable = probabilities_of(classifier, source, len(table))
    if len(rows) == 0:
        raise FileError(f"{table.name}: none of its {plural(len(table), 'image')} can be read")
    read = table.select(rows)
    paths = [read.path(i) for i in range(len(read))]
    predictions = Predictions(
        probabilities, read.labels, read.classes, read.groups, paths, read.columns
    )
    return predictions, [reason for _, reason in unreadable]


def with_common_paths(folders: Sequence[Path], each: Sequence[Predictions]) -> list[Predictions]:
    """Runs' predictions for their own images, with one path for each image.

    Data that one run read through a link, or from a copy, has other paths in the other run. Images
    are the same if their content is, unless their names are those of two images of one run.

    Args:
        folders: the runs.
        each: their predictions, with paths.
    """
    places: dict[int, dict[str, str]] = defaultdict(dict)  # {content: {key: path}}
    renamed = []
    for folder, found in zip(folders, each, strict=True):
        paths, file = list(found.paths or ()), folder / "splits.csv"
        rows = rows_of(paths, file) if file.is_file() else None
        keys = {row.key for row in read_rows(file)} if rows else set()
        taken: set[str] = set()
        for i, row in enumerate(rows or ()):
            same = places[row.content] if row.content != UNREADABLE else {}
            others = (p for key, p in same.items() if key not in keys and p not in taken)
            paths[i] = same.get(row.key) or next(others, paths[i])
            taken.add(paths[i])
        for row, path in zip(rows or (), paths, strict=False):
            places[row.content].setdefault(row.key, path)
        renamed.append(replace(found, paths=paths))
    return renamed


def run_table(run: Path, data: str | None, root: str | Path | None) -> ImageTable:
    """The images of a run with the splits of its training, or other data.

    Raises:
        UsageError: the folder does not say what it was trained on, or the data has changed.
    """
    return _run_table(run, data, root, "auto")[0]


def _run_table(
    run: Path, data: str | None, root: str | Path | None, splits: str
) -> tuple[ImageTable, Overlap | None]:
    """The images, and what they have in common with the run's; None if unknown."""
    folder = RunFolder(run)
    if data is None and not (run / "splits.csv").is_file():  # weights that come with Regard
        if not folder.exists:
            raise UsageError(f"{run} does not say what it was trained on: give DATA")
        data = str(folder.read_plan()["data"])
        if data not in NAMES:
            raise UsageError(f"{run.name} comes without the images it was trained on: give DATA")
    if data is None:
        table = own_table(run, folder.read_plan(), root)
        return table, Overlap(table.splits, started=_started(run, table))
    table = open_data(data, root=root, splits=splits, min_classes=1)
    known = known_images(run)
    if known is None:
        return table, None
    # a warning goes to standard error: standard output is for results
    progress = Heartbeat("images compared with the run's", level=logging.WARNING)
    hashes = content_hashes(table, progress)
    shared = known.overlap(hashes, table.groups)
    if (start := known_start(run)) is not None:
        shared = replace(shared, started=start.splits_of(hashes))
    if shared.own:
        if folder.exists and np.isin(known.own, hashes).all():
            folder.attach(table)
        if divided := int(np.isin(hashes, known.divided).sum()):
            logger.warning(
                f"{table.name}: {plural(divided, 'image')} in several splits of the run (copies), "
                "counted as training images, or else as validation images"
            )
        table = replace(table, splits=shared.images)
    return table, shared


def _started(run: Path, table: ImageTable) -> NDArray[np.str_] | None:
    """(N,) `Overlap.started` for a run's own images."""
    if (start := known_start(run)) is None:
        return None
    contents = {row.key: row.content for row in read_rows(run / "splits.csv")}
    hashes = [contents.get(table.key(i), UNREADABLE) for i in range(len(table))]
    return start.splits_of(np.array(hashes, np.uint64))


def known_start(run: Path) -> KnownImages | None:
    """The images of the weights that a run started from, and of those that these started from.

    None if the run started from no weights, or the images are unknown.
    """
    if (run / STARTED).is_file():
        return KnownImages(run / STARTED)
    folder = RunFolder(run)  # a run of an earlier version: use what its weights know
    start = start_folder(folder.read_plan()) if folder.exists else None
    return None if start is None else known_images(start)


def start_folder(plan: Mapping[str, Any]) -> Path | None:
    """The folder of the run, or of Regard's own weights, that a plan starts from; or None."""
    weights = plan.get("weights")
    if weights is None and plan.get("pretrained") and plain_source(plan["model"]) is None:
        weights = plan["model"]  # Regard's own
    return None if weights is None else find_folder(weights)


def write_start(run: Path, plan: Mapping[str, Any]) -> None:
    """Writes the file that `known_start` reads into the folder of a starting run."""
    if (start := start_folder(plan)) is None:
        return
    found = [known for known in (known_images(start), known_start(start)) if known is not None]
    if found:
        found[0].write(run / STARTED, *found[1:])


def choose_split(
    table: ImageTable, split: str | None, shared: Overlap | None = None
) -> tuple[str, ImageTable]:
    """The images to test on, and what they are: a split, all, or new (not trained on).

    Args:
        table: any images.
        split: train, val, test, all, or None: test, else val, else all, without images that
            the run was trained on or validated with, and others of their groups.
        shared: what the images have in common with the run's; None if unknown.

    Raises:
        UsageError: the table has no such split, or all of its images were trained on.
    """
    present = [s for s in ("test", "val", "train") if np.any(table.splits == s)]
    if split not in (None, "all", *present):
        has = ", ".join(present) or "no splits"
        raise UsageError(f"split={split}: {table.name} has {has}; or choose all")
    chosen = split or next((s for s in ("test", "val") if s in present), "all")
    at = np.ones(len(table), bool) if chosen == "all" else table.splits == chosen
    if split is None and chosen == "val":
        logger.warning(f"{table.name} has no test split: these are the validation images")
    if shared is None:
        return chosen, table if at.all() else table.select(at)
    related = shared.related("train", "val")
    used = related | np.isin(shared.images, ("train", "val"))
    leave_out = split is None and not shared.own and bool((at & used).any())
    if leave_out:
        more = ""
        if count := int((at & related).sum()):
            groups = plural(shared.count_groups(at & related), "group")
            more = f", or that share a group with such images ({count:,} of {groups})"
        if not (at & ~used).any():
            raise UsageError(
                f"{table.name}: the run was trained on all {plural(int(at.sum()), 'image')} to "
                f"test{more}; split=all tests on them anyway"
            )
        logger.warning(
            f"{table.name}: left out {plural(int((at & used).sum()), 'image')} of {at.sum():,} "
            f"that this run was trained on or validated with{more}; split=all tests on them too"
        )
        chosen, at = "new" if chosen == "all" else chosen, at & ~used
    elif not (shared.own and chosen == "val") and (line := shared.overlap_line(at)):
        logger.warning(line)
    if line := shared.namesakes_line(at, "train", "val"):
        logger.warning(f"{table.name}: {line}")
    started = np.isin("" if shared.started is None else shared.started, ("train", "val"))
    if count := int((at & ~used & started).sum()):
        logger.warning(
            f"{table.name}: {count:,} of {plural(int(at.sum()), 'image')} trained or validated the "
            "weights that this run started from: results on them say nothing about new images"
        )
    return chosen, table if at.all() else table.select(at)


def _named(name: str, table: ImageTable, weights: str | Path) -> Classifier:
    """A network by name, with weights from elsewhere."""
    if Path(weights).is_dir():  # a run's folder: images are preprocessed as in that run
        other = load(weights)
        made_with: Any = getattr(other.model, "_model_args", None) or {}
        arguments = {k: v for k, v in made_with.items() if k not in ("num_classes", "in_chans")}
        size = other.preprocess.input_size
        model = make_model(name, arguments, len(other.class_names), size, False, str(weights))
        return Classifier(model, other.class_names, other.preprocess)
    cfg = timm.models.get_pretrained_cfg(name)
    size = (3, 224, 224) if cfg is None else tuple(cfg.input_size)
    seen = arguments_of(name, read_tensors(weights))
    size = (seen.pop("in_chans", size[0]), *size[1:])
    classes = seen.pop("num_classes", None)
    if classes not in (None, len(table.classes)):  # its classifier would start at random
        raise UsageError(
            f"{weights} is of a network of {plural(classes, 'class')}, but {table.name} has "
            f"{len(table.classes):,}"
        )
    model = make_model(name, seen, len(table.classes), size, False, str(weights))
    preprocess = Preprocess.from_config(data_config_of(model), authors_normalization(name))
    return Classifier(model, table.classes, preprocess)
