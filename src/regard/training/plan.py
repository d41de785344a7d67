"""What a run derives from its data: network arguments, image size, length, weights, precision."""

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

from regard.cells import number_of
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
from regard.models.graft import refuse_attention
from regard.models.zoo import twins_of
from regard.training.config import Recipe
from regard.training.steps import step_plan

log: logging.Logger = logging.getLogger(__name__)

DEFAULT_MODEL = "cbam_resnet18"
SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
CIFAR_STEM_UP_TO = 48  # pixels; timm's weights are for larger images
SCALED = ("milestones", "warmup")  # the lengths in a recipe that follow the run's
CPU_SIZE = 128  # the largest size chosen without a GPU; --size overrides it


def choose_model(
    name: str | None,
    recipe: Recipe,
    given: Mapping[str, Any] | None = None,
    trained: tuple[str | None, Mapping[str, Any]] = (None, {}),
) -> tuple[str, dict[str, Any]]:
    """The network's name and arguments: the recipe's where they apply to it, then `given`.

    Args:
        name: the requested network; None: the recipe's.
        recipe: the run's recipe.
        given: arguments of the network.
        trained: the network and arguments of the weights to start from, see `network_of`: used if
            neither `name` nor the recipe gives a network; if the network is this one, its arguments
            apply unless others are given.

    Raises:
        UsageError: there is no such network, it does not take an argument, or it has attention
            and the recipe inserts some.
    """
    chosen = name or recipe.model or trained[0] or DEFAULT_MODEL
    outline = _outline(chosen)  # an unknown name is an error before any image is read
    if recipe.graft != "none":
        refuse_attention(outline)
    arguments = dict(recipe.model_args)
    if name is not None and recipe.model is not None and name != recipe.model:
        if type(outline) is not type(_outline(recipe.model)):
            arguments = {}
        elif "cbam" in recipe.model and "cbam" not in name:
            arguments = {k: v for k, v in arguments.items() if k == "stem"}
    if chosen == trained[0]:
        arguments = {**trained[1], **arguments}
    arguments |= given or {}
    if "num_classes" in arguments:
        raise UsageError("num_classes: the data sets it; leave it out")
    if arguments:
        _outline(chosen, arguments)
    return chosen, arguments


def choose_preprocess(
    name: str,
    arguments: Mapping[str, Any],
    recipe: Recipe,
    table: ImageTable,
    start_channels: Callable[[int, int], int],
) -> tuple[Preprocess, dict[str, Any]]:
    """The preprocessing for the recipe, network and data, and the network's arguments.

    Args:
        name, arguments: the network.
        recipe: the run's recipe.
        table: the run's images.
        start_channels: called with the images' height and channels, returns the input channels of
            the weights to start from; 0: there are none, or it is not known.

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
    # gray images are repeated; color is dropped only on request
    wanted = max(seen.channels, start_channels(height, seen.channels))
    channels = recipe.channels or wanted
    mean, std = (0.5,) * channels, (0.25,) * channels
    if cfg is not None and len(cfg.mean) == channels:
        mean, std = tuple(cfg.mean), tuple(cfg.std)
    preprocess = Preprocess(
        input_size=(channels, height, width), mean=mean, std=std, resize=recipe.resize,
        crop_pct=recipe.crop_pct if recipe.resize == "crop" else 1.0,
        normalization="image" if recipe.normalization == "image" else "fixed",
        value_range=seen.value_range, resize_first=recipe.resize_first,
    )  # fmt: skip
    if seen.value_range is not None:
        low, high = seen.value_range
        log.info(
            f"pixel values from {low:.6g} to {high:.6g} become 0 to 1 in every image that does not "
            "store its own range"
        )
    return preprocess, arguments


def choose_stem(
    name: str, arguments: Mapping[str, Any], height: int, *, pretrained: bool, weights: str | None
) -> tuple[str, dict[str, Any]]:
    """The network and its arguments, with the CIFAR stem for small images.

    timm's ResNets have no such stem: if Regard has a plain twin of the network, the twin is used
    instead, so that it is compared with the attention networks on equal terms.

    Args:
        name, arguments: the requested network.
        height: of the images, in pixels.
        pretrained: whether it starts from weights that determine the stem: timm's, which have the
            ImageNet stem, or those of a folder with this network.
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
    """The name of Regard's plain network with the same layers as timm's network `name`, or None.

    >>> plain_twin("resnet18"), plain_twin("resnet18.a1_in1k"), plain_twin("attention56")
    ('plain_resnet18', 'plain_resnet18', None)
    """
    base = name.partition(".")[0]
    family = twins_of(base)
    # the networks in a family are Regard's, including attention56
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
    """Number of epochs: the recipe's, or chosen by the number of training images."""
    if recipe.epochs is not None:
        return recipe.epochs
    return min(60.0, max(3.0, 15 * math.sqrt(2000 / images)))


def choose_steps(recipe: Recipe, images: int, processes: int) -> int:
    """Number of optimizer steps: the recipe's, or those of its epochs."""
    if recipe.steps is not None:
        return recipe.steps
    return step_plan(recipe, images, processes).total(choose_epochs(recipe, images))


def fit_schedule(
    recipe: Recipe, base: Recipe, given: Container[str], images: int, processes: int
) -> Recipe:
    """As `scale_schedule`; what is scaled is logged."""
    fitted, words = scale_schedule(recipe, base, given, images, processes)
    if words:
        log.info(words)
    return fitted


def scale_schedule(
    recipe: Recipe, base: Recipe, given: Container[str], images: int, processes: int
) -> tuple[Recipe, str]:
    """The recipe with the milestones and warm-up of `base` scaled to its own length; in words.

    If a run is a tenth as long as the base recipe's, its learning rate falls at a tenth of the base
    recipe's milestones. Values that were given are not scaled.

    Args:
        recipe: with the changes.
        base: without them.
        given: names of the changed fields.
        images: number of training images, whether or not they can be read.
        processes: number of processes that train.

    Returns:
        The recipe, and what was scaled; "" if nothing was.

    Raises:
        UsageError: milestones or a warm-up that are not scaled do not end before the run.
    """
    # a base that leaves its length to the images is as long as the run
    sized = recipe if base.epochs is None and base.steps is None else base
    end = _length(recipe, recipe.schedule_unit, images, processes)
    whole = _length(sized, base.schedule_unit, images, processes)
    changes: dict[str, Any] = {}
    for name in SCALED:
        value = getattr(recipe, name)
        last = max(value, default=0.0) if isinstance(value, tuple) else value
        if name not in given and last < whole:
            changes[name] = _scaled(value, end / whole)
        elif last >= end:
            shown = _listed(value)
            raise UsageError(f"{name}={shown}: the run ends after {end:.6g} {recipe.schedule_unit}")
    changed = [n for n, value in changes.items() if value != getattr(recipe, n)]
    if not changed:
        return recipe, ""
    parts = [f"{n} {_listed(getattr(recipe, n))} -> {_listed(changes[n])}" for n in changed]
    words = (
        f"schedule scaled to {end:.6g} {recipe.schedule_unit} (the recipe: {whole:.6g} "
        f"{base.schedule_unit}): {'; '.join(parts)}"
    )
    return recipe.changed(**{n: changes[n] for n in changed}), words


def _scaled(value: Any, scale: float) -> Any:
    """A number, or each of several, times `scale`."""
    return tuple(v * scale for v in value) if isinstance(value, tuple) else value * scale


def _listed(value: Any) -> str:
    return ", ".join(f"{v:.6g}" for v in (value if isinstance(value, tuple) else (value,)))


def _length(recipe: Recipe, unit: str, images: int, processes: int) -> float:
    """The length of a run in epochs or steps."""
    if unit == "steps":
        return choose_steps(recipe, images, processes)
    if recipe.steps is not None:
        return recipe.steps / step_plan(recipe, images, processes).an_epoch
    return choose_epochs(recipe, images)


def check_batch(model: nn.Module, recipe: Recipe, images: int) -> None:
    """Refuses batches of one image for a network with batch norm: one image has no variance.

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
    """CLASS=WEIGHT,CLASS=WEIGHT as an array by class, 1 for classes that are not named.

    Raises:
        UsageError: a class is unknown or named twice, or a weight is not a number >= 0; the message
            starts with `name`.
    """
    weights = np.ones(len(classes))
    part, named = "", set[str]()
    for piece in text.split(","):
        part = f"{part},{piece}".strip(", ")
        label, equals, value = part.rpartition("=")
        if not equals or label not in classes:  # a comma in a class, or no such class
            continue
        if label in named:
            raise UsageError(f"{name}={text}: class {label!r} has two weights")
        named.add(label)
        try:
            weights[classes.index(label)] = number_of(value)
        except ValueError:
            raise UsageError(f"{name}: {part!r} has a weight that is not a number") from None
        part = ""
    if part:
        known = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
        raise UsageError(f"{name}: {part!r} is not CLASS=WEIGHT with one of {known}")
    if not (weights >= 0).all() or not np.isfinite(weights).all() or not weights.any():
        raise UsageError(f"{name}={text}: weights must be finite, at least 0, and not all 0")
    return weights


def image_weights(table: ImageTable, recipe: Recipe) -> NDArray[np.float64] | None:
    """Each image's sampling weight; None if all images are shuffled equally.

    Raises:
        UsageError: the recipe's weights can't be parsed, or exclude every image.
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
        # 0 for a class without images: label smoothing would weight it as the rarest
        weights = np.where(counts, len(table) / (len(counts) * np.maximum(counts, 1)), 0.0)
    else:
        weights = parse_weights(recipe.class_weights, table.classes, "class_weights")
    return torch.from_numpy(weights).float()


def noisy_labels(
    labels: NDArray[np.int64], classes: int, share: float, seed: int, stream: int = 1
) -> NDArray[np.int64]:
    """Labels with a fraction changed to another class, drawn uniformly (RAN, table 5).

    Args:
        labels: (N,) class indices.
        classes: number of classes.
        share: fraction of the labels.
        seed: the run's.
        stream: 1: random numbers that nothing else uses. 0: those that shuffle the fifth epoch,
            which then has all wrong labels first, for runs that were begun so.
    """
    if share == 0 or classes < 2:
        return labels
    own = np.random.SeedSequence(seed, spawn_key=(1,))
    rng = np.random.default_rng(own if stream else [seed, 4])
    changed = rng.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[changed] = (labels[changed] + rng.integers(1, classes, len(changed))) % classes
    return noisy


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision to train in: the requested one, or the best that the hardware has.

    "auto" is bf16 where the device multiplies in bf16, else fp16 on GPUs with fp16 tensor cores
    (V100, T4, RTX 20), else fp32.

    Raises:
        UsageError: the device can't compute in the requested precision.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError(f"precision=tf32: needs an NVIDIA GPU, this is {device.type}")
    if precision != "auto":
        return precision
    if has_bf16(device):
        return "bf16"
    return "fp16" if has_fp16(device) else "fp32"


def precision_note(precision: str, device: torch.device) -> str | None:
    """A note if a low precision is requested that the hardware only emulates, or None."""
    able = {"bf16": has_bf16, "fp16": has_fp16}
    if precision not in able or able[precision](device):
        return None
    what = "GPU" if device.type == "cuda" else "CPU" if device.type == "cpu" else device.type
    return f"note: this {what} emulates {precision}: fp32 may be faster"


def together(table: ImageTable) -> ImageTable:
    """The table with near-duplicates in one group, as keep_together splits it."""
    return grouped_by_content(table, Heartbeat("images compared"))


def choose_splits(
    table: ImageTable,
    recipe: Recipe,
    together: Callable[[ImageTable], ImageTable] = together,
) -> ImageTable:
    """The table with missing splits added, or with the recipe's fold as its test split.

    `recipe.limit` reduces the training images to that many; the other splits stay whole.

    Args:
        table: all images.
        recipe: the run's.
        together: groups near-duplicates, which looks at every image.

    Raises:
        UsageError: see `assign_splits` and `assign_folds`; or the limit is below the number of
            classes.
    """
    groups = table.groups
    if recipe.keep_together:
        table = together(table)
    if recipe.fold_of is None:
        table = assign_splits(table, val=recipe.val, test=recipe.test, seed=recipe.split_seed)
    else:
        fold, folds = recipe.fold_of
        table = assign_folds(table, fold=fold, folds=folds, val=recipe.val, seed=recipe.split_seed)
    table = replace(table, groups=groups)
    return table if recipe.limit is None else limit_training(table, recipe.limit, recipe.split_seed)
