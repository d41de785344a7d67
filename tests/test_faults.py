"""What goes wrong around a training: it always ends, says why, and loses nothing."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from regard.data.augment import Augmentation
from regard.data.loading import Reader, Spans, StreamingLoader
from regard.data.preprocess import Preprocess
from regard.data.sources import open_data
from regard.data.workers import (
    WaitInterrupted,
    _start_method,
    lost_connections,
    processes_that_fit,
    read_ahead,
)
from regard.errors import ResourceError, UsageError
from regard.machine import memory_errors
from regard.training.distributed import start_accelerator
from regard.training.run_plan import accumulation_now
from regard.training.trackers import check_trackers
from tests.helpers import ENVIRONMENT, QUICK, run, same_results, settings, start

# A person's own script, without `if __name__`, that trains on streamed images; for each kind of
# fault a process that is forked once everything is imported, and ends as any interpreter does.
DRIVER = """
import ctypes, multiprocessing, os, signal, subprocess, sys, time
import regard, regard.data.loading, regard.training.run as training
from regard.training.model_card import write_model_card

folder, data, kinds = sys.argv[1], sys.argv[2], sys.argv[3:]
after_step = training.Run._after_step
child, ends = -1, {}
for kind in kinds:
    started = time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        break
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() - started < 60:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(kind, "hangs" if ended[0] == 0 else os.waitstatus_to_exitcode(ended[1]), flush=True)
if child == 0:
    def faulty(self, trainer, loss):
        if trainer.step == 2:
            if kind == "fault":
                raise KeyError("a fault of the script")
            if kind == "interrupt":
                raise KeyboardInterrupt
            if kind == "nan":
                raise trainer.not_finite("the loss")
            if kind == "killed":
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        after_step(self, trainer, loss)
    training.Run._after_step = faulty
    if kind == "shm":
        libc = ctypes.CDLL(None)
        assert libc.unshare(0x20000) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", "/dev/shm"], check=True)
        regard.data.loading.shared_memory_free = lambda: 1e12  # as if another filled it meanwhile
    sys.stderr = open(f"{folder}/{kind}.txt", "w")
    regard.train(
        data, model="ag_sononet8", size=64, val=0.2, test=0.2, flip=0, batch_size=8, steps=30,
        faithfulness_images=0, memory="no", workers=2, out=f"{folder}/{kind}",
    )
"""
KINDS = {
    "fault": "KeyError: 'a fault of the script'",
    "interrupt": "KeyboardInterrupt",
    "nan": "NotFiniteError: the loss of step 2 is not finite",
    "killed": "ResourceError: a process that reads images",
    "shm": "ResourceError: no shared memory (/dev/shm) is left",
}


@pytest.mark.slow
def test_a_script_on_streamed_images_ends_with_its_error(scans, tmp_path):
    mounting = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    kinds = [kind for kind in KINDS if kind != "shm" or mounting]
    (tmp_path / "script.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path, scans, *kinds],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=280,
    )  # fmt: skip
    ends = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in kinds)
    said = {kind: (tmp_path / f"{kind}.txt").read_text() for kind in kinds}
    assert ends == dict.fromkeys(kinds, "1") | {"interrupt": ends["interrupt"]}, (ends, said)
    assert ends["interrupt"] in ("1", "-2", "130")
    for kind in kinds:
        assert KINDS[kind] in said[kind]
    failure = json.loads((tmp_path / "nan/run.json").read_text())["failure"]
    assert (failure["step"], len(failure["images"]), failure["state"]) == (2, 8, None)
    assert all(Path(image).is_file() for image in failure["images"])
    assert "state" not in said["nan"].splitlines()[-1]  # none was saved, none is named


@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_batch_whose_worker_died_meanwhile_is_told_as_such(error):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    with pytest.raises(error), lost_connections([worker]):  # it lives: something else is wrong
        raise error
    os.kill(worker.pid, signal.SIGKILL)
    killed = pytest.raises(ResourceError, match="that reads images was killed")
    with killed, lost_connections([worker]):
        raise error


# ------------------------------------------------------------------------ waiting for images
class Slow(Reader):
    """Images that take a minute each."""

    def decode(self, index: int) -> torch.Tensor:
        time.sleep(60)
        raise AssertionError


def slow(scans: Path, workers: int) -> StreamingLoader:
    preprocess = Preprocess((1, 16, 16), (0.5,), (0.25,))
    return StreamingLoader(Slow(open_data(str(scans)), preprocess), None, 0, workers)


def test_a_stop_is_heard_while_images_are_awaited(scans, monkeypatch):
    monkeypatch.setattr("regard.data.loading.shared_memory_free", lambda: float("inf"))
    loader = slow(scans, 1)
    loader.stop = lambda: True
    started = time.monotonic()
    with pytest.raises(WaitInterrupted):
        next(iter(loader.batches([(0, 2)])))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("read", [1, 4], ids=["in the middle", "with the last batch"])
def test_batches_that_are_closed_leave_no_files_threads_and_data(scans, monkeypatch, read):
    monkeypatch.setattr("regard.data.loading.shared_memory_free", lambda: float("inf"))
    gc.collect()  # what earlier tests have left
    files, threads = psutil.Process().num_fds(), threading.active_count()
    table = open_data(str(scans))
    data = weakref.ref(table)
    reader = Reader(table, Preprocess((1, 16, 16), (0.5,), (0.25,)), Augmentation())
    loader = StreamingLoader(reader, None, 0, 2)
    batches = loader.batches(Spans(range(0, 16, 4), 4))
    for _ in range(read):  # a training closes them once it has the last
        next(batches)
    loader.close()
    del table, reader, loader, batches
    gc.collect()
    ends = time.monotonic() + 10  # a thread that hands over sockets closes its own in its time
    while psutil.Process().num_fds() > files and time.monotonic() < ends:
        time.sleep(0.05)
    assert psutil.Process().num_fds() <= files
    assert threading.active_count() <= threads
    assert data() is None


def close_early(scans: Path, folder: str) -> None:
    """Ends workers that have handed over a batch, in a process whose temporary files lie there."""
    tempfile.tempdir = folder
    reader = Reader(open_data(str(scans)), Preprocess((1, 16, 16), (0.5,), (0.25,)), Augmentation())
    loader = StreamingLoader(reader, None, 0, 2)
    next(loader.batches(Spans(range(0, 16, 4), 4)))
    loader.close()


def test_workers_that_are_killed_leave_no_temporary_files(scans, monkeypatch):
    monkeypatch.setattr("regard.data.loading.shared_memory_free", lambda: float("inf"))
    with tempfile.TemporaryDirectory() as folder:  # a short path, as sockets lie there
        process = multiprocessing.get_context("fork").Process(
            target=close_early, args=(scans, folder)
        )
        process.start()
        process.join()
        assert process.exitcode == 0
        assert os.listdir(folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks by default on Linux alone")
def test_workers_are_forked_whatever_the_version_of_python(scans, monkeypatch):
    """Python 3.14 starts a server of forks, and in each worker of each epoch torch anew."""
    monkeypatch.setattr("regard.data.loading.shared_memory_free", lambda: float("inf"))
    context = multiprocessing.context._default_context
    servers = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(context, "_default_context", servers)
    monkeypatch.setattr(context, "_actual_context", None)
    before = set(multiprocessing.active_children())
    reader = Reader(open_data(str(scans)), Preprocess((1, 16, 16), (0.5,), (0.25,)), Augmentation())
    loader = StreamingLoader(reader, None, 0, 1)
    next(loader.batches([(0, 2), (2, 2)]))
    (worker,) = set(multiprocessing.active_children()) - before
    assert type(worker).__name__ == "ForkProcess"
    loader.close()
    monkeypatch.setattr(context, "_actual_context", servers)  # somebody has chosen
    assert _start_method() == "forkserver"


def test_waiting_for_images_has_a_limit(monkeypatch):
    monkeypatch.setattr("regard.data.workers.POLL", 0.05)
    monkeypatch.setattr("regard.data.workers.LONGEST_WAIT", 0.2)
    with pytest.raises(ResourceError, match="no image was read"):
        next(read_ahead([1, 2], lambda _: time.sleep(1), 2, 2))


def test_batches_that_do_not_fit_in_shared_memory_are_read_by_threads(scans, monkeypatch):
    assert processes_that_fit(8, 10e6, 1e12) == (8, 4)
    assert processes_that_fit(2, 10e6, 64e6) == (2, 1)  # four batches of 10 MB in 51 MB
    assert processes_that_fit(2, 16e6, 64e6) == (1, 1)
    assert processes_that_fit(2, 4e6, 64e6) == (2, 4)
    assert processes_that_fit(2, 20e6, 64e6) == (0, 0)
    monkeypatch.setattr("regard.data.loading.shared_memory_free", lambda: 1e3)
    monkeypatch.setattr("regard.data.workers.DataLoader", None)  # no process is started
    reader = Reader(open_data(str(scans)), Preprocess((1, 16, 16), (0.5,), (0.25,)), Augmentation())
    batches = list(StreamingLoader(reader, None, 0, 2).batches([(0, 3), (3, 2)]))
    assert [b.indices.tolist() for b in batches] == [[0, 1, 2], [3, 4]]


def test_spans_are_computed_when_asked_for():
    spans = Spans(range(4, 10**12, 8), 4, 10**12 - 3)
    assert len(spans) == 125_000_000_000
    assert (spans[0], spans[1], spans[2:][0]) == ((4, 4), (12, 4), (20, 4))
    assert list(Spans(range(0, 7, 3), 3, 7)) == [(0, 3), (3, 3), (6, 1)]


# ---------------------------------------------------------------------------------- memory
def test_running_out_of_memory_says_what_to_lower():
    with pytest.raises(ResourceError, match="ran out of memory: this"), memory_errors("it", "this"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ResourceError, match="lower size"), memory_errors("a test", "lower size"):
        np.empty(2**60, dtype=np.uint8)
    with pytest.raises(RuntimeError, match="shape") as other, memory_errors("a test", "nothing"):
        raise RuntimeError("a wrong shape")
    assert not isinstance(other.value, ResourceError)


# ---------------------------------------------------------------------- one run, one folder
def states(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "state").glob("step-*.pt"))


def until(condition, process) -> None:
    end = time.monotonic() + 100
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert condition(), process.communicate(timeout=60)


@pytest.mark.slow
def test_a_folder_has_one_training_at_a_time(whole, scans, tmp_path):
    out = tmp_path / "run"
    process = start(*settings(scans, out), "--save-minutes", "0")
    until(lambda: states(out), process)
    process.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    said = run(*settings(scans, out), "--resume", code=2)
    assert "another training is running in" in said
    process.kill()
    process.communicate(timeout=60)
    run(*settings(scans, out), "--resume")
    assert same_results(whole, out)


def test_usr1_saves_and_goes_on_and_hup_saves_and_stops(whole, scans, tmp_path):
    out = tmp_path / "run"
    long = [*settings(scans, out)[:-1], "50000"]  # epochs, so that it does not end meanwhile
    process = start(*long, "--save-minutes", "1000", "--eval-every", "1000")
    until(lambda: (out / "splits.csv").exists() and (out / "tensorboard").exists(), process)
    while not states(out) and process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)
    if process.poll() is None:
        process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGHUP, err
    assert "its state is saved" in err


@pytest.mark.slow
def test_a_resumed_run_needs_no_starting_weights(scans, tmp_path):
    first, out = tmp_path / "first", tmp_path / "run"
    run("train", scans, *QUICK, "--steps", "2", "--out", first)
    chosen = [*settings(scans, out), "--weights", first]
    process = start(*chosen, "--save-minutes", "0")
    until(lambda: states(out), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    shutil.rmtree(first)
    assert "resumed after step" in run(*settings(scans, out), "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["yes", "no"])
def test_an_image_that_became_readable_changes_nothing(scans, tmp_path, memory):
    data, whole, out = tmp_path / "data", tmp_path / "whole", tmp_path / "run"
    shutil.copytree(scans, data)
    good = (data / "1/07.png").read_bytes()
    (data / "1/07.png").write_bytes(b"broken")

    def chosen(folder: Path) -> list[object]:
        return [*settings(data, folder), "--memory", memory, "--workers", "0"]

    run(*chosen(whole))
    process = start(*chosen(out), "--save-minutes", "0")
    until(lambda: states(out), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    (data / "1/07.png").write_bytes(good)
    run(*chosen(out), "--resume")
    assert same_results(whole, out)


def test_steps_are_shared_by_another_number_of_processes_where_they_can_be():
    assert accumulation_now(1, 4, 2) == 2
    assert accumulation_now(1, 4, 4) == 1
    assert accumulation_now(3, 2, 6) == 1
    with pytest.raises(UsageError, match="to resume it with: 1, 2, 4"):
        accumulation_now(1, 4, 3)


def test_processes_that_accelerate_does_not_start_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # as accelerate launch --cpu -n 2 sets them
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UsageError, match="torchrun --nproc_per_node"):
        start_accelerator()


# ------------------------------------------------------------------- what a run says of itself
def test_the_model_card_names_data_classes_metrics_and_command(whole):
    card = ModelCard.load(whole / "README.md")
    result = card.data.eval_results[0]
    measured = json.loads((whole / "evaluation.json").read_text())["metrics"]["top1"]
    assert (result.metric_value, result.dataset_split) == (round(measured["value"], 4), "test")
    for words in ("3 classes: 0, 1, 2", "72 train", f"{measured['low']:.4f}", "no medical device",
                  "regard train "):  # fmt: skip
        assert words in card.text
    facts = json.loads((whole / "run.json").read_text())["facts"]
    assert facts["selected"]["step"] == facts["best"]["step"]
    assert "validation accuracy" in facts["selected"]["by"]
    assert len(load_file(whole / "model.safetensors")) > 0


def test_a_missing_tracker_names_one_command(monkeypatch):
    assert check_trackers(["tensorboard", "tensorboard"]) == ["tensorboard"]
    assert check_trackers(["none"]) == []
    monkeypatch.setattr("regard.extras.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'regard\[wandb\]'$"):
        check_trackers(["wandb"])
    with pytest.raises(UsageError, match="log=tensorboard none: give none, or the trackers alone"):
        check_trackers(["tensorboard", "none"])
    with pytest.raises(UsageError, match="log=wandbb: choose tensorboard, wandb, "):
        check_trackers(["wandbb"])
