"""What a run decides for itself, against what people's data and networks need."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import regard
from regard.commands.study_runs import Asked, _of_the_network
from regard.data.loading import SampleOrder
from regard.data.sources import ImageTable, open_data
from regard.errors import UsageError
from regard.machine import cpu_has_bf16
from regard.models import create_model, list_models
from regard.models.create import load_weights, make, make_model
from regard.models.io import save_model
from regard.runs import RunFolder
from regard.training import build
from regard.training.build import jumped_over
from regard.training.config import Recipe
from regard.training.optim import rate_factor
from regard.training.plan import (
    check_batch,
    choose_model,
    choose_precision,
    choose_preprocess,
    choose_stem,
    choose_steps,
    fit_schedule,
    image_weights,
    loss_weights,
    noisy_labels,
    parse_weights,
    plain_twin,
)
from regard.training.recipe_files import load_recipe
from regard.training.run_plan import Request, new_plan
from regard.training.start import inserted_in, network_of
from regard.training.steps import step_plan
from tests.golden import authors_networks, fill

CLASSES = ["a", "b", "c=d"]


def arrays(height: int, width: int, channels: int = 1, labels=(0, 0, 0, 1, 1, 2)) -> ImageTable:
    """A table of even images, of which with three channels one is red."""
    shape = (len(labels), height, width) + ((3,) if channels == 3 else ())
    values = np.zeros(shape, np.uint8)
    if channels == 3:
        values[-1, ..., 0] = 9
    return ImageTable("arrays", CLASSES, np.array(labels), np.full(len(labels), ""), arrays=values)


def chosen(name: str, recipe: Recipe, table: ImageTable, pretrained: bool = False):
    preprocess, arguments = choose_preprocess(name, {}, recipe, table, lambda *_: 3 * pretrained)
    _, arguments = choose_stem(
        name, arguments, preprocess.input_size[1], pretrained=pretrained, weights=None
    )
    return preprocess.input_size, arguments


# ------------------------------------------------------------------------------ the network
def test_an_unknown_network_is_told_with_its_neighbors():
    with pytest.raises(ValueError, match=r"'cbam_resnet19'; did you mean .*cbam_resnet18") as e:
        choose_model("cbam_resnet19", Recipe())
    assert "\n" not in str(e.value)


def test_a_recipes_arguments_go_to_networks_that_take_them():
    ft, cifar = load_recipe("ag-sononet-ft"), load_recipe("cbam-cifar")
    assert choose_model(None, ft) == ("ag_sononet8", {"aggregation": "ft"})
    assert choose_model("ag_sononet16", ft) == ("ag_sononet16", {"aggregation": "ft"})
    assert choose_model("attention56_cifar", ft) == ("attention56_cifar", {})
    assert choose_model("resnet18", cifar) == ("resnet18", {})
    assert choose_model("se_resnet18", cifar) == ("se_resnet18", {"stem": "cifar"})
    assert choose_model(None, Recipe()) == ("cbam_resnet18", {})
    for name, arguments in (choose_model("ag_sononet16", ft),):
        assert make_model(name, arguments, 3, (1, 64, 64), False, None).num_classes == 3


# --------------------------------------------------------------------------- size and input
def test_the_size_follows_the_images():
    quick = Recipe()
    assert chosen("cbam_resnet18", quick, open_data("digits"))[0] == (1, 32, 32)
    assert chosen("cbam_resnet18", quick, arrays(70, 99))[0] == (1, 96, 96)
    assert chosen("cbam_resnet18", quick, arrays(99, 64, 3))[0] == (3, 64, 64)
    assert chosen("attention92_cifar", quick, arrays(300, 300, 3))[0] == (3, 32, 32)
    assert chosen("cbam_resnet18", Recipe(size=57), arrays(300, 300))[0] == (1, 57, 57)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is chosen without a GPU")
def test_without_a_gpu_the_size_is_quick_and_says_so(caplog):
    caplog.set_level("INFO", "regard")
    assert chosen("cbam_resnet18", Recipe(), arrays(500, 400, 3))[0] == (3, 128, 128)
    chosen("cbam_resnet18", Recipe(), arrays(500, 200, 3))
    first, second = caplog.messages
    assert "size=224" in first
    assert "size=200" in second


def test_a_size_that_is_not_square_is_kept_for_images_as_large():
    assert chosen("ag_sononet8", Recipe(), arrays(300, 400))[0] == (1, 208, 272)
    assert chosen("ag_sononet8", Recipe(), arrays(100, 100))[0] == (1, 128, 128)


def test_a_transformer_keeps_its_size_or_is_made_for_another():
    name = "vit_tiny_patch16_224"
    size, arguments = chosen(name, Recipe(), open_data("digits"))
    assert size == (1, 224, 224)
    assert arguments == {}
    size, arguments = chosen(name, Recipe(size=64), open_data("digits"))
    assert (size, arguments) == ((1, 64, 64), {"img_size": 64})
    model = make_model(name, arguments, 10, size, False, None).eval()
    assert model(torch.zeros(2, *size)).shape == (2, 10)


def test_small_images_get_a_small_stem():
    assert chosen("cbam_resnet18", Recipe(), open_data("digits"))[1] == {"stem": "cifar"}
    assert chosen("cbam_resnet18", Recipe(size=64), open_data("digits"))[1] == {}
    assert chosen("cbam_resnet18", Recipe(), open_data("digits"), True)[1] == {}  # its weights' own
    assert chosen("ag_sononet8", Recipe(), open_data("digits"))[1] == {}


@pytest.mark.parametrize("name", ["resnet18", "resnet18.a1_in1k", "resnext50_32x4d"])
def test_timms_resnets_get_the_small_stem_of_their_twins(name, caplog):
    def stem(height=48, given=None, *, pretrained=False, weights=None):
        return choose_stem(name, given or {}, height, pretrained=pretrained, weights=weights)

    caplog.set_level("INFO")
    plain = f"plain_{name.partition('.')[0]}"
    assert stem(given={"drop_rate": 0.5}) == (plain, {"stem": "cifar", "drop_rate": 0.5})
    (line,) = caplog.messages
    assert f"{name} becomes {plain}" in line
    assert "48 pixels" in line
    caplog.clear()
    assert stem(64) == stem(pretrained=True) == stem(weights="runs/x") == (name, {})
    assert stem(given={"stem_type": "deep"}) == (name, {"stem_type": "deep"})
    assert not caplog.messages


def test_only_timms_resnets_are_replaced_by_their_twins():
    own = {name for name in list_models() if plain_twin(name)}
    assert not own
    assert {n for n in timm.list_models() if plain_twin(n)} == {
        "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d",
    }  # fmt: skip
    for name in ("attention56_cifar", "sononet8", "cbam_mobilenet_070", "vgg11"):
        assert choose_stem(name, {}, 32, pretrained=False, weights=None) == (name, {})


def test_one_image_in_color_makes_three_channels():
    assert chosen("cbam_resnet18", Recipe(), arrays(64, 64, 3))[0][0] == 3
    assert chosen("cbam_resnet18", Recipe(), arrays(64, 64))[0][0] == 1
    assert chosen("cbam_resnet18", Recipe(), arrays(64, 64), True)[0][0] == 3
    assert chosen("cbam_resnet18", Recipe(channels=3), arrays(64, 64))[0][0] == 3
    assert chosen("cbam_resnet18", Recipe(channels=1), arrays(64, 64, 3))[0][0] == 1
    with pytest.raises(ValueError, match="channels=2: choose 1 or 3"):
        Recipe(channels=2)


def test_preprocessing_is_the_recipes():
    table = arrays(64, 64, 3)

    def made(**values):
        return choose_preprocess("cbam_resnet18", {}, Recipe(**values), table, lambda *_: 0)[0]

    assert (made(crop_pct=0.9).resize, made(crop_pct=0.9).crop_pct) == ("crop", 0.9)
    for resize in ("squash", "pad"):  # the whole image
        assert made(resize=resize).crop_pct == 1
    assert made(size=(48, 64)).input_size == (3, 48, 64)
    assert made(normalization="image").normalization == "image"
    assert made(normalization="model").mean == pytest.approx((0.485, 0.456, 0.406))


def test_images_that_are_none_are_told(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        (tmp_path / c / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the images tried can be read; .*1\.png") as e:
        chosen("cbam_resnet18", Recipe(), open_data(str(tmp_path)))
    assert "\n" not in str(e.value)
    Image.new("L", (40, 50)).save(tmp_path / "b" / "2.png")
    assert chosen("cbam_resnet18", Recipe(), open_data(str(tmp_path)))[0] == (1, 48, 48)


# -------------------------------------------------------------------------------- the weights
def saved(path: Path, name: str, classes: int, **arguments) -> Path:
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, **arguments)
    config = {"input_size": (model.pretrained_cfg["input_size"]), "mean": (0.5,), "std": (0.2,)}
    return save_model(model, path, data_config=config)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("cbam_resnet18", "fc."), ("attention56_cifar", "fc."), ("ag_sononet8", "heads."),
        ("sononet8", "classifier."), ("resnet10t", "fc."), ("convnext_atto", "head.fc."),
    ],
)  # fmt: skip
def test_a_run_of_other_classes_gives_all_but_its_classifier(tmp_path, name, head):
    before = create_model(f"local-dir:{saved(tmp_path, name, 3)}", pretrained=True).state_dict()
    torch.manual_seed(1)
    channels = 3 if "sononet" not in name else 1
    model = make_model(name, {}, 5, (channels, 64, 64), False, str(tmp_path))
    after = model.state_dict()
    assert model.num_classes == 5
    kept = [k for k in before if not k.startswith(head)]
    assert all(torch.equal(before[k], after[k]) for k in kept)
    assert any(k.startswith(head) and before[k].shape != after[k].shape for k in before)
    torch.manual_seed(1)
    same = make_model(name, {}, 3, (channels, 64, 64), False, str(tmp_path)).state_dict()
    assert all(torch.equal(before[k], same[k]) for k in before)


def test_the_joint_classifier_is_trained_on_heads_that_were(tmp_path):
    """AG-SonoNet: `mean` first, then `ft`."""
    heads = saved(tmp_path, "ag_sononet8", 4, aggregation="mean")
    before = create_model(f"local-dir:{heads}", pretrained=True).state_dict()
    torch.manual_seed(1)
    joint = make_model(
        "ag_sononet8", {"aggregation": "ft"}, 4, (1, 64, 64), False, str(heads)
    ).state_dict()
    assert any(k.startswith("heads.") for k in before)
    assert all(torch.equal(joint[k], v) for k, v in before.items())
    assert {k for k in joint if k not in before} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("trained", "wanted", "channels", "message"),
    [
        ("resnet18", "cbam_resnet18", 3, "it lacks layer1.0.se."),
        ("cbam_resnet18", "resnet18", 3, "the network has no layer1.0.se."),
        ("cbam_resnet18", "cbam_resnet18", 1, "another shape of conv1.weight"),
        ("ag_sononet8", "ag_sononet16", 1, "another shape of"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, trained, wanted, channels, message):
    saved(tmp_path, trained, 3)
    with pytest.raises(ValueError, match=r"does not fit: ") as e:
        make_model(wanted, {}, 3, (channels, 64, 64), False, str(tmp_path))
    assert message in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400


def test_weights_of_a_grafted_network_name_it(scans, tmp_path):
    """With its arguments and its gates, not by the name that it is saved under."""
    plain = regard.create_model("sononet8", num_classes=3, convs=(1, 1, 1, 1, 1))
    regard.save_model(regard.graft(plain, regard.SE), tmp_path)
    assert network_of(str(tmp_path), None) == ("sononet8", {"convs": [1, 1, 1, 1, 1]})
    assert inserted_in(str(tmp_path)) == "se"
    recipe, weights = Recipe(size=32), str(tmp_path)
    for name, graft in ((None, "se"), ("sononet8", "none")):
        asked = Request(str(scans), name, recipe, weights, None, "auto", {}, recipe, {}, True)
        plan = new_plan(asked, 1)[0]
        assert (plan.model, plan.recipe.graft) == ("sononet8", graft)
    assert inserted_in("ag_sononet8.digits") == inserted_in(None) == "none"
    with pytest.raises(ValueError, match=r"it is sononet8 \+ SE for images of 1 channel with") as e:
        make_model("sononet8", {"convs": (1,) * 5}, 3, (1, 32, 32), False, str(tmp_path))
    assert "the network has no block1.0.2.attention." in str(e.value)
    assert len(str(e.value)) < 400


def test_without_a_network_the_weights_own_is_trained(tmp_path):
    """With its arguments, but for the number of classes and of channels, which the data has."""
    saved(tmp_path, "cbam_resnet18", 3, stem="cifar", kernel_size=5)
    name, arguments = network_of(str(tmp_path), None)
    assert (name, dict(arguments)) == ("cbam_resnet18", {"stem": "cifar", "kernel_size": 5})
    model = make_model(name, arguments, 4, (3, 32, 32), False, str(tmp_path))
    assert model.get_classifier().out_features == 4
    assert network_of("ag_sononet8.digits", None)[0] == "ag_sononet8"
    (tmp_path / "config.json").unlink()
    for missing in (tmp_path, tmp_path / "net.pth"):
        assert network_of(str(missing), "ag_sononet8") == (None, {})


def test_weights_of_the_named_network_bring_its_arguments_and_its_stem(scans, tmp_path):
    """Some change no tensor's shape: without them the weights would be another network's."""
    own = {"channels": [8, 8, 8, 8], "order": "spatial_channel"}
    saved(tmp_path / "large", "cbam_resnet18", 3, **own)
    saved(tmp_path / "small", "cbam_resnet18", 3, stem="cifar", **own)

    def planned(weights: str | None, size: int, **arguments):
        name, recipe = "cbam_resnet18", Recipe(size=size)
        named = None if weights is None else str(tmp_path / weights)
        asked = Request(str(scans), name, recipe, named, None, "auto", arguments, recipe, {}, True)
        plan = new_plan(asked, 1)[0]
        row = Asked(network=name, base=recipe, data=str(scans), weights=named, arguments=arguments)
        assert not list(_of_the_network(vars(plan), recipe, row))  # a study called again
        return plan.model_args

    assert planned("large", 64) == planned("large", 32) == own
    assert planned("small", 64) == planned("small", 32) == {"stem": "cifar", **own}
    assert planned("small", 32, order="parallel")["order"] == "parallel"
    assert planned(None, 32) == {"stem": "cifar"}


def test_gray_images_get_the_channels_of_the_weights_that_they_start_from(scans, tmp_path):
    saved(tmp_path / "color", "attention56_cifar", 3, channels=[8, 8, 8, 16, 16])
    saved(tmp_path / "gray", "ag_sononet8", 3)

    def channels(weights: str | None, **values) -> int:
        recipe = Recipe(size=16, **values)
        named = None if weights is None else str(tmp_path / weights)
        asked = Request(str(scans), None, recipe, named, None, "auto", {}, recipe, {}, True)
        return new_plan(asked, 1)[0].preprocess.input_size[0]

    assert [channels(w) for w in ("color", "gray", None)] == [3, 1, 1]
    assert channels("color", channels=1) == 1  # refused when the weights are loaded
    table = arrays(16, 16, 3)
    color = choose_preprocess("ag_sononet8", {}, Recipe(size=16), table, lambda *_: 1)[0]
    assert color.input_size[0] == 3


@pytest.mark.parametrize(
    ("theirs", "name", "arguments", "normalization"),
    [
        ("ag_sononet8_concat", "ag_sononet8", {"aggregation": "concat"}, "image"),
        ("cbam_resnet18", "cbam_resnet18", {}, "fixed"),
    ],
)
def test_an_authors_checkpoint_starts_a_network_of_other_classes(
    scans, tmp_path, caplog, theirs, name, arguments, normalization
):
    network = authors_networks()[theirs]
    tensors = {n: torch.from_numpy(fill(n, shape)) for n, shape in network["tensors"]}
    classes = len(tensors[network["tensors"][-1][0]])
    torch.save(tensors, tmp_path / "theirs.pth")
    recipe = Recipe(normalization="model", size=32)
    weights = str(tmp_path / "theirs.pth")
    asked = Request(str(scans), name, recipe, weights, None, "auto", {}, recipe, {}, True)
    plan = new_plan(asked, 1)[0]
    assert plan.preprocess.normalization == normalization
    assert plan.preprocess.input_size[0] == network["input"][1]  # the scans are gray
    assert plan.model_args == arguments  # no CIFAR stem, though the images are small
    row = Asked(network=name, base=recipe, data=str(scans), weights=weights)
    assert not list(_of_the_network(vars(plan), recipe, row))
    size = plan.preprocess.input_size
    with caplog.at_level("INFO", logger="regard"):
        model = make_model(name, arguments, 7, size, False, weights, [f"{n}" for n in range(7)])
    head = model.get_classifier()
    assert head.out_features == 7
    assert "start at random" in caplog.text
    first = next(iter(tensors))
    assert torch.equal(next(model.parameters()), tensors[first])
    whole = make_model(name, arguments, classes, size, False, weights)
    direct = create_model(name, in_chans=size[0], num_classes=classes, **arguments)
    regard.load_authors_weights(direct, tensors)
    for key, tensor in direct.state_dict().items():
        assert torch.equal(whole.state_dict()[key], tensor), key
        own = model.state_dict()[key]
        assert torch.equal(own, tensor) or own.shape[0] == 7, key
    with pytest.raises(ValueError, match=r"it is .* for images of . channel.*; another shape of"):
        make_model(name, arguments, 7, (4 - size[0], *size[1:]), False, weights)


def test_weights_that_are_not_there_are_told(tmp_path):
    model = create_model("cbam_resnet18")
    with pytest.raises(ValueError, match="nowhere"):
        load_weights(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no trained network"):
        load_weights(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("attention56", 16, "attention56 needs images of at least 32x32: choose size 32 or more"),
        ("sononet8", 8, "at least 16x16 pixels, not 8x8"),
        ("inception_v4", 32, "inception_v4 can't take images of 32x32 ("),
        ("vit_tiny_patch16_224", 32, "vit_tiny_patch16_224 can't take images of 32x32 ("),
    ],
)
def test_images_that_are_too_small_are_told(name, size, message):
    with pytest.raises(ValueError, match="choose ") as e:
        make_model(name, {}, 3, (1, size, size), False, None)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_trying_the_size_changes_nothing():
    torch.manual_seed(3)
    tried = make_model("cbam_resnet18", {}, 3, (1, 32, 32), False, None)
    torch.manual_seed(3)
    made = create_model("cbam_resnet18", num_classes=3, in_chans=1)
    after, before = tried.state_dict(), made.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert tried.training


@pytest.mark.slow
def test_pretrained_weights_without_a_network_are_one_line(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "regard", "train", "digits", "--model", "cbam_resnet18",
         "--pretrained", "yes", "--size", "32", "--out", str(tmp_path / "run")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line == (
        "regard: pretrained=yes: timm's weights resnet18.a1_in1k can't be had: the hub is not "
        "contacted: HF_HUB_OFFLINE is set"
    )
    assert not (tmp_path / "run" / "run.json").exists()


# ------------------------------------------------------------------------- length and weights
@pytest.mark.parametrize(
    ("recipe", "images", "processes", "steps"),
    [
        (Recipe(epochs=2, batch_size=10), 100, 1, 20),
        (Recipe(epochs=0.07, batch_size=1), 100, 1, 7),  # 7.000000000000001 in floats
        (Recipe(epochs=0.001), 10, 1, 1),
        (Recipe(epochs=3, batch_size=64), 5, 1, 3),  # the batch is all there is
        (Recipe(epochs=90, batch_size=32), 1_281_167, 8, 450_411),
    ],
)
def test_steps(recipe, images, processes, steps):
    assert choose_steps(recipe, images, processes) == steps


def test_weights_of_classes_are_read():
    read = parse_weights("a=2, c=d=0.5,", CLASSES, "x")
    assert read.tolist() == [2, 1, 0.5]
    assert parse_weights("", CLASSES, "x").tolist() == [1, 1, 1]
    named = ["cat", "drake, male", "x,y", ""]
    assert parse_weights("drake, male=2, cat=0.5,x,y=3", named, "x").tolist() == [0.5, 2, 3, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat=1", r"x: 'cat=1' .*with one of a, b, c=d"),
        ("a", r"x: 'a' "),
        ("a=1,b=heavy", r"x: 'b=heavy' "),
        ("a=1,cat=2,b=3", r"x: 'cat=2,b=3' .*with one of a, b, c=d"),
        ("a=-1", r"x=a=-1: .*at least 0"),
        ("a=nan", "finite"),
        ("a=inf", "finite"),
        ("a=0,b=0,c=d=0", "not all 0"),
        ("a=4_7", "x: 'a=4_7' has a weight that is not a number"),  # a code, not 47
        ("a=1,b=2,a=3", "x=a=1,b=2,a=3: class 'a' has two weights"),
    ],
)
def test_wrong_weights_of_classes_are_told(text, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(text, CLASSES, "x")


def test_weights_that_fit_no_data_are_refused_before_the_data_is_read():
    for text in ("x=1_0=3", "Small, round=2,b=1,", "size=big,round=2", "a=1e-3", "a_1=2"):
        assert Recipe(class_weights=text, sampler_weights=text).class_weights == text
    for text in ("a=1_0", "a=1_0 , b=2", "a=2,b=.1_0", "a=x", "a=", "a", "a=1, b", "a=1=x"):
        with pytest.raises(UsageError, match="class_weights: '"):
            Recipe(class_weights=text)


def test_samplers():
    table = arrays(4, 4)  # 3, 2 and 1 of the classes
    balanced = image_weights(table, Recipe(sampler="balanced"))
    np.testing.assert_allclose(balanced, [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1])
    weighted = image_weights(table, Recipe(sampler="balanced", sampler_weights="b=13"))
    np.testing.assert_allclose(weighted, [1 / 3, 1 / 3, 1 / 3, 13 / 2, 13 / 2, 1])
    alone = image_weights(table, Recipe(sampler_weights="a=0"))
    np.testing.assert_allclose(alone, [0, 0, 0, 1, 1, 1])
    assert image_weights(table, Recipe()) is None
    largest = image_weights(table, Recipe(sampler="balanced", largest_class_weight=13))
    np.testing.assert_allclose(largest, [13 / 3, 13 / 3, 13 / 3, 1 / 2, 1 / 2, 1])
    assert image_weights(table, Recipe(largest_class_weight=2)).tolist() == [2, 2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="sampler_weights: 'z=1'"):
        image_weights(table, Recipe(sampler_weights="z=1"))  # though all are shuffled
    with pytest.raises(ValueError, match="no image is left"):
        image_weights(table.select([0, 1]), Recipe(sampler_weights="a=0"))


def test_weights_of_the_loss():
    table = arrays(4, 4)
    assert loss_weights(table, Recipe()) is None
    balanced = loss_weights(table, Recipe(class_weights="balanced"))
    torch.testing.assert_close(balanced, torch.tensor([6 / 9, 1, 2]))
    told = loss_weights(table, Recipe(class_weights="b=3"))
    assert told.tolist() == [1, 3, 1]
    missing = loss_weights(table.select([0, 1, 3]), Recipe(class_weights="balanced"))
    torch.testing.assert_close(missing, torch.tensor([0.5, 1, 0]))  # no part of smoothed labels


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 1.0])
def test_noise_is_exact_and_never_the_same_class(share):
    labels = np.random.default_rng(0).integers(0, 3, 1001)
    before = labels.copy()
    noisy = noisy_labels(labels, 3, share, 5)
    assert np.array_equal(labels, before)
    assert (noisy != labels).sum() == round(share * 1001)
    assert set(noisy) <= {0, 1, 2}
    assert not np.array_equal(noisy, noisy_labels(labels, 3, share, 6))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_wrong_labels_are_spread_over_every_epoch(seed):
    labels = np.zeros(2000, np.int64)
    wrong = noisy_labels(labels, 10, 0.3, seed) != labels
    order = SampleOrder(2000, seed)
    shares = [wrong[order.at(500 * k, 500)].mean() for k in range(4 * 20)]
    assert min(shares) > 0.2  # of each quarter of 20 epochs
    assert max(shares) < 0.4


def test_a_run_that_was_begun_before_keeps_its_wrong_labels():
    labels = np.random.default_rng(0).integers(0, 3, 1001)
    rng = np.random.default_rng([5, 4])
    rows = rng.permutation(1001)[:100]
    expected = labels.copy()
    expected[rows] = (labels[rows] + rng.integers(1, 3, 100)) % 3
    assert np.array_equal(noisy_labels(labels, 3, 100 / 1001, 5, 0), expected)


def test_no_noise():
    labels = np.array([0, 1, 0])
    assert np.array_equal(noisy_labels(labels, 2, 0.0, 0), labels)
    assert np.array_equal(noisy_labels(labels * 0, 1, 0.5, 0), labels * 0)


# ---------------------------------------------------------------------------------- precision
def test_bf16_where_it_is_asked_for_or_computed():
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu) == "bf16"
    assert choose_precision("fp32", cpu) == "fp32"
    assert choose_precision("auto", cpu) == ("bf16" if cpu_has_bf16() else "fp32")


def test_no_bf16_where_torch_computes_wrong_gradients_in_it(scans, tmp_path, monkeypatch):
    monkeypatch.setattr("regard.training.plan.has_bf16", lambda device: True)
    model = timm.create_model("resnet10t")  # at 16 pixels 8, 4, 4, 2, 1 and a stride of 2
    assert jumped_over(model, (3, 16, 16)) == "layer4.0.conv1"
    assert jumped_over(model, (3, 16, 32)) is jumped_over(model, (3, 32, 32)) is None
    assert model.training
    given = {
        "model": "resnet10t", "steps": 1, "batch_size": 8, "faithfulness_images": 0,
        "trackers": ("none",),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"precision=bf16: layer4.0.conv1 has a stride wider"):
        regard.train(scans, out=tmp_path / "a", size=16, precision="bf16", **given)
    out = regard.train(scans, out=tmp_path / "a", size=16, precision="auto", **given)
    assert RunFolder(out).read_facts()["precision"] == "fp32"
    out = regard.train(scans, out=tmp_path / "b", size=32, precision="auto", **given)
    assert RunFolder(out).read_facts()["precision"] == "bf16"


@pytest.mark.parametrize(("others", "precision"), [("fp16", "fp32"), ("bf16", "bf16")])
def test_devices_of_different_kinds_train_in_one_precision(
    scans, tmp_path, monkeypatch, others, precision
):
    """With fp16 only some processes would scale their gradients, which all of them average."""
    monkeypatch.setattr("regard.training.plan.has_bf16", lambda device: True)
    monkeypatch.setattr(build, "gathered", lambda _, own: [own, others])
    out = regard.train(
        scans, out=tmp_path / "run", model="ag_sononet8", size=16, steps=1, batch_size=8,
        faithfulness_images=0, trackers=("none",), precision="auto",
    )  # fmt: skip
    assert RunFolder(out).read_facts()["precision"] == precision


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what its CPU can")
def test_bf16_is_what_the_machine_says():
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert cpu_has_bf16() == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))


# ------------------------------------------------------------------------- what is inherited
def fitted(recipe: Recipe, images: int = 1000, processes: int = 1, **changes) -> Recipe:
    return fit_schedule(recipe.changed(**changes), recipe, changes, images, processes)


def test_another_length_scales_milestones_and_warm_up_in_proportion(caplog):
    caplog.set_level("INFO", "regard")
    steps = load_recipe("cbam-cifar")  # 100 and 150 of 200 epochs
    assert fitted(steps) == steps
    assert not caplog.messages
    assert fitted(steps, epochs=160).milestones == pytest.approx((80, 120))
    assert len(caplog.messages) == 1
    assert "80, 120" in caplog.text
    assert fitted(steps, epochs=400).milestones == pytest.approx((200, 300))
    # 1000 images in batches of 128: 7.8125 steps an epoch
    assert fitted(steps, steps=100).milestones == pytest.approx((6.4, 9.6))
    cifar = load_recipe("attention-cifar")  # 64,000 and 96,000 of 160,000 steps
    assert fitted(cifar, epochs=2, batch_size=10).milestones == pytest.approx((80, 120))
    unit = fitted(cifar, schedule_unit="epochs", epochs=10)
    assert unit.milestones == pytest.approx((4, 6))
    warm = load_recipe("finetune")  # one epoch of 15
    assert fitted(warm, epochs=0.5).warmup == pytest.approx(1 / 30)
    assert fitted(warm, epochs=3).warmup == pytest.approx(0.2)
    assert fitted(warm, epochs=3, warmup=1).warmup == 1
    open_end = Recipe(schedule="steps", milestones=(20,))  # its length is chosen by the images
    assert fitted(open_end, epochs=40).milestones == (20,)
    # 1000 images in batches of 64: 15.625 steps an epoch, as those of the recipe are epochs
    assert fitted(open_end, schedule_unit="steps").milestones == pytest.approx((312.5,), abs=1)
    assert fitted(open_end, schedule_unit="steps", steps=500).milestones == pytest.approx((312.5,))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("attention-cifar", {"steps": 100_000}),  # longer than the last milestone
        ("attention-cifar", {"steps": 500}),
        ("attention-cifar-fast", {"epochs": 10}),  # its warm-up has more steps than this run
        ("cbam-imagenet", {"epochs": 10, "batch_size": 50}),
        ("cbam-imagenet", {"epochs": 80, "batch_size": 50}),
        ("ag-sononet", {"steps": 300}),
    ],
)
def test_the_rates_of_a_budget_are_those_of_the_recipe_at_the_same_fraction(name, changes):
    """Step by step, for the whole run."""
    base, images = load_recipe(name), 2000

    def rates(recipe: Recipe, count: int) -> np.ndarray:
        total = choose_steps(recipe, images, 1)
        at = (np.arange(count) + 0.5) / count  # middles: a milestone may fall on a step's edge
        an_epoch = step_plan(recipe, images, 1).an_epoch
        return np.array([rate_factor(recipe, int(f * total), total, an_epoch) for f in at])

    recipe = fitted(base, images, **changes)
    total = choose_steps(recipe, images, 1)
    ours, theirs = rates(recipe, total), rates(base, total)
    drops = np.flatnonzero(np.abs(ours - theirs) > 0.1 * theirs)
    assert len(drops) <= 3 + recipe.warmup  # steps that a milestone divides, and the warm-up's
    assert ours[-1] == pytest.approx(theirs[-1])
    assert ours[-1] < 0.02
    assert ours[total // 4] == pytest.approx(theirs[total // 4])


def test_milestones_beyond_the_end_are_refused():
    steps = load_recipe("cbam-cifar")
    for changes in (
        {"epochs": 12, "milestones": (5, 100)},
        {"epochs": 12, "milestones": (12,)},
        {"milestones": (200, 300)},
        {"schedule_unit": "steps", "epochs": 0.1, "milestones": (100, 150)},
    ):
        with pytest.raises(ValueError, match=r"milestones=.*: the run ends after"):
            fitted(steps, **changes)
    with pytest.raises(ValueError, match=r"warmup=3.*: the run ends after 2 epochs"):
        fitted(load_recipe("finetune"), epochs=2, warmup=3)
    own = Recipe(epochs=10, schedule="steps", milestones=(5, 20))
    with pytest.raises(ValueError, match=r"milestones=5, 20: the run ends after 10 epochs"):
        fitted(own)


def test_arguments_of_the_network_go_over_the_recipes():
    recipe = load_recipe("ag-sononet-ft")
    name, arguments = choose_model(None, recipe, {"aggregation": "deep_sup"})
    assert (name, arguments) == ("ag_sononet8", {"aggregation": "deep_sup"})
    for given, message in (
        ({"aggregation": "median"}, "aggregation='median'"),
        ({"aggregatoin": "mean"}, "aggregatoin"),
        ({"num_classes": 3}, "num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_model(None, recipe, given)
    with pytest.raises(UsageError, match="num_classes: the data sets it"):
        choose_model(None, Recipe(model="resnet18", model_args={"num_classes": 7}))


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("ag_sononet8", "features", 1.5, "out_channels must be divisible by groups"),
        ("cbam_resnet18", "output_stride", 5, "AssertionError"),
        ("cbam_resnet18", "global_pool", 3, "'int' object has no attribute 'lower'"),
        ("attention56_cifar", "channels", {}, "-1"),
    ],
)
def test_an_argument_that_a_network_refuses_in_any_way_is_one_line(name, argument, value, message):
    for recipe, given in (
        (Recipe(), {argument: value}),
        (Recipe(model_args={argument: value}), {}),
    ):
        with pytest.raises(UsageError, match=f"{name} with {argument}=.*{message}"):
            choose_model(name, recipe, given)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cbam_resnet18", {"drop_rate": "a"}, "drop_rate='a': give a number from 0 to 1"),
        ("ag_sononet8", {"drop_rate": 2}, "drop_rate=2: give a number from 0 to 1"),
        ("resnet18", {"drop_path_rate": "a"}, "drop_path_rate='a': give a number from 0 to 1"),
        (
            "cbam_resnet18", {"reduction": "a"},
            "cbam_resnet18 with reduction='a': give reduction: a whole number, at least 1",
        ),
        (
            "attention56", {"units": "a", "in_chans": 1},
            "attention56 with units='a', in_chans=1: give units: three whole numbers",
        ),
        ("cbam_resnet18", {"reduction": 8, "widht": 1}, "unexpected keyword argument 'widht'"),
    ],
)  # fmt: skip
def test_an_argument_of_another_type_is_told_what_it_is(name, given, message):
    with pytest.raises(UsageError) as caught:
        make(name, given)
    assert str(caught.value).endswith(message)


def test_a_network_that_could_not_be_loaded_again_is_refused_before_it_trains(monkeypatch):
    with pytest.raises(UsageError, match=r"norm_layer=.*keeps only numbers"):
        make_model("resnet18", {"norm_layer": nn.BatchNorm2d}, 3, (3, 64, 64), False, None)
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))  # of a user's @register_model
    monkeypatch.setattr("regard.models.create.create_model", lambda *_, **__: own)
    lacks = "it has no pretrained_cfg, num_classes, num_features"
    with pytest.raises(UsageError, match=f"resnet18 could not be stored: {lacks}"):
        make_model("resnet18", {}, 3, (3, 8, 8), False, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": nn.Flatten()}, r"model=<Flatten>: give the name of a network"),
        ({"model": ""}, "model='': give the name of a network"),
        ({"recipe": {"lr": 1}}, "recipe=<dict>: give a recipe's name, a TOML file or a Recipe"),
        ({"recipe": None}, "recipe=None: "),
        ({"out": 5}, "out=5: give a folder"),
        ({"out": ""}, "out='': give a folder"),
        ({"weights": ""}, "weights='': "),
        ({"model_args": 5}, "model_args=5: give a dict"),
        ({"trackers": None}, "trackers=None: give a list of names"),
        ({"trackers": "nothing"}, "log=nothing: choose tensorboard"),
    ],
    ids=str,
)
def test_arguments_of_other_types_are_told(scans, given, message):
    with pytest.raises(UsageError, match=message):
        regard.train(scans, **given)


def test_batches_of_one_image_are_refused_for_batch_norm():
    normed, plain = create_model("ag_sononet8"), create_model("vit_tiny_patch16_224")
    check_batch(plain, Recipe(batch_size=1), 9)
    check_batch(normed, Recipe(batch_size=2), 9)
    with pytest.raises(ValueError, match="batch_size=1: batch norm"):
        check_batch(normed, Recipe(batch_size=1), 9)
    with pytest.raises(ValueError, match="one training image"):
        check_batch(normed, Recipe(batch_size=8), 1)


@pytest.mark.parametrize(
    ("name", "arguments", "head"),
    [
        ("cbam_resnet18", {}, "fc.weight"), ("sononet8", {}, "classifier.0.weight"),
        ("ag_sononet8", {"aggregation": "deep_sup"}, "heads.1.weight"),
        ("ag_sononet8", {"aggregation": "ft"}, "classifier.weight"),
    ],
)  # fmt: skip
def test_the_classifier_is_copied_by_the_classes_names(tmp_path, caplog, name, arguments, head):
    caplog.set_level("INFO", "regard")
    torch.manual_seed(0)
    trained = create_model(name, num_classes=3, **arguments)
    with torch.no_grad():
        for p in trained.parameters():
            p.copy_(torch.randn_like(p))
    config = {"input_size": trained.pretrained_cfg["input_size"], "mean": (0.5,), "std": (0.2,)}
    save_model(trained, tmp_path, class_names=["ant", "bee", "cow"], data_config=config)
    before = trained.state_dict()[head]
    size = tuple(trained.pretrained_cfg["input_size"])
    for classes in (["bee", "dog", "ant"], ["cow", "bee"], ["ant", "bee", "cow"]):
        torch.manual_seed(1)
        fresh = make_model(name, arguments, len(classes), size, False, None).state_dict()[head]
        caplog.clear()
        torch.manual_seed(1)
        model = make_model(name, arguments, len(classes), size, False, str(tmp_path), classes)
        after = model.state_dict()[head]
        shared = [c for c in classes if c in ("ant", "bee", "cow")]
        for row, c in enumerate(classes):
            old = ["ant", "bee", "cow"].index(c) if c in shared else None
            for column, d in enumerate(classes if arguments == {"aggregation": "ft"} else [None]):
                if d is None:
                    mine, fresh_row = after[row], fresh[row]
                    wanted = fresh_row if old is None else before[old]
                else:  # (classes, heads * classes): three blocks of columns
                    mine = after.view(len(classes), 3, -1)[row, :, column]
                    wanted = fresh.view(len(classes), 3, -1)[row, :, column]
                    if old is not None and d in shared:
                        k = ["ant", "bee", "cow"].index(d)
                        wanted = before.view(3, 3, 3)[old, :, k]
                assert torch.equal(mine, wanted), (c, d)
        told = [m for m in caplog.messages if "has other classes" in m]
        assert len(told) == (classes != ["ant", "bee", "cow"])
        assert all(f"{len(shared)} of {len(classes)} classes" in m for m in told)
