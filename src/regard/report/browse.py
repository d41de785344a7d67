"""The images that readers of the report can browse: names, thumbnails, and maps as numbers.

The page draws on demand: maps are stored as one byte per value, and its script colors them like
`regard.explanations.overlay`, so that an image is stored only once, however many maps it has.
"""

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.attention import StageMap
from regard.data.loading import default_workers
from regard.errors import ImageError
from regard.explanations.explanation import Explanation
from regard.explanations.figure import size_of
from regard.explanations.overlay import describe, has_few_cells
from regard.explanations.reading import as_picture
from regard.report.source import RunSource, choose, ranked

LIST_BYTES, THUMB_BYTES, DETAIL_BYTES = 1_800_000, 2_600_000, 2_600_000
_SIDES = (128, 96, 72, 56)  # of thumbnails, in pixels: the largest with which all images fit
_SAMPLE = 24
_LARGEST = 1600  # longer side of a stored image
_MAP_SIDE = 64


@dataclass
class Browser:
    """The data of the page's image browser, as JSON.

    Attributes:
        images: number of images that were evaluated.
        listed: [name, true class, [[class, probability], ...], thumbnail or -1] for each image.
        thumbs: JPEG thumbnails in base64.
        details: by index into `listed`: the image at its own resolution, its maps and mask.
        places: index into `listed` by image number.
        side: of the thumbnails, in pixels.
        run: the run's folder.
        room: bytes left for details.
    """

    images: int
    classes: list[str]
    listed: list[list[Any]] = field(default_factory=list)
    thumbs: list[str] = field(default_factory=list)
    details: dict[int, dict[str, Any]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    side: int = 0
    run: str = ""
    room: int = DETAIL_BYTES

    def add(self, i: int, shown: Explanation) -> None:
        """Adds the maps of image i, if there is room for them."""
        if i not in self.places:
            return
        detail = _detail(shown)
        size = len(json.dumps(detail))
        if size <= self.room:
            self.room -= size
            self.details[self.places[i]] = detail

    def to_json(self) -> str:
        """JSON for a script element, without any "</", which would end the element."""
        content = {
            "images": self.images, "classes": self.classes, "listed": self.listed,
            "thumbs": self.thumbs, "details": self.details, "side": self.side, "run": self.run,
        }  # fmt: skip
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        return text.replace("<", "\\u003c").replace("\u2028", "").replace("\u2029", "")


def browser_of(source: RunSource) -> Browser:
    """A run's images, as many as the page's size allows: those of `choose` come first."""
    said = source.calibrated
    browser = Browser(len(said), list(said.classes), run=str(source.run.path))
    order = choose(said, len(said))
    order += sorted(set(range(len(said))) - set(order))
    size = 0
    for i in order:
        top = [[said.classes.index(name), _rounded(p)] for name, p in ranked(said, i)[:3]]
        row = [_clean(source.name(i)), int(said.labels[i]), top, -1]
        size += len(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
        if size > LIST_BYTES:
            break
        browser.places[i] = len(browser.listed)
        browser.listed.append(row)
    _add_thumbs(browser, source, list(browser.places))
    return browser


def _rounded(p: float) -> float:
    """Rounded to four digits; 0 and 1 are exact."""
    return p if p in (0.0, 1.0) else min(max(round(p, 4), 0.0001), 0.9999)


def _clean(name: str) -> str:
    return name.encode(errors="replace").decode()


# ---- thumbnails --------------------------------------------------------------------------
def _thumb(source: RunSource, i: int, side: int) -> str | None:
    try:
        picture = Image.fromarray(as_picture(source.pixels(i)))
    except ImageError:
        return None
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    small = max(picture.size) <= 32
    return _encoded(np.asarray(picture), "png" if small else "jpeg", 72)


def _encoded(picture: NDArray[np.uint8], kind: str, quality: int = 90) -> str:
    """ "kind;base64" of a picture, for a data URI."""
    buffer = io.BytesIO()
    options = {"quality": quality, "optimize": True} if kind == "jpeg" else {"optimize": True}
    Image.fromarray(picture).save(buffer, kind, **options)
    return f"{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _add_thumbs(browser: Browser, source: RunSource, order: Sequence[int]) -> None:
    """Adds thumbnails of a size with which all fit, or as many of the smallest as fit."""
    if not source.can_read or not order:
        return
    some = order[:: max(1, len(order) // _SAMPLE)][:_SAMPLE]
    for side in _SIDES:
        sizes = [len(t) for t in (_thumb(source, i, side) for i in some) if t]
        browser.side = side
        if not sizes or np.mean(sizes) * len(order) < 0.9 * THUMB_BYTES:
            break
    left = THUMB_BYTES
    with ThreadPoolExecutor(default_workers()) as pool:
        for start in range(0, len(order), 256):  # in blocks: little work beyond the limit
            block = order[start : start + 256]
            for i, thumb in zip(
                block, pool.map(lambda i: _thumb(source, i, browser.side), block), strict=True
            ):
                if thumb is None or len(thumb) > left:
                    continue
                left -= len(thumb)
                browser.listed[browser.places[i]][3] = len(browser.thumbs)
                browser.thumbs.append(thumb)
            if left < 2000:
                return


# ---- details -----------------------------------------------------------------------------
def _detail(shown: Explanation) -> dict[str, Any]:
    """The image, its maps and its mask."""
    height, width = shown.image.shape[:2]
    stored = shown.reduced(_LARGEST)
    small = max(height, width) <= 128
    return {
        "image": _encoded(stored.image, "png" if small else "jpeg"),
        "size": [width, height],
        "box": [v / side for v, side in zip(shown.box, (width, height) * 2, strict=True)],
        "target": shown.target[0],
        "maps": [_map(m) for m in shown.spatial()],
        "mask": None if stored.mask is None else _encoded(
            np.asarray(Image.fromarray(stored.mask).convert("L")), "png"
        ),
    }  # fmt: skip


def _map(m: StageMap) -> dict[str, Any]:
    values = np.asarray(m.values, np.float32)
    low, high = float(values.min()), float(values.max())  # what `range` says, also if reduced
    if max(values.shape) > _MAP_SIDE:
        factor = _MAP_SIDE / max(values.shape)
        size = max(1, round(values.shape[1] * factor)), max(1, round(values.shape[0] * factor))
        values = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
    flat = high - low <= 1e-6 * max(abs(low), abs(high))
    relative = np.zeros_like(values) if flat else (values - low) / (high - low)
    return {
        "name": m.name, "kind": m.kind, "size": [int(n) for n in values.shape],
        "cells": size_of(m), "few": has_few_cells(m.values), "range": describe(m.values),
        "values": base64.b64encode(np.rint(255 * relative).astype(np.uint8).tobytes()).decode(),
    }  # fmt: skip
