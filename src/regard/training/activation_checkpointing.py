"""Gradient checkpointing: activations are computed again in the backward pass, not kept."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from regard.errors import UsageError


def set_checkpointing(model: nn.Module, name: str) -> None:
    """Turns it on.

    Raises:
        UsageError: the network has none.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, TypeError, NotImplementedError):  # timm: assert not
        raise UsageError(
            f"--grad-checkpointing: {name} has none; leave it out, or try --fit-memory"
        ) from None


@contextlib.contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """BN's running statistics stay as they are, however often it goes forward.

    torch.utils.checkpoint runs a layer forward again in the backward pass, in which BN would
    count the same batch a second time. The momentum 0 changes nothing else of what is computed
    and saved, which the recomputation must have the same.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    kept = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    try:
        for m in norms:
            m.momentum, m.num_batches_tracked = 0.0, None
        yield
    finally:
        for m, momentum, counted in kept:
            m.momentum, m.num_batches_tracked = momentum, counted
