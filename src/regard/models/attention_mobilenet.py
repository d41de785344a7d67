"""MobileNets with CBAM, with squeeze-and-excitation, and plain (CBAM's table 5).

MobileNetV1 (Howard et al. 2017, arXiv 1704.04861): a 3x3 stem and 13 depthwise separable
blocks. The authors' code has no such network; the places of the gates are inferred from the
counts that the paper prints. A gate follows every convolution's BN and ReLU: the stem's, the
13 depthwise and the 13 pointwise ones, 27 in all, with reduction 16 and biases in the MLP.
Counted at 224x224, next to the printed numbers:

                      parameters (M)         multiply-adds (G)
                   counted      paper        counted      paper
    MobileNet-1.0    4.232       4.23          0.569      0.569
      + SE           5.072       5.07          0.570      0.570
      + CBAM         5.075       5.07          0.576      0.576
    MobileNet-0.7    2.299       2.30          0.283      0.283
      + SE           2.7047      2.71          0.283      0.283
      + CBAM         2.707       2.71          0.289      0.289

Widths are int(0.7 * w). Rounding them to multiples of 8, as timm does, gives 2.317M parameters
for the plain MobileNet-0.7, which does not match. The MLP has C // 16 hidden channels, as in the
authors' code for ResNets; rounding to the nearest number would give 2.710M and 2.713M with SE and
CBAM, both of which would print as 2.71. Multiply-adds are those of convolutions and linear
layers.

Initialization: convolutions He normal fan-out, counted per group as in timm; the classifier He
normal fan-in; the gates by their own rules. Twins share it, see initialization.py.

Reading order: convolution, block, network, variants.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq
from torch import Tensor, nn

from regard.errors import UsageError
from regard.models._common import GATE_ARGUMENTS, IMAGENET_CFG
from regard.models._shipped import generate_default_cfgs, register_model
from regard.models._timm_verbs import StagedNetwork
from regard.models.cbam import CBAM, SE
from regard.models.initialization import initialize, initialized_by_name

# (channels, stride) of the blocks of each stage, at width 1
_STAGES = (
    ((64, 1),),
    ((128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)

Attention = Callable[..., nn.Module]


class GatedConv(nn.Module):
    """Convolution without bias -> BN -> ReLU -> gate.

    Shapes: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(
            in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.se: nn.Module = nn.Identity() if attention is None else attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.act(self.bn(self.conv(x))))


class SeparableBlock(nn.Module):
    """Depthwise 3x3 convolution with the stride, then a pointwise one; no shortcut.

    Shapes: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, attention: Attention | None
    ) -> None:
        super().__init__()
        self.depthwise = GatedConv(
            in_channels, in_channels, 3, stride=stride, groups=in_channels, attention=attention
        )
        self.pointwise = GatedConv(in_channels, channels, 1, attention=attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class AttentionMobileNet(StagedNetwork):
    """MobileNetV1 with gates, or plain, with timm's interface.

    Args:
        width: factor for every layer's channels, rounded down.
        attention: makes a gate from its channels; None for a plain network.

    Input: (B, in_chans, H, W), any height and width.

    Raises:
        UsageError: the width leaves a layer without channels.
    """

    @initialized_by_name
    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        *,
        width: float = 1.0,
        attention: Attention | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, [f"layer{n}" for n in range(1, 6)])
        if not 32 * width >= 1:
            raise UsageError(f"width={width}: give at least 1/32, so that the stem has a channel")
        channels = int(32 * width)
        self.stem = GatedConv(in_chans, channels, 3, stride=2, attention=attention)
        stages = []
        for n, stage in enumerate(_STAGES, start=1):
            blocks = []
            for wide, stride in stage:
                blocks.append(SeparableBlock(channels, int(wide * width), stride, attention))
                channels = int(wide * width)
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(
                {"num_chs": channels, "reduction": 2**n, "module": f"layer{n}"}
            )
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = stages
        self.num_features = channels
        self.global_pool: Any
        self.fc: nn.Module
        self.global_pool, self.fc = create_classifier(channels, num_classes, global_pool)
        self.head_hidden_size: int = channels * self.global_pool.feat_mult()
        self._place(device, dtype)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initializes every layer by its name; the module's docstring has the rules."""
        initialize(self, _init_layer)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as in timm's networks."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def _entry(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32), rounded up."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            stages = [self.layer1, self.layer2, self.layer3, self.layer4, self.layer5]
            return checkpoint_seq(stages, x, flatten=True)
        return self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or the pooled (B, num_features)."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_layer(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Conv2d):
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2 // layer.groups
        nn.init.normal_(layer.weight, 0.0, (2 / fan_out) ** 0.5, generator=generator)
    elif isinstance(layer, nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)


def width_of(name: str) -> float:
    """The width factor in a network's name: 0.7 for "se_mobilenet_070"."""
    return int(name[-3:]) / 100


def _create(
    name: str, attention: Callable[..., CBAM] | None, pretrained: bool, **kwargs: Any
) -> AttentionMobileNet:
    gates = {k: kwargs.pop(k) for k in GATE_ARGUMENTS if attention is not None and k in kwargs}
    if attention is not None and gates:
        attention = partial(attention, **gates)
    return build_model_with_cfg(
        AttentionMobileNet, name, pretrained, attention=attention,
        feature_cfg={"flatten_sequential": False}, **{"width": width_of(name), **kwargs},
    )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        f"{kind}_mobilenet_{width}": {**IMAGENET_CFG, "first_conv": "stem.conv"}
        for kind in ("cbam", "se", "plain")
        for width in ("100", "070")
    }
)


@register_model
def cbam_mobilenet_100(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNet:
    """MobileNet-1.0 + CBAM (table 5: 29.01 / 9.99 % error). 5.075M parameters, 0.576 GMACs."""
    return _create("cbam_mobilenet_100", CBAM, pretrained, **kwargs)


@register_model
def cbam_mobilenet_070(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNet:
    """MobileNet-0.7 + CBAM (table 5: 31.51 / 11.48 % error). 2.707M parameters, 0.289 GMACs."""
    return _create("cbam_mobilenet_070", CBAM, pretrained, **kwargs)


@register_model
def se_mobilenet_100(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNet:
    """MobileNet-1.0 + SE (table 5: 29.97 / 10.63 % error). 5.072M parameters, 0.570 GMACs."""
    return _create("se_mobilenet_100", SE, pretrained, **kwargs)


@register_model
def se_mobilenet_070(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNet:
    """MobileNet-0.7 + SE (table 5: 32.50 / 12.49 % error). 2.705M parameters, 0.283 GMACs."""
    return _create("se_mobilenet_070", SE, pretrained, **kwargs)


@register_model
def plain_mobilenet_100(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNet:
    """MobileNet-1.0, plain (table 5: 31.39 / 11.51 % error). 4.232M parameters, 0.569 GMACs."""
    return _create("plain_mobilenet_100", None, pretrained, **kwargs)


@register_model
def plain_mobilenet_070(pretrained: bool = False, **kwargs: Any) -> AttentionMobileNet:
    """MobileNet-0.7, plain (table 5: 34.86 / 13.69 % error). 2.299M parameters, 0.283 GMACs."""
    return _create("plain_mobilenet_070", None, pretrained, **kwargs)
