"""What the three families share: checked choices and timm's default configurations."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from regard.errors import UsageError


def choose(argument: str, value: str, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        UsageError: it is not; the message names the argument, the value and the choices.
    """
    if value not in choices:
        named = ", ".join(choice or "''" for choice in choices)
        raise UsageError(f"{argument}={value!r}: choose one of {named}")
    return value


M = TypeVar("M", bound=nn.Module)


def fitted(model: nn.Module, head: M) -> M:
    """A new head on the device of the model's other layers, with their dtype and mode."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is not None:
        head = head.to(device=like.device, dtype=like.dtype)
    return head.train(model.training)


def largest_over_channels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W): amax, whose gradient is divided among equal maxima.

    Compiled for training, only the first of equal maxima gets the gradient, by its index. The
    gradient of amax looks for values equal to the maximum; in half precision, Inductor compares
    rounded values with unrounded ones, finds none, and divides by their number.
    """
    if torch.compiler.is_compiling() and x.requires_grad:
        return x.max(dim=1, keepdim=True)[0]
    return x.amax(dim=1, keepdim=True)


def largest_over_positions(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1), like `largest_over_channels`."""
    if torch.compiler.is_compiling() and x.requires_grad:
        return x.flatten(2).max(dim=2)[0][:, :, None, None]
    return x.amax(dim=(2, 3), keepdim=True)


GATE_ARGUMENTS = ("reduction", "channel_pool", "spatial_pool", "kernel_size", "order")
"""CBAM's own arguments, which every network with its gates takes."""

FREE_ARGUMENTS = ("num_classes", "in_chans", "global_pool")
"""Arguments in which a network may differ from its weights: timm fits these to it."""


def as_json(value: Any) -> Any:
    """An argument as it is in config.json, with lists for tuples, for comparison with one there."""
    return [as_json(each) for each in value] if isinstance(value, tuple | list) else value


IMAGENET_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
}


# Mean and deviation of CIFAR-10's training images.
CIFAR_CFG: dict[str, Any] = {
    **IMAGENET_CFG,
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
