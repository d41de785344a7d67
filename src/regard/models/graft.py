"""Grafting: inserts attention into a trained network without changing a bit of its outputs.

`graft` finds the ends of residual branches in any timm network, or of its stages if it has no
such branches (`regard.models.branches`), and adds gates after the modules there (`Gated`). Every
gate starts at exactly 1/2; the inverse factor goes into the branch's last norm if that is affine
(powers of two are exact), otherwise the map is multiplied by it, so that the product with the
gates starts at exactly 1. Then the outputs of both networks for random images, in evaluation
and in training, must be identical.

A grafted network that has no name in Regard is saved as `grafted`, with its plain network's name
and arguments and the list of modules that have gates.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from timm.models import (
    FeatureDictNet,
    FeatureHookNet,
    FeatureListNet,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regard.attention import attention_kinds, evaluating, record
from regard.errors import UsageError
from regard.files import reason
from regard.models._common import IMAGENET_CFG
from regard.models.branches import Tap, find_ends, foldable_norm, resnet_ends
from regard.models.cbam import CBAM, SE, start_at_half
from regard.models.initialization import preserved_rng_state
from regard.models.sononet import without_other_heads
from regard.models.zoo import twins_of

_KINDS: dict[str, Callable[..., CBAM]] = {"cbam": CBAM, "se": SE}


class Gated(nn.Module):
    """A module of a network, and gates that its output, multiplied by `scale`, goes through.

    Shapes: the module's input -> its output, (B, C, H, W), or with `channels_last`
    (B, H, W, C).

    The module remains a child, so that anything that replaces a BN in a network (folding,
    `convert_sync_batchnorm`, freezing) leaves the gates in place. In a state dict its entries
    have the same names as in the plain network.
    """

    def __init__(
        self, module: nn.Module, attention: CBAM, scale: float = 1.0, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.module: nn.Module = module
        self.attention: CBAM = attention
        self.scale: float = scale
        self.channels_last: bool = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.module(x)
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        x = self.attention(x if self.scale == 1.0 else x * self.scale)
        return x.permute(0, 2, 3, 1) if self.channels_last else x

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses tensors: functional_call would set, by its name in a state dict, an unused one.

        Raises:
            UsageError: the value is a tensor.
        """
        if isinstance(value, Tensor):
            raise UsageError(
                f"a module with gates has no {name} of its own: functional_call takes the names "
                "of named_parameters() and named_buffers(), not those of a state dict"
            )
        super().__setattr__(name, value)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Like nn.Module's, without the name of `module`."""
        found = self.module.state_dict(*args, prefix=prefix, **kwargs)
        kwargs["destination"] = found
        return self.attention.state_dict(*args, prefix=f"{prefix}attention.", **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = (f"{prefix}module.", f"{prefix}attention.")
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(own)]:
            state_dict[f"{own[0]}{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def graft(plain: nn.Module, attention: Callable[..., CBAM] = CBAM) -> nn.Module:
    """A copy of a timm network with attention in every residual branch.

    In a network without residual branches, such as VGG, DenseNet or SonoNet, it is at the end of
    every stage that ends in a map.

    The copy's outputs equal those of `plain` bit for bit, in evaluation and in training, and
    training moves the gates from there. Loading weights under fresh gates in any other way loses
    accuracy at once.

    Args:
        plain: any timm or Regard network, with any weights, whose residual branches or stages end
            in maps. timm's own attention within its blocks, such as SE, stays before the gates.
        attention: CBAM, SE, or a partial of CBAM.

    Returns:
        The grafted network, with the device, precision and mode of `plain`. timm's ResNets get
        their gates as in `cbam_resnet50` and its kin; other networks as `attention` of the
        `Gated` module that ends a branch.

    Raises:
        UsageError: it is a network of Regard's or a timm ResNet that already has attention, has
            neither residual branches nor stages that end in maps, or its outputs would change;
            the message says where and why.
    """
    kind, arguments = _kind_of(attention)
    if not getattr(plain, "pretrained_cfg", None):
        raise UsageError(f"graft() takes a timm network, not {type(plain).__name__}")
    refuse_attention(plain)
    x = _probe_image(plain)
    ends = resnet_ends(plain) or find_ends(plain, x)
    taps = {name: end.tap for name, end in ends.items()}
    model = copy.deepcopy(plain)
    norms = {name: foldable_norm(model.get_submodule(end.made_by)) for name, end in ends.items()}
    hooks = []
    for name, tap in taps.items():
        gate = _attach(model, name, tap, kind, arguments)
        hooks.append(gate.register_forward_pre_hook(_wake))
        factor = 2.0 ** start_at_half(gate)
        norm = norms[name]
        if norm is not None:
            with torch.no_grad():
                norm.weight.mul_(factor)
                norm.bias.mul_(factor)
        else:
            gated = model.get_submodule(name)
            assert isinstance(gated, Gated)
            gated.scale = tap["scale"] = factor
    try:
        _check_neutral(plain, model, taps, x)
    finally:
        for hook in hooks:
            hook.remove()
    _name_after_grafting(model, kind, arguments, taps)
    return model


def _kind_of(attention: Callable[..., CBAM]) -> tuple[str, dict[str, Any]]:
    """ "cbam" or "se", and the gates' further arguments, from CBAM, SE or a partial of CBAM."""
    if attention is SE:
        return "se", {}
    if attention is CBAM:
        return "cbam", {}
    if isinstance(attention, partial) and attention.func is CBAM and not attention.args:
        return "cbam", dict(attention.keywords)
    raise UsageError(f"attention={attention!r}: give CBAM, SE or a partial of CBAM")


def refuse_attention(plain: nn.Module) -> None:
    """Refuses a network with attention, which would be counted as the plain one's.

    Raises:
        UsageError: it has attention.
    """
    for name, module in plain.named_modules():
        if isinstance(plain, ResNet) and isinstance(getattr(module, "se", None), nn.Module):
            raise UsageError(f"this network has attention already: {type(module.se).__name__}")
        if isinstance(getattr(module, "attention_kind", None), str):
            own = plain.get_submodule(name.rpartition(".")[0])
            raise UsageError(f"this network has attention already: {type(own).__name__}")


def _probe_image(plain: nn.Module) -> Tensor:
    """Two random images of the smallest size that the network accepts, on its device."""
    cfg: Any = plain.pretrained_cfg
    channels, height, width = cfg["input_size"]
    made_with: Any = getattr(plain, "_model_args", None) or {}
    channels = made_with.get("in_chans") or getattr(plain, "in_chans", None) or channels
    height, width = getattr(getattr(plain, "patch_embed", None), "img_size", (height, width))
    like = next(plain.parameters())
    sizes = [(height, width)] if cfg.get("fixed_input_size") else [(64, 64), (height, width)]
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        x = torch.randn(2, channels, *size, generator=generator).to(like.device, like.dtype)
        try:
            with torch.no_grad(), evaluating(plain):
                plain(x)
        except (RuntimeError, AssertionError, ValueError) as error:
            fault = reason(error)
            continue
        return x
    raise UsageError(f"{type(plain).__name__} fails on an image of {height}x{width}: {fault}")


def _attach(model: nn.Module, name: str, tap: Tap, kind: str, arguments: Mapping[str, Any]) -> CBAM:
    module = model.get_submodule(name)
    gate = _KINDS[kind](tap["channels"], **arguments)
    like = next(model.parameters())
    gate.to(device=like.device, dtype=like.dtype)
    if type(module) in (BasicBlock, Bottleneck):
        module.se = gate.train(module.training)
        return gate
    if hasattr(module, "attention"):
        raise UsageError(f"{name} already has an attribute called attention")
    further = {key: value for key, value in tap.items() if key != "channels"}
    gated = Gated(module, gate.train(module.training), **further)
    gated.training = module.training  # whose own parts may differ
    _replace(model, name, gated)
    return gate


@torch.no_grad()
def _wake(attention: CBAM, images: tuple[Tensor]) -> None:
    """Lets hidden units of a channel gate see something, if its map is never negative.

    Behind a ReLU, a unit whose weights sum to less than 0 is mostly 0 for every image and then
    learns nothing: half of all units, and half of all gates that have only one, as for 16 channels.
    In the paper, where the map comes from a BN, the sign makes no difference.
    """
    low, high = images[0].aminmax()
    if attention.channel is not None and low >= 0 and high > 0:  # a norm may start with zeros alone
        weight = attention.channel.mlp[0].weight
        assert isinstance(weight, Tensor)
        weight.mul_(torch.where(weight.sum(1, keepdim=True) < 0, -1.0, 1.0).to(weight))


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, by)


# ----------------------------------------------------------------------------- the probe
def _check_neutral(plain: nn.Module, model: nn.Module, taps: Mapping[str, Tap], x: Tensor) -> None:
    """Refuses a graft that changes an output, or that has a gate which is never called.

    Raises:
        UsageError: it does; the message names the module.
    """
    try:
        with torch.no_grad(), evaluating(model), record(model) as maps:
            model(x)
    except (AttributeError, TypeError) as error:  # a network that inspects its modules
        raise UsageError(
            f"{type(model).__name__} does more with its modules than call them: it can't be "
            f"grafted ({reason(error)})"
        ) from error
    if unused := [name for name in attention_kinds(model) if name not in maps]:
        raise UsageError(f"{type(model).__name__} never calls {unused[0]}: it can't be grafted")
    if _same_answers(plain, model, x):
        return
    for name in taps:
        one = copy.deepcopy(model)
        gated = one.get_submodule(name)
        if isinstance(gated, Gated):
            _replace(one, name, gated.module)
            if not _same_answers(one, model, x):
                break
    raise UsageError(
        f"{type(model).__name__} would not answer the same with gates after {name}: it can't be "
        "grafted"
    )


@torch.no_grad()
def _same_answers(plain: nn.Module, model: nn.Module, x: Tensor) -> bool:
    answers = []
    for network in (plain, model):
        trained = copy.deepcopy(network).train()  # a copy, as running statistics change
        with preserved_rng_state(), evaluating(network):
            torch.manual_seed(0)
            evaluated = network(x)
            torch.manual_seed(0)
            outputs = tree_leaves((evaluated, trained(x), trained(x)))
        answers.append([torch.nan_to_num(o) for o in outputs if isinstance(o, Tensor)])
    return all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


# ------------------------------------------------------------------------ saving and loading
def _name_after_grafting(
    model: nn.Module, kind: str, arguments: Mapping[str, Any], taps: Mapping[str, Tap]
) -> None:
    """Gives the grafted network a name and arguments from which it can be rebuilt."""
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    made_with: dict[str, Any] = dict(getattr(model, "_model_args", None) or {})
    base = str(cfg.get("architecture"))
    if type(model.get_submodule(next(iter(taps)))) in (BasicBlock, Bottleneck) and (
        name := twins_of(base).get(kind)
    ):
        cfg["architecture"], made_with = name, {**made_with, **arguments}
    else:
        cfg["architecture"] = "grafted"
        # otherwise timm takes it from the configuration of `grafted`, overriding the base's
        channels = made_with.pop("in_chans", cfg["input_size"][0])
        made_with = {
            "in_chans": channels, "base": base, "base_args": made_with, "attention": kind,
            "attention_args": dict(arguments), "taps": {n: dict(t) for n, t in taps.items()},
        }  # fmt: skip
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
    model._model_args = made_with  # type: ignore[assignment]


def _make_grafted(
    *,
    base: str,
    taps: Mapping[str, Tap],
    attention: str = "cbam",
    base_args: Mapping[str, Any] | None = None,
    attention_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    model = timm.create_model(base, **{**(base_args or {}), **kwargs})
    for name, tap in taps.items():
        start_at_half(_attach(model, name, tap, attention, attention_args or {}))
    return model


default_cfgs = generate_default_cfgs({"grafted": IMAGENET_CFG})


_FEATURES = {FeatureListNet: "list", FeatureDictNet: "dict", FeatureHookNet: "hook"}


@register_model
def grafted(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network that `graft` made, rebuilt from saved arguments; see `_name_after_grafting`.

    With `features_only`, its features are those that timm takes from the plain network.

    Raises:
        UsageError: features_only for a network whose features can't be taken with gates.
    """
    kwargs["pretrained_filter_fn"] = without_other_heads  # as in SonoNet's own function
    if not kwargs.get("features_only"):
        model: nn.Module = build_model_with_cfg(_make_grafted, "grafted", pretrained, **kwargs)
        return model
    base = str(kwargs["base"])
    arguments = {**(kwargs.get("base_args") or {}), "in_chans": kwargs.get("in_chans", 3)}
    wanted = {k: kwargs[k] for k in ("out_indices", "feature_cls") if k in kwargs}
    plain = timm.create_model(base, features_only=True, **arguments, **wanted)
    cfg = _feature_cfg(plain, timm.create_model(base, **arguments))
    kwargs = {k: v for k, v in kwargs.items() if k not in wanted}
    try:
        model = build_model_with_cfg(
            _make_grafted, "grafted", pretrained, feature_cfg=cfg, **kwargs
        )
        same = _features_of(model) == _features_of(plain)
    except (AssertionError, KeyError, IndexError) as error:
        raise UsageError(
            f"features_only: not available for {base} with gates ({reason(error)})"
        ) from error
    if not same:
        raise UsageError(
            f"features_only: not available for {base} with gates; try forward_intermediates"
        )
    return model


def _feature_cfg(features: Any, whole: nn.Module) -> dict[str, Any]:
    """timm's `feature_cfg` of a network, which only its builder knows, inferred from the result."""
    # a custom class: features by forward_intermediates, which the caller compares
    kind = _FEATURES.get(type(features), "getter")
    cfg: dict[str, Any] = {
        "feature_cls": kind,
        "out_indices": tuple(features.feature_info.out_indices),
    }
    children = {name for name, _ in whole.named_children()}
    if kind in ("list", "dict", "hook"):
        cfg["flatten_sequential"] = not {n for n, _ in features.named_children()} <= children
    if kind == "hook":
        cfg["no_rewrite"] = "body" in dict(features.named_children())
        cfg["flatten_sequential"] &= not cfg["no_rewrite"]
    return cfg


def _features_of(features: Any) -> tuple[list[int], list[int]]:
    return features.feature_info.channels(), features.feature_info.reduction()
