"""Grafting: attention under trained weights, without changing one answer."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from regard.errors import UsageError
from regard.models.cbam import CBAM, SE, start_neutral
from regard.models.zoo import twins_of


def _last_bn(block: nn.Module) -> nn.BatchNorm2d:
    bn = block.bn3 if isinstance(block, Bottleneck) else block.bn2
    if not isinstance(bn, nn.BatchNorm2d) or not bn.affine:
        raise UsageError(
            f"a block's last norm is {type(bn).__name__}: grafting folds the gates' factor into an "
            "affine BatchNorm2d"
        )
    return bn


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
        start_neutral(block.se, bn)
    _name_after_grafting(model, attention)
    return model


def _name_after_grafting(model: ResNet, attention: Callable[..., CBAM]) -> None:
    """Gives the grafted network its own name, where it has one, so that it can be saved."""
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    kind, arguments = _kind_of(attention)
    name = twins_of(str(cfg.get("architecture"))).get(kind)
    if name is not None:
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
