"""What README.md, report.html and the last line say of a run whose test is unusual."""

import json
import re

import pytest

from tests.helpers import QUICK, run


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


def test_the_report_names_the_images_of_a_step_and_averaged_weights(untested):
    text = (untested / "report.html").read_text(encoding="utf-8")
    assert "steps of 16 images" in text
    assert re.search(r"averages? up to the last epoch", text)
