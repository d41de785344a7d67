"""Where gates go in a network: at the ends of its residual branches, else of its stages.

Residual branches are found by tracing one image through the network: where two maps of the same
size are added, the one computed by more operations is the branch. Additions within blocks that
are merged into one convolution for prediction (timm's `reparameterize_model`) do not count. A
network without additions (VGG, DenseNet, SonoNet) has stages, which its `feature_info` names.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from regard.attention import evaluating
from regard.errors import UsageError

_AFFINE_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")

Tap = dict[str, Any]
"""The arguments of a gate: channels, and whether they come last."""


@dataclass
class End:
    """Where a branch or stage ends: the module that outputs it, and arguments of the gates."""

    made_by: str  # innermost: the gates may follow a module that contains it
    tap: Tap


def resnet_ends(model: nn.Module) -> dict[str, End]:
    """The blocks of timm's own ResNets, which have a slot for attention; else nothing."""
    if not isinstance(model, ResNet):
        return {}
    blocks = {n: m for n, m in model.named_modules() if hasattr(m, "se")}
    if any(type(m) not in (BasicBlock, Bottleneck) for m in blocks.values()):
        return {}
    if any(foldable_norm(m) is None for m in blocks.values()):
        return {}
    return {n: End(n, {"channels": foldable_norm(m).weight.numel()}) for n, m in blocks.items()}


class _Watch(TorchFunctionMode):
    """Tracks which tensors each tensor was computed from, and where two maps are added.

    Ancestors are the bits of an integer, one bit per tensor.
    """

    def __init__(self, x: Tensor, merging: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.merging: set[int] = {id(module) for module in merging.values()}
        self.ancestors: dict[int, int] = {id(x): 1}
        self.alive: list[Any] = [x]  # keeps tensors alive, so that no id is reused
        self.made_by: dict[int, list[str]] = {}  # from the innermost module outwards
        self.passed_by: dict[int, list[str]] = {}
        self.given_by: dict[int, list[str]] = {}  # made or passed on, in the order of finishing
        self.calls: dict[str, int] = {}
        self.inside: list[nn.Module] = []  # the modules being executed
        self.merged: int = 0  # additions within what becomes one layer
        self.branches: list[tuple[list[str], torch.Size]] = []  # who made it, and its shape
        self.maps: dict[str, Tensor] = {}  # each module's latest output, or the first of several

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [t for t in given if id(t) in self.ancestors]
        # GRN's internal sum, for example, is not a branch
        inner = self.inside and next(self.inside[-1].children(), None) is None
        if getattr(func, "__name__", "") in _ADDITIONS and len(known) == 2 and not inner:
            if any(id(module) in self.merging for module in self.inside):
                self.merged += 1
            else:
                self._add(*known)
        out = func(*args, **(kwargs or {}))
        before = 0
        for t in known:
            before |= self.ancestors[id(t)]
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and before:
                self.ancestors[id(t)] = before | 1 << len(self.alive)
                self.alive.append(t)
        return out

    def _add(self, a: Tensor, b: Tensor) -> None:
        if a.shape != b.shape or a.ndim < 3:
            return
        before = {id(t): self.ancestors[id(t)] for t in (a, b)}
        branch, shortcut = sorted((a, b), key=lambda t: -before[id(t)].bit_count())
        own = before[id(shortcut)] & ~before[id(branch)]
        # the shortcut is an earlier map, or a projection of one: a few operations of one module
        projected = own.bit_count() <= 4 and id(shortcut) in self.made_by
        if before[id(branch)] & ~before[id(shortcut)] and (own == 0 or projected):
            # recorded now: a later in-place module may return the same tensor with other values
            names = self.made_by.get(id(branch)) or self.passed_by.get(id(branch)) or []
            self.branches.append((list(names), branch.shape))

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.inside.append(module)

    def hook_of(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            self.inside.pop()
            self.calls[name] = self.calls.get(name, 0) + 1
            given = next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None)
            if given is not None:
                self.maps[name] = given
            if isinstance(output, Tensor):
                passed = any(t is output for t in inputs)
                alone = len(inputs) == 1 and isinstance(inputs[0], Tensor) and not named
                for by in (self.passed_by if passed else self.made_by, self.given_by):
                    by.setdefault(id(output), []).extend([name] * alone)

        return hook


def find_ends(model: nn.Module, x: Tensor) -> dict[str, End]:
    """The end of each residual branch, by the name of the module that gates follow.

    For a network without residual branches: the end of each stage.

    Raises:
        UsageError: there are neither, or a branch does not end in a module or in a map.
    """
    merging = {n: m for n, m in model.named_modules() if n and _merges(m)}
    watch = _Watch(x, merging)
    named = [(n, m) for n, m in model.named_modules() if n]
    handles = [m.register_forward_hook(watch.hook_of(n), with_kwargs=True) for n, m in named]
    handles += [m.register_forward_pre_hook(watch.enter) for _, m in named]  # not the whole
    try:
        with torch.no_grad(), evaluating(model), watch:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    kind = type(model).__name__
    ends: dict[str, End] = {}
    for number, (names, shape) in enumerate(watch.branches, start=1):
        apart = [n for n in names if not any(n.startswith(f"{above}.") for above in merging)]
        if names and not apart:
            continue
        where = f"residual branch {number} of {kind}" + (f" ({names[0]})" if names else "")
        if len(shape) != 4:
            raise UsageError(f"{where} ends in {tuple(shape)}, no map (B, C, H, W) for the gates")
        if not names:
            raise UsageError(f"{where} does not end in a module that gates could follow")
        if watch.calls[names[0]] > 1:
            raise UsageError(f"{where} ends in a module that is used {watch.calls[names[0]]} times")
        last = _channels_last(model, model.get_submodule(names[0]), shape)
        tap = {"channels": shape[3 if last else 1], "channels_last": last}
        ends[apart[0]] = End(names[0], tap)
    if not ends and watch.merged:
        raise UsageError(
            f"graft() found no residual branches in {kind}: its blocks merge their layers for "
            "prediction, and would merge away the gates"
        )
    ends = ends or _stage_ends(model, watch)
    if not ends:
        raise UsageError(
            f"graft() found no residual branches in {kind}, as nothing is added to a map, nor "
            "stages that end in a map"
        )
    return ends


def _stage_ends(model: nn.Module, watch: _Watch) -> dict[str, End]:
    """Each stage that ends in a map: its last layer, before any pooling.

    The innermost layer, as its parents may be bypassed, such as when a stage is checkpointed. If a
    stage outputs several maps, the layer is that of the first one, which timm names.
    """
    ends: dict[str, End] = {}
    for stage in getattr(model, "feature_info", None) or ():
        last = str(stage["module"])
        found = watch.maps.get(last)
        if found is None or found.ndim != 4:
            continue
        giving = watch.given_by.get(id(found), [])
        names = giving[: giving.index(last)] if last in giving else giving
        module = model.get_submodule(last)
        for name in reversed(names):
            whole = isinstance(module, _AFFINE_NORMS) or id(module) in watch.merging
            if name.startswith(f"{last}.") and not whole:
                last, module = name, model.get_submodule(name)
        if last in giving and watch.calls[last] == 1 and not isinstance(module, _POOLS):
            by = _channels_last(model, module, found.shape)
            tap = {"channels": found.shape[3 if by else 1], "channels_last": by}
            ends[last] = End(last, tap)
    return ends


def _merges(module: nn.Module) -> bool:
    """Whether timm's `reparameterize_model` merges a module inside the network into one layer."""
    if not hasattr(module, "fuse"):
        return hasattr(module, "reparameterize") or hasattr(module, "switch_to_deploy")
    twin: Any = copy.deepcopy(module).eval()
    return twin.fuse() is not twin  # a residual block without convolutions returns itself


def _channels_last(model: nn.Module, module: nn.Module, shape: torch.Size) -> bool:
    """Whether a module outputs (B, H, W, C)."""
    if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
        return True
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0] != shape[1] and weight.shape[0] == shape[3]
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def foldable_norm(module: nn.Module) -> Any:
    """The affine norm whose output ends a branch, or None."""
    if type(module) in (BasicBlock, Bottleneck):
        module = module.bn3 if isinstance(module, Bottleneck) else module.bn2  # type: ignore[assignment]
    if not isinstance(module, _AFFINE_NORMS) or not isinstance(
        getattr(module, "act", nn.Identity()), nn.Identity
    ):
        return None
    has_both = module.weight is not None and getattr(module, "bias", None) is not None
    return module if has_both else None
