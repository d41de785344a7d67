"""Whether a map points at what people marked: the pointing game, and the energy inside a mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regard.errors import UsageError
from regard.evaluation import Estimate
from regard.explanations.deletion import bootstrap
from regard.explanations.overlay import Box, place

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Pointing:
    """One map on one image.

    Attributes:
        hit: whether the map's highest value lies inside the mask.
        energy: the share of the map's sum that lies inside the mask.
        chance: the share of the image that is marked: the energy of a uniform map.
    """

    hit: bool
    energy: float
    chance: float


@dataclass(frozen=True)
class PointingScore:
    """The means over images of `Pointing`, with 95 % intervals."""

    images: int
    hits: Estimate
    energy: Estimate
    chance: float

    @classmethod
    def of(cls, each: Sequence[Pointing], seed: int = 0) -> "PointingScore":
        """From at least one image."""
        hits, energy = (
            bootstrap(np.array([float(v) for v in values]), seed)
            for values in ([p.hit for p in each], [p.energy for p in each])
        )
        return cls(len(each), hits, energy, float(np.mean([p.chance for p in each])))


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
