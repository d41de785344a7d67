"""Activation checkpointing: activations are recomputed in the backward pass, not stored."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from regard.errors import UsageError


def set_checkpointing(model: nn.Module, name: str) -> None:
    """Turns activation checkpointing on.

    Raises:
        UsageError: the network does not support it.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError, NotImplementedError):  # timm: assert not
        raise UsageError(
            f"grad_checkpointing: {name} does not support it; leave it out, or try fit_memory"
        ) from None


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Freezes BN's running statistics.

    torch.utils.checkpoint runs a layer's forward pass again during the backward pass, so BN would
    count the same batch twice. Setting its momentum to 0 changes nothing else that is computed or
    saved, and the recomputation must reproduce exactly that.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    saved = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    try:
        for m in norms:
            m.momentum, m.num_batches_tracked = 0.0, None
        yield
    finally:
        for m, momentum, counted in saved:
            m.momentum, m.num_batches_tracked = momentum, counted
