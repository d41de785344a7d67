"""The device: one flag with one meaning, and what devices without float64 or bf16 need."""

import importlib
import inspect

import pytest
import torch

from regard import machine
from regard.cli import run_command
from regard.commands.train import train
from regard.errors import UsageError
from regard.machine import choose_device, most_precise
from regard.predict import load
from tests.helpers import same_results

COMMANDS = (
    "train",
    "predict",
    "evaluate",
    "explain",
    "report",
    "serve",
    "export",
    "bench",
    "study",
)


def test_every_command_that_runs_a_network_has_the_flag_with_the_same_choices():
    flags = {
        name: inspect.signature(
            importlib.import_module(f"regard.commands.{name}").command
        ).parameters["device"]
        for name in COMMANDS
    }
    assert {flag.default for flag in flags.values()} == {"auto"}
    assert len({id(flag.annotation) for flag in flags.values()}) == 1


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_a_device_that_is_not_there_is_one_line(name, whole, monkeypatch, capsys):
    module = torch.get_device_module(name)
    monkeypatch.setattr(module, "is_available", lambda: False)
    for call in (["predict", whole, "x.png"], ["evaluate", whole], ["report", whole],
                 ["train", "digits"], ["bench", "ag_sononet8"]):  # fmt: skip
        assert run_command([*map(str, call), "--device", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert name in line
        assert "cpu" in line


def test_auto_is_the_variables_then_the_accelerator_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "cpu"  # the tests' own variable
    monkeypatch.setenv(machine.VARIABLE, "gpu")
    with pytest.raises(UsageError, match="REGARD_DEVICE"):
        choose_device()
    monkeypatch.delenv(machine.VARIABLE)
    assert choose_device("auto").type == "mps"
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UsageError, match="tpu"):
        choose_device("tpu")


def test_float32_is_float32_unless_tf32_is_named():
    machine.allow_tf32(True)
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_network_goes_to_the_device_that_was_asked_for(whole, monkeypatch):
    monkeypatch.setattr("regard.predict.choose_device", lambda name: torch.device("meta"))
    assert next(load(whole, "mps").model.parameters()).device.type == "meta"


def test_a_run_on_the_cpu_is_the_same_whoever_chose_it(scans, whole, tmp_path):
    out = train(
        scans, model="ag_sononet8", size=16, flip=0.0, val=0.2, test=0.2, batch_size=16, epochs=6,
        faithfulness_images=0, out=tmp_path / "run", device="cpu",
    )  # fmt: skip
    assert same_results(whole, out)


# ------------------------------------------------------------------------------ MPS and XPU
@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_bf16_is_asked_of_the_device_and_not_of_the_cpu_beside_it(kind, monkeypatch):
    monkeypatch.setattr(machine, "cpu_has_bf16", lambda: True)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_bf16_supported", lambda including_emulation=True: False)
    assert not machine.has_bf16(torch.device(kind))
    assert machine.has_bf16(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_every_kind_of_device_is_seeded_and_waited_for(kind, monkeypatch):
    called = []
    monkeypatch.setattr(torch.get_device_module(kind), "manual_seed", called.append)
    monkeypatch.setattr(torch.accelerator, "synchronize", called.append)
    machine.seed_device(torch.device(kind), 7)
    machine.synchronize(torch.device(kind))
    assert called == [7, torch.device(kind)]
    assert torch.default_generator.initial_seed() == 7
    machine.synchronize(torch.device("cpu"))
    assert len(called) == 2


def test_batch_norm_is_synchronized_on_gpus_only():
    import regard
    from regard.training.build import with_synchronized_norms

    model = regard.create_model("cbam_resnet18", num_classes=3)
    norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(UsageError, match="sync_bn"):
        with_synchronized_norms(model, torch.device("cpu"))
    synchronized = with_synchronized_norms(model, torch.device("cuda"))
    found = [m for m in synchronized.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(found) == norms > 20
    assert synchronized.state_dict().keys() == model.state_dict().keys()


def test_cores_are_divided_among_the_processes_of_a_machine(monkeypatch):
    from regard.data.workers import default_workers

    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert default_workers() == 8
    for processes, workers in ((8, 4), (2, 8), (64, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert default_workers() == workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for share, workers in (("6", 3), ("1", 1), ("100", 8), ("no number", 8)):
        monkeypatch.setenv("REGARD_CORES", share)
        assert default_workers() == workers


def test_shared_memory_is_divided_among_the_processes_of_a_machine(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from regard.data import workers

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: SimpleNamespace(free=64e6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.shared_memory_free() == 16e6


def test_counts_are_in_float64_where_the_device_has_it(monkeypatch):
    assert most_precise(torch.device("cpu")) == most_precise(torch.device("cuda")) == torch.float64
    assert most_precise(torch.device("mps")) == torch.float32
    for has, dtype in ((True, torch.float64), (False, torch.float32)):
        monkeypatch.setattr(
            torch.xpu, "get_device_capability", lambda _, has=has: {"has_fp64": has}
        )
        assert most_precise(torch.device("xpu")) == dtype
