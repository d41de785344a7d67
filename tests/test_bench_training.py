"""regard bench --train: what is measured, compared and printed; real steps, times that are set."""

import itertools
import json

import pytest
import torch

from regard.cli import run_command
from regard.engines.bench import noise
from regard.errors import UsageError
from regard.models.create import make
from regard.training import bench
from regard.training.bench import Case, TrainTiming, over_plain, trainable
from regard.training.config import Recipe

FLAGS = ["--train", "--size", "32", "--rounds", "2", "--precision", "fp32"]
CPU = torch.device("cpu")


def test_the_command_prints_every_network_with_its_ratio_to_the_plain_twin(capsys, monkeypatch):
    seconds = iter([[0.2, 0.2], [0.25, 0.25]] * 2)
    done = []

    def rounds(steps, *_):
        done.extend(steps)
        return [next(seconds) for _ in steps]

    monkeypatch.setattr("regard.engines.bench.time_in_rounds", rounds)
    networks = ["resnet18", "cbam_resnet18", "--engine", "eager", "--batch-size", "4"]
    assert run_command(["bench", *networks, *FLAGS]) == 0
    assert len(done) == 2  # both networks in the same rounds
    plain, gated = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert plain[:6] == ["resnet18", "eager", "fp32", "200.0", "200.0-200.0", "20.0"]
    assert gated[:7] == ["cbam_resnet18", "eager", "fp32", "250.0", "250.0-250.0", "16.0", "0.80"]
    memory = float(gated[7])
    assert 0.13 < memory < 2  # 11.3 million weights, gradients and momenta take 0.136 GB
    assert run_command(["bench", *networks, *FLAGS, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (result,) = content["results"]
    assert [e["network"] for e in result["engines"]] == ["resnet18", "cbam_resnet18"]
    assert (result["batch"], result["recipe"], result["optimizer"]) == (4, "quick", "sgd")


def test_a_step_is_the_recipes_and_moves_weights_and_average():
    torch.manual_seed(0)
    recipe = Recipe(lr=0.05, clip_grad=1.0, ema_decay=0.5, schedule="constant", momentum=0.0)
    model = make("ag_sononet8", {}).train()
    before = {k: v.clone() for k, v in model.named_parameters()}
    case = Case(
        model, TrainTiming("eager", "fp32"), noise(2, (1, 64, 64)) / 255, torch.tensor([0, 1]),
        recipe,
    )  # fmt: skip
    case.step()
    moved = [(p - before[k]).norm() for k, p in model.named_parameters()]
    assert torch.stack(moved).norm().item() == pytest.approx(0.05, rel=0.02)  # lr times the norm
    averaged = dict(case.updater.ema.module.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(averaged[name], (p + before[name]) / 2)


def test_a_case_that_fails_is_one_line_and_the_others_go_on(capsys, monkeypatch):
    def broken(model, **_):
        raise RuntimeError("no such\ncompiler")

    monkeypatch.setattr(torch, "compile", broken)
    assert run_command(["bench", "ag_sononet8", *FLAGS, "--batch-size", "2"]) == 1
    out, err = capsys.readouterr()
    assert "regard: ag_sononet8, compiled, fp32: no such compiler" in err.splitlines()
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["network", "ag_sononet8"]


def test_a_case_that_fails_in_a_round_leaves_the_others(capsys, monkeypatch):
    """Networks that each fit into the memory may not when they train in turn."""
    step, count = Case.step, itertools.count(1)

    def fails(case):
        if case.timing.network == "sononet8" and next(count) > 4:  # in the first round
            raise torch.OutOfMemoryError("out of\nmemory")
        step(case)

    monkeypatch.setattr(Case, "step", fails)
    networks = ["sononet8", "ag_sononet8", "--engine", "eager", "--batch-size", "2"]
    assert run_command(["bench", *networks, *FLAGS]) == 1
    out, err = capsys.readouterr()
    assert "regard: sononet8, eager, fp32: out of memory" in err.splitlines()
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["network", "ag_sononet8"]


@pytest.mark.parametrize("more", [[], ["--train"]])
def test_a_wrong_name_among_several_ends_before_anything_is_measured(capsys, monkeypatch, more):
    monkeypatch.setattr(bench, "_prepared", pytest.fail)
    monkeypatch.setattr("regard.engines.bench.bench", pytest.fail)
    names = ["bench", "sononet8", "sononet9", "--size", "32", "--precision", "fp32"]
    assert run_command([*names, "--engine", "eager", *more]) == 2
    assert "no network is called 'sononet9'" in capsys.readouterr().err


def test_with_muon_gates_are_left_to_adamw_as_in_a_training(monkeypatch):
    measured = []

    def prepared(model, preprocess, timing, recipe, *_):
        measured.append(recipe)
        timing.fault = "not measured"

    monkeypatch.setattr(bench, "_prepared", prepared)
    flags = ["--recipe", "fast-folder", "--engine", "eager"]
    assert run_command(["bench", "sononet8", *FLAGS, *flags]) == 1
    assert [(r.optimizer, r.gate_lr_scale) for r in measured] == [("muon", 0.01)]


def test_what_trains_is_what_the_device_computes_in(monkeypatch):
    monkeypatch.setattr(bench, "has_bf16", lambda device: device.type == "cuda")
    assert trainable(["eager"], ["auto"], CPU) == [("eager", "fp32")]
    gpu = torch.device("cuda")
    assert trainable(["eager", "compiled"], ["auto"], gpu) == [
        (engine, p) for engine in ("eager", "compiled") for p in ("fp32", "bf16")
    ]
    assert trainable(["eager"], ["fp16", "tf32"], gpu) == [("eager", "tf32"), ("eager", "fp16")]
    for precision in ("bf16", "tf32", "fp16", "int8"):
        with pytest.raises(UsageError, match=precision):
            trainable(["eager"], [precision], CPU)
    with pytest.raises(UsageError, match="openvino"):
        trainable(["eager", "openvino"], ["auto"], CPU)


def test_the_plain_twin_is_of_the_same_engine_and_precision():
    def timed(network, seconds, engine="eager", precision="fp32"):
        return TrainTiming(engine, precision, [seconds], network=network)

    gated, plain = timed("ag_sononet8", 4.0), timed("sononet8", 3.0)
    other = timed("sononet8", 1.0, precision="bf16")
    assert over_plain(gated, [gated, other, plain]) == 0.75
    assert over_plain(plain, [gated, plain]) is None
    assert over_plain(gated, [gated, other]) is None
    assert over_plain(timed("no_twin", 1.0), [plain]) is None
