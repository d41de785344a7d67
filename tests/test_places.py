"""Which of how many processes this is: what the environment says, and what is left in it."""

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from regard.cli import run_command
from regard.errors import FileError, NotFiniteError, Stopped, StudyStopped, UsageError
from regard.training import distributed, run
from regard.training.places import VARIABLES, agreed_attempt, checked_places


@pytest.fixture
def place(monkeypatch):
    """Sets variables of an environment that says nothing of several processes."""
    for name, others in VARIABLES.items():
        for variable in (name, *others):
            monkeypatch.delenv(variable, raising=False)
    for variable in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)

    def set_to(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "x", "LOCAL_RANK": "0"}, "RANK=x"),
        ({"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK=3"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "=8"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT=x"),
    ],
)
def test_variables_that_can_not_be_right_are_named(place, variables, named):
    place(**variables)
    with pytest.raises(UsageError, match=named):
        distributed.start_accelerator("cpu")


@pytest.mark.parametrize(
    ("tasks", "task", "world", "said"),
    [("8", "0", "1", True), ("8", "3", "1", False), ("1", "0", "1", False), ("8", "0", "2", False)],
)
def test_tasks_that_each_train_alone_are_told_once(place, caplog, tasks, task, world, said):
    place(SLURM_STEP_NUM_TASKS=tasks, SLURM_PROCID=task, WORLD_SIZE=world, MASTER_ADDR="localhost")
    if world == "1":
        os.environ.pop("MASTER_ADDR")
    with checked_places("cpu"):
        assert ("8 tasks" in caplog.text) == said


def test_what_another_program_left_is_hidden_from_accelerate_and_put_back(place):
    left = {
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "WORLD_SIZE": "1",
        "ACCELERATE_TORCH_DEVICE": "cuda",
    }  # fmt: skip
    place(**left)
    with checked_places("cpu"):
        assert not left.keys() & os.environ.keys()
    assert {name: os.environ[name] for name in left} == left


# --------------------------------------------------------------------------------- commands
@pytest.mark.parametrize(("local", "lines"), [("0", 1), ("1", 0)])
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "RUN"], ["report", "RUN"], ["study", "cbam-cifar", "digits"],
        ["train", "digits", "--no-such-flag"], ["train", "digits", "--lr", "-1"],
        ["train", "digits", "--device", "cuda"],
    ],
)  # fmt: skip
def test_a_wrong_call_of_several_processes_is_told_by_one(place, words, local, lines, capsys):
    place(TORCHELASTIC_RUN_ID="none", WORLD_SIZE="2", RANK=local, LOCAL_RANK=local)
    assert run_command(words) == 2
    assert capsys.readouterr().err.count("regard: ") == lines


def test_torchrun_leaves_the_flag_for_trackers_to_regard(place, capsys):
    from torch.distributed.run import parse_args

    words = ["train", "no such folder", "--trackers", "none"]
    parsed = parse_args(["--standalone", "-m", "regard", *words])
    assert parsed.training_script_args == words
    assert run_command(words) == 2
    assert "no such folder or file" in capsys.readouterr().err


# ----------------------------------------------------------- several runs of the same processes
@pytest.fixture
def store(monkeypatch):
    """A group's store, without a group."""
    made = torch.distributed.HashStore()
    monkeypatch.setattr(distributed, "default_store", lambda: made)
    monkeypatch.setattr(distributed, "_runs", distributed._runs)
    return made


def test_an_error_and_a_stop_of_one_run_are_none_of_the_next(store, place, monkeypatch):
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: SimpleNamespace())
    monkeypatch.setattr(distributed, "gathered", lambda _, mine: [mine])
    place()

    def requests() -> distributed.Requests:
        return distributed.Requests(SimpleNamespace(num_processes=2))

    distributed.start_accelerator("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        assert distributed.is_first_to_tell(ValueError())
        assert not distributed.is_first_to_tell(ValueError())
    assert requests().heard(15) == 15
    assert requests().heard(0, at_once=True) == 15
    distributed.start_accelerator("cpu")
    assert distributed.run_store().add(distributed.FAILED, 0) == 0
    assert requests().heard(0, at_once=True) == 0


@pytest.mark.parametrize("heard", [0, 15])
def test_who_did_not_get_the_signal_names_it_and_the_state_too(heard):
    """In an evaluation that a resumed run does again, before any step."""
    stopped = SimpleNamespace(
        world=2, signals=SimpleNamespace(stop=15 - heard), saved_after=7,
        requests=SimpleNamespace(heard=lambda stop, at_once: stop or heard),
    )  # fmt: skip
    with pytest.raises(Stopped) as raised:
        run.Run._stop_while_waiting(stopped)
    assert (raised.value.step, raised.value.exit_code) == (7, 143)


def test_a_process_that_is_lost_before_the_run_is_opened_is_told(monkeypatch):
    cpu = torch.device("cpu")
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, device=cpu)
    text = "[/gloo/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:29107. See the logs. GL!"

    def lost(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(run, "start_accelerator", lambda _: accelerator)
    monkeypatch.setattr(run, "Watch", lambda: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(run, "on_main", lambda _, work: work())
    monkeypatch.setattr(run, "open_run", lost)
    with pytest.raises(FileError, match=r"\(Connection closed by peer \[127.0.0.1\]:29107\)"):
        run.train("digits")


@pytest.mark.parametrize(
    "error", [NotFiniteError(3, 0.1, [5, 8], "a weight"), Stopped(4, 15), StudyStopped(1, 6, 2)]
)
def test_errors_reach_another_process_whole(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


# --------------------------------------------------------------------------------- restarts
def test_processes_that_are_started_again_meet_those_of_their_own_attempt():
    """Of an earlier one the store still has the name; its first process has ended."""
    store = torch.distributed.HashStore()

    def attempt() -> set[str]:
        with ThreadPoolExecutor(3) as pool:
            # the first process comes last, when the others have read the name of before
            late = [pool.submit(agreed_attempt, store, rank, 3, 20) for rank in (1, 2)]
            time.sleep(0.3)
            return {agreed_attempt(store, 0, 3, 20), *(each.result() for each in late)}

    first, second = attempt(), attempt()
    assert len(first) == len(second) == 1
    assert first != second
    with pytest.raises(torch.distributed.DistStoreError):
        agreed_attempt(store, 0, 3, 0.2)  # killed before the others came
    third = attempt()
    assert len(third) == 1
    assert not third & (first | second)
