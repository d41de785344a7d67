"""Residual Attention Network (Wang et al., CVPR 2017, arXiv 1704.06904).

The ImageNet networks are the authors' own definitions, layer for layer
(github.com/fwang91/residual-attention-network, Caffe; BSD license); the arithmetic is
checked against them. Where the paper's figure and the definitions differ, the definitions
are followed: the skip path of a mask is one residual unit (a single identity), the trunk is
not added to the mask, max-pools have no padding and round up, and interpolation aligns
corners.

The authors published no definition of the CIFAR networks. Section 4.1 gives three stages of m
modules each, two residual units added at each stage, and a depth of 36m + 20. Here that is
conv 3x3 to 16 channels, then stages of 64 / 128 / 256 channels at 32 / 16 / 8 pixels, each
with one projecting unit, m modules and one more unit, then BN-ReLU, average pooling and the
classifier:

    depth = 1 (stem) + 3 stages * 3 layers * (2 units + 4m units of trunks) + 1 (classifier)
          = 36m + 20 for p, t, r = 1, 2, 1

The masks pool 2 / 1 / 0 times, down to the 8x8 pixels of the last stage, whose mask is the
paper's local form: three units without sampling, whatever r is. Parameters (M) with 100
classes, counted here and printed in the paper:

    Attention-    56     92    236    452
    counted    1.057  1.871  5.128  7.999
    paper               1.9    5.1    8.6

With 10 classes, the classifier has 257 * 90 = 23,130 fewer. Attention-452 has m = 6 and
p, t, r = 2, 4, 3. There are interpretations that give 8.6M, but each needs a detail that
the paper does not state, such as a third mask of two units under masks that pool 3 and 2
times (8.515M).

Reading order: residual units, mask, attention module, network; then the variants, in
residual_attention_variants.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import (
    checkpoint_seq,
    register_notrace_function,
)
from torch import Tensor, nn

from regard.errors import UsageError
from regard.models._common import choose
from regard.models._timm_verbs import StagedNetwork
from regard.models.initialization import initialize, initialized_by_name

RESIDUALS = ("residual", "naive", "none")
ACTIVATIONS = ("mixed", "channel", "spatial")
MASKS = ("encoder_decoder", "local")


class PreActUnit(nn.Module):
    """Pre-activation bottleneck: x + conv1x1(a(conv3x3(a(conv1x1(a(x)))))), a = BN then ReLU.

    The 3x3 convolution has the stride. If the shape changes, the shortcut is a 1x1 convolution of
    the activated input a(x); otherwise it is x itself.

    The first unit of a stage always has this convolution, `project=True`.

    Shapes: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    shortcut_is_activated: torch.jit.Final[bool]

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, project: bool = False
    ) -> None:
        super().__init__()
        width = channels // 4
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.shortcut_is_activated = project or stride != 1 or in_channels != channels
        self.shortcut: nn.Conv2d | nn.Identity = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            if self.shortcut_is_activated
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act(self.bn1(x))
        shortcut = self.shortcut(activated if self.shortcut_is_activated else x)
        y = self.conv1(activated)
        y = self.conv2(self.act(self.bn2(y)))
        y = self.conv3(self.act(self.bn3(y)))
        return y + shortcut


class ResNeXtUnit(nn.Module):
    """Post-activation ResNeXt bottleneck with 32 groups, half as wide as its output.

    ReLU(BN(conv1x1(a(conv3x3(a(conv1x1(x)))))) + shortcut), where a is BN then ReLU after
    each convolution, and the shortcut is BN(conv1x1(x)) if the shape changes, else x.

    Shapes: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, channels: int, *, stride: int = 1, project: bool = False
    ) -> None:
        super().__init__()
        width = channels // 2
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        changes = project or stride != 1 or in_channels != channels
        self.shortcut: nn.Sequential | nn.Identity = (
            nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.act(y + self.shortcut(x))


Unit = Callable[..., PreActUnit | ResNeXtUnit]


def _units(unit: Unit, channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*[unit(channels, channels) for _ in range(count)])


@torch.fx.wrap
@register_notrace_function
def normalize_mask(x: Tensor, activation: str) -> Tensor:
    """MaskActivation's f2 ("channel") and f3 ("spatial"), in float32 under half precision."""
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    y = x.float() if half else x
    if activation == "channel":
        return F.normalize(y, dim=1, eps=1e-6).to(x.dtype)
    centered = y - y.mean(dim=(2, 3), keepdim=True)
    variance = centered.square().mean(dim=(2, 3), keepdim=True)
    return torch.sigmoid(centered * torch.rsqrt(variance + 1e-12)).to(x.dtype)


class MaskActivation(nn.Module):
    """Turns the mask's last map x into the mask M (the paper's section 3.2, table 1).

    mixed    f1(x) = sigmoid(x)
    channel  f2(x) = x / ||x_i||, the L2 norm over the channels at each position i
    spatial  f3(x) = sigmoid((x - mean_c) / std_c), over the positions of each channel c

    f2 and f3 are computed in float32 under autocast; for a map of zeros or of one value they
    give 0 and 1/2 instead of 0/0.

    Shapes: (B, C, H, W) -> the same.
    """

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation: str = choose("mask_activation", activation, ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "mixed":
            return torch.sigmoid(x)
        return normalize_mask(x, self.activation)

    def extra_repr(self) -> str:
        return self.activation


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """x interpolated to the height and width of `like`, as in Caffe: corners aligned."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class MaskBranch(nn.Module):
    """Soft mask branch: pools `depth` times, upsamples again, and ends in the mask M.

    Down: max-pool 3x3 stride 2, then r units, `depth` times; r more units at the bottom.
    Up: interpolate to the size of the map to be joined, add the skip path (one unit on that
    map), then r units; the last interpolation has neither skip nor unit. Tail:
    BN-ReLU-conv1x1 twice (pre-activation) or conv1x1-BN-ReLU, conv1x1 (post-activation).

    depth 0, or `mask="local"`, is the paper's comparison without sampling: three units at full
    size, whatever r is.

    Shapes: (B, C, H, W) -> M of the same shape. H and W are at least 2 ** depth.
    """

    attention_kind = "mixed"

    def __init__(
        self, unit: Unit, channels: int, *, depth: int, r: int, mask: str, activation: str
    ) -> None:
        super().__init__()
        depth = 0 if choose("mask", mask, MASKS) == "local" else depth
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.down = nn.ModuleList([_units(unit, channels, r) for _ in range(depth)])
        self.bottom: nn.Sequential = _units(unit, channels, r if depth else 3)
        self.skip = nn.ModuleList([unit(channels, channels) for _ in range(depth - 1)])
        self.up = nn.ModuleList([_units(unit, channels, r) for _ in range(depth - 1)])
        conv1, conv2 = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
        if unit is PreActUnit:
            bn1, bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
            self.tail = nn.Sequential(bn1, nn.ReLU(True), conv1, bn2, nn.ReLU(True), conv2)
        else:
            self.tail = nn.Sequential(conv1, nn.BatchNorm2d(channels), nn.ReLU(True), conv2)
        self.act = MaskActivation(activation)

    def forward(self, x: Tensor) -> Tensor:
        joined = [x]  # the map before each pooling, largest first
        for down in self.down:
            joined.append(down(self.pool(joined[-1])))
        y = self.bottom(joined[-1])
        # joined[-1] is the bottom, where the interpolation starts
        for i, (skip, up) in enumerate(zip(self.skip, self.up)):  # noqa: B905 (TorchScript)
            level = joined[-2 - i]
            y = up(_resize(y, level) + skip(level))
        if len(joined) > 1:
            y = _resize(y, x)
        return self.act(self.tail(y))


class AttentionModule(nn.Module):
    """Attention module: p units, then (1 + M) * T of the trunk T and the mask M, then p units.

    T is t units and M the mask branch, both on the output of the first p units. `attention`:

    residual  (1 + M) * T
    naive     M * T, the paper's comparison (naive attention learning)
    none      T, the plain twin without mask branch

    Shapes: (B, C, H, W) -> the same.

    Compiled, sigmoid, product, sum and the next unit's BN and ReLU are one pass, which reads the
    trunk and the mask's last map; in eager mode they are five passes.
    """

    def __init__(
        self,
        unit: Unit,
        channels: int,
        *,
        depth: int,
        p: int,
        t: int,
        r: int,
        attention: str,
        mask: str,
        mask_activation: str,
    ) -> None:
        super().__init__()
        self.residual: bool = choose("attention", attention, RESIDUALS) == "residual"
        self.pre: nn.Sequential = _units(unit, channels, p)
        self.trunk: nn.Sequential = _units(unit, channels, t)
        self.mask: MaskBranch | None = None
        if attention != "none":
            self.mask = MaskBranch(
                unit, channels, depth=depth, r=r, mask=mask, activation=mask_activation
            )
        self.post: nn.Sequential = _units(unit, channels, p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        trunk = self.trunk(x)
        if self.mask is not None:
            mask = self.mask(x)
            trunk = trunk + mask * trunk if self.residual else mask * trunk
        return self.post(trunk)


@torch.fx.wrap
@register_notrace_function
def check_size(x: Tensor, least: int, stem_stride: int) -> None:
    """Refuses a map that the masks can't pool; no underscore, or FX would trace into it."""
    if x.shape[-2] < least or x.shape[-1] < least:
        side = least * stem_stride
        raise UsageError(
            f"the image is too small for this network's masks: at least {side}x{side} pixels, not "
            f"about {x.shape[-2] * stem_stride}x{x.shape[-1] * stem_stride}"
        )


class ResidualAttentionNet(StagedNetwork):
    """Residual attention network with timm's interface.

    Args:
        modules: attention modules in each of the three stages; (1, 1, 1) is Attention-56,
            (1, 2, 3) Attention-92 on ImageNet.
        units: residual units after the modules of each stage.
        channels: widths of the stem and of the three stages, and of a fourth stage of three
            units if there are five.
        depths: how many times the masks of each stage pool.
        unit: "preact" (Attention) or "resnext" (AttentionNeXt).
        stem: "imagenet", conv 7x7 stride 2 and max-pool 3x3 stride 2, or "cifar", conv 3x3.
        p, t, r: numbers of units before and after, in the trunk, and between two poolings.
        attention: "residual", (1 + M) * T, "naive", M * T, or "none", T: the plain twin.
        mask: "encoder_decoder", or "local" convolutions without pooling.
        mask_activation: "mixed", "channel" or "spatial".

    Input: (B, in_chans, H, W), any height and width of at least `min_size` pixels.

    Raises:
        UsageError: an argument is not among its choices, or an input is too small.
    """

    @initialized_by_name
    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        *,
        modules: Sequence[int] = (1, 1, 1),
        units: Sequence[int] = (0, 0, 0),
        channels: Sequence[int] = (64, 256, 512, 1024, 2048),
        depths: Sequence[int] = (3, 2, 1),
        unit: str = "preact",
        stem: str = "imagenet",
        p: int = 1,
        t: int = 2,
        r: int = 1,
        attention: str = "residual",
        mask: str = "encoder_decoder",
        mask_activation: str = "mixed",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        stages = [f"layer{n}" for n in range(1, len(channels))]
        super().__init__(num_classes, in_chans, drop_rate, ["", *stages])
        for name, count in (("p", p), ("t", t), ("r", r)):
            if count < 1:
                raise UsageError(f"{name}={count}: give a number of residual units, at least 1")
        preact = choose("unit", unit, ("preact", "resnext")) == "preact"
        self.num_features: int = channels[-1]
        self._make_stem(in_chans, channels[0], choose("stem", stem, ("imagenet", "cifar")))
        # a map of n is pooled to ceil((n - 1) / 2), and the next stage also halves it
        pools = mask != "local" and attention != "none"
        self._least = max(2 ** (d + s) for s, d in enumerate(depths)) if pools else 1
        self.min_size: int = self._least * self._stem_stride
        self._make_stages(
            PreActUnit if preact else ResNeXtUnit, modules, units, channels, depths,
            p=p, t=t, r=r, attention=attention, mask=mask, mask_activation=mask_activation,
        )  # fmt: skip
        self.norm: nn.BatchNorm2d | nn.Identity = (
            nn.BatchNorm2d(channels[-1]) if preact else nn.Identity()
        )
        self.act: nn.ReLU | nn.Identity = nn.ReLU(inplace=True) if preact else nn.Identity()
        self.global_pool: Any
        self.fc: nn.Module
        self.global_pool, self.fc = create_classifier(
            channels[-1], num_classes, pool_type=global_pool
        )
        self.head_hidden_size: int = self.num_features * self.global_pool.feat_mult()
        names = ["act1", "layer1", "layer2", "layer3", "layer4"][: len(channels)]
        names[-1] = "act" if preact else names[-1]
        strides = [2, 4, 8, 16, 32] if stem == "imagenet" else [1, 1, 2, 4, 8]
        self.feature_info = [
            {"num_chs": c, "reduction": s, "module": n}
            for c, s, n in zip(channels, strides, names, strict=False)
        ]
        self._place(device, dtype)

    def _make_stem(self, in_chans: int, width: int, stem: str) -> None:
        imagenet = stem == "imagenet"
        self.conv1: nn.Conv2d = (
            nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
            if imagenet
            else nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool: nn.MaxPool2d | nn.Identity = (
            nn.MaxPool2d(3, 2, ceil_mode=True) if imagenet else nn.Identity()
        )
        self._stem_stride = 4 if imagenet else 1

    def _make_stages(
        self,
        unit: Unit,
        modules: Sequence[int],
        units: Sequence[int],
        channels: Sequence[int],
        depths: Sequence[int],
        **of_module: Any,
    ) -> None:
        stages = []
        for i, (count, after, depth) in enumerate(zip(modules, units, depths, strict=True)):
            width = channels[i + 1]
            first = unit(channels[i], width, stride=1 if i == 0 else 2, project=True)
            attended = [
                AttentionModule(unit, width, depth=depth, **of_module) for _ in range(count)
            ]
            stages.append(nn.Sequential(first, *attended, *_units(unit, width, after)))
        self.layer1, self.layer2, self.layer3 = stages
        self.layer4 = nn.Sequential()
        if len(channels) == 5:
            first = unit(channels[3], channels[4], stride=2, project=True)
            self.layer4 = nn.Sequential(first, *_units(unit, channels[4], 2))

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He normal initialization (fan-in) of convolutions and classifier; BN 1 and 0."""
        initialize(self, _init_layer)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as in timm's networks."""
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^conv1|^bn1", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def _steps(self) -> list[Callable[[Tensor], Tensor]]:
        def stem(x: Tensor) -> Tensor:
            return self.act1(self.bn1(self.conv1(x)))

        first, *others = [self._checkpointed(getattr(self, n)) for n in self.stage_names[1:]]

        def pooled(x: Tensor) -> Tensor:
            x = self.maxpool(x)
            check_size(x, self._least, self._stem_stride)
            return first(x)

        return [stem, pooled, *others]

    def _normed(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_features, H / 32, W / 32), rounded up; H / 4 for CIFAR."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        check_size(x, self._least, self._stem_stride)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            layers = [self.layer1, self.layer2, self.layer3, self.layer4]
            x = checkpoint_seq(layers, x, flatten=True)
        else:
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, h, w) -> (B, num_classes), or the pooled (B, num_features)."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_layer(layer: nn.Module, generator: torch.Generator | None = None) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
