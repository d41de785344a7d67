"""record(): the attention maps of a network, as they were on the images it last saw.

A submodule whose output is an attention map says so with the attribute `attention_kind`:
"mixed" for a residual attention network's soft masks, "channel" and "spatial" for CBAM's
and SE's gates, "spatial" for AG-SonoNet's. A network of one's own is recorded as soon as
its submodules say the same.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One attention map of the last batch.

    Attributes:
        name: of the submodule that made it, as in `model.get_submodule(name)`.
        kind: "mixed" (B, C, H, W), "channel" (B, C, 1, 1) or "spatial" (B, 1, H, W).
        values: the map as the network used it, detached, on its device, in its precision.
    """

    name: str
    kind: str
    values: Tensor

    def spatial(self) -> Tensor | None:
        """The map over positions, (B, H, W): the mean over channels; None for "channel"."""
        return None if self.kind == "channel" else self.values.mean(dim=1)

    def __repr__(self) -> str:
        return f"AttentionMap({self.name!r}, {self.kind}, {tuple(self.values.shape)})"


class AttentionMaps(Mapping[str, AttentionMap]):
    """The recorded maps by name, in the order in which the network has them."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.kinds = dict(names)
        self._maps: dict[str, AttentionMap] = {}

    def __getitem__(self, name: str) -> AttentionMap:
        if name not in self._maps and name in self.kinds:
            raise KeyError(
                f"{name}: nothing recorded yet; call the very model given to record(), uncompiled"
            )
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.kinds if name in self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        return f"AttentionMaps({list(self.values())!r})"


def attention_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each attention map of `model`, by name; empty if it has none."""
    return {
        name: module.attention_kind
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attention_kind", None), str)
    }


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                "record() needs the uncompiled model, as a compiled one passes over its hooks: "
                "record the model that was given to torch.compile (compiled._orig_mod)"
            )


@contextmanager
def record(model: nn.Module) -> Iterator[AttentionMaps]:
    """Records a network's attention maps while the block runs.

    >>> with regard.record(model) as maps:
    ...     logits = model(images)
    >>> maps["gate3.map"].values.shape
    torch.Size([2, 1, 52, 68])

    The maps are those of the last call. Recording changes no bit of the output and leaves
    nothing behind, also after an exception.

    Raises:
        ValueError: the network has no attention maps, or is compiled.
        RuntimeError: the network is being compiled while it is recorded.
    """
    _refuse_compiled(model)
    kinds = attention_kinds(model)
    if not kinds:
        raise ValueError(
            f"{type(model).__name__} has no attention maps to record: use a network of Regard's, "
            "or give your own submodules an attention_kind"
        )
    maps = AttentionMaps(kinds)

    def keep(name: str, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if torch.compiler.is_compiling():
                raise RuntimeError("record() needs the uncompiled model: compile it afterwards")
            maps._maps[name] = AttentionMap(name, kind, output.detach())

        return hook

    handles = []
    try:
        for name, kind in kinds.items():
            handles.append(model.get_submodule(name).register_forward_hook(keep(name, kind)))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
