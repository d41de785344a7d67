"""The loss that is minimized, and the cross entropy of the prediction."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import UsageError


def multi_head_cross_entropy(
    outputs: Tensor, target: Tensor, weights: Sequence[float] | None = None, **kwargs: Any
) -> Tensor:
    """The weighted sum of each head's cross entropy (Schlemper et al. 2019, section 3.3).

    Args:
        outputs: (B, heads, classes) as a network returns in training, or (B, classes) for one
            head.
        target: (B,) class indices, or (B, classes) probabilities.
        weights: one per head (default: 1 each); a network's own are `model.head_weights`.
        kwargs: of torch.nn.functional.cross_entropy (label_smoothing, weight, reduction).

    Returns:
        The loss, a scalar, or (B,) with reduction="none".

    Raises:
        UsageError: there is not one weight per head.
    """
    heads = outputs.unsqueeze(1) if outputs.ndim == 2 else outputs
    weights = [1.0] * heads.shape[1] if weights is None else list(weights)
    if len(weights) != heads.shape[1]:
        raise UsageError(f"weights={tuple(weights)}: the network has {heads.shape[1]} heads")
    losses = [w * F.cross_entropy(heads[:, i], target, **kwargs) for i, w in enumerate(weights)]
    return torch.stack(losses).sum(dim=0)


def total_weight(target: Tensor, class_weights: Tensor | None) -> Tensor:
    """The sum of the images' class weights; for soft targets, weighted by class probability.

    Args:
        target: (B,) class indices, or (B, classes) probabilities.
        class_weights: (classes,), or None for 1 each.

    Returns:
        A float scalar; the sum of weighted losses divided by it is their mean.
    """
    if class_weights is None:
        return torch.full((), float(len(target)), device=target.device)
    weights = class_weights[target] if target.ndim == 1 else target @ class_weights
    return weights.sum()


def prediction_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The cross entropy of a prediction (B, classes), summed: no smoothing, no class weights."""
    return F.cross_entropy(logits, target, reduction="sum")


def joined_heads(model: nn.Module, outputs: Tensor) -> Tensor:
    """The prediction's logits, (B, classes), from a network's output in training.

    Several heads are joined by the network's `join_heads`; if it has none, by averaging their
    softmaxes.
    """
    if outputs.ndim == 2:
        return outputs
    if hasattr(model, "join_heads"):
        return model.join_heads(outputs)  # type: ignore[operator]
    return outputs.log_softmax(dim=2).logsumexp(dim=1) - math.log(outputs.shape[1])
