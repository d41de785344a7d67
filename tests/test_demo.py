"""`regard demo`: the first thing that a person runs, as a process of its own."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import regard
from tests.helpers import rows_of, run

pytestmark = pytest.mark.report


def demo(folder: Path, *arguments: str, code: int = 0) -> str:
    return run("demo", "--out", folder, *arguments, code=code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A quarter of the demo; `test_in_all_its_epochs_it_does_well` has all of it."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    return folder, demo(folder, "--epochs", "4")


def told(folder: Path, said: str) -> float:
    """The accuracy that was said, which must be the measured one."""
    found = re.search(
        r"accuracy on the (\d+) test images: ([\d.]+)% \(95 % interval ([\d.]+)% to ([\d.]+)%\)",
        said,
    )
    images, accuracy, low, high = int(found[1]), *(float(found[i]) for i in (2, 3, 4))
    assert images == 359  # a fifth of 1,797
    assert low <= accuracy <= high
    measured = json.loads((folder / "evaluation.json").read_text())["metrics"]["top1"]
    assert f"{measured['value']:.2%}" == f"{accuracy:.2f}%"
    return accuracy


def test_it_tells_how_well_it_does_and_does_well(whole):
    folder, said = whole
    assert told(folder, said) >= 97.0
    assert len(re.findall(r"^epoch .* left$", said, re.M)) >= 3


@pytest.mark.slow
def test_in_all_its_epochs_it_does_well(tmp_path):
    said = demo(tmp_path / "run")
    assert told(tmp_path / "run", said) >= 98.5
    assert len(re.findall(r"^epoch .* left$", said, re.M)) >= 14
    rows = rows_of(tmp_path / "run" / "metrics.csv")
    assert len(rows) == 15
    assert float(rows[-1]["loss"]) < 0.2 * float(rows[0]["loss"])


def test_the_folder_is_complete_and_timm_loads_it(whole):
    folder, _ = whole
    for name in ("config.json", "model.safetensors", "metrics.csv", "report.html", "recipe.toml"):
        assert (folder / name).stat().st_size > 100, name
    rows = rows_of(folder / "metrics.csv")
    assert len(rows) == 4
    assert float(rows[-1]["loss"]) < 0.5 * float(rows[0]["loss"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    classifier = regard.load(folder)
    assert classifier.class_names == [str(d) for d in range(10)]
    weight = classifier.model.block2[1][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    theirs, ours = model.state_dict(), classifier.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)
    x = torch.randn(2, 1, 48, 48)
    model = model.to(memory_format=torch.channels_last)  # in which a classifier has its weights
    with torch.no_grad():
        assert torch.equal(model(x), classifier.model(x))


def test_the_split_is_stratified_and_disjoint(whole):
    rows = rows_of(whole[0] / "splits.csv")
    names = [row["path"] for row in rows]
    assert len(set(names)) == len(names) == 1797
    counts = {
        split: np.unique([r["label"] for r in rows if r["split"] == split], return_counts=True)[1]
        for split in ("train", "test")
    }
    share = counts["test"] / (counts["test"] + counts["train"])
    assert share == pytest.approx(0.2, abs=0.006)


def test_the_report_stands_alone_and_shows_every_gate(whole):
    html = (whole[0] / "report.html").read_text(encoding="utf-8")
    assert len(html) < 5_000_000
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1].replace("&#39;", "'")
    for script in re.findall(r"<script>(.*?)</script>", html, re.S):  # only the page's own run
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert html.count("<figure") >= 10
    text = html.replace("&nbsp;", " ").replace("\u00a0", " ")
    for words in ("gate3", "gate4", "95 % interval", "Confusions", "Limits"):
        assert words in text


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tmp_path):
    for name in ("a", "b"):
        demo(tmp_path / name, "--epochs", "1", "--seed", "3")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    demo(tmp_path / "a", "--epochs", "1", "--seed", "4")  # an earlier demo is replaced
    c = load_file(tmp_path / "a/model.safetensors")
    assert not all(torch.equal(c[k], b[k]) for k in b)


def test_what_no_demo_wrote_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    said = demo(tmp_path, code=2)
    assert said.strip().count("\n") == 0
    assert "holds something else" in said
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_fast_demo_trains_nothing_and_is_a_run_like_the_other(tmp_path):
    folder = tmp_path / "fast"
    said = demo(folder, "--fast")
    assert "epoch" not in said
    found = re.search(r"the (\d+) test images: ([\d.]+)%", said)
    assert int(found[1]) == 359
    assert float(found[2]) >= 98.5
    rows = rows_of(folder / "splits.csv")
    assert sum(row["split"] == "test" for row in rows) == 359
    assert "gate4" in (folder / "report.html").read_text(encoding="utf-8")
    assert "one image" not in run("evaluate", folder)
    assert "--seed" in demo(tmp_path / "other", "--fast", "--seed", "1", code=2)
    assert not (tmp_path / "other").exists()
