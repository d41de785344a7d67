"""A convolution that Inductor calls unchanged, for training compiled networks on CUDA.

Inductor plans with the memory layouts that it expects from cuDNN. For the gradient of a spatial
gate's convolution, from two channels to one, cuDNN returns others, and the step fails an assertion
(seen with torch 2.11 on an H200). A custom operator declares which layouts it returns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compiled_for_training(x: Tensor) -> bool:
    """Whether x belongs to a network that is compiled for training on CUDA."""
    return torch.compiler.is_compiling() and x.requires_grad and x.is_cuda


@torch.library.custom_op("regard::convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    """A convolution with stride 1, without groups, dilation and bias, like F.conv2d."""
    return F.conv2d(x, weight, padding=padding).contiguous()


@torch.library.custom_op("regard::convolution_backward", mutates_args=())
def _backward(gradient: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip
    return dx.contiguous(), dweight.contiguous()


@convolution.register_fake
def _(x: Tensor, weight: Tensor, padding: int) -> Tensor:
    height, width = (
        s + 2 * padding - k + 1 for s, k in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return x.new_empty(len(x), len(weight), height, width)


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx, gradient):
    return *_backward(gradient, *ctx.saved_tensors, ctx.padding), None


convolution.register_autograd(_gradients, setup_context=_keep)
