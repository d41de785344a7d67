"""What trainings start from: the hub, the cache, Regard's own weights, or random ones."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save

import regard
from regard import weights
from regard.cli import run_command
from regard.data.sources import open_data
from regard.data.splits import assign_splits
from regard.data.splits_file import read_splits
from regard.errors import FileError, UsageError
from regard.models import hub
from regard.models.create import make_model
from regard.report.label_errors import find_label_errors
from regard.training.config import Recipe
from regard.training.recipe_files import load_recipe
from regard.training.start import Start, choose_start, seen_before
from regard.weights import find_shipped
from tests.helpers import QUICK, messages, rows_of
from tests.hub import Hub, point_at, seconds_of
from tests.test_weights import add, elsewhere  # noqa: F401 (a fixture)

AUTO = Recipe(pretrained="auto")
FILE = "timm/resnet18.a1_in1k/model.safetensors"


@pytest.fixture(scope="module")
def table():
    return assign_splits(open_data("digits"), val=0.1, test=0.1, seed=0)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return timm.create_model("resnet18").eval()


@pytest.fixture(scope="module")
def its_file(plain) -> bytes:
    return save(plain.state_dict())


@pytest.fixture
def served(plain, its_file, tmp_path, monkeypatch):
    """A hub that has random weights of timm's resnet18."""
    running = Hub()
    running.files[FILE] = its_file
    running.plain = plain
    point_at(running.url, tmp_path / "cache", monkeypatch)
    yield running
    if not running.stopped.is_set():
        running.close()


def started(name, table, height=64, recipe=AUTO, seen=1, **arguments):
    return choose_start(name, arguments, recipe, height, table, channels=seen)


def test_a_hub_is_asked_once_and_its_weights_are_grafted(served, table):
    start = started("cbam_resnet18", table)
    assert (start.pretrained, start.weights) == (True, None)
    assert "resnet18.a1_in1k" in start.words
    assert "hub" in start.words
    asked = len(served.asked)
    served.close()
    for name in ("cbam_resnet18", "plain_resnet18", "resnet18"):
        start = started(name, table)
        assert start.pretrained
        assert "cache" in start.words
        model = make_model(name, {}, 1000, (3, 64, 64), True, None).eval()
        x = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(x), served.plain(x))
    assert len(served.asked) == asked


def test_a_slow_hub_a_dead_one_and_none_cost_no_time(served, table, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    served.delay = 60
    took, start = seconds_of(lambda: started("cbam_resnet18", table))
    assert not start.pretrained
    assert start.words.startswith("random")
    assert 0.4 < took < 5
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_at(dead, tmp_path / "none", monkeypatch)
    took, start = seconds_of(lambda: started("cbam_resnet18", table))
    assert "can't be reached" in start.words
    assert took < 5
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in started("cbam_resnet18", table).words


def other_than(plain, what: str) -> bytes:
    """A file that is no weights of this network."""
    if what == "text":
        return b"<html>log in</html>"
    if what == "cut":
        return save(plain.state_dict())[:-9]
    if what == "another":
        return save(timm.create_model("resnet10t").state_dict())
    return save({k: t * float("nan") for k, t in plain.state_dict().items()})


@pytest.mark.parametrize("fault", ["half", "silent", 500, 403])
def test_a_hub_that_breaks_off_is_left_soon(served, table, monkeypatch, fault):
    monkeypatch.setattr(hub, "STALL", 0.4)
    served.fault = fault
    took, start = seconds_of(lambda: started("cbam_resnet18", table))
    assert (start.pretrained, start.weights) == (False, None)
    assert took < 10  # without STALL "half" has no end, and "silent" is a minute
    assert "developer.mozilla" not in start.words


@pytest.mark.parametrize("what", ["text", "cut", "another", "nan"])
def test_what_is_no_weights_of_the_network_is_not_started_from(served, table, what):
    whole = served.files[FILE]
    served.files[FILE] = other_than(served.plain, what)
    start = started("cbam_resnet18", table)
    assert (start.pretrained, start.weights) == (False, None)
    assert str(hub.cached_weights("resnet18")) in start.words
    served.files[FILE] = whole
    assert started("cbam_resnet18", table).words.endswith("from the hub")
    assert started("cbam_resnet18", table).words.endswith("from the local cache")


def test_a_damaged_file_in_the_cache_is_downloaded_again_or_named(served, table, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    assert started("resnet18", table).pretrained
    path = hub.cached_weights("resnet18")
    path.write_bytes(path.read_bytes()[:1000])
    assert started("resnet18", table).words.endswith("from the hub")
    path.write_bytes(b"")
    served.close()
    start = started("resnet18", table)
    assert not start.pretrained
    assert str(path) in start.words


def test_a_cache_that_can_not_be_written_is_named(served, table, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    point_at(served.url, tmp_path / "file/hub", monkeypatch)
    start = started("resnet18", table)
    assert (start.pretrained, start.weights) == (False, None)
    assert str(tmp_path / "file") in start.words


def test_of_two_at_once_one_downloads(served, table):
    served.delay = 0.2
    with ThreadPoolExecutor(2) as pool:
        words = list(pool.map(lambda _: started("resnet18", table).words, range(2)))
    assert sorted(w.rpartition("from ")[2] for w in words) == ["the hub", "the local cache"]
    assert (
        sum(line.startswith("GET") and line.endswith(".safetensors") for line in served.asked) == 1
    )


def test_yes_says_what_it_takes_and_ends_where_there_is_nothing(served, table, monkeypatch):
    yes = Recipe(pretrained="yes")
    assert "resnet18.a1_in1k, from the hub" in started("cbam_resnet18", table, recipe=yes).words
    assert "attention56_cifar.cifar10" in started("attention56_cifar", table, recipe=yes).words
    with pytest.raises(UsageError, match="attention56"):
        started("attention56", table, recipe=yes)
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    served.delay = 60
    with pytest.raises(FileError, match="resnet34"):
        started("resnet34", table, recipe=yes)


@pytest.mark.parametrize(
    ("name", "height", "arguments"),
    [("cbam_resnet18", 32, {}), ("cbam_resnet18", 64, {"channels": [8, 8, 8, 8]}),
     ("attention56", 224, {}), ("wide_resnet18_2", 224, {})],
)  # fmt: skip
def test_where_timms_weights_do_not_fit_the_hub_is_not_asked(
    served, table, name, height, arguments
):
    start = choose_start(name, arguments, AUTO, height, table)
    assert (start.pretrained, start.weights) == (False, None)
    assert served.asked == []


def test_only_quick_and_finetune_look_for_weights_unasked():
    chosen = {name: load_recipe(name).pretrained for name in ("quick", "finetune")}
    assert set(chosen.values()) == {"auto"}
    for name in ("attention-cifar", "cbam-imagenet", "ag-sononet", "demo", "cbam-cifar"):
        assert load_recipe(name).pretrained == "no"


def mark(folder: Path, name: str) -> None:
    """Lets trainings start from these weights."""
    path = folder / weights.INDEX
    index = json.loads(path.read_text())
    index[name]["start"] = True
    path.write_text(json.dumps(index))


def test_own_weights_are_taken_where_they_fit(elsewhere, table):  # noqa: F811
    arguments = {"channels": [8, 8, 8, 16, 16]}
    name = "attention92_cifar.small"
    model = add(elsewhere, name, **arguments)
    assert started("attention92_cifar", table, 32, **arguments).weights is None  # not marked
    mark(elsewhere, name)
    start = started("attention92_cifar", table, 32, **arguments)
    assert (start.pretrained, start.weights) == (False, name)
    made = make_model("attention92_cifar", arguments, 3, (3, 32, 32), False, name)
    assert torch.equal(made.conv1.weight, model.conv1.weight)
    assert made.num_classes == 3
    assert started("attention92_cifar", table, 32).weights is None  # other arguments
    assert started("attention92_cifar", table, 96, **arguments).weights is None  # larger images
    assert started("attention92_cifar", table, 32, Recipe(), **arguments).weights is None


def test_own_weights_are_taken_for_images_of_their_channels(elsewhere, table):  # noqa: F811
    name = "attention92_cifar.small"
    own = {"channels": [8, 8, 8, 16, 16]}
    add(elsewhere, name, **own)
    mark(elsewhere, name)
    assert find_shipped(name).config["model_args"].get("in_chans", 3) == 3
    gray = started("attention92_cifar", table, 32, **own)
    assert (gray.weights, gray.channels) == (name, 3)
    assert started("attention92_cifar", table, 32, seen=3, **own).weights == name
    one = started("attention92_cifar", table, 32, AUTO.changed(channels=1), **own)
    assert one.weights is None
    assert "they are for images of 3 channels" in one.words


def test_own_weights_that_saw_the_images_are_not_taken(elsewhere, table):  # noqa: F811
    mark(elsewhere, "ag_sononet8.digits")
    start = started("ag_sononet8", table, 48)
    assert start.weights is None
    assert "images of this data" in start.words


@pytest.mark.report
def test_a_run_decides_once_and_says_what_it_took(elsewhere, scans, tmp_path):  # noqa: F811
    add(elsewhere, "ag_sononet8.small", num_classes=3)
    config = elsewhere / "ag_sononet8.small/config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"]["input_size"] = [1, 16, 16]
    config.write_text(json.dumps(content))
    index = json.loads((elsewhere / weights.INDEX).read_text())
    index["ag_sononet8.small"]["sha256"]["config.json"] = weights.sha256_of(config)
    (elsewhere / weights.INDEX).write_text(json.dumps(index))
    mark(elsewhere, "ag_sononet8.small")
    out = tmp_path / "run"
    call = ["train", str(scans), *QUICK, "--out", str(out), "--epochs", "1"]
    with messages() as said:
        assert run_command(call) == 0
    assert sum("starts from Regard's own weights ag_sononet8.small" in line for line in said) == 1
    plan = json.loads((out / "run.json").read_text())["plan"]
    assert (plan["weights"], plan["pretrained"]) == ("ag_sononet8.small", False)
    for file in ("README.md", "report.html"):
        assert "ag_sononet8.small" in (out / file).read_text(encoding="utf-8")
    assert 'pretrained = "no"' in (out / "recipe.toml").read_text()
    assert "--weights ag_sononet8.small" in (out / "recipe.toml").read_text()
    with messages() as said:
        assert run_command([*call, "--resume", "--pretrained", "auto"]) == 0
    assert not any("starts from" in line for line in said)
    assert run_command([*call, "--resume", "--pretrained", "yes"]) == 2


def test_a_recipes_values_for_random_weights_are_taken_for_those_alone(scans, tmp_path, capsys):
    own = tmp_path / "own.toml"
    own.write_text(
        "batch_size = 16\nsteps = 2\npretrained = 'auto'\nlr = 0.05\n"
        "[random_start]\noptimizer = 'muon'\nlr = 0.015\nweight_decay = 0.1\n"
    )
    calls = {
        "random": [], "loaded": ["--weights", tmp_path / "random"], "by-hand": ["--lr", "0.02"],
    }  # fmt: skip
    for name, more in calls.items():
        call = ["train", scans, *QUICK, "--recipe", own, "--out", tmp_path / name, *more]
        assert run_command([*map(str, call)]) == 0
        assert run_command([*map(str, call), "--resume"]) == 0  # the same call is the same run
    trained = {name: load_recipe(tmp_path / name / "recipe.toml") for name in calls}
    values = {name: (r.optimizer, r.lr, r.random_start) for name, r in trained.items()}
    assert values == {
        "random": ("muon", 0.015, {}), "loaded": ("sgd", 0.05, {}), "by-hand": ("sgd", 0.02, {}),
    }  # fmt: skip
    call = ["train", scans, *QUICK, "--recipe", own, "--out", tmp_path / "by-hand", "--resume"]
    capsys.readouterr()
    assert run_command([*map(str, call)]) == 2
    assert "was started with" in capsys.readouterr().err


def test_weights_that_come_with_regard_are_recorded_by_their_tag(scans, tmp_path, capsys):
    options = ["--weights", "ag_sononet8", "--size", "16", "--steps", "1", "--channels", "1"]
    call = ["train", str(scans), *options, "--out", str(tmp_path / "r")]
    assert run_command([*call, "--faithfulness-images", "0"]) == 0
    assert "Regard's own weights ag_sononet8.digits" in capsys.readouterr().out
    plan = json.loads((tmp_path / "r/run.json").read_text())["plan"]
    assert plan["weights"] == "ag_sononet8.digits"
    assert "ag_sononet8.digits" in plan["start"]
    assert run_command([*call, "--resume"]) == 0
    call[3] = "other"
    assert run_command([*call, "--resume"]) == 2


def test_test_images_that_trained_the_weights_are_told(whole, scans, tmp_path, capsys):
    """Another seed of the splits makes test images of those that the weights were trained on."""
    options = ["--split-seed", "1", "--steps", "1", "--weights", whole, "--out", tmp_path / "r"]
    assert run_command([*map(str, ["train", scans, *QUICK, *options])]) == 0
    were = {row["path"]: row["split"] for row in rows_of(whole / "splits.csv")}
    rows = rows_of(tmp_path / "r/splits.csv")
    tested = [were[row["path"]] for row in rows if row["split"] == "test"]
    count = sum(split != "test" for split in tested)
    assert 0 < count < len(tested)
    line = f"{count} of {len(tested)} test images, or others of their groups, trained or"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "r/README.md").read_text(encoding="utf-8")
    state = (tmp_path / "r/run.json").read_text(encoding="utf-8")
    state = state.replace('"status": "finished"', '"status": "running"')
    (tmp_path / "r/run.json").write_text(state, encoding="utf-8")
    assert run_command([*map(str, ["train", scans, *QUICK, *options, "--resume"])]) == 0
    assert line in (tmp_path / "r/README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert run_command(["evaluate", str(tmp_path / "r"), "--json"]) == 0
    assert f"{count} of {len(tested)} images trained or validated" in capsys.readouterr().err
    suspects, _ = find_label_errors([tmp_path / "r"])
    assert sum(s.out_of_sample for s in suspects) == sum(
        row["split"] != "train" and were[row["path"]] != "train" for row in rows
    )
    same = read_splits(open_data(str(scans)), whole / "splits.csv")
    start = Start(False, str(whole), "")
    assert seen_before(same, start, "ag_sononet8") is None
    no_test = replace(same, splits=np.where(same.splits == "test", "val", "train"))
    assert seen_before(no_test, start, "ag_sononet8") is None
    trained, tested = (np.flatnonzero(same.splits == split)[:3] for split in ("train", "test"))
    table = same.select([trained[0], *tested])  # whose second image is of the same patient
    table = replace(table, splits=np.full(4, "test"), groups=np.array(["A", "A", "B", "C"]))
    assert seen_before(table, start, "ag_sononet8").startswith("2 of 4 test images")


def test_test_images_that_trained_regards_own_weights_are_told(table):
    by_name = choose_start("ag_sononet8", {}, Recipe(pretrained="yes"), 16, table)
    assert by_name.weights is None
    whole = replace(table, splits=np.full(len(table), "test"))
    assert "trained or validated ag_sononet8.digits" in seen_before(whole, by_name, "ag_sononet8")
    assert seen_before(whole, Start(False, None, "random weights"), "ag_sononet8") is None


@pytest.mark.parametrize(
    ("name", "weights_named", "words"),
    [("ag_sononet8", "ag_sononet8", "1 channel;"), ("sononet8", "ag_sononet8", "ag_sononet8"),
     ("cbam_resnet18", "cbam_resnet18", r"channels=\[32, 64, 128, 256\]")],
)  # fmt: skip
def test_weights_that_do_not_fit_say_what_they_are_of(name, weights_named, words):
    with pytest.raises(UsageError, match=words):
        make_model(name, {}, 3, (3, 64, 64), False, weights_named)


def test_a_study_starts_all_its_runs_alike(capsys):
    call = ["study", "twins", "digits", "--dry-run", "--seeds", "1", "--size", "32"]
    assert run_command(call) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("--pretrained no" in line for line in lines)
    assert run_command([*call, "--pretrained", "auto"]) == 0
    assert all("--pretrained auto" in line for line in capsys.readouterr().out.splitlines())


def test_python_takes_true_and_words(scans, tmp_path):
    options = {"out": tmp_path / "r", "model": "ag_sononet8", "size": 16, "epochs": 0.2}
    options["channels"] = 1
    with pytest.raises(ValueError, match="pretrained='maybe'"):
        regard.train(scans, pretrained="maybe", **options)
    with messages() as said:
        regard.train(scans, pretrained=False, faithfulness_images=0, **options)
    assert any("starts from random weights" in line for line in said)
