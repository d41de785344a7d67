"""ROC, precision-recall, reliability and decision curves as figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from regard.evaluation import (
    Diagnostics,
    Estimate,
    Predictions,
    decision_curve,
    evaluate,
    reliability,
)
from regard.explanations.print_style import (
    INK,
    LINE,
    MAIN,
    MUTED,
    SECOND,
    line_style,
    new_figure,
    short,
)
from regard.report.bands import Band, precision_recall_of, roc_of

MOST_CURVES = 12  # of more classes, those of lowest area are drawn


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure of the report.

    Attributes:
        name: of its files.
        title: its heading.
        figure: the drawing, made within `for_print`.
        words: what it shows, for people who can't see it.
        caption: what a reader must know to read it.
    """

    name: str
    title: str
    figure: Figure
    words: str
    caption: str


def number(estimate: Estimate, decimals: int = 2) -> str:
    """ "0.94 (0.90–0.97)", or the value alone where there is no interval; more digits near 1."""
    if estimate.value < 1 and round(estimate.value, decimals) == 1:
        decimals += 1
    value = f"{estimate.value:.{decimals}f}"
    if not estimate.has_interval:
        return value
    return f"{value} ({estimate.low:.{decimals}f}–{estimate.high:.{decimals}f})"


def share_axes(axes: Axes, x: str, y: str) -> None:
    """Axes from 0 to 1 both ways."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x, ylabel=y)
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    axes.set_xticks(ticks, [f"{t:.1f}" for t in ticks])
    axes.set_yticks(ticks, [f"{t:.1f}" for t in ticks])
    axes.grid(color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)


# ---- ROC and precision-recall ------------------------------------------------------------
def roc(
    predictions: Predictions, found: Diagnostics, positive: str | None, width: float
) -> Chart | None:
    """ROC curves: of the positive class, or of each class against the rest."""
    drawn = _curves(predictions, found, positive, width, roc_of, "roc_auc", "AUC")
    if drawn is None:
        return None
    figure, axes, words, which = drawn
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
    share_axes(axes, "false positive rate (1 - specificity)", "sensitivity")
    axes.legend(loc="lower right", handlelength=2.0, borderaxespad=0.2)
    one = found.one_class
    if positive is not None and one is not None:
        at = 1 - one.metrics["specificity"].value, one.metrics["sensitivity"].value
        axes.plot(*at, "o", markersize=4.5, color=SECOND, markeredgecolor="white", zorder=5)
        axes.annotate(
            "top-1 class" if one.threshold is None else f"threshold {one.threshold:.3g}",
            at, (5, -9), textcoords="offset points", color=SECOND,
        )  # fmt: skip
    return Chart("roc", "ROC curve", figure, f"ROC curve: {words}", f"{which} {_BAND}")


def precision_recall(
    predictions: Predictions, found: Diagnostics, positive: str | None, width: float
) -> Chart | None:
    """Precision over recall: of the positive class, or of each class against the rest."""
    of = precision_recall_of, "average_precision", "AP"
    drawn = _curves(predictions, found, positive, width, *of)
    if drawn is None:
        return None
    figure, axes, words, which = drawn
    caption = f"{which} {_BAND}"
    if positive is not None:
        share = float((predictions.labels == predictions.classes.index(positive)).mean())
        axes.axhline(share, color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
        caption += f" The dotted line is the share of {positive}, {share:.1%}."
    share_axes(axes, "recall (sensitivity)", "precision (positive predictive value)")
    axes.legend(loc="lower left", handlelength=2.0, borderaxespad=0.2)
    title = "Precision and recall"
    return Chart("precision-recall", title, figure, f"Precision over recall: {words}", caption)


_BAND = "Shaded, of up to 3 curves: pointwise 95 % interval; in brackets that of the area."
_Maker = Callable[..., Band | None]


def _curves(
    predictions: Predictions,
    found: Diagnostics,
    positive: str | None,
    width: float,
    make: _Maker,
    kind: str,
    unit: str,
) -> tuple[Figure, Axes, str, str] | None:
    areas = {name: each[kind] for name, each in found.per_class.items()}
    names = [positive] if positive is not None else sorted(areas, key=lambda n: areas[n].value)
    names = [n for n in names if n in areas and not math.isnan(areas[n].value)]
    if not names:
        return None
    figure, (axes,) = new_figure(width, width * 0.95)
    shown = names[:MOST_CURVES]
    for i, name in enumerate(shown):
        band = make(predictions, name, interval=len(shown) <= 3)
        if band is None:
            continue
        style = line_style(i)
        if len(band.grid):
            axes.fill_between(
                band.grid, band.low, band.high, color=style["color"], alpha=0.18, linewidth=0
            )
        label = f"{short(name, 18)}: {unit} {number(areas[name])}"
        # the area of the ROC is that below straight lines, average precision that below steps
        drawstyle = "default" if make is roc_of else "steps-pre"
        axes.plot(band.x, band.y, label=label, drawstyle=drawstyle, **style)
    mean = found.metrics.get(f"{kind}_macro")
    words = "; ".join(f"{n} {unit} {number(areas[n])}" for n in shown)
    which = f"{positive} against the rest." if positive is not None else "Each class against all."
    if len(names) > len(shown):
        which += f" The {len(shown)} of {len(names)} classes with the smallest area."
    if positive is None and mean is not None:
        which += f" Mean over classes: {number(mean)}."
    return figure, axes, words, which


# ---- calibration -------------------------------------------------------------------------
def reliability_chart(
    plain: Predictions, calibrated: Predictions, width: float, *, bins: int = 10
) -> Chart:
    """Accuracy over the probability of the top-1 class, and how many images have it.

    Args:
        plain: the network's own predictions.
        calibrated: at the run's temperature; the same object where it has none.
        width: in inches.
        bins: of equal width.
    """
    figure, _ = new_figure(width, width * 1.1, 0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    share_axes(upper, "", "share that is right")
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
    shown = [("", MAIN, plain)]
    if calibrated is not plain:
        shown = [("before: ", SECOND, plain), ("after: ", MAIN, calibrated)]
    words = []
    for k, (name, color, said) in enumerate(shown):
        rows = reliability(said, bins=bins)
        ece = number(evaluate(said, resamples=300).metrics["ece"], 3)
        y = [r.accuracy for r in rows]
        ends = [[r.accuracy - r.interval[0], r.interval[1] - r.accuracy] for r in rows]
        upper.errorbar(
            [r.confidence for r in rows], y, np.maximum(ends, 0).T, fmt="so"[k == len(shown) - 1],
            color=color, markersize=3.2, elinewidth=0.8, capsize=1.5, label=f"{name}ECE {ece}",
        )  # fmt: skip
        lower.bar(
            [(r.low + r.high) / 2 for r in rows], [r.images for r in rows], width=0.92 / bins,
            color=color, alpha=0.55,
        )  # fmt: skip
        words += [f"{name}{r.accuracy:.2f} right at {r.confidence:.2f}" for r in rows]
    upper.legend(loc="upper left", handlelength=1.2)
    lower.set(xlabel="probability of the top-1 class", ylabel="images")
    lower.locator_params(axis="y", nbins=3, integer=True)
    caption = "Calibrated probabilities lie on the dotted line. Bars: Wilson's 95 % interval" + (
        " of images, too narrow where images come in groups." if plain.groups is not None else "."
    )
    if len(shown) > 1:
        caption += " Before and after temperature scaling."
    title = f"Reliability: {', '.join(words)}"
    return Chart("reliability", "Reliability", figure, title, caption)


# ---- net benefit -------------------------------------------------------------------------
def decision_chart(predictions: Predictions, positive: str, width: float) -> Chart:
    """Net benefit over the threshold probability (Vickers & Elkin 2006)."""
    curve = decision_curve(predictions, positive, resamples=300)
    figure, (axes,) = new_figure(width, width * 0.8)
    axes.fill_between(curve.thresholds, curve.low, curve.high, color=MAIN, alpha=0.18, linewidth=0)
    axes.plot(curve.thresholds, curve.model, color=MAIN, label="network")
    axes.plot(curve.thresholds, curve.treat_all, color=SECOND, linestyle="--", label="all positive")
    axes.axhline(0, color=INK, linewidth=0.7, linestyle=":", label="none positive")
    top = max(float(curve.high.max()), float(curve.treat_all.max()), 0.01)
    axes.set(
        xlim=(0, 1), ylim=(-0.2 * top, 1.06 * top), ylabel="net benefit",
        xlabel=f"threshold probability of {short(positive, 24)}",
    )  # fmt: skip
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(color=LINE, linewidth=0.4)
    axes.legend(loc="upper right", handlelength=2.0)
    better = curve.thresholds[curve.model > np.maximum(curve.treat_all, 0) + 1e-12]
    where = f"from {better[0]:.0%} to {better[-1]:.0%}" if len(better) else "nowhere"
    words = f"Decision curve of {positive}: above both simple rules {where}"
    return Chart("decision-curve", "Decision curve", figure, words, _NET_BENEFIT)


_NET_BENEFIT = (
    "Net benefit: true positives minus false positives weighted by the odds of the threshold, per "
    "image, as the test images are mixed. Shaded: 95 % interval by bootstrap."
)
