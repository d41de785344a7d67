"""Recipes: the papers' numbers, step by step; round trips; and errors for people."""

import re

import numpy as np
import pytest
import timm
import torch

import regard
from regard.recipes import Recipe, fields_of, load_recipe, parse_recipe, recipe_toml, shipped
from regard.training.choices import (
    choose_steps,
    image_weights,
    loss_weights,
    noisy_labels,
    parse_weights,
)
from regard.training.optimisation import fast_parameters, make_optimizer, rate_factor


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_read_and_written_back(name):
    recipe = load_recipe(name)
    assert parse_recipe(recipe_toml(recipe, "header\nof two lines"), "again") == recipe
    text = shipped()[name]
    assert re.search(r"^# .*regard (?:train|demo)", text, re.M)
    assert "easured" in text or "docs/training.md" in text


def rate(name: str, step: int, epoch_steps: float = 100.0, total: int = 10**6) -> float:
    recipe = load_recipe(name)
    return recipe.lr * rate_factor(recipe, step, recipe.steps or total, epoch_steps)


def test_the_papers_learning_rates():
    for step, expected in (
        (0, 0.1), (63_999, 0.1), (64_000, 0.01), (95_999, 0.01), (96_000, 0.001), (159_999, 0.001),
    ):  # fmt: skip
        assert rate("attention-cifar", step) == pytest.approx(expected), step
    for step, expected in ((199_999, 0.1), (200_000, 0.01), (400_000, 1e-3), (500_000, 1e-4)):
        assert rate("attention-imagenet", step) == pytest.approx(expected), step
    for epoch, expected in ((0, 0.1), (29.99, 0.1), (30, 0.01), (60, 0.001), (89.9, 0.001)):
        assert rate("cbam-imagenet", int(epoch * 100)) == pytest.approx(expected), epoch
    for epoch, expected in ((0, 0.01), (4.99, 0.01), (5, 0.1), (99, 0.1), (100, 0.01), (200, 1e-3)):
        assert rate("ag-sononet", int(epoch * 100)) == pytest.approx(expected), epoch
    recipe = load_recipe("attention-cifar")
    assert (recipe.steps, recipe.batch_size, recipe.nesterov) == (160_000, 64, True)
    assert (recipe.momentum, recipe.weight_decay, recipe.decay_all) == (0.9, 1e-4, True)
    fast = load_recipe("attention-cifar-fast")
    assert fast.steps * fast.batch_size == recipe.steps * recipe.batch_size
    assert load_recipe("cbam-imagenet").nesterov is False


def test_the_shapes_of_schedules():
    for schedule in ("onecycle", "cosine"):
        recipe = Recipe(schedule=schedule, warmup=2.0, lr=1.0)
        rates = [rate_factor(recipe, s, 400, 40.0) for s in range(400)]
        peak = int(np.argmax(rates))
        assert 70 <= peak <= 110
        assert (np.diff(rates[:peak]) > 0).all()
        assert (np.diff(rates[peak + 1 :]) < 0).all()
        assert rates[0] < 0.05
        assert rates[-1] < 1e-3
        assert max(rates) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 0.1\nlearning_rate = 2", "a recipe has no 'learning_rate'"),
        ("momentun = 0.9", "did you mean momentum"),
        ("lr = 'fast'", "lr='fast': a number is needed"),
        ("epochs = 3\nsteps = 4", "give one of them"),
        ("schedule = 'linear'", "choose one of steps, onecycle, cosine, constant"),
        ("milestones = [3, 1]", "in rising order"),
        ("milestones = [1]\nfactors = [1.0]", "one more than the 1 milestones"),
        ("zoom = [1.0]", "2 numbers"),
        ("flip = true", "flip=True: a number is needed"),
        ("val = 0.6\ntest = 0.5", "leave nothing to train on"),
        ("lr = ", "recipe x.toml: "),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_recipe(text, "x.toml")


def test_every_field_is_a_documented_flag(capsys):
    from regard.cli import run_command

    run_command(["train", "--help"])
    told = capsys.readouterr().out
    for f in fields_of():
        assert f"--{f.name.replace('_', '-')}" in told
        assert len(f.metadata["help"]) > 6


def groups(model, **recipe):
    optimizer = make_optimizer(model, Recipe(**recipe))
    names = {id(p): n for n, p in model.named_parameters()}
    found = [
        (g["lr_scale"], g["weight_decay"], {names[id(p)] for p in g["params"]})
        for g in optimizer.param_groups
    ]
    everything = [n for _, _, ns in found for n in ns]
    assert sorted(everything) == sorted(names.values())
    return found


@pytest.mark.parametrize(
    ("name", "fast", "slow"),
    [
        ("cbam_resnet18", {"fc.weight", "layer1.0.se.spatial.bn.weight"}, {"conv1.weight"}),
        ("ag_sononet8", {"heads.0.weight", "gate3.map.psi.bias"}, {"block1.0.0.weight"}),
        ("attention56_cifar", {"layer1.1.mask.tail.2.weight"}, {"layer1.1.trunk.0.bn1.bias"}),
        ("resnet18", {"fc.weight"}, {"layer4.1.bn2.weight"}),
    ],
)  # fmt: skip
def test_gates_and_classifier_are_faster_than_the_body(name, fast, slow):
    model = timm.create_model(name, num_classes=3)
    found = fast_parameters(model)
    assert fast <= found
    assert not slow & found
    by_scale = {scale: names for scale, _, names in groups(model, body_lr=0.1)}
    assert by_scale[1.0] == found
    assert slow <= by_scale[0.1]


def test_norms_and_biases_need_not_decay():
    model = regard.create_model("cbam_resnet18", num_classes=3)
    by_decay = {decay: names for _, decay, names in groups(model, decay_all=False)}
    assert "bn1.weight" in by_decay[0.0]
    assert "fc.bias" in by_decay[0.0]
    assert "conv1.weight" in by_decay[1e-4]


def test_lengths():
    assert choose_steps(Recipe(steps=7), 1000, 2) == 7
    assert choose_steps(Recipe(epochs=3, batch_size=64), 1000, 1) == 47  # 46.875, rounded up
    assert choose_steps(Recipe(epochs=3, batch_size=64, accumulate=2), 1000, 2) == 12
    lengths = [
        choose_steps(Recipe(batch_size=10), n, 1) * 10 / n for n in (20, 2000, 50_000, 10**7)
    ]
    assert lengths == pytest.approx([60, 15, 3, 3], rel=0.02)


def test_weights_of_classes():
    from regard.data.sources import open_data

    table = open_data("digits")
    counts = np.bincount(table.labels)
    balanced = loss_weights(table, Recipe(class_weights="balanced")).numpy()
    np.testing.assert_allclose((balanced[table.labels]).mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(balanced * counts, (balanced * counts)[0], rtol=1e-6)
    drawn = image_weights(table, Recipe(sampler="balanced", sampler_weights="3=13"))
    np.testing.assert_allclose(drawn[table.labels == 3].sum(), 13)
    np.testing.assert_allclose(drawn[table.labels == 4].sum(), 1)
    assert image_weights(table, Recipe()) is None
    for text in ("cat=1", "3", "3=x", "3=-1"):
        with pytest.raises(ValueError, match="--class-weights"):
            parse_weights(text, table.classes, "--class-weights")


def test_label_noise_is_what_it_says():
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    noisy = noisy_labels(labels, 10, 0.3, 1)
    assert (noisy != labels).sum() == 1500
    assert np.array_equal(noisy, noisy_labels(labels, 10, 0.3, 1))
    changed = np.bincount((noisy - labels)[noisy != labels] % 10, minlength=10)[1:]
    assert changed.min() > 120  # evenly over the nine others
    assert torch.is_tensor(torch.from_numpy(noisy))
