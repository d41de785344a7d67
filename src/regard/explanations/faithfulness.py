"""How trustworthy maps are: deletion, insertion and sanity checks, image by image.

`judge` scores a batch. For many images, a `Scorer` takes one at a time, so that memory use stays
constant and work can be resumed, and `summarize` combines the scores.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.attention import Reduce, evaluating, own_maps
from regard.evaluation import Estimate
from regard.explanations import deletion
from regard.explanations.channel_gates import GateCheck, channel_gates, compare_gates, verdict
from regard.explanations.deletion import Floats, MapScore, baseline_of, measure
from regard.explanations.explanation import GRADCAM, METHODS
from regard.explanations.gradcam import gradcam
from regard.explanations.sanity import (
    Sanity,
    correlation_between,
    randomized,
    rank_correlation,
)


def spatial_maps(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    methods: Sequence[str] = METHODS,
    reduce: Reduce = "mean",
    layer: str | None = None,
) -> dict[str, Tensor]:
    """The maps over positions that `explain` shows, under the same names: (B, h, w) each.

    Args:
        model: any classifier.
        x: (B, C, H, W), preprocessed.
        target: (B,) classes that Grad-CAM explains.
        methods, reduce, layer: as for `explain`.
    """
    maps = own_maps(model, x, reduce) if "attention" in methods else {}
    if "gradcam" in methods:
        maps[GRADCAM] = gradcam(model, x, target, layer=layer).float().cpu()
    return maps


@dataclass(frozen=True, eq=False)
class ImageScore:
    """The scores of one image.

    Attributes:
        curves: deletion and insertion by map, (2, steps + 1), the controls last.
        maps: the maps themselves by name, (h, w) float32.
        similarity: rank correlation with the map of the network with random weights, by map.
        without_detail: the class's probability for the baseline image.
        gates: the values of each channel gate, (C,) float32, by module.
    """

    curves: dict[str, Floats]
    maps: dict[str, NDArray[np.float32]]
    similarity: dict[str, float]
    without_detail: float
    gates: dict[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """The scores of all images.

    Attributes:
        images: number of images.
        groups: number of groups; None: images are independent.
        scores: by map, the controls last.
        checks: one sanity check per map.
        warnings: reasons to doubt the scores themselves.
        gates: the channel gates, which have no map over positions, compared over the images.
        temperature: the logits were divided by it for the probabilities.
    """

    images: int
    scores: dict[str, MapScore]
    checks: list[Sanity]
    warnings: list[str] = field(default_factory=list)
    groups: int | None = None
    gates: list[GateCheck] = field(default_factory=list)
    temperature: float = 1.0

    @property
    def over(self) -> str:
        """What the intervals are over: "images", "7 groups", or "" if there are none."""
        if min(self.images, self.groups or self.images) < 2:
            return ""
        return "images" if self.groups is None else f"{self.groups} groups"

    def sentences(self) -> list[str]:
        """The conclusions in plain words: warnings, a verdict per map and check, and the gates."""
        verdicts = [s.verdict() for s in self.scores.values() if s.over_random is not None]
        gates = [verdict(self.gates, self.images)] if self.gates else []
        return [*self.warnings, *verdicts, *(c.verdict() for c in self.checks), *gates]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the numbers of each map, and its kind: attention, gradcam or control."""
        kinds = {GRADCAM: "gradcam", **dict.fromkeys(deletion.CONTROLS, "control")}
        return {
            "images": self.images,
            "groups": self.groups,
            "temperature": self.temperature,
            "maps": {
                name: {"kind": kinds.get(name, "attention"), **each}
                for name, each in numbers(self.scores).items()
            },
            "channel_gates": {g.name: g.to_dict() for g in self.gates},
            "sentences": self.sentences(),
        }


class Scorer:
    """Scores the maps of one image at a time.

    An image's scores depend only on the image and the settings, not on its position: the seed of
    its random maps is computed from its pixels.

    Args:
        model: the network; it is not changed.
        methods, reduce, layer: as for `explain`.
        baseline: "blur" or "mean", see `deletion.baseline_of`.
        seed: random seed of random maps and random weights.
        steps: steps of a curve.
        repeats: random maps per image.
        temperature: the logits are divided by it for the probabilities, as in `predict`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        methods: Sequence[str] = METHODS,
        reduce: Reduce = "mean",
        layer: str | None = None,
        baseline: str = "blur",
        seed: int = 0,
        steps: int = 20,
        repeats: int = 3,
        temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.random: nn.Module = randomized(model, seed)
        self.of: dict[str, Any] = {"methods": methods, "reduce": reduce, "layer": layer}
        self.baseline: str = baseline
        self.seed: int = seed
        self.steps: int = steps
        self.repeats: int = repeats
        self.temperature: float = temperature

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes) probabilities."""
        with evaluating(self.model):
            return (self.model(x).float() / self.temperature).softmax(dim=1)

    def score(self, x: Tensor, target: int | None = None) -> ImageScore:
        """Scores one image (1, C, H, W) for a class; default: the predicted class.

        Raises:
            UsageError: the network has no map to score, or an unknown baseline.
        """
        classes = self.predict(x).argmax(dim=1) if target is None else torch.tensor([target])
        classes = classes.to(x.device)
        maps = spatial_maps(self.model, x, classes, **self.of)
        other = spatial_maps(self.random, x, classes, **self.of)
        seed = self.seed + zlib.crc32(x.float().cpu().numpy().tobytes())
        curves = measure(
            self.predict, x, maps, classes, baseline=self.baseline, steps=self.steps,
            repeats=self.repeats, seed=seed,
        )  # fmt: skip
        blank = self.predict(baseline_of(x, self.baseline))
        gates = channel_gates(self.model, x) if "attention" in self.of["methods"] else {}
        return ImageScore(
            curves={name: pair[:, 0] for name, pair in curves.items()},
            maps={name: values[0].cpu().numpy() for name, values in maps.items()},
            similarity={n: float(rank_correlation(maps[n], other[n])[0]) for n in maps},
            without_detail=float(blank[0, classes[0]]),
            gates={name: values[0] for name, values in gates.items()},
        )


def summarize(
    each: Sequence[ImageScore],
    *,
    baseline: str = "blur",
    seed: int = 0,
    groups: Sequence[str] | None = None,
    temperature: float = 1.0,
) -> Faithfulness:
    """Scores and checks over one or more images, in their order.

    Args:
        each: the images' scores.
        baseline: the baseline of the scores.
        seed: random seed of the bootstrap.
        groups: of the images, such as patients; if given, intervals are over these.
        temperature: that of the scores.
    """
    names = list(each[0].curves)
    curves = {name: np.stack([one.curves[name] for one in each], axis=1) for name in names}
    checks = []
    for name in each[0].maps:
        maps = torch.from_numpy(np.stack([one.maps[name] for one in each]))
        similarity = np.array([one.similarity[name] for one in each])
        shape = (int(maps.shape[1]), int(maps.shape[2]))
        checks.append(Sanity(name, similarity, correlation_between(maps), shape))
    left = float(np.mean([one.without_detail for one in each]))
    warnings = []
    if left > 0.5:
        warnings.append(
            f"Images without detail (baseline {baseline}) still have their class at {left:.0%}, "
            "so deletion and insertion say little here; try the other baseline."
        )
    named = None if groups is None else len(set(groups))
    scores = deletion.summarize(curves, seed, groups)
    gates = {name: np.stack([one.gates[name] for one in each]) for name in each[0].gates}
    found = compare_gates(gates)
    return Faithfulness(len(each), scores, checks, warnings, named, found, temperature)


def judge(
    model: nn.Module, x: Tensor, target: Sequence[int] | Tensor | None = None, **settings: Any
) -> Faithfulness:
    """Deletion and insertion, and sanity checks, of a network's maps on images (B, C, H, W).

    Args:
        model: any classifier.
        x: preprocessed images, at least one.
        target: the class to explain for each image; default: the predicted class.
        settings: arguments of `Scorer`.

    Raises:
        UsageError: the network has no map to score, or an unknown baseline.
    """
    scorer = Scorer(model, **settings)
    targets = [None] * len(x) if target is None else [int(t) for t in target]
    each = [scorer.score(x[i : i + 1], t) for i, t in enumerate(targets)]
    return summarize(
        each, baseline=scorer.baseline, seed=scorer.seed, temperature=scorer.temperature
    )


def interval(estimate: Estimate | None, decimals: int = 3) -> str:
    """ "0.412 (0.376 to 0.450)"; without the interval if there is none; "–" for None."""
    if estimate is None:
        return "–"
    value = f"{estimate.value:.{decimals}f}"
    if np.isnan(estimate.low):
        return value
    return f"{value} ({estimate.low:.{decimals}f} to {estimate.high:.{decimals}f})"


def numbers(scores: Mapping[str, MapScore]) -> dict[str, Any]:
    """Scores for JSON: value, low and high of each number (null if there is no interval)."""
    parts = ("deletion", "insertion", "difference", "over_random", "over_center")
    return {
        name: {
            **{p: None if (e := getattr(s, p)) is None else e.to_dict() for p in parts},
            "verdict": s.verdict(),
        }
        for name, s in scores.items()
    }
