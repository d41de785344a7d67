"""Learning rates step by step, and which parameters learn how fast and decay."""

import copy
import math

import numpy as np
import pytest
import timm.optim
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.optim.muon import zeropower_via_newtonschulz

from regard.compat import muon_coefficients
from regard.models import create_model
from regard.training.config import Recipe
from regard.training.muon import orthogonal_by_gram
from regard.training.optim import (
    gate_and_head_parameters,
    make_optimizer,
    parameter_groups,
    rate_factor,
    set_rate,
)


def rates(recipe: Recipe, total: int, steps_an_epoch: float) -> np.ndarray:
    return np.array([rate_factor(recipe, s, total, steps_an_epoch) for s in range(total)])


# ------------------------------------------------------------------------------- schedules
def test_one_cycle():
    found = rates(Recipe(schedule="onecycle"), 1000, 10.0)
    assert found[0] == pytest.approx(0.04, abs=1e-4)
    assert 249 <= found.argmax() <= 250
    assert found.max() == pytest.approx(1, abs=1e-4)
    assert found[124:126].mean() == pytest.approx(0.52, abs=1e-3)  # half of the rise
    assert found[624:626].mean() == pytest.approx(0.5, abs=1e-3)  # half of the fall
    assert found[-1] == pytest.approx(0, abs=1e-5)
    for total in (1, 2, 7):  # however short, never nothing
        assert (rates(Recipe(schedule="onecycle"), total, 3.3) > 0.01).any()


def test_cosine_after_a_linear_rise():
    found = rates(Recipe(schedule="cosine", warmup=2.0), 1000, 12.5)
    np.testing.assert_allclose(np.diff(found[:25]), 1 / 26)
    assert found[0] == pytest.approx(1 / 26)
    assert found[25] == 1
    assert (np.diff(found[25:]) < 0).all()
    assert found[25 + 975 // 2] == pytest.approx(0.5, abs=1e-2)
    assert found[-1] == pytest.approx(0, abs=1e-5)
    short = rates(Recipe(schedule="cosine"), 4, 1.0)
    np.testing.assert_allclose(short, [1, 0.8536, 0.5, 0.1464], atol=1e-4)


def test_warm_up_in_steps_and_longer_than_the_run():
    found = rates(Recipe(schedule="constant", warmup=4, schedule_unit="steps"), 8, 1000.0)
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    short = rates(Recipe(schedule="cosine", warmup=50, schedule_unit="steps"), 8, 1000.0)
    np.testing.assert_allclose(short, np.arange(1, 9) / 51)


def test_warm_up_rises_to_the_rate_that_follows():
    recipe = Recipe(
        schedule="steps",
        schedule_unit="steps",
        warmup=4,
        milestones=(6, 8),
        lr_factors=(0.1, 1.0, 0.01),
    )
    expected = [0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 1, 1, 0.01, 0.01]
    np.testing.assert_allclose(rates(recipe, 10, 1000.0), expected)


def test_factors_are_tenths_where_none_are_told():
    recipe = Recipe(schedule="steps", schedule_unit="steps", milestones=(2, 3))
    np.testing.assert_allclose(rates(recipe, 5, 1.0), [1, 1, 0.1, 0.01, 0.01])
    assert (rates(Recipe(schedule="steps"), 5, 1.0) == 1).all()


@given(images=st.integers(1, 10**6), batch=st.integers(1, 1024), epoch=st.integers(1, 300))
@example(images=2997, batch=7, epoch=252)  # 107,892 steps; 251.99999999999997 in floats
def test_a_milestone_in_epochs_is_the_first_step_after_them(images, batch, epoch):
    recipe = Recipe(schedule="steps", milestones=(epoch,), lr_factors=(1.0, 0.5))
    first = math.ceil(epoch * images / batch) if epoch * images % batch else epoch * images // batch
    found = [rate_factor(recipe, s, 10**9, images / batch) for s in (first - 1, first)]
    assert found == [1.0, 0.5]


def test_set_rate_keeps_the_groups_apart():
    model = create_model("cbam_resnet18", num_classes=2)
    optimizer = make_optimizer(model, Recipe(lr=0.2, backbone_lr_scale=0.1))
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == {1.0: 0.2, 0.1: 0.2 * 0.1}
    set_rate(optimizer, 0.5)
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == {1.0: 0.5, 0.1: 0.05}


# ------------------------------------------------------------------------------ the groups
NETWORKS = [
    ("cbam_resnet18", {}, (".se.", "fc.")),
    ("se_resnet18", {}, (".se.", "fc.")),
    ("ag_sononet8", {"aggregation": "mean"}, ("gate", "heads.")),
    ("ag_sononet8", {"aggregation": "ft"}, ("gate", "heads.", "classifier.")),
    ("ag_sononet8", {"aggregation": "concat"}, ("gate", "classifier.")),
    ("ag_sononet8", {"aggregation": "deep_sup"}, ("gate", "heads.", "classifier.")),
    ("sononet8", {}, ("classifier.",)),
    ("attention56_cifar", {}, (".mask.", "fc.")),
    ("resnet10t", {}, ("fc.",)),
    ("vit_tiny_patch16_224", {"img_size": 32}, ("head.",)),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32}, ("head.", "head_dist.")),
    ("convnext_atto", {}, ("head.fc.",)),
]


# what timm's vision transformers name in no_weight_decay()
UNDECAYED = {"cls_token", "pos_embed", "dist_token"}


@pytest.mark.parametrize(("name", "arguments", "parts"), NETWORKS)
def test_gates_and_classifier_learn_at_the_full_rate(name, arguments, parts):
    model = create_model(name, num_classes=3, **arguments)
    names = [n for n, _ in model.named_parameters()]
    expected = {
        n for n in names if n.startswith(parts) or any(p in n for p in parts if p[0] == ".")
    }
    assert 0 < len(expected) < len(names)
    assert all(any(part in n for n in expected) for part in parts)
    assert gate_and_head_parameters(model) == expected
    for decay_norm_and_bias in (True, False):
        recipe = Recipe(
            backbone_lr_scale=0.1, weight_decay=0.03, decay_norm_and_bias=decay_norm_and_bias
        )
        told = {id(p): (n, p.ndim) for n, p in model.named_parameters()}
        found = []
        for group in make_optimizer(model, recipe).param_groups:
            for p in group["params"]:
                n, ndim = told[id(p)]
                found.append(n)
                assert group["lr_scale"] == (1.0 if n in expected else 0.1), n
                decays = (decay_norm_and_bias or ndim > 1) and n not in UNDECAYED
                assert group["weight_decay"] == (0.03 if decays else 0), n
        assert sorted(found) == sorted(names)  # each of them, once


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n, a, _ in NETWORKS[::2]])
def test_without_decay_norm_and_bias_norms_and_biases_are_spared(name, arguments):
    """By the kind of module, not by the number of dimensions."""
    model = create_model(name, num_classes=3, **arguments)
    norms = {
        id(p)
        for m in model.modules()
        if "norm" in type(m).__name__.lower() and not list(m.children())
        for p in m.parameters()
    }
    spared = {n for n, p in model.named_parameters() if id(p) in norms or n.endswith("bias")}
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, Recipe(decay_norm_and_bias=False)).param_groups
        for p in group["params"]
    }
    for n, p in model.named_parameters():
        if n in spared:
            assert decays[id(p)] == 0, n
        elif n.endswith(("conv.weight", "conv1.weight", "conv2.weight", "fc.weight")):
            assert decays[id(p)] == 1e-4, n


def test_frozen_parameters_are_left_out():
    model = create_model("resnet10t", num_classes=2)
    for p in model.layer1.parameters():
        p.requires_grad_(False)
    count = sum(len(g["params"]) for g in make_optimizer(model, Recipe()).param_groups)
    assert count == sum(p.requires_grad for p in model.parameters())


def test_what_timms_networks_except_from_weight_decay_does_not_decay():
    model = create_model("vit_tiny_patch16_224", num_classes=2, img_size=32)
    for decay_norm_and_bias in (True, False):
        groups = make_optimizer(model, Recipe(decay_norm_and_bias=decay_norm_and_bias)).param_groups
        decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        assert decays[id(model.cls_token)] == decays[id(model.pos_embed)] == 0
        assert decays[id(model.head.weight)] == 1e-4
        assert decays[id(model.norm.bias)] == (1e-4 if decay_norm_and_bias else 0)
        assert all(g["fused"] for g in groups)


def test_the_optimizers_are_pytorchs():
    model = torch.nn.Linear(3, 2)  # a network that is not timm's has no classifier
    assert gate_and_head_parameters(model) == set()
    sgd = make_optimizer(model, Recipe(momentum=0.8, weight_decay=0.02, lr=0.3))
    assert isinstance(sgd, torch.optim.SGD)
    (group,) = sgd.param_groups
    wanted = {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02, "dampening": 0}
    assert {k: group[k] for k in wanted} == wanted
    assert not make_optimizer(model, Recipe(nesterov=False)).param_groups[0]["nesterov"]
    assert not make_optimizer(model, Recipe(momentum=0.0)).param_groups[0]["nesterov"]
    adamw = make_optimizer(model, Recipe(optimizer="adamw", weight_decay=0.05, lr=1e-3))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.param_groups[0]["lr"], adamw.param_groups[0]["weight_decay"]) == (1e-3, 0.05)


def test_three_steps_by_hand():
    """SGD as the papers write it: v = 0.9 v + g + decay w, w = w - lr (g' + 0.9 v)."""
    p = torch.nn.Parameter(torch.tensor([2.0]))
    holder = torch.nn.Module()
    holder.register_parameter("p", p)
    optimizer = make_optimizer(holder, Recipe(lr=0.1, weight_decay=0.01))
    w, v = 2.0, 0.0
    for step, rate in enumerate((0.1, 0.1, 0.01)):
        set_rate(optimizer, rate)
        optimizer.zero_grad()
        (3.0 * p * (step + 1)).sum().backward()
        optimizer.step()
        g = 3.0 * (step + 1) + 0.01 * w
        v = 0.9 * v + g
        w -= rate * (g + 0.9 * v)
        assert p.item() == pytest.approx(w, rel=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_moves_each_matrix_by_all_of_its_directions_alike(nesterov):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(8, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Flatten(),
        torch.nn.Linear(16, 12),
    )  # fmt: skip
    recipe = Recipe(
        optimizer="muon", lr=0.01, weight_decay=0.0, momentum=0.9, nesterov=nesterov,
        decay_norm_and_bias=False,
    )  # fmt: skip
    optimizer = make_optimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(256, 8, 3, 3)).square().sum().backward()
    optimizer.step()
    moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    for name in ("0.weight", "3.weight"):
        values = torch.linalg.svdvals(moved[name].flatten(1))
        rows, columns = moved[name].flatten(1).shape
        # as much as AdamW moves it: 0.2 a value, in the root of the mean square (Liu et al. 2025)
        expected = 0.01 * 0.2 * max(rows, columns) ** 0.5
        assert (values / expected).detach().numpy() == pytest.approx(1.0, abs=0.35)
    if not nesterov:  # else NAdam's first step
        for name in ("1.weight", "1.bias", "3.bias"):  # AdamW's first step is the rate
            assert moved[name].abs().numpy() == pytest.approx(0.01, rel=0.01)


def matrix(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """(1, rows, columns) with these singular values."""
    generator = torch.Generator().manual_seed(rows)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator))[0]
        for n in (rows, columns)
    )
    return ((u * values) @ v.mT)[None]


@pytest.mark.parametrize("shape", [(64, 576), (96, 32), (48, 48), (1, 9)])
@pytest.mark.parametrize("decay", [0.0, -3.0, -8.0])
@pytest.mark.parametrize("steps", [0, 1, 5, 9])
def test_muons_products_are_timms_in_float32(shape, decay, steps):
    values = torch.logspace(0, decay, min(shape))
    values[min(shape) // 2 + 1 :] *= decay != -8.0  # half of the rank
    x = matrix(*shape, values)
    coefficients = muon_coefficients("quintic")  # five; the last are repeated
    found = orthogonal_by_gram(x, steps, coefficients, eps=1e-7)
    expected = zeropower_via_newtonschulz(
        x.double(), steps, coefficients, eps=1e-7, dtype=torch.float64
    )
    assert (found - expected).norm() <= 2e-3 * expected.norm()  # bf16: 0.006 to 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_muons_products_of_narrow_matrices_are_in_float32(dtype):
    x = matrix(64, 576, torch.logspace(0, -3, 64)).to(dtype)
    coefficients = muon_coefficients("polar_express")
    found = orthogonal_by_gram(x, 5, coefficients, eps=1e-7)
    expected = zeropower_via_newtonschulz(x.double(), 5, coefficients, dtype=torch.float64)
    assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_muon_multiplies_in_float32_on_a_cpu_and_moves_no_matrix_without_a_gradient():
    layer = torch.nn.Linear(64, 32, bias=False)
    start = layer.weight.detach().clone()
    recipe = Recipe(optimizer="muon", lr=1.0, weight_decay=0.0, nesterov=False)
    optimizer = make_optimizer(layer, recipe)
    layer.weight.grad = torch.zeros(32, 64)
    optimizer.step()
    assert torch.equal(layer.weight, start)
    layer.weight.grad = matrix(32, 64, torch.logspace(0, -2, 32))[0]
    optimizer.step()
    expected = zeropower_via_newtonschulz(
        layer.weight.grad.double(), 5, muon_coefficients(optimizer.defaults["ns_coefficients"]),
        dtype=torch.float64,
    )  # fmt: skip
    moved = (start - layer.weight).detach() / (0.2 * 64**0.5)
    assert (moved - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_timms_and_its_state_goes_on_there(nesterov):
    """Stacked by shape, with what is frozen or has no gradient left out."""
    torch.manual_seed(0)
    model = create_model("cbam_resnet18", channels=(16, 16, 32, 32), num_classes=3)
    model = model.to(memory_format=torch.channels_last)
    recipe = Recipe(optimizer="muon", lr=0.015, weight_decay=0.1, nesterov=nesterov)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    one = make_optimizer(ours, recipe)
    other = timm.optim.Muon(
        parameter_groups(theirs, recipe), lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov
    )
    for step in range(4):
        if step == 2:
            one.load_state_dict(copy.deepcopy(other.state_dict()))
        for k, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = None if k == step else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        assert one.step(lambda step=step: step) == step
        other.step()
        assert sum(p.grad is not None for p in ours.parameters()) == k
    for p, q, start in zip(ours.parameters(), theirs.parameters(), model.parameters(), strict=True):
        assert (p - q).norm() <= 1e-2 * (q - start).norm()  # products in bf16
