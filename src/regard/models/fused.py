"""The end of a ResNet block with CBAM as one operator: BN, both gates, + shortcut, ReLU.

In eager mode, a training step passes some 25 times over the block's map here; the fused forward
pass reads it three times and writes it once, the backward pass reads it three more times and
writes the gradients. Only sums over maps leave a pass, and the gates' own small layers are called
as modules: their parameters, autocast and gradients, including the exchange of gradients between
processes, are PyTorch's.

    x = (y - mean) * g + b        g = weight / sqrt(var + eps)
    z = x * c                     c = sigmoid(mlp(mean over positions) + mlp(max over positions))
    out = relu(z * s + k)         s = sigmoid(bn(conv([max over channels of z, mean of z])))

Three autograd functions share what their backward passes compute: in backward, `_Output` runs
first, `_Pooled` next, and `_Statistics`, on which all else depends, last; it writes y's gradient.

Sums are in float32 (float64 for float64 maps) whatever the maps' precision, so that in bf16 the
results are closer to those of float32 than the modules' are. Where several values are the
maximum, the gradient is divided among them, as in torch's `amax`.
"""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from regard.models import fused_torch
from regard.models.cbam import CBAM
from regard.models.fused_torch import Moments


@dataclass
class _Shared:
    """What the three functions of one call pass to each other.

    Small tensors are in float32 (float64), so that each is converted only once. None may belong to
    the graph whose nodes hold this object: the reference cycle would never be freed.
    """

    passes: Any  # the module with the passes over the map
    batch: Moments

    c: Tensor | None = None  # the channel gate, (B, 1, C)
    gc: Tensor | None = None  # g * c
    bc: Tensor | None = None  # b * c
    several: Tensor | None = None  # how many channels have a position's largest z, (B, P, 1)
    s: Tensor | None = None  # the spatial gate, (B, P, 1)

    # of the backward pass
    q: Tensor | None = None
    sums: Tensor | None = None  # of dz and of dz * (y - mean), (2, B, 1, C)
    count: Tensor | None = None
    share: Tensor | None = None
    pooled: tuple[Tensor, Tensor] | None = None  # and its gradient


class _Statistics(torch.autograd.Function):
    """Mean and max of x over positions, (2 * B, C), from y (B, P, C) and BN's weight and bias."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, shared: _Shared) -> Tensor:
        ctx.save_for_backward(y, weight)
        ctx.shared = shared
        return shared.batch.x_means.view(-1, y.shape[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dmeans: Tensor) -> Any:
        y, weight = ctx.saved_tensors
        shared: _Shared = ctx.shared
        assert shared.pooled is not None
        batch = shared.batch
        d = dmeans.to(batch.g.dtype).view_as(batch.means)
        dweight, dbias, *by_channel = shared.passes.statistics_backward(
            batch, weight, d, shared.c, shared.sums, shared.count, y.shape[1]
        )
        dy = shared.passes.input_backward(
            y, shared.q, batch.mean, shared.gc, shared.bc, shared.s, *shared.pooled, shared.share,
            batch.means[1], *by_channel,
        )  # fmt: skip
        shared.q = shared.sums = shared.share = shared.count = shared.pooled = None
        return dy, dweight.to(weight.dtype), dbias.to(weight.dtype), None


class _Pooled(torch.autograd.Function):
    """Max and mean of z over channels, (B, P, 2), from y and the channel gate (B, C)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, c: Tensor, shared: _Shared) -> Tensor:
        batch = shared.batch
        shared.c = gate = c.detach().to(batch.g.dtype)[:, None]
        shared.gc, shared.bc = batch.g * gate, batch.b * gate
        pooled: Tensor
        pooled, shared.several = shared.passes.pooled(y, batch.mean, shared.gc, shared.bc)
        ctx.save_for_backward(y, pooled)
        ctx.shared, ctx.kind = shared, c.dtype
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dpooled: Tensor) -> Any:
        """Returns the gate's whole gradient: the output's contribution is added here."""
        y, pooled = ctx.saved_tensors
        shared: _Shared = ctx.shared
        with torch.autocast(y.device.type, enabled=False):
            shared.sums, dc, shared.count, shared.share = shared.passes.pooled_backward(
                y, shared.batch, shared.gc, shared.bc, pooled, shared.several, dpooled, shared.sums
            )
        shared.pooled = pooled.detach(), dpooled  # saved outputs belong to the graph
        return None, dc[:, 0].to(ctx.kind), None


class _Output(torch.autograd.Function):
    """relu(z * s + k), (B, P, C), from y, k and the spatial gate (B, P, 1).

    Its gradient for the channel gate waits for `_Pooled`, whose backward comes after it because
    the spatial gate is computed from `_Pooled`'s result.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, k: Tensor, s: Tensor, shared: _Shared) -> Tensor:
        shared.s = s.detach().to(shared.batch.g.dtype)
        out: Tensor = shared.passes.output(y, k, shared.batch.mean, shared.gc, shared.bc, shared.s)
        ctx.save_for_backward(y, out)
        ctx.shared, ctx.kinds = shared, (k.dtype, s.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, go: Tensor) -> Any:
        y, out = ctx.saved_tensors
        shared: _Shared = ctx.shared
        with torch.autocast(y.device.type, enabled=False):
            shared.q, shared.sums, ds = shared.passes.output_backward(
                y, out, go.contiguous(), shared.batch.mean, shared.gc, shared.bc, shared.s
            )
        assert shared.q is not None
        return None, shared.q.to(ctx.kinds[0]), ds.to(ctx.kinds[1]), None


def fused_end(
    y: Tensor, shortcut: Tensor, norm: nn.BatchNorm2d, gates: CBAM, passes: Any = None
) -> Tensor:
    """relu(gates(norm(y)) + shortcut) in training mode; `norm`'s running means are updated.

    Args:
        y, shortcut: (B, C, H, W).
        norm, gates: modules for which `fits` is True.
        passes: the module with the passes (default: that for the device).
    """
    assert gates.channel is not None
    assert gates.spatial is not None
    batch, channels, height, width = y.shape
    rows = _rows(y)
    with torch.no_grad():
        chosen = passes or _passes(y.device)
        weight, bias = norm.weight.detach(), norm.bias.detach()
        shared = _Shared(chosen, chosen.statistics(rows, weight, bias, norm.eps))
        _update_running(norm, shared.batch, rows.shape[0] * rows.shape[1])
    means = _Statistics.apply(rows, norm.weight, norm.bias, shared)
    # one call of the MLP for both: on a GPU, a small layer takes as long as its launch
    c = torch.sigmoid(gates.channel.mlp(means).view(2, batch, channels).sum(0))
    pooled = _Pooled.apply(rows, c, shared)
    pooled = pooled.view(batch, height, width, 2).permute(0, 3, 1, 2)
    s = torch.sigmoid(gates.spatial.bn(gates.spatial.conv(pooled)))
    out = _Output.apply(rows, _rows(shortcut), _rows(s), shared)
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), a view if x is in channels_last."""
    return x.permute(0, 2, 3, 1).contiguous().view(len(x), -1, x.shape[1])


@functools.cache
def _passes(device: torch.device) -> Any:
    """The module with the passes for a device; None if there is none."""
    if device.type == "cpu":
        return fused_torch
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from regard.models import fused_triton

    return fused_triton


def can_fuse(device: torch.device) -> bool:
    """Whether there are passes for a device: a CPU, or a GPU with Triton."""
    return _passes(device) is not None


def _update_running(norm: nn.BatchNorm2d, batch: Moments, count: int) -> None:
    """Updates the running statistics like nn.BatchNorm2d in training."""
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    unbiased = batch.variance * (count / max(1, count - 1))
    norm.running_mean.lerp_(batch.mean.to(norm.running_mean), momentum or 0.0)
    norm.running_var.lerp_(unbiased.to(norm.running_var), momentum or 0.0)


# ------------------------------------------------------------------------------- in networks
# values in a map below which the modules are as fast (docs/performance.md): on a GPU because of
# launch overhead, unless the passes are recorded (training/graphs.py)
LEAST = {"cpu": 2**19, "cuda": 2**25}
_every_size = contextvars.ContextVar("every_size", default=False)


@contextlib.contextmanager
def fused_at_every_size() -> Iterator[None]:
    """Within this context, blocks with the smallest maps also end in one operator."""
    token = _every_size.set(True)
    try:
        yield
    finally:
        _every_size.reset(token)


def fits(block: nn.Module) -> bool:
    """Whether a block's end can be one operator: plain BN, CBAM in the paper's order, ReLU."""
    if not isinstance(block, BasicBlock | Bottleneck) or block.drop_path is not None:
        return False
    norm, gates, act = _parts(block)
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and type(gates) is CBAM
        and gates.channel is not None
        and gates.channel.pool == "both"
        and gates.spatial is not None
        and gates.spatial.pool is None
        and not gates.spatial_first
        and not gates.parallel
        and type(act) is nn.ReLU
    )


def _parts(block: Any) -> tuple[Any, Any, Any]:
    """A block's last BN, its gates and its last activation."""
    if isinstance(block, Bottleneck):
        return block.bn3, block.se, block.act3
    return block.bn2, block.se, block.act2


def _is_watched(block: nn.Module) -> bool:
    """Whether a part of the end has a hook, such as those of `regard.record`."""
    norm, gates, act = _parts(block)
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in (norm, act, *gates.modules())
    )


def _fuses_now(block: Any, x: Any) -> bool:
    """Whether this call is eager training without hooks or tracing."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and type(x) is Tensor
        and block.training
        and all(m.training for m in _parts(block)[:2])
        and fits(block)
        and not _is_watched(block)
        and can_fuse(x.device)
    )


def _end(block: Any, y: Tensor, shortcut: Tensor) -> Tensor:
    """The end of a block, fused if its map is large enough and in channels_last."""
    norm, gates, act = _parts(block)
    small = y.numel() < LEAST[y.device.type] and not _every_size.get()
    if small or not y.is_contiguous(memory_format=torch.channels_last):
        out: Tensor = act(gates(norm(y)).add_(shortcut))
        return out
    return fused_end(y, shortcut, norm, gates)


class FusedBasicBlock(BasicBlock):
    """timm's basic block, whose end is one operator in training; made by `set_fused`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fuses_now(self, x):
            return super().forward(x)
        y = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return _end(self, self.conv2(y), shortcut)

    def __prepare_scriptable__(self) -> nn.Module:
        return _plain(self)


class FusedBottleneck(Bottleneck):
    """timm's bottleneck, whose end is one operator in training; made by `set_fused`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _fuses_now(self, x):
            return super().forward(x)
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(y)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return _end(self, self.conv3(y), shortcut)

    def __prepare_scriptable__(self) -> nn.Module:
        return _plain(self)


_FUSED: dict[type, type] = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}


def _plain(block: nn.Module) -> nn.Module:
    """The block as timm's class, sharing all of its contents: for TorchScript."""
    kind = _PLAIN[type(block)]
    plain: nn.Module = kind.__new__(kind)  # type: ignore[call-overload]
    plain.__dict__ = block.__dict__.copy()
    return plain


def set_fused(model: nn.Module, fused: bool = True) -> int:
    """Makes blocks of ResNets with CBAM end in one operator in training, or undoes this.

    Names, weights and, within rounding, results stay the same. The modules themselves are called
    in evaluation, where hooks watch the gates (`regard.record`), under torch.compile, in tracing,
    scripting and export, for maps that are small or not in channels_last, and for gates in other
    orders or with other pooling. Second derivatives are not supported.

    Returns:
        The number of blocks that now end in one operator.
    """
    count = 0
    for block in model.modules():
        if type(block) in _PLAIN:
            block.__class__ = _PLAIN[type(block)]
        if fused and type(block) in _FUSED and fits(block):
            block.__class__ = _FUSED[type(block)]
            count += 1
    return count
