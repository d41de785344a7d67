"""A run's own recipe.toml: it names the run's network, and trains it again to the same bits."""

import csv
import json
from pathlib import Path

import pytest
import timm

import regard
from regard.cli import run_command
from regard.training.recipe_files import load_recipe
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
