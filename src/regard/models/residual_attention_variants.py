"""The residual attention networks of the paper's tables, and their plain twins.

The networks themselves are in residual_attention.py.
"""

from typing import Any

from timm.models import build_model_with_cfg

from regard.models._common import CIFAR_CFG, IMAGENET_CFG
from regard.models._shipped import generate_default_cfgs, register_model
from regard.models.residual_attention import ResidualAttentionNet


def _cifar(m: int, **more: Any) -> dict[str, Any]:
    """Attention-(36m + 20) with m modules in each stage (section 4.1)."""
    return {
        "modules": (m, m, m), "units": (1, 1, 1), "channels": (16, 64, 128, 256),
        "depths": (2, 1, 0), "stem": "cifar", "num_classes": 10, **more,
    }  # fmt: skip


_NETWORKS: dict[str, dict[str, Any]] = {
    "attention56": {"modules": (1, 1, 1)},
    "attention92": {"modules": (1, 2, 3)},
    "attentionnext56": {"modules": (1, 1, 1), "unit": "resnext"},
    "attentionnext92": {"modules": (1, 2, 3), "unit": "resnext"},
    "attention56_cifar": _cifar(1),
    "attention92_cifar": _cifar(2),
    "attention128_cifar": _cifar(3),
    "attention164_cifar": _cifar(4),
    "attention236_cifar": _cifar(6),
    "attention452_cifar": _cifar(6, p=2, t=4, r=3),
}
_RESNET164 = _cifar(0, units=(17, 17, 17))


def arguments_by_name(name: str) -> dict[str, Any]:
    """The arguments of ResidualAttentionNet that make the network `name`."""
    plain = {"attention": "none"} if name.startswith("plain_") else {}
    return {**_NETWORKS.get(name.removeprefix("plain_"), _RESNET164), **plain}


def _create(name: str, pretrained: bool, **kwargs: Any) -> ResidualAttentionNet:
    kwargs = {**arguments_by_name(name), **kwargs}
    maps = len(kwargs.get("channels", range(5)))  # of the stem and the stages
    return build_model_with_cfg(
        ResidualAttentionNet, name, pretrained,
        feature_cfg={"flatten_sequential": False, "out_indices": tuple(range(maps))}, **kwargs,
    )  # fmt: skip


default_cfgs = generate_default_cfgs(
    {
        **{
            f"{kind}{name}": CIFAR_CFG if name.endswith("_cifar") else IMAGENET_CFG
            for name in _NETWORKS
            for kind in ("", "plain_")
        },
        "preact_resnet164_cifar": CIFAR_CFG,
    }
)


@register_model
def attention56(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-56: one module a stage (table 2). 31.81M parameters, 6.271 GMACs at 224."""
    return _create("attention56", pretrained, **kwargs)


@register_model
def attention92(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-92: one, two, three modules (table 2). 52.47M parameters, 10.534 GMACs at 224."""
    return _create("attention92", pretrained, **kwargs)


@register_model
def attentionnext56(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """AttentionNeXt-56: ResNeXt units (table 7). 31.32M parameters, 6.419 GMACs at 224."""
    return _create("attentionnext56", pretrained, **kwargs)


@register_model
def attentionnext92(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """AttentionNeXt-92: ResNeXt units, one, two, three modules (the authors' definition)."""
    return _create("attentionnext92", pretrained, **kwargs)


@register_model
def attention56_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-56 for 32x32 images, m = 1 (table 1: 5.52 % error on CIFAR-10)."""
    return _create("attention56_cifar", pretrained, **kwargs)


@register_model
def attention92_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-92 for 32x32 images, m = 2 (table 6: 4.99 % error on CIFAR-10)."""
    return _create("attention92_cifar", pretrained, **kwargs)


@register_model
def attention128_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-128 for 32x32 images, m = 3."""
    return _create("attention128_cifar", pretrained, **kwargs)


@register_model
def attention164_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-164 for 32x32 images, m = 4."""
    return _create("attention164_cifar", pretrained, **kwargs)


@register_model
def attention236_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-236 for 32x32 images, m = 6 (table 6: 4.14 % error on CIFAR-10)."""
    return _create("attention236_cifar", pretrained, **kwargs)


@register_model
def attention452_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-452 for 32x32 images, m = 6 and p, t, r = 2, 4, 3 (table 6: 3.90 %)."""
    return _create("attention452_cifar", pretrained, **kwargs)


@register_model
def preact_resnet164_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Pre-activation ResNet-164 (He et al., 2016): 18 units a stage (RAN's table 5).

    Its first unit projects the activated input, as in the residual attention networks.
    """
    return _create("preact_resnet164_cifar", pretrained, **kwargs)


@register_model
def plain_attention56(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-56's trunk alone: the same residual units, no mask."""
    return _create("plain_attention56", pretrained, **kwargs)


@register_model
def plain_attention92(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-92's trunk alone: the same residual units, no mask."""
    return _create("plain_attention92", pretrained, **kwargs)


@register_model
def plain_attentionnext56(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """AttentionNeXt-56's trunk alone: the same residual units, no mask."""
    return _create("plain_attentionnext56", pretrained, **kwargs)


@register_model
def plain_attentionnext92(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """AttentionNeXt-92's trunk alone: the same residual units, no mask."""
    return _create("plain_attentionnext92", pretrained, **kwargs)


@register_model
def plain_attention56_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-56's trunk for 32x32 images, 56 layers deep."""
    return _create("plain_attention56_cifar", pretrained, **kwargs)


@register_model
def plain_attention92_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-92's trunk for 32x32 images, 92 layers deep."""
    return _create("plain_attention92_cifar", pretrained, **kwargs)


@register_model
def plain_attention128_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-128's trunk for 32x32 images, 128 layers deep."""
    return _create("plain_attention128_cifar", pretrained, **kwargs)


@register_model
def plain_attention164_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-164's trunk for 32x32 images, 164 layers deep."""
    return _create("plain_attention164_cifar", pretrained, **kwargs)


@register_model
def plain_attention236_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-236's trunk for 32x32 images, 236 layers deep."""
    return _create("plain_attention236_cifar", pretrained, **kwargs)


@register_model
def plain_attention452_cifar(pretrained: bool = False, **kwargs: Any) -> ResidualAttentionNet:
    """Attention-452's trunk for 32x32 images, 452 layers deep."""
    return _create("plain_attention452_cifar", pretrained, **kwargs)
