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
def test_graphs_are_asked_of_the_compiler_on_cuda_alone(monkeypatch):
    from regard.training.compile import choose_compiled

    asked, begun = [], []

    def compiler(model, **arguments):
        asked.append(arguments)
        return model

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    trainer = trainer_of(compile="graphs")
    with pytest.raises(UsageError, match="compile=graphs"):
        choose_compiled(trainer, compiler=compiler)
    trainer.device = torch.device("cuda")
    with monkeypatch.context() as patch:
        patch.setattr("regard.training.compile._Timer.seconds", lambda *_: 1.0)
        assert choose_compiled(trainer, compiler=compiler)
        assert asked == [{"mode": "reduce-overhead"}]
        more = trainer_of(compile="graphs", batch_size=6, accumulate=2)
        more.device = torch.device("cuda")
        with pytest.raises(UsageError, match="accumulate"):
            choose_compiled(more, compiler=compiler)
        for want in ("yes", "auto"):
            asked.clear()
            choose_compiled(trainer_of(compile=want, steps=1000), compiler=compiler)
            assert asked == [{}]
    trainer.device = torch.device("cpu")
    first_step(trainer)
    assert len(begun) == 1
    first_step(trainer_of())
    assert len(begun) == 1
