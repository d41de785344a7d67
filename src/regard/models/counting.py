"""The size of a network: parameters and multiply-adds."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """The number of all parameters, trained or not."""
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of convolutions and matrix products for one image: half of torch's FLOPs.

    Args:
        model: a network; its mode (training or evaluation) is restored afterwards.
        input_size: (C, H, W).
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    model.eval()
    try:
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(image)
    finally:
        model.train(training)
    return flops.get_total_flops() // 2
