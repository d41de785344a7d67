"""The explanation of an ensemble: the mean of its members' maps.

All members explain the same class. Each map is divided by its own largest magnitude, so that
every member counts equally whatever the scale of its attention, upsampled to the finest grid, and
averaged. Maps that not all members have, as with networks of different kinds, are left out of the
mean; `Explanation.members` has each member's own maps.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from regard.attention import StageMap
from regard.errors import UsageError

if TYPE_CHECKING:
    from regard.explanations.explanation import Explanation

_SAME = 1.0  # pixels: the members' views of an image may differ by rounding


def average_explanations(
    each: Sequence["Explanation"], classes: list[tuple[str, float]]
) -> "Explanation":
    """One explanation from the members' explanations of the same image and class.

    Args:
        each: the members' explanations.
        classes: the ensemble's prediction, all classes with their probabilities, top-1 first.

    Raises:
        UsageError: the members see different parts of the image, so their maps can't be averaged.
    """
    first = each[0]
    if len(each) == 1:
        return replace(first, classes=classes, target=_target(first, classes))
    if np.abs(np.array([e.box for e in each]) - first.box).max() > _SAME:
        raise UsageError(
            f"{first.path}: the ensemble's networks see different parts of the image (they resize "
            "or crop it differently), so their maps can't be averaged: explain each separately"
        )
    shared = [
        m for m in first.spatial() if all(any(o.name == m.name for o in e.spatial()) for e in each)
    ]
    maps = [_mean([_named(e, m.name) for e in each]) for m in shared]
    return replace(
        first, classes=classes, target=_target(first, classes), maps=maps,
        modules=[m for m in maps if m.kind != "gradcam"], raw={}, members=list(each),
    )  # fmt: skip


def _target(first: "Explanation", classes: list[tuple[str, float]]) -> tuple[str, float]:
    return first.target[0], dict(classes)[first.target[0]]


def _named(explanation: "Explanation", name: str) -> StageMap:
    return next(m for m in explanation.spatial() if m.name == name)


def _mean(maps: Sequence[StageMap]) -> StageMap:
    size = tuple(max(m.values.shape[axis] for m in maps) for axis in (0, 1))
    largest = [max(float(np.abs(m.values).max()), 1e-12) for m in maps]
    scaled = [_enlarged(m.values / by, size) for m, by in zip(maps, largest, strict=True)]
    values: NDArray[np.float32] = np.mean(scaled, axis=0).astype(np.float32)
    how = f"mean of {len(maps)} networks"
    return replace(maps[0], values=values, reduction=how)


def _enlarged(values: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    if values.shape == size:
        return values
    x = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    return torch.nn.functional.interpolate(x, size=size, mode="bilinear")[0, 0].numpy()
