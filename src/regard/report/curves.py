"""ROC and precision-recall curves as figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regard.evaluation import Diagnostics, Estimate, Predictions
from regard.explanations.print_style import LINE, MUTED, SECOND, line_style, new_figure, short_names
from regard.report.bands import Band, precision_recall_of, roc_of

MOST_CURVES = 12  # with more classes, those of lowest area are drawn
_WITHIN = 3  # with more curves the legend would hide them and is placed below the axes
_LINE = 0.135  # inches per line of the legend


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure of the report.

    Attributes:
        name: base name of its files.
        title: its heading.
        figure: the drawing, made within `for_print`.
        words: alternative text, for people who can't see it.
        caption: what a reader must know to read it.
    """

    name: str
    title: str
    figure: Figure
    words: str
    caption: str


def number(estimate: Estimate, decimals: int = 2) -> str:
    """ "0.94 (0.90–0.97)", or the value alone if there is no interval; more digits near 1."""
    if estimate.value < 1 and round(estimate.value, decimals) == 1:
        decimals += 1
    value = f"{estimate.value:.{decimals}f}"
    if not estimate.has_interval:
        return value
    return f"{value} ({estimate.low:.{decimals}f}–{estimate.high:.{decimals}f})"


def share_axes(axes: Axes, x: str, y: str) -> None:
    """Sets both axes from 0 to 1."""
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
    """ROC curves: for the positive class, or for each class against the rest."""
    drawn = _curves(predictions, found, positive, width, roc_of, "roc_auc", "AUC")
    if drawn is None:
        return None
    figure, axes, words, which = drawn
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, linestyle=(0, (1, 2)))
    share_axes(axes, "false positive rate (1 - specificity)", "sensitivity")
    _legend(figure, axes, "lower right")
    one = found.one_class
    if positive is not None and one is not None:
        at = 1 - one.metrics["specificity"].value, one.metrics["sensitivity"].value
        axes.plot(*at, "o", markersize=4.5, color=SECOND, markeredgecolor="white", zorder=5)
        left, low = at[0] > 0.6, at[1] < 0.15  # within the axes, and above the legend
        axes.annotate(
            "top-1 class" if one.threshold is None
            else "no image is called positive" if math.isinf(one.threshold)
            else f"threshold {one.threshold:.3g}",
            at, (-5 if left else 5, 16 if low else -9), textcoords="offset points", color=SECOND,
            ha="right" if left else "left",
        )  # fmt: skip
    return Chart("roc", "ROC curve", figure, f"ROC curve: {words}", f"{which} {_BAND}")


def precision_recall(
    predictions: Predictions, found: Diagnostics, positive: str | None, width: float
) -> Chart | None:
    """Precision against recall: for the positive class, or for each class against the rest."""
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
    _legend(figure, axes, "lower left")
    title = "Precision and recall"
    return Chart("precision-recall", title, figure, f"Precision over recall: {words}", caption)


def _legend(figure: Figure, axes: Axes, where: Literal["lower left", "lower right"]) -> None:
    """Places the legend within the axes for few curves, below them for many."""
    handles = axes.get_legend_handles_labels()[0]
    if len(handles) <= _WITHIN:
        axes.legend(loc=where, handlelength=2.0, borderaxespad=0.2)
    else:
        figure.legend(handles=handles, loc="outside lower left", handlelength=2.0)


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
    shown = names[:MOST_CURVES]
    below = _LINE * len(shown) if len(shown) > _WITHIN else 0.0
    figure, (axes,) = new_figure(width, width * 0.95 + below)
    called = short_names(shown, 18)
    for i, name in enumerate(shown):
        band = make(predictions, name, interval=len(shown) <= 3)
        if band is None:
            continue
        style = line_style(i)
        if len(band.grid):
            axes.fill_between(
                band.grid, band.low, band.high, color=style["color"], alpha=0.18, linewidth=0
            )
        label = f"{called[i]}: {unit} {number(areas[name])}"
        # ROC AUC is the area below straight lines, average precision that below steps
        drawstyle = "default" if make is roc_of else "steps-pre"
        axes.plot(band.x, band.y, label=label, drawstyle=drawstyle, **style)
    mean = found.metrics.get(f"{kind}_macro")
    words = "; ".join(f"{n} {unit} {number(areas[n])}" for n in shown)
    which = f"{positive} against the rest." if positive is not None else "Each class against all."
    if len(names) > len(shown):
        which += f" The {len(shown)} of {len(names)} classes with the smallest area."
    if positive is None and mean is not None:
        of = "" if len(names) == len(predictions.classes) else f"the {len(names)} tested "
        which += f" Mean over {of}classes: {number(mean)}."
    return figure, axes, words, which
