"""CUDA graphs: a network's forward and backward pass, captured once and replayed in each step.

For a network with hundreds of small kernels, launching a step takes the CPU longer than running
it takes the GPU; a graph is launched by one call. Nothing is compiled: the kernels are those of
the eager network, and so are the numbers.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from regard.machine import fastest_kernels
from regard.models.fused import fused_at_every_size

ALONE = threading.Lock()
"""Held during capture, and by the thread that copies images while it queues them, so that the
capture and other threads' work on the device do not overlap."""


class Graphed:
    """A network in training mode whose passes are replayed; called like the network itself.

    Each call overwrites the previous outputs, and each backward pass the gradients: use the
    gradients and set them to None before the next.

    Args:
        model: the network, in training mode, on a CUDA device; its parameters and buffers may be
            modified in place afterwards, but not replaced.
        images: (B, C, H, W), as in a step. Batches of other shapes run eagerly.
        autocast: makes the context of the forward pass, without autocast's weight cache.

    Raises:
        RuntimeError: a pass can't be captured, as it waits for the device or copies from it.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        # the graph holds gradient accumulation nodes that belong to its own stream; autograd
        # synchronizes with that one, and would warn of it
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self.model: nn.Module = model
        self.shape: torch.Size = images.shape
        whole, images = _Whole(model, autocast), images.detach().clone()
        with fastest_kernels():
            _passes(whole, images)  # warm-up: the first pass allocates what is needed once
            with _waits_refused():
                _passes(whole, images)
            with ALONE:
                self._replayed: Any = torch.cuda.make_graphed_callables(
                    whole, (images,), allow_unused_input=True
                )

    def __call__(self, images: Tensor) -> Tensor:
        forward = self._replayed if images.shape == self.shape else self.model
        outputs: Tensor = forward(images)
        return outputs


class _Whole(nn.Module):
    """The network with the context of its forward pass; this module's `forward` is replaced."""

    def __init__(
        self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast(), fused_at_every_size():
            outputs: Tensor = self.model(images)
        return outputs


def _passes(whole: nn.Module, images: Tensor) -> None:
    """Both passes; the gradients are dropped."""
    parameters = [p for p in whole.parameters() if p.requires_grad]
    torch.autograd.grad(whole(images).float().sum(), parameters, allow_unused=True)


@contextlib.contextmanager
def _waits_refused() -> Iterator[None]:
    """Within it, an operation that waits for the device raises a Python error.

    During capture it would be a CUDA error, after which torch before 2.13 frees no memory that
    another stream has used: a run that went on without graphs would leak each of its batches.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch warns that not every wait is detected
        warnings.filterwarnings(
            "ignore", message="Synchronization debug mode", category=UserWarning
        )
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
