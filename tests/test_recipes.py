"""Recipes: the papers' numbers, step by step; round trips; and errors for people."""

import csv
import dataclasses
import enum
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import regard
from regard.data.loading import Reader
from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable, open_data
from regard.errors import UsageError
from regard.papers import load_table
from regard.training.config import Recipe, fields_of
from regard.training.optim import gate_and_head_parameters, make_optimizer, rate_factor
from regard.training.plan import (
    choose_steps,
    fit_schedule,
    image_weights,
    loss_weights,
    noisy_labels,
    parse_weights,
)
from regard.training.recipe_files import load_recipe, parse_recipe, recipe_toml, shipped
from regard.training.steps import StepPlan, step_plan


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_read_and_written_back(name):
    recipe = load_recipe(name)
    assert parse_recipe(recipe_toml(recipe, "header\nof two lines"), "again") == recipe


def rates(recipe: Recipe, images: int) -> tuple[np.ndarray, StepPlan]:
    """The learning rate of each step of a run, and how its steps are cut."""
    plan = step_plan(recipe, images, 1)
    total = choose_steps(recipe, images, 1)
    factors = [rate_factor(recipe, s, total, plan.an_epoch) for s in range(total)]
    return recipe.lr * np.array(factors), plan


def step_lr(base: float, milestones: tuple[int, ...], total: int) -> np.ndarray:
    """Caffe's `multistep` policy, gamma 0.1: rate(iteration) = base * gamma ** drops so far."""
    drops = np.zeros(total)
    for milestone in milestones:
        drops[milestone:] += 1
    return base * 0.1**drops


# The papers' and the authors' own formulas, written out; a step each.
def test_every_step_of_the_residual_attention_recipes_has_the_papers_rate():
    found, _ = rates(load_recipe("attention-cifar"), 50_000)
    np.testing.assert_allclose(found, step_lr(0.1, (64_000, 96_000), 160_000))
    found, plan = rates(load_recipe("attention-imagenet"), 1_281_167)
    np.testing.assert_allclose(found, step_lr(0.1, (200_000, 400_000, 500_000), 530_000))
    assert len(found) / plan.an_epoch == pytest.approx(106, abs=0.2)


@pytest.mark.parametrize(
    ("changes", "epochs"), [({}, 90), ({"epochs": 100, "milestones": (30, 60, 90)}, 100)]
)
def test_every_step_of_cbams_recipe_has_the_rate_of_its_script(changes, epochs):
    """train_imagenet.py: lr = args.lr * (0.1 ** (epoch // 30)), a loader that drops no batch."""
    found, _ = rates(load_recipe("cbam-imagenet").changed(**changes), 10_000)
    loader = math.ceil(10_000 / 256)  # len(DataLoader), batches of all GPUs together
    wanted = [0.1 * (0.1 ** (epoch // 30)) for epoch in range(epochs) for _ in range(loader)]
    np.testing.assert_allclose(found, wanted)


@pytest.mark.parametrize(
    ("changes", "batches"),
    [
        ({}, 10),
        ({"steps": 30_000, "milestones": (500, 10_000, 20_000)}, 100),
        ({"epochs": 300, "schedule_unit": "epochs", "milestones": (5, 100, 200)}, 20),
    ],
)
def test_every_step_of_the_sononet_recipe_has_the_rate_of_its_script(changes, batches):
    """A scheduler of epochs, each stopped after so many batches; 20 are all of 1,280 images."""

    def of_epoch(epoch: int) -> float:
        return 0.01 if epoch < 5 else 0.1 if epoch < 100 else 0.01 if epoch < 200 else 0.001

    found, _ = rates(load_recipe("ag-sononet").changed(**changes), 1280)
    wanted = [of_epoch(epoch) for epoch in range(300) for _ in range(batches)]
    np.testing.assert_allclose(found, wanted)


def test_recipes_of_our_own():
    cifar, fast = load_recipe("attention-cifar"), load_recipe("attention-cifar-fast")
    assert fast.steps * fast.batch_size == cifar.steps * cifar.batch_size
    assert fast.lr / fast.batch_size == cifar.lr / cifar.batch_size
    shares = [tuple(m / r.steps for m in r.milestones) for r in (cifar, fast)]
    assert shares[0] == shares[1] == (0.4, 0.6)
    found, _ = rates(load_recipe("cbam-cifar"), 1280)  # ten steps an epoch
    wanted = [0.1] * 1000 + [0.01] * 500 + [0.001] * 500
    np.testing.assert_allclose(found, wanted)


def test_the_shapes_of_schedules():
    for schedule in ("onecycle", "cosine"):
        recipe = Recipe(schedule=schedule, warmup=2.0 if schedule == "cosine" else 0.0)
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
        ("milestones = [3, 1]", "in increasing order"),
        ("milestones = [1]\nlr_factors = [1.0]", "one more than 1 milestone"),
        ("zoom = [1.0]", "2 numbers"),
        ("flip = true", "flip=True: a number is needed"),
        ("val = 0.6\ntest = 0.5", "leave nothing to train on"),
        ("lr = ", "recipe x.toml: "),
        ("lr = 0.1\nmomentum 0.9", "line 2"),
        ("batch_size = 64.0", "batch_size=64.0: a whole number is needed"),
        ("nesterov = 1", "nesterov=1: true or false is needed"),
        ("schedule = 3", "schedule=3: "),
        ("milestones = 30", "milestones=30: give a list of numbers"),
        ("milestones = ['30']", "milestones=['30']: give a list of numbers"),
        ("lr_factors = [-1.0]", "must be >= 0"),
        ("lr = nan", "lr=nan: must be"),
        ("epochs = inf", "epochs=inf: must be < inf"),
        ("zoom = [0.5, inf]", "zoom=0.5, inf: must be < inf"),
        ("zoom = [1.2, 0.8]", "in increasing order"),
        ("crop_scale = [0.1, 2.0]", "must be <= 1"),
        ("batch_size = 0", "batch_size=0: must be >= 1"),
        ("flip = 1.5", "flip=1.5: must be <= 1"),
        ("size = 2", "size=2: must be >= 4"),
        ("epochs = 0", "must be > 0"),
        ("label_smoothing = 1.0", "label_smoothing=1.0: must be <= 0.999"),
        ("model = 'attention56'", "a table [model]"),
        ("model = 3", "a table [model]"),
        ("[model]\nname = 3", "a table [model]"),
        (
            "schedule = 'cosine'\nmilestones = [3]",
            "milestones=(3.0,): not used with schedule=cosine",
        ),
        ("warmup = 1", "not used with schedule=onecycle"),
        ("optimizer = 'adamw'\nmomentum = 0.5", "not used with optimizer=adamw"),
        ("crop_scale = [0.5, 1]", "not used with random_crop=none"),
        ("resize = 'pad'\ncrop_pct = 0.9", "not used with resize=pad"),
        ("size = [4, 5, 6]", "give one number, or height and width"),
        ("size = 48.5", "a whole number is needed"),
        ("model_args = {}", "a recipe has no 'model_args'"),
        ("zzzz = 1", "it has epochs, steps, batch_size"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        parse_recipe(text, "x.toml")
    assert str(e.value).startswith("recipe x.toml: ")
    assert "\n" not in str(e.value)


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("# mine\nlr = 1\nzoom = [1, 2]\n[model]\nname = 'ag_sononet8'\nsize = 3\n")
    found = load_recipe(path)
    assert found == Recipe(lr=1.0, zoom=(1.0, 2.0), model="ag_sononet8", model_args={"size": 3})
    assert isinstance(found.lr, float)
    path.write_bytes(b"lr = '\xff'")
    for wrong, message in (
        (path, "can't be read as a recipe"),
        (tmp_path / "none.toml", "can't be read as a recipe"),
        (tmp_path, "no recipe"),
        ("attention-cifer", "did you mean attention-cifar"),
    ):
        with pytest.raises(ValueError, match=message) as e:
            load_recipe(wrong)
        assert "\n" not in str(e.value)


def test_values_on_top_of_a_recipe():
    changed = Recipe().changed(lr=1, zoom=[0.5, 2], size=None, model="resnet18")
    assert (changed.lr, changed.zoom, changed.model) == (1.0, (0.5, 2.0), "resnet18")
    for values, message in (
        ({"lr": "fast"}, "lr='fast': a number is needed"),
        ({"lr": None}, "lr=None: a number is needed"),
        ({"learning_rates": 1}, "a recipe has no 'learning_rates'"),
        ({"steps": 1.5}, "steps=1.5: a whole number is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe().changed(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "0.1"}, "lr='0.1': a number is needed"),
        ({"flip": [1]}, "flip=[1]: a number is needed"),
        ({"batch_size": 8.0}, "batch_size=8.0: a whole number is needed"),
        ({"nesterov": {}}, "nesterov={}: true or false is needed"),
        ({"size": "32"}, "size='32': give a list of numbers"),
        ({"class_weights": {"a": 2}}, "class_weights={'a': 2}: a text is needed"),
        ({"class_weights": ""}, "class_weights '': give none, balanced or CLASS=WEIGHT"),
        ({"lr": 10**400}, "lr=inf: must be < inf"),
        ({"steps": 10**400}, "must be <= 2147483648"),
        ({"epochs": 1e308}, "must be <= 1000000"),
    ],
)
def test_a_recipe_that_is_made_in_python_is_checked_as_one_in_a_file(values, message):
    for make in (lambda: Recipe(**values), lambda: Recipe().changed(**values)):
        with pytest.raises(UsageError, match=re.escape(message)):
            make()


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    """As Windows' editors save it."""
    (tmp_path / "mine.toml").write_text("lr = 0.3\n", encoding="utf-8-sig")
    assert load_recipe(tmp_path / "mine.toml").lr == 0.3
    rows = '[[rows]]\nname = "a"\nnetwork = "ag_sononet8"\n'
    (tmp_path / "study.toml").write_text(rows, encoding="utf-8-sig")
    assert [row.name for row in load_table(tmp_path / "study.toml").rows] == ["a"]


def test_a_recipe_that_is_made_in_python_has_its_fields_types():
    recipe = Recipe(lr=1, size=32, zoom=[1, 2], steps=np.int64(3))
    assert (recipe.lr, recipe.size, recipe.zoom) == (1.0, (32, 32), (1.0, 2.0))
    assert [type(v) for v in (recipe.lr, recipe.zoom[0], recipe.steps)] == [float, float, int]


def test_a_value_replaces_what_excludes_it():
    cifar, sononet, finetune = map(load_recipe, ("attention-cifar", "ag-sononet", "finetune"))
    assert (cifar.changed(epochs=2).steps, sononet.changed(steps=9).epochs) == (None, None)
    assert (cifar.changed(steps=5).steps, cifar.changed(epochs=None).steps) == (5, 160_000)
    onecycle = sononet.changed(schedule="onecycle")
    assert (onecycle.milestones, onecycle.lr_factors) == ((), ())
    assert finetune.changed(schedule="onecycle").warmup == 0
    assert finetune.changed(random_crop="none").crop_scale == Recipe().crop_scale
    assert finetune.changed(resize="squash").crop_pct == 1
    assert cifar.changed(optimizer="adamw").momentum == Recipe().momentum
    for recipe, values, message in (
        (cifar, {"schedule": "cosine", "milestones": (3,)}, "not used with schedule=cosine"),
        (Recipe(), {"warmup": 3}, "not used with schedule=onecycle"),
        (finetune, {"momentum": 0.9}, "not used with optimizer=adamw"),
        (finetune, {"crop_shift": 0.1}, "not used with random_crop=resized"),
        (cifar, {"epochs": 3, "steps": 4}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.changed(**values)


STARTS = """
lr = 0.05
random_crop = "shift"
[random_start]
optimizer = "muon"
lr = 0.015
crop_scale = [0.35, 1]
random_crop = "resized"
"""


def test_a_recipe_can_have_other_values_for_random_weights():
    recipe = parse_recipe(STARTS, "mine")
    assert parse_recipe(recipe_toml(recipe), "again") == recipe
    assert (recipe.optimizer, recipe.lr) == ("sgd", 0.05)
    random = recipe.for_start(random=True)
    assert (random.optimizer, random.lr, random.momentum) == ("muon", 0.015, recipe.momentum)
    assert (random.random_crop, random.crop_scale) == ("resized", (0.35, 1.0))
    loaded = recipe.for_start(random=False)
    assert loaded == dataclasses.replace(recipe, random_start={})
    # one of them set by hand: the others would be another optimizer's
    assert recipe.changed(lr=0.1).for_start(random=True) == loaded.changed(lr=0.1)
    # not used beside random_crop = "resized"
    assert recipe.changed(crop_shift=0.2).for_start(random=True) == loaded.changed(crop_shift=0.2)
    other = recipe.changed(flip=0.0).for_start(random=True)
    assert (other.optimizer, other.flip) == ("muon", 0.0)
    for one in (random, loaded):
        assert one.random_start == {}
        assert "random_start" not in recipe_toml(one)


def test_a_table_goes_where_one_of_its_values_is_changed_or_not_used():
    recipe = parse_recipe(STARTS, "mine")
    same = recipe.changed(optimizer="muon").for_start(random=True)
    assert (same.optimizer, same.lr) == ("muon", 0.015)
    for changes in ({"optimizer": "sgd"}, {"lr": 0.02}, {"random_crop": "none"}):
        assert recipe.changed(**changes).random_start == {}
    table = "[random_start]\nmomentum = 0.8"
    adamw = parse_recipe(table, "mine").changed(optimizer="adamw")
    assert adamw.for_start(random=True).momentum == Recipe().momentum


def test_quick_takes_muon_from_random_weights_and_sgd_from_others():
    quick = load_recipe("quick")
    values = [(r.optimizer, r.lr, r.weight_decay) for r in map(quick.for_start, (True, False))]
    assert values == [("muon", 0.015, 0.1), ("sgd", 0.05, 5e-4)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("size = 64", "random_start has 'size'; it can have optimizer, lr, "),
        ("pretrained = 'no'", "random_start has 'pretrained'"),
        ("learning_rate = 1", "random_start has 'learning_rate'"),
        ("lr = 'fast'", "lr='fast': a number is needed"),
        ("lr = -1", "lr=-1.0: must be >= 0"),
        ("optimizer = 'lion'", "optimizer='lion': choose one of sgd, adamw, muon"),
        ("crop_scale = [0.5, 1.0]", "crop_scale=.*not used with random_crop=shift"),
    ],
)
def test_what_random_start_can_not_have(table, message):
    text = f"random_crop = 'shift'\n[random_start]\n{table}"
    with pytest.raises(UsageError, match=f"recipe mine: {message}"):
        parse_recipe(text, "mine")
    with pytest.raises(UsageError, match="recipe mine: random_start=3: give a table"):
        parse_recipe("random_start = 3", "mine")


def test_a_size_is_height_and_width():
    for given in (48, [48], (48, 48)):
        assert Recipe().changed(size=given).size == Recipe(size=given).size == (48, 48)
    assert Recipe().changed(size=[208, 272]).size == (208, 272)
    assert parse_recipe("size = [208, 272]", "x").size == (208, 272)
    assert parse_recipe("size = 48", "x") == Recipe(size=48)


def test_every_value_survives_the_file():
    recipe = Recipe(
        epochs=1 / 3, lr=1e-7, schedule="steps", milestones=(0.1, 2 / 3),
        lr_factors=(1.0, 0.1, 1e-9), workers=0, size=(48, 64), seed=2**31,
        sampler_weights='Größe "3"=2', model="ag_sononet8",
        model_args={"aggregation": "ft", "stem": 'a"b', "drop": 0.1, "flags": [1, 2]},
    )  # fmt: skip
    header = 'regard train "a\\b" --lr 1\nnext'
    assert parse_recipe(recipe_toml(recipe, header), "again") == recipe
    assert recipe_toml(recipe, header).startswith('# regard train "a\\b" --lr 1\n# next\n')


def commands(text: str) -> list[list[str]]:
    """The `regard train ...` of a recipe's header, with lines joined that end in a backslash."""
    comment = "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    lines = comment.replace("\\\n", " ").splitlines()
    calls = [line.partition("regard train ")[2] for line in lines if "regard train " in line]
    return [["train", *shlex.split(call)] for call in calls]


@pytest.mark.parametrize("name", shipped())
def test_the_headers_command_is_one(name):
    from regard.cli import app

    found = commands(shipped()[name])
    assert found
    named = set()
    for tokens in found:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        assert command.__module__ == "regard.commands.train"
        recipe = load_recipe(bound.arguments.get("recipe", "quick"))
        flags = bound.arguments.get("flags")
        changes = {} if flags is None else {k: v for k, v in vars(flags).items() if v is not None}
        changed = recipe.changed(**changes)
        assert fit_schedule(changed, recipe, changes, 10_000, 1) == changed
        model = bound.arguments.get("model") or recipe.model
        assert model is not None
        assert model == "NAME" or timm.is_model(model)
        named.add(bound.arguments.get("recipe", "quick"))
    assert name in named


@pytest.mark.parametrize("name", ["attention-imagenet", "cbam-imagenet"])
def test_images_of_a_step_are_the_papers(name):
    """Processes times the batch of each, in the header's command for several processes."""
    text = shipped()[name]
    processes = int(re.search(r"--num_processes (\d+)", text)[1])
    batch = int(re.search(r"--batch-size (\d+)", text)[1])
    assert batch >= 32
    assert processes * batch == load_recipe(name).batch_size == 256


@pytest.mark.parametrize("name", shipped())
def test_a_header_says_with_what_it_runs_and_what_to_expect(name):
    lines = (line.lstrip("# ") for line in shipped()[name].splitlines() if line.startswith("#"))
    words = " ".join(lines)
    for word in ("data ", "command ", "expected", "hardware"):
        assert word in words, word
    root = Path(__file__).parents[1]
    whole = [p.read_text().splitlines()[1] for p in root.glob("benchmarks/results/*/recipe.toml")]
    known = {"demo"} | {n for n in shipped() if any(f"--recipe {n}" in text for text in whole)}
    assert ("not measured" in words) == (name not in known)
    with (root / "benchmarks/recipes.csv").open(newline="") as file:
        measured = {row["recipe"] for row in csv.DictReader(file)}
    assert ("docs/training.md" in words) == (name in measured - {"demo"})


PAPERS = ["ag-sononet", "ag-sononet-ft", "attention-cifar", "attention-imagenet", "cbam-imagenet"]


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_recipe_computes_in_fp32_and_says_so(name):
    assert load_recipe(name).precision == "fp32"
    if name != "ag-sononet-ft":
        assert "fp32" in shipped()[name]


def test_the_rest_of_the_papers_numbers():
    cifar, imagenet, cbam = map(
        load_recipe, ("attention-cifar", "attention-imagenet", "cbam-imagenet")
    )
    for recipe in (cifar, imagenet, cbam):
        assert (recipe.momentum, recipe.weight_decay, recipe.decay_norm_and_bias) == (
            0.9, 1e-4, True,
        )  # fmt: skip
        assert (recipe.lr, recipe.flip, recipe.optimizer) == (0.1, 0.5, "sgd")
        assert recipe.nesterov == (recipe is not cbam)
    assert cifar.crop_shift * cifar.size[0] == 4
    assert (cifar.batch_size, imagenet.lighting, cbam.lighting) == (64, 0.1, 0.0)
    for recipe in (imagenet, cbam):
        assert (recipe.size, recipe.crop_pct) == ((224, 224), 224 / 256)
        assert (recipe.random_crop, recipe.crop_scale, recipe.full_decode) == (
            "resized", (0.08, 1.0), True,
        )  # fmt: skip
    assert cbam.partial_batch


@pytest.mark.parametrize("name", ["ag-sononet", "ag-sononet-ft"])
def test_the_sononet_recipes_have_the_authors_effective_values(name):
    recipe = load_recipe(name)
    assert (recipe.batch_size, recipe.weight_decay, recipe.nesterov) == (64, 1e-6, True)
    assert (recipe.shift, recipe.rotate, recipe.axis_scale) == (0.1, 15.0, (0.7, 1.3))
    assert (recipe.zoom, recipe.normalization, recipe.sampler) == ((1, 1), "image", "balanced")
    preprocess = Preprocess((1, *recipe.size), (0.5,), (0.2,), recipe.resize, recipe.crop_pct)
    assert preprocess.box(224, 288) == (8, 8, 280, 216)  # 208x272 in the middle, pixel by pixel
    image = torch.arange(224 * 288).view(1, 224, 288) % 251
    fitted = preprocess.fit(image.to(torch.uint8))
    assert torch.equal(fitted, image[:, 8:216, 8:280].to(torch.uint8))
    # 13 planes and a background as large as all of them: it is half of all draws
    labels = np.repeat(np.arange(14), [13_000, *[500] * 12, 7000])
    table = ImageTable("t", [str(c) for c in range(14)], labels, np.full(len(labels), ""),
                       arrays=np.zeros((len(labels), 1, 1), np.uint8))  # fmt: skip
    weights = image_weights(table, recipe)
    assert weights[labels == 0].sum() / weights.sum() == pytest.approx(0.5)
    shares = [weights[labels == c].sum() for c in range(1, 14)]
    assert shares == pytest.approx([shares[0]] * 13)


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
    found = gate_and_head_parameters(model)
    assert fast <= found
    assert not slow & found
    by_scale = {scale: names for scale, _, names in groups(model, backbone_lr_scale=0.1)}
    assert by_scale[1.0] == found
    assert slow <= by_scale[0.1]


def test_norms_and_biases_need_not_decay():
    model = regard.create_model("cbam_resnet18", num_classes=3)
    by_decay = {decay: names for _, decay, names in groups(model, decay_norm_and_bias=False)}
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
        with pytest.raises(ValueError, match="class_weights"):
            parse_weights(text, table.classes, "class_weights")


def test_the_share_of_the_test_does_not_count_where_a_fold_is_the_test():
    assert Recipe(fold="1/5", val=0.85).val == 0.85
    with pytest.raises(UsageError, match=r"val=0\.85 and test=0\.2 leave nothing to train on"):
        Recipe(val=0.85, test=0.2)


def test_label_noise_is_what_it_says():
    labels = np.random.default_rng(0).integers(0, 10, 5000)
    noisy = noisy_labels(labels, 10, 0.3, 1)
    assert (noisy != labels).sum() == 1500
    assert np.array_equal(noisy, noisy_labels(labels, 10, 0.3, 1))
    changed = np.bincount((noisy - labels)[noisy != labels] % 10, minlength=10)[1:]
    assert changed.min() > 120  # evenly over the nine others
    assert torch.is_tensor(torch.from_numpy(noisy))


def test_a_jpeg_is_decoded_in_full_where_the_recipe_says_so(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in "ab":
        Image.new("RGB", (640, 512)).save(tmp_path / folder / "1.jpg")
    table = open_data(str(tmp_path))
    preprocess = Preprocess((3, 64, 64), (0.5,) * 3, (0.2,) * 3)
    for full, shape in ((False, (3, 64, 80)), (True, (3, 512, 640))):
        reader = Reader(table, preprocess, Recipe(full_decode=full).augmentation)
        assert tuple(reader.decode(0).shape) == shape


def test_numpys_numbers_and_enumerations_are_values_of_a_recipe():
    class Way(enum.StrEnum):
        CROP = "crop"

    recipe = Recipe(
        size=(np.int64(64),), milestones=[np.float32(2), np.int64(3)], batch_size=np.int32(8),
        resize=Way.CROP, schedule="steps", schedule_unit="epochs",
    )  # fmt: skip
    assert recipe.size == (64, 64)
    assert recipe.milestones == (2.0, 3.0)
    assert type(recipe.batch_size) is int
    assert type(recipe.resize) is str
    with pytest.raises(UsageError, match="pretrained=True: choose one of auto"):
        Recipe(pretrained=True)
