"""Whether a map points at what people marked: pointing game, energy, and overlap with a mask."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regard.errors import UsageError
from regard.evaluation import Estimate
from regard.evaluation.intervals import bootstrapped_mean, share_of_groups, wilson
from regard.evaluation.predictions import units
from regard.explanations.overlay import Box, place

Mask = NDArray[np.bool_]
LEVEL = 0.5  # of a map's range; pixels above it count as marked by the map


@dataclass(frozen=True)
class Pointing:
    """One map on one image.

    Attributes:
        hit: whether the map's highest value lies inside the mask.
        energy: the share of the map's sum that lies inside the mask; negative values count as 0.
        chance: the marked share of the area that the map covers: the energy of a uniform map.
        iou, dice: overlap of what the map marks, the pixels above half of its range, with the part
            of the mask that it covers.
        map_box: left, top, right, bottom of what the map marks, in the image's pixels.
        mask_box: the same for the mask.
        in_view: the share of the marked area that lies in what the map covers, above 0.
    """

    hit: bool
    energy: float
    chance: float
    iou: float
    dice: float
    map_box: tuple[int, int, int, int]
    mask_box: tuple[int, int, int, int]
    in_view: float


@dataclass(frozen=True)
class PointingScore:
    """Means of `Pointing` over images, with 95 % intervals.

    The share of hits has Wilson's interval (for images in groups, `share_of_groups`), the others
    have bootstrap intervals, over whole groups if there are any. A single image or group has none.
    """

    images: int
    groups: int | None
    hits: Estimate
    energy: Estimate
    iou: Estimate
    dice: Estimate
    chance: float

    @classmethod
    def of(
        cls, each: Sequence[Pointing], seed: int = 0, groups: Sequence[str] | None = None
    ) -> "PointingScore":
        """Scores of one or more images.

        Args:
            each: the images' results.
            seed: random seed of the bootstrap.
            groups: one for each image, such as its patient; default: images are independent.
        """
        unit, count = units(groups, len(each))

        def mean(name: str) -> Estimate:
            values = np.array([float(getattr(p, name)) for p in each])
            value = float(values.mean())
            if name == "hit":
                return share_of_groups(values, unit, 0.95) if groups else wilson(value, count, 0.95)
            return bootstrapped_mean(values, groups, seed)

        chance = float(np.mean([p.chance for p in each]))
        named = None if groups is None else count
        return cls(len(each), named, mean("hit"), mean("energy"), mean("iou"), mean("dice"), chance)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {n: getattr(self, n).to_dict() for n in ("hits", "energy", "iou", "dice")}
        return {"images": self.images, "groups": self.groups, **shares, "chance": self.chance}


def point(attention: ArrayLike, mask: Mask, *, box: Box | None = None) -> Pointing:
    """The pointing game (Zhang et al., IJCV 2018) and the energy (Wang et al., Score-CAM, 2020).

    Also the overlap of the map, thresholded at half of its range, with the mask. A map of zeros
    points nowhere and marks nothing; a uniform one marks all that it covers.

    Args:
        attention: (h, w).
        mask: (H, W), what people marked, in the original image's pixels.
        box: left, top, right, bottom of what the map covers; the whole image by default.

    Raises:
        UsageError: the mask marks nothing, or nothing in what the map covers.
    """
    if not mask.any():
        raise UsageError("the mask marks nothing")
    size = mask.shape[0], mask.shape[1]
    grown = place(attention, size, box=box, outside=0.0)
    seen = place(np.ones((1, 1)), size, box=box, outside=0.0) > 0
    if not mask[seen].any():
        raise UsageError("what is marked lies outside what the network saw")
    top = np.flatnonzero(seen & (grown == grown[seen].max()))
    positive = grown.clip(min=0.0)
    total = float(positive.sum())
    energy = float(positive[mask].sum()) / total if total > 0 else 0.0
    values = np.asarray(attention)
    low, high = float(values.min()), float(values.max())
    blank = low == high == 0.0  # as Grad-CAM's of a class that nothing speaks for
    marked = (grown >= low + LEVEL * (high - low)) & seen & (not blank)
    both, either = int((marked & mask).sum()), int((marked | (mask & seen)).sum())
    return Pointing(
        hit=not blank and bool(mask.flat[top].mean() > 0.5), energy=energy,
        chance=float(mask[seen].mean()), iou=both / either, dice=2 * both / (both + either),
        map_box=_box(marked), mask_box=_box(mask), in_view=float(seen[mask].mean()),
    )  # fmt: skip


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is marked; zeros where nothing is."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


SHARES = ("hit", "energy", "chance", "iou", "dice")
COLUMNS = (*SHARES, "x0", "y0", "x1", "y1", "in_view")


def cells(pointing: Pointing | None) -> list[str]:
    """The cells of `COLUMNS` for a CSV file; empty for None."""
    if pointing is None:
        return [""] * len(COLUMNS)
    values = asdict(pointing)
    shares = [str(int(pointing.hit)), *(f"{values[name]:.6f}" for name in SHARES[1:])]
    return [*shares, *map(str, pointing.map_box), f"{pointing.in_view:.6f}"]
