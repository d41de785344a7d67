"""What README.md, report.html and the last line say of a run whose test is unusual."""

import json
import re
import shutil

import numpy as np
import pytest
from markdown_it import MarkdownIt

from regard.called import as_command
from regard.data.preprocess import Preprocess
from regard.evaluation import Predictions, evaluate
from regard.files import markdown
from regard.runs import RunFolder
from regard.training.finish import accuracy_words
from regard.training.model_card import write_model_card
from regard.training.recipe_files import load_recipe
from regard.training.run_plan import Plan
from tests.helpers import QUICK, run

pytestmark = pytest.mark.report


@pytest.fixture(scope="module")
def untested(scans, tmp_path_factory):
    """A run without a test split, of the last epoch's averaged weights, in accumulated batches."""
    out = tmp_path_factory.mktemp("untested") / "run"
    run("train", scans, *QUICK[:-2], "--out", out, "--test", 0, "--select", "last", "--epochs", 1,
        "--batch-size", 8, "--accumulate", 2, "--ema-decay", 0.9)  # fmt: skip
    return out


def test_images_that_chose_nothing_are_not_said_to_have_chosen_the_weights(untested):
    assert json.loads((untested / "run.json").read_text())["facts"]["tested_on"] == "val"
    for name in ("README.md", "report.html"):
        text = " ".join((untested / name).read_text(encoding="utf-8").split())
        assert "There was no test split" in text
        assert "the last epoch" in text
        assert "chosen on these images" not in text
        assert "too good" not in text
        assert "moving averages up to" in text


def test_the_report_names_the_images_of_a_step_and_averaged_weights(untested):
    text = (untested / "report.html").read_text(encoding="utf-8")
    assert "steps of 16 images" in text
    assert re.search(r"averages? up to the last epoch", text)


# ---- a test of one image, or of one group ------------------------------------------------
def _few(images, groups=None):
    return evaluate(Predictions(np.eye(3)[[0] * images], [0] * images, ["0", "1", "2"], groups))


def _card(whole, to, found, data=None):
    """The model card of a run with another result, in a folder of its own."""
    for name in ("run.json", "recipe.toml"):
        shutil.copy(whole / name, to)
    folder = RunFolder(to)
    stored = folder.read_plan()
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["preprocess"].items()}
    plan = Plan(
        data or stored["data"], None, stored["model"], stored["model_args"], None, False,
        load_recipe(whole / "recipe.toml"), stored["classes"], Preprocess(**values),
    )  # fmt: skip
    write_model_card(folder, plan, folder.read_facts(), found)
    return (to / "README.md").read_text(encoding="utf-8")


NAMES = ["<b>a&amp;", "__gray__", "$x_1$", "5 & 6", "a*b*c", "~~old~~", "[c](d)", "`code", "a|b"]


def test_the_card_shows_the_names_of_classes_as_they_are(whole, tmp_path):
    found = evaluate(Predictions(np.eye(9), range(9), NAMES))
    for name in ("run.json", "recipe.toml"):
        shutil.copy(whole / name, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    run["plan"]["classes"] = NAMES
    run["facts"]["warnings"] = ["class '<i>' is in train_val"]
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "run").mkdir()
    card = _card(tmp_path, tmp_path / "run", found)
    line = next(line for line in card.splitlines() if line.startswith("9 classes"))
    parts = MarkdownIt("commonmark").parse(line)[1].children
    assert {part.type for part in parts} == {"text"}
    assert "".join(part.content for part in parts) == f"9 classes: {', '.join(NAMES)}."
    assert "\\$x_1\\$" in line  # math, where the hub shows it
    assert "class '\\<i>' is in train_val" in card
    assert markdown("run `a_b | c` on ag_sononet8, _x_") == "run `a_b | c` on ag_sononet8, \\_x\\_"


def test_the_card_has_the_command_that_started_the_run_and_a_name_of_the_data(
    whole, tmp_path, monkeypatch
):
    """A resumed run is finished by another command; "." names no data."""
    (tmp_path / "lesions").mkdir()
    monkeypatch.chdir(tmp_path / "lesions")
    with as_command(["train", ".", "--out", "run", "--resume"]):
        text = _card(whole, tmp_path, _few(3), data=".")
    command = (whole / "recipe.toml").read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
    assert command.startswith("regard train ")
    assert f"```\n{command}\n```" in text
    assert "--resume" not in text
    assert "# ag_sononet8 on lesions\n" in text
    assert "name: lesions" in text


@pytest.mark.parametrize(
    ("found", "images", "more"),
    [(_few(1), "1 image", "more images"), (_few(3, ["a"] * 3), "3 images", "more groups")],
    ids=["one image", "one group"],
)
def test_without_an_interval_the_card_says_what_one_needs(whole, tmp_path, found, images, more):
    text = _card(whole, tmp_path, found)
    assert f"On the {images} of the test split" in text
    assert more in text
    assert "| accuracy | 1.0000 | – |" in text
    assert not re.search(r"\bnan\b", text)


def test_without_an_interval_the_last_line_says_what_one_needs():
    one, group = accuracy_words(_few(1), "test"), accuracy_words(_few(3, ["a"] * 3), "val")
    assert one.startswith("accuracy on the 1 test image: 100.00% (")
    assert "needs more images" in one
    assert "3 validation images" in group
    assert "needs more groups" in group
    low = evaluate(Predictions(np.eye(2)[[0, 1, 1]], [0, 1, 0], ["a", "b"])).metrics["top1"].low
    of_three = evaluate(Predictions(np.eye(2)[[0, 1, 1]], [0, 1, 0], ["a", "b"]))
    assert f"95 % interval {low:.2%} to" in accuracy_words(of_three, "test")
