"""A run that is stopped, whenever and however, ends with the bits of one that was not."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import regard
from regard.cli import run_command
from regard.data.workers import WaitInterrupted
from regard.errors import Stopped, UsageError
from regard.training.config import Recipe
from regard.training.loop import Trainer
from regard.training.scoring import Scorer
from tests.helpers import (
    ENVIRONMENT,
    rows_of,
    run,
    same_network,
    same_results,
    settings,
    start,
    stopped_by,
)

VARIANTS = {
    "held": [],
    "streamed": ["--memory", "no", "--workers", "2", "--optimizer", "muon", "--lr", "0.005",
                 "--self-adaptive", "0.8"],
    "everything": ["--ema-decay", "0.9", "--accumulate", "2", "--mixup", "0.2",
                   "--optimizer", "adamw", "--lr", "0.003", "--rotate", "10",
                   "--random-erasing", "0.3",
                   "--batch-size", "7", "--sampler", "balanced"],
}  # fmt: skip


@pytest.mark.slow
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
        if process.poll() is None and kills < 3:
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
import regard.files as state
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


@pytest.mark.slow
def test_killed_in_the_middle_of_writing_a_state(whole, scans, tmp_path):
    out = tmp_path / "run"
    driver = [sys.executable, "-c", DRIVER, *map(str, settings(scans, out)), "--save-minutes", "0"]
    done = subprocess.run(driver, capture_output=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == -signal.SIGKILL
    names = sorted(p.name for p in (out / "state").iterdir())
    assert names == [".step-000000003.pt.writing", "step-000000001.pt", "step-000000002.pt"]
    assert "resumed after step 2" in run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


@pytest.mark.slow
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(whole, scans, tmp_path, number):
    out = tmp_path / "run"
    code, err = stopped_by(number, scans, out)
    assert code == 128 + number
    (line,) = [text for text in err.splitlines() if text.startswith("regard: ")]
    assert "its state is saved: continue with the same command and --resume" in line
    assert "holds a run that has not ended: resume it" in run(*settings(scans, out), code=2)
    assert "resumed after step" in run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_too_saves_as_well(scans, tmp_path, number):
    """As from `timeout`, systemd, SLURM or Ctrl-C, which signal the whole group."""
    chosen = [*settings(scans, tmp_path / "run"), *VARIANTS["streamed"]]
    process = start(*chosen, "--save-minutes", "0")
    while process.poll() is None and newest(tmp_path / "run") == "":
        time.sleep(0.002)
    process.signal_group(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    (line,) = err.splitlines()
    assert "its state is saved" in line


@pytest.fixture
def dropping(scans, tmp_path, monkeypatch):
    """A run of timm's ResNet with dropout and stochastic depth, 2.3 epochs of 7.2 steps."""
    monkeypatch.setattr("regard.training.progress.PLAIN_EVERY", 0.0)  # a line a step
    recipe = Recipe(
        model="resnet10t", model_args={"drop_rate": 0.4, "drop_path_rate": 0.3}, size=32,
        batch_size=10, epochs=2.3, ema_decay=0.8, clip_grad=1.0, lr=0.02, random_crop="resized",
        color_jitter=0.2, val=0.2, test=0.2, faithfulness_images=0, flip=0, random_erasing=0.3,
    )  # fmt: skip

    def go(name: str, at_step=lambda step: None, **options) -> Path:
        def see(record: logging.LogRecord) -> bool:
            if shown := re.search(r"step (\d+)/17 ", record.getMessage()):
                at_step(int(shown[1]))
            return True

        log = logging.getLogger("regard.training.progress")
        log.addFilter(see)
        log.setLevel(logging.INFO)
        try:
            return regard.train(str(scans), recipe=recipe, out=tmp_path / name, **options)
        finally:
            log.removeFilter(see)

    return go


def interrupt(step: int, times: int = 1):
    def at_step(here: int) -> None:
        if here == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return at_step


@pytest.mark.slow
def test_dropout_and_parts_of_epochs_go_on_as_they_were(dropping):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole = dropping("whole")
    assert [float(r["step"]) for r in rows_of(whole / "metrics.csv")] == [8, 15, 17]
    for step in (5, 8, 11):  # in an epoch, at its end, in the next
        with pytest.raises(Stopped, match=f"stopped after step {step}"):
            dropping("stopped", interrupt(step), resume=step > 5)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert same_results(whole, dropping("stopped", resume=True))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_and_harms_nothing(dropping, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        dropping("ended", interrupt(11, times=2))
    assert [p.name for p in (tmp_path / "ended/state").iterdir()] == ["step-000000008.pt"]
    assert same_results(dropping("whole"), dropping("ended", resume=True))


@pytest.mark.report
@pytest.mark.slow
def test_in_a_thread_signals_are_left_alone(dropping):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen, paths = [], []

    def look(_: int) -> None:
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=lambda: paths.append(dropping("run", look)))
    thread.start()
    thread.join()
    assert paths[0].name == "run"
    assert (paths[0] / "report.html").is_file()
    assert set(seen) == {handlers}


@pytest.mark.slow
def test_what_a_run_was_started_with_is_not_changed(scans, tmp_path, whole, capsys):
    out = tmp_path / "run"
    stopped_by(signal.SIGTERM, scans, out)
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for flags, named in (
        (["--ema-decay", "0.9"], "ema_decay=0.9: .* was started with 0.0; leave it out"),
        (["--weights", whole], "--weights .* was started with None"),
        (["--pretrained", "yes"], "pretrained=yes: .* was started with no"),
        (["--recipe", "cbam-cifar"], "optimizer=sgd: .* was started with muon"),
        (["--model", "sononet8"], "--model sononet8: .* was started with ag_sononet8"),
    ):
        asked = [*settings(scans, out), "--resume", *flags]
        if "--model" in flags:  # given twice is an error of its own
            del asked[asked.index("--model") : asked.index("--model") + 2]
        assert run_command(list(map(str, asked))) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert re.search(named, said), said
    other = [str(a) for a in (*settings(scans, out), "--resume")]
    other[1] = "digits"
    assert run_command(other) == 2
    assert "data=digits: " in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept
    run(*settings(scans, out), "--resume", "--save-minutes", "9", "--workers", "1")
    assert same_results(whole, out)


def test_a_schedule_that_is_given_is_the_one_that_the_run_was_started_with(scans, tmp_path):
    """Not any other one, as of a recipe whose schedule was scaled to the run's length."""
    given = {
        "model": "sononet8", "size": 32, "steps": 4, "faithfulness_images": 0,
        "out": tmp_path / "run", "trackers": ("none",), "schedule_unit": "steps",
    }  # fmt: skip
    schedule = {"schedule": "steps", "milestones": [1, 2], "warmup": 2.0, "optimizer": "sgd"}
    regard.train(scans, **given, **schedule)
    for name, value, was in (("warmup", 1.0, "2.0"), ("milestones", [1.5, 3], r"\(1.0, 2.0\)")):
        with pytest.raises(UsageError, match=f"{name}=.* was started with {was}"):
            regard.train(scans, **given, **(schedule | {name: value}), resume=True)
    assert regard.train(scans, **given, **schedule, resume=True) == tmp_path / "run"


@pytest.mark.parametrize("stops", [1, 3])
def test_stops_in_one_evaluation_time_and_again_are_told_and_lose_nothing(
    scans, tmp_path, monkeypatch, stops
):
    given = {
        "model": "ag_sononet8", "size": 16, "val": 0.2, "test": 0.2, "epochs": 2, "flip": 0.0,
        "faithfulness_images": 0, "trackers": ("none",),
    }  # fmt: skip
    regard.train(str(scans), out=tmp_path / "whole", **given)
    real, left = Scorer.validate, [stops]

    def stopped(self, *arguments):
        if left[0]:
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.stop()
            raise WaitInterrupted
        return real(self, *arguments)

    monkeypatch.setattr(Scorer, "validate", stopped)
    for again in range(stops):
        with pytest.raises(Stopped) as told:
            regard.train(str(scans), out=tmp_path / "run", resume=again > 0, **given)
        assert told.value.exit_code == 128 + signal.SIGTERM
        assert f"after step {told.value.step}" in str(told.value)
    regard.train(str(scans), out=tmp_path / "run", resume=True, **given)
    assert same_results(tmp_path / "whole", tmp_path / "run")


def test_what_was_left_out_stays_left_out_where_files_got_other_names(scans, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(scans, data)
    for name in "012":
        (data / name / "07.png").write_text(f"broken {name}")
    given = {
        "model": "ag_sononet8", "size": 16, "val": 0.2, "test": 0.0, "epochs": 2, "flip": 0.0,
        "faithfulness_images": 0, "trackers": ("none",), "max_unreadable": 0.1,
    }  # fmt: skip
    regard.train(str(data), out=tmp_path / "whole", **given)
    real = Trainer.update

    def stopping(self):
        real(self)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stopping)
        with pytest.raises(Stopped):
            regard.train(str(data), out=tmp_path / "run", **given)
    for path in list(data.rglob("*.png")):
        path.rename(path.with_name(f"scan {path.name}"))
    regard.train(str(data), out=tmp_path / "run", resume=True, **given)
    assert same_network(tmp_path / "whole", tmp_path / "run")
