"""Muon that orthogonalizes all matrices of one shape at once.

A network has a hundred matrices in a dozen shapes, and orthogonalizing one takes fifteen small
products: launched one matrix at a time, they take the CPU longer than the whole step takes the
GPU. On CUDA all of them are also captured as one CUDA graph, launched by one call.

Which parameters count as matrices, the polynomials and the saved state are timm's. Where timm
multiplies in bf16 on any machine, this uses float32 on CPUs and on GPUs without bf16: there,
emulated bf16 is 30 times slower.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import timm.optim
import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor

from regard.compat import is_a_matrix_to_muon, muon_coefficients
from regard.files import reason
from regard.machine import has_bf16
from regard.training.graphs import ALONE

log: logging.Logger = logging.getLogger(__name__)

TOGETHER = 5
"""Steps computed from one product X X'; float32 allows no more."""


class Muon(timm.optim.Muon):
    """Orthogonalized momentum for matrices and convolutions; AdamW for all other parameters.

    Jordan et al. 2024, with updates as large as AdamW's (Liu et al. 2025, arXiv 2502.16982). With
    `nesterov`, the other parameters use NAdamW. Arguments and state are those of timm's Muon; a
    parameter group with `use_fallback` is left to AdamW altogether.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recordings: dict[int, _Recording] = defaultdict(_Recording)  # by parameter group

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copied or loaded state; recorded graphs are not part of it."""
        super().__setstate__(state)
        self._recordings = defaultdict(_Recording)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates the parameters that have a gradient; returns `closure`'s result, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden = []
        for number, group in enumerate(self.param_groups):
            given = [p for p in group["params"] if p.grad is not None]
            matrices = [p for p in given if self._is_matrix(p, group)]
            if matrices:
                self._orthogonal_step(matrices, group, self._recordings[number])
            hidden += [(p, p.grad) for p in matrices]
        for p, _ in hidden:
            p.grad = None
        super().step()  # the other parameters
        for p, gradient in hidden:
            p.grad = gradient
        return loss

    def _is_matrix(self, p: Tensor, group: dict[str, Any]) -> bool:
        state = self.state[p]
        if "use_muon" not in state:
            state["use_muon"] = not group.get("use_fallback") and is_a_matrix_to_muon(p)
        return bool(state["use_muon"])

    def _orthogonal_step(
        self, matrices: list[Tensor], group: dict[str, Any], recording: "_Recording"
    ) -> None:
        rate, momentum = group["lr"], group["momentum"]
        gradients = [p.grad for p in matrices if p.grad is not None]  # all have one
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        torch._foreach_lerp_(buffers, gradients, weight=1 - momentum)
        updates: Any = buffers
        if group["nesterov"]:
            updates = torch._foreach_lerp(gradients, buffers, weight=momentum)
        by_scale: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, direction in zip(matrices, recording(updates, group), strict=True):
            scale = get_lr_scale(p.flatten(1).shape, group["adjust_lr_fn"])
            by_scale[scale].append((p, direction))
        for scale, pairs in by_scale.items():
            moved, moves = map(list, zip(*pairs, strict=True))
            torch._foreach_add_(moved, moves, alpha=-rate * scale)


class _Recording:
    """Calls `directions`; on CUDA it captures the second call and replays it from then on.

    The first call is a warm-up in which libraries allocate their workspaces.
    """

    def __init__(self) -> None:
        self.key: object = None
        self.graph: Any = None
        self.updates: list[Tensor] = []
        self.found: list[Tensor] = []
        self.refused = False

    def __call__(self, updates: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        if updates[0].device.type != "cuda" or self.refused:
            return directions(updates, group)
        how = [group[k] for k in ("ns_steps", "ns_coefficients", "eps")]
        key = how, [(u.shape, u.stride(), u.dtype, u.device) for u in updates]
        if key != self.key:
            self.key, self.graph = key, None
            return directions(updates, group)
        if self.graph is None:
            try:
                self._record(updates, group)
            except RuntimeError as error:
                log.info(f"Muon is not recorded as a CUDA graph: {reason(error)}")
                self.refused = True
                return directions(updates, group)
        torch._foreach_copy_(self.updates, updates)
        self.graph.replay()
        return self.found

    def _record(self, updates: list[Tensor], group: dict[str, Any]) -> None:
        self.updates = [u.clone() for u in updates]
        graph = torch.cuda.CUDAGraph()
        # captures only this thread: another one copies images to the device
        with ALONE, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.found = directions(self.updates, group)
        self.graph = graph


def directions(updates: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Each matrix or convolution orthogonalized, those of one shape at once.

    Args:
        updates: (m, n) or (m, ...) each, all on one device.
        group: the optimizer's parameter group, with ns_steps, ns_coefficients and eps.

    Returns:
        Tensors of the same shapes, in the same order.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for number, update in enumerate(updates):
        by_shape[update.shape].append(number)
    coefficients = muon_coefficients(group["ns_coefficients"])
    device = updates[0].device
    orthogonal = zeropower_via_newtonschulz
    if device.type == "cpu" or not has_bf16(device):
        orthogonal = orthogonal_by_gram
    found: dict[int, Tensor] = {}
    for shape, numbers in by_shape.items():
        stacked = torch.stack([updates[k].flatten(1) for k in numbers])
        made = orthogonal(stacked, group["ns_steps"], coefficients, eps=group["eps"])
        made = made.to(stacked.dtype)
        found |= {k: m.reshape(shape) for k, m in zip(numbers, made, strict=True)}
    return [found[k] for k in range(len(updates))]


def orthogonal_by_gram(
    matrices: Tensor, steps: int, coefficients: list[tuple[float, float, float]], eps: float
) -> Tensor:
    """timm's `zeropower_via_newtonschulz` in float32 or more, with fewer products.

    Each of timm's steps maps X to (a + b A + c A A) X with A = X X'. These factors commute, so the
    next A and the product of all factors follow from the first A alone: for a 512 x 4608 matrix,
    X is multiplied twice instead of ten times, and every other product is 512 x 512. After
    `TOGETHER` steps A is computed anew, as its rounding errors grow fourfold with each.

    Args:
        matrices: (B, m, n); float64 stays float64, all else becomes float32. Rounding A costs
            half of the digits of the smallest singular values; bf16 doesn't have those digits.
        steps, coefficients, eps: as timm's; the last coefficients are repeated.

    Returns:
        (B, m, n), with singular values near 1.
    """
    x = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = x if x.dtype == torch.float64 else x.float()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    rest = max(steps - len(coefficients), 0)
    factors = coefficients[:steps] + coefficients[-1:] * rest
    for first in range(0, steps, TOGETHER):
        x = _times_factors(x, factors[first : first + TOGETHER])
    return x if matrices.shape[-2] <= matrices.shape[-1] else x.mT


def _times_factors(x: Tensor, coefficients: list[tuple[float, float, float]]) -> Tensor:
    gram = x @ x.mT
    whole: Tensor | None = None
    for k, (a, b, c) in enumerate(coefficients, 1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor if whole is None else factor @ whole
        if k < len(coefficients):
            gram = factor @ gram @ factor
    return x if whole is None else whole @ x
