"""record(): the attention maps of a network for the images that it last processed.

A submodule whose output is an attention map declares this with the attribute `attention_kind`:
"mixed" for a residual attention network's soft masks, "channel" and "spatial" for CBAM's and SE's
gates, "spatial" for AG-SonoNet's. Your own network can be recorded as soon as its submodules
have this attribute.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.compat import timm_channel_gates
from regard.errors import UsageError

SHAPES = {"mixed": "(B, C, H, W)", "channel": "(B, C, 1, 1)", "spatial": "(B, 1, H, W)"}
"""The kinds of attention maps, and their shapes."""


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One attention map of the last batch.

    Attributes:
        name: name of the submodule that made it, as in `model.get_submodule(name)`.
        kind: "mixed" (B, C, H, W), "channel" (B, C, 1, 1) or "spatial" (B, 1, H, W).
        values: a copy of the map as the submodule returned it, on its device and in its dtype.
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
    """The recorded maps by name, in the network's order of modules."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.kinds: dict[str, str] = dict(names)
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


def channel_gate_names(model: nn.Module) -> list[str]:
    """The submodules that gate channels: CBAM's and SE's, Regard's and timm's.

    timm's can't be recorded, as their output is the gated map.
    """
    theirs = timm_channel_gates()
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "attention_kind", None) == "channel" or isinstance(module, theirs)
    ]


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UsageError(
                "record() needs the uncompiled model, as a compiled one passes over its hooks: "
                "record the model that was given to torch.compile (compiled._orig_mod)"
            )


def _check_kinds(kinds: Mapping[str, str]) -> None:
    for name, kind in kinds.items():
        if kind not in SHAPES:
            where = name or "the network"
            raise UsageError(f"{where}.attention_kind={kind!r}: choose one of {', '.join(SHAPES)}")


def _check_map(name: str, kind: str, output: object) -> None:
    """Refuses an output that would be read along other dimensions than its own."""
    where = name or "the network"
    if not isinstance(output, Tensor):
        raise UsageError(
            f"{where} returns a {type(output).__name__}: give the attention_kind to a submodule "
            "that returns its map alone"
        )
    shape = tuple(output.shape)
    fits = len(shape) == 4 and (kind == "mixed" or shape[1] == 1)
    if kind == "channel":
        fits = len(shape) > 1 and set(shape[2:]) <= {1}
    if not fits:
        raise UsageError(f"{where} returns {shape}: a {kind} map is {SHAPES[kind]}")


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A module's hook that ignores calls of other threads that use the same network."""
    own = threading.get_ident()

    @functools.wraps(hook)
    def watch(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == own else None

    return watch


@contextmanager
def record(model: nn.Module, *, this_thread: bool = False) -> Iterator[AttentionMaps]:
    """Records a network's attention maps within the block.

    Examples:
        >>> with regard.record(model) as maps:
        ...     logits = model(images)
        >>> maps["gate3.map"].values.shape
        torch.Size([2, 1, 52, 68])

    The maps are those of the last call. Recording does not change the output by a single bit
    and leaves nothing behind, even after an exception.

    Args:
        model: the network.
        this_thread: ignore calls of other threads that use the same network.

    Raises:
        UsageError: the network has no attention maps, or is compiled; or, when the network is
            called, a submodule with an attention_kind does not return such a map.
        RuntimeError: the network is being compiled while it is recorded.
    """
    _refuse_compiled(model)
    kinds = attention_kinds(model)
    if not kinds:
        raise UsageError(
            f"{type(model).__name__} has no attention maps to record: use a network of Regard's, "
            "or give your own submodules an attention_kind"
        )
    _check_kinds(kinds)
    maps = AttentionMaps(kinds)

    def keep(name: str, kind: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if torch.compiler.is_compiling():
                raise RuntimeError("record() needs the uncompiled model: compile it afterwards")
            _check_map(name, kind, output)
            # a copy, as the network may go on in place: mask.mul_(x)
            maps._maps[name] = AttentionMap(name, kind, output.detach().clone())

        return hook

    handles = []
    try:
        for name, kind in kinds.items():
            hook = of_this_thread(keep(name, kind)) if this_thread else keep(name, kind)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield maps
    finally:
        for handle in handles:
            handle.remove()


Reduce = Literal["mean", "max"] | int


@dataclass(frozen=True, eq=False)
class StageMap:
    """One map of one image.

    Attributes:
        name: the submodule, such as "layer1.1.mask", or the stage whose blocks were averaged.
        kind: "spatial", "mixed" or "gradcam" with values (h, w), or "channel" with (C,).
        values: float32.
        reduction: how several maps became one, such as "mean of 256 channels"; may be empty.
        stage: the part of the network that it belongs to, such as "layer1" or "gate3".
    """

    name: str
    kind: str
    values: NDArray[np.float32]
    reduction: str
    stage: str


def stage_of(name: str) -> str:
    """The stage of a submodule: its name up to its block's number, or its parent's name.

    >>> stage_of("layer1.0.se.spatial"), stage_of("blocks.3.0.se"), stage_of("gate3.map")
    ('layer1', 'blocks.3', 'gate3')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal() and i > 0]
    return ".".join(parts[: numbers[-1]] if numbers else parts[:-1]) or name


def _reduced(found: AttentionMap, index: int, reduce: Reduce) -> StageMap:
    """One module's map for image `index`, with its channels reduced as `reduce` says."""
    values = found.values[index].float()  # (C, H, W), (C, 1, 1) or (1, H, W)
    count, words = len(values), ""
    if found.kind == "channel":
        values = values.flatten()
    elif count == 1:
        values = values[0]
    elif reduce == "mean":
        values, words = values.mean(dim=0), f"mean of {count} channels"
    elif reduce == "max":
        values, words = values.amax(dim=0), f"max of {count} channels"
    elif 0 <= reduce < count:
        values, words = values[reduce], f"channel {reduce} of {count}"
    else:
        raise UsageError(f"reduce={reduce}: {found.name} has channels 0 to {count - 1}")
    array = values.cpu().numpy().copy()
    return StageMap(found.name, found.kind, array, words, stage_of(found.name))


def check_reduce(reduce: object) -> None:
    """Refuses what is no reduction of a mask's channels.

    Raises:
        UsageError: neither "mean", "max" nor a channel number.
    """
    number = isinstance(reduce, int) and not isinstance(reduce, bool)
    if reduce not in ("mean", "max") and not number:
        raise UsageError(f"reduce={reduce!r}: choose mean, max or a channel number")


def module_maps(maps: AttentionMaps, index: int, *, reduce: Reduce = "mean") -> list[StageMap]:
    """One map per module for one image of the batch, in the network's order.

    Args:
        maps: of `regard.record`.
        index: the image's position in the batch.
        reduce: how the channels of a "mixed" mask become one map: "mean", "max" or the number
            of one channel.

    Raises:
        UsageError: another reduction, or a channel that a mask does not have.
    """
    check_reduce(reduce)
    counts = [len(m.values[index]) for m in maps.values() if m.kind != "channel"]
    if isinstance(reduce, int) and counts and not 0 <= reduce < max(counts):
        raise UsageError(
            f"reduce={reduce}: the maps of this network have "
            + ("one channel" if max(counts) == 1 else f"channels 0 to {max(counts) - 1}")
        )
    return [_reduced(m, index, reduce) for m in maps.values()]


def group_by_stage(each: Iterable[StageMap]) -> list[StageMap]:
    """Averages the blocks of a stage whose maps have the same kind and size, as with CBAM.

    "mixed" masks stay one per module. If a stage has blocks with maps of several sizes, as
    where all blocks of a network form one sequence, the names have the sizes: "blocks 8×8". This is
    the only grouping: figures, scores, reports and the server show its maps under its names.
    """
    groups: dict[Any, list[StageMap]] = {}
    for m in each:
        alone = m.name if m.kind == "mixed" else ""
        groups.setdefault((m.stage, m.kind, m.values.shape, alone), []).append(m)
    averaged = Counter((stage, kind) for (stage, kind, *_), of in groups.items() if len(of) > 1)
    grouped = []
    for (stage, kind, shape, _), members in groups.items():
        if len(members) == 1:
            grouped += members
            continue
        values = np.mean([m.values for m in members], axis=0)
        size = f" {'×'.join(map(str, shape))}" if averaged[stage, kind] > 1 else ""
        how = f"mean of {len(members)} blocks"
        grouped.append(StageMap(f"{stage}{size}", kind, values, how, stage))
    return grouped


def attention_stages(maps: AttentionMaps, index: int, *, reduce: Reduce = "mean") -> list[StageMap]:
    """`module_maps`, grouped by stage."""
    return group_by_stage(module_maps(maps, index, reduce=reduce))


def own_maps(model: nn.Module, x: Tensor, reduce: Reduce = "mean") -> dict[str, Tensor]:
    """The network's own maps over positions by stage, (B, h, w) each; empty if it has none."""
    if not attention_kinds(model):
        return {}
    by_name: dict[str, list[Tensor]] = {}
    with torch.no_grad(), evaluating(model), record(model, this_thread=True) as maps:
        model(x)
    for i in range(len(x)):
        for m in attention_stages(maps, i, reduce=reduce):
            if m.kind != "channel":
                by_name.setdefault(m.name, []).append(torch.from_numpy(m.values))
    return {name: torch.stack(each) for name, each in by_name.items()}


_LOCKS: "WeakKeyDictionary[nn.Module, Any]" = WeakKeyDictionary()
_LOCKING = threading.Lock()


def _lock_of(model: nn.Module) -> Any:
    """The network's own lock: a mode belongs to a network, not to the thread that sets it."""
    with _LOCKING:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the network in evaluation mode, without gradient checkpointing, within the block.

    Every submodule's own mode is restored, even after an exception. Only one thread at a time can
    run such a block for a network.
    """
    with _lock_of(model):
        modes = [(m, m.training) for m in model.modules()]
        checkpointed = [
            m for m in model.modules() if getattr(m, "grad_checkpointing", False) is True
        ]
        try:
            model.eval()
            for m in checkpointed:
                m.grad_checkpointing = False  # type: ignore[assignment]
            yield
        finally:
            for m in checkpointed:
                m.grad_checkpointing = True  # type: ignore[assignment]
            for m, mode in modes:
                m.training = mode
