"""A training run's promises, kept by real processes on real images."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import regard

# small enough to take seconds: AG-SonoNet-8 at 16x16 on a few hundred of the digits
QUICK = ["--model", "ag_sononet8", "--size", "16", "--flip", "0", "--val", "0.2", "--test", "0.2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "regard", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options,
    )  # fmt: skip


def run(*arguments: object, code: int = 0, **options) -> str:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, (process.returncode, out, err)
    assert "Traceback" not in err
    return out + err


def same_network(a: Path, b: Path) -> bool:
    first, second = (load_file(f / "model.safetensors") for f in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def same_results(a: Path, b: Path) -> bool:
    texts = [
        [(f / name).read_text() for name in ("metrics.csv", "evaluation.json")] for f in (a, b)
    ]
    return texts[0] == texts[1] and same_network(a, b)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """120 of the digits 0, 1 and 2 as PNG files in a folder of class folders."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), tmp_path_factory.mktemp("scans") / "scans"
    for name in (0, 1, 2):
        (folder / str(name)).mkdir(parents=True)
        for k, scan in enumerate(digits.images[digits.target == name][:40]):
            pixels = np.kron(scan / 16 * 255, np.ones((3, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(name) / f"{k:02d}.png")
    return folder


def settings(scans: Path, out: Path) -> list[object]:
    return ["train", scans, *QUICK, "--out", out, "--batch-size", "16", "--epochs", "6"]


@pytest.fixture(scope="module")
def whole(scans, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(*settings(scans, out))
    return out


# ---------------------------------------------------------------------------- the folder
def test_the_folder_explains_itself(whole, scans):
    run_json = json.loads((whole / "run.json").read_text())
    assert run_json["status"] == "finished"
    assert run_json["facts"]["counts"] == {"train": 72, "val": 24, "test": 24}
    assert not (whole / "state").exists()
    assert not (whole / "best.safetensors").exists()
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    assert model.num_classes == 3
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert len(rows) == 6
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert np.sum(evaluation["confusion"]) == 24
    events = list((whole / "tensorboard").iterdir())
    assert len(events) == 1
    again = regard.load(whole)
    assert again.class_names == ["0", "1", "2"]
    splits = list(csv.DictReader((whole / "splits.csv").open()))
    assert len({r["path"] for r in splits}) == 120
    assert "report.html" in {p.name for p in whole.iterdir()}
    assert str(scans) in (whole / "recipe.toml").read_text()


def test_tensorboard_reads_the_events(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    found = events.Scalars("val_accuracy")
    assert [e.step for e in found] == [int(float(r["step"])) for r in rows]
    told = [float(r["val_accuracy"]) for r in rows]
    assert [e.value for e in found] == pytest.approx(told, abs=1e-6)


def test_evaluate_counts_as_the_training_did(whole):
    again = json.loads(run("evaluate", whole, "--json"))
    before = json.loads((whole / "evaluation.json").read_text())
    assert again["confusion"] == before["confusion"]
    assert again["split"] == "test"
    everything = json.loads(run("evaluate", whole, "--split", "all", "--json"))
    assert everything["n"] == 120


def test_predict_says_what_evaluate_counts(whole, scans):
    answers = [json.loads(s) for s in run("predict", whole, scans, "--json").splitlines()]
    assert len(answers) == 120
    hits = sum(Path(a["path"]).parent.name == a["classes"][0]["class"] for a in answers)
    everything = json.loads(run("evaluate", whole, "--split", "all", "--json"))
    assert hits == np.trace(everything["confusion"])


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
    assert "holds a finished run: give --out another folder" in said
    assert "nothing is left to do" in run(*settings(scans, whole), "--resume")
    assert "--lr 0.5" in run(*settings(scans, whole), "--resume", "--lr", "0.5", code=2)
    assert (whole / "model.safetensors").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("mine")
    assert "something else" in run(*settings(scans, tmp_path), code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_runs_are_named_after_data_and_model(scans, tmp_path):
    for _ in range(2):
        run("train", scans, *QUICK, "--steps", "2", cwd=tmp_path)
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert names == ["scans-ag_sononet8", "scans-ag_sononet8-2"]


# -------------------------------------------------------------------------------- resume
VARIANTS = {
    "held": [],
    "streamed": ["--memory", "no", "--workers", "2"],
    "everything": ["--ema", "0.9", "--accumulate", "2", "--mixup", "0.2", "--optimizer", "adamw",
                   "--lr", "0.003", "--rotate", "10", "--erase", "0.3", "--batch-size", "7",
                   "--sampler", "balanced"],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments_it_ends_with_the_same_bits(scans, tmp_path, variant):
    chosen = [*settings(scans, "OUT"), *VARIANTS[variant]]
    if "--batch-size" in VARIANTS[variant]:  # given twice is an error
        at = chosen.index("--batch-size")
        del chosen[at : at + 2]

    def call(out: Path) -> list[object]:
        return [out if a == "OUT" else a for a in chosen]

    run(*call(tmp_path / "whole"))
    out, kills = tmp_path / "killed", 0
    rng = np.random.default_rng(list(VARIANTS).index(variant))
    while not (out / "run.json").exists() or "finished" not in (out / "run.json").read_text():
        resume = ["--resume"] if (out / "run.json").exists() else []
        process = start(*call(out), "--save-minutes", "0", *resume)
        wait_until = time.monotonic() + 120
        before = newest(out)
        while process.poll() is None and newest(out) == before and time.monotonic() < wait_until:
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.08)))  # in a step, an evaluation, or a write
        if process.poll() is None and kills < 4:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate(timeout=200)
    assert kills >= 2
    assert same_results(tmp_path / "whole", out)


def newest(out: Path) -> str:
    state = out / "state"
    return max((p.name for p in state.glob("step-*.pt")), default="") if state.exists() else ""


DRIVER = """
import os, signal, sys
import regard.training.state as state
whole, count = state.os.replace, 0
def replace(a, b):
    global count
    count += str(b).endswith('.pt')
    if count == 3 and str(b).endswith('.pt'):
        os.truncate(a, os.path.getsize(a) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    whole(a, b)
state.os.replace = replace
from regard.cli import main
main(sys.argv[1:])
"""


def test_killed_in_the_middle_of_writing_a_state(whole, scans, tmp_path):
    out = tmp_path / "run"
    driver = [sys.executable, "-c", DRIVER, *map(str, settings(scans, out)), "--save-minutes", "0"]
    done = subprocess.run(driver, capture_output=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == -signal.SIGKILL
    names = sorted(p.name for p in (out / "state").iterdir())
    assert names == [".step-000000003.pt.writing", "step-000000001.pt", "step-000000002.pt"]
    assert "resumed after step 2" in run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


def test_a_broken_state_gives_way_to_the_one_before(whole, scans, tmp_path):
    out = tmp_path / "run"
    stopped_by(signal.SIGKILL, scans, out)
    states = sorted((out / "state").glob("step-*.pt"))
    assert len(states) == 2
    states[1].write_bytes(states[1].read_bytes()[:1000])
    said = run(*settings(scans, out), "--resume")
    assert f"{states[1]} can't be read" in said
    assert f"resumed after step {int(states[0].stem[5:])} of" in said
    assert same_results(whole, out)


def test_only_broken_states_are_told(scans, tmp_path):
    out = tmp_path / "run"
    stopped_by(signal.SIGKILL, scans, out)
    for path in (out / "state").glob("step-*.pt"):
        path.write_bytes(b"noise")
    said = run(*settings(scans, out), "--resume", code=1)
    assert len([line for line in said.splitlines() if line.startswith("regard: ")]) == 1


def stopped_by(number: int, scans: Path, out: Path) -> tuple[int, str]:
    """A run that got a signal once two states were there."""
    process = start(*settings(scans, out), "--save-minutes", "0")
    while process.poll() is None and len(list((out / "state").glob("step-*.pt"))) < 2:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(whole, scans, tmp_path, number):
    out = tmp_path / "run"
    code, err = stopped_by(number, scans, out)
    assert code == 128 + number
    (line,) = [text for text in err.splitlines() if text.startswith("regard: ")]
    assert "its state is saved: go on with the same command and --resume" in line
    assert "holds a run that has not ended: add --resume" in run(*settings(scans, out), code=2)
    assert "resumed after step" in run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


# -------------------------------------------------------------------------------- faults
def test_a_loss_that_is_not_finite_names_step_rate_and_files(scans, tmp_path):
    out = tmp_path / "run"
    said = run(*settings(scans, out), "--lr", "1e30", "--schedule", "constant", "--clip", "0",
               "--save-minutes", "0", code=1)  # fmt: skip
    (line,) = [text for text in said.splitlines() if text.startswith("regard: ")]
    assert "is not finite (learning rate 1e+30)" in line
    assert f"{scans}/" in line
    kept = torch.load(max((out / "state").glob("*.pt")), weights_only=True)
    assert f"the loss of step {kept['step']} is" in line
    assert not (out / "model.safetensors").exists()


def test_one_unreadable_image_is_left_out_and_listed(scans, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(scans, data)
    (data / "1/07.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken")
    for memory in ("yes", "no"):
        out = tmp_path / memory
        said = run("train", data, *QUICK, "--steps", "20", "--memory", memory, "--out", out)
        assert "1 of 120 images can't be read (0.8%)" in said
        (row,) = csv.DictReader((out / "unreadable.csv").open())
        assert row["path"] == str(data / "1/07.png")
        counts = json.loads((out / "run.json").read_text())["facts"]["counts"]
        assert sum(counts.values()) == 119
    assert same_network(tmp_path / "yes", tmp_path / "no")
    (data / "2/09.png").write_bytes(b"")
    said = run("train", data, *QUICK, "--steps", "2", "--out", tmp_path / "too-many", code=2)
    assert "2 of 120 images can't be read (1.7%), more than --max-unreadable 0.01" in said
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
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(70_000_000))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "the state can't be saved" in err
    filler.unlink()
    assert "resumed after step" in run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


def test_an_unwritable_folder_is_told_at_once(scans, tmp_path):
    (tmp_path / "file").write_text("")
    said = run(*settings(scans, tmp_path / "file/run"), code=1)
    assert "can't be written" in said


# ---------------------------------------------------------------------- many processes
def in_two_processes(*arguments: object) -> str:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "-m", "regard", *map(str, arguments),
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_count_as_one_does(whole, scans, tmp_path):
    """The same weights, tested by two: no image twice, none padded, the counts the same."""
    out = tmp_path / "run"
    said = in_two_processes(
        "train", scans, *QUICK, "--out", out, "--batch-size", "8", "--steps", "12",
        "--sampler", "balanced", "--class-weights", "balanced",
    )  # fmt: skip
    assert "cpu x 2" in said
    assert said.count("accuracy on the 24 test images") == 1
    by_two = json.loads((out / "evaluation.json").read_text())
    by_one = json.loads(run("evaluate", out, "--json"))
    assert by_two["confusion"] == by_one["confusion"]
    assert np.sum(by_two["confusion"]) == 24
    with np.load(out / "predictions.npz") as said_of:
        assert len(set(said_of["paths"].tolist())) == 24
