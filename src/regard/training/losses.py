"""Losses of networks with several heads."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import UsageError


def multi_head_cross_entropy(
    outputs: Tensor, target: Tensor, weights: Sequence[float] | None = None, **kwargs: Any
) -> Tensor:
    """The weighted sum of each head's cross-entropy (Schlemper et al. 2019, section 3.3).

    Args:
        outputs: (B, heads, classes) as a network gives in training, or (B, classes), which
            is one head.
        target: (B,) class indices, or (B, classes) probabilities.
        weights: one a head, 1 each by default; a network's own are `model.head_weights`.
        kwargs: of torch.nn.functional.cross_entropy (label_smoothing, weight, reduction).

    Returns:
        The loss, a scalar, or (B,) with reduction="none".

    Raises:
        UsageError: the weights are not as many as the heads.
    """
    heads = outputs.unsqueeze(1) if outputs.ndim == 2 else outputs
    weights = [1.0] * heads.shape[1] if weights is None else list(weights)
    if len(weights) != heads.shape[1]:
        raise UsageError(f"weights={tuple(weights)}: the network has {heads.shape[1]} heads")
    losses = [w * F.cross_entropy(heads[:, i], target, **kwargs) for i, w in enumerate(weights)]
    return torch.stack(losses).sum(dim=0)
