"""Learning rate schedules, parameter groups and optimizers of a recipe.

Muon's learning rates are too high for channel gates. The input of a gate's MLP, a pooled map, is
large and mostly of one sign: a few steps at the full rate push a hidden ReLU below zero for every
image, and no BN undoes the growth of the last layer, whose sigmoids saturate. The gate then no
longer depends on the image (docs/results.md). So gates are left to AdamW, at `gate_lr_scale` times
the learning rate.
"""

import functools
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn

from regard.attention import attention_kinds, channel_gate_names
from regard.models.create import classifier_modules
from regard.training.config import Recipe
from regard.training.muon import Muon


def rate_factor(recipe: Recipe, step: int, total: int, steps_an_epoch: float) -> float:
    """The learning rate of a step as a fraction of recipe.lr.

    Args:
        step: optimizer steps done before this one.
        total: optimizer steps of the whole run.
        steps_an_epoch: converts a schedule given in epochs; need not be a whole number.
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
    factors = recipe.lr_factors or [1 / 10**i for i in range(len(recipe.milestones) + 1)]
    # 1e-6 of a step: 30 epochs of 10/3 steps end with step 100 despite rounding
    return risen * factors[sum(step >= m * unit - 1e-6 for m in recipe.milestones)]


def _one_cycle(done: float) -> float:
    """Cosine from 1/25 to 1 in a quarter of the run, then cosine to 0 (Smith 2018)."""
    if done < 0.25:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * done / 0.25))
    return 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))


def gate_and_head_parameters(model: nn.Module) -> set[str]:
    """Names of the attention's and the classifier's parameters; the rest is the backbone."""
    modules = (*attention_kinds(model), *classifier_modules(model))
    starts = tuple(f"{module}." for module in modules)
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def channel_gate_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of channel gates, see `channel_gate_names`."""
    starts = tuple(f"{gate}." for gate in channel_gate_names(model))
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's SGD or AdamW (fused), or Muon, over `parameter_groups`."""
    nesterov = recipe.nesterov and recipe.momentum > 0
    if recipe.optimizer == "muon":
        groups = parameter_groups(model, recipe)
        return Muon(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    name: str = recipe.optimizer
    if name == "sgd":
        name = "sgd" if nesterov else "momentum"  # timm's names
    return create_optimizer_v2(
        model,
        opt=name,
        lr=recipe.lr,
        momentum=recipe.momentum,
        param_group_fn=functools.partial(parameter_groups, recipe=recipe),
        fused=True,
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups by weight decay (as in timm) and by learning rate.

    Parameters in `model.no_weight_decay()`, such as a ViT's position embedding, are not decayed;
    nor are norms and biases, unless recipe.decay_norm_and_bias is set. A group's `lr_scale` is 1
    for attention and classifier and recipe.backbone_lr_scale for the rest, times
    recipe.gate_lr_scale for channel gates. With Muon, the gates' groups have `use_fallback`, timm's
    word for AdamW; a run that began before there was a gate_lr_scale has none, and Muon for all.
    """
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    by_decay = param_groups_weight_decay(
        model, recipe.weight_decay, weight_decay_exclude_1d=not recipe.decay_norm_and_bias,
        no_weight_decay_list=spared,
    )  # fmt: skip
    fast = gate_and_head_parameters(model)
    factor = recipe.gate_lr_scale
    gates = set() if factor is None else channel_gate_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in by_decay:
        scaled: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for p in group["params"]:
            name = names[id(p)]
            scale = 1.0 if name in fast else recipe.backbone_lr_scale
            scale *= factor if factor is not None and name in gates else 1.0
            scaled.setdefault((scale, name in gates), []).append(p)
        for (scale, is_gate), params in scaled.items():
            more = {"use_fallback": True} if is_gate and recipe.optimizer == "muon" else {}
            rate = recipe.lr * scale
            groups.append({**group, "params": params, "lr_scale": scale, "lr": rate, **more})
    return groups


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate, scaled in each group by its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
