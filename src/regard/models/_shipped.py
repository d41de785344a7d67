"""Registers networks with timm together with the weights that come with Regard.

`create_model("ag_sononet8", pretrained=True)` and `"ag_sononet8.digits"` load them, with the
arguments that they were trained with. Without `pretrained=True` a network is as in the paper: its
number of classes and its input do not depend on which weights come with Regard. That is why the
entry without a tag stays the default, whereas timm's own networks default to a pretrained one.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import PretrainedCfg
from timm.models import generate_default_cfgs as _generate
from timm.models import register_model as _register
from torch import nn

from regard.compat import mark_pretrained
from regard.errors import UsageError
from regard.models._common import FREE_ARGUMENTS, as_json
from regard.models.cbam import CBAM
from regard.weights import Weights, find_shipped, shipped

_SOURCES = ("file", "url", "hf_hub_id", "state_dict")


def generate_default_cfgs(cfgs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """timm's function of this name, with an added entry for each of the shipped weights."""
    made: dict[str, Any] = _generate({name: dict(cfg) for name, cfg in cfgs.items()})
    for each in shipped().values():
        if (default := made.get(each.architecture)) is not None:
            default.cfgs[each.tag] = PretrainedCfg(**each.pretrained_cfg())
            default.tags.append(each.tag)
            default.is_pretrained = True
    return made


def register_model(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's decorator of this name; `pretrained=True` loads the shipped weights."""

    @functools.wraps(make)
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        found = _asked_for(make.__name__, kwargs) if pretrained else None
        if found is None:
            return make(pretrained=pretrained, **kwargs)
        found.verify()
        trained_with = found.config.get("model_args", {})
        _refuse_others(found, make, kwargs)
        model = make(pretrained=True, **_arguments(found, trained_with, kwargs))
        again: Any = dict(trained_with)  # what rebuilds the network once it is saved
        model._model_args = again
        return model

    registered: Callable[..., nn.Module] = _register(create)
    if find_shipped(make.__name__) is not None:
        mark_pretrained(make.__name__)
    return registered


def _asked_for(name: str, kwargs: Mapping[str, Any]) -> Weights | None:
    """The shipped weights that a call of create_model means; None for weights from elsewhere."""
    cfg = kwargs.get("pretrained_cfg")
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if any(overlay.get(source) for source in _SOURCES) or (cfg and not isinstance(cfg, str)):
        return None
    return find_shipped(f"{name}.{cfg}" if cfg else name)


# arguments that change no output in evaluation, or only select outputs
_HARMLESS = (
    *FREE_ARGUMENTS, "drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last", "device",
    "dtype", "features_only", "out_indices", "feature_cls", "output_fmt", "pretrained_cfg",
    "pretrained_cfg_overlay", "pretrained_strict", "cache_dir",
)  # fmt: skip


def _refuse_others(
    found: Weights, make: Callable[..., nn.Module], kwargs: Mapping[str, Any]
) -> None:
    """Refuses other values of arguments that had their defaults when the weights were trained.

    Shapes may not reveal them: `channel_pool="max"` would load and compute something else.

    Raises:
        UsageError: an argument has another value.
    """
    own = {k: v for k, v in found.config.get("model_args", {}).items() if k not in FREE_ARGUMENTS}
    if not (others := {k: v for k, v in kwargs.items() if k not in (*own, *_HARMLESS)}):
        return
    defaults = _defaults(type(make(pretrained=False, **own)))
    for name, value in others.items():
        if name not in defaults or as_json(defaults[name]) != as_json(value):
            had = f"{name}={defaults[name]!r}" if name in defaults else f"a network without {name}"
            raise UsageError(f"{name}={value!r}: the weights {found.name} are for {had}")


def _defaults(network: type[nn.Module]) -> dict[str, Any]:
    """The defaults of all arguments that a network accepts, including its gates'."""
    found: dict[str, Any] = {}
    for each in (CBAM, *reversed(network.__mro__)):
        if (init := vars(each).get("__init__")) is None:
            continue
        for parameter in inspect.signature(init).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                found[parameter.name] = parameter.default
    return found


def _arguments(
    found: Weights, trained_with: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that make the network of these weights.

    Raises:
        UsageError: an argument differs from that in the training of the weights.
    """
    own = {k: v for k, v in trained_with.items() if k not in FREE_ARGUMENTS}
    for name, value in own.items():
        if as_json(kwargs.get(name, value)) != as_json(value):
            raise UsageError(
                f"{name}={kwargs[name]!r}: the weights {found.name} are for {name}={value!r}"
            )
    return {**own, **kwargs, "pretrained_cfg": found.pretrained_cfg()}
