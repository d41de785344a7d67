"""The attention gate (Schlemper et al., Medical Image Analysis 2019, arXiv 1808.08114).

The gate alone: sononet.py has the paper's network, and ag_wrap.py adds gates to any other.
Checked against the authors' grid_attention_layer.py
(github.com/ozan-oktay/Attention-Gated-Networks, MIT license), with one difference: a constant
map is normalized safely (theirs is 0/0), in float32 under half precision.
"""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from regard.models._common import choose, largest_over_positions
from regard.models.initialization import pytorch_default

NORMALIZATIONS = ("mean_flow", "softmax", "sigmoid", "mean", "range")


@torch.fx.wrap
@register_notrace_function
def normalize_map(score: Tensor, how: str) -> Tensor:
    """The gate's map from a score: GateMap's formulas, in float32 under half precision.

    Shapes: (B, 1, H, W) -> the same.
    """
    if how == "sigmoid":
        return torch.sigmoid(score)
    half = score.dtype == torch.float16 or score.dtype == torch.bfloat16
    s = score.float() if half else score
    positions = s.shape[2] * s.shape[3]
    size = s.detach().abs().amax(dim=(2, 3), keepdim=True)
    eps = 2.3e-16 if s.dtype == torch.float64 else 1.2e-7
    if how == "softmax":
        alpha = torch.softmax(s.flatten(2), dim=2).view(s.shape)
    elif how == "range":
        low = -largest_over_positions(-s)
        total = largest_over_positions(s) - low
        flat = total <= eps * size
        one = torch.ones_like(total)
        alpha = torch.where(flat, one, (s - low) / torch.where(flat, one, total))
    else:
        if how == "mean_flow":
            s = s + largest_over_positions(-s)
        # a spread within rounding counts as zero: dividing by it would show noise
        total = s.sum(dim=(2, 3), keepdim=True)
        flat = total.abs() <= eps * size * positions
        one = torch.ones_like(total)
        alpha = torch.where(flat, one / positions, s / torch.where(flat, one, total))
    return alpha.to(score.dtype)


class GateMap(nn.Module):
    """Where a gate looks: the normalized compatibility of a map x with the gating signal g.

    f = ReLU(theta(x) + up(phi(g))), score = psi(f), alpha = normalize(score); theta and phi
    are 1x1 convolutions without bias, psi has one, `up` is bilinear with aligned corners.

    mean_flow  (s - min s) / sum(s - min s)      the paper's
    softmax    exp(s) / sum(exp(s))
    sigmoid    1 / (1 + exp(-s)), each position by itself
    mean       s / sum(s)
    range      (s - min s) / (max s - min s)

    Computed in float32 under half precision. A map that is constant within rounding has no
    preferred place: it becomes 1 / (H W) everywhere, or 1 for `range`.

    Shapes: x (B, C, H, W), g (B, C_g, h, w) -> (B, 1, H, W).
    """

    attention_kind = "spatial"

    def __init__(self, channels: int, gating_channels: int, inner: int, normalize: str) -> None:
        super().__init__()
        self.normalize: str = choose("normalize", normalize, NORMALIZATIONS)
        self.theta: nn.Conv2d = nn.Conv2d(channels, inner, 1, bias=False)
        self.phi: nn.Conv2d = nn.Conv2d(gating_channels, inner, 1, bias=False)
        self.psi: nn.Conv2d = nn.Conv2d(inner, 1, 1)
        self.init_gate()

    @torch.jit.ignore
    def init_gate(self, generator: torch.Generator | None = None) -> None:
        """He normal fan-in; psi's bias is PyTorch's, or 3 for "sigmoid" and 10 for "softmax"."""
        for conv in (self.theta, self.phi, self.psi):
            pytorch_default(conv, generator)
            nn.init.kaiming_normal_(conv.weight, generator=generator)
        if self.normalize in ("sigmoid", "softmax"):
            assert self.psi.bias is not None
            nn.init.constant_(self.psi.bias, 3.0 if self.normalize == "sigmoid" else 10.0)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        theta = self.theta(x)
        phi = F.interpolate(self.phi(g), size=theta.shape[-2:], mode="bilinear", align_corners=True)
        return normalize_map(self.psi(F.relu(theta + phi)), self.normalize)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"


class AttentionGate(nn.Module):
    """Attention gate: one vector of attended features, the sum over positions of alpha * x.

    Args:
        channels: channels of the map x.
        gating_channels: channels of the gating signal g, a coarser map.
        inner: number of channels for comparing the two; default: that of g.
        normalize: how alpha is normalized: "mean_flow", "softmax", "sigmoid", "mean" or "range".

    Shapes: x (B, C, H, W), g (B, C_g, h, w) -> (B, C).

    Compiled, x is read twice: by theta's convolution, and by the weighted sum, whose products are
    never stored. Between them, one in-place pass reads theta(x), interpolates phi(g), adds and
    rectifies; psi reads the result.

    Raises:
        UsageError: an argument is not among its choices.
    """

    def __init__(
        self,
        channels: int,
        gating_channels: int,
        *,
        inner: int | None = None,
        normalize: str = "mean_flow",
    ) -> None:
        super().__init__()
        self.map: GateMap = GateMap(channels, gating_channels, inner or gating_channels, normalize)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        alpha = self.map(x, g)  # (B, 1, H, W)
        return (alpha * x).sum(dim=(2, 3))  # (B, C, H, W) -> (B, C)
