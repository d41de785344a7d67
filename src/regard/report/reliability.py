"""Reliability diagrams, calibration plots and decision curves as figures."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from regard.evaluation import Estimate, OneClass, Predictions, decision_curve, reliability
from regard.evaluation.predictions import BINS, Floats
from regard.evaluation.recalibration import ReliabilityBin, calibration_line
from regard.explanations.print_style import INK, LINE, MAIN, MUTED, SECOND, new_figure, short
from regard.report.curves import Chart, number, share_axes

_MOST_RANGES = 3  # most threshold ranges that are named


def reliability_chart(
    plain: Predictions, calibrated: Predictions, errors: tuple[Estimate, Estimate], width: float
) -> Chart:
    """Accuracy against the top-1 probability, with the number of images per bin.

    Args:
        plain: the network's own predictions.
        calibrated: at the run's temperature; the same object if it has none.
        errors: the ECE of both.
        width: in inches.
    """
    labels = [f"ECE {number(error, 3)}" for error in errors]
    figure, words = _diagram(plain, calibrated, width, None, labels)
    figure.axes[0].set_ylabel("share that is right")
    figure.axes[1].set_xlabel("probability of the top-1 class")
    return Chart(
        "reliability", "Reliability", figure, f"Reliability: {words}",
        _caption("", plain, calibrated),
    )  # fmt: skip


def calibration_chart(
    plain: Predictions, calibrated: Predictions, positive: str, width: float
) -> Chart:
    """The share of a class against its probability, with the number of images per bin."""

    def fit(said: Predictions) -> str:
        found = calibration_line(said, positive)
        slope, intercept = (
            f"{e.value:.2f}" if math.isfinite(e.value) else "not defined"
            for e in (found["calibration_slope"], found["calibration_intercept"])
        )
        return f"slope {slope}, intercept {intercept}"

    figure, words = _diagram(plain, calibrated, width, positive, [fit(plain), fit(calibrated)])
    figure.axes[0].set_ylabel(f"share of {short(positive, 24)}")
    figure.axes[1].set_xlabel(f"probability of {short(positive, 24)}")
    return Chart(
        "calibration", f"Calibration of {positive}", figure, f"Calibration of {positive}: {words}",
        _caption(f" of {positive}", plain, calibrated),
    )  # fmt: skip


def _diagram(
    plain: Predictions,
    calibrated: Predictions,
    width: float,
    positive: str | None,
    labels: Sequence[str],
) -> tuple[Figure, str]:
    """The observed shares above, the numbers of images below, and both as text."""
    figure, _ = new_figure(width, width * 1.16, 0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    share_axes(upper, "", "")
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
    shown = [("", MAIN, plain)]
    if calibrated is not plain:
        shown = [("before: ", SECOND, plain), ("after: ", MAIN, calibrated)]
    words = []
    bar = 0.92 / BINS / len(shown)
    for k, (name, color, said) in enumerate(shown):
        rows: Sequence[ReliabilityBin] = reliability(said, bins=BINS, positive=positive)
        y = [r.accuracy for r in rows]
        ends = [[r.accuracy - r.interval[0], r.interval[1] - r.accuracy] for r in rows]
        aside = k - (len(shown) - 1) / 2  # -0.5 and 0.5 for two: their bars do not overlap
        upper.errorbar(
            [r.confidence for r in rows], y, np.maximum(ends, 0).T, fmt="so"[k == len(shown) - 1],
            color=color, markersize=3.2, elinewidth=0.8, capsize=1.5, clip_on=False,
            transform=upper.transData
            + ScaledTranslation(3.6 * aside / 72, 0, figure.dpi_scale_trans),
            label=f"{name}{labels[k]}",
        )  # fmt: skip
        lower.bar(
            [(r.low + r.high) / 2 + aside * bar for r in rows], [r.images for r in rows],
            width=bar, color=color, alpha=0.8,
        )  # fmt: skip
        words += [f"{name}{r.accuracy:.2f} at {r.confidence:.2f}" for r in rows]
    figure.legend(loc="outside upper left", handlelength=1.2)
    lower.set_ylabel("images")
    lower.locator_params(axis="y", nbins=3, integer=True)
    figure.align_ylabels([upper, lower])
    return figure, ", ".join(words)


def _caption(of: str, plain: Predictions, calibrated: Predictions) -> str:
    caption = f"Calibrated probabilities{of} lie on the dotted line ({BINS} bins). "
    caption += "Bars: Wilson's 95 % interval"
    caption += " for images in groups." if plain.groups is not None else "."
    if calibrated is not plain:
        caption += " Before and after temperature scaling, drawn side by side."
    return caption


# ---- net benefit -------------------------------------------------------------------------
def decision_chart(
    predictions: Predictions, positive: str, width: float, decided: OneClass | None = None
) -> Chart:
    """Net benefit against the threshold probability (Vickers & Elkin 2006).

    Args:
        predictions: of test images.
        positive: the class.
        width: in inches.
        decided: its threshold is marked, if it has one.
    """
    curve = decision_curve(predictions, positive, resamples=300)
    figure, (axes,) = new_figure(width, width * 0.86)
    axes.fill_between(curve.thresholds, curve.low, curve.high, color=MAIN, alpha=0.18, linewidth=0)
    axes.plot(curve.thresholds, curve.model, color=MAIN, label="network")
    axes.plot(curve.thresholds, curve.treat_all, color=SECOND, linestyle="--", label="all positive")
    axes.axhline(0, color=INK, linewidth=0.7, linestyle=":", label="none positive")
    top = max(float(curve.high.max()), float(curve.treat_all.max()), 0.01)
    marked = None if decided is None else decided.threshold
    if marked is not None and 0 < marked < 1:
        axes.axvline(
            marked, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0,
            label=f"the run's threshold, {marked:.3g}",
        )  # fmt: skip
    axes.set(
        xlim=(0, 1), ylim=(-0.2 * top, 1.06 * top), ylabel="net benefit",
        xlabel=f"threshold probability of {short(positive, 24)}",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(color=LINE, linewidth=0.4)
    figure.legend(loc="outside upper left", handlelength=2.0, ncols=2)
    better = curve.model > np.maximum(curve.treat_all, 0) + 1e-12
    where = where_above(curve.thresholds, better)
    words = f"Decision curve of {positive}: above both simple rules {where}"
    return Chart("decision-curve", "Decision curve", figure, words, _NET_BENEFIT)


def where_above(thresholds: Floats, above: NDArray[np.bool_]) -> str:
    """Up to three ranges of ascending thresholds as text; if more, the number of thresholds."""
    starts = np.flatnonzero(above & ~np.concatenate([[False], above[:-1]]))
    ends = np.flatnonzero(above & ~np.concatenate([above[1:], [False]]))
    if len(starts) == 0:
        return "nowhere"
    if len(starts) > _MOST_RANGES:
        first, last = thresholds[starts[0]], thresholds[ends[-1]]
        return (
            f"at {above.sum()} of the {len(thresholds)} thresholds, between {first:.0%} and "
            f"{last:.0%}"
        )
    parts = [
        f"at {low:.0%}" if low == high else f"from {low:.0%} to {high:.0%}"
        for low, high in zip(thresholds[starts], thresholds[ends], strict=True)
    ]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


_NET_BENEFIT = (
    "Net benefit: true positives minus false positives weighted by the odds of the threshold, per "
    "image, as the test images are mixed. Shaded: 95 % interval by bootstrap."
)
