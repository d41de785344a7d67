"""CBAM: Convolutional Block Attention Module (Woo et al., ECCV 2018, arXiv 1807.06521).

The module alone: attention_resnet.py and attention_mobilenet.py have the paper's networks,
and graft.py inserts it into any other. Checked against the authors' code
(github.com/Jongchan/attention-module, MIT license).

Where the authors' code and the paper's formulas differ, this follows the code: the MLP has
biases, a BN (eps 1e-5, momentum 0.01) follows the 7x7 convolution, which has no bias, and
the maps are concatenated [max, mean].

Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507), the paper's baseline, is the
channel gate alone with average pooling: `SE` below.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import UsageError
from regard.models._common import choose, largest_over_channels, largest_over_positions
from regard.models._inductor import compiled_for_training, convolution
from regard.models.initialization import pytorch_default

CHANNEL_POOLS = ("both", "avg", "max")
SPATIAL_POOLS = ("avg_max", "conv")
ORDERS = ("channel_spatial", "spatial_channel", "parallel", "channel", "spatial")


class ChannelGate(nn.Module):
    """Channel attention: sigmoid(MLP(avg-pool(x)) + MLP(max-pool(x))), equation 2.

    One shared MLP C -> C / reduction -> C with biases and ReLU; pool "avg" or "max" is the
    ablation with only one of the two.

    Shapes: (B, C, H, W) -> (B, C, 1, 1), between 0 and 1.
    """

    attention_kind = "channel"

    def __init__(self, channels: int, *, reduction: int = 16, pool: str = "both") -> None:
        super().__init__()
        if reduction < 1:
            raise UsageError(f"reduction={reduction}: give a whole number, at least 1")
        self.pool: str = choose("channel_pool", pool, CHANNEL_POOLS)
        hidden = max(1, channels // reduction)
        self.mlp: nn.Sequential = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )

    @torch.jit.ignore
    def init_gate(self, generator: torch.Generator | None = None) -> None:
        """The authors' initialization: PyTorch's default weights, biases 0."""
        for layer in (self.mlp[0], self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            pytorch_default(layer, generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "avg":
            gate = self.mlp(x.mean(dim=(2, 3)))
        elif self.pool == "max":
            gate = self.mlp(largest_over_positions(x).flatten(1))
        else:
            gate = self.mlp(x.mean(dim=(2, 3))) + self.mlp(largest_over_positions(x).flatten(1))
        return torch.sigmoid(gate)[:, :, None, None]


class SpatialGate(nn.Module):
    """Spatial attention: sigmoid(BN(conv([max over channels; mean over channels]))), equation 3.

    pool="conv" is the ablation with a learned 1x1 convolution in place of max and mean.

    Shapes: (B, C, H, W) -> (B, 1, H, W), between 0 and 1.
    """

    attention_kind = "spatial"

    def __init__(self, channels: int, *, kernel_size: int = 7, pool: str = "avg_max") -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UsageError(
                f"kernel_size={kernel_size}: choose 7 or 3 (as in the paper), or another odd number"
            )
        learned = choose("spatial_pool", pool, SPATIAL_POOLS) == "conv"
        self.pool: nn.Conv2d | None = nn.Conv2d(channels, 1, 1, bias=False) if learned else None
        self.conv: nn.Conv2d = nn.Conv2d(
            1 if learned else 2, 1, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.bn: nn.BatchNorm2d = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    @torch.jit.ignore
    def init_gate(self, generator: torch.Generator | None = None) -> None:
        """The authors' initialization: convolutions He normal fan-out, the BN's weight 0.

        The gate starts at 1/2.
        """
        for conv in (self.pool, self.conv):
            if conv is not None:
                nn.init.kaiming_normal_(
                    conv.weight, mode="fan_out", nonlinearity="relu", generator=generator
                )
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            pooled = self.pool(x)  # (B, C, H, W) -> (B, 1, H, W)
        else:  # (B, C, H, W) -> (B, 2, H, W)
            pooled = torch.cat([largest_over_channels(x), x.mean(dim=1, keepdim=True)], dim=1)
        return torch.sigmoid(self.bn(self._convolve(pooled)))

    def _convolve(self, pooled: Tensor) -> Tensor:
        """self.conv; if compiled for training, an operator that Inductor calls unchanged."""
        if not torch.jit.is_scripting() and compiled_for_training(pooled):
            weight = self.conv.weight.to(pooled.dtype)
            return convolution(pooled, weight, self.conv.kernel_size[0] // 2)
        convolved: Tensor = self.conv(pooled)
        return convolved


class CBAM(nn.Module):
    """Convolutional block attention module for a map with `channels` channels, in any network.

        channel_spatial  x' = x * channel(x);  x' * spatial(x')      (the paper's choice)
        spatial_channel  x' = x * spatial(x);  x' * channel(x')
        parallel         x * channel(x) * spatial(x)
        channel          x * channel(x)
        spatial          x * spatial(x)

    Args:
        channels: C of the map.
        reduction: reduction of the channel gate's MLP (16 in the paper).
        channel_pool: "both", "avg" or "max" (table 1).
        spatial_pool: "avg_max", or "conv" for a learned 1x1 convolution (table 2).
        kernel_size: kernel size of the spatial gate's convolution, 7 or 3 (table 2).
        order: one of the five above (table 3).

    Shapes: (B, C, H, W) -> the same.

    Compiled, x is read three times and written once: one pass computes mean and max over
    positions; one applies the channel gate and computes mean and max over channels; one applies
    both gates, and in a ResNet's block also the addition of the shortcut and the ReLU. In eager
    mode there are six reads and two writes, before that addition and ReLU.

    Raises:
        UsageError: an argument is not among its choices.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        channel_pool: str = "both",
        spatial_pool: str = "avg_max",
        kernel_size: int = 7,
        order: str = "channel_spatial",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        choose("order", order, ORDERS)
        self.spatial_first: bool = order == "spatial_channel"
        self.parallel: bool = order == "parallel"
        self.channel: ChannelGate | None = None
        self.spatial: SpatialGate | None = None
        if order != "spatial":
            self.channel = ChannelGate(channels, reduction=reduction, pool=channel_pool)
        if order != "channel":
            self.spatial = SpatialGate(channels, kernel_size=kernel_size, pool=spatial_pool)
        for gate in (self.channel, self.spatial):
            if gate is not None:
                gate.init_gate()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        if self.spatial is not None and self.spatial_first:
            x = x * self.spatial(x)
        if self.channel is not None:
            x = x * self.channel(x)
        if self.spatial is not None and not self.spatial_first:
            x = x * self.spatial(seen if self.parallel else x)
        return x


SE = partial(CBAM, order="channel", channel_pool="avg")
"""Squeeze-and-excitation with the paper's reduction 16: the channel gate with average pooling."""


@torch.no_grad()
def start_neutral(attention: CBAM, norm: nn.Module) -> None:
    """Makes fresh gates after an affine norm return exactly, to the bit, what the norm alone does.

    Each gate starts at exactly 1/2: the MLP's last layer is zero, and so are weight and bias of
    the spatial gate's BN. A factor of 2 per gate goes into weight and bias of the norm; powers of
    two are exact in floating point.
    """
    factor = 2.0 ** start_at_half(attention)
    assert isinstance(norm.weight, Tensor)
    assert isinstance(norm.bias, Tensor)
    norm.weight.mul_(factor)
    norm.bias.mul_(factor)


def start_at_half(attention: CBAM) -> int:
    """Makes every gate output exactly 1/2 everywhere, and returns the number of gates."""
    gates = 0
    if attention.channel is not None:
        last = attention.channel.mlp[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        gates += 1
    if attention.spatial is not None:
        nn.init.zeros_(attention.spatial.bn.weight)
        nn.init.zeros_(attention.spatial.bn.bias)
        gates += 1
    return gates
