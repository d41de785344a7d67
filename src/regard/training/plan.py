"""What a run decides for itself: network arguments, image size, length, weights, precision."""

import logging
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.data.near_duplicates import grouped_by_content
from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable
from regard.data.splits import assign_folds, assign_splits, limit_training
from regard.data.survey import survey
from regard.errors import UsageError
from regard.log import Heartbeat
from regard.machine import has_bf16, has_fp16
from regard.models.attention_resnet import AttentionResNet
from regard.models.create import _outline
from regard.models.zoo import twins_of
from regard.training.config import Recipe
from regard.training.steps import step_plan

log: logging.Logger = logging.getLogger(__name__)

DEFAULT_MODEL = "cbam_resnet18"
SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
CIFAR_STEM_UP_TO = 48  # pixels; timm's weights are for larger images
CPU_SIZE = 128  # the largest that is chosen without a GPU; --size takes any


def choose_model(
    name: str | None,
    recipe: Recipe,
    given: Mapping[str, Any] | None = None,
    trained: tuple[str | None, Mapping[str, Any]] = (None, {}),
) -> tuple[str, dict[str, Any]]:
    """The network's name and its arguments: those of the recipe that it takes, then `given`.

    Args:
        name: of the network, if one is asked for; else it is the recipe's.
        recipe: of the run.
        given: arguments of the network.
        trained: the network that the run's weights are of, see `network_of`: without a name or a
            recipe's it is that one, and where it is, it has its arguments unless others are given.

    Raises:
        UsageError: there is no such network, or it does not take a given argument.
    """
    chosen = name or recipe.model or trained[0] or DEFAULT_MODEL
    outline = _outline(chosen)  # an unknown name is an error before any image is read
    arguments = dict(recipe.model_args)
    if name is not None and recipe.model is not None and name != recipe.model:
        if type(outline) is not type(_outline(recipe.model)):
            arguments = {}
        elif "cbam" in recipe.model and "cbam" not in name:
            arguments = {k: v for k, v in arguments.items() if k == "stem"}
    if chosen == trained[0]:
        arguments = {**trained[1], **arguments}
    if given:
        if "num_classes" in given:
            raise UsageError("num_classes: it is the number of classes in the data")
        arguments |= given
        _outline(chosen, arguments)
    return chosen, arguments


def choose_preprocess(
    name: str,
    arguments: Mapping[str, Any],
    recipe: Recipe,
    table: ImageTable,
    start_channels: Callable[[int, int], int],
) -> tuple[Preprocess, dict[str, Any]]:
    """The preprocessing by recipe, network and data, and the network's arguments.

    Args:
        name, arguments: the network.
        recipe: of the run.
        table: its images.
        start_channels: the input channels of the weights to start from, for images of this
            height and with so many channels; 0: there are no weights, or it is not known.

    Raises:
        UsageError: no image of a sample can be read.
    """
    seen = survey(table)
    cfg = timm.models.get_pretrained_cfg(name)
    default = (3, 224, 224) if cfg is None else tuple(cfg.input_size)
    arguments = dict(arguments)
    if cfg is not None and cfg.fixed_input_size:  # a transformer; its weights are for one size
        own = arguments.get("img_size", default[1:])
        height, width = recipe.size or (own if isinstance(own, tuple | list) else (own, own))
        if (height, width) != default[1:]:
            arguments.setdefault("img_size", height if height == width else (height, width))
    else:
        height, width = _size(recipe, default, seen.shorter_sides)
    # gray images are repeated; color is left out only where that is asked for
    wanted = max(seen.channels, start_channels(height, seen.channels))
    channels = recipe.channels or wanted
    in_chans = int(arguments.pop("in_chans", channels))
    mean, std = (0.5,) * in_chans, (0.25,) * in_chans
    if cfg is not None and len(cfg.mean) == in_chans:
        mean, std = tuple(cfg.mean), tuple(cfg.std)
    preprocess = Preprocess(
        input_size=(in_chans, height, width), mean=mean, std=std, resize=recipe.resize,
        crop_pct=recipe.crop_pct if recipe.resize == "crop" else 1.0,
        normalization="image" if recipe.normalization == "image" else "fixed",
        value_range=seen.value_range, resize_first=recipe.resize_first,
    )  # fmt: skip
    if seen.value_range is not None:
        low, high = seen.value_range
        log.info(
            f"pixel values from {low:.6g} to {high:.6g} become 0 to 1, in every image without a "
            "range of its own"
        )
    return preprocess, arguments


def choose_stem(
    name: str, arguments: Mapping[str, Any], height: int, *, pretrained: bool, weights: str | None
) -> tuple[str, dict[str, Any]]:
    """The network and its arguments, with the CIFAR stem for small images.

    A ResNet of timm's has no such stem: where Regard has its plain twin, that takes its place,
    so that it is compared with the gated networks on equal terms.

    Args:
        name, arguments: the network that is asked for.
        height: of the images, in pixels.
        pretrained: whether it starts from weights that have their stem: timm's, which have the
            ImageNet stem, or a folder's of this network.
        weights: what a network of timm's starts from; it then stays as it is.
    """
    if pretrained or height > CIFAR_STEM_UP_TO:
        return name, dict(arguments)
    if isinstance(_outline(name, arguments), AttentionResNet):
        return name, {"stem": "cifar", **arguments}
    twin = plain_twin(name)
    if twin is None or weights is not None or any("stem" in argument for argument in arguments):
        return name, dict(arguments)
    log.info(
        f"model={name} becomes {twin} with stem=cifar: the same network, with a stem for images "
        f"of {height} pixels"
    )
    return twin, {"stem": "cifar", **arguments}


def plain_twin(name: str) -> str | None:
    """Regard's plain network that has the layers of timm's network `name`, if there is one.

    >>> plain_twin("resnet18"), plain_twin("resnet18.a1_in1k"), plain_twin("attention56")
    ('plain_resnet18', 'plain_resnet18', None)
    """
    base = name.partition(".")[0]
    family = twins_of(base)
    # the networks of a family are Regard's own, attention56 too
    if not family or base in family.values() or not timm.is_model(base):
        return None
    return family["plain"]


def _size(recipe: Recipe, default: tuple[int, ...], sides: list[int]) -> tuple[int, int]:
    """Height and width: the recipe's, or the smallest of SIZES that shows most images in full."""
    if recipe.size is not None:
        height, width = recipe.size
        return height, width
    side = int(np.median(sides))
    if default[1] != default[2] and side >= default[1]:  # AG-SonoNet's 208x272
        return default[1], default[2]
    top = max(default[1:]) if torch.cuda.is_available() else min(max(default[1:]), CPU_SIZE)
    chosen = next((s for s in SIZES if s >= min(side, top)), top)
    largest = min(side, max(default[1:]))
    if chosen < largest:
        log.info(f"size={chosen}: fast without a GPU; the images allow size={largest}")
    else:
        log.info(f"size={chosen}: the shorter side of most images is {side}")
    return chosen, chosen


def choose_epochs(recipe: Recipe, images: int) -> float:
    """Epochs of the run: the recipe's, or by the number of training images."""
    if recipe.epochs is not None:
        return recipe.epochs
    return min(60.0, max(3.0, 15 * math.sqrt(2000 / images)))


def choose_steps(recipe: Recipe, images: int, processes: int) -> int:
    """Optimizer steps of the run: the recipe's, or those of its epochs."""
    if recipe.steps is not None:
        return recipe.steps
    return step_plan(recipe, images, processes).total(choose_epochs(recipe, images))


def fit_schedule(
    recipe: Recipe, base: Recipe, given: Container[str], images: int, processes: int
) -> Recipe:
    """The recipe with the milestones and the warm-up of `base` in proportion to its own length.

    A run of a tenth of the base recipe's length has its learning rate fall at a tenth of the base
    recipe's milestones. Values that were given are taken as they are.

    Args:
        recipe: with the changes.
        base: without them.
        given: names of the changed fields.
        images: number of training images.
        processes: how many train.

    Raises:
        UsageError: milestones or a warm-up that are not scaled would not end before the run.
    """
    end, whole = (_length(r, images, processes) for r in (recipe, base))
    if base.epochs is None and base.steps is None:
        whole = end  # no length of its own that its schedule would be a part of
    changes: dict[str, Any] = {}
    for name in ("milestones", "warmup"):
        value = getattr(recipe, name)
        last = max(value, default=0.0) if isinstance(value, tuple) else value
        if name not in given and last < whole:
            changes[name] = _scaled(value, end / whole)
        elif last >= end:
            shown = _listed(value)
            raise UsageError(f"{name}={shown}: the run ends after {end:.6g} {recipe.schedule_unit}")
    changed = [n for n, value in changes.items() if value != getattr(recipe, n)]
    if changed:
        parts = [f"{n} {_listed(getattr(recipe, n))} -> {_listed(changes[n])}" for n in changed]
        log.info(
            f"schedule scaled to {end:.6g} {recipe.schedule_unit} (the recipe: {whole:.6g} "
            f"{base.schedule_unit}): {'; '.join(parts)}"
        )
    return recipe.changed(**{n: changes[n] for n in changed})


def _scaled(value: Any, scale: float) -> Any:
    """One number, or each of several, times `scale`."""
    return tuple(v * scale for v in value) if isinstance(value, tuple) else value * scale


def _listed(value: Any) -> str:
    return ", ".join(f"{v:.6g}" for v in (value if isinstance(value, tuple) else (value,)))


def _length(recipe: Recipe, images: int, processes: int) -> float:
    """The length of a run in the unit of its schedule."""
    if recipe.schedule_unit == "steps":
        return choose_steps(recipe, images, processes)
    if recipe.steps is not None:
        return recipe.steps / step_plan(recipe, images, processes).an_epoch
    return choose_epochs(recipe, images)


def is_scaled(name: str, was: Any, now: Any) -> bool:
    """Whether a resumed run's schedule may be the one asked for, scaled by `fit_schedule`."""
    if name == "warmup":
        return bool(was) and bool(now)
    if name != "milestones" or len(was) != len(now):
        return False
    return all(math.isclose(a * now[-1], b * was[-1]) for a, b in zip(was, now, strict=True))


def own_recipe(
    recipe: Recipe, name: str, arguments: Mapping[str, Any], preprocess: Preprocess
) -> Recipe:
    """The recipe with the run's own network, so that it trains the same one again."""
    own = dict(arguments)
    if "in_chans" in recipe.model_args:  # which is no argument any more, but the input's
        own["in_chans"] = preprocess.input_size[0]
    return recipe.changed(model=name, model_args=own)


def check_batch(model: nn.Module, recipe: Recipe, images: int) -> None:
    """Refuses batches of one image for batch norm, which has no variance to divide by.

    Raises:
        UsageError: a batch has one image, and the network has batch norm.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    smallest = min(recipe.batch_size, images)
    if smallest > 1 or not any(isinstance(m, norms) for m in model.modules()):
        return
    if images == 1:
        raise UsageError("one training image: batch norm needs at least 2")
    raise UsageError("batch_size=1: batch norm needs batches of at least 2 images")


def parse_weights(text: str, classes: list[str], name: str) -> NDArray[np.float64]:
    """CLASS=WEIGHT,CLASS=WEIGHT as an array by class, 1 for a class that is not named.

    Raises:
        UsageError: a class is unknown, or a weight is no number of at least 0; the message
            starts with `name`.
    """
    weights = np.ones(len(classes))
    part = ""
    for piece in text.split(","):
        part = f"{part},{piece}".strip(", ")
        label, equals, value = part.rpartition("=")
        if not equals or label not in classes:  # a class has a comma, or there is no such class
            continue
        try:
            weights[classes.index(label)] = float(value)
        except ValueError:
            raise UsageError(f"{name}: {part!r} has no number as weight") from None
        part = ""
    if part:
        known = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
        raise UsageError(f"{name}: {part!r} is not CLASS=WEIGHT with one of {known}")
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
    """(classes,) weights of the loss, or None for 1 each."""
    if recipe.class_weights == "none":
        return None
    if recipe.class_weights == "balanced":
        counts = np.bincount(table.labels, minlength=len(table.classes))
        # 0 for a class without images, which label smoothing would count as the rarest
        weights = np.where(counts, len(table) / (len(counts) * np.maximum(counts, 1)), 0.0)
    else:
        weights = parse_weights(recipe.class_weights, table.classes, "class_weights")
    return torch.from_numpy(weights).float()


def noisy_labels(
    labels: NDArray[np.int64], classes: int, share: float, seed: int
) -> NDArray[np.int64]:
    """Labels with a fraction changed to another class, drawn uniformly (RAN, table 5)."""
    if share == 0 or classes < 2:
        return labels
    rng = np.random.default_rng([seed, 4])
    changed = rng.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[changed] = (labels[changed] + rng.integers(1, classes, len(changed))) % classes
    return noisy


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision in which to train: the one that is asked for, or by the hardware.

    "auto" is bf16 where the device multiplies in it, else fp16 on GPUs whose tensor cores do
    (V100, T4, RTX 20), else fp32.

    Raises:
        UsageError: the device can't compute in it.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"precision=tf32: of NVIDIA's GPUs alone, this is {device.type}")
    if precision != "auto":
        return precision
    if has_bf16(device):
        return "bf16"
    return "fp16" if has_fp16(device) else "fp32"


def precision_note(precision: str, device: torch.device) -> str | None:
    """A note where a narrow precision is asked for that the hardware only emulates."""
    able = {"bf16": has_bf16, "fp16": has_fp16}
    if precision not in able or able[precision](device):
        return None
    what = "GPU" if device.type == "cuda" else "CPU" if device.type == "cpu" else device.type
    return f"note: this {what} emulates {precision}: fp32 may be faster"


def choose_splits(table: ImageTable, recipe: Recipe) -> ImageTable:
    """The table with the splits that it lacks, or with the recipe's fold as its test.

    With `recipe.limit` only that many training images stay; the other splits stay whole.

    Raises:
        UsageError: see `assign_splits` and `assign_folds`; or a limit below the classes' number.
    """
    groups = table.groups
    if recipe.keep_together:
        table = grouped_by_content(table, Heartbeat("images compared"))
    if recipe.fold_of is None:
        table = assign_splits(table, val=recipe.val, test=recipe.test, seed=recipe.split_seed)
    else:
        fold, folds = recipe.fold_of
        table = assign_folds(table, fold=fold, folds=folds, val=recipe.val, seed=recipe.split_seed)
    table = replace(table, groups=groups)
    return table if recipe.limit is None else limit_training(table, recipe.limit, recipe.split_seed)
