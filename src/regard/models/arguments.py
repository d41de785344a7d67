"""The arguments of each network that a paper varies or that set its size, and their choices."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.models import list_models
from regard.models.attention_gate import NORMALIZATIONS
from regard.models.attention_mobilenet import width_of
from regard.models.cbam import CBAM, CHANNEL_POOLS, ORDERS, SPATIAL_POOLS
from regard.models.residual_attention import (
    ACTIVATIONS,
    MASKS,
    RESIDUALS,
    ResidualAttentionNet,
)
from regard.models.residual_attention_variants import arguments_by_name
from regard.models.sononet import AGGREGATIONS, AGSonoNet, SonoNet
from regard.models.zoo import twins_of

_COUNT, _COUNTS = "a whole number, at least 1", "three whole numbers"

CHOICES: dict[str, tuple[str, ...] | str] = {
    "order": ORDERS,
    "channel_pool": CHANNEL_POOLS,
    "spatial_pool": SPATIAL_POOLS,
    "kernel_size": "an odd number",
    "reduction": _COUNT,
    "width": "a number: the factor of all channels",
    "stem": ("imagenet", "cifar"),
    "zero_init_last": ("False", "True"),
    "attention": RESIDUALS,
    "mask": MASKS,
    "mask_activation": ACTIVATIONS,
    "unit": ("preact", "resnext"),
    "modules": _COUNTS,
    "units": _COUNTS,
    "depths": _COUNTS,
    "channels": "four or five whole numbers: the stem's and the stages'",
    "p": _COUNT,
    "t": _COUNT,
    "r": _COUNT,
    "aggregation": AGGREGATIONS,
    "normalize": NORMALIZATIONS,
    "features": _COUNT,
    "convs": "five whole numbers, each at least 1",
}


@dataclass(frozen=True)
class Argument:
    """One argument of a network.

    Attributes:
        name: for create_model() and `--arg`.
        default: the network's default.
        choices: all possible values, or a description of them.
    """

    name: str
    default: Any
    choices: tuple[str, ...] | str


def arguments(network: str) -> list[Argument]:
    """The arguments of one of Regard's networks, starting with those that the papers vary.

    >>> arguments("se_resnet50")[0]
    Argument(name='reduction', default=16, choices='a whole number, at least 1')
    """
    defaults: dict[str, Any] = {}
    if network in list_models():
        for owner, own in _owners(network):
            defaults |= _keywords(owner) | own
    unused: set[str] = set()
    if defaults.get("attention") == "none":  # the trunk alone
        unused = {"mask", "mask_activation", "depths", "r"}
    if not any(defaults.get("modules", [True])):
        unused = {"attention", "mask", "mask_activation", "depths", "p", "t", "r"}
    names = [name for name in CHOICES if name in defaults.keys() - unused]
    return [Argument(name, defaults[name], CHOICES[name]) for name in names]


def _owners(network: str) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """The callables that take a network's arguments, and the values that its name sets."""
    if network.removeprefix("ag_").startswith("sononet"):
        features = {"features": int(re.findall(r"\d+$", network)[0])}
        return [(AGSonoNet if network.startswith("ag_") else SonoNet, features)]
    family = twins_of(network)
    if "cbam" not in family:
        return [(ResidualAttentionNet, arguments_by_name(network))]
    gates: dict[str, Callable[..., Any]] = {family["cbam"]: CBAM, family["se"]: _se}
    owners: list[tuple[Callable[..., Any], dict[str, Any]]] = (
        [(gates[network], {})] if network in gates else []
    )
    if "mobilenet" in network:
        return [*owners, (_mobilenet, {"width": width_of(network)})]
    return [*owners, (_resnet, {})]


def _se(*, reduction: int = 16) -> None:
    """The arguments that SE's gates share with CBAM."""


def _resnet(*, stem: str = "imagenet", zero_init_last: bool = False) -> None:
    """AttentionResNet's arguments other than timm's and the gates'."""


def _mobilenet(*, width: float = 1.0) -> None:
    """AttentionMobileNet's arguments other than timm's and the gates'."""


def _keywords(owner: Callable[..., Any]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(owner).parameters.items()
        if name in CHOICES and parameter.kind is parameter.KEYWORD_ONLY
    }
