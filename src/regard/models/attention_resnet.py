"""ResNets with CBAM, with squeeze-and-excitation, and plain (CBAM's tables 4 and 5).

timm's ResNet with a gate in every block, after the last BN of the residual branch and before
the addition. The plain networks differ only in having no gates, with the same initialization,
and are timm's own networks: timm's weights load under their names. timm's constructor starts the
last BN of each branch at 0 by default; the authors and these networks start it at 1.

The paper counts multiply-adds with the stride on a bottleneck's first 1x1 convolution; the
authors' code and all existing weights have it on the 3x3 convolution, as do these networks.

Reading order: network, starting from timm's weights, variants.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from regard.errors import FileError, UsageError
from regard.files import reason
from regard.models._common import GATE_ARGUMENTS, IMAGENET_CFG, choose
from regard.models._shipped import generate_default_cfgs, register_model
from regard.models.cbam import CBAM, SE, start_neutral
from regard.models.hub import cached_weights
from regard.models.initialization import initialize, initialized_by_name


class AttentionResNet(ResNet):
    """timm's ResNet with gates, or plain, with the authors' initialization.

    Args:
        attention: makes a block's gate module from its channels; None for a plain network.
        stem: "imagenet", or "cifar" for conv 3x3 stride 1 without pooling.
        zero_init_last: start the last BN of each branch at 0, timm's default, instead of the
            authors' 1.
        kwargs: further arguments of timm's ResNet.

    Raises:
        UsageError: an argument is not among its choices.
    """

    @initialized_by_name
    def __init__(
        self,
        *,
        attention: Callable[..., nn.Module] | None = None,
        stem: str = "imagenet",
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        cifar = choose("stem", stem, ("imagenet", "cifar")) == "cifar"
        gates: dict[str, Any] = {} if attention is None else {"attn_layer": attention}
        block_args = {**(kwargs.pop("block_args", None) or {}), **gates}
        self._built = False
        super().__init__(block_args=block_args, **kwargs)
        self._built, self._zero_init_last = True, zero_init_last
        if cifar:
            old, width = next(self.parameters()), self.feature_info[0]["num_chs"]
            self.conv1: nn.Module = nn.Conv2d(
                self.in_chans, width, 3, 1, 1, bias=False, device=old.device, dtype=old.dtype
            )
            self.maxpool = nn.Identity()
            for info in self.feature_info:
                info["reduction"] = max(1, info["reduction"] // (2 if info["reduction"] < 4 else 4))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool | None = None) -> None:
        """The authors' initialization (model_resnet.py), layer by layer: see initialization.py.

        Convolutions He normal fan-out, classifier He normal fan-in, biases 0, BN 1 and 0, and
        the gates' own. The authors' loop selects layers by name and misses the shortcuts'
        convolutions; here they are initialized like the others.
        """
        if not self._built:  # timm's constructor calls this before the stem is chosen
            return
        initialize(self, _init_layer)
        if self._zero_init_last if zero_init_last is None else zero_init_last:
            for m in self.modules():
                if hasattr(m, "zero_init_last"):
                    m.zero_init_last()


def _init_layer(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(
            layer.weight, mode="fan_out", nonlinearity="relu", generator=generator
        )
    elif isinstance(layer, nn.Linear):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)


# The paper's eight networks (tables 4 and 5) as timm's ResNet arguments.
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    # widen 1.5 and 2: the widths of the four stages; the stem stays at 64
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


def _create(
    name: str,
    base: str,
    attention: Callable[..., CBAM] | None,
    pretrained: bool,
    pretrained_plain: bool = False,
    **kwargs: Any,
) -> ResNet:
    gates = {k: kwargs.pop(k) for k in GATE_ARGUMENTS if attention is not None and k in kwargs}
    if attention is not None and gates:
        attention = partial(attention, **gates)
    told = kwargs.get("pretrained_cfg")  # the saved configuration when a network is loaded
    if kwargs.get("stem") == "cifar" and (not told or isinstance(told, str)):
        overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
        cifar = {"input_size": (3, 32, 32), "pool_size": (4, 4), "crop_pct": 1.0}
        kwargs["pretrained_cfg_overlay"] = {**cifar, **overlay}
    model = build_model_with_cfg(
        AttentionResNet, name, pretrained, attention=attention, **{**_RESNETS[base], **kwargs}
    )
    if pretrained_plain:
        if kwargs.get("features_only") or kwargs.get("stem") == "cifar":
            raise UsageError(
                "pretrained_plain=True: timm's weights only fit the complete ImageNet network"
            )
        _load_pretrained_plain(model, base)
    return model


def _load_pretrained_plain(model: ResNet, base: str) -> None:
    """Loads timm's pretrained weights for the plain network; the gates start neutral."""
    try:
        file = cached_weights(base)  # avoids asking the hub
        source = timm.create_model(
            base, pretrained=True, num_classes=model.num_classes, in_chans=model.in_chans,
            pretrained_cfg_overlay=None if file is None else {"file": str(file)},
        )  # fmt: skip
    except Exception as error:
        raise FileError(
            f"timm's pretrained weights of {base} can't be loaded: {reason(error, 300)}"
        ) from error
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(".se." in key for key in missing), missing
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        **{k: source.pretrained_cfg[k] for k in ("mean", "std", "crop_pct", "interpolation")},
    }
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck) and block.se is not None:
            start_neutral(block.se, block.bn3 if isinstance(block, Bottleneck) else block.bn2)


default_cfgs = generate_default_cfgs(
    {
        name: IMAGENET_CFG
        for base in _RESNETS
        for name in (f"cbam_{base}", f"se_{base}", base if "wide" in base else f"plain_{base}")
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
def plain_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18, plain (table 4: 29.60 / 10.55 % error)."""
    return _create("plain_resnet18", "resnet18", None, pretrained, **kwargs)


@register_model
def plain_resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34, plain (table 4: 26.69 / 8.60 % error)."""
    return _create("plain_resnet34", "resnet34", None, pretrained, **kwargs)


@register_model
def plain_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50, plain (table 4: 24.56 / 7.50 % error)."""
    return _create("plain_resnet50", "resnet50", None, pretrained, **kwargs)


@register_model
def plain_resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-101, plain (table 4: 23.38 / 6.88 % error)."""
    return _create("plain_resnet101", "resnet101", None, pretrained, **kwargs)


@register_model
def plain_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-50 (32x4d), plain (table 4: 22.85 / 6.48 % error)."""
    return _create("plain_resnext50_32x4d", "resnext50_32x4d", None, pretrained, **kwargs)


@register_model
def plain_resnext101_32x4d(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNeXt-101 (32x4d), plain (table 4: 21.54 / 5.75 % error)."""
    return _create("plain_resnext101_32x4d", "resnext101_32x4d", None, pretrained, **kwargs)


@register_model
def wide_resnet18_1_5(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (1.5), plain (table 4: 26.85 / 8.88 % error)."""
    return _create("wide_resnet18_1_5", "wide_resnet18_1_5", None, pretrained, **kwargs)


@register_model
def wide_resnet18_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WideResNet-18 (2.0), plain (table 4: 25.63 / 8.20 % error)."""
    return _create("wide_resnet18_2", "wide_resnet18_2", None, pretrained, **kwargs)
