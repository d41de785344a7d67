"""A run's own recipe.toml: it names the run's network, and trains it again to the same bits."""

import csv
import json
from pathlib import Path

import pytest
import timm

import regard
from regard.cli import run_command
from regard.data.preprocess import Preprocess
from regard.errors import UsageError
from regard.training.config import Recipe
from regard.training.recipe_files import load_recipe
from regard.training.run_plan import Plan
from tests.helpers import same_network

SHORT = {"faithfulness_images": 0, "batch_size": 16, "epochs": 2, "val": 0.2, "test": 0.2}


@pytest.mark.slow
def test_the_recipe_of_a_run_trains_the_same_network_again(scans, tmp_path):
    """Another network than the base recipe's, its argument, a shorter schedule, a rectangle."""
    regard.train(
        str(scans), model="ag_sononet8", recipe="cbam-cifar", out=tmp_path / "first",
        model_args={"aggregation": "deep_sup"}, size=(16, 24), **SHORT,
    )  # fmt: skip
    recipe = load_recipe(tmp_path / "first/recipe.toml")
    assert (recipe.model, recipe.model_args) == ("ag_sononet8", {"aggregation": "deep_sup"})
    assert recipe.milestones == (1.0, 1.5)  # 100 and 150 of 200 epochs
    regard.train(str(scans), recipe=tmp_path / "first/recipe.toml", out=tmp_path / "again")
    assert same_network(tmp_path / "first", tmp_path / "again")
    again = json.loads((tmp_path / "again/run.json").read_text())["plan"]
    assert (again["model"], again["preprocess"]["input_size"]) == ("ag_sononet8", [1, 16, 24])
    model = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert model.aggregation == "deep_sup"
    with (tmp_path / "first/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["learning_rate"]) for r in rows] == pytest.approx([0.1, 0.001])
    assert float(rows[0]["objective"]) > float(rows[0]["loss"])  # four heads against one


@pytest.mark.slow
def test_a_small_network_takes_its_stem_along(scans, tmp_path):
    regard.train(str(scans), model="se_resnet18", out=tmp_path / "first", steps=2, size=16,
                 **{k: v for k, v in SHORT.items() if k != "epochs"})  # fmt: skip
    assert load_recipe(tmp_path / "first/recipe.toml").model_args == {"stem": "cifar"}


def test_the_input_channels_of_a_network_are_the_recipes(scans, tmp_path):
    """in_chans is their other name: of one run, of the one it is resumed by, and of the next."""
    few = {"faithfulness_images": 0, "steps": 1, "trackers": ("none",)}
    first = {"model": "ag_sononet8", "model_args": {"in_chans": 3}, "size": 16, **few}
    regard.train(scans, out=tmp_path / "first", **first)
    assert regard.train(scans, out=tmp_path / "first", **first, resume=True) == tmp_path / "first"
    recipe = load_recipe(tmp_path / "first/recipe.toml")
    assert (recipe.channels, recipe.model_args) == (3, {})
    regard.train(scans, recipe=tmp_path / "first/recipe.toml", out=tmp_path / "again", **few)
    assert same_network(tmp_path / "first", tmp_path / "again")
    own = Recipe(model="ag_sononet8", model_args={"in_chans": 3, "features": 4})
    assert (own.channels, own.model_args) == (3, {"features": 4})
    assert own.changed(channels=1).channels == 1
    with pytest.raises(UsageError, match="in_chans=3 and channels=1: give one of them"):
        Recipe(channels=1, model_args={"in_chans": 3})
    with pytest.raises(UsageError, match="in_chans=3 and channels=1: give one of them"):
        regard.train(scans, out=tmp_path / "both", **first, channels=1)


def test_the_line_for_the_same_run_again_names_how_the_data_was_read():
    plan = Plan(
        "my cifar", "/here", "ag_sononet8", {}, "runs/a b", False, Recipe(), ["a", "b"],
        Preprocess(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3),
    )  # fmt: skip
    again = "The same run again: regard train 'my cifar' --recipe THIS_FILE --weights 'runs/a b'"
    assert plan.header().splitlines()[2] == f"{again} --root /here"
    assert plan.header("no").splitlines()[2] == f"{again} --root /here --splits no"


def test_a_recipe_of_a_network_for_one_size_takes_another(scans, tmp_path):
    few = {"faithfulness_images": 0, "steps": 1, "trackers": ("none",), "pretrained": "no"}
    regard.train(scans, model="vit_tiny_patch16_224", size=32, out=tmp_path / "32", **few)
    again = {"recipe": tmp_path / "32/recipe.toml", **few}
    for size, out in ((None, "same"), (48, "48")):
        changes = {} if size is None else {"size": size}
        regard.train(scans, out=tmp_path / out, **again, **changes)
    assert same_network(tmp_path / "32", tmp_path / "same")
    plan = json.loads((tmp_path / "48/run.json").read_text())["plan"]
    assert (plan["preprocess"]["input_size"], plan["model_args"]) == ([1, 48, 48], {"img_size": 48})


@pytest.mark.slow
def test_timms_resnet_on_small_images_is_its_twin_also_when_resumed(scans, tmp_path, capsys):
    call = ["train", str(scans), "--model", "resnet18", "--out", str(tmp_path / "run"),
            "--size", "16", "--steps", "2", "--faithfulness-images", "0"]  # fmt: skip
    assert run_command(call) == 0
    assert "resnet18 becomes plain_resnet18" in capsys.readouterr().out
    recipe = load_recipe(tmp_path / "run/recipe.toml")
    assert (recipe.model, recipe.model_args) == ("plain_resnet18", {"stem": "cifar"})
    assert run_command([*call, "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_run_that_would_scale_its_schedule_again_is_resumed(scans, tmp_path, capsys):
    call = ["train", str(scans), "--recipe", "ag-sononet", "--out", str(tmp_path / "run"),
            "--size", "16", "--steps", "3", "--faithfulness-images", "0"]  # fmt: skip
    assert run_command(call) == 0
    assert run_command([*call, "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_a_recipe_whose_schedule_was_edited_is_not_the_one_a_run_was_started_with(scans, tmp_path):
    path = tmp_path / "own.toml"
    text = "steps = 8\nschedule = 'steps'\nmilestones = [{}]\nwarmup = {}\nschedule_unit = 'steps'"
    call = {
        "model": "sononet8", "recipe": path, "out": tmp_path / "run", "size": 32, "steps": 4,
        "faithfulness_images": 0, "trackers": ("none",),
    }  # fmt: skip
    path.write_text(text.format(4, 2), encoding="utf-8")
    regard.train(scans, **call)
    assert load_recipe(tmp_path / "run/recipe.toml").milestones == (2.0,)
    assert regard.train(scans, **call, resume=True) == tmp_path / "run"
    for values, named in (
        ((6, 2), r"milestones=\(3.0,\): .*\(2.0,\)"),
        ((4, 1), "warmup=0.5: .*1.0"),
    ):
        path.write_text(text.format(*values), encoding="utf-8")
        with pytest.raises(UsageError, match=named):
            regard.train(scans, **call, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "batch_size=1: batch norm"),
        (["--arg", "aggregation=median"], "aggregation='median'"),
        (["--arg", "aggregation"], "--arg aggregation"),
        (["--epochs", "3", "--schedule", "steps", "--milestones", "5"], "milestones=5: the run"),
        (["--milestones", "5"], "not used with schedule=onecycle"),
        (["--size", "16", "16", "16"], "height and width"),
        (["--flip", "2"], "--flip"),
    ],
)
def test_what_can_not_be_is_refused_before_the_folder_is_taken(
    scans, tmp_path, capsys, arguments, message
):
    out = tmp_path / "run"
    call = ["train", str(scans), "--model", "ag_sononet8", "--out", str(out)]
    assert run_command([*call, *arguments]) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("regard: ")]
    assert message in line
    assert not Path(out).exists()
