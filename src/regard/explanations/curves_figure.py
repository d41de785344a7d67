"""The figure of deletion and insertion curves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from regard.evaluation.intervals import draws, percentile_band
from regard.evaluation.predictions import units
from regard.explanations.deletion import CONTROLS, Floats, MapScore
from regard.explanations.print_style import (
    LINE,
    MUTED,
    SMALL,
    for_print,
    line_style,
    new_figure,
    short,
)

_WITHIN = 3  # with more curves the legend would hide them and is placed below the axes
_TITLES = ("Deletion: low is good", "Insertion: high is good")


def curves_figure(scores: Mapping[str, MapScore], *, width: float = 7.16, seed: int = 0) -> Figure:
    """Mean deletion and insertion curves of each map and 95 % intervals over images or groups.

    The controls are gray and dashed, without intervals.

    Args:
        scores: by map, from `regard.explanations.faithfulness`.
        width: in inches; below 5 the panels are stacked vertically.
        seed: random seed of the bootstrap.
    """
    with for_print():
        narrow = width < 5
        columns = 2 if narrow else 4
        below = 0.15 * math.ceil((len(scores) + 1) / columns)  # inches, of the legend
        below *= len(scores) > _WITHIN
        figure, _ = new_figure(width, width * (1.5 if narrow else 0.42) + below, 0)
        panels = figure.subplots(*((2, 1) if narrow else (1, 2)))
        own = [name for name in scores if name not in CONTROLS]
        for k, axes in enumerate(panels):
            for name, score in scores.items():
                style = _style(name, own)
                mean, low, high = _band(score.curves[k], score.groups, seed)
                x = np.linspace(0, 1, len(mean))
                if name in own and score.deletion.has_interval:
                    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
                axes.plot(x, mean, label=short(name, 24), **style)
            axes.set_title(_TITLES[k])
            axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of the pixels")
            axes.grid(color=LINE, linewidth=0.4)
            if k == 0 or narrow:
                axes.set_ylabel("probability of the class")
        handles = panels[1].get_legend_handles_labels()[0]
        if any(scores[name].deletion.has_interval for name in own):
            handles.append(Patch(color=MUTED, alpha=0.3, linewidth=0, label="95 % interval"))
        if len(scores) > _WITHIN:
            figure.legend(
                handles=handles, fontsize=SMALL, loc="outside lower center", handlelength=2.4,
                ncols=columns,
            )  # fmt: skip
        else:
            panels[1].legend(handles=handles, fontsize=SMALL, loc="lower right", handlelength=2.4)
    return figure


def _style(name: str, own: list[str]) -> dict[str, Any]:
    if name in own:
        return line_style(own.index(name))
    return {"color": MUTED, "linestyle": "--" if name == CONTROLS[0] else ":", "linewidth": 1.0}


def _band(
    curves: Floats, groups: Sequence[str] | None, seed: int, resamples: int = 500
) -> tuple[Floats, Floats, Floats]:
    """(images, steps) -> the mean and its 95 % interval over images or groups, pointwise."""
    unit, n_units = units(groups, len(curves))
    mean = curves.mean(axis=0)
    drawn = np.stack([w[unit] @ curves / w[unit].sum() for w in draws(n_units, resamples, seed)])
    low, high = percentile_band(drawn, 0.95, n_units)
    return mean, np.minimum(low, mean), np.maximum(high, mean)
