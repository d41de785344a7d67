"""Attention gates on any timm network (Schlemper et al., arXiv 1808.08114).

The paper's gate fits every convolutional backbone: maps of earlier stages are compared with the
last one, the gating signal, and pooled with weights that reflect where they agree with it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from regard.errors import UsageError
from regard.files import reason
from regard.models._common import choose
from regard.models.attention_gate import AttentionGate
from regard.models.sononet import AGGREGATIONS, AGSonoNet


class AGNetwork(nn.Module):
    """A backbone with attention gates on some of its maps; see `ag_wrap`.

    Input (B, in_chans, H, W); output (B, num_classes), or with `mean` and `deep_sup` in training
    (B, heads, num_classes), as for AG-SonoNet.
    """

    def __init__(
        self,
        backbone: nn.Module,
        widths: Sequence[int],
        *,
        num_classes: int,
        aggregation: str,
        normalize: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes: int = num_classes
        self.drop_rate: float = 0.0
        self.aggregation: str = choose("aggregation", aggregation, AGGREGATIONS)
        *tapped, last = widths
        self.gates = nn.ModuleList([AttentionGate(w, last, normalize=normalize) for w in tapped])
        self.num_features: int = sum(widths)
        self.head_hidden_size: int = self.num_features
        separate = widths if aggregation != "concat" else []
        self.heads = nn.ModuleList([nn.Linear(w, num_classes) for w in separate])
        inputs = num_classes * len(widths) if aggregation == "ft" else sum(widths)
        joint = aggregation != "mean"
        self.classifier: nn.Linear | nn.Identity = (
            nn.Linear(inputs, num_classes) if joint else nn.Identity()
        )

    @property
    def head_weights(self) -> tuple[float, ...]:
        """The weight of each head's cross-entropy in the paper's loss."""
        count = len(self.heads)
        own = {"mean": (1.0,) * count, "deep_sup": (1.0, *((0.1,) * count))}
        return own.get(self.aggregation, (1.0,))

    def forward(self, x: Tensor) -> Tensor:
        *maps, last = self.backbone(x)
        vectors = [gate(m, last) for gate, m in zip(self.gates, maps, strict=True)]
        vectors.append(last.mean(dim=(2, 3)))
        return self._head(vectors)  # type: ignore[misc]

    # AG-SonoNet's aggregations, for any number of vectors
    _head = AGSonoNet._head
    join_heads = AGSonoNet.join_heads


def ag_wrap(
    backbone: str,
    *,
    taps: Sequence[int] = (-3, -2),
    num_classes: int = 1000,
    in_chans: int = 3,
    aggregation: str = "mean",
    normalize: str = "mean_flow",
    pretrained: bool = False,
    **arguments: Any,
) -> AGNetwork:
    """A timm network with attention gates, guided by its last map.

    Examples:
        >>> model = regard.ag_wrap("resnet18", taps=(-3, -2), num_classes=5)

    Args:
        backbone: name of any timm network that supports `features_only`.
        taps: indices of the maps that get gates; the last map is the gating signal.
        aggregation: "concat", "mean", "deep_sup" or "ft", as for AG-SonoNet.
        normalize: normalization of the gates' maps, as for AG-SonoNet.
        pretrained: start the backbone from timm's weights.
        arguments: further arguments of the backbone.

    Raises:
        UsageError: the backbone is unknown or outputs no maps, or a tap does not exist.
    """
    more = {"in_chans": in_chans, "features_only": True, **arguments}
    out_indices = _maps_of(backbone, taps, more)
    network = timm.create_model(backbone, pretrained=pretrained, out_indices=out_indices, **more)
    if getattr(network, "output_fmt", "NCHW") == "NHWC":
        raise UsageError(
            f"backbone={backbone!r} gives maps as (B, H, W, C); gates take (B, C, H, W)"
        )
    return AGNetwork(
        network, network.feature_info.channels(), num_classes=num_classes,
        aggregation=aggregation, normalize=normalize,
    )  # fmt: skip


def _maps_of(backbone: str, taps: Sequence[int], arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The indices of the tapped maps and of the last one, counted from 0.

    Raises:
        UsageError: the backbone is unknown or outputs no maps, or a tap does not exist.
    """
    if not timm.is_model(backbone):
        raise UsageError(f"backbone={backbone!r}: timm has no such network")
    try:
        with torch.device("meta"):
            maps = timm.create_model(backbone, **arguments).feature_info
        count = len(maps.channels())
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise UsageError(f"backbone={backbone!r} gives no maps ({reason(error)})") from error
    chosen = sorted({t + count if t < 0 else t for t in taps})
    if not chosen or not all(0 <= t < count - 1 for t in chosen):
        raise UsageError(
            f"taps={tuple(taps)}: {backbone} has maps 0 to {count - 1}, and the last is the "
            f"gating signal: choose from 0 to {count - 2}"
        )
    return (*chosen, count - 1)
