"""What has to be asked of oneDNN (torch on CPUs) in another way, as its answer is wrong."""

import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 16  # channels in a register: 16 with AVX-512, 8 with AVX2


class _SlicedConv2d(nn.Conv2d):
    """A convolution 1x1 with a stride: of the positions that are used, without a stride."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def without_strided_pointwise(model: nn.Module) -> nn.Module:
    """The network, whose strided 1x1 convolutions of few channels have no stride any more.

    In channels_last, the gradient of their weights is written past the end of a buffer if they
    have fewer channels than a register (github.com/uxlfoundation/oneDNN/issues/6035; seen with
    AVX2 and fewer than 8 in torch 2.14): the process ends, hangs, or goes on with wrong numbers.
    Names, weights and results stay the same.
    """
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.padding in ((0, 0), "valid")
            and module.in_channels // module.groups < BLOCK
        ):
            module.__class__ = _SlicedConv2d
    return model
