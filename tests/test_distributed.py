"""Two real processes: they train as one, test as one, and stop and go on together."""

import csv
import importlib.metadata
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from regard.data import assign_splits, open_data
from regard.data.loading import SampleOrder
from regard.errors import UsageError
from regard.run_data import predictions_of
from regard.training import distributed
from regard.training.plan import image_weights
from regard.training.recipe_files import load_recipe
from regard.training.run import Run
from regard.training.signals import Signals, Stop
from tests.helpers import ENVIRONMENT, QUICK, dense, rows_of, run, same_results
from tests.test_sources import picture

# Each process is the command line, and tells in the folder TOLD what it had at the end. The
# second one is slow where the first could have written the run's folder meanwhile, and is sent
# a signal by itself where SIGNAL names a step.
DRIVER = """
import hashlib, json, os, signal, sys, time
import torch
import regard.training.run as r
from regard.cli import main
from regard.data.loading import Reader

rank, told = os.environ["RANK"], os.environ["TOLD"]
fit, finish = r.Trainer.fit, r.Run._finish
def slow(function):
    def slowly(*arguments, **more):
        time.sleep(1.0 if rank == "1" else 0.0)
        return function(*arguments, **more)
    return slowly
decoded, layouts = [], set()
load, decode, update = r.load_splits, Reader.decode, r.Trainer.update
def counting(*arguments, **more):
    Reader.decode = lambda self, row: (decoded.append(row), decode(self, row))[1]
    parts = load(*arguments, **more)
    Reader.decode = decode
    return parts
def looking(self):
    # kernels and their gradients that are in channels_last, and not in both layouts at once
    for p in self.model.parameters():
        if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1:
            layouts.update(t.is_contiguous(memory_format=torch.channels_last) for t in (p, p.grad))
            layouts.update(not t.is_contiguous() for t in (p, p.grad))
    update(self)
r.Trainer.update = looking
r.load_splits, r.build_trainer = slow(counting), slow(r.build_trainer)
def signalled(self, *, after_step):
    def after(trainer, loss):
        if rank == "1" and str(trainer.step) == os.environ.get("SIGNAL"):
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(trainer, loss)
    fit(self, after_step=after)
r.Trainer.fit = signalled
def telling(self):
    t = self.trainer
    parameters = b"".join(p.detach().numpy().tobytes() for p in t.model.parameters())
    buffers = b"".join(b.detach().numpy().tobytes() for b in t.model.buffers())
    places = [t.source.order.at(*span).tolist() for span in t.spans(0)]
    tell = {"weights": hashlib.sha256(parameters).hexdigest(), "places": places,
            "buffers": hashlib.sha256(buffers).hexdigest(),
            "mean": self.plan.preprocess.mean, "decoded": len(decoded), "layouts": list(layouts),
            "file": t.source.images.untyped_storage().filename}
    with open(f"{told}/{rank}.json", "w") as file:
        json.dump(tell, file)
    finish(self)
r.Run._finish = telling
main(sys.argv[1:])
"""
SETTINGS = [
    "train", "digits", *QUICK, "--batch-size", "8", "--steps", "24", "--select", "last",
    "--sampler", "balanced", "--ema-decay", "0.5", "--lr", "0.05", "--eval-every", "0.2",
]  # fmt: skip


def in_two(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """The command line in two processes; `folder` gets the driver and what they tell."""
    folder.mkdir(exist_ok=True)
    (folder / "driver.py").write_text(DRIVER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(folder / "driver.py"), *map(str, arguments),
    ]  # fmt: skip
    environment |= {**ENVIRONMENT, "TOLD": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A run of two processes that nobody disturbed; its folder is pair/run."""
    folder = tmp_path_factory.mktemp("pair")
    done = in_two(folder, *SETTINGS, "--out", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu x 2" in done.stdout
    return folder


def told_by(pair: Path) -> list[dict]:
    return [json.loads((pair / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_both_hold_the_same_weights_and_prepare_images_alike(pair):
    first, second = told_by(pair)
    assert first["weights"] == second["weights"]
    assert first["buffers"] == second["buffers"]  # each counted its own until the state was saved
    assert first["mean"] == second["mean"] != [0.5]


@pytest.mark.slow
def test_each_decodes_half_of_the_images_and_both_hold_the_same_memory(pair):
    first, second = told_by(pair)
    for told in (first, second):  # and a sample of 32 a split, by which their size is judged
        assert 1797 / 2 - 2 <= told["decoded"] <= 1797 / 2 + 3 * 32 + 2
    assert first["file"] == second["file"] is not None


@pytest.mark.slow
def test_kernels_and_gradients_stay_in_channels_last_through_ddp(pair):
    for told in told_by(pair):
        assert told["layouts"] == [True]


@pytest.mark.slow
def test_the_balanced_order_is_dealt_out_each_place_once(pair):
    first, second = told_by(pair)
    dealt = [row for both in zip(first["places"], second["places"], strict=True) for row in both]
    table = assign_splits(open_data("digits"), val=0.2, test=0.2, seed=0)
    train = table.select(table.splits == "train")
    recipe = load_recipe(pair / "run/recipe.toml")
    order = SampleOrder(len(train), 0, image_weights(train, recipe))
    assert np.concatenate(dealt).tolist() == order.at(0, 24 * 16).tolist()


@pytest.mark.slow
def test_two_processes_test_as_one_does(pair):
    """Every test image once, and with one set of weights and of BN's running means."""
    run = pair / "run"
    _, by_one, _ = predictions_of(run)
    with np.load(run / "predictions.npz") as by_two:
        assert len(by_two["labels"]) == len(by_one) == 359  # in 12 batches, the last of 7
        assert by_two["labels"].tolist() == by_one.labels.tolist()
        assert np.abs(by_two["probabilities"] - by_one.probabilities).max() < 1e-5
    confusion = json.loads((run / "evaluation.json").read_text())["confusion"]
    counted = np.zeros((10, 10), int)
    np.add.at(counted, (by_one.labels, by_one.probabilities.argmax(axis=1)), 1)
    assert dense(confusion, 10).tolist() == counted.tolist()


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_they_go_on_to_the_same_end(pair, tmp_path):
    out = tmp_path / "run"
    stopped = in_two(tmp_path, *SETTINGS, "--out", out, SIGNAL="13")
    assert stopped.returncode != 0
    assert stopped.stderr.count("its state is saved") == 1
    step = int(re.search(r"stopped after step (\d+);", stopped.stderr)[1])
    assert 13 <= step <= 15  # by both after the same step, at most two later
    saved = torch.load(out / f"state/step-{step:09d}.pt", weights_only=True)
    assert saved["step"] == step
    resumed = in_two(tmp_path, *SETTINGS, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed after step {step} of 24" in resumed.stdout
    assert same_results(pair / "run", out)


@pytest.mark.slow
def test_one_process_goes_on_with_the_steps_of_two(pair, tmp_path):
    out = tmp_path / "run"
    assert in_two(tmp_path, *SETTINGS, "--out", out, SIGNAL="13").returncode != 0
    told = run(*SETTINGS, "--out", out, "--resume")
    assert "started with 2 processes, resumed with 1: accumulate=2" in told
    rows, whole = (
        list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        for folder in (out, pair / "run")
    )
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    # the same images a step; only the order of the sums, and BN's running means, differ
    for name in ("loss", "accuracy"):
        assert float(rows[-1][name]) == pytest.approx(float(whole[-1][name]), rel=1e-4)
    facts = json.loads((out / "run.json").read_text())["facts"]
    assert facts["processes"] == 1


# An evaluation takes half a minute, a second a batch; in its third batch the last process gets a
# signal. Each process tells when it was and when each batch ended.
EVALUATED = """
import os, signal, sys, time
from regard.cli import main
from regard.predict import Classifier

rank, told = os.environ.get("RANK", "0"), os.environ["TOLD"]
answers, times = Classifier.answers, []
def slowly(self, images):
    times.append(time.monotonic())
    if len(times) == 3 and rank == os.environ["LAST"]:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)
    with open(f"{told}/{rank}.txt", "w") as file:
        file.write(str(len(times)))
    return answers(self, images)
Classifier.answers = slowly
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_in_an_evaluation_is_acted_on_within_seconds(processes, tmp_path):
    (tmp_path / "driver.py").write_text(EVALUATED)
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    settings = [
        "train", "digits", *QUICK[:-4], "--val", "0.8", "--test", "0.1", "--batch-size", "8",
        "--steps", "2", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "TOLD": str(tmp_path), "LAST": str(processes - 1)}
    done = subprocess.run(
        [*start, str(tmp_path / "driver.py"), *settings], capture_output=True, text=True,
        env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode != 0
    assert "its state is saved" in done.stderr
    for rank in range(processes):  # of 44 batches of a second, by one process, or 22
        batches = int((tmp_path / f"{rank}.txt").read_text())
        assert 2 <= batches <= 3 + 4, (rank, batches)
    saved = torch.load(tmp_path / "run/state/step-000000002.pt", weights_only=True)
    assert saved["unscored"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_told_once(tmp_path):
    done = in_two(
        tmp_path, *SETTINGS[:-4], "--out", tmp_path / "run", "--schedule", "constant",
        "--lr", "1e30", "--eval-every", "1",
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "is not finite" in line]
    assert done.returncode != 0
    assert len(lines) == 1
    assert "the loss of step" in lines[0]
    assert "Connection closed by peer" not in done.stderr


# ------------------------------------------------------------------ two machines, no common disk
APART = """
import os, sys
import regard.training.run as r
from regard.cli import main
rank, step = r"{rank}", int(os.environ.get("FAULT", "0"))
after = r.Run._after_step
def faulty(self, trainer, loss):
    if rank == "1" and trainer.step == step:
        raise KeyError("a fault of rank 1")
    after(self, trainer, loss)
r.Run._after_step = faulty
main(sys.argv[1:])
"""


def apart(folders: list[Path], *arguments: object, **environment: str) -> list[tuple[int, str]]:
    """Two processes as two machines start them, each in its own folder: (exit code, output)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, folder in enumerate(folders):
        own = {
            **ENVIRONMENT, **environment, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        script = APART.replace("{rank}", str(rank))
        command = [sys.executable, "-c", script, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=own, **pipes))
    told = [process.communicate(timeout=400)[0] for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, told, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_only_the_first_machine_has_the_folder_the_recipe_and_the_weights(tmp_path, whole):
    """Whose run an error in the other one ends, told once, and --resume auto goes on with."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    shutil.copytree(whole, first / "weights")
    recipe = (whole / "recipe.toml").read_text()
    (first / "own.toml").write_text(re.sub(r"(?m)^(epochs|batch_size) = .*\n", "", recipe))
    settings = [
        "train", "digits", "--recipe", "own.toml", "--weights", "weights", "--out", "run",
        "--steps", "12", "--batch-size", "8", "--eval-every", "0.05", "--resume", "auto",
        "--log", "none",
    ]  # fmt: skip
    (code, told), (other, also) = apart([first, second], *settings, FAULT="6")
    assert (code, other) == (1, 70), (told, also)
    assert also.count("KeyError: 'a fault of rank 1'") == 1
    assert "bug in Regard" not in told
    assert "Traceback" not in told
    (code, told), (other, also) = apart([first, second], *settings)
    assert (code, other) == (0, 0), (told, also)
    assert "resumed after step" in told
    assert also == ""
    assert list(second.iterdir()) == []
    found = json.loads((first / "run/run.json").read_text())
    assert (found["status"], found["facts"]["processes"]) == ("finished", 2)
    assert (first / "run/report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_machine_has_the_same_images_and_names_itself_where_it_can_not_read_one(tmp_path):
    """The data's path leads each process to its own folder, as on machines without a common disk.

    Unless they were compared, the second one would train on other pictures, or the same ones in
    other classes, and the first one would test on its own.
    """
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        for name in ("a", "b"):
            (folder / "data" / name).mkdir(parents=True)
            for k in range(12):
                shade = (60 if name == "a" else 120) + k
                picture(folder / f"data/{name}/{k:02d}.png", shade)
    settings = [
        "train", "/proc/self/cwd/data", *QUICK, "--batch-size", "4", "--steps", "2",
        "--log", "none", "--max-unreadable", "0.1", "--out",
    ]  # fmt: skip
    (second / "data/b/05.png").unlink()
    (code, told), (other, also) = apart([first, second], *settings, "run")
    assert (code, other) == (0, 0), (told, also)
    (listed,) = rows_of(first / "run/unreadable.csv")
    assert listed["path"] == "/proc/self/cwd/data/b/05.png"
    assert f"(on {socket.gethostname()})" in listed["reason"]
    shutil.copy(second / "data/a/07.png", second / "data/b/07.png")
    (code, told), (other, also) = apart([first, second], *settings, "again")
    assert (code, other) == (1, 1), (told, also)
    assert (told + also).count("1 of 24 images that were compared are not the first machine's") == 1
    assert "data/b/07.png" in told + also
    assert not (first / "again").exists()


# ------------------------------------------------------------------ a group that the caller made
SPAWNED = """
import sys
import torch.distributed as dist, torch.multiprocessing as mp
import regard

def work(rank, out):
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    values = dict(
        model="ag_sononet8", size=16, limit=60, val=0.2, test=0.2, batch_size=4, steps=4,
        trackers=["none"], device="cpu", faithfulness_images=0, schedule="constant",
    )
    try:
        regard.train("digits", out=f"{out}/first", lr=1e30, **values)
    except regard.errors.NotFiniteError as error:
        print(f"{rank}: {error}", flush=True)
    regard.train("digits", out=f"{out}/second", lr=0.01, **values)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_a_group_that_the_caller_made_trains_as_one_and_again_after_an_error(tmp_path):
    (tmp_path / "script.py").write_text(SPAWNED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if "is not finite" in line]
    assert sorted(line[:2] for line in failed) == ["0:", "1:"]
    facts = json.loads((tmp_path / "second/run.json").read_text())["facts"]
    assert facts["processes"] == 2


# ----------------------------------------------------------------------- restarted by torchrun
# The first process comes late the second time: the other one could read its address of before.
KILLED = """
import os, signal, sys, time
import regard.training.run as r
from regard.cli import main
after = r.Run._after_step
def killed(self, trainer, loss):
    if place == "00" and trainer.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    after(self, trainer, loss)
r.Run._after_step = killed
place = os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"]
time.sleep(5 * (place == "01"))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_go_on(tmp_path):
    (tmp_path / "driver.py").write_text(KILLED)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "--max-restarts", "1", str(tmp_path / "driver.py"), "train", "digits", *QUICK,
        "--limit", "100", "--batch-size", "8", "--steps", "8", "--eval-every", "0.5",
        "--out", str(tmp_path / "run"), "--resume", "auto", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step 4 of 8" in done.stdout


# ---------------------------------------------------------------------------------- by itself
class Store:
    """The processes' store, in which another one may fail."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, _: str, more: int) -> int:
        self.failed += more
        return self.failed


@pytest.mark.parametrize("by_itself", [True, False])
def test_a_process_that_waits_for_one_that_failed_is_ended(by_itself, monkeypatch):
    store, ended = Store(), threading.Event()
    monkeypatch.setattr(distributed, "run_store", lambda: store)
    watch = distributed.Watch(ended.set, grace=1.5)
    assert not ended.wait(1.5)
    store.failed = 1
    if by_itself:
        watch.close()
    assert ended.wait(4) != by_itself


@pytest.mark.slow
def test_self_adaptive_targets_are_of_one_process(tmp_path):
    done = in_two(
        tmp_path / "driver", "train", "digits", "--model", "ag_sononet8", "--size", "32",
        "--self-adaptive", "0.9", "--steps", "2", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("self_adaptive: each of several processes") == 1
    assert not (tmp_path / "run").exists()


def test_other_ways_to_divide_a_network_are_refused_by_name(monkeypatch):
    for variable, way in distributed.OTHER_WAYS.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, "true")
            with pytest.raises(UsageError, match=way):
                distributed.start_accelerator()


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("", ["2", "2", "1"], "on machines with 1, 2 of them"),
        ("Regard", ["0.1.0", "0.2.0"], r"different versions of Regard \(0\.1\.0, 0\.2\.0\)"),
        ("torch", ["2.14.1", "2.13.0", "2.14.1"], r"of torch \(2\.13\.0, 2\.14\.1\)"),
    ],
)
def test_machines_have_as_many_processes_each_and_one_version(monkeypatch, name, values, named):
    own = {}

    def gathered(_, mine):
        own.update(mine)
        return [{**mine, name: value} for value in values]

    monkeypatch.setattr(distributed, "gathered", gathered)
    with pytest.raises(UsageError, match=named):
        distributed.start_accelerator("cpu")
    versions = {
        name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "timm")
    }
    assert {name: own[name] for name in versions} == versions
    assert own["Regard"] == importlib.metadata.version("regard")


def test_the_others_wait_for_what_the_first_prepares(monkeypatch):
    """NCCL's own limit of 10 minutes is less than ImageNet's hashes take."""
    given = {}
    monkeypatch.setattr(distributed, "Accelerator", lambda **kwargs: given.update(kwargs))
    monkeypatch.setattr(distributed, "gathered", lambda _, mine: [mine])
    distributed.start_accelerator("cpu")
    (handler,) = given["kwargs_handlers"]
    assert handler.to_kwargs() == {"timeout": distributed.LONGEST_EXCHANGE}


def asked(world: int, stop: int = 0, **values) -> SimpleNamespace:
    """A run whose processes agree to save after each step."""
    requests = SimpleNamespace(agree=lambda stop, save, now: (stop, True))
    saves = []
    return SimpleNamespace(
        world=world, signals=SimpleNamespace(stop=stop, save=False), requests=requests,
        saved_at=0.0, saved_after=-1, unscored=False, saves=saves,
        plan=SimpleNamespace(recipe=SimpleNamespace(save_minutes=1)),
        display=SimpleNamespace(step=lambda _: None), **values,
    )  # fmt: skip


@pytest.mark.parametrize(("world", "steps"), [(1, [1, 2, 3, 4]), (2, [1, 3])])
def test_what_is_asked_again_before_it_was_heard_is_done_once(world, steps):
    run = asked(world)
    for step in (1, 2, 3, 4):
        trainer = SimpleNamespace(step=step, total=9, epoch_ends=lambda _: False)

        def save(step=step):
            run.saves.append(step)
            run.saved_after = step

        run._save = save
        Run._after_step(run, trainer, 0.0)
    assert run.saves == steps


def test_a_step_of_several_processes_gets_some_seconds_to_begin(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("regard.training.signals.time.monotonic", lambda: now[0])
    for several, overdue in ((False, [True, True]), (True, [False, True])):
        requests = SimpleNamespace(several=several, heard=lambda number: number)
        signals = Signals()
        signals.stop = signal.SIGINT
        stop, found = Stop(signals, requests), []
        for now[0] in (100.0, 111.0):
            found.append(stop.overdue())
        assert found == overdue


def test_what_says_that_a_process_is_gone():
    for text in ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
                 "NCCL error: remote process exited"):  # fmt: skip
        assert distributed.lost_process(RuntimeError(text))
    assert distributed.lost_process(torch.distributed.DistNetworkError("timeout"))
    assert not distributed.lost_process(RuntimeError("shapes differ"))
    assert not distributed.lost_process(RuntimeError("NCCL error: Duplicate GPU detected"))
    assert not distributed.lost_process(ValueError("Connection closed by peer"))
