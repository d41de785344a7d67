"""The confusion matrix, the training curves and faithfulness as figures."""

import math
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from regard.evaluation import Evaluation
from regard.explanations.curves_figure import curves_figure
from regard.explanations.faithfulness import Faithfulness, interval
from regard.explanations.print_style import (
    LINE,
    MAIN,
    MUTED,
    SECOND,
    SMALL,
    new_figure,
    short_names,
)
from regard.files import plural
from regard.report.curves import Chart
from regard.report.words import percent

History = list[dict[str, float]]
MOST_NUMBERED = 12  # largest number of classes whose cells hold numbers
MOST_NAMED = 40
MOST_CLASSES = 200  # beyond this a matrix can't be read


def confusion(evaluation: Evaluation, width: float) -> Chart | None:
    """The confusion matrix: shade and share of the true class, and the count below it."""
    classes = evaluation.classes
    if len(classes) > MOST_CLASSES:
        return None
    counts = evaluation.confusion.toarray()
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    longest = max(map(len, classes)) if len(classes) <= MOST_NAMED else 0
    flat = longest * len(classes) * 0.6 * SMALL < 72 * width * 0.65  # room for all names
    figure, (axes,) = new_figure(width, width * (0.84 - 0.02 * min(longest, 8) if flat else 1.0))
    shades = matplotlib.colormaps["Blues"]
    picture = axes.imshow(shares, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(False)
    letters = min(16, round(72 * width / 4 / (0.6 * SMALL)))  # of a name: a quarter of the width
    turned = 0 if flat else 45 if len(classes) <= MOST_NUMBERED else 90
    if len(classes) <= MOST_NAMED:
        _name(axes, classes, 1, turned, letters)
    axes.tick_params(length=0, labelsize=SMALL)
    bar = figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    figure.draw_without_rendering()  # computes the layout: the names may leave little room
    room = 72 * axes.get_window_extent().width / figure.dpi
    apart = math.ceil(1.1 * SMALL * len(classes) / room)  # of names that do not overlap
    if apart > 1 and len(classes) <= MOST_NAMED:
        _name(axes, classes, apart, turned, letters)
    _crop(figure)
    numbered = _cells(axes, counts, shares, room) if len(classes) <= MOST_NUMBERED else ""
    hits, total = int(np.trace(counts)), int(counts.sum())
    words = f"Confusion matrix of {len(classes)} classes: {hits} of {plural(total, 'image')} right"
    caption = f"A row per true class, a column per top-1 class. {numbered or _SHADE}."
    if apart > 1 and len(classes) <= MOST_NAMED:
        caption += f" One class in {apart} is named."
    return Chart("confusion", "Confusion matrix", figure, words, caption)


_SHADE = "Shade: share of the true class"


def _name(axes: Axes, classes: Sequence[str], apart: int, turned: int, letters: int) -> None:
    """Names every `apart`-th class at both axes, in up to so many letters."""
    places = range(0, len(classes), apart)
    names = short_names(classes, letters)[::apart]
    axes.set_xticks(places, names, rotation=turned, ha="right" if turned else "center",
                    va="center" if turned == 90 else "top", rotation_mode="anchor",
                    parse_math=False)  # fmt: skip
    axes.set_yticks(places, names, parse_math=False)


def _crop(figure: Figure) -> None:
    """Takes away the height that a square matrix leaves empty above and below."""
    width, height = figure.get_size_inches()
    used = figure.get_tightbbox().height + 0.06  # inches
    if used < height:
        figure.set_size_inches(width, used)
        figure.draw_without_rendering()


def _cells(axes: Axes, counts: np.ndarray, shares: np.ndarray, width: float) -> str:
    """Writes share and count into each cell of a matrix `width` points wide, and says so.

    If both would be too small to read, only the count is written.
    """
    room, digits = width / len(counts), len(f"{counts.max():,}")
    both = room / 3.7 > 3.6
    size = min(SMALL, room / 3.7 if both else room / (0.65 * digits + 0.6))
    for (i, j), count in np.ndenumerate(counts):
        if not count:
            continue
        text = f"{100 * shares[i, j]:.0f} %\n{count:,}" if both else f"{count:,}"
        color = (
            "white" if shares[i, j] > 0.5 else "black"
        )  # not INK: cells stay light on dark pages
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=color)
    if both:
        return "Shade and percentages: share of the true class; below, the number of images"
    return f"{_SHADE}; the numbers are images"


# ---- training ----------------------------------------------------------------------------
_Lines = dict[str, str]


def _quantities(history: History) -> list[tuple[str, _Lines]]:
    """The curves to draw: training and validation loss in one panel only if they are comparable.

    If the history has the minimized objective in a separate column, `loss` is the cross
    entropy of the prediction, like `val_loss`.
    """
    rows = history[0] if history else {}
    accuracy = ("Accuracy", {"training": "accuracy", "validation": "val_accuracy"})
    rate = ("Learning rate", {"learning rate": "learning_rate"})
    if "objective" not in rows:
        losses = [("Training loss", {"training": "loss"}),
                  ("Validation loss", {"validation": "val_loss"})]  # fmt: skip
        return [*losses, accuracy, rate]
    losses = [("Loss", {"training": "loss", "validation": "val_loss"})]
    if any(not math.isclose(r["objective"], r["loss"], rel_tol=1e-3) for r in history):
        losses.append(("Training objective", {"training": "objective"}))
    return [*losses, accuracy, rate]


def _points(history: History, key: str) -> list[tuple[float, float]]:
    return [(row["epoch"], row[key]) for row in history if key in row]


def _ends(name: str, values: list[tuple[float, float]], share: bool) -> str:
    def word(y: float) -> str:
        if not math.isfinite(y):
            return "not finite"
        return percent(y) if share else f"{y:.3g}"

    return f"{name} from {word(values[0][1])} to {word(values[-1][1])}"


def learning(history: History, chosen: float | None, width: float) -> Chart | None:
    """Loss, accuracy and learning rate by epoch, in one or two rows of panels."""
    shown = []
    for title, keys in _quantities(history):
        lines = {name: _points(history, key) for name, key in keys.items()}
        lines = {n: v for n, v in lines.items() if any(math.isfinite(y) for _, y in v)}
        if lines:
            shown.append((title, lines))
    if not shown:
        return None
    columns = len(shown) if width > 5 else min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, _ = new_figure(width, rows * width / columns * 0.85, 0)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    words = []
    for axes, (title, lines) in zip(panels, shown, strict=False):
        _panel(axes, title, lines, chosen if len(history) > 1 else None)
        each = "; ".join(_ends(n, v, title == "Accuracy") for n, v in lines.items())
        words.append(f"{title} by epoch: {each}")
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    handles = {h.get_label(): h for a in panels for h in a.get_legend_handles_labels()[0]}
    both = [handles[name] for name in ("training", "validation") if name in handles]
    if len(both) > 1:
        figure.legend(handles=both, loc="outside lower center", ncols=2, handlelength=2.0)
    caption = "" if chosen is None or len(history) < 2 else (
        f"The dashed line marks epoch {chosen:g}, whose weights were evaluated."
    )  # fmt: skip
    return Chart("learning-curves", "Learning curves", figure, ". ".join(words), caption)


def _panel(
    axes: Axes, title: str, lines: dict[str, list[tuple[float, float]]], chosen: float | None
) -> None:
    few = max(len(v) for v in lines.values()) <= 15
    for name, values in lines.items():
        second = name == "validation"
        y = [v if math.isfinite(v) else math.nan for _, v in values]
        axes.plot(
            [x for x, _ in values], y, color=SECOND if second else MAIN, label=name,
            linestyle="--" if second else "-", marker="o" if few else None, markersize=2.4,
        )  # fmt: skip
    finite = [y for v in lines.values() for _, y in v if math.isfinite(y)]
    if title == "Accuracy":
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.set_ylim(top=min(1.005, max(finite) + 0.1) if max(finite) > 0.9 else None)
        apart = float(np.diff(axes.get_yticks()).min())  # tick labels must differ
        decimals = max(0, math.ceil(-math.log10(100 * apart) - 1e-9))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))
    else:
        axes.set_ylim(bottom=_bottom(finite))
    if chosen is not None:
        axes.axvline(chosen, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    epochs = {x for v in lines.values() for x, _ in v}
    if len(epochs) == 1:
        axes.set_xticks([*epochs], [f"{x:g}" for x in epochs])
    axes.grid(color=LINE, linewidth=0.4)


def _bottom(values: Iterable[float]) -> float | None:
    """0 if the lowest value is less than half of the highest."""
    finite = list(values)
    return 0.0 if 0 <= min(finite) < max(finite) / 2 else None


# ---- maps --------------------------------------------------------------------------------
def faithfulness(found: Faithfulness, width: float) -> Chart:
    """Deletion and insertion curves of each map, with their bands over images."""
    figure = curves_figure(found.scores, width=width)
    words = "; ".join(
        f"{s.name}: deletion {interval(s.deletion, 2)}, insertion {interval(s.insertion, 2)}"
        for s in found.scores.values()
    )
    caption = f"Mean over {plural(found.images, 'image')}" + (
        f"; shaded: 95 % interval over {found.over}." if found.over else "."
    )
    title = "Deletion and insertion"
    return Chart("faithfulness", title, figure, f"Deletion and insertion: {words}", caption)
