"""What is deployed of a network: pixels in, probabilities out, and nothing outside the graph."""

import copy
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from regard.attention import attention_kinds
from regard.data.preprocess import Preprocess


class Deployed(nn.Module):
    """The preprocessing after resizing, the network, and the softmax, as one module.

    Args:
        model: in evaluation mode; its weights are shared, not copied.
        preprocess: how the network's images are standardized.
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
        x = self.preprocess.normalize(images).to(self.dtype)
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


def _joined(
    model: nn.Module, first: type[nn.Module], then: type[nn.Module]
) -> list[tuple[str, str]]:
    """Names of two modules of these types, the second called with what the first gave.

    Both are called once, and nothing else sees what is between them. Empty where the network
    can't be traced, as its control flow depends on data.
    """
    try:
        nodes = _Tracer().trace(model).nodes
    except Exception:  # of whatever kind: no harm, the engines do what they can without
        return []
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in nodes if node.op == "call_module")

    def is_one(node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and type(modules[str(node.target)]) is kind

    found = []
    for node in nodes:
        if not is_one(node, then) or calls[node.target] > 1:
            continue
        before = node.args[0]
        while is_one(before, nn.Identity) and len(before.users) == 1:
            before = before.args[0]
        if is_one(before, first) and calls[before.target] == 1 and len(before.users) == 1:
            found.append((before.target, node.target))
    return found


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, by)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy in which each BN that only follows one convolution is part of it.

    The same function to rounding, with fewer passes over the maps; done in the weights' own
    precision, before any cast to bf16. A BN before its convolution (pre-activation units) stays.
    Where the network can't be traced the copy is as it was.
    """
    model = copy.deepcopy(model).eval()
    for of_conv, of_bn in _joined(model, nn.Conv2d, nn.BatchNorm2d):
        conv: Any = model.get_submodule(of_conv)
        bn: Any = model.get_submodule(of_bn)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        _replace(model, of_bn, nn.Identity())
    return model


class PairedColumns(nn.Module):
    """A 3x3 convolution to few channels, and its ReLU, two neighboring columns at once.

    A vector register holds 16 numbers, and a convolution's kernel fills it with channels: of
    8 channels half of each multiplication is lost. Here the 2 x 8 values of two columns are
    the channels of one 3x4 convolution of stride 2 across, for a third more multiplications
    in half as many registers. In channels_last the result has the very layout of the map that
    it stands for, so that nothing is copied. Of an odd width the convolution stays as it is.

    Shapes: (B, C, H, W) -> (B, channels, H, W).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.relu = conv, False
        weight = conv.weight
        wide = weight.new_zeros(2, *weight.shape[:3], 4)
        wide[0, ..., :3] = weight
        wide[1, ..., 1:] = weight
        self.weight = nn.Parameter(wide.flatten(0, 1))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.repeat(2))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            y = self.conv(x)
            return F.relu(y) if self.relu else y
        y = F.conv2d(x, self.weight, self.bias, stride=(1, 2), padding=1)
        y = (F.relu(y) if self.relu else y).permute(0, 2, 3, 1)  # (B, H, W / 2, 2 channels)
        batch, height, half, _ = y.shape
        return y.reshape(batch, height, 2 * half, self.conv.out_channels).permute(0, 3, 1, 2)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether this convolution is of the kind, and this CPU has registers of 16 numbers."""
        return (
            conv.out_channels <= 8
            and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
            and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
            and torch.backends.cpu.get_cpu_capability() == "AVX512"
        )


@torch.no_grad()
def pair_columns(model: nn.Module) -> nn.Module:
    """Puts PairedColumns in the place of each convolution that it fits; the same function.

    The network is changed, in evaluation mode, and given back.
    """
    rectified = dict(_joined(model, nn.Conv2d, nn.ReLU))
    for name, conv in list(model.named_modules()):
        if type(conv) is not nn.Conv2d or not PairedColumns.fits(conv):
            continue
        paired = PairedColumns(conv)
        if name in rectified:
            paired.relu = True
            _replace(model, rectified[name], nn.Identity())
        _replace(model, name, paired)
    return model
