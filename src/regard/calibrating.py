"""Calibrates a run: its temperature and threshold, from images that are not used to test it."""

import logging
import re
from pathlib import Path

import numpy as np

from regard.data.sources import ImageTable
from regard.errors import FileError, UsageError
from regard.evaluation.calibration import FILE, Calibration, fit_calibration, write_calibration
from regard.evaluation.familiarity import FILE as FAMILIARITY
from regard.evaluation.familiarity import write_familiarity
from regard.evaluation.predictions import Predictions
from regard.familiarity import measure_familiarity
from regard.files import lacking, plural, reason, write_text
from regard.models.hub import PREFIX
from regard.predict import load, network_hash
from regard.run_data import predictions_of, run_table
from regard.runs import RunFolder
from regard.trained_on import Overlap
from regard.weights import find_shipped

log: logging.Logger = logging.getLogger(__name__)
_BEGIN, _END = "<!-- regard calibrate -->\n", "<!-- end -->\n\n"  # of a model card's section
_SECTION = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)


def calibrate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    positive: str | None = None,
    rule: str | None = None,
    temperature: bool = True,
    split: str | None = None,
    root: str | Path | None = None,
    splits: str = "auto",
    device: str = "cpu",
    tta: str | None = None,
) -> Calibration:
    """Fits a temperature and chooses a threshold, and stores both in a run's folder.

    From then on `regard.load`, and with it prediction, evaluation, serving and export, use them.
    They replace any stored earlier.

    Args:
        run: the run's folder.
        data: labeled images; default: the run's own validation images.
        positive: the class of the threshold, together with `rule`.
        rule: "sensitivity=0.95", "specificity=0.9", "youden" or "cost=5:1"; see
            `regard.evaluation.choose_threshold`.
        temperature: whether to fit a temperature.
        split: split of `data`: train, val, test or all; default: its validation images or images
            without a split. Images that trained or test the run are left out, as are other images
            of their groups.
        root: folder of cifar10 and cifar100.
        splits: whether a folder's top folders are splits, as for `open_data`.
        device: where the network computes, as for `regard.load`; without `tta`, the run's own
            validation images need no computation, as their probabilities are stored.
        tta: "flips": for predictions averaged over each image and its mirror image. The result is
            then used only for these.

    Raises:
        UsageError: no such run, class or device, or no images to calibrate on.
        FileError: the images can't be read, or the run's folder can't be written.
    """
    if tta not in (None, "flips"):
        raise UsageError(f"tta={tta!r}: choose flips")
    if not Path(run).is_dir():
        known = str(run).startswith(PREFIX) or find_shipped(str(run)) is not None
        why = f"{run} is no folder, in which the calibration is stored: give a run's folder"
        raise UsageError(why if known else lacking(run, "run"))
    validation = validation_predictions(
        run, data, split=split, root=root, splits=splits, device=device, tta=tta
    )
    source = f"images of {data}" if data is not None else "validation images of the run"
    calibration = fit_calibration(
        validation, positive=positive, rule=rule, temperature=temperature, source=source,
        network=network_hash(run), tta=tta,
    )  # fmt: skip
    write_calibration(run, calibration)
    if not (Path(run) / FAMILIARITY).exists():
        _measure(Path(run), root, device)
    _tell_in_card(Path(run), calibration)
    return calibration


def _measure(run: Path, root: str | Path | None, device: str) -> None:
    """Stores the familiarity of a run that has none, if its images are still available."""
    try:
        table = run_table(run, None, root)
        parts = [table.select(table.splits == split) for split in ("train", "val")]
        classifier = load(run, device, calibrated=False)
        write_familiarity(run, measure_familiarity(classifier, parts[0], parts[1], run))
    except (UsageError, FileError) as error:
        log.warning(f"images unlike the training images can't be flagged: {error}")


def remove_calibration(run: str | Path) -> bool:
    """Removes what `calibrate` stored; returns False if there was nothing.

    Raises:
        UsageError: there is no such folder.
        FileError: the file can't be removed.
    """
    path = Path(run) / FILE
    if not path.parent.is_dir():
        raise UsageError(lacking(run, "run"))
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise FileError(f"{path} can't be removed ({reason(error)})") from error
    _tell_in_card(path.parent, None)
    return True


def _tell_in_card(run: Path, calibration: Calibration | None) -> None:
    """Replaces the model card's section on the calibration: the card's metrics are without it."""
    card = run / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeError) as error:
        log.warning(f"{card} can't be read ({reason(error)}): its calibration was not updated")
        return
    text = _SECTION.sub("", text)
    if calibration is not None:
        fitted = f"{calibration.images:,} {calibration.source}"
        if calibration.tta is not None:
            fitted += f", with test-time {calibration.tta}"
        lines = "\n".join(f"- {line}" for line in calibration.lines())
        section = (
            f"{_BEGIN}## Calibration\n\n`regard.load` uses what `regard calibrate` fitted on "
            f"{fitted}. The metrics above are without it.\n\n{lines}\n{_END}"
        )
        before, use, after = text.partition("## How to use it\n")
        text = f"{before}{section}{use}{after}" if use else f"{text.rstrip()}\n\n{section}"
    try:
        write_text(card, text)
    except FileError as error:
        log.warning(str(error))


def validation_predictions(
    run: str | Path,
    data: str | Path | None = None,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    splits: str = "auto",
    device: str = "cpu",
    tta: str | None = None,
) -> Predictions:
    """A run's unscaled predictions for its validation images, or for others not used to test it.

    Raises:
        as in `calibrate`.
    """
    if data is None and split is None:
        _check_has_validation(Path(run))
        stored = RunFolder(Path(run)).read_validation() if tta is None else None
        if stored is not None:
            return stored
        split = "val"

    def choose(table: ImageTable, shared: Overlap | None) -> tuple[str, ImageTable]:
        return "val", _to_calibrate_on(table, split, shared)

    _, found, unreadable = predictions_of(
        run, None if data is None else str(data), root=root, splits=splits, choose=choose,
        device=device, flips=tta == "flips", calibrated=False,
    )  # fmt: skip
    for line in unreadable:
        log.warning(line)
    return found


def _check_has_validation(run: Path) -> None:
    folder = RunFolder(run)
    if not folder.exists:
        return  # the message of whoever opens it is the better one
    counts = folder.read_facts().get("counts")
    if counts is not None and not counts.get("val"):
        raise UsageError(
            f"{run} was trained without validation images: give data that it was neither trained "
            "nor tested on"
        )


def _to_calibrate_on(table: ImageTable, split: str | None, shared: Overlap | None) -> ImageTable:
    """The images of a table that may be used to choose a threshold.

    Args:
        table: any images.
        split: as for `calibrate`.
        shared: what the images have in common with the run's; None if unknown.

    Raises:
        UsageError: there are none.
    """
    if split not in (None, "all", "train", "val", "test"):
        raise UsageError(f"split={split}: choose train, val, test or all")
    if split is None:
        at = np.isin(table.splits, ("val", "") if not (table.splits == "val").any() else ("val",))
    else:
        at = np.ones(len(table), bool) if split == "all" else table.splits == split
    if not at.any():
        has = ", ".join(s for s in ("train", "val", "test") if (table.splits == s).any())
        raise UsageError(f"{table.name} has {has} images but none for validation: choose a split")
    if shared is None:
        return table.select(at)
    related = shared.related("train", "test")
    used = related | np.isin(shared.images, ("train", "test"))
    if count := int((at & used).sum()):
        more = (
            f" or share a group with such images ({n:,})"
            if (n := int((at & related).sum()))
            else ""
        )
        if not (at & ~used).any():
            raise UsageError(
                f"{table.name}: all {plural(count, 'image')} were used to train or test this run"
                f"{more}; give other images"
            )
        log.warning(
            f"{table.name}: left out {plural(count, 'image')} of {int(at.sum()):,} that were used "
            f"to train or test this run{more}"
        )
    started = np.zeros(len(table), bool) if shared.started is None else shared.started == "train"
    if count := int((at & ~used & started).sum()):
        log.warning(
            f"{table.name}: {count:,} of {plural(int((at & ~used).sum()), 'image')} trained the "
            "weights that this run started from: a temperature and threshold fitted on them may "
            "not suit new images"
        )
    if line := shared.namesakes_line(at & ~used, "train", "test"):
        log.warning(f"{table.name}: {line}")
    return table.select(at & ~used)
