"""Subgroup columns as sentences and as forest plots."""

import hashlib
import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from regard.evaluation import Subgroups
from regard.evaluation.subgroups import Part
from regard.explanations.print_style import LINE, MAIN, MUTED, SMALL, new_figure, wrapped
from regard.report.curves import Chart
from regard.report.words import NAMES, percent, percent_range

SUBGROUPS = "subgroups-"
"""Prefix of their figures' names."""
MOST_PARTS = 24  # with more, those with most images are drawn
_ROW, _LINE = 0.19, 0.1  # inches: a part's height, and more for each further line of its name
_NAMES = 0.33  # fraction of the width for the parts' names
_UNSAFE = re.compile(r"[^\w.-]+")


def file_of(column: str) -> str:
    """The name of a column's figure: the column's, with a short hash if not a valid file name."""
    safe = _UNSAFE.sub("-", column).strip("-.")[:80]
    if safe == column:
        return f"{SUBGROUPS}{column}"
    digest = hashlib.blake2b(column.encode(errors="replace"), digest_size=3).hexdigest()
    return f"{SUBGROUPS}{safe or 'column'}-{digest}"


def shown_metrics(found: Subgroups) -> list[str]:
    """The metrics shown in a table of subgroups, as far as available."""
    has = {name for part in found.parts.values() for name in part.metrics}
    of_class = ["roc_auc", "sensitivity", "specificity"]
    wanted = ["top1", *(of_class if "sensitivity" in has else ["balanced_accuracy"])]
    return [name for name in wanted if name in has]


def gap_sentences(found: Subgroups, metrics: Sequence[str] | None = None) -> list[str]:
    """The largest gap in each of the metrics; default: those that a table shows."""
    sentences = []
    for metric in shown_metrics(found) if metrics is None else metrics:
        if (gap := found.gap(metric)) is not None and gap[2] > 0:
            high, low, difference = gap
            size = f"{difference:.3f}" if metric == "roc_auc" else f"{100 * difference:.1f} points"
            sentences.append(f"Largest gap in {NAMES[metric]}: {size}, {high} over {low}.")
    return sentences


def subgroup_chart(found: Subgroups, width: float) -> Chart | None:
    """Accuracy, or sensitivity and specificity, of each part with its interval.

    Args:
        found: of one column.
        width: in inches.

    Returns:
        None if no part is large enough.
    """
    parts = [(n, p) for n, p in found.parts.items() if not p.too_small][:MOST_PARTS]
    if not parts:
        return None
    both = any("sensitivity" in p.metrics for _, p in parts)
    metrics = ["sensitivity", "specificity"] if both else ["top1", "balanced_accuracy"]
    labels = [_label(f"{name} ({part.n:,})", width * _NAMES) for name, part in parts]
    lines = max(label.count("\n") for label in labels)
    figure, _ = new_figure(width, 0.62 + (_ROW + _LINE * lines) * len(parts), 0, apart=0.07)
    panels = figure.subplots(1, len(metrics), sharey=True)
    words = []
    for axes, metric in zip(panels, metrics, strict=True):
        for row, (name, part) in enumerate(parts):
            e = part.metrics[metric]
            if e.value == e.value:
                axes.plot([e.low, e.high], [row, row], color=MAIN, linewidth=1.0)
                axes.plot(e.value, row, "o", color=MAIN, markersize=3.2)
                words.append(f"{name} {NAMES[metric]} {percent(e.value)} ({percent_range(e)})")
        _panel(axes, NAMES[metric])
    panels[0].set_yticks(range(len(parts)), labels, parse_math=False)
    panels[0].set_ylim(len(parts) - 0.5, -0.5)
    caption = " ".join(
        [
            "Points with 95 % intervals; in brackets the images.",
            *_left_out(found, parts),
            *gap_sentences(found, metrics),
        ]
    )
    return Chart(
        file_of(found.column), f"By {found.column}", figure,
        f"By {found.column}: {'; '.join(words)}", caption,
    )  # fmt: skip


def _label(text: str, inches: float) -> str:
    """A part's name in up to three lines."""
    lines = wrapped(text, inches, SMALL)
    if len(lines) > 3:  # its beginning and its end
        lines = [lines[0], f"{lines[1][:-1]}…", lines[-1]]
    return "\n".join(lines)


def _left_out(found: Subgroups, drawn: Sequence[tuple[str, Part]]) -> list[str]:
    """Which parts are not drawn."""
    small = [f"{name} ({part.n:,})" for name, part in found.parts.items() if part.too_small]
    more = len(found.parts) - len(small) - len(drawn)
    sentences = [f"Too small to be drawn: {', '.join(small)}."] if small else []
    return [*sentences, *([f"{more} further parts are not drawn."] if more else [])]


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    axes.grid(axis="x", color=LINE, linewidth=0.4)
    axes.set_axisbelow(True)
    axes.spines["left"].set_color(MUTED)
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(max(-0.03, low), min(1.03, high))
