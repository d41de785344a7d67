"""Whether a map points at what people marked: the pointing game, and the energy inside a mask."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regard.data.images import IMAGE_SUFFIXES, read_stored, to_channels
from regard.errors import UsageError
from regard.explanations.overlay import Box, place

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pointing:
    """hit: whether the map's highest place is marked; energy: the share of the map that is.

    chance: the share of the image that is marked, which a map that knows nothing would have.
    """

    hit: bool
    energy: float
    chance: float


def point(attention: ArrayLike, mask: Mask, *, box: Box | None = None) -> Pointing:
    """The pointing game (Zhang et al., IJCV 2018) and the energy (Wang et al., Score-CAM, 2020).

    Args:
        attention: (h, w), at least 0.
        mask: (H, W), what people marked, in the original image's pixels.
        box: left, top, right, bottom of what the map covers; the whole image by default.

    Raises:
        UsageError: a mask in which nothing is marked.
    """
    if not mask.any():
        raise UsageError("the mask marks nothing")
    grown = place(attention, (mask.shape[0], mask.shape[1]), box=box, outside=0.0)
    top = np.flatnonzero(grown == grown.max())
    total = float(grown.sum())
    energy = float(grown[mask].sum()) / total if total > 0 else 0.0
    return Pointing(bool(mask.flat[top].mean() > 0.5), energy, float(mask.mean()))


def read_masks(source: Path, images: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Mask]:
    """The mask of each image, from a CSV of boxes or from a folder of mask images.

    Args:
        source: a CSV with the columns path, x0, y0, x1, y1 (pixels of the original, several rows an
            image allowed; path or its last part as the image's), or a folder with a mask image of
            the same name and size for each, marked where it is brighter than half.
        images: paths.
        sizes: (height, width) of each.

    Raises:
        UsageError: an image without a mask, columns that are missing, or a mask of another size.
    """
    if source.is_dir():
        return [_mask_image(source, p, size) for p, size in zip(images, sizes, strict=True)]
    boxes = _boxes(source)
    masks = []
    for path, size in zip(images, sizes, strict=True):
        rows = boxes.get(path) or boxes.get(Path(path).name)
        if not rows:
            raise UsageError(f"{source} has no box for {path}")
        mask = np.zeros(size, dtype=bool)
        for x0, y0, x1, y1 in rows:
            mask[max(0, round(y0)) : round(y1), max(0, round(x0)) : round(x1)] = True
        masks.append(mask)
    return masks


def _boxes(source: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    with source.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        needed = ("path", "x0", "y0", "x1", "y1")
        if missing := [c for c in needed if c not in (reader.fieldnames or ())]:
            raise UsageError(f"{source} lacks the columns {', '.join(missing)}")
        for n, row in enumerate(reader, start=2):
            try:
                x0, y0, x1, y1 = (float(row[c]) for c in needed[1:])
            except (TypeError, ValueError):
                raise UsageError(f"{source}, line {n}: x0, y0, x1, y1 must be numbers") from None
            found.setdefault(row["path"], []).append((x0, y0, x1, y1))
    return found


def _mask_image(folder: Path, image: str, size: tuple[int, int]) -> Mask:
    stem = Path(image).stem
    for suffix in IMAGE_SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            pixels = to_channels(read_stored(path).pixels, 1)[..., 0]
            if pixels.shape != size:
                raise UsageError(f"{path} is {pixels.shape}, its image {size}")
            return pixels > pixels.max() / 2
    raise UsageError(f"{folder} has no mask for {image} ({stem}.png or the like)")
