"""What is deployed of a network: pixels in, probabilities out, and nothing outside the graph."""

import copy
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from regard.attention import attention_kinds
from regard.data.preprocess import Preprocess


class Deployed(nn.Module):
    """The preprocessing after resizing, the network, and the softmax, as one module.

    Args:
        model: in evaluation mode; its weights are shared, not copied.
        preprocess: how the network's images are standardised.
        maps: names of attention modules whose maps come out as well.

    Shapes: (B, C, H, W) in 0..255 -> probabilities (B, classes) in float32, and with `maps`
    a tuple of them and each map as (B, h, w), the mean over its channels.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, maps: list[str] | None = None):
        super().__init__()
        self.model, self.preprocess = model, preprocess
        self.maps = maps or []
        self._seen: dict[str, Tensor] = {}
        for name in self.maps:
            model.get_submodule(name).register_forward_hook(self._keep(name))
        self.dtype = next(model.parameters()).dtype

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._seen[name] = output

        return hook

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.preprocess.normalise(images).to(self.dtype)
        shares = self.model(x).float().softmax(dim=1)
        if not self.maps:
            return shares
        seen = [self._seen.pop(name).float().mean(dim=1) for name in self.maps]
        return (shares, *seen)


def spatial_maps(model: nn.Module) -> list[str]:
    """The names of the attention modules whose maps say where: all but channel gates."""
    return [name for name, kind in attention_kinds(model).items() if kind != "channel"]


class _Tracer(fx.Tracer):
    """Sees what timm's own tracing sees, in any network that obeys timm's rules."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy in which each BN that only follows one convolution is part of it.

    The same function to rounding, with fewer passes over the maps; done in the weights' own
    precision, before any cast to bf16. A BN before its convolution (pre-activation units) stays.
    Where the network can't be traced the copy is as it was.
    """
    model = copy.deepcopy(model).eval()
    try:
        graph = _Tracer().trace(model)
    except Exception:  # control flow of its data: no harm, the engines fold what they can
        return model
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in graph.nodes:
        bn = modules.get(node.target) if node.op == "call_module" else None
        if type(bn) is not nn.BatchNorm2d or calls[node.target] > 1:
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if type(conv) is not nn.Conv2d or calls[before.target] > 1 or len(before.users) > 1:
            continue
        assert bn.running_mean is not None
        assert bn.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        conv.weight, conv.bias = weight, bias
        parent, _, name = node.target.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    return model
