"""Sanity checks: whether maps depend on the weights, and on the image.

Adebayo et al., NeurIPS 2018, arXiv 1810.03292: a map that stays the same when the weights are
randomized says nothing about what was learned. Likewise, a map that is the same for every image
says nothing about the image, however much it depends on the weights.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from regard.explanations.overlay import FEW_CELLS

Floats = NDArray[np.float64]
LIMIT = 0.9  # rank correlation above which two maps count as the same


@dataclass(frozen=True)
class Sanity:
    """Whether one map depends on the weights and on the image.

    Attributes:
        name: the map's name.
        similarity: (B,) rank correlation of each image's map with that of the randomized network.
        between: mean rank correlation between maps of different images; None for one image.
        shape: (h, w) of the map.
    """

    name: str
    similarity: Floats
    between: float | None
    shape: tuple[int, int]

    @property
    def unchanged(self) -> float:
        """The share of images whose map stays the same with random weights."""
        return float((self.similarity > LIMIT).mean())

    @property
    def passed(self) -> bool:
        """Whether the maps change with the weights and, if this was measured, with the image."""
        return self.unchanged <= 0.5 and (self.between is None or self.between <= LIMIT)

    def verdict(self) -> str:
        """One plain sentence, and a second one for a map with few cells."""
        learned, alike = self.unchanged <= 0.5, self.between is not None and self.between > LIMIT
        if alike:
            ends = "they are nearly the same for every image and do not show what is in one"
            ends += "" if learned else ", nor what was learned"
        elif not learned:
            ends = "they do not show what was learned"
        elif self.between is None:
            ends = "they depend on the weights; whether they depend on the image takes two images"
        else:
            ends = "they depend on the weights and on the image"
        between = "" if self.between is None else f", between different images {self.between:.2f}"
        sentence = (
            f"{self.unchanged:.0%} of the maps of {self.name} stay the same with random weights "
            f"(mean rank correlation {float(self.similarity.mean()):.2f}{between}): {ends}."
        )
        height, width = self.shape
        if height * width <= FEW_CELLS:
            cells = "1 cell" if height * width == 1 else f"{height * width} cells"
            sentence += f" Its maps have only {cells} ({height}×{width})."
        return sentence


def _ranked(values: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
    """Standardized ranks (B, h * w) of maps (B, h, w), zero if constant; and which are constant."""
    flat = values.flatten(1).cpu().double().numpy()  # some devices lack float64
    finite = np.isfinite(flat).all(axis=1)
    flat = np.where(finite[:, None], flat, 0.0)
    constant = np.ptp(flat, axis=1) <= 1e-6 * abs(flat).max(axis=1)
    ranks = np.where(constant[:, None], 0.0, rankdata(flat, axis=1))
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
    return ranks / np.where(length > 0, length, 1.0), constant & finite


def rank_correlation(a: Tensor, b: Tensor) -> Floats:
    """Pairwise Spearman correlation of maps (B, h, w): (B,); 1 for two constant maps, 0 for one."""
    (first, flat_a), (second, flat_b) = _ranked(a), _ranked(b)
    return np.where(flat_a & flat_b, 1.0, (first * second).sum(axis=1))


def correlation_between(maps: Tensor) -> float | None:
    """Mean rank correlation between maps (B, h, w) of different images; None for one image.

    Two constant maps count as 1.
    """
    if len(maps) < 2:
        return None
    ranks, constant = _ranked(maps)
    together = ranks @ ranks.T + np.outer(constant, constant)
    pairs = len(maps) * (len(maps) - 1)
    return float((together.sum() - np.trace(together)) / pairs)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the network with fresh weights in every layer and reset BN statistics."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in other.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for p in module.parameters(recurse=False):  # parameters of the module itself
                nn.init.normal_(p, std=0.02)
    return other
