"""Muon, with the matrices of one shape orthogonalized at once.

A network has a hundred matrices in a dozen shapes, and orthogonalizing takes fifteen small
products: asked for one matrix at a time, they take a GPU's host longer than the whole step.
Which parameters are matrices, the formulas, and the state that is saved are timm's; the
stacked products differ from its by their rounding alone.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import Tensor

from regard.compat import is_a_matrix_to_muon, muon_coefficients


class Muon(timm.optim.Muon):
    """Momentum of matrices and convolutions orthogonalized; all other parameters by AdamW.

    Jordan et al. 2024, with steps as long as AdamW's (Liu et al. 2025, arXiv 2502.16982). With
    `nesterov`, the others move by NAdamW. Arguments and state are those of timm's Muon.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves the parameters that have a gradient; returns what `closure` does, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden = []
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and self._is_matrix(p)]
            if matrices:
                self._orthogonal_step(matrices, group)
            hidden += [(p, p.grad) for p in matrices]
        for p, _ in hidden:
            p.grad = None
        super().step()  # what is left
        for p, gradient in hidden:
            p.grad = gradient
        return loss

    def _is_matrix(self, p: Tensor) -> bool:
        state = self.state[p]
        if "use_muon" not in state:
            state["use_muon"] = is_a_matrix_to_muon(p)
        return bool(state["use_muon"])

    def _orthogonal_step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
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
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, update in zip(matrices, updates, strict=True):
            by_shape[p.shape].append((p, update))
        coefficients = muon_coefficients(group["ns_coefficients"])
        for shape, pairs in by_shape.items():
            directions = zeropower_via_newtonschulz(
                torch.stack([update.flatten(1) for _, update in pairs]),
                group["ns_steps"], coefficients, eps=group["eps"],
            )  # fmt: skip
            scale = get_lr_scale(directions.shape, group["adjust_lr_fn"])
            moves = [d.reshape(shape) for d in directions.to(pairs[0][0].dtype)]
            torch._foreach_add_([p for p, _ in pairs], moves, alpha=-rate * scale)
