"""Calibration, threshold and subgroups of a run, as tables of its report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regard.evaluation import Estimate, OneClass, Subgroups, Threshold, diagnose_class
from regard.files import plural
from regard.report.figures import Measured
from regard.report.source import RunSource
from regard.report.subgroups import gap_sentences, shown_metrics
from regard.report.words import NAMES, SPLITS, number_range, percent, percent_range, signed

CALIBRATION = ("reliability", "calibration", "decision-curve")
"""Names of the figures in the section on calibration."""
_SHARES = ("sensitivity", "specificity", "ppv", "npv")


@dataclass(frozen=True)
class Table:
    """A table of texts; the first cell of each row names it.

    Attributes:
        caption: what it shows.
        headings, rows: of equal length.
        notes: sentences below it.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Sentences and tables."""

    sentences: Sequence[str]
    tables: Sequence[Table]


# ---- calibration -------------------------------------------------------------------------
def calibration_section(source: RunSource, measured: Measured) -> Section:
    """Calibration before and after the temperature, and the threshold if one was chosen."""
    stored, split = source.calibration, SPLITS[source.split]
    two = len(source.predictions.classes) == 2 and measured.positive is not None
    tables = [_calibration_table(measured, split, two)]
    if stored is None:
        return Section([
            f"No temperature and no threshold are stored: the {split} images show the network as "
            f"it was trained. `regard calibrate {source.run.path.name}` fits both on images that "
            "don't test it."
        ], tables)  # fmt: skip
    sentences = []
    if stored.temperature != 1:
        sentences.append(
            f"A temperature of {stored.temperature:.4g} was fitted on {stored.images:,} "
            f"{stored.source}: negative log-likelihood {stored.before['nll']:.4f} to "
            f"{stored.after['nll']:.4f} nats and calibration error (ECE) "
            f"{stored.before['ece']:.4f} to {stored.after['ece']:.4f} there."
        )
    if source.split == "val" and stored.source.startswith("validation"):
        sentences.append("It is shown on these very images: new ones can be expected to fit less.")
    if stored.threshold is not None:
        one = measured.diagnostics.one_class
        if one is not None and one.threshold is not None:
            plain = diagnose_class(source.calibrated, one.positive, seed=source.recipe["seed"])
            tables.append(_threshold_table(stored.threshold, one, plain, split))
        else:
            sentences.append(
                f"The stored threshold is one of {stored.threshold.positive}; the numbers of this "
                "page are those of another class."
            )
    return Section(sentences, tables)


def _calibration_table(measured: Measured, split: str, two_classes: bool) -> Table:
    plain, after = measured.plain, measured.calibrated
    headings = ["metric", split + " images", "95 % interval"]
    if after is not plain:
        headings = ["metric", "before", "95 % interval", "after", "95 % interval"]
    rows = []
    for name, before in plain.items():
        if name == "brier" and two_classes:  # "brier" is that of the class
            continue
        each = [before] if after is plain else [before, after[name]]
        label = NAMES[name]
        if name in ("brier_positive", "calibration_slope", "calibration_intercept"):
            label = f"{measured.positive}: {label}"
        rows.append([label, *(cell for e in each for cell in _cells(e))])
    how = "" if after is plain else ", before and after temperature scaling"
    notes = [] if measured.positive is not None else [
        "Slope and intercept are those of one class: `--positive CLASS` names it."
    ]  # fmt: skip
    return Table(f"Calibration on the {split} images{how}.", headings, rows, notes)


def _threshold_table(chosen: Threshold, at: OneClass, top1: OneClass, split: str) -> Table:
    there = {"sensitivity": chosen.sensitivity, "specificity": chosen.specificity}
    rows = []
    for name in _SHARES:
        e = at.metrics[name]
        known = percent(there[name]) if name in there else "–"
        rows.append([NAMES[name], known, *_percents(e), _percents(top1.metrics[name])[0]])
    for key, label in (("tp", "true positives"), ("fp", "false positives"),
                       ("tn", "true negatives"), ("fn", "false negatives")):  # fmt: skip
        rows.append([label, "–", f"{at.counts[key]:,}", "–", f"{top1.counts[key]:,}"])
    value = f"{chosen.value:.4g}" if math.isfinite(chosen.value) else "no probability"
    return Table(
        f"Threshold: {chosen.positive} from {value} up ({chosen.rule}), chosen on "
        f"{plural(chosen.images, 'image')}.",
        ["", "where it was chosen", f"{split} images", "95 % interval", "top-1 class decides"],
        rows,
    )


# ---- subgroups ---------------------------------------------------------------------------
def subgroup_section(found: Sequence[Subgroups], positive: str | None) -> Section | None:
    """A table for each column; None if there are no columns."""
    if not found:
        return None
    small = max(each.at_least for each in found)
    of = (
        ""
        if positive is None
        else f" ROC AUC, sensitivity and specificity are those of {positive}."
    )
    return Section(
        [
            "Each part of the images by itself, by the further columns of the data; parts below "
            f"{small} images or groups are counted only. A gap between many small parts is "
            f"large by chance alone: read it with the intervals.{of}"
        ],
        [_subgroup_table(each) for each in found],
    )


def _subgroup_table(found: Subgroups) -> Table:
    metrics = shown_metrics(found)
    grouped = any(part.n_groups is not None for part in found.parts.values())
    headings = [found.column, "images", *(["groups"] if grouped else [])]
    for metric in metrics:
        headings += [NAMES[metric], "95 % interval"]
    first = len(headings) - 2 * len(metrics)
    if not metrics:  # every part is too small
        headings.append("metrics")
    rows = []
    for name, part in found.parts.items():
        row = [name, f"{part.n:,}", *([f"{part.n_groups:,}"] if grouped else [])]
        for metric in metrics:
            e = part.metrics.get(metric)
            plain = metric == "roc_auc"
            row += ["–", "–"] if e is None else _cells(e) if plain else _percents(e)
        if part.too_small:
            row[first : first + 1] = ["too small"]
        rows.append(row)
    return Table(f"By {found.column}.", headings, rows, gap_sentences(found))


def _cells(e: Estimate) -> list[str]:
    if not math.isfinite(e.value):
        return ["–", "–"]
    return [signed(e.value), number_range(e)]


def _percents(e: Estimate) -> list[str]:
    if not math.isfinite(e.value):
        return ["–", "–"]
    return [percent(e.value), percent_range(e)]
