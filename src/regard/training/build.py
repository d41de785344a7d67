"""The parts of a run: its network, its loaders and its trainer."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from regard.attention import evaluating
from regard.data.device_decoding import DecodingLoader
from regard.data.loading import InMemoryLoader, SampleOrder, StreamingLoader
from regard.data.table import ImageTable
from regard.data.workers import default_workers
from regard.errors import UsageError
from regard.machine import in_channels_last, keep_freed_memory
from regard.models._onednn import without_strided_pointwise
from regard.models.create import make_model
from regard.models.fused import can_fuse, set_fused
from regard.training.activation_checkpointing import set_checkpointing
from regard.training.distributed import gathered
from regard.training.loop import Trainer
from regard.training.plan import (
    choose_precision,
    choose_steps,
    image_weights,
    loss_weights,
    noisy_labels,
)
from regard.training.run_plan import Plan
from regard.training.splits import LoadedSplit

log: logging.Logger = logging.getLogger(__name__)


def build_model(plan: Plan, device: torch.device, *, start: bool) -> nn.Module:
    """The plan's network on the device, its weights in channels_last.

    Args:
        plan: the run's plan.
        device: where it trains.
        start: whether to load the weights that the run starts from; a run that resumes from a
            saved state doesn't need them.

    Raises:
        UsageError: the network can't be made or grafted, or the weights don't fit.
        FileError: pretrained weights can't be loaded.
    """
    model = make_model(
        plan.model, plan.model_args, len(plan.classes), plan.preprocess.input_size,
        plan.pretrained and start, plan.weights if start else None, plan.classes,
        plan.recipe.graft,
    )  # fmt: skip
    if plan.recipe.grad_checkpointing:
        set_checkpointing(model, plan.model)
    if device.type == "cpu":
        keep_freed_memory()
        without_strided_pointwise(model)
    return in_channels_last(model.to(device))


def build_loader(
    plan: Plan, split: str, part: LoadedSplit, device: torch.device
) -> InMemoryLoader | StreamingLoader:
    """The loader of a split: training in sample order, the others in the table's order.

    Training images that are tested, as there are no others, are read again: as in prediction,
    without random crops.
    """
    recipe, order = plan.recipe, None
    if split == "train":
        weights = image_weights(_weighted(plan, part.table), recipe)
        order = SampleOrder(len(part.table), recipe.seed, weights)
    workers = default_workers() if recipe.workers is None else recipe.workers
    if split != "train" and part.reader.augmentation is not None:
        reader = dataclasses.replace(part.reader, augmentation=None)
        return StreamingLoader(reader, None, recipe.seed, workers)
    if part.images is not None:
        threads = 0 if device.type == "cpu" else workers  # on a CPU, training uses every core
        return InMemoryLoader(part.reader, order, recipe.seed, part.images, part.missing, threads)
    if split == "train" and recipe.decode == "device":
        return DecodingLoader(part.reader, order, recipe.seed, workers)
    return StreamingLoader(part.reader, order, recipe.seed, workers)


def build_trainer(
    plan: Plan, model: nn.Module, part: LoadedSplit, accelerator: Accelerator
) -> Trainer:
    """The trainer of the plan's network on the training split."""
    recipe, table, device = plan.recipe, part.table, accelerator.device
    if recipe.sync_bn and accelerator.num_processes > 1:
        model = with_synchronized_norms(model, device)
    fuse(model, recipe.fuse, device, plan.model)
    weights = loss_weights(_weighted(plan, table), recipe)
    return Trainer(
        model=model,
        recipe=recipe,
        preprocess=plan.preprocess,
        source=build_loader(plan, "train", part, device),
        labels=torch.from_numpy(_learned(plan, table).labels),
        classes=len(plan.classes),
        count=len(table),
        total=choose_steps(recipe, len(table), plan.processes),
        accelerator=accelerator,
        class_weights=None if weights is None else weights.to(device),
        precision=_precision(plan, model, accelerator),
        planned=recipe.accumulate * plan.processes if plan.rules else 0,
    )


def _learned(plan: Plan, table: ImageTable) -> ImageTable:
    """The training images with the labels that are learned, some of which the recipe changes."""
    recipe = plan.recipe
    noisy = noisy_labels(
        table.labels, len(plan.classes), recipe.label_noise, recipe.seed, plan.rules
    )
    return dataclasses.replace(table, labels=noisy)


def _weighted(plan: Plan, table: ImageTable) -> ImageTable:
    """The training images with the labels whose classes are weighted and balanced."""
    return _learned(plan, table) if plan.rules > 1 else table


def _precision(plan: Plan, model: nn.Module, accelerator: Accelerator) -> str:
    """The precision to train in; fp32 where bf16 gives wrong gradients on this device.

    All processes train in the same one: gradients that only some of them scale can't be averaged.

    Raises:
        UsageError: the recipe asks for bf16 there, or for a precision that the device lacks.
    """
    several = set(gathered(accelerator, _own_precision(plan, model, accelerator.device)))
    if len(several) == 1:
        return several.pop()
    log.info(f"note: precision is fp32, as the run's devices differ ({', '.join(sorted(several))})")
    return "fp32"


def _own_precision(plan: Plan, model: nn.Module, device: torch.device) -> str:
    """The precision that this process would train in alone; raises as `_precision` does."""
    asked, size = plan.recipe.precision, plan.preprocess.input_size
    precision = choose_precision(asked, device)
    if precision != "bf16" or device.type != "cpu" or not (name := jumped_over(model, size)):
        return precision
    why = f"{name} has a stride wider than its input, and torch's bf16 gradient of it is wrong"
    if asked == "bf16":
        raise UsageError(f"precision=bf16: {why} on CPUs; choose fp32, or a larger size")
    log.info(f"note: precision is fp32 instead of bf16: {why} on CPUs")
    return "fp32"


def jumped_over(model: nn.Module, input_size: Sequence[int]) -> str | None:
    """A convolution whose stride exceeds its input's width, for images of (C, H, W), or None.

    In bf16 on CPUs (seen in torch 2.14, oneDNN) the gradient of its weights is partly uninitialized
    memory.
    """
    names = {m: name for name, m in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[-1] < module.stride[-1]:  # type: ignore[index]
            found.append(names[module])

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, nn.Conv2d)]
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def fuse(model: nn.Module, choice: str, device: torch.device, name: str) -> None:
    """Fuses the ends of a network's CBAM blocks, see `regard.models.fused`.

    Args:
        model: a run's network.
        choice: auto, yes or no; auto fuses where it was measured: on CPUs and NVIDIA GPUs.
        device: where it trains.
        name: the network's name.

    Raises:
        UsageError: the choice is "yes", and no block can be fused, or not on this device.
    """
    if choice == "no" or (choice == "auto" and not can_fuse(device)):
        return
    if choice == "yes" and not can_fuse(device):
        raise UsageError(f"fuse=yes: not available on {device.type} (on CUDA it needs triton)")
    if not set_fused(model) and choice == "yes":
        raise UsageError(f"fuse=yes: {name} has no ResNet block with CBAM in the paper's order")


def settle_norms(model: nn.Module, batches: int) -> None:
    """Lets the running statistics of batch norms settle within a short run.

    A batch norm of momentum m averages over some 1/m batches, from a mean of 0 and a variance of 1
    on. The one in CBAM's spatial gates has the authors' 0.01: after 60 batches more than half of
    its statistics would still be those of the start, and the network would attend to other places
    in evaluation than in training. The average spans at most a tenth of the run, but never less
    than it does with torch's own momentum of 0.1; from 1,000 batches on, 0.01 stays as it is.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum:
            module.momentum = max(module.momentum, min(0.1, 10 / batches))


def with_synchronized_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with its batch norms synchronized over all processes.

    Raises:
        UsageError: on CPUs, where torch has no synchronized batch norm.
    """
    if device.type == "cpu":
        raise UsageError(
            "sync_bn: torch synchronizes batch norm on GPUs only; leave it out, or raise batch_size"
        )
    synchronized: nn.Module = convert_sync_batchnorm(model)
    return in_channels_last(synchronized)
