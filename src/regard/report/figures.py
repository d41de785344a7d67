"""All figures of a run: for its report, and as files for print (`regard figures`)."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from regard.errors import UsageError
from regard.evaluation import (
    Diagnostics,
    Estimate,
    Predictions,
    Subgroups,
    diagnose,
    diagnose_calibration,
    evaluate_subgroups,
    subgroup_columns,
    subgroups_csv,
)
from regard.explanations.faithfulness import Faithfulness
from regard.explanations.inputs import refuse_to_replace
from regard.explanations.print_style import COLUMN, FORMATS, for_print, save
from regard.files import plural, write_text
from regard.report.charts import confusion, faithfulness, learning
from regard.report.curves import Chart, precision_recall, roc
from regard.report.reliability import calibration_chart, decision_chart, reliability_chart
from regard.report.source import RunSource, choose
from regard.report.subgroups import file_of, subgroup_chart

log: logging.Logger = logging.getLogger(__name__)

TABLE = "subgroups.csv"
PICTURES = "images"  # the folder of the explanation pictures
_UNSAFE = re.compile(r"[^\w.-]+")


def chosen_epoch(facts: dict[str, Any], recipe: dict[str, Any]) -> float:
    """The epoch whose weights were evaluated."""
    best = facts.get("best") or {}
    if recipe.get("select") == "best" and best:
        return float(best["epoch"])
    return float(facts["epochs"])


def positive_class(predictions: Predictions, wanted: str | None) -> str | None:
    """The positive class of the curves: the requested one, or the rarer of two classes.

    If both are equally frequent, it is the second. None for more classes: each against the rest.

    Raises:
        UsageError: there is no such class.
    """
    classes = predictions.classes
    if wanted is not None:
        if wanted not in classes:
            some = ", ".join(classes[:20])
            raise UsageError(f"positive={wanted!r}: choose one of {some}")
        return wanted
    if len(classes) != 2:
        return None
    counts = np.bincount(predictions.labels, minlength=2)
    return classes[0] if counts[0] < counts[1] else classes[1]


@dataclass(frozen=True)
class Measured:
    """The data from which a run's figures are drawn, in addition to its `RunSource`.

    Attributes:
        positive: the class for ROC, precision-recall and decision curves.
        diagnostics: at the run's temperature and threshold.
        faithfulness: of the maps, if it was measured.
        plain, calibrated: `diagnose_calibration` without and with the run's temperature; the same
            object if it has none.
        subgroups: one for each column.
    """

    positive: str | None
    diagnostics: Diagnostics
    faithfulness: Faithfulness | None
    plain: dict[str, Estimate]
    calibrated: dict[str, Estimate]
    subgroups: list[Subgroups]


def measure(
    source: RunSource,
    positive: str | None,
    scored: int,
    bands: Mapping[str, Sequence[float]] | None = None,
) -> Measured:
    """Measures what the figures show.

    Args:
        source: the run.
        positive: see `positive_class`; the class of the run's threshold takes precedence.
        scored: number of images on which the maps' faithfulness is measured; 0: none.
        bands: limits by numeric column; default: see `subgroup_columns`.

    Raises:
        UsageError: there is no such class or column.
    """
    seed = source.recipe["seed"]
    stored = None if source.calibration is None else source.calibration.threshold
    if positive is None and stored is not None:
        positive = stored.positive
    name = positive_class(source.predictions, positive)
    threshold = stored.value if stored is not None and stored.positive == name else None
    said = source.calibrated
    parts = [
        evaluate_subgroups(
            said, column, bands=limits, positive=name, threshold=threshold, seed=seed
        )
        for column, limits in columns_of(said, bands).items()
    ]  # fmt: skip
    found = diagnose(said, positive=name, threshold=threshold, seed=seed)
    plain = after = diagnose_calibration(source.predictions, name, seed=seed)
    if said is not source.predictions:
        after = diagnose_calibration(said, name, seed=seed)
    return Measured(name, found, source.faithfulness(scored), plain, after, parts)


def columns_of(
    predictions: Predictions, bands: Mapping[str, Sequence[float]] | None = None
) -> dict[str, Sequence[float] | None]:
    """The columns whose subgroups are shown, each with its bands or None.

    Raises:
        UsageError: a column with bands does not exist.
    """
    found: dict[str, Sequence[float] | None] = {**subgroup_columns(predictions)}
    for name, limits in (bands or {}).items():
        if name not in (predictions.columns or {}):
            has = ", ".join(predictions.columns or {}) or "none"
            raise UsageError(f"bands={name!r}: no such column; the run's images have {has}")
        found[name] = limits
    return found


def charts(source: RunSource, measured: Measured, width: float = COLUMN) -> list[Chart]:
    """The figures of a run, `width` inches wide."""
    predictions, positive = source.calibrated, measured.positive
    epoch = chosen_epoch(source.facts, source.recipe)
    errors = measured.plain["ece"], measured.calibrated["ece"]
    with for_print():
        drawn = [
            roc(predictions, measured.diagnostics, positive, width),
            precision_recall(predictions, measured.diagnostics, positive, width),
            reliability_chart(source.predictions, predictions, errors, width),
            confusion(source.evaluation, width),
            None
            if positive is None
            else calibration_chart(source.predictions, predictions, positive, width),
            None
            if positive is None
            else decision_chart(predictions, positive, width, measured.diagnostics.one_class),
            *(subgroup_chart(found, width) for found in measured.subgroups),
            learning(source.run.read_metrics(), epoch, width),
            None if measured.faithfulness is None else faithfulness(measured.faithfulness, width),
        ]
    return [chart for chart in drawn if chart is not None]


def file_name(name: str) -> str:
    """A file name without suffix for an image: its name, its folder's name, and a short hash.

    The hash of the whole path distinguishes images with the same name.
    """
    parts = Path(name).parts[-2:]
    safe = _UNSAFE.sub("-", "_".join([*parts[:-1], Path(name).stem])).strip("-.") or "image"
    return f"{safe[-80:]}-{hashlib.blake2b(os.fsencode(name), digest_size=3).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """How figures are written.

    Attributes:
        formats: some of `FORMATS`.
        dpi: of PNG and TIFF, and of pictures within PDF and SVG.
        width: of a figure, in inches.
        images: number of images to explain; 0: none.
        positive: the class for ROC, precision-recall and decision curves, see `positive_class`.
        bands: limits by subgroup column.
        scored: number of images on which faithfulness is measured; None: as in the run's recipe.
        overwrite: replace files that Regard did not write.
    """

    formats: Sequence[str] = ("pdf",)
    dpi: int = 300
    width: float = COLUMN
    images: int = 12
    positive: str | None = None
    bands: Mapping[str, Sequence[float]] | None = None
    scored: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if unknown := [f for f in self.formats if f not in FORMATS]:
            raise UsageError(f"format={unknown[0]}: choose {', '.join(FORMATS)}")
        if not 50 <= self.dpi <= 2400:
            raise UsageError(f"dpi={self.dpi}: between 50 and 2400")
        for name, value in (("images", self.images), ("scored", self.scored or 0)):
            if value < 0:
                raise UsageError(f"{name}={value}: at least 0")


def write_figures(
    source: RunSource,
    out: Path,
    options: FigureOptions,
    texts: Callable[[Measured], dict[str, str]] = lambda measured: {},
    text_names: Sequence[str] = (),
) -> Iterator[Path]:
    """Writes every figure of a run, and explanations of the images selected by `choose`.

    If there are subgroups, subgroups.csv has their numbers.

    Args:
        source: the run.
        out: the folder, created if it is missing.
        options: formats and sizes.
        texts: makes further text files by name, as in `text_names`.
        text_names: their names.

    Yields:
        Each file, once it is written.

    Raises:
        UsageError: no such class, or a file not written by Regard would be overwritten.
        FileError: a file can't be written.
    """
    chosen = choose(source.calibrated, options.images) if source.can_read else []
    pictures = {i: Path(PICTURES, file_name(source.name(i))) for i in chosen}
    columns = columns_of(source.predictions, options.bands)
    names = ["roc", "precision-recall", "reliability", "calibration", "confusion",
             "decision-curve", "learning-curves", "faithfulness", *map(file_of, columns),
             *map(str, pictures.values())]  # fmt: skip
    planned = [out / f"{name}.{kind}" for name in names for kind in options.formats]
    planned += [out / name for name in (*text_names, *([TABLE] if columns else []))]
    refuse_to_replace(planned, [], overwrite=options.overwrite)
    if not source.can_read:
        log.warning("no image is explained: %s", source.problem or "the run's images are not there")
    scored = source.recipe["faithfulness_images"] if options.scored is None else options.scored
    measured = measure(source, options.positive, scored, options.bands)
    out.mkdir(parents=True, exist_ok=True)
    written = texts(measured)
    if measured.subgroups:
        written |= {TABLE: subgroups_csv(measured.subgroups)}
    for name, text in written.items():
        write_text(out / name, text)
        yield out / name
    for chart in charts(source, measured, options.width):
        yield from _save(chart.figure, out / chart.name, options)
    if pictures:
        (out / PICTURES).mkdir(exist_ok=True)
    for i, shown in source.explain_all(chosen):
        yield from _save(shown.figure(width=options.width), out / pictures[i], options)
    if pictures:
        log.info("%s explained, by the rule of the report", plural(len(pictures), "image"))


def _save(figure: Figure, path: Path, options: FigureOptions) -> Iterator[Path]:
    for kind in options.formats:
        file = path.with_name(f"{path.name}.{kind}")
        save(figure, file, dpi=options.dpi)
        yield file
