"""What a run decides for itself: network arguments, image size, length, weights, precision."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable
from regard.data.splits import assign_folds, assign_splits
from regard.data.survey import survey
from regard.errors import UsageError
from regard.machine import has_bf16
from regard.models.cbam import AttentionResNet
from regard.models.create import _outline
from regard.training.config import Recipe
from regard.training.steps import step_plan

DEFAULT_MODEL = "cbam_resnet18"
SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
CPU_SIZE = 128  # the largest that is chosen without a GPU; --size takes any
CIFAR_STEM_UP_TO = 48  # pixels


def choose_model(
    name: str | None, recipe: Recipe, weights: str | Path | None
) -> tuple[str, dict[str, Any]]:
    """The network's name, and the recipe's arguments of those that it takes.

    Raises:
        UsageError: no network is called so.
    """
    chosen = name or recipe.model or DEFAULT_MODEL
    _outline(chosen)  # an unknown name is told before any image is read
    arguments = dict(recipe.model_args)
    if name is not None and recipe.model is not None and name != recipe.model:
        if type(_outline(name)) is not type(_outline(recipe.model)):
            arguments = {}
        elif "cbam" in recipe.model and "cbam" not in name:
            arguments = {k: v for k, v in arguments.items() if k == "stem"}
    return chosen, arguments


def choose_preprocess(
    name: str,
    arguments: Mapping[str, Any],
    recipe: Recipe,
    table: ImageTable,
    pretrained: bool,
) -> tuple[Preprocess, dict[str, Any], list[str]]:
    """The preprocessing by recipe, network and data, the network's arguments, and what to tell.

    Raises:
        UsageError: no image of a sample can be read.
    """
    seen = survey(table)
    channels = recipe.channels or (3 if pretrained else seen.channels)
    cfg = timm.models.get_pretrained_cfg(name)
    default = (3, 224, 224) if cfg is None else tuple(cfg.input_size)
    arguments = dict(arguments)
    if cfg is not None and cfg.fixed_input_size:  # a transformer; its weights are for one size
        height, width = recipe.size or default[1:]
        told: list[str] = []
        if (height, width) != default[1:]:
            arguments.setdefault("img_size", height if height == width else (height, width))
    else:
        height, width, told = _size(recipe, default, seen.shorter_sides)
    in_chans = int(arguments.pop("in_chans", channels))
    model = _outline(name, arguments)
    if isinstance(model, AttentionResNet) and not pretrained and height <= CIFAR_STEM_UP_TO:
        arguments.setdefault("stem", "cifar")
    mean, std = (0.5,) * in_chans, (0.25,) * in_chans
    if cfg is not None and len(cfg.mean) == in_chans:
        mean, std = tuple(cfg.mean), tuple(cfg.std)
    preprocess = Preprocess(
        input_size=(in_chans, height, width), mean=mean, std=std, resize=recipe.resize,
        crop_pct=recipe.crop_pct if recipe.resize == "crop" else 1.0,
        normalization="image" if recipe.normalization == "image" else "fixed",
        value_range=seen.value_range,
    )  # fmt: skip
    if seen.value_range is not None:
        low, high = seen.value_range
        told.append(f"range of values: {low:.6g} to {high:.6g} become 0 to 1, in every image")
    return preprocess, arguments, told


def _size(recipe: Recipe, default: tuple[int, ...], sides: list[int]) -> tuple[int, int, list[str]]:
    if recipe.size is not None:
        height, width = recipe.size
        return height, width, []
    side = int(np.median(sides))
    if default[1] != default[2] and side >= default[1]:  # AG-SonoNet's 208x272
        return default[1], default[2], []
    top = max(default[1:]) if torch.cuda.is_available() else min(max(default[1:]), CPU_SIZE)
    chosen = next((s for s in SIZES if s >= min(side, top)), top)
    told = [f"image size: {chosen}, as most images are {side} on the shorter side"]
    if chosen < min(side, max(default[1:])):
        told = [
            f"image size: {chosen}, to be quick without a GPU; larger: --size "
            f"{min(side, max(default[1:]))}"
        ]
    return chosen, chosen, told


def choose_steps(recipe: Recipe, images: int, processes: int) -> int:
    """Optimizer steps of the run: the recipe's, or by the number of training images."""
    if recipe.steps is not None:
        return recipe.steps
    epochs = recipe.epochs
    if epochs is None:
        epochs = min(60.0, max(3.0, 15 * math.sqrt(2000 / images)))
    return step_plan(recipe, images, processes).total(epochs)


def parse_weights(text: str, classes: list[str], name: str) -> NDArray[np.float64]:
    """CLASS=WEIGHT,CLASS=WEIGHT as an array by class, 1 for a class that is not named.

    Raises:
        UsageError: a class is unknown, or a weight is no number of at least 0; the message
            starts with `name`.
    """
    weights = np.ones(len(classes))
    for part in filter(None, (p.strip() for p in text.split(","))):
        label, equals, value = part.rpartition("=")
        if not equals or label not in classes:
            known = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
            raise UsageError(f"{name}: {part!r} is not CLASS=WEIGHT with one of {known}")
        try:
            weights[classes.index(label)] = float(value)
        except ValueError:
            raise UsageError(f"{name}: {part!r} has no number as weight") from None
    if not (weights >= 0).all() or not np.isfinite(weights).all() or not weights.any():
        raise UsageError(f"{name}={text}: weights must be finite, at least 0, and not all 0")
    return weights


def image_weights(table: ImageTable, recipe: Recipe) -> NDArray[np.float64] | None:
    """Each image's sampling weight; None where all images are shuffled.

    Raises:
        UsageError: the recipe's weights can't be read, or leave no image.
    """
    by_class = parse_weights(recipe.sampler_weights, table.classes, "sampler_weights")
    plain = not recipe.sampler_weights and recipe.largest_class_weight == 1
    if recipe.sampler == "shuffled" and plain:
        return None
    counts = np.bincount(table.labels, minlength=len(table.classes))
    if recipe.sampler == "balanced":
        by_class = by_class / np.maximum(counts, 1)
    by_class[counts.argmax()] *= recipe.largest_class_weight
    weights = by_class[table.labels]
    if not weights.any():
        raise UsageError(f"sampler_weights={recipe.sampler_weights}: no image is left to draw")
    return weights


def loss_weights(table: ImageTable, recipe: Recipe) -> Tensor | None:
    """Each class's weight in the loss; None: all alike."""
    if recipe.class_weights == "none":
        return None
    if recipe.class_weights == "balanced":
        counts = np.bincount(table.labels, minlength=len(table.classes))
        weights = len(table) / (len(table.classes) * np.maximum(counts, 1))
    else:
        weights = parse_weights(recipe.class_weights, table.classes, "class_weights")
    return torch.from_numpy(weights).float()


def noisy_labels(
    labels: NDArray[np.int64], classes: int, share: float, seed: int
) -> NDArray[np.int64]:
    """Labels of which a share is another class's, evenly drawn from the others (RAN, table 4)."""
    if share == 0 or classes < 2:
        return labels
    rng = np.random.default_rng([seed, 4])
    changed = rng.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[changed] = (labels[changed] + rng.integers(1, classes, len(changed))) % classes
    return noisy


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run in bf16: where the machine computes in it, or where it is asked for."""
    if precision != "auto":
        return precision == "bf16"
    return has_bf16(device)


def bf16_note(precision: str, device: torch.device) -> str | None:
    """What to tell where bf16 is asked for, and the machine only emulates it."""
    if precision != "bf16" or use_bf16("auto", device):
        return None
    what = "GPU" if device.type == "cuda" else "CPU" if device.type == "cpu" else device.type
    return f"note: this {what} does not compute in bf16, only imitates it: fp32 may be faster"


def choose_splits(table: ImageTable, recipe: Recipe) -> ImageTable:
    """The table with the splits that it lacks, or with the recipe's fold as its test.

    Raises:
        UsageError: see `assign_splits` and `assign_folds`.
    """
    if recipe.fold_of is None:
        return assign_splits(table, val=recipe.val, test=recipe.test, seed=recipe.split_seed)
    fold, folds = recipe.fold_of
    return assign_folds(table, fold=fold, folds=folds, val=recipe.val, seed=recipe.split_seed)
