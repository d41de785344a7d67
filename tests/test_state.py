"""States and the files of a run: whole or not there, whatever is killed or full, and when."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regard.errors import StateError
from regard.evaluation import Predictions
from regard.files import check_space, write_atomically
from regard.runs import RunFolder, write_predictions
from regard.training.checkpoint import Checkpoints
from tests.helpers import ENVIRONMENT, QUICK, rows_of, same_results


def content(step: int, size: int = 10) -> dict:
    return {"step": step, "weights": torch.full((size,), float(step)), "history": [{"loss": 0.5}]}


# -------------------------------------------------------------------------------- states
def test_the_newest_two_states_are_kept(tmp_path):
    states = Checkpoints(tmp_path / "state")
    assert states.load() == (None, [])
    for step in (7, 900, 1000, 1_000_001):
        states.save(step, content(step))
    assert [p.name for p in sorted((tmp_path / "state").iterdir())] == [
        "step-000001000.pt", "step-001000001.pt",
    ]  # fmt: skip
    state, broken = states.load()
    assert state is not None
    assert (state["step"], state["history"], broken) == (1_000_001, [{"loss": 0.5}], [])
    assert torch.equal(state["weights"], content(1_000_001)["weights"])
    states.clear()
    assert states.load() == (None, [])


@pytest.mark.parametrize("harm", ["empty", "garbage", "text", "pickle", "half", "tail", "middle"])
def test_a_harmed_state_gives_way_to_the_one_before(tmp_path, harm):
    states = Checkpoints(tmp_path)
    states.save(1, content(1, 5000))
    states.save(2, content(2, 5000))
    newest = tmp_path / "step-000000002.pt"
    whole = newest.read_bytes()
    harmed = {
        "empty": b"", "garbage": bytes(range(256)) * 9, "text": b"404: Not Found",
        "pickle": b"cos\nsystem\n(S'touch harmed'\ntR.", "half": whole[: len(whole) // 2],
        "tail": whole[:-1], "middle": whole[:8000] + bytes(4000) + whole[12_000:],
    }[harm]  # fmt: skip
    newest.write_bytes(harmed)
    (tmp_path / ".step-000000003.pt.writing").write_bytes(b"never ended")
    state, broken = states.load()
    assert state is not None
    assert state["step"] == 1
    (line,) = broken
    assert str(newest) in line
    assert "\n" not in line
    (tmp_path / "step-000000001.pt").write_bytes(harmed)
    with pytest.raises(StateError, match=r"step-000000001\.pt can't be read") as told:
        states.load()
    assert "\n" not in str(told.value)
    assert not Path("harmed").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file/run", Path("/proc/regard")):
        with pytest.raises(StateError, match=f"^{folder} can't be written"):
            check_space(folder, 1)
    with pytest.raises(StateError, match="MB are free, and the run needs about 1,000,000,000,000"):
        check_space(tmp_path / "run", 10**18)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(StateError, match=r"state/step-000000001.pt can't be written \(Not a dir"):
        write_atomically(tmp_path / "file/state/step-000000001.pt", lambda p: p.write_text("x"))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_harms_no_file_that_was_there(tiny_disk):
    for name in ("metrics.csv", "best-000000001.safetensors"):
        (tiny_disk / name).write_text("whole")
    states = Checkpoints(tiny_disk / "state")
    states.save(1, content(1, 50_000))
    with pytest.raises(
        StateError, match=r"state can't be saved: .*step-000000002.pt can't be written \(No space"
    ) as e:
        states.save(2, content(2, 500_000))
    assert "\n" not in str(e.value)
    state, broken = states.load()
    assert state is not None
    assert (state["step"], broken) == (1, [])
    assert [p.name for p in (tiny_disk / "state").iterdir()] == ["step-000000001.pt"]
    folder = RunFolder(tiny_disk)
    big = torch.nn.Linear(1000, 1000)
    with pytest.raises(
        StateError, match=r"disk/best-.*1.safetensors can't be written \(.*[Nn]o space"
    ):
        folder.write_best(big, 1)
    with pytest.raises(StateError, match=r"disk/metrics.csv can't be written \(No space left"):
        folder.write_metrics([{"loss": float(k)} for k in range(200_000)])
    assert sorted(p.name for p in tiny_disk.iterdir()) == [
        "best-000000001.safetensors", "metrics.csv", "state",
    ]  # fmt: skip
    assert (tiny_disk / "metrics.csv").read_text() == "whole"


# --------------------------------------------------------------- killed at every rename
# Every file of a run gets its name by os.replace. For n = 1, 2, ... a forked process trains
# and is killed as it is about to rename its n-th file; the same command then goes on to the end.
DRIVER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import regard.training.run, regard.report.build, torch.utils.tensorboard
from regard.cli import run_command

folder, arguments = Path(sys.argv[1]), sys.argv[2:]
replace = os.replace

def trained(out, kill_at):
    child = os.fork()
    if child == 0:
        count = 0
        def counted(a, b):
            nonlocal count
            count += str(out) in str(b)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(a, b)
        os.replace = counted
        resume = ["--resume"] if (out / "run.json").exists() else []
        os._exit(run_command([*arguments, "--out", str(out), *resume]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert trained(folder / "whole", 0) == 0
kills = 0
while True:
    out = folder / f"killed-{kills + 1}"
    code = trained(out, kills + 1)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    kills += 1
    code = trained(out, 0)
    assert code == 0, (kills, code)
print("kills", kills)
"""


@pytest.fixture(scope="module")
def killed(scans, tmp_path_factory) -> tuple[Path, int]:
    """The folder of `whole` and `killed-1`, `killed-2` ..., and how many."""
    folder = tmp_path_factory.mktemp("renames")
    arguments = ["train", scans, *QUICK, "--batch-size", "36", "--epochs", "2"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), *map(str, arguments), "--save-minutes", "0"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder, int(done.stdout.split()[-1])


@pytest.mark.slow
def test_killed_at_any_rename_it_ends_as_if_undisturbed(killed):
    folder, count = killed
    # run.json 3, recipe, splits, 6 states, 2 metrics, best, network 2, evaluation 2, report
    assert count >= 18
    names = {p.name for p in (folder / "whole").iterdir()}
    for k in range(1, count + 1):
        out = folder / f"killed-{k}"
        assert same_results(folder / "whole", out), k
        assert {p.name for p in out.iterdir() if p.suffix not in (".writing", ".part")} == names, k
        assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_tensorboard_shows_every_epoch_of_a_resumed_run_once(killed):
    folder, count = killed
    steps = [int(float(r["step"])) for r in rows_of(folder / "whole/metrics.csv")]
    assert len(steps) == 2
    for k in range(1, count + 1):
        events = EventAccumulator(str(folder / f"killed-{k}/tensorboard"))
        events.Reload()
        assert [e.step for e in events.Scalars("loss")] == steps, k


@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "text", "less"])
def test_damaged_predictions_are_named_and_computed_again_where_they_can_be(tmp_path, harm):
    import numpy as np

    path, said = tmp_path / "predictions.npz", Predictions(np.eye(3), np.arange(3), ["a", "b", "c"])
    write_predictions(path, "val", replace(said, paths=["x", "y", "z"]))
    folder, whole = RunFolder(tmp_path), path.read_bytes()
    assert len(folder.read_validation().labels) == 3
    if harm == "less":
        np.savez(path, split="val")
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"no"}[harm])
    with pytest.raises(StateError, match=r"predictions\.npz"):
        folder.read_predictions()
    assert folder.read_validation() is None
