"""CUDA graphs: a network's forward and backward pass, recorded once and replayed in each step.

A step of a network with hundreds of small kernels takes a GPU's host longer to ask for than the
GPU to do; a recording is asked for by one call. Nothing is compiled: the kernels are those of
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
"""Held while a graph is recorded, and by the thread that copies images while it asks for that: a
recording and what other threads ask of the device keep out of each other's way."""


class Graphed:
    """A network in training mode whose passes are replayed; called as the network is.

    Each call overwrites the outputs of the one before, and each backward pass the gradients: they
    are used up, and the gradients set to None, before the next.

    Args:
        model: the network, in training mode, on a CUDA device; its parameters and buffers may be
            written to afterwards, but not replaced.
        images: (B, C, H, W), as a step has them. Batches of other shapes are not replayed.
        autocast: makes the context of the forward pass, without a cache of weights.

    Raises:
        RuntimeError: a pass can't be recorded, as it waits for the device or copies from it.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        # the recording keeps the nodes that add up gradients, which are of its own stream; autograd
        # waits for that one, and would warn of it
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self.model: nn.Module = model
        self.shape: torch.Size = images.shape
        whole, images = _Whole(model, autocast), images.detach().clone()
        with fastest_kernels():
            _passes(whole, images)  # the first makes what is made once
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
    """The network and the context of its forward pass; `forward` of this module is replaced."""

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
    """Both passes, whose gradients are dropped."""
    parameters = [p for p in whole.parameters() if p.requires_grad]
    torch.autograd.grad(whole(images).float().sum(), parameters, allow_unused=True)


@contextlib.contextmanager
def _waits_refused() -> Iterator[None]:
    """Within, what waits for the device is an error of Python's.

    In a recording it is one of CUDA's, after which torch before 2.13 gives no memory back that
    another stream has used: a run that went on without would keep each of its batches.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch tells that not every wait is found
        warnings.filterwarnings(
            "ignore", message="Synchronization debug mode", category=UserWarning
        )
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
