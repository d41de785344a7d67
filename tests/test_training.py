"""A training run's promises, kept by real processes on real images."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

import regard
from regard.cli import run_command
from regard.errors import NotFiniteError, UsageError
from regard.models.counting import count_multiply_adds
from tests.helpers import (
    ENVIRONMENT,
    QUICK,
    answer,
    dense,
    rows_of,
    run,
    same_network,
    same_results,
    settings,
    start,
)


# ---------------------------------------------------------------------------- the folder
def test_the_folder_explains_itself(whole, scans):
    run_json = json.loads((whole / "run.json").read_text())
    assert run_json["status"] == "finished"
    assert run_json["facts"]["counts"] == {"train": 72, "val": 24, "test": 24}
    assert not (whole / "state").exists()
    assert not list(whole.glob("best*"))
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    assert model.num_classes == 3
    facts, size = run_json["facts"], model.default_cfg["input_size"]
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["multiply_adds"] == count_multiply_adds(model, size) > facts["parameters"]
    rows = rows_of(whole / "metrics.csv")
    assert len(rows) == 6
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert dense(evaluation["confusion"], 3).sum() == 24
    events = list((whole / "tensorboard").iterdir())
    assert len(events) == 1
    again = regard.load(whole)
    assert again.class_names == ["0", "1", "2"]
    splits = rows_of(whole / "splits.csv")
    assert len({r["path"] for r in splits}) == 120
    assert "report.html" in {p.name for p in whole.iterdir()}
    assert str(scans) in (whole / "recipe.toml").read_text()


def test_the_recipe_says_the_words_that_were_called(scans, tmp_path, monkeypatch):
    """Not sys.argv, which is a notebook's or another program's where that calls."""
    monkeypatch.setattr(sys, "argv", ["notebook", "-f", "kernel.json"])
    words = ["train", str(scans), *QUICK, "--steps", "1", "--out", str(tmp_path / "a run")]
    assert run_command(words) == 0
    line = (tmp_path / "a run" / "recipe.toml").read_text().splitlines()[1]
    assert shlex.split(line.removeprefix("# ")) == ["regard", *words]


def test_tensorboard_reads_the_events(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    rows = rows_of(whole / "metrics.csv")
    found = events.Scalars("val_accuracy")
    assert [e.step for e in found] == [int(float(r["step"])) for r in rows]
    told = [float(r["val_accuracy"]) for r in rows]
    assert [e.value for e in found] == pytest.approx(told, abs=1e-6)


def test_evaluate_counts_as_the_training_did(whole):
    again = answer("evaluate", whole, "--json")
    before = json.loads((whole / "evaluation.json").read_text())
    assert again["confusion"] == before["confusion"]
    assert again["split"] == "test"
    everything = answer("evaluate", whole, "--split", "all", "--json")
    assert everything["n"] == 120
    data = json.loads((whole / "run.json").read_text())["plan"]["data"]
    by_name = answer("evaluate", "ag_sononet8", data, "--weights", whole, "--json")
    assert by_name["confusion"] == everything["confusion"]


def test_predict_says_what_evaluate_counts(whole, scans):
    process = start("predict", whole, scans, "--json")
    answers = [json.loads(s) for s in process.communicate(timeout=200)[0].splitlines()]
    assert len(answers) == 120
    hits = sum(Path(a["path"]).parent.name == a["classes"][0]["class"] for a in answers)
    everything = answer("evaluate", whole, "--split", "all", "--json")
    assert hits == dense(everything["confusion"], 3).trace()


def test_no_file_of_the_data_is_changed(whole, scans, tmp_path):
    def state() -> dict[str, tuple[str, int]]:
        return {
            str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for p in scans.rglob("*.png")
        }

    before = state()
    run("data", scans)
    run(*settings(scans, tmp_path / "run"), "--steps", "3", "--epochs", "1", code=2)
    run("train", scans, *QUICK, "--steps", "3", "--out", tmp_path / "run")
    assert state() == before


# ---------------------------------------------------------------------------- ownership
def test_a_run_is_never_written_over(whole, scans, tmp_path):
    before = (whole / "model.safetensors").read_bytes()
    said = run(*settings(scans, whole), code=2)
    assert "holds a finished run: choose another folder" in said
    assert "nothing is left to do" in run(*settings(scans, whole), "--resume")
    assert "lr=0.5" in run(*settings(scans, whole), "--resume", "--lr", "0.5", code=2)
    assert (whole / "model.safetensors").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert "something else" in run(*settings(scans, tmp_path), code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_runs_are_named_after_data_and_model(scans, tmp_path):
    for _ in range(2):
        run("train", scans, *QUICK, "--steps", "2", cwd=tmp_path)
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert names == ["scans-ag_sononet8", "scans-ag_sononet8-2"]


# -------------------------------------------------------------------------------- faults
def test_a_loss_that_is_not_finite_names_step_rate_and_files(scans, tmp_path):
    out = tmp_path / "run"
    said = run(*settings(scans, out), "--lr", "1e30", "--schedule", "constant", "--clip-grad", "0",
               "--save-minutes", "0", code=1)  # fmt: skip
    (line,) = [text for text in said.splitlines() if text.startswith("regard: ")]
    assert "is not finite (learning rate 1e+30)" in line
    assert f"{scans}/" in line
    kept = torch.load(max((out / "state").glob("*.pt")), weights_only=True)
    assert f"the loss of step {kept['step'] + 1} is" in line
    assert not (out / "model.safetensors").exists()


@pytest.mark.slow
def test_one_unreadable_image_is_left_out_and_listed(scans, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(scans, data)
    (data / "1/07.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken")
    for memory in ("yes", "no"):
        out = tmp_path / memory
        said = run("train", data, *QUICK, "--steps", "20", "--memory", memory, "--out", out)
        assert "1 of 120 images can't be read (0.8%)" in said
        (row,) = rows_of(out / "unreadable.csv")
        assert row["path"] == str(data / "1/07.png")
        counts = json.loads((out / "run.json").read_text())["facts"]["counts"]
        assert sum(counts.values()) == 119
    assert same_network(tmp_path / "yes", tmp_path / "no")
    (data / "2/09.png").write_bytes(b"")
    said = run("train", data, *QUICK, "--steps", "2", "--out", tmp_path / "too-many", code=2)
    assert "2 of 120 images can't be read (1.7%), more than max_unreadable=0.01" in said
    run("train", data, *QUICK, "--steps", "2", "--out", tmp_path / "allowed",
        "--max-unreadable", "0.1")  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 70 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(mount)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_is_told_at_once_and_later_leaves_the_last_state(scans, small_disk, whole):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(30_000_000))
    said = run(*settings(scans, small_disk / "run"), code=1)
    assert "MB are free, and the run needs about" in said
    assert not (small_disk / "run/run.json").exists()
    filler.unlink()
    out = small_disk / "run"
    process = start(*settings(scans, out), "--save-minutes", "0")
    while process.poll() is None and len(list((out / "state").glob("step-*.pt"))) < 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # so that it can't end before the disk is full
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(80_000_000))
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    (line,) = [text for text in err.splitlines() if text.startswith("regard: ")]
    assert str(out) in line  # a state, best.safetensors or metrics.csv, whichever came first
    assert "can't be written (" in line
    filler.unlink()
    assert "resumed after step" in run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


def test_an_unwritable_folder_is_told_at_once(scans, tmp_path):
    (tmp_path / "file").write_text("")
    said = run(*settings(scans, tmp_path / "file/run"), code=1)
    assert "can't be written" in said


# --------------------------------------------------------------- of the library, in process
def trained(scans: Path, out: Path, **changes) -> Path:
    values = {
        "model": "ag_sononet8",
        "size": 16,
        "flip": 0,
        "val": 0.2,
        "test": 0.2,
        "faithfulness_images": 0,
    }
    return regard.train(str(scans), out=out, **(values | changes))


def test_weights_that_the_last_step_of_an_epoch_broke_are_not_kept(scans, tmp_path):
    """The loss was finite before the update; what is tested and saved after it must be too."""
    broken = {"lr": 1e30, "schedule": "constant", "batch_size": 72, "save_minutes": 0}
    for out, steps in ((tmp_path / "goes-on", 5), (tmp_path / "ends", 1)):
        with pytest.raises(NotFiniteError, match=r"of step 1 is not finite \(learning rate 1e\+30"):
            trained(scans, out, steps=steps, **broken)
        assert not list(out.glob("state/*.pt"))
        assert not (out / "model.safetensors").exists()


def test_a_run_that_could_not_start_leaves_its_folder_free(scans, tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scans, data)
    for name in ("2/09.png", "1/07.png"):
        (data / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 120 images can't be read \(1.7%\), more than"):
        trained(data, out, steps=2)
    with pytest.raises(UsageError, match="CUDA graphs need CUDA"):
        trained(data, out, steps=2, max_unreadable=0.1, compile="graphs", device="cpu")
    assert not out.exists()
    trained(data, out, steps=2, max_unreadable=0.1)
    assert {r["path"] for r in rows_of(out / "unreadable.csv")} == {
        str(data / "2/09.png"), str(data / "1/07.png"),
    }  # fmt: skip


@pytest.mark.slow
def test_images_lost_on_the_way_are_left_out_and_listed(scans, tmp_path, monkeypatch):
    monkeypatch.setattr("regard.training.splits.CHECKED", 2)  # of a split, its first and last
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scans, data)
    splits: dict[str, list[Path]] = {}
    for row in rows_of(trained(scans, tmp_path / "first", steps=1) / "splits.csv"):
        splits.setdefault(row["split"], []).append(data / row["path"])
    lost = sorted(str(paths[len(paths) // 2]) for paths in splits.values())
    assert len(lost) == 3
    for path in lost:
        Path(path).write_bytes(b"\x89PNG\r\n\x1a\n")
    trained(data, out, epochs=2, batch_size=16, memory="no", workers=0)
    listed = rows_of(out / "unreadable.csv")
    assert sorted(r["path"] for r in listed) == lost
    assert all(r["reason"] for r in listed)
    assert json.loads((out / "run.json").read_text())["facts"]["unreadable"] == 3
    assert json.loads((out / "evaluation.json").read_text())["n"] == 23


@pytest.mark.report
def test_a_patient_is_never_on_two_sides(scans, tmp_path):
    lines = ["path,label,group"]
    for k, path in enumerate(sorted(scans.rglob("*.png"))):
        lines.append(f"{path},{path.parent.name},patient {k // 4}")
    manifest = tmp_path / "images.csv"
    manifest.write_text("\n".join(lines) + "\n")
    out = trained(manifest, tmp_path / "run", steps=2, faithfulness_images=8)
    rows = rows_of(out / "splits.csv")
    scored = json.loads((out / "faithfulness.json").read_text())
    assert scored["images"] == 8
    assert scored["groups"] == len({row["group"] for row in rows if row["split"] == "test"})
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["group"], set()).add(row["split"])
    assert len(sides) == 30
    assert all(len(where) == 1 for where in sides.values())
    assert {row["split"] for row in rows} == {"train", "val", "test"}


PEAK = """
import resource, sys
from regard.cli import run_command
code = run_command(sys.argv[1:])
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_predicting_ten_times_as_many_images_takes_no_more_memory(whole, scans, tmp_path):
    peaks = []
    for count in (300, 3000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for k in range(count):
            os.link(scans / f"{k % 3}/{k % 40:02d}.png", folder / f"{k}.png")
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "predict", str(whole), str(folder), "--csv",
             str(tmp_path / f"{count}.csv")],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=200,
        )  # fmt: skip
        code, peak = map(int, done.stderr.splitlines()[-1].split())
        assert code == 0
        assert len(rows_of(tmp_path / f"{count}.csv")) == count
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 30  # MB; the images alone are 2.3 MB as bytes, 9 as floats


@pytest.mark.parametrize("how", ["run", "shipped"])
def test_normalization_of_the_model_is_that_of_the_starting_weights(scans, tmp_path, how):
    given = {"size": 16, "epochs": 1, "val": 0.2, "test": 0.2, "faithfulness_images": 0,
             "trackers": ("none",), "normalization": "model"}  # fmt: skip
    if how == "run":
        first = regard.train(
            str(scans),
            model="ag_sononet8",
            out=tmp_path / "first",
            **{**given, "normalization": "data"},
        )
        weights = str(first)
    else:
        first, weights = "ag_sononet8.digits", "ag_sononet8.digits"
    run = regard.train(str(scans), weights=weights, out=tmp_path / "run", **given)
    wanted, found = regard.load(first).preprocess, regard.load(run).preprocess
    assert (found.mean, found.std) == (wanted.mean, wanted.std)
    assert found.normalization == wanted.normalization
    if how == "shipped":
        run = regard.train(
            str(scans), model="ag_sononet8", pretrained="yes", out=tmp_path / "other", **given
        )
        assert set(regard.load(run).preprocess.mean) == set(wanted.mean)  # gray, three times


def test_a_run_of_a_tuple_is_resumed_by_the_same_words(scans, tmp_path):
    words = ["train", scans, "--model", "sononet8", "--arg", "convs=(1,1,1,1,1)", "--size", "16",
             "--epochs", "1", "--val", "0.2", "--test", "0.2", "--faithfulness-images", "0",
             "--log", "none", "--out", tmp_path / "run"]  # fmt: skip
    assert run_command([*map(str, words)]) == 0
    assert run_command([*map(str, words), "--resume"]) == 0
    words[words.index("convs=(1,1,1,1,1)")] = "convs=(1,1,1,1,2)"
    assert run_command([*map(str, words), "--resume"]) == 2
