"""Learning rates, parameter groups and optimizers of a recipe."""

import math

import torch
from torch import nn

from regard.attention import attention_kinds
from regard.models.create import classifier_modules
from regard.training.config import Recipe


def rate_factor(recipe: Recipe, step: int, total: int, steps_an_epoch: float) -> float:
    """The learning rate of a step as a part of recipe.lr.

    Args:
        step: optimizer steps done before this one.
        total: steps of the whole run.
        steps_an_epoch: to tell a schedule in epochs; need not be whole.
    """
    unit = steps_an_epoch if recipe.schedule_unit == "epochs" else 1.0
    warm = recipe.warmup * unit
    if recipe.schedule == "onecycle":
        return _one_cycle((step + 0.5) / total)
    risen = min(1.0, (step + 1) / (warm + 1))
    if recipe.schedule == "cosine":
        done = max(0.0, step - warm) / max(1.0, total - warm)
        return risen * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "constant":
        return risen
    factors = recipe.lr_factors or [0.1**i for i in range(len(recipe.milestones) + 1)]
    # 1e-6 of a step: 30 epochs of 10/3 steps end with step 100, whatever the rounding
    return risen * factors[sum(step >= m * unit - 1e-6 for m in recipe.milestones)]


def _one_cycle(done: float) -> float:
    """From 1/25 to 1 in a quarter of the run and down to 0, in cosines (Smith 2018)."""
    if done < 0.25:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / 0.25))
    return 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


def gate_and_head_parameters(model: nn.Module) -> set[str]:
    """The names of the gates' and the classifier's parameters; the others are the body."""
    modules = (*attention_kinds(model), *classifier_modules(model))
    starts = tuple(f"{module}." for module in modules)
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over groups that carry `lr_scale`: 1, or recipe.backbone_lr_scale for the body.

    Without recipe.decay_norm_and_bias, biases and the weights of norms are not decayed. Both
    are fused: a step is one pass over a parameter, its gradient and its momentum.
    """
    fast = gate_and_head_parameters(model) if recipe.backbone_lr_scale != 1 else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        scale = 1.0 if recipe.backbone_lr_scale == 1 or name in fast else recipe.backbone_lr_scale
        decay = recipe.weight_decay if recipe.decay_norm_and_bias or p.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(p)
    settings = [
        {"params": ps, "lr_scale": scale, "weight_decay": decay, "lr": recipe.lr * scale}
        for (scale, decay), ps in groups.items()
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=recipe.lr, fused=True)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(
        settings, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate, scaled in each group by its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
