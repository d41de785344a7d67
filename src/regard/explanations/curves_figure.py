"""The figure of deletion and insertion curves."""

from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure

from regard.explanations.deletion import CONTROLS, MapScore

_SMALL, _NORMAL = 6.5, 8.0  # points


def curves_figure(scores: Mapping[str, MapScore]) -> Figure:
    """Mean deletion and insertion curves of each map; the controls are gray and dashed.

    Args:
        scores: by map, of `regard.explanations.faithfulness`.
    """
    fig = Figure(figsize=(7.16, 2.9), facecolor="white", layout="constrained")
    colors = matplotlib.colormaps["viridis"]
    own = [name for name in scores if name not in CONTROLS]
    for k, title in enumerate(("deletion: low is good", "insertion: high is good")):
        axes = fig.add_subplot(1, 2, k + 1)
        for name, score in scores.items():
            mean = score.curves[k].mean(axis=0)
            x = [i / (len(mean) - 1) for i in range(len(mean))]
            if name in CONTROLS:
                style = "--" if name == CONTROLS[0] else ":"
                axes.plot(x, mean, color="#777777", linestyle=style, linewidth=1.2, label=name)
            else:
                color = colors(0.85 * own.index(name) / max(1, len(own) - 1))
                axes.plot(x, mean, color=color, linewidth=1.4, label=name)
        axes.set_title(title, fontsize=_NORMAL, loc="left", weight="bold")
        axes.set_xlabel("share of the pixels", fontsize=_SMALL)
        axes.set_ylabel("probability of the class" if k == 0 else "", fontsize=_SMALL)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.tick_params(labelsize=_SMALL, width=0.5, length=2)
        axes.spines[["top", "right"]].set_visible(False)
    fig.axes[1].legend(fontsize=_SMALL, frameon=False, loc="lower right")
    return fig
