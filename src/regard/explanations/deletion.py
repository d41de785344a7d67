"""Deletion and insertion: how well a map shows what the prediction depends on.

Petsiuk et al., RISE, BMVC 2018, arXiv 1806.07421: the pixels that a map ranks highest are
removed from the image, or added to a baseline without detail, step by step, and the probability
of the class is recorded. The better the map shows what the prediction depends on, the faster the
probability falls (deletion) or rises (insertion). Every map is compared with the same random
maps, which have the resolution of the finest map, and with a blob in the center, where
photographers put things, at the resolution of the input. In a random order, the pixels not yet
deleted are a random part of the image, as are the pixels inserted, so its insertion equals its
deletion on average, whatever the resolution; fine maps vary least.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from regard.errors import UsageError
from regard.evaluation import Estimate
from regard.evaluation.intervals import bootstrapped_mean
from regard.files import signed, signed_range

Floats = NDArray[np.float64]
BASELINES = ("blur", "mean")
RANDOM, CENTER = "random", "center blob"
CONTROLS = (RANDOM, CENTER)


def baseline_of(x: Tensor, kind: str = "blur") -> Tensor:
    """Images without detail, (B, C, H, W) -> the same: strong blur, or each image's mean.

    Raises:
        UsageError: `kind` is neither.
    """
    if kind == "mean":
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    if kind != "blur":
        raise UsageError(f"baseline={kind!r}: choose one of {', '.join(BASELINES)}")
    sigma = max(x.shape[-2:]) / 6  # with a twelfth, digits remain legible
    size = [min(2 * int(3 * sigma) + 1, 2 * ((n - 1) // 2) + 1) for n in x.shape[-2:]]
    return gaussian_blur(x, [size[1], size[0]], [sigma, sigma])


def ranks_of(maps: Tensor, size: tuple[int, int], seed: int = 0) -> Tensor:
    """The rank of each pixel: maps (B, h, w) -> (B, H, W), 0 for the highest.

    The map is upsampled bilinearly; ties get a random order.
    """
    grown = F.interpolate(maps[:, None].float(), size=size, mode="bilinear")[:, 0].flatten(1)
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.rand(grown.shape, generator=generator).argsort(dim=1)
    order = grown.gather(1, shuffle.to(grown.device)).argsort(dim=1, descending=True, stable=True)
    order = shuffle.to(grown.device).gather(1, order)
    ranks = torch.empty_like(order)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return ranks.scatter_(1, order, positions).view(-1, *size)


@torch.no_grad()
def curves(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    baseline: Tensor,
    steps: int = 20,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Deletion and insertion curves: the class's probability after 0, 1, ..., `steps` steps.

    Args:
        predict: (B, C, H, W) -> (B, classes) probabilities.
        x: (B, C, H, W), the network's input.
        maps: (B, h, w), higher where the network looks.
        target: (B,) classes.
        baseline: (B, C, H, W), the replacement for the pixels.

    Returns:
        Deletion and insertion, (B, steps + 1) each.
    """
    pixels = x.shape[-2] * x.shape[-1]
    ranks = ranks_of(maps.to(x.device), (x.shape[-2], x.shape[-1]), seed)
    edges = torch.linspace(0, pixels, steps + 1).round().long().tolist()
    measured = np.zeros((2, len(x), steps + 1))
    jobs = [(which, i, k) for which in (0, 1) for i in range(len(x)) for k in range(steps + 1)]
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        images = torch.stack(
            [
                torch.where(
                    (ranks[i] < edges[k])[None],
                    baseline[i] if which == 0 else x[i],
                    x[i] if which == 0 else baseline[i],
                )
                for which, i, k in part
            ]
        )
        which, of, at = map(list, zip(*part, strict=True))
        found = predict(images).gather(1, target[of][:, None].to(images.device))
        measured[which, of, at] = found[:, 0].cpu().numpy()  # one device synchronization per batch
    return measured[0], measured[1]


def area(curve: Floats) -> Floats:
    """The mean height of curves (B, steps + 1), by the trapezoidal rule: 0 to 1."""
    return (curve[:, 1:] + curve[:, :-1]).mean(axis=1) / 2


def random_maps(shape: tuple[int, int, int], seed: int) -> Tensor:
    """(B, h, w) of uniform noise: a map without information."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def center_maps(shape: tuple[int, int, int]) -> Tensor:
    """(B, h, w): a Gaussian in the center; its standard deviation is a quarter of the side."""
    batch, height, width = shape
    y = (torch.arange(height) + 0.5) / height - 0.5
    x = (torch.arange(width) + 0.5) / width - 0.5
    blob = torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 0.25**2))
    return blob.expand(batch, -1, -1)


def measure(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    maps: Mapping[str, Tensor],
    target: Tensor,
    *,
    baseline: str = "blur",
    steps: int = 20,
    repeats: int = 3,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Floats]:
    """Deletion and insertion curves of maps and controls: (2, B, steps + 1) each, by name.

    Args:
        predict: (B, C, H, W) -> (B, classes) probabilities.
        x: (B, C, H, W), the network's input.
        maps: by name, (B, h, w) each, higher where the network looks.
        target: (B,) classes.
        baseline: "blur" or "mean", see `baseline_of`.
        steps: steps of a curve.
        repeats: random maps per image, at the resolution of the finest map; the control's curves
            are their mean.
        seed: random seed of random maps and ties.

    Raises:
        UsageError: no map, a map of another shape or not finite, or an unknown baseline.
    """
    _check_maps(x, maps)
    finest = max((m.shape for m in maps.values()), key=lambda s: s[-2] * s[-1])
    shape = (len(x), int(finest[-2]), int(finest[-1]))
    without_detail = baseline_of(x, baseline)

    def of(values: Tensor, salt: int) -> Floats:
        pair = curves(
            predict, x, values, target, baseline=without_detail, steps=steps,
            batch_size=batch_size, seed=seed + salt,
        )  # fmt: skip
        return np.stack(pair)

    measured = {name: of(values, 0) for name, values in maps.items()}
    noise = [of(random_maps(shape, seed + 1 + k), k) for k in range(repeats)]
    measured[RANDOM] = np.mean(noise, axis=0)
    # at the input's size: a map of 2x2 or fewer cells has no center
    measured[CENTER] = of(center_maps((len(x), x.shape[-2], x.shape[-1])), 0)
    return measured


def _check_maps(x: Tensor, maps: Mapping[str, Tensor]) -> None:
    if not maps:
        raise UsageError("maps: give at least one map to score")
    for name, values in maps.items():
        if name in CONTROLS:
            raise UsageError(f"maps: {name!r} is the name of a control")
        if values.ndim != 3 or len(values) != len(x):
            raise UsageError(
                f"map {name!r} of shape {tuple(values.shape)}: must be ({len(x)}, h, w)"
            )
        if not bool(values.isfinite().all()):
            raise UsageError(f"map {name!r} has values that are not finite")


# ---- scores ------------------------------------------------------------------------------
@dataclass(frozen=True)
class MapScore:
    """One map over all images.

    Attributes:
        name: the map's name.
        deletion, insertion: mean areas under the curves; a faithful map has a low deletion and
            a high insertion.
        difference: mean of insertion - deletion.
        over_random, over_center: how much `difference` exceeds that of random maps and of the
            center blob, paired by image; None for these themselves.
        each: (B, 2) deletion and insertion areas of each image.
        curves: (2, B, steps + 1), the deletion and insertion curves themselves.
        groups: (B,) groups of the images, such as patients; None: images are independent.
    """

    name: str
    deletion: Estimate
    insertion: Estimate
    difference: Estimate
    over_random: Estimate | None
    over_center: Estimate | None
    each: Floats
    curves: Floats
    groups: Sequence[str] | None = None

    def verdict(self) -> str:
        """The conclusion in one plain sentence."""
        if self.over_random is None or self.over_center is None:
            return f"{self.name} is a control."
        r, c = self.over_random, self.over_center
        if np.isnan(r.low):
            what = "one image" if len(self.each) == 1 else "images of one group"
            return (
                f"{self.name} was scored on {what} ({signed(r.value, 3)} over random maps): "
                "that is no basis for a conclusion."
            )
        value, low, high = signed_range(r.value, r.low, r.high, 3)
        by = f"({value}, 95 % interval {low} to {high})"
        if r.low > 0 and c.low > 0:
            return (
                f"{self.name} shows places that the answer depends on: better than random maps "
                f"{by} and than the image's center."
            )
        if r.low > 0 and c.high < 0:
            return (
                f"{self.name} is better than random maps {by}, but worse than simply pointing "
                "at the image's center."
            )
        if r.low > 0:
            return (
                f"{self.name} is better than random maps {by}, but not shown to be better than "
                "simply pointing at the image's center."
            )
        if r.high < 0:
            return f"{self.name} is worse than random maps {by}: do not read it as evidence."
        return (
            f"{self.name} can't be told from random maps {by} on these images: do not read it "
            "as evidence of what the answer depends on."
        )


def summarize(
    measured: Mapping[str, Floats], seed: int = 0, groups: Sequence[str] | None = None
) -> dict[str, MapScore]:
    """Scores with intervals over images (or groups) from the curves of `measure`, controls last."""
    each = {name: np.stack([area(c) for c in pair], axis=1) for name, pair in measured.items()}

    def mean(values: Floats) -> Estimate:
        return bootstrapped_mean(values, groups, seed)

    def of(name: str) -> MapScore:
        own = each[name]
        difference = own[:, 1] - own[:, 0]

        def over(control: str) -> Estimate | None:
            if name in CONTROLS:
                return None
            return mean(difference - (each[control][:, 1] - each[control][:, 0]))

        return MapScore(
            name, mean(own[:, 0]), mean(own[:, 1]), mean(difference), over(RANDOM), over(CENTER),
            own, measured[name], groups,
        )  # fmt: skip

    return {name: of(name) for name in each}
