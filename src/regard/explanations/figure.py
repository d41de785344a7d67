"""Figures: one explanation for a paper, and a contact sheet of many.

Every map has its own scale, with its name and true range below it, and states its size and how
channels or blocks were reduced to one map. What people marked is outlined in every panel. The
colors are those of `regard.explanations.overlay`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from regard.attention import StageMap
from regard.errors import UsageError
from regard.explanations.overlay import (
    Picture,
    color_key,
    describe,
    has_few_cells,
    overlay,
    resize_image,
    shrink_mask,
    spread,
    sums_to_one,
)
from regard.explanations.print_style import MUTED, SMALL, fitting, for_print, printable, wrapped

if TYPE_CHECKING:
    from regard.explanations.explanation import Explanation

# in inches
_GAP = 0.14  # between panels
_TITLE = 0.32  # for two lines above a panel
_BAR = 0.38  # the color scale below it, with its numbers and name
_CHART = 0.95  # a channel chart's axes
_CHART_FOOT = 0.34
_LINE, _MORE = 0.135, 0.04  # per line above the panels, and extra for a line of large type
_LEAST = 0.02  # a panel's minimum height and width, whatever the image's shape
_NORMAL, _LARGE = 8.0, 9.5  # points
_PIXELS = 480  # pixels of a panel's longer side, at most doubled: sharp at 300 dpi
_TALLEST = 1.6  # a taller image is drawn narrower than its column
_NARROWEST = 1.55  # column, for its numbers and names to be legible
_LEAST_WIDTH = 50 / 25.4


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _label(m: StageMap) -> tuple[str, str]:
    """A panel's two lines: which map it is; its size and how it was reduced to one map.

    A module's name is shortened by the gate's own part, which all panels share: "block1.2.2", not
    "block1.2.2.attention.spatial", whose end would not fit into the panel.
    """
    name = m.name
    if name.startswith(m.stage):
        for own in (".map", ".spatial", ".attention"):
            name = name.removesuffix(own)
    return name, ", ".join(part for part in (size_of(m), m.reduction) if part)


def size_of(m: StageMap) -> str:
    """ "7×7", or "2×2 = 4 cells" if a map is drawn as cells."""
    size = "×".join(str(n) for n in m.values.shape)
    if m.kind == "channel" or not has_few_cells(m.values):
        return size
    return f"{size} = {m.values.size} cell{'s' * (m.values.size != 1)}"


def _display_size(image: Picture) -> tuple[int, int]:
    """(height, width) at which a panel is drawn: small images enlarged by a whole number."""
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest <= _PIXELS:
        factor = max(1, math.ceil(_PIXELS / longest))
        return height * factor, width * factor
    factor = min(1.0, 2 * _PIXELS / longest)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _columns(image: Picture, width: float) -> int:
    """Panels per row: fewer for wide images, whose panels would be too low."""
    aspect = image.shape[0] / image.shape[1]
    most = 2 if aspect < 0.35 else 3 if aspect < 0.6 else 4
    return max(1, min(most, int(width / _NARROWEST)))


@dataclass(frozen=True)
class _Grid:
    """Places axes by inches from the figure's top left."""

    fig: Figure
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.fig.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )


def _title(axes: Axes, first: str, second: str, width: float) -> None:
    at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    lines: list[tuple[str, int, float, dict[str, Any]]] = [
        (first, 12, _NORMAL, {"weight": "bold"}), (second, 3, SMALL, {"color": MUTED}),
    ]  # fmt: skip
    for text, above, points, style in lines:
        text = fitting(text, width, points, bold="weight" in style)
        axes.annotate(text, (0, 1), (0, above), fontsize=points, va="bottom", **style, **at)


def _bare(axes: Axes, picture: Picture) -> None:
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_linewidth(0.4)


def _scale_name(m: StageMap) -> str:
    if m.kind == "gradcam":
        return "Grad-CAM"
    if sums_to_one(m.values):
        return "attention (sums to 1)"
    return "attention"


def _scale(grid: _Grid, m: StageMap, left: float, top: float, width: float) -> None:
    """The color bar with the true numbers at its ends, the mean between, and the scale's name."""
    axes = grid.axes(left, top + 0.05, width, 0.07)
    numbers = spread(m.values)
    if numbers is None:
        axes.set_axis_off()
        words = describe(m.values).removeprefix("attention ")
        words = f"{_scale_name(m)}: {words}"
        axes.text(0, 0.5, words, fontsize=SMALL, va="center", transform=axes.transAxes)
        return
    _bare(axes, color_key(200, 16))
    for x, y, text, align in (
        (0.0, -0.35, numbers[0], "left"), (0.5, -0.35, numbers[2], "center"),
        (1.0, -0.35, numbers[1], "right"), (0.5, -1.75, _scale_name(m), "center"),
    ):  # fmt: skip
        axes.text(
            x, y, text, fontsize=SMALL, ha=align, va="top", transform=axes.transAxes,
            color=MUTED if align == "center" else "black",
        )  # fmt: skip


def _chart(axes: Axes, stage: str, gates: Sequence[StageMap], width: float) -> None:
    """Channel weights of a stage's gates, each sorted, so that their spreads can be compared."""
    colors = matplotlib.colormaps["viridis"]
    for i, gate in enumerate(gates):
        color = colors(0.0 if len(gates) == 1 else 0.85 * i / (len(gates) - 1))
        label = "block 1" if i == 0 else f"block {i + 1}" if i == len(gates) - 1 else None
        axes.plot(
            range(1, gate.values.size + 1), sorted(gate.values.tolist(), reverse=True),
            color=color, linewidth=1.0, label=label,
        )  # fmt: skip
    count = gates[0].values.size
    _title(axes, stage, f"{count} channel weights, sorted", width)
    axes.set_ylim(0, max(1.0, *(float(g.values.max()) for g in gates)) * 1.03)
    axes.set_xlim(1, count)
    axes.set_xticks([1, count])
    axes.set_yticks([0, 0.5, 1], ["0.0", "0.5", "1.0"])
    axes.tick_params(labelsize=SMALL, width=0.5, length=2, pad=1.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0.5, color="#bbbbbb", linewidth=0.5, zorder=0)
    if len(gates) > 1:
        axes.legend(fontsize=SMALL - 0.5, frameon=False, loc="best", handlelength=1, borderpad=0.1)


def _heading(shown: "Explanation", width: float) -> list[tuple[str, float]]:
    """The lines above the panels, with their size in points."""
    name, p = shown.classes[0]
    others = ", ".join(f"{_short(c, 24)} ({_percent(q)})" for c, q in shown.classes[1:3])
    path = shown.path if len(shown.path) <= 44 else f"…{shown.path[-43:]}"  # its end says more
    first = f"{path}: {_short(name, 36)} ({_percent(p)})"
    parts = [f"then {others}"] if others else []
    if shown.true is not None:
        verdict = "right" if shown.true == name else "wrong"
        parts.append(f"true class {_short(shown.true, 30)} ({verdict})")
    if shown.target[0] != name:
        target, share = shown.target
        parts.append(f"Grad-CAM explains {_short(target, 30)} ({_percent(share)})")
    if _seen(shown) is not None:
        parts.append("dashed: what the network saw")
    if shown.mask is not None:
        parts.append("outlined: what people marked")
    lines = []
    for text, points in ((first, _LARGE), ("   ·   ".join(parts), _NORMAL - 0.5)):
        for line in wrapped(text, width - 2 * _GAP, points, bold=points == _LARGE):
            lines.append((line, points))
    return lines


def _percent(p: float) -> str:
    if 0.0 < p < 0.001:
        return "<\u00a00.1\u00a0%"
    return ">\u00a099.9\u00a0%" if 0.999 < p < 1.0 else f"{100 * p:.1f}\u00a0%"


def explanation_figure(shown: "Explanation", *, width: float = 7.16) -> Figure:
    """The image, each map over it with its scale, Grad-CAM, and the channel weights as charts.

    Args:
        shown: from `regard.explain`.
        width: of the figure, in inches; type is 6.5 to 9.5 points at any width, and narrow
            figures have fewer panels per row.

    Returns:
        A matplotlib figure, which can be saved in any of its formats.

    Raises:
        UsageError: a width under 50 mm.
    """
    if width < _LEAST_WIDTH - 1e-9:
        raise UsageError(
            f"width={width}: give at least 1.97 inches (50 mm), to keep numbers legible"
        )
    with for_print():
        return _explanation_figure(shown, width)


def _explanation_figure(shown: "Explanation", width: float) -> Figure:
    charts: dict[str, list[StageMap]] = {}
    for m in shown.modules:
        if m.kind == "channel":
            charts.setdefault(m.stage, []).append(m)
    panels: list[StageMap | None] = [None, *shown.spatial()]
    columns = _columns(shown.image, width)
    cell = (width - _GAP) / columns - _GAP
    aspect = shown.image.shape[0] / shown.image.shape[1]
    drawn = cell if aspect <= _TALLEST else max(cell * _TALLEST / aspect, _LEAST)
    tall = min(max(drawn * aspect, _LEAST), cell * _TALLEST)
    lines = _heading(shown, width)
    head = sum(_LINE + _MORE * (points == _LARGE) for _, points in lines) + 0.1
    row = _TITLE + tall + _BAR + _GAP
    rows = math.ceil(len(panels) / columns)
    chart_row = _TITLE + _CHART + _CHART_FOOT
    height = head + rows * row + math.ceil(len(charts) / columns) * chart_row
    grid = _Grid(Figure(figsize=(width, height), facecolor="white"), width, height)
    down = 0.07
    for line, points in lines:
        style: dict[str, Any] = {"weight": "bold"} if points == _LARGE else {"color": MUTED}
        grid.fig.text(_GAP / width, 1 - down / height, line, fontsize=points, va="top", **style)
        down += _LINE + _MORE * (points == _LARGE)
    for i, panel in enumerate(panels):
        left = _GAP + (i % columns) * (cell + _GAP)
        top = head + (i // columns) * row + _TITLE
        _panel(grid, shown, panel, (left, top, drawn, tall), cell)
    for i, (stage, gates) in enumerate(charts.items()):
        left, above = _GAP + (i % columns) * (cell + _GAP), (i // columns) * chart_row + _TITLE
        axes = grid.axes(left + 0.16, head + rows * row + above, cell - 0.22, _CHART)
        _chart(axes, stage, gates, cell - 0.16)
    return grid.fig


def _panel(
    grid: _Grid,
    shown: "Explanation",
    m: StageMap | None,
    at: tuple[float, float, float, float],
    column: float,
) -> None:
    """The image, or a map over it with its scale, at left, top, width and height in inches."""
    axes, size = grid.axes(*at), _display_size(shown.image)
    if m is None:
        _bare(axes, resize_image(shown.image, size))
        pixels = f"{shown.image.shape[1]}×{shown.image.shape[0]} pixels"
        _title(axes, "image", pixels, column)
        _frame(axes, shown, size)
    else:
        _bare(axes, overlay(shown.image, m.values, size=size, box=shown.box))
        first, second = _label(m)
        if m.kind == "gradcam":
            first = f"{first}: {shown.target[0]}"
        _title(axes, first, second, column)
        # as wide as the column, as a narrow image leaves no room for the numbers
        _scale(grid, m, at[0], at[1] + at[3], column)
    if shown.mask is not None:
        _outline(axes, shown.mask, size)


def _outline(axes: Axes, mask: Any, size: tuple[int, int]) -> None:
    """The border of what people marked, white on black."""
    most = 320 / max(mask.shape)
    if most < 1:
        rows, columns = (max(1, round(n * most)) for n in mask.shape)
        mask = shrink_mask(mask, (rows, columns))
    padded = np.pad(mask.astype(np.float32), 1)  # closes the outline at the image's border
    height, width = mask.shape
    x = (np.arange(-1, width + 1) + 0.5) * size[1] / width - 0.5
    y = (np.arange(-1, height + 1) + 0.5) * size[0] / height - 0.5
    x, y = x.clip(-0.5, size[1] - 0.5), y.clip(-0.5, size[0] - 0.5)
    for color, line in (("black", 1.5), ("white", 0.7)):
        axes.contour(x, y, padded, levels=[0.5], colors=color, linewidths=line)
    axes.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))


def _seen(shown: "Explanation") -> tuple[float, float, float, float] | None:
    """Left, top, right and bottom of what the network saw; None if that is the whole image."""
    height, width = shown.image.shape[:2]
    left, top, right, bottom = np.clip(shown.box, 0, (width, height) * 2).tolist()
    if (round(left), round(top), round(right), round(bottom)) == (0, 0, width, height):
        return None
    return left, top, right, bottom


def _frame(axes: Axes, shown: "Explanation", size: tuple[int, int]) -> None:
    """A dashed frame around what the network saw, unless that is the whole image."""
    height, width = shown.image.shape[:2]
    seen = _seen(shown)
    if seen is None:
        return
    left, top, right, bottom = seen
    x, y = size[1] / width, size[0] / height  # an axis begins half a pixel before its first center
    across = [left * x - 0.5, right * x - 0.5]
    down = [top * y - 0.5, bottom * y - 0.5]
    path = ([across[i] for i in (0, 1, 1, 0, 0)], [down[i] for i in (0, 0, 1, 1, 0)])
    options: dict[str, Any] = {"scalex": False, "scaley": False, "clip_on": False}
    axes.plot(*path, color="black", linewidth=1.6, **options)
    axes.plot(*path, color="white", linewidth=0.9, linestyle="--", **options)


# ---- contact sheet -----------------------------------------------------------------------


def contact_sheet(
    shown: Sequence["Explanation"],
    *,
    columns: int | None = None,
    side: int = 180,
    maps: Sequence[str] | None = None,
) -> Image.Image:
    """Many images on one sheet: each with some of its maps next to it and their ranges below.

    Args:
        shown: explanations.
        columns: images per row; by default as many as fit into 1800 pixels.
        side: of each thumbnail's square in pixels, at least 100; aspect ratios are preserved.
        maps: names of the maps to show; by default the last attention map and Grad-CAM.

    Returns:
        An RGB image.

    Raises:
        UsageError: nothing to show, a map that no explanation has, or a side under 100.
    """
    if not shown:
        raise UsageError("a contact sheet needs at least one explanation")
    if side < 100:
        raise UsageError(f"side={side}: give at least 100 pixels, to keep numbers legible")
    chosen = [_choose(e, maps) for e in shown]
    most = 1 + max(len(c) for c in chosen)
    gap, head, foot = 10, 24, 34
    cell = (most * side + (most - 1) * 4 + 2 * gap, side + head + foot + gap)
    columns = columns or max(1, min(len(shown), 1800 // cell[0]))
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1] + gap), "white")
    draw = ImageDraw.Draw(sheet)
    bold, plain = _font(13, "bold"), _font(11, "normal")
    for i, (e, panels) in enumerate(zip(shown, chosen, strict=True)):
        left, top = gap + (i % columns) * cell[0], gap + (i // columns) * cell[1]
        share = f" ({_percent(e.probability)})"  # stays, however long the names
        answer = printable(f"{e.path}: {e.predicted}")
        room = cell[0] - 2 * gap - bold.getlength(share)
        draw.text((left, top), f"{_fit(answer, bold, room)}{share}", "black", bold)
        for k, m in enumerate([None, *panels]):
            x = left + k * (side + 4)
            sheet.paste(_thumbnail(e, m, side), (x, top + head))
            if m is not None:
                first, _ = _label(m)
                name = first if m.kind != "gradcam" else f"Grad-CAM: {e.target[0]}"
                words = [printable(name), _range(m)]
                for line, text in enumerate(words):
                    y = top + head + side + 2 + 15 * line
                    draw.text((x, y), _fit(text, plain, side), "#333333", plain)
    return sheet


def _choose(e: "Explanation", names: Sequence[str] | None) -> list[StageMap]:
    spatial = e.spatial()
    if names is None:
        attention = [m for m in spatial if m.kind != "gradcam"][-1:]
        return attention + [m for m in spatial if m.kind == "gradcam"]
    by_name = {m.name: m for m in spatial}
    for name in names:
        if name not in by_name:
            raise UsageError(f"maps: {name!r} is not one of {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _range(m: StageMap) -> str:
    numbers = spread(m.values)
    if numbers is None:
        return describe(m.values).removeprefix("attention ")
    cells = f", {size_of(m)}" if has_few_cells(m.values) else ""
    return f"{numbers[0]} to {numbers[1]}{cells}"


def _thumbnail(e: "Explanation", m: StageMap | None, side: int) -> Image.Image:
    """The image, or a map over it, fitted into a square on white with its aspect preserved."""
    height, width = e.image.shape[:2]
    factor = side / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    picture = (
        resize_image(e.image, size)
        if m is None
        else overlay(e.image, m.values, size=size, box=e.box)
    )
    square = Image.new("RGB", (side, side), "white")
    square.paste(
        Image.fromarray(picture).convert("RGB"), ((side - size[1]) // 2, (side - size[0]) // 2)
    )
    return square


def _font(size: int, weight: str) -> Any:
    file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(file, size)


def _fit(text: str, font: Any, width: float) -> str:
    """The text, cut with … if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
