"""CBAM: Convolutional Block Attention Module (Woo et al., ECCV 2018, arXiv 1807.06521).

The module, and timm's ResNet with it in every block, after the last BN of the residual
branch and before the addition. Checked against the authors' code
(github.com/Jongchan/attention-module, MIT license).

Where the authors' code and the paper's formulas differ, this is the code: the MLP has
biases, a BN (eps 1e-5, momentum 0.01) follows the 7x7 convolution, which has no bias, and
the maps are concatenated [max, mean]. The paper counts multiply-adds with the stride on a
bottleneck's first 1x1 convolution; the authors' code, and every weight that exists, has it
on the 3x3, and so have these networks.

Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507), with which the paper
compares, is the channel gate alone with average pooling: `SE` below.

Reading order: gates, module, initialization and grafting, network, variants.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from regard.errors import FileError, UsageError
from regard.models._common import IMAGENET_CFG, choose

CHANNEL_POOLS = ("both", "avg", "max")
SPATIAL_POOLS = ("avg_max", "conv")
ORDERS = ("channel_spatial", "spatial_channel", "parallel", "channel", "spatial")


class ChannelGate(nn.Module):
    """Channel attention: sigmoid(MLP(avg-pool(x)) + MLP(max-pool(x))), equation 2.

    One shared MLP of C -> C / reduction -> C with biases and ReLU; pool "avg" or "max" is
    the ablation with one of the two.

    Shapes: (B, C, H, W) -> (B, C, 1, 1), between 0 and 1.
    """

    attention_kind = "channel"

    def __init__(self, channels: int, *, reduction: int = 16, pool: str = "both") -> None:
        super().__init__()
        if reduction < 1:
            raise UsageError(f"reduction={reduction}: a whole number of at least 1")
        self.pool = choose("channel_pool", pool, CHANNEL_POOLS)
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "avg":
            gate = self.mlp(x.mean(dim=(2, 3)))
        elif self.pool == "max":
            gate = self.mlp(x.amax(dim=(2, 3)))
        else:
            gate = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
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
            raise UsageError(f"kernel_size={kernel_size}: choose 7 or 3 (the paper's), or any odd")
        learned = choose("spatial_pool", pool, SPATIAL_POOLS) == "conv"
        self.pool = nn.Conv2d(channels, 1, 1, bias=False) if learned else None
        self.conv = nn.Conv2d(
            1 if learned else 2, 1, kernel_size, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            pooled = self.pool(x)  # (B, C, H, W) -> (B, 1, H, W)
        else:  # (B, C, H, W) -> (B, 2, H, W)
            pooled = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return torch.sigmoid(self.bn(self.conv(pooled)))


class CBAM(nn.Module):
    """Convolutional block attention module for a map of `channels` channels, in any network.

    channel_spatial  x' = x * channel(x);  x' * spatial(x')      (the paper's choice)
    spatial_channel  x' = x * spatial(x);  x' * channel(x')
    parallel         x * channel(x) * spatial(x)
    channel          x * channel(x)
    spatial          x * spatial(x)

    Args:
        channels: C of the map.
        reduction: of the channel gate's MLP (16 in the paper).
        channel_pool: "both", "avg" or "max" (table 1).
        spatial_pool: "avg_max", or "conv" for a learned 1x1 convolution (table 2).
        kernel_size: of the spatial gate's convolution, 7 or 3 (table 2).
        order: one of the five above (table 3).

    Shapes: (B, C, H, W) -> the same.

    Compiled, x is read three times and written once: mean and max over positions in one
    pass; times the channel gate, mean and max over channels in one; times both gates, with
    the addition of the shortcut and the ReLU that follow in a ResNet's block, in one. Called
    operator by operator, six reads and two writes, before that addition and ReLU.

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
        self.spatial_first = order == "spatial_channel"
        self.parallel = order == "parallel"
        self.channel = None
        self.spatial = None
        if order != "spatial":
            self.channel = ChannelGate(channels, reduction=reduction, pool=channel_pool)
        if order != "channel":
            self.spatial = SpatialGate(channels, kernel_size=kernel_size, pool=spatial_pool)
        init_gates(self)
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
"""Squeeze-and-excitation with the paper's reduction 16: the channel gate on the average."""


def init_gates(module: nn.Module) -> None:
    """The authors' initialization of every gate in `module`, in place.

    Convolutions He normal fan-out, biases 0, and the spatial gate's BN weight 0, so that
    this gate starts at 1/2. The MLP's weights keep PyTorch's default, as in their code.
    """
    for m in module.modules():
        if isinstance(m, SpatialGate):
            for conv in (m.pool, m.conv):
                if conv is not None:
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(m.bn.weight)
            nn.init.zeros_(m.bn.bias)
        elif isinstance(m, ChannelGate):
            for layer in m.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.bias)


def _last_bn(block: nn.Module) -> nn.BatchNorm2d:
    bn = block.bn3 if isinstance(block, Bottleneck) else block.bn2
    if not isinstance(bn, nn.BatchNorm2d) or not bn.affine:
        raise UsageError(
            f"a block's last norm is {type(bn).__name__}: grafting folds the gates' factor into an "
            "affine BatchNorm2d"
        )
    return bn


@torch.no_grad()
def _start_neutral(block: nn.Module) -> None:
    """Makes a block with fresh gates answer bit for bit as it would without them.

    Each gate starts at exactly 1/2: the MLP's last layer is zero, and so are weight and
    bias of the spatial gate's BN. The factor 2 a gate goes into weight and bias of the
    branch's last BN; powers of two are exact in floating point.
    """
    attention = block.se
    assert isinstance(attention, CBAM)
    gates = 0
    if attention.channel is not None:
        last = attention.channel.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        gates += 1
    if attention.spatial is not None:
        nn.init.zeros_(attention.spatial.bn.weight)
        nn.init.zeros_(attention.spatial.bn.bias)
        gates += 1
    bn = _last_bn(block)
    bn.weight.mul_(2.0**gates)
    bn.bias.mul_(2.0**gates)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]


def graft(plain: nn.Module, attention: Callable[..., CBAM] = CBAM) -> ResNet:
    """A copy of a timm ResNet with attention in every block, that answers as `plain` does.

    The copy's outputs equal those of `plain` bit for bit, in evaluation and in training:
    gates start at exactly 1/2, and the factor that this costs is folded into the last BN
    of each branch. Weights that are loaded under fresh gates any other way lose accuracy
    at once. Training moves the gates from there.

    Args:
        plain: any timm ResNet without attention, of whatever weights.
        attention: CBAM, SE, or a partial of CBAM; called with a block's channels.

    Returns:
        The grafted network, on the device, in the precision and mode of `plain`.

    Raises:
        UsageError: `plain` is no timm ResNet, has attention already, or another norm.
    """
    if not isinstance(plain, ResNet):
        raise UsageError(f"graft() takes a timm ResNet, not {type(plain).__name__}")
    model = copy.deepcopy(plain)
    for block in _blocks(model):
        if block.se is not None:
            raise UsageError(f"this ResNet has attention already: {type(block.se).__name__}")
        bn = _last_bn(block)
        weight = bn.weight
        block.se = attention(bn.num_features).to(device=weight.device, dtype=weight.dtype)
        if not isinstance(block.se, CBAM):
            raise UsageError(f"attention={attention!r}: give CBAM, SE or a partial of CBAM")
        block.se.train(block.training)
        _start_neutral(block)
    _name_after_grafting(model, attention)
    return model


def _name_after_grafting(model: ResNet, attention: Callable[..., CBAM]) -> None:
    """Gives the grafted network its own name, where it has one, so that it can be saved."""
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    kind, arguments = _kind_of(attention)
    name = f"{kind}_{cfg.get('architecture')}"
    if timm.is_model(name):
        cfg["architecture"] = name
        model.pretrained_cfg = model.default_cfg = cfg
        made_with: Any = getattr(model, "_model_args", None) or {}
        model._model_args = {**made_with, **arguments}


def _kind_of(attention: Callable[..., CBAM]) -> tuple[str, dict[str, Any]]:
    """ "cbam" or "se", and the gates' arguments beside, of CBAM, SE or a partial of CBAM."""
    if attention is SE:
        return "se", {}
    if isinstance(attention, partial) and attention.func is CBAM:
        return "cbam", dict(attention.keywords)
    return "cbam" if attention is CBAM else "", {}


class AttentionResNet(ResNet):
    """timm's ResNet with gates, or plain, from the authors' initialization.

    Args:
        attention: makes the module of a block from its channels; None for a plain network.
        stem: "imagenet", or "cifar" for conv 3x3 stride 1 without pooling.
        zero_init_last: starts the last BN of each branch at 0, timm's own default, instead
            of the authors' 1.
        kwargs: timm's ResNet's own.

    Raises:
        UsageError: an argument is not among its choices.
    """

    def __init__(
        self,
        *,
        attention: Callable[..., nn.Module] | None = None,
        stem: str = "imagenet",
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        cifar = choose("stem", stem, ("imagenet", "cifar")) == "cifar"
        super().__init__(
            block_args={} if attention is None else {"attn_layer": attention},
            zero_init_last=zero_init_last,
            **kwargs,
        )
        if cifar:
            self.conv1 = nn.Conv2d(self.in_chans, 64, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
            for info in self.feature_info:
                info["reduction"] = max(1, info["reduction"] // (2 if info["reduction"] < 4 else 4))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """The authors' initialization (model_resnet.py): see `init_gates` for the gates.

        Convolutions He normal fan-out, classifier He normal fan-in, biases 0, BN 1 and 0.
        Their loop goes by names and so passes over the shortcuts' convolutions; here they
        are treated as the others.
        """
        super().init_weights(zero_init_last=zero_init_last)
        if isinstance(self.fc, nn.Linear):
            nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
            nn.init.zeros_(self.fc.bias)
        init_gates(self)


# The paper's eight networks (tables 4 and 5): timm's ResNet arguments.
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    # widen 1.5 and 2: the four stages' widths, the stem stays at 64
    "wide_resnet18_1_5": {
        "block": BasicBlock, "layers": (2, 2, 2, 2), "channels": (96, 192, 384, 768),
    },
    "wide_resnet18_2": {
        "block": BasicBlock, "layers": (2, 2, 2, 2), "channels": (128, 256, 512, 1024),
    },
    "resnext50_32x4d": {
        "block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4,
    },
    "resnext101_32x4d": {
        "block": Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 4,
    },
}  # fmt: skip

_GATE_ARGUMENTS = ("reduction", "channel_pool", "spatial_pool", "kernel_size", "order")


def _create(
    name: str,
    plain: str,
    attention: Callable[..., CBAM] | None,
    pretrained: bool,
    pretrained_plain: bool = False,
    **kwargs: Any,
) -> ResNet:
    gates = {k: kwargs.pop(k) for k in _GATE_ARGUMENTS if attention is not None and k in kwargs}
    if attention is not None and gates:
        attention = partial(attention, **gates)
    told = kwargs.get("pretrained_cfg")  # a saved network's own, when it is loaded again
    if kwargs.get("stem") == "cifar" and (not told or isinstance(told, str)):
        overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
        cifar = {"input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0}
        kwargs["pretrained_cfg_overlay"] = {**cifar, **overlay}
    model = build_model_with_cfg(
        AttentionResNet, name, pretrained, attention=attention, **_RESNETS[plain], **kwargs
    )
    if pretrained_plain:
        if kwargs.get("features_only") or kwargs.get("stem") == "cifar":
            raise UsageError("pretrained_plain=True: timm's weights fit the whole ImageNet network")
        _load_pretrained_plain(model, plain)
    return model


def _load_pretrained_plain(model: ResNet, plain: str) -> None:
    """Loads timm's pretrained weights of the plain network and starts the gates neutral."""
    try:
        source = timm.create_model(
            plain, pretrained=True, num_classes=model.num_classes, in_chans=model.in_chans
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FileError(f"timm's pretrained weights of {plain} can't be had: {reason}") from error
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(".se." in key for key in missing), missing
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        **{k: source.pretrained_cfg[k] for k in ("mean", "std", "crop_pct", "interpolation")},
    }
    for block in _blocks(model):
        if block.se is not None:
            _start_neutral(block)


def twins(name: str) -> dict[str, str]:
    """The names of a network and of its twins that differ in the attention alone.

    >>> twins("cbam_resnet50")
    {'plain': 'resnet50', 'se': 'se_resnet50', 'cbam': 'cbam_resnet50'}
    >>> twins("sononet8")
    {'plain': 'sononet8', 'ag': 'ag_sononet8'}

    timm's own plain ResNets start with the last BN of each branch at zero, the authors'
    and these with one: give `zero_init_last=False` to compare from the same start.

    Raises:
        UsageError: the network has no twin; the message names those that have.
    """
    base = name.removeprefix("ag_").removeprefix("cbam_").removeprefix("se_")
    if base in _RESNETS:
        return {"plain": base, "se": f"se_{base}", "cbam": f"cbam_{base}"}
    sononets = [f"sononet{f}" for f in (8, 16, 32, 64)]
    if base in sononets:
        return {"plain": base, "ag": f"ag_{base}"}
    raise UsageError(f"{name!r} has no twin; these have: {', '.join([*_RESNETS, *sononets])}")


default_cfgs = generate_default_cfgs(
    {
        **{f"{kind}_{plain}": IMAGENET_CFG for plain in _RESNETS for kind in ("cbam", "se")},
        **dict.fromkeys(("wide_resnet18_1_5", "wide_resnet18_2"), IMAGENET_CFG),
    }
)


@register_model
def cbam_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 + CBAM (table 4: 29.27 / 10.09 % error). 11.78M parameters, 1.815 GMACs."""
    return _create("cbam_resnet18", "resnet18", CBAM, pretrained, **kwargs)


@register_model
def cbam_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 + CBAM (table 4: 25.99 / 8.24 % error). 21.96M parameters, 3.665 GMACs."""
    return _create("cbam_resnet34", "resnet34", CBAM, pretrained, **kwargs)


@register_model
def cbam_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 + CBAM (table 4: 22.66 / 6.31 % error). 28.09M parameters, 4.096 GMACs."""
    return _create("cbam_resnet50", "resnet50", CBAM, pretrained, **kwargs)


@register_model
def cbam_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-101 + CBAM (table 4: 21.51 / 5.69 % error). 49.33M parameters, 7.813 GMACs."""
    return _create("cbam_resnet101", "resnet101", CBAM, pretrained, **kwargs)


@register_model
def cbam_wide_resnet18_1_5(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (1.5) + CBAM (table 4: 26.10 / 8.43 %). 26.08M parameters, 3.868 GMACs."""
    return _create("cbam_wide_resnet18_1_5", "wide_resnet18_1_5", CBAM, pretrained, **kwargs)


@register_model
def cbam_wide_resnet18_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (2.0) + CBAM (table 4: 24.84 / 7.63 %). 45.97M parameters, 6.697 GMACs."""
    return _create("cbam_wide_resnet18_2", "wide_resnet18_2", CBAM, pretrained, **kwargs)


@register_model
def cbam_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-50 (32x4d) + CBAM (table 4: 21.92 / 5.91 %). 27.56M parameters, 4.237 GMACs."""
    return _create("cbam_resnext50_32x4d", "resnext50_32x4d", CBAM, pretrained, **kwargs)


@register_model
def cbam_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-101 (32x4d) + CBAM (table 4: 21.07 / 5.59 %). 48.96M parameters, 7.981 GMACs."""
    return _create("cbam_resnext101_32x4d", "resnext101_32x4d", CBAM, pretrained, **kwargs)


@register_model
def se_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 + SE (table 4: 29.41 / 10.22 % error)."""
    return _create("se_resnet18", "resnet18", SE, pretrained, **kwargs)


@register_model
def se_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 + SE (table 4: 26.13 / 8.35 % error)."""
    return _create("se_resnet34", "resnet34", SE, pretrained, **kwargs)


@register_model
def se_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 + SE (table 4: 23.14 / 6.70 % error)."""
    return _create("se_resnet50", "resnet50", SE, pretrained, **kwargs)


@register_model
def se_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-101 + SE (table 4: 22.35 / 6.19 % error)."""
    return _create("se_resnet101", "resnet101", SE, pretrained, **kwargs)


@register_model
def se_wide_resnet18_1_5(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (1.5) + SE (table 4: 26.21 / 8.47 % error)."""
    return _create("se_wide_resnet18_1_5", "wide_resnet18_1_5", SE, pretrained, **kwargs)


@register_model
def se_wide_resnet18_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (2.0) + SE (table 4: 24.93 / 7.65 % error)."""
    return _create("se_wide_resnet18_2", "wide_resnet18_2", SE, pretrained, **kwargs)


@register_model
def se_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-50 (32x4d) + SE (table 4: 21.91 / 6.04 % error)."""
    return _create("se_resnext50_32x4d", "resnext50_32x4d", SE, pretrained, **kwargs)


@register_model
def se_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-101 (32x4d) + SE (table 4: 21.17 / 5.66 % error)."""
    return _create("se_resnext101_32x4d", "resnext101_32x4d", SE, pretrained, **kwargs)


@register_model
def wide_resnet18_1_5(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (1.5), plain (table 4: 26.85 / 8.88 % error)."""
    return _create("wide_resnet18_1_5", "wide_resnet18_1_5", None, pretrained, **kwargs)


@register_model
def wide_resnet18_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (2.0), plain (table 4: 25.63 / 8.20 % error)."""
    return _create("wide_resnet18_2", "wide_resnet18_2", None, pretrained, **kwargs)
