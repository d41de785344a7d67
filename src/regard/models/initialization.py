"""Initialization by name, so that twins start from the same weights.

A network draws one seed from torch's generator. Each layer is then initialized with its own
generator, seeded by that seed and the layer's name: two networks that share a layer's name and
shape share its initial weights, whatever their other layers, and both leave torch's generator in
the same state.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[[nn.Module, torch.Generator], None]


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Restores torch's random number generators, the default device's included."""
    device = torch.get_default_device()
    index = torch.cuda.current_device() if device.type == "cuda" else None
    devices = [] if index is None else [index if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        yield


def initialized_by_name(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates a network's `__init__`, whose last step, `init_weights()`, is called here.

    The random numbers drawn by PyTorch's own initialization of the layers are undone.
    """

    @functools.wraps(init)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        with preserved_rng_state():
            init(self, *args, **kwargs)
        self.init_weights()

    return build


def initialize(model: nn.Module, rule: Rule) -> None:
    """Applies `rule(layer, generator)` to every layer of `model` that has its own parameters.

    A submodule with a method `init_gate(generator)` is initialized by that, as a whole.
    Layers on the meta device are skipped.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))

    def visit(name: str, module: nn.Module) -> None:
        own = getattr(module, "init_gate", None)
        first = next(module.parameters(recurse=own is not None), None)
        if first is not None and not first.is_meta:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator(first.device)
            generator.manual_seed(int.from_bytes(digest[:7], "big"))
            rule(module, generator) if own is None else own(generator)
        if own is None:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}", child)

    visit("", model)


def pytorch_default(layer: nn.Module, generator: torch.Generator | None) -> None:
    """PyTorch's initialization of a convolution or linear layer: U(±1 / sqrt(fan-in))."""
    assert isinstance(layer.weight, Tensor)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if isinstance(layer.bias, Tensor):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
