"""How figures are drawn and saved for print: sizes, type, colors and files.

All of Regard's figures are made within `for_print()` and written by `save`: type of 6 to 8 points
in one sans-serif font, embedded as TrueType (type 42) in PDF and left as text in SVG, and the
same bytes for the same content. The colors of `CYCLE` are Okabe and Ito's without yellow and
black, one of which would vanish on a white or a dark page: color-blind readers can distinguish
them, and each line also has its own style.
"""

import contextlib
import logging
import re
import textwrap
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from regard.errors import UsageError
from regard.files import write_atomically
from regard.version import __version__

log: logging.Logger = logging.getLogger(__name__)

SOFTWARE = f"Regard {__version__}"
"""Written into every picture, so that Regard's own files can be recognized."""
FORMATS = ("pdf", "svg", "png", "tiff")
SMALL, NORMAL = 6.5, 7.5  # points
INK, MUTED, LINE = "#1b2024", "#5a636b", "#d9dbd5"
MAIN, SECOND = "#17697d", "#b04a12"
CYCLE = (MAIN, SECOND, "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a5195")
STYLES = ("-", "--", "-.", ":")
COLUMN = 85 / 25.4  # inches: a journal's column of 85 mm
_LEAST, _MOST = 50.0, 400.0  # mm
_LENGTH = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(mm|cm|in|pt)\s*")
_INCHES = {"mm": 1 / 25.4, "cm": 1 / 2.54, "in": 1.0, "pt": 1 / 72}


def width_in_inches(text: str) -> float:
    """The width of a figure in inches, from a length such as "85mm", "8.5 cm", "3.3in" or "240pt".

    Raises:
        UsageError: it is not such a length, or is not between 50 and 400 mm.
    """
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise UsageError(f"width={text!r}: give a number with mm, cm, in or pt, such as 85mm")
    inches = float(match[1]) * _INCHES[match[2]]
    if not _LEAST <= inches * 25.4 <= _MOST:
        raise UsageError(f"width={text!r}: between {_LEAST:.0f} and {_MOST:.0f} mm")
    return inches


_LATIN = ("Arial", "Helvetica", "Liberation Sans")
# those that come with Linux, Windows and macOS
_EAST_ASIAN = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "Yu Gothic",
    "MS Gothic", "Malgun Gothic", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB",
    "Apple SD Gothic Neo", "NanumGothic", "Arial Unicode MS",
)  # fmt: skip


@lru_cache(maxsize=1)
def _fonts() -> list[str]:
    """The fonts that journals ask for and that are installed; matplotlib's own is the last."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in (*_LATIN, *_EAST_ASIAN) if name in known] + ["DejaVu Sans"]


# matplotlib's settings are global: a thread that leaves would reset them for the others
_settings_lock = threading.RLock()


@contextlib.contextmanager
def for_print() -> Iterator[None]:
    """Applies the settings to make and save figures with; only one thread at a time is inside."""
    settings: Any = {
        "font.family": _fonts(), "font.size": SMALL, "pdf.fonttype": 42, "ps.fonttype": 42,
        "svg.fonttype": "none", "svg.hashsalt": "regard", "text.usetex": False,
        "text.parse_math": False,
        "axes.facecolor": "none", "axes.edgecolor": MUTED, "axes.labelcolor": INK,
        "text.color": INK,
        "axes.titlecolor": INK, "axes.titlesize": NORMAL, "axes.labelsize": SMALL,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.linewidth": 0.6,
        "axes.unicode_minus": False, "axes.spines.top": False, "axes.spines.right": False,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL, "xtick.major.width": 0.5, "ytick.major.width": 0.5,
        "xtick.major.size": 2.0, "ytick.major.size": 2.0, "legend.fontsize": SMALL,
        "legend.frameon": False, "lines.linewidth": 1.2, "figure.dpi": 100,
    }  # fmt: skip
    with _settings_lock, matplotlib.rc_context(settings):
        yield


def new_figure(
    width: float, height: float, panels: int = 1, *, apart: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A white figure of this size in inches, with axes side by side.

    Args:
        width, height: in inches.
        panels: number of axes.
        apart: space between panels, as a fraction of their width.
    """
    figure = Figure(
        figsize=(width, height),
        facecolor="white",
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=apart),
    )
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def line_style(i: int) -> dict[str, Any]:
    """Color and line style of the i-th of several lines.

    The numbers of colors and of styles have no common divisor: all their pairs are used.
    """
    return {"color": CYCLE[i % len(CYCLE)], "linestyle": STYLES[i % len(STYLES)]}


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    found: set[int] = set()
    for name in _fonts():
        file = font_manager.findfont(font_manager.FontProperties(family=name))
        found |= set(font_manager.get_font(file).get_charmap())
    return frozenset(found)


_warned: set[str] = set()  # the letters of the one warning


def _warn_of(letters: str) -> None:
    """Warns of letters that no font has; once, as each name may have others."""
    if letters and not _warned:
        _warned.update(letters)
        log.warning(
            "no installed font has %s: figures show \N{REPLACEMENT CHARACTER} instead (Noto Sans "
            "CJK, for example, has Chinese, Japanese and Korean)", letters,
        )  # fmt: skip


def printable(text: str) -> str:
    """The text with U+FFFD for what the fonts lack, such as undecodable bytes of file names."""
    glyphs = _glyphs()
    _warn_of("".join(dict.fromkeys(c for c in text if ord(c) not in glyphs and c.isalpha())))
    return "".join(c if ord(c) in glyphs else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(text: str, length: int) -> str:
    """The text, cut with … after `length` characters, and printable.

    A leading underscore gets a space before it, as matplotlib leaves such labels out of legends.
    """
    text = printable(text if len(text) <= length else f"{text[: length - 1]}…")
    return f" {text}" if text.startswith("_") else text


def short_names(names: Sequence[str], length: int) -> list[str]:
    """`short` of each name; of names that would become the same, the beginning and the end."""
    cut = [short(name, length) for name in names]
    end = length // 2
    return [
        part if cut.count(part) == 1 or len(name) <= length
        else short(f"{name[: length - 1 - end]}…{name[-end:]}", length)
        for name, part in zip(names, cut, strict=True)
    ]  # fmt: skip


def text_width(text: str, points: float, *, bold: bool = False) -> float:
    """The width of a line of text, in inches."""
    font = font_manager.FontProperties(
        family=_fonts(), size=points, weight="bold" if bold else "normal"
    )
    width: float = _renderer().get_text_width_height_descent(text, font, ismath=False)[0]
    return width / 72


@lru_cache(maxsize=1)
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, 72)


def wrapped(text: str, inches: float, points: float, *, bold: bool = False) -> list[str]:
    """The printable text, in lines of at most this width; long words are broken."""
    text = printable(text)
    lines: list[str] = []
    for letters in range(max(2, int(inches * 72 / (0.35 * points))), 1, -1):
        lines = textwrap.wrap(text, letters, replace_whitespace=False)
        if all(text_width(line, points, bold=bold) <= inches for line in lines):
            break
    return lines


def fitting(text: str, inches: float, points: float, *, bold: bool = False) -> str:
    """The printable text, cut with … if it would be wider, but not below 8 characters."""
    text = printable(text)
    for length in range(len(text), 8, -1):
        part = text if length == len(text) else f"{text[: length - 1]}…"
        if text_width(part, points, bold=bold) <= inches:
            return part
    return text if len(text) <= 8 else f"{text[:7]}…"


def save(figure: Figure, path: Path, *, dpi: int = 300) -> None:
    """Writes a figure atomically, in the format of the file's suffix.

    Args:
        figure: made within `for_print`.
        path: ends with .pdf, .svg, .png, .tiff (or .tif).
        dpi: resolution of PNG and TIFF, and of pictures within PDF and SVG.

    Raises:
        UsageError: there is no such format.
        FileError: the file can't be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    kind = "tiff" if kind == "tif" else kind
    if kind not in FORMATS:
        raise UsageError(f"{path}: the suffix must be one of {', '.join(FORMATS)}")
    options: dict[str, dict[str, Any]] = {
        "pdf": {"metadata": {"Creator": SOFTWARE, "Producer": SOFTWARE, "CreationDate": None}},
        "svg": {"metadata": {"Creator": SOFTWARE, "Date": None}},
        "png": {"metadata": {"Software": SOFTWARE}},
        "tiff": {"pil_kwargs": {"compression": "tiff_lzw", "software": SOFTWARE}},
    }
    with for_print():
        write_atomically(
            path, lambda part: figure.savefig(part, format=kind, dpi=dpi, **options[kind])
        )
