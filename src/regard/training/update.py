"""From a loss to the next weights: precision, gradient scaling, clipping, optimizer, average."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from regard.machine import allow_tf32
from regard.training.config import Recipe
from regard.training.optim import make_optimizer

NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Updater:
    """A network's optimizer with gradient scaling, clipping and weight averaging.

    Args:
        model: the network, on its device.
        recipe: its optimizer, clip_grad and ema_decay.
        device: the network's.
        precision: fp32, tf32, bf16 or fp16. The last two run the forward pass under autocast;
            with fp16, whose smallest number is 6e-8, the loss is scaled, and a step whose
            gradients overflow is skipped.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, device: torch.device, precision: str = "fp32"
    ) -> None:
        self.model: nn.Module = model
        self.device: torch.device = device
        self.precision: str = precision
        self.clip: float = recipe.clip_grad
        if device.type == "cuda":
            allow_tf32(precision == "tf32")
        self.optimizer: torch.optim.Optimizer = make_optimizer(model, recipe)
        self.scaler: torch.amp.GradScaler | None = (
            torch.amp.GradScaler(device.type) if precision == "fp16" else None
        )
        self.ema: ModelEmaV3 | None = (
            ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        )
        # looked up once: finding some 400 tensors by name takes 3 ms
        pairs = [] if self.ema is None else _pairs(self.ema.module, model)
        self._averaged = [(a, b) for a, b in pairs if a.is_floating_point()]
        self._copied = [(a, b) for a, b in pairs if not a.is_floating_point()]

    def autocast(self, cache: bool | None = None) -> AbstractContextManager[Any]:
        """For the forward pass; `cache`: of weights cast by autocast (None: autocast's)."""
        dtype = NARROW.get(self.precision)
        return torch.autocast(
            self.device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=cache
        )

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradients of a loss, scaled for fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, step: int | None = None) -> None:
        """Updates the weights, and their average, from the gradients, and clears those.

        The average spans 1 / (1 - decay) steps, but at most about a ninth of the steps so far, as
        in TensorFlow's ExponentialMovingAverage: in a shorter run it would otherwise consist of
        the weights of the start.

        Args:
            step: the step's number, from 0; None: late in a run.
        """
        if self.clip:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            soon = 1.0 if step is None else (1 + step) / (10 + step)
            self._average(1 - min(self.ema.decay, soon))

    @torch.no_grad()
    def _average(self, weight: float) -> None:
        if self._averaged:
            ours, theirs = map(list, zip(*self._averaged, strict=True))
            torch._foreach_lerp_(ours, theirs, weight=weight)
        if self._copied:
            ours, theirs = map(list, zip(*self._copied, strict=True))
            torch._foreach_copy_(ours, theirs)


def _pairs(one: nn.Module, other: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The matching tensors of two networks' state dicts."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return [(a, b) for a, b in pairs]
