"""How a run's network is wrapped for several processes, and what no variable changes."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from regard.compat import without_buffer_exchange
from regard.errors import UsageError
from regard.training import loop
from regard.training.compile import _obstacle, choose_compiled
from regard.training.run_plan import accumulation_now
from tests.helpers import ENVIRONMENT, same_results, settings
from tests.test_loop import first_step, trainer_of


class Parallel(nn.Module):
    """In place of DistributedDataParallel: what it was made with, and how often it is silent."""

    def __init__(self, module, **arguments) -> None:
        super().__init__()
        self.module, self.arguments, self.silent = module, arguments, 0

    def forward(self, x):
        return self.module(x)

    def no_sync(self):
        self.silent += 1
        return contextlib.nullcontext()


def test_the_compiled_network_is_inside_of_ddp_and_ddp_exchanges_once_a_step(monkeypatch):
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    monkeypatch.setattr(loop, "reduce", lambda value, _: value * 2)
    trainer = trainer_of(batch_size=4, accumulate=3)
    trainer.compiled = nn.Sequential(trainer.model)
    trainer.accelerator = SimpleNamespace(
        num_processes=2, process_index=0, device=torch.device("cpu"), is_main_process=True
    )
    trainer._prepare()
    parallel = trainer._parallel
    assert parallel is trainer._forward
    assert parallel.module is trainer.compiled
    assert parallel.arguments == {
        "device_ids": None, "gradient_as_bucket_view": True, **without_buffer_exchange(),
    }  # fmt: skip
    assert False in without_buffer_exchange().values()
    first_step(trainer)
    assert parallel.silent == 2  # of three batches the last exchanges


@pytest.mark.parametrize(("before", "now", "parts", "expected"), [
    (2, 1, 1, 2), (1, 2, 4, 2), (4, 8, 2, 1), (3, 2, 2, 3),
])  # fmt: skip
def test_another_number_of_processes_shares_a_step_as_it_was(before, now, parts, expected):
    assert accumulation_now(parts, before, now) == expected


def test_processes_that_can_not_share_a_steps_batches_are_refused():
    with pytest.raises(UsageError, match="3"):
        accumulation_now(1, 2, 3)


@pytest.mark.slow
def test_accelerates_variables_change_no_number(whole, scans, tmp_path):
    variables = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    }  # fmt: skip
    command = [sys.executable, "-m", "regard", *map(str, settings(scans, tmp_path / "run"))]
    subprocess.run(
        command, env={**ENVIRONMENT, **variables, "REGARD_DEVICE": "cpu"}, check=True, timeout=280
    )
    assert same_results(whole, tmp_path / "run")
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


# ---------------------------------------------------------------------------- CUDA graphs
class Recorder:
    """Stands for `Graphed`: calls the network, and counts."""

    def __init__(self) -> None:
        self.shapes = []

    def __call__(self, model, images, autocast):
        self.shapes.append(tuple(images.shape))
        with autocast():
            assert not torch.is_autocast_cache_enabled() or not torch.is_autocast_enabled("cpu")
        return lambda x: model(x)


def test_graphs_are_recorded_on_cuda_alone_in_one_process_and_one_pass():
    recorder = Recorder()
    with pytest.raises(UsageError, match="compile=graphs: CUDA graphs need CUDA"):
        choose_compiled(trainer_of(compile="graphs"), recorder=recorder)
    for obstacle, changes in (
        ("accumulate", {"batch_size": 6, "accumulate": 2}),
        ("grad_checkpointing", {"grad_checkpointing": True}),
    ):
        assert obstacle in _obstacle(on_cuda(trainer_of(compile="graphs", **changes)))
    trainer = on_cuda(trainer_of(compile="graphs"))
    assert _obstacle(trainer) == ""
    trainer.accelerator = SimpleNamespace(num_processes=2)
    assert "one process" in _obstacle(trainer)
    assert not recorder.shapes


def on_cuda(trainer):
    trainer.device = torch.device("cuda")
    return trainer


def test_graphs_train_what_they_replaced(monkeypatch):
    monkeypatch.setattr("regard.training.compile._obstacle", lambda trainer: "")
    recorder, found = Recorder(), []
    for compiled in ("graphs", "no"):
        trainer = trainer_of(compile=compiled)
        assert choose_compiled(trainer, recorder=recorder) == compiled
        first_step(trainer)
        found.append([p.clone() for p in trainer.model.parameters()])
    assert len(recorder.shapes) == 1
    assert all(map(torch.equal, *found))


def test_auto_takes_graphs_where_they_are_faster(monkeypatch):
    monkeypatch.setattr("regard.training.compile._obstacle", lambda trainer: "")
    for seconds, expected in ((0.001, "graphs"), (0.1, "no")):

        def timed(timer, forward, seconds=seconds):
            return 0.01 if forward is timer.trainer.model else seconds

        monkeypatch.setattr("regard.training.compile._Timer.seconds", timed)
        trainer = trainer_of(compile="auto", steps=20)
        assert choose_compiled(trainer, recorder=Recorder()) == expected
        assert (trainer.compiled is None) == (expected == "no")


def test_graphs_that_can_not_be_recorded_end_a_run_that_asked_for_them(monkeypatch):
    monkeypatch.setattr("regard.training.compile._obstacle", lambda trainer: "")

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(UsageError, match="compile=graphs: the network can't be recorded"):
        choose_compiled(trainer_of(compile="graphs"), recorder=fails)
    trainer = trainer_of(compile="auto", steps=2)
    assert choose_compiled(trainer, recorder=fails) == "no"
    assert trainer.compiled is None
