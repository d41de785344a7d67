"""What a run decides by measuring, and that measuring leaves no trace in it."""

import contextlib
import dataclasses
import json
import math
import pickle
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

import regard
import regard.training.memory as memory
import regard.training.plan as choices
import regard.training.run as run_module
from regard.commands.train import train
from regard.data.loading import InMemoryLoader, Reader, SampleOrder
from regard.data.preprocess import Preprocess
from regard.data.sources import open_data
from regard.errors import Stopped, UsageError
from regard.machine import free_memory
from regard.training.activation_checkpointing import set_checkpointing
from regard.training.compile import choose_compiled
from regard.training.config import Recipe
from regard.training.graphs import Graphed
from regard.training.loop import Trainer
from regard.training.memory import fit_memory
from regard.training.trial import first_batches
from tests.helpers import messages, same_network


def trainer_of(model: nn.Module, side: int = 16, bf16: bool = False, **recipe) -> Trainer:
    """Ready to train the network on 60 of the digits."""
    table = open_data("digits").select(np.arange(60))
    chosen = Recipe(**{"batch_size": 12, "steps": 890, "flip": 0.0, **recipe})
    preprocess = Preprocess((1, side, side), (0.5,), (0.25,))
    reader = Reader(table, preprocess, chosen)
    images = torch.stack([preprocess.fit(reader.decode(i)) for i in range(60)])
    return Trainer(
        model=model.train(), recipe=chosen, preprocess=preprocess,
        source=InMemoryLoader(reader, SampleOrder(60, 0), 0, images),
        labels=torch.from_numpy(table.labels),
        classes=10, count=60, total=chosen.steps, accelerator=Accelerator(cpu=True),
        precision="bf16" if bf16 else "fp32",
    )  # fmt: skip


def tiny() -> nn.Module:
    """A convolution, BN, dropout and a classifier."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip


# ------------------------------------------------------------------ gradient checkpointing
def gradients(name: str, side: int, bf16: bool, checkpointing: bool, backend: str | None = None):
    """Gradients and BN's statistics after two batches of a step."""
    torch.manual_seed(1)
    narrow = {"channels": (16, 16, 32, 32)} if name == "cbam_resnet18" else {}
    model = regard.create_model(name, num_classes=10, in_chans=1, **narrow)
    if checkpointing:
        set_checkpointing(model, name)
    trainer = trainer_of(model, side, bf16, grad_checkpointing=checkpointing, accumulate=2)
    if backend is not None:
        torch._dynamo.reset()
        trainer._forward = torch.compile(model, backend=backend)
    trainer.gradients(iter(first_batches(trainer)))
    return [p.grad for p in model.parameters()], dict(model.named_buffers())


def assert_alike(one, other, **tolerance) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.allclose(a, b, **tolerance)
    for key, buffer in one[1].items():
        assert torch.allclose(buffer, other[1][key], **tolerance), key


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("name", "side"), [("ag_sononet8", 16), ("attention56_cifar", 8), ("cbam_resnet18", 32)]
)
def test_checkpointing_changes_neither_gradients_nor_what_bn_counts(name, side, bf16):
    plain, again = (gradients(name, side, bf16, c) for c in (False, True))
    assert {int(b) for key, b in again[1].items() if "num_batches" in key} == {2}
    assert_alike(plain, again, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_checkpointing_and_compiling_go_together():
    plain = gradients("ag_sononet8", 16, False, False)
    both = gradients("ag_sononet8", 16, False, True, "aot_eager")
    assert {int(b) for key, b in both[1].items() if "num_batches" in key} == {2}
    assert_alike(plain, both, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["squeezenet", "selecsls42"])
def test_networks_without_checkpoints_are_refused_in_a_line(name):
    model = tiny() if name == "squeezenet" else timm.create_model(name)
    with pytest.raises(
        ValueError, match=f"^grad_checkpointing: {name} does not support it"
    ) as caught:
        set_checkpointing(model, name)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------- compiling
class Stage:
    """A clock that a network's steps move, and a compiler with a price."""

    def __init__(self, model: nn.Module, eager: float, compiled: float, compiling: float) -> None:
        self.now, self.costs, self.compiling = 0.0, (eager, compiled), compiling
        self.compilations = 0
        self.model, self.failing = model, ""
        model.register_forward_pre_hook(self._runs)
        self.is_compiled = False

    def _runs(self, *_) -> None:
        self.now += self.costs[self.is_compiled]

    def clock(self) -> float:
        return self.now

    def compiler(self, model: nn.Module):
        self.compilations += 1
        unpaid = [self.compiling]

        def compiled(x):
            if self.failing:
                raise RuntimeError(self.failing)
            self.now += unpaid.pop() if unpaid else 0
            self.is_compiled = True
            try:
                return model(x)
            finally:
                self.is_compiled = False

        return compiled


def decided(eager=1.16, compiled=0.84, compiling=70.0, failing="", before=None, **recipe):
    """The trainer after the decision, its stage, and the last message."""
    trainer = trainer_of(tiny(), **{"compile": "auto", **recipe})
    stage = Stage(trainer.model, eager, compiled, compiling)
    stage.failing = failing
    with messages() as said:
        stage.chosen = choose_compiled(trainer, before, compiler=stage.compiler, clock=stage.clock)
    assert stage.chosen == ("no" if trainer.compiled is None else "yes")
    return trainer, stage, said[-1] if said else ""


def test_the_faster_is_chosen_and_told_with_its_numbers():
    trainer, stage, told = decided()
    assert stage.chosen == "yes"
    assert told == (
        "compiled: 0.84 s a step against 1.16 s eager; compiling took 70 s, "
        "won back after 219 of 890 steps"
    )
    assert stage.compilations == 1  # what was compiled to measure is what trains
    trainer._prepare()
    assert trainer._forward is trainer.compiled
    _, stage, told = decided(eager=1.06, compiled=1.35)
    assert stage.chosen == "no"
    assert told == "not compiled: 1.35 s a step against 1.06 s eager; compiling took 70 s"
    _, stage, told = decided(steps=100)  # spent it is
    assert stage.chosen == "yes"
    assert told.endswith("compiling took 70 s, more than 100 steps can win back")


def test_a_short_run_is_not_compiled_to_find_out():
    _, stage, told = decided(steps=17)
    assert (stage.chosen, stage.compilations) == ("no", 0)
    assert told == "not compiled: too short, about 20 s for 17 steps"
    _, stage, _ = decided(steps=18)
    assert stage.compilations == 1


def test_a_compiler_that_fails_is_told_and_only_yes_ends_the_run():
    why = "inductor raised:\nNo working C++ compiler"
    trainer, stage, told = decided(failing=why)
    assert told == "not compiled: compiling fails here (inductor raised: No working C++ compiler)"
    assert stage.chosen == "no"
    with pytest.raises(ValueError, match=r"^compile=yes: .*No working C\+\+ compiler"):
        decided(failing=why, compile="yes")
    trainer._prepare()
    assert trainer._forward is trainer.model


@pytest.mark.parametrize("factor", [math.nan, math.inf, 4.0])
def test_a_compiled_network_that_computes_something_else_is_not_taken(factor):
    def compiler(model):
        return lambda x: model(x) * factor

    with messages() as said:
        trainer = trainer_of(tiny(), compile="auto", steps=100_000)
        assert choose_compiled(trainer, compiler=compiler) == "no"
    assert re.search("not compiled: compiling fails here .its (loss|gradient) is", said[-1])
    with pytest.raises(UsageError, match=r"compile=yes: .*its (loss|gradient) is"):
        choose_compiled(trainer_of(tiny(), compile="yes"), compiler=compiler)


class Backwards(torch.autograd.Function):
    """The identity, whose gradient is not one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def test_neither_is_one_whose_gradient_is_another():
    def compiler(model):
        return lambda x: Backwards.apply(model(x))

    with pytest.raises(UsageError, match=r"compile=yes: .*its gradient is nan"):
        choose_compiled(trainer_of(tiny(), compile="yes"), compiler=compiler)


def test_yes_no_and_what_was_decided_are_not_measured():
    for stage, wanted in (
        (decided(compiled=9, compile="yes")[1], ("yes", 1)),
        (decided(compile="no")[1], ("no", 0)),
        (decided(before=False)[1], ("no", 0)),
        (decided(before="no")[1], ("no", 0)),
        (decided(compiled=9, before=True)[1], ("yes", 1)),
        (decided(before=True, failing="no compiler")[1], ("no", 1)),  # on another machine
        (decided(before="graphs")[1], ("no", 0)),
    ):
        assert (stage.chosen, stage.compilations) == wanted


def everything(trainer: Trainer) -> bytes:
    state = trainer.state_dict()
    tensors = {k: v.numpy().tobytes() for k, v in state.pop("model").items()}
    return pickle.dumps((
        tensors, state["optimizer"], state["tally"].tolist(), state["history"], state["step"],
        state["unreadable"], torch.get_rng_state().tolist(),
        [p.grad for p in trainer.model.parameters()],
        [m.training for m in trainer.model.modules()],
    ))  # fmt: skip


@pytest.mark.parametrize("failing", ["", "no compiler"])
def test_measuring_leaves_no_trace(failing):
    trainer = trainer_of(tiny(), compile="auto", mixup=0.2, accumulate=2, ema_decay=0.9, lr=0.5)
    stage = Stage(trainer.model, 1.16, 0.84, 70)
    stage.failing = failing
    before = everything(trainer)
    choose_compiled(trainer, compiler=stage.compiler, clock=stage.clock)
    assert stage.now > 0
    assert everything(trainer) == before


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang")), reason="no compiler here")
@pytest.mark.filterwarnings("ignore")
def test_a_real_compiler():
    torch._dynamo.reset()
    trainer = trainer_of(tiny(), compile="yes")
    assert choose_compiled(trainer) == "yes"
    other = trainer_of(tiny())
    for t in (trainer, other):
        t._prepare()
        t.model[3].p = 0.0
        t.gradients(iter(first_batches(t)))
    assert trainer._forward is not trainer.model
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------- memory
def on_cpu(free: float, **recipe):
    """What fits where a batch needs 100 MB and 100 MB an image; at most 8 are measured."""

    def peak(_, size):
        return 100_000_000 * (size + 1)

    with messages() as said:
        chosen = fit_memory(trainer_of(tiny(), **recipe), peak=peak, free=free)
    return chosen, said[-1]


def test_a_step_is_split_into_as_few_equal_parts_as_fit():
    assert on_cpu(9e9, batch_size=48) == ((48, 1), "a step of 48 needs 4.9 GB of 9.0 GB free: "
                                                   "1 part of 48")  # fmt: skip
    found, told = on_cpu(3e9, batch_size=48)
    assert found == (24, 2)
    assert told == (
        "a step of 48 needs 4.9 GB of 3.0 GB free: 2 parts of 24, 2.5 GB each; "
        "BN sees batches of 24 instead of 48"
    )
    assert on_cpu(2e9, batch_size=48)[0] == (16, 3)
    assert on_cpu(9e9, batch_size=12, accumulate=4)[0] == (48, 1)
    # no more than there are images, all 60 of them
    assert on_cpu(9e10, batch_size=60, accumulate=2)[0] == (60, 2)
    assert on_cpu(9e10, batch_size=100)[0] == (60, 1)
    assert on_cpu(9e9, batch_size=1)[0] == (1, 1)


def test_where_nothing_fits_it_is_told_in_a_line():
    with pytest.raises(ValueError, match="a batch of 2, the smallest equal part of a step of 48, "
                                         "needs 300 MB of 100 MB free"):  # fmt: skip
        on_cpu(1e8, batch_size=48)
    with pytest.raises(ValueError, match="a batch of 53, the smallest"):  # a prime number
        on_cpu(1e9, batch_size=53)


def test_the_split_step_sees_the_same_images_at_the_same_rate():
    whole = trainer_of(tiny(), batch_size=48)
    recipe = whole.recipe.changed(batch_size=16, accumulate=3)
    split = dataclasses.replace(whole, recipe=recipe)
    assert (split.images_a_step, split.steps_an_epoch) == (48, whole.steps_an_epoch)
    assert recipe.lr == whole.recipe.lr
    places = [place for start, n in split.spans(888) for place in range(start, start + n)]
    assert places == [*range(888 * 48, 890 * 48)]


def test_on_a_gpu_it_is_tried():
    gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    trainer = dataclasses.replace(trainer_of(tiny(), batch_size=48), accelerator=gpu)
    tried = []

    def peak(_, size):
        tried.append(size)
        return None if size > 20 else size * 100_000_000

    with messages() as said:
        assert fit_memory(trainer, peak=peak, free=2e9) == (16, 3)
    assert tried == [48, 24, 16]
    assert said == [
        "a step of 48 needs more than 2.0 GB free: 3 parts of 16, 1.6 GB each; "
        "BN sees batches of 16 instead of 48"
    ]
    with pytest.raises(ValueError, match=r"a batch of 2, .* needs more than 2\.0 GB free"):
        fit_memory(trainer, peak=lambda *_: None, free=2e9)
    # one that runs, but takes more than its share of what is free
    assert fit_memory(trainer, peak=lambda _, size: size * 80_000_000, free=2e9) == (16, 3)
    with pytest.raises(ValueError, match=r"a batch of 2, .* needs 1\.9 GB of 2\.0 GB free"):
        fit_memory(trainer, peak=lambda *_: 1_900_000_000, free=2e9)


def test_of_several_gpus_the_one_with_least_room_decides(monkeypatch):
    two = SimpleNamespace(device=torch.device("cuda"), num_processes=2, is_main_process=True)
    trainer = dataclasses.replace(trainer_of(tiny(), batch_size=48), accelerator=two)
    monkeypatch.setattr("regard.training.memory.gathered", lambda _, chosen: [chosen, 12])
    with messages() as said:
        assert fit_memory(trainer, peak=lambda *_: 1_000_000_000, free=2e9) == (12, 4)
    assert said == [
        "a step of 48 needs 1.0 GB of 2.0 GB free: 4 parts of 12; "
        "BN sees batches of 12 instead of 48"
    ]
    synchronized = dataclasses.replace(trainer, recipe=trainer.recipe.changed(sync_bn=True))
    with pytest.raises(ValueError, match="leave fit_memory or sync_bn out"):
        fit_memory(synchronized, peak=lambda *_: 1, free=2e9)


def test_memory_that_cannot_be_measured_changes_nothing():
    mps = SimpleNamespace(device=torch.device("mps"), num_processes=1, is_main_process=True)
    trainer = trainer_of(tiny(), batch_size=12, accumulate=2)
    trainer = dataclasses.replace(trainer, accelerator=mps)
    with messages() as said:
        assert fit_memory(trainer) == (12, 2)
    assert "can't be measured on mps" in said[-1]


def test_larger_batches_are_extrapolated_by_the_steeper_line():
    needed = memory.extrapolated([(2, 100), (4, 200), (8, 220)], [16, 8, 6, 4, 2])
    assert needed == {16: 220 + 8 * 20, 8: 220, 6: 210, 4: 200, 2: 100}
    assert memory.extrapolated([(4, 100)], [8]) == {8: 200}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux only")
def test_the_memory_of_trial_steps_is_that_of_their_activations():
    class Wide(nn.Module):
        """Eight activations of 32 maps of 64 x 64 are stored for the backward pass."""

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(32 if k else 1, 32, 1) for k in range(8))
            self.head = nn.Linear(32, 10)

        def forward(self, x):
            for conv in self.convs:
                x = conv(x).tanh()
            return self.head(x.mean(dim=(2, 3)))

    trainer = trainer_of(Wide(), side=64, batch_size=60)
    before = everything(trainer)
    peak = memory.PeakOnCPU()
    small, large = peak(trainer, 2), peak(trainer, 60)
    stored = 8 * 32 * 64 * 64 * 4  # bytes for an image
    assert 0.8 < (large - small) / (58 * stored) < 4  # tanh and convolution, and the gradients
    assert everything(trainer) == before


def test_control_groups_bound_what_is_free(tmp_path):
    def group(folder: Path, limit: str, names=("memory.max", "memory.current", "inactive_file")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(limit + "\n")
        (folder / names[1]).write_text("700000000\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} 200000000\n")

    group(tmp_path / "two", "1000000000")
    assert free_memory(tmp_path / "two") == 5e8
    one = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "one/memory", "800000000", one)
    assert free_memory(tmp_path / "one") == 3e8
    group(tmp_path / "max", "max")
    assert free_memory(tmp_path / "max") > 5e8 > free_memory(tmp_path / "two") - 1
    assert free_memory(tmp_path / "none") > 5e8


# ------------------------------------------------------------------------------ a whole run
TINY = {"model": "ag_sononet8", "recipe": Recipe(
    size=16, flip=0.0, faithfulness_images=0, batch_size=24, steps=3,
    val=0.2, test=0.2)}  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_does_as_was_decided_and_the_same_is_learnt(scans, tmp_path, monkeypatch):
    seen = []

    def fit(trainer):
        seen.append(("fit", trainer.recipe.batch_size))
        return 12, 2

    def compiled(trainer, decided):
        seen.append(("compile", trainer.recipe.batch_size, decided))
        return False

    def end(self):
        raise Stopped(self.trainer.step, 15)

    monkeypatch.setattr(run_module, "fit_memory", fit)
    monkeypatch.setattr(run_module, "choose_compiled", compiled)
    out = tmp_path / "run"
    asked = {**TINY, "out": out, "fit_memory": True, "compile": "auto"}
    with monkeypatch.context() as stopping:
        stopping.setattr(run_module.Run, "_finish", end)
        with pytest.raises(Stopped):
            train(str(scans), **asked)
    train(str(scans), **asked, resume=True)
    assert seen == [("fit", 24), ("compile", 12, None), ("compile", 12, False)]
    told = json.loads((out / "run.json").read_text())
    assert told["measured"] == {
        "batches": [12, 2], "compiled": False, "left_out": {}, "warnings": [],
    }  # fmt: skip
    assert told["facts"]["batches"] == [12, 2]
    recipe = (out / "recipe.toml").read_text()
    assert "batch_size = 24\naccumulate = 1\n" in recipe
    assert 'compile = "auto"' in recipe
    by_hand = {**TINY, "batch_size": 12, "accumulate": 2}
    train(str(scans), **by_hand, out=tmp_path / "by-hand")
    assert same_network(out, tmp_path / "by-hand")


@pytest.mark.slow
def test_measuring_and_checkpointing_learn_the_same_bits(scans, tmp_path):
    train(str(scans), **TINY, out=tmp_path / "plain")
    with messages() as said:
        train(str(scans), **TINY, out=tmp_path / "measured", compile="auto",
              grad_checkpointing=True)  # fmt: skip
    assert any(line.startswith("not compiled: too short, about 0 s for 3 steps") for line in said)
    assert same_network(tmp_path / "plain", tmp_path / "measured")


def test_what_cannot_be_leaves_no_run_behind(scans, tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("compile=yes: the network can't be compiled here (no compiler)")

    monkeypatch.setattr(run_module, "choose_compiled", fails)
    with pytest.raises(ValueError, match="compile=yes"):
        train(str(scans), **TINY, out=tmp_path / "run", compile="yes")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="grad_checkpointing: selecsls42 does not support it"):
        train(str(scans), **{**TINY, "model": "selecsls42"}, out=tmp_path / "run",
              size=64, grad_checkpointing=True)  # fmt: skip
    train(str(scans), **TINY, out=tmp_path / "run")


# ------------------------------------------------------------------------ recipes, precision
def test_a_wrong_choice_names_the_choices():
    with pytest.raises(ValueError, match="compile='maybe': choose one of no, yes, graphs, auto"):
        Recipe(compile="maybe")
    with pytest.raises(ValueError, match="fit_memory='yes': true or false is needed"):
        Recipe().changed(fit_memory="yes")


def test_a_narrow_precision_is_chosen_where_the_hardware_multiplies_in_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("regard.machine.cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "this CPU emulates bf16" in choices.precision_note("bf16", cpu)
    assert "this GPU emulates" in choices.precision_note("bf16", gpu)
    assert choices.precision_note("auto", cpu) is choices.precision_note("fp32", gpu) is None
    assert choices.choose_precision("auto", gpu) == "fp32"
    assert "emulates fp16" in choices.precision_note("fp16", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4
    assert choices.choose_precision("auto", gpu) == "fp16"
    assert choices.precision_note("fp16", gpu) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choices.choose_precision("auto", gpu) == "bf16"
    assert choices.choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(ValueError, match="tf32"):
        choices.choose_precision("tf32", cpu)
    monkeypatch.setattr("regard.machine.cpu_has_bf16", lambda: True)
    assert choices.precision_note("bf16", cpu) is None


@pytest.mark.parametrize("waits", [False, True])
def test_a_network_that_waits_for_the_device_is_not_recorded(waits, monkeypatch):
    """A recording that CUDA refuses leaves torch before 2.13 without memory."""
    modes, recorded = [], []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)

    def set_mode(mode):
        modes.append(mode)
        if mode == "error":  # torch does so once
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(
        torch.cuda,
        "make_graphed_callables",
        lambda whole, *_, **__: recorded.append(whole) or whole,
    )

    class Network(torch.nn.Linear):
        def forward(self, x):
            if waits and modes[-1:] == ["error"]:
                raise RuntimeError("called a synchronizing CUDA operation")
            return super().forward(x)

    network, x = Network(3, 2), torch.ones(4, 3)
    if waits:
        with pytest.raises(RuntimeError, match="synchronizing"):
            Graphed(network, x, contextlib.nullcontext)
    else:
        assert torch.equal(Graphed(network, x, contextlib.nullcontext)(x), network(x))
    assert modes == ["error", 0]
    assert len(recorded) == (not waits)
    assert network.weight.grad is None
