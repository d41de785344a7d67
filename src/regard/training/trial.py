"""Training steps that leave no trace, to measure what a run will need."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from regard.data.loading import Batch
from regard.machine import seed_device, synchronize
from regard.training.loop import Trainer
from regard.training.optim import set_rate


@contextlib.contextmanager
def trial(trainer: Trainer, **changes: Any) -> Iterator[Trainer]:
    """A trainer of the same network for trial steps; `changes` are its attributes.

    Weights, buffers, gradients and random states are restored afterwards. The network itself is
    trained, not a copy, so that its compiled code remains usable. The labels are the targets, as
    self-adaptive targets would take their memory a second time.
    """
    model, device, mode = trainer.model, trainer.accelerator.device, trainer.model.training
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().to("cpu", copy=True) for t in tensors]  # a device may have no room
    kind = "cuda" if device.type == "cpu" else device.type  # for a CPU, fork_rng forks nothing else
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=kind):
        try:
            model.train()
            recipe = changes.pop("recipe", trainer.recipe).changed(self_adaptive=0.0)
            yield dataclasses.replace(trainer, recipe=recipe, history=[], unreadable=[], **changes)
        finally:
            model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)
            model.train(mode)


def trial_step(trainer: Trainer, batches: Sequence[Batch], forward: Any = None) -> None:
    """One step with learning rate 0 on a step's batches; waits until it is done.

    Nothing is exchanged between processes. `forward` is the network, or its compiled form.
    """
    trainer._forward = trainer.model if forward is None else forward
    set_rate(trainer.optimizer, 0.0)
    trainer.gradients(iter(batches), len(batches))
    trainer.update()
    synchronize(trainer.accelerator.device)


def loss_and_gradient(
    trainer: Trainer, batches: Sequence[Batch], forward: Any
) -> tuple[float, float]:
    """A step's loss, and the norm of its gradients; nothing is exchanged between processes."""
    trainer._forward = forward
    trainer.model.zero_grad(set_to_none=True)
    seed_device(trainer.accelerator.device, 0)  # the same dropout in each call
    loss = trainer.gradients(iter(batches), len(batches))
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = float(nn.utils.get_total_norm(gradients))
    trainer.model.zero_grad(set_to_none=True)
    return float(loss), norm


def first_batches(trainer: Trainer) -> list[Batch]:
    """The decoded batches of this process's next step, so that decoding is not timed."""
    spans = trainer.spans(trainer.step)[: trainer.steps.parts(trainer.step)]
    batches = trainer.source.batches(spans)
    return [b if isinstance(b, Batch) else b.decoded(trainer.device) for b in batches]
