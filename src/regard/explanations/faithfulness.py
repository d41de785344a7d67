"""How far a map can be believed: deletion and insertion, and whether it depends on the weights.

Deletion and insertion (Petsiuk et al., RISE, BMVC 2018, arXiv 1806.07421): the pixels that a
map ranks highest are taken from the image, or put onto a baseline without detail, step by step,
and the probability of the class is watched. A map that shows what the answer depends on makes
it fall, or rise, faster than one that does not. So every map is scored beside random maps of
its own resolution, a blob in the middle (photographers put things there), and Grad-CAM.

The sanity check (Adebayo et al., NeurIPS 2018, arXiv 1810.03292): a map that stays the same
when the weights are made random says nothing about what was learnt.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from regard.attention import Reduce, evaluating, own_maps
from regard.errors import UsageError
from regard.evaluation import Estimate
from regard.explanations.explanation import METHODS
from regard.explanations.gradcam import gradcam
from regard.predict import Classifier

Floats = NDArray[np.float64]
BASELINES = ("blur", "mean")


RANDOM, CENTER = "random", "center blob"


CONTROLS = (RANDOM, CENTER)


def baseline_of(x: Tensor, kind: str = "blur") -> Tensor:
    """Images without detail, (B, C, H, W) -> the same: strongly blurred, or each image's mean.

    Raises:
        UsageError: another kind.
    """
    if kind == "mean":
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    if kind != "blur":
        raise UsageError(f"baseline={kind!r}: choose one of {', '.join(BASELINES)}")
    sigma = max(x.shape[-2:]) / 6  # at a twelfth, digits can still be read
    size = [min(2 * int(3 * sigma) + 1, 2 * ((n - 1) // 2) + 1) for n in x.shape[-2:]]
    return gaussian_blur(x, [size[1], size[0]], [sigma, sigma])


def ranks_of(maps: Tensor, size: tuple[int, int], seed: int = 0) -> Tensor:
    """The order in which pixels go: (B, h, w) maps -> (B, H, W), 0 for the highest.

    The map is enlarged bilinearly; pixels that are equal go in random order.
    """
    grown = F.interpolate(maps[:, None].float(), size=size, mode="bilinear")[:, 0].flatten(1)
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.rand(grown.shape, generator=generator).argsort(dim=1)
    order = grown.gather(1, shuffle.to(grown.device)).argsort(dim=1, descending=True, stable=True)
    order = shuffle.to(grown.device).gather(1, order)
    ranks = torch.empty_like(order)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return ranks.scatter_(1, order, places).view(-1, *size)


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
    """Deletion and insertion curves: the class's probability after 0, 1, ... `steps` steps.

    Args:
        predict: (B, C, H, W) -> (B, classes) probabilities.
        x: (B, C, H, W), as the network takes them.
        maps: (B, h, w), higher where it looks.
        target: (B,) classes.
        baseline: (B, C, H, W), what takes the pixels' place.

    Returns:
        Deletion and insertion, (B, steps + 1) each.
    """
    pixels = x.shape[-2] * x.shape[-1]
    ranks = ranks_of(maps.to(x.device), (x.shape[-2], x.shape[-1]), seed)
    edges = torch.linspace(0, pixels, steps + 1).round().long().tolist()
    found = np.zeros((2, len(x), steps + 1))
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
        shares = predict(images)
        for (which, i, k), p in zip(part, shares, strict=True):
            found[which, i, k] = float(p[target[i]])
    return found[0], found[1]


def area(curve: Floats) -> Floats:
    """The mean height of curves (B, steps + 1), by trapezoids: 0 to 1."""
    return (curve[:, 1:] + curve[:, :-1]).mean(axis=1) / 2


def random_maps(shape: tuple[int, int, int], seed: int) -> Tensor:
    """(B, h, w) of uniform noise: what a map that knows nothing would be."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def center_maps(shape: tuple[int, int, int]) -> Tensor:
    """(B, h, w): a Gaussian in the middle, a quarter of the side wide."""
    batch, height, width = shape
    y = (torch.arange(height) + 0.5) / height - 0.5
    x = (torch.arange(width) + 0.5) / width - 0.5
    blob = torch.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 0.25**2))
    return blob.expand(batch, -1, -1)


@dataclass(frozen=True)
class MapScore:
    """One map over all images.

    Attributes:
        name: of the map.
        deletion, insertion: mean areas; a faithful map has a low deletion and a high insertion.
        gain: mean of insertion - deletion.
        over_random, over_center: how much its gain is above that of random maps and of the blob,
            paired by image; None for these themselves.
        each: (B, 2) deletion and insertion areas of each image.
        curves: (2, B, steps + 1), the deletion and insertion curves themselves; of random maps the
            mean over the repeats.
    """

    name: str
    deletion: Estimate
    insertion: Estimate
    gain: Estimate
    over_random: Estimate | None
    over_center: Estimate | None
    each: Floats
    curves: Floats

    def verdict(self) -> str:
        """One plain sentence of what follows."""
        if self.over_random is None or self.over_center is None:
            return f"{self.name} is there to compare with."
        r, c = self.over_random, self.over_center
        told = f"({r.value:+.3f}, 95 % interval {r.low:+.3f} to {r.high:+.3f})"
        if r.low > 0 and c.low > 0:
            return (
                f"{self.name} shows places that the answer depends on: better than random maps "
                f"{told} and than the image's middle."
            )
        if r.low > 0 and c.high < 0:
            return (
                f"{self.name} is better than random maps {told}, but worse than simply pointing "
                "at the image's middle."
            )
        if r.low > 0:
            return (
                f"{self.name} is better than random maps {told}, but not shown to be better than "
                "simply pointing at the image's middle."
            )
        if r.high < 0:
            return f"{self.name} is worse than random maps {told}: do not read it as evidence."
        return (
            f"{self.name} can't be told from random maps {told} on these images: do not read it "
            "as evidence of what the answer depends on."
        )


def bootstrap(values: Floats, seed: int, resamples: int = 2000) -> Estimate:
    """The mean with its 95 % percentile interval over images; NaN ends for a single one."""
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, float(low), float(high))


def score(
    predict: Callable[[Tensor], Tensor],
    x: Tensor,
    maps: Mapping[str, Tensor],
    *,
    target: Tensor | None = None,
    baseline: str = "blur",
    steps: int = 20,
    repeats: int = 3,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, MapScore]:
    """Scores maps by deletion and insertion, beside random maps and a blob in the middle.

    Args:
        predict: (B, C, H, W) -> (B, classes) probabilities.
        x: (B, C, H, W), as the network takes them; intervals are over these images.
        maps: by name, (B, h, w) each, higher where it looks.
        target: (B,) classes; what the network predicts by default.
        baseline: "blur" or "mean", see baseline_of.
        steps: of a curve.
        repeats: random maps for each image, whose areas are averaged; of the resolution of
            the finest map.
        seed: of random maps and resamples.

    Returns:
        By name, the controls last.

    Raises:
        UsageError: no map, a map of another shape or not finite, or an unknown baseline.
    """
    _check_maps(x, maps)
    with torch.no_grad():
        target = predict(x).argmax(dim=1) if target is None else target
    finest = max((m.shape for m in maps.values()), key=lambda s: s[-2] * s[-1])
    shape = (len(x), int(finest[-2]), int(finest[-1]))
    others = baseline_of(x, baseline)

    def drawn(values: Tensor, salt: int) -> Floats:
        pair = curves(
            predict, x, values, target, baseline=others, steps=steps, batch_size=batch_size,
            seed=seed + salt,
        )  # fmt: skip
        return np.stack(pair)

    found = {name: drawn(values, 0) for name, values in maps.items()}
    noise = [drawn(random_maps(shape, seed + 1 + k), k) for k in range(repeats)]
    found[RANDOM] = np.mean(noise, axis=0)
    found[CENTER] = drawn(center_maps(shape), 0)
    each = {name: np.stack([area(c) for c in pair], axis=1) for name, pair in found.items()}
    return {name: _map_score(name, each, seed, found[name]) for name in each}


def _check_maps(x: Tensor, maps: Mapping[str, Tensor]) -> None:
    if not maps:
        raise UsageError("maps: give at least one map to score")
    for name, values in maps.items():
        if name in CONTROLS:
            raise UsageError(f"maps: {name!r} is the name of a control")
        if values.ndim != 3 or len(values) != len(x):
            raise UsageError(f"map {name!r} of shape {tuple(values.shape)}: ({len(x)}, h, w)")
        if not bool(values.isfinite().all()):
            raise UsageError(f"map {name!r} has values that are not finite")


def _map_score(name: str, each: Mapping[str, Floats], seed: int, pair: Floats) -> MapScore:
    own = each[name]
    gain = own[:, 1] - own[:, 0]

    def over(control: str) -> Estimate | None:
        if name in CONTROLS:
            return None
        return bootstrap(gain - (each[control][:, 1] - each[control][:, 0]), seed)

    return MapScore(
        name,
        bootstrap(own[:, 0], seed), bootstrap(own[:, 1], seed), bootstrap(gain, seed),
        over(RANDOM), over(CENTER), own, pair,
    )  # fmt: skip


# ---------------------------------------------------------------------------- sanity check
@dataclass(frozen=True)
class Sanity:
    """Whether maps change when the weights are made random.

    Attributes:
        similarity: (B,) rank correlation of each map with the one of random weights.
        limit: above it a map counts as unchanged.
    """

    name: str
    similarity: Floats
    limit: float

    @property
    def unchanged(self) -> float:
        """The share of images whose map does not change."""
        return float((self.similarity > self.limit).mean())

    def verdict(self) -> str:
        """One plain sentence."""
        mean = float(self.similarity.mean())
        told = f"{self.unchanged:.0%} of the maps of {self.name} stay the same with random weights"
        ends = "do not show what was learnt" if self.unchanged > 0.5 else "do depend on it"
        return f"{told} (mean rank correlation {mean:.2f}): they {ends}."


def rank_correlation(a: Tensor, b: Tensor) -> Floats:
    """Spearman's, of maps (B, h, w) pairwise: (B,); 1 for two constant maps, 0 for one."""
    found = []
    for one, other in zip(a.flatten(1).numpy(), b.flatten(1).numpy(), strict=True):
        flat = np.ptp(one) <= 1e-6 * abs(one).max(), np.ptp(other) <= 1e-6 * abs(other).max()
        if any(flat) or not np.isfinite(other).all():
            found.append(float(all(flat)))
            continue
        found.append(float(np.corrcoef(rankdata(one), rankdata(other))[0, 1]))
    return np.array(found)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """A copy of the network with fresh weights in every layer, and BN's statistics forgotten."""
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in other.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for p in module.parameters(recurse=False):  # a parameter of the module's own
                nn.init.normal_(p, std=0.02)
    return other


def sanity(
    model: nn.Module,
    maps_of: Callable[[nn.Module], Mapping[str, Tensor]],
    *,
    limit: float = 0.9,
    seed: int = 0,
) -> list[Sanity]:
    """Compares each map of a network with that of the same network with random weights.

    Args:
        model: the network, left as it is.
        maps_of: the maps of a network on the images, by name, (B, h, w) each.
        limit: rank correlation above which a map counts as unchanged.
        seed: of the random weights.

    Returns:
        One for each map.
    """
    before, after = maps_of(model), maps_of(randomized(model, seed))
    return [
        Sanity(name, rank_correlation(before[name].cpu(), after[name].cpu()), limit)
        for name in before
    ]


SCORED = 256  # images; more than these are scored evenly spread


@dataclass
class Request:
    """What is asked for, beside the images."""

    out: Path
    methods: tuple[str, ...] = METHODS
    target: str | None = None
    reduce: Reduce = "mean"
    layer: str | None = None
    channels: bool = False
    score: bool = False
    masks: Path | None = None
    baseline: str = "blur"
    seed: int = 0
    steps: int = 20
    repeats: int = 3
    complain: Callable[[str], None] = print
    echo: Callable[[str], None] = print
    failed: int = 0
    names: set[str] = field(default_factory=set)


def maps_to_score(model: nn.Module, x: Tensor, ask: Request, target: Tensor) -> dict[str, Tensor]:
    """The network's own maps, and Grad-CAM's for the classes `target` (B,), as asked for."""
    found = own_maps(model, x, ask.reduce) if "attention" in ask.methods else {}
    if "gradcam" in ask.methods:
        found["Grad-CAM"] = gradcam(model, x, target, layer=ask.layer).cpu()
    return found


def explained(classifier: Classifier, x: Tensor, ask: Request) -> Tensor:
    """The classes that are explained, (B,): the one asked for, or those predicted."""
    if ask.target is not None:
        return torch.full((len(x),), classifier.class_names.index(ask.target))
    with torch.no_grad(), evaluating(classifier.model):
        return torch.cat([classifier.model(part).argmax(dim=1) for part in x.split(16)])


def judge(
    classifier: Classifier, x: Tensor, ask: Request
) -> tuple[dict[str, MapScore], list[Sanity]]:
    """Deletion and insertion, and the sanity check, of a network's maps on images (B, C, H, W)."""
    model = classifier.model

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(model):
            return model(images).float().softmax(dim=1)

    target = explained(classifier, x, ask)

    def maps_of(network: nn.Module) -> dict[str, Tensor]:  # of random weights too: the same classes
        pairs = zip(x.split(16), target.split(16), strict=True)
        parts = [maps_to_score(network, part, ask, t) for part, t in pairs]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    with torch.no_grad():
        left = float(predict(baseline_of(x, ask.baseline)).gather(1, target[:, None]).mean())
    if left > 0.5:
        ask.complain(
            f"--baseline {ask.baseline}: images without detail still have their class at "
            f"{left:.0%}, so deletion and insertion say little here; try the other baseline"
        )
    scores = score(
        predict, x, maps_of(model), target=target, baseline=ask.baseline, seed=ask.seed,
        steps=ask.steps, repeats=ask.repeats,
    )  # fmt: skip
    return scores, sanity(model, maps_of, seed=ask.seed)
