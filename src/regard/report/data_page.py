"""The page of `regard data --html`: counts, examples, distributions, outliers, duplicates."""

import base64
import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from regard.cores import cores
from regard.data.audit import DataCheck
from regard.data.images import read_stored, scaled
from regard.data.table import SPLITS, ImageTable
from regard.data.thumbnails import as_8_bit, thumbnail
from regard.errors import ImageError
from regard.files import plural, spread, write_text

SAMPLE = 2_000  # most images whose distributions are shown
_PICTURE = 96  # pixels of the longer side
_EXAMPLES, _MOST_CLASSES = 8, 40
_ODD = 12
_PAIRS = 24
_NEIGHBORS = 5


class _Seen(NamedTuple):
    """Measurements of an image: gray values in 0..255, pixels, and a 96-pixel thumbnail."""

    row: int
    brightness: float
    deviation: float
    sharpness: float
    height: int
    width: int
    vector: NDArray[np.float32]


def write_data_page(table: ImageTable, check: DataCheck, path: str | os.PathLike[str]) -> None:
    """Writes a self-contained page on a data set.

    Args:
        table: its images.
        check: of the same table.
        path: the file; an existing one is replaced.

    Raises:
        StateError: it can't be written.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("regard.report")
    template = environment.from_string(folder.joinpath("data_page.html").read_text("utf-8"))
    pictures = Pictures(table)
    rows = spread(len(table), SAMPLE)
    with ThreadPoolExecutor(min(8, cores())) as pool:
        seen = [s for s in pool.map(lambda i: _look(table, i), rows.tolist()) if s is not None]
    splits = [s for s in (*SPLITS, "") if s in check.counts]
    page = template.render(
        css=folder.joinpath("base.css").read_text("utf-8"),
        check=check,
        classes=f"{len(table.classes):,} classes",
        splits=splits,
        counts=_counts(check, splits),
        groups=None if table.groups is None else [
            len(np.unique(table.groups[table.splits == s])) for s in splits
        ],
        sampled=f"{plural(len(seen), 'image')}{', evenly spread' * (len(rows) < len(table))}.",
        charts=_charts(seen),
        examples=[
            (table.classes[c], pictures.of(np.flatnonzero(table.labels == c)[spread(n, _EXAMPLES)]))
            for c, n in Counter(table.labels.tolist()).most_common(_MOST_CLASSES)
        ],
        more_classes=max(0, len(np.unique(table.labels)) - _MOST_CLASSES),
        pair_sections=_pair_sections(check, pictures),
        odd=_odd(table, seen, pictures),
    )  # fmt: skip
    write_text(Path(path), page.encode("utf-8", "backslashreplace").decode())


def _look(table: ImageTable, i: int) -> _Seen | None:
    try:
        pixels = _pixels(table, i)
    except ImageError:
        return None
    gray = thumbnail(pixels, 96).astype(np.float32)
    deviation = float(gray.std())
    detail = float((gray - gaussian_filter(gray, 1.0)).std())
    vector = thumbnail(pixels, 16).astype(np.float32).ravel()
    vector -= vector.mean()
    vector /= max(float(np.linalg.norm(vector)), 1e-6)
    height, width = pixels.shape[:2]
    return _Seen(
        i, float(gray.mean()), deviation, detail / max(deviation, 1e-6), height, width, vector
    )


def _pixels(table: ImageTable, i: int) -> NDArray[Any]:
    """Image i as (H, W, C) uint8; other depths are stretched over their own range."""
    if table.files is None:
        pixels = table.read(i)
    else:
        stored = read_stored(table.files[i])
        pixels = stored.pixels
        if stored.is_measurement and stored.own_range is not None:
            pixels = scaled(stored, None, table.path(i))
    return pixels if pixels.dtype == np.uint8 else as_8_bit(pixels)


class Pictures:
    """Small JPEG pictures of images as data URIs, each read once."""

    def __init__(self, table: ImageTable) -> None:
        self.table = table
        self.places: dict[str, int] | None = None
        self.done: dict[int, str] = {}

    def row(self, path: str) -> int:
        """The row of the image with this path."""
        if self.places is None:
            self.places = {self.table.path(i): i for i in range(len(self.table))}
        return self.places[path]

    def one(self, i: int, words: str = "") -> dict[str, str]:
        """What the page shows for image i."""
        table = self.table
        if i not in self.done:
            self.done[i] = self._uri(i)
        name = os.path.basename(table.path(i))
        split = str(table.splits[i])
        return {
            "src": self.done[i], "name": name, "split": split, "words": words,
            "label": table.classes[table.labels[i]],
        }  # fmt: skip

    def of(self, rows: Sequence[int] | NDArray[np.int64]) -> list[dict[str, str]]:
        """What the page shows for each of several images."""
        return [self.one(int(i)) for i in rows]

    def _uri(self, i: int) -> str:
        try:
            pixels = _pixels(self.table, i)
        except ImageError:
            pixels = np.full((8, 8, 1), 128, np.uint8)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.thumbnail((_PICTURE, _PICTURE), reducing_gap=2.0)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _counts(check: DataCheck, splits: list[str]) -> list[dict[str, Any]]:
    names = next(iter(check.counts.values()))
    rows = []
    for name in names:
        counts = [check.counts[s][name] for s in splits]
        share = f"{100 * sum(counts) / max(check.images, 1):.1f}"
        rows.append({"name": name, "counts": counts, "share": share})
    total = [sum(check.counts[s].values()) for s in splits]
    return [*rows, {"name": "all", "counts": total, "share": "100"}]


# ---- distributions
def _charts(seen: list[_Seen]) -> list[tuple[str, dict[str, Any]]]:
    if not seen:
        return []
    columns = (
        ("Brightness (mean gray value)", [s.brightness for s in seen], 0.0, 255.0),
        ("Contrast (deviation of gray values)", [s.deviation for s in seen], 0.0, None),
        ("Shorter side (pixels)", [float(min(s.height, s.width)) for s in seen], None, None),
        ("Width / height", [s.width / s.height for s in seen], None, None),
    )
    return [(title, _bars(np.array(values), low, high)) for title, values, low, high in columns]


def _bars(values: NDArray[np.float64], low: float | None, high: float | None) -> dict[str, Any]:
    """A histogram with 24 bars, 320 by 110."""
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    if high <= low:
        low, high = low - 0.5, low + 0.5
    counts, edges = np.histogram(values, 24, (low, high))
    bars = [
        {
            "x": round(k * 320 / 24 + 0.5, 2), "y": round(110 - 105 * n / counts.max(), 2),
            "height": round(105 * n / counts.max(), 2),
            "words": f"{edges[k]:.4g} to {edges[k + 1]:.4g}: {n}",
        }
        for k, n in enumerate(counts.tolist()) if n
    ]  # fmt: skip
    words = f"{low:.4g} to {high:.4g}, median {np.median(values):.4g}"
    return {"bars": bars, "width": round(320 / 24 - 1, 2), "low": f"{low:.4g}",
            "high": f"{high:.4g}", "most": plural(int(counts.max()), "image"),
            "words": words}  # fmt: skip


# ---- pairs
def _pair_sections(check: DataCheck, pictures: Pictures) -> list[tuple[str, str, list[Any], int]]:
    sections = []
    same = [*check.leaks, *check.duplicates]
    exact = [_exact(group, pictures) for group in same[:_PAIRS]]
    if same:
        sections.append((
            "Duplicates", "Identical pixels, in different files; framed where the labels differ.",
            exact, len(same) - len(exact),
        ))  # fmt: skip
    for reason, title, words in (
        ("labels", "Near-duplicates with different labels", "One of the labels may be wrong."),
        ("splits", "Near-duplicates in different splits", "Scores would be too good."),
        ("copies", "Near-duplicates with one label in one split", "They count several times."),
    ):
        found = [pair for pair in check.near_duplicates if pair["reason"] == reason]
        shown = [_near(pair, pictures) for pair in found[:_PAIRS]]
        if found:
            words = f"{plural(len(found), 'pair')}. {words}"
            sections.append((title, words, shown, len(found) - len(shown)))
    return sections


def _exact(group: list[tuple[str, str]], pictures: Pictures) -> dict[str, Any]:
    shown = [pictures.one(pictures.row(path)) for path, _ in group[:2]]
    more = f"and {len(group) - 2} more copies" if len(group) > 2 else ""
    labels = {pictures.table.labels[pictures.row(path)] for path, _ in group}
    return {"pictures": shown, "conflict": len(labels) > 1, "words": more}


def _near(pair: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    words = f"similarity {pair['similarity']:.2f}" + ", mirrored" * pair["mirrored"]
    shown = [pictures.one(pictures.row(path)) for path in pair["paths"]]
    return {"pictures": shown, "conflict": pair["reason"] == "labels", "words": words}


# ---- odd ones out
def _odd(
    table: ImageTable, seen: list[_Seen], pictures: Pictures
) -> list[tuple[str, list[dict[str, str]]]]:
    if not seen:
        return []
    some = [s for s in seen if s.deviation >= 4]
    lists: list[tuple[str, list[tuple[float, _Seen]], str]] = [
        ("Darkest", [(s.brightness, s) for s in seen], "brightness"),
        ("Brightest", [(-s.brightness, s) for s in seen], "brightness"),
        ("Least contrast", [(s.deviation, s) for s in seen], "deviation"),
        ("Most blurred", [(s.sharpness, s) for s in some], "share of detail"),
        ("Unlike their class", _unlike(table, some), "similarity to its class"),
    ]
    shown = []
    for title, values, what in lists:
        ranked = sorted(values, key=lambda pair: pair[0])[:_ODD]
        items = [pictures.one(s.row, f"{what} {abs(v):.3g}") for v, s in ranked]
        if items:
            shown.append((title, items))
    return shown


def _unlike(table: ImageTable, seen: list[_Seen]) -> list[tuple[float, _Seen]]:
    """Mean correlation of coarse structure with the most similar images of the same class."""
    by_class: dict[int, list[_Seen]] = {}
    for s in seen:
        by_class.setdefault(int(table.labels[s.row]), []).append(s)
    scored: list[tuple[float, _Seen]] = []
    for members in by_class.values():
        if len(members) <= _NEIGHBORS:
            continue
        vectors = np.stack([s.vector for s in members])
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -1)
        nearest = np.sort(cosines, axis=1)[:, -_NEIGHBORS:].mean(axis=1)
        scored += zip(nearest.tolist(), members, strict=True)
    return scored
