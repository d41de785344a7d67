"""SonoNet and the attention-gated SonoNet (Schlemper et al., Medical Image Analysis 2019,
*Attention gated networks*, arXiv 1808.08114), for grayscale ultrasound and similar images.

Checked against the authors' code (github.com/ozan-oktay/Attention-Gated-Networks, MIT
license: sononet.py, sononet_grid_attention.py, grid_attention_layer.py).

Differences from the code: the gate's map is normalized safely if it is constant (theirs is
0/0), in float32 under half precision; and the network that they call `sononet`, with
[2, 2, 3, 3, 3] convolutions, is `convs=(2, 2, 3, 3, 3)` here, where the default is the
paper's [3, 3, 3, 2, 2] (their `sononet2`).

The gate is in attention_gate.py. Reading order: convolution blocks, SonoNet, attention-gated
SonoNet, variants.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, register_notrace_function
from torch import Tensor, nn

from regard.errors import UsageError
from regard.models._common import choose, fitted
from regard.models._shipped import generate_default_cfgs, register_model
from regard.models._timm_verbs import StagedNetwork
from regard.models.attention_gate import AttentionGate
from regard.models.initialization import initialize, initialized_by_name, pytorch_default

POOLS = ("avg", "max", "avgmax", "")
AGGREGATIONS = ("concat", "mean", "deep_sup", "ft")


def _conv(in_channels: int, channels: int, kernel_size: int = 3, *, relu: bool = True) -> nn.Module:
    """Convolution with bias -> BN -> ReLU, at the same size."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2),
        nn.BatchNorm2d(channels),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


def _block(in_channels: int, channels: int, convs: int, *, pool: bool) -> nn.Sequential:
    """`convs` 3x3 convolutions, after a 2x2 max-pool that halves the size (rounded down)."""
    widths = [in_channels] + [channels] * convs
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    layers += [_conv(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers)


@torch.fx.wrap
@register_notrace_function
def check_size(x: Tensor) -> None:
    """Refuses images too small for four poolings; no underscore, or FX would trace into it."""
    if x.shape[-2] < 16 or x.shape[-1] < 16:
        raise UsageError(
            "the image is too small for SonoNet, which halves it four times: at least 16x16 "
            f"pixels, not {x.shape[-2]}x{x.shape[-1]}"
        )


def _init_layer(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        pytorch_default(layer, generator)
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, generator=generator)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02, generator=generator)
        nn.init.zeros_(layer.bias)


class _SonoNetBase(StagedNetwork):
    """The five convolution blocks that both networks share, with timm's interface."""

    def __init__(
        self, in_chans: int, features: int, convs: Sequence[int], num_classes: int, drop_rate: float
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, [f"block{n}" for n in range(1, 6)])
        if features < 1:
            raise UsageError(
                f"features={features}: give the first block's filters (8, 16, 32 or 64)"
            )
        if len(convs) != 5 or min(convs) < 1:
            raise UsageError(f"convs={tuple(convs)}: give five counts, such as (3, 3, 3, 2, 2)")
        widths = [features * k for k in (1, 2, 4, 8, 8)]
        self.widths = widths
        self.block1: nn.Sequential = _block(in_chans, widths[0], convs[0], pool=False)
        self.block2: nn.Sequential = _block(widths[0], widths[1], convs[1], pool=True)
        self.block3: nn.Sequential = _block(widths[1], widths[2], convs[2], pool=True)
        self.block4: nn.Sequential = _block(widths[2], widths[3], convs[3], pool=True)
        self.block5: nn.Sequential = _block(widths[3], widths[4], convs[4], pool=True)
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"block{i + 1}"}
            for i, width in enumerate(widths)
        ]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The authors' initialization: convolutions He normal fan-in, BN weights N(1, 0.02).

        BN biases are 0; convolution biases, and the linear layers, are PyTorch's. A gate's psi
        has bias 3 for "sigmoid" and 10 for "softmax" (grid_attention_layer.py).
        """
        initialize(self, _init_layer)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates, as in timm's networks."""
        return {"stem": r"^block1", "blocks": r"^block(\d+)" if coarse else r"^block(\d+)\.(\d+)"}

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs of blocks 3, 4 and 5."""
        check_size(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            block3 = checkpoint_seq([self.block1, self.block2, self.block3], x, flatten=True)
            block4 = checkpoint_seq(self.block4, block3)
            return block3, block4, checkpoint_seq(self.block5, block4)
        block3 = self.block3(self.block2(self.block1(x)))
        block4 = self.block4(block3)
        return block3, block4, self.block5(block4)

    def _last_map(self, block3: Tensor, block4: Tensor, block5: Tensor) -> Tensor:
        raise NotImplementedError

    def _entry(self, x: Tensor) -> Tensor:
        check_size(x)
        return x

    def _final(self, maps: list[Tensor]) -> Tensor:
        return self._last_map(*maps[2:])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; 0 classes gives pooled features, and pool "" the map."""
        raise NotImplementedError


def _pool(kind: str) -> nn.Module:
    """timm's pooling of this name, unless it gives several values per channel.

    Raises:
        UsageError: there is no such pooling here.
    """
    chosen = choose("global_pool", kind, POOLS)
    return SelectAdaptivePool2d(pool_type=chosen, flatten=bool(chosen))


class SonoNet(_SonoNetBase):
    """SonoNet: five blocks of convolutions, then 1x1 convolutions to one map per class, averaged.

    Args:
        features: filters of the first block; the others have 2, 4, 8 and 8 times as many.
        convs: number of convolutions in each block.
        global_pool: "avg" (the authors'), "max", "avgmax" (the mean of both), or "" for the
            classes' maps themselves.

    Input (B, in_chans, H, W) of at least 16x16 pixels; output (B, num_classes).

    Raises:
        UsageError: an argument is not among its choices, or an input is too small.
    """

    @initialized_by_name
    def __init__(
        self,
        num_classes: int = 14,
        in_chans: int = 1,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        *,
        features: int = 8,
        convs: Sequence[int] = (3, 3, 3, 2, 2),
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_chans, features, convs, num_classes, drop_rate)
        self.num_features: int = self.widths[4]
        self.head_hidden_size: int = self.num_features
        self.reset_classifier(num_classes, global_pool)
        self._place(device, dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; 0 classes gives pooled features, and pool "" the map."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool: nn.Module = fitted(self, _pool(global_pool))
        if num_classes > 0:
            self.adapt: nn.Module = fitted(self, _conv(self.num_features, self.widths[2], 1))
            self.classifier: nn.Module = fitted(
                self, _conv(self.widths[2], num_classes, 1, relu=False)
            )
        else:
            self.adapt, self.classifier = (fitted(self, nn.Sequential()) for _ in range(2))

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The last 1x1 convolution and its BN, or the name."""
        return "classifier" if name_only else self.classifier

    def _last_map(self, block3: Tensor, block4: Tensor, block5: Tensor) -> Tensor:
        return block5

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 8 features, H / 16, W / 16), rounded down."""
        return self._maps(x)[2]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 8 features, h, w) -> (B, num_classes), or the pooled features before the head."""
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return self.global_pool(x if pre_logits else self.classifier(self.adapt(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class AGSonoNet(_SonoNetBase):
    """Attention-gated SonoNet: gates on blocks 3 and 4, guided by block 5.

    The features are three vectors: attended block 3 (4f wide), attended block 4 (8f), and
    the average of block 5 (8f). Aggregations:

    concat    one linear layer on the concatenated vectors
    mean      one linear layer per vector; predicts the mean of their softmaxes
    deep_sup  the concat layer and the three; predicts with the concat layer
    ft        one linear layer per vector, and one on their logits, for fine-tuning after `mean`

    In evaluation the output is (B, num_classes), logits whose softmax is the prediction. In
    training `mean` and `deep_sup` give (B, heads, num_classes), in the order above, for
    `regard.multi_head_cross_entropy` with `head_weights`.

    Args:
        features: filters of the first block, f; the others have 2, 4, 8 and 8 times as many.
        convs: number of convolutions in each block.
        aggregation: one of the four above.
        normalize: normalization of the gates' maps, see GateMap.
        global_pool: pooling of block 5: "avg" (the authors'), "max", "avgmax" (the mean of both),
            or "" for the features as a map.

    Input: (B, in_chans, H, W) of at least 16x16 pixels.

    Raises:
        UsageError: an argument is not among its choices, or an input is too small.
    """

    __constants__: ClassVar[list[str]] = ["is_gated"]

    @initialized_by_name
    def __init__(
        self,
        num_classes: int = 14,
        in_chans: int = 1,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        *,
        features: int = 8,
        convs: Sequence[int] = (3, 3, 3, 2, 2),
        aggregation: str = "mean",
        normalize: str = "mean_flow",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_chans, features, convs, num_classes, drop_rate)
        self.aggregation: str = choose("aggregation", aggregation, AGGREGATIONS)
        _, _, third, fourth, fifth = self.widths
        self.vectors = [third, fourth, fifth]
        self.is_gated = True
        self.num_features: int = third + fourth + fifth
        self.head_hidden_size: int = self.num_features
        self.gate3: nn.Module = AttentionGate(third, fifth, normalize=normalize)
        self.gate4: nn.Module = AttentionGate(fourth, fifth, normalize=normalize)
        self.reset_classifier(num_classes, global_pool)
        self._place(device, dtype)

    __jit_unused_properties__: ClassVar[list[str]] = ["head_weights"]

    @property
    def head_weights(self) -> tuple[float, ...]:
        """The weight of each head's cross-entropy in the paper's loss."""
        count = len(self.vectors)
        return {"mean": (1.0,) * count, "deep_sup": (1.0, *[0.1] * count)}.get(
            self.aggregation, (1.0,)
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers; 0 classes gives the features, and pool "" their map."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool: nn.Module = fitted(self, _pool(global_pool))
        self.pooled: bool = bool(self.global_pool.pool_type)
        some = num_classes > 0
        separate = some and self.aggregation != "concat"
        widths = self.vectors if separate else []
        self.heads: nn.ModuleList = fitted(
            self, nn.ModuleList([nn.Linear(w, num_classes) for w in widths])
        )
        inputs = num_classes * len(self.vectors) if self.aggregation == "ft" else self.num_features
        joint = some and self.aggregation != "mean"
        last = nn.Linear(inputs, num_classes) if joint else nn.Identity()
        self.classifier: nn.Module = fitted(self, last)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The last linear layer (for `mean` the three heads), or its name."""
        name = "heads" if self.aggregation == "mean" else "classifier"
        return name if name_only else getattr(self, name)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in the base class; without block 5 there are no gates, and only the map is pooled."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if not len(self.block5):
            self.gate3, self.gate4 = nn.Identity(), nn.Identity()
            self.is_gated, self.vectors = False, [self.num_features]
        return take

    def _last_map(self, block3: Tensor, block4: Tensor, block5: Tensor) -> Tensor:
        if not self.is_gated:
            return block5
        gated = torch.cat([self.gate3(block3, block5), self.gate4(block4, block5)], dim=1)
        height, width = block5.shape[-2:]
        everywhere = gated[:, :, None, None].expand(-1, -1, height, width)
        return torch.cat([everywhere, block5], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 20 features, H / 16, W / 16), rounded down.

        The two attended vectors, repeated at every position, then block 5's map, so that pooling
        over the positions gives the three vectors.
        """
        block3, block4, block5 = self._maps(x)
        return self._last_map(block3, block4, block5)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 20 features, h, w) -> (B, num_classes), or the vectors as (B, 20 features).

        In training with `mean` and `deep_sup`: (B, heads, num_classes).
        """
        if not self.pooled:
            return x
        if not self.is_gated:
            return self._head([self.global_pool(x)], pre_logits)
        third, fourth, _ = self.vectors
        gated = third + fourth
        attended3, attended4 = x[:, :third, 0, 0], x[:, third:gated, 0, 0]
        return self._head([attended3, attended4, self.global_pool(x[:, gated:])], pre_logits)

    def _head(self, vectors: list[Tensor], pre_logits: bool = False) -> Tensor:
        """The three vectors, (B, 4f), (B, 8f) and (B, 8f) -> the output of forward_head."""
        if self.drop_rate > 0.0:
            vectors = [F.dropout(v, p=self.drop_rate, training=self.training) for v in vectors]
        if pre_logits or self.num_classes == 0:
            return torch.cat(vectors, dim=1)
        if self.aggregation == "concat" or (self.aggregation == "deep_sup" and not self.training):
            return self.classifier(torch.cat(vectors, dim=1))
        heads = [head(vectors[i]) for i, head in enumerate(self.heads)]
        if self.aggregation == "ft":
            return self.classifier(torch.cat(heads, dim=1))
        if self.aggregation == "deep_sup":
            joint = self.classifier(torch.cat(vectors, dim=1))
            return torch.stack([joint] + heads, dim=1)  # noqa: RUF005 (TorchScript)
        stacked = torch.stack(heads, dim=1)  # (B, 3, num_classes)
        return stacked if self.training else self.join_heads(stacked)

    @property
    def answers_log_probabilities(self) -> bool:
        """Whether the outputs of evaluation are logarithms of probabilities: of several heads."""
        return self.is_gated and self.aggregation == "mean" and self.num_classes > 0

    def join_heads(self, outputs: Tensor) -> Tensor:
        """(B, heads, num_classes) from training -> (B, num_classes), the logits of evaluation."""
        if self.aggregation == "deep_sup":
            return outputs[:, 0]
        # the logarithm of the mean of the softmaxes: its softmax is that mean
        return torch.log_softmax(outputs, dim=2).logsumexp(dim=1) - math.log(outputs.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """forward_head of forward_features, without expanding the vectors into a map in between."""
        block3, block4, block5 = self._maps(x)
        if not self.pooled:
            return self._last_map(block3, block4, block5)
        if not self.is_gated:
            return self._head([self.global_pool(block5)])
        attended3, attended4 = self.gate3(block3, block5), self.gate4(block4, block5)
        return self._head([attended3, attended4, self.global_pool(block5)])


def without_other_heads(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Trained weights without the tensors of a head for a different number of classes.

    timm drops weight and bias of the layers that its configuration names; SonoNet's head also has
    running statistics, and AG-SonoNet has several heads.
    """
    own = model.state_dict()

    def fits(name: str) -> bool:
        head = name.startswith(("heads.", "classifier."))
        return not head or name not in own or own[name].shape == state[name].shape

    return {name: tensor for name, tensor in state.items() if fits(name)}


def _create(
    variant: type[_SonoNetBase], name: str, features: int, pretrained: bool, /, **kwargs: Any
) -> nn.Module:
    # the aggregation decides where the classifier is: update timm's configuration
    if kwargs.get("aggregation", "mean") != "mean":
        overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
        kwargs["pretrained_cfg_overlay"] = {"classifier": "classifier", **overlay}
    return build_model_with_cfg(
        variant, name, pretrained, feature_cfg={"flatten_sequential": False},
        pretrained_filter_fn=without_other_heads,
        **{"features": features, **kwargs},
    )  # fmt: skip


# Each image is standardized by its own mean and deviation; 14 classes, crops of 208x272.
_CFG: dict[str, Any] = {
    "url": "",
    "num_classes": 14,
    "input_size": (1, 208, 272),
    "pool_size": (13, 17),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5,),
    "std": (0.5,),
    "first_conv": "block1.0.0",
    "classifier": "classifier.0",
}
_AG_CFG = {**_CFG, "classifier": ("heads.0", "heads.1", "heads.2")}

default_cfgs = generate_default_cfgs(
    {
        **{f"sononet{f}": _CFG for f in (8, 16, 32, 64)},
        **{f"ag_sononet{f}": _AG_CFG for f in (8, 16, 32, 64)},
    }
)


@register_model
def sononet8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SonoNet-8 (table 3: accuracy 0.969). 0.163M parameters."""
    return _create(SonoNet, "sononet8", 8, pretrained, **kwargs)


@register_model
def sononet16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SonoNet-16 (table 3: accuracy 0.977). 0.648M parameters."""
    return _create(SonoNet, "sononet16", 16, pretrained, **kwargs)


@register_model
def sononet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SonoNet-32 (table 3: accuracy 0.979). 2.584M parameters."""
    return _create(SonoNet, "sononet32", 32, pretrained, **kwargs)


@register_model
def sononet64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SonoNet-64. 10.321M parameters."""
    return _create(SonoNet, "sononet64", 64, pretrained, **kwargs)


@register_model
def ag_sononet8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AG-SonoNet-8 (table 3: accuracy 0.977). 0.177M parameters, 0.310 GMACs at 208x272."""
    return _create(AGSonoNet, "ag_sononet8", 8, pretrained, **kwargs)


@register_model
def ag_sononet16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AG-SonoNet-16 (table 3: accuracy 0.978). 0.701M parameters, 1.233 GMACs."""
    return _create(AGSonoNet, "ag_sononet16", 16, pretrained, **kwargs)


@register_model
def ag_sononet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AG-SonoNet-32 (table 3: accuracy 0.980). 2.788M parameters, 4.913 GMACs."""
    return _create(AGSonoNet, "ag_sononet32", 32, pretrained, **kwargs)


@register_model
def ag_sononet64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AG-SonoNet-64. 11.122M parameters, 19.617 GMACs."""
    return _create(AGSonoNet, "ag_sononet64", 64, pretrained, **kwargs)
