"""Training on a GPU never waits for it between two looks at the loss: counted on a fake one.

FakeTensorMode has a cuda:0 without memory or arithmetic. Whatever on a real one makes the host
wait (a number fetched, a copy from pageable memory, an index by a mask) is counted, and so is an
operation on tensors of different devices.
"""

import collections
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

import regard
from regard.data import preprocess as preprocess_module
from regard.data.augment import random_numbers
from regard.data.loading import Batch
from regard.data.preprocess import Preprocess
from regard.training import loop, update
from regard.training.config import Recipe
from regard.training.loop import Trainer

PACKAGE = str(Path(regard.__file__).parent)
STEPS = 4
GPU = torch.device("cuda:0")
FETCHES = {"item": 0.5, "__float__": 0.5, "__int__": -1, "__bool__": True, "tolist": [0.0] * 5}


class Accelerator:
    """What the loop asks Accelerate for."""

    device, num_processes, process_index, is_main_process = GPU, 1, 0, True


def place() -> str:
    # of the package, not of a clone in a folder of that name
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"


class Waits(TorchFunctionMode):
    """Counts the calls by which the host waits for the device, where `on` says so."""

    def __init__(self) -> None:
        self.on, self.found = False, collections.Counter()

    def count(self, what: str) -> None:
        if self.on:
            self.found[f"{what} at {place()}"] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        fake = args[0] if args and isinstance(args[0], FakeTensor) else None
        on_gpu = fake is not None and fake.device.type == "cuda"
        if name in FETCHES and on_gpu:
            self.count(name)
            return FETCHES[name]
        if name in ("nonzero", "masked_select") and on_gpu:
            self.count(name)
        if name in ("__getitem__", "__setitem__") and on_gpu:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index):
                self.count(f"{name} by a mask")
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if name in ("to", "cpu", "cuda") and fake is not None:
            if fake.device.type != result.device.type:
                self.count(f"{name} to {result.device.type}")
        elif name in ("tensor", "as_tensor") and result.device.type == "cuda":
            self.count(name)
        return result


class Source:
    """The same batch on the device again and again, as `feed` places it there."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def batches(self, spans):
        return iter([self.batch] * len(spans))


def waits(name: str, side: int, channels: int, recipe: Recipe, monkeypatch, **arguments):
    """What waited in the steps from the second on, which no look is among."""
    monkeypatch.setattr(preprocess_module, "_CONSTANTS", {})
    size = recipe.batch_size
    preprocess = Preprocess((channels, side, side), (0.5,) * channels, (0.25,) * channels)
    batch = Batch(
        torch.randint(256, (size, channels, side, side), dtype=torch.uint8), torch.arange(size),
        random_numbers(0, 0, size),
    )  # fmt: skip
    steps, watch = [], Waits()
    model, averaged = (
        regard.create_model(name, num_classes=10, in_chans=channels, **arguments) for _ in range(2)
    )
    targets = "a table" if recipe.self_adaptive else None
    on_host = SimpleNamespace(labels=torch.arange(size) % 10, recipe=recipe, targets=targets)
    placed = Trainer.place(on_host, batch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake(model)
        move_to_fake(averaged)
        monkeypatch.setattr(  # which seeds a generator on the device
            update, "ModelEmaV3", lambda _, decay: SimpleNamespace(module=averaged, decay=decay)
        )
        trainer = Trainer(
            model=model, recipe=recipe, preprocess=preprocess, source=Source(batch),
            labels=on_host.labels, classes=10, count=64, total=STEPS,
            accelerator=Accelerator(),
        )  # fmt: skip
        placed = placed.moved(lambda tensor: tensor.to(GPU))
        monkeypatch.setattr(loop, "feed", lambda batches, make, device: (placed for _ in batches))
        monkeypatch.setattr(loop, "seed_device", lambda *_: None)
        monkeypatch.setattr(trainer, "check_loss", lambda: None)  # the look at the run's end
        monkeypatch.setattr(trainer.updater, "backward", lambda _: gradients(model))
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # fused: one kernel

        def after(*_):
            steps.append(None)
            watch.on = True  # the first step makes what is made once

        with watch:
            trainer.fit(after_step=after)
    assert len(steps) == STEPS
    return dict(watch.found)


def move_to_fake(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(p.shape, device=GPU))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype, device=GPU)


def gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


SMALL_RESNET = {"stem": "cifar", "layers": (1, 1, 1, 1)}
EVERYTHING = Recipe(
    batch_size=8, random_crop="shift", color_jitter=0.4, lighting=0.1, random_erasing=0.5,
    rotate=10.0, zoom=(0.8, 1.2), shift=0.1, mixup=0.2, clip_grad=1.0, label_smoothing=0.1,
    ema_decay=0.9,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "side", "channels", "recipe", "arguments"),
    [
        ("cbam_resnet18", 32, 3, Recipe(batch_size=8), SMALL_RESNET),
        ("cbam_resnet18", 32, 3, EVERYTHING, SMALL_RESNET),
        ("attention56_cifar", 32, 3, Recipe(batch_size=8, accumulate=2, ema_decay=0.9),
         {"t": 1}),
        ("ag_sononet8", 64, 1, EVERYTHING.changed(batch_size=7), {"aggregation": "ft"}),
        ("ag_sononet8", 64, 1, Recipe(batch_size=8, self_adaptive=0.9), {}),
    ],
    ids=["plain", "everything", "accumulate", "odd", "self-adaptive"],
)  # fmt: skip
def test_between_two_looks_the_host_waits_for_nothing(
    name, side, channels, recipe, arguments, monkeypatch
):
    assert waits(name, side, channels, recipe, monkeypatch, **arguments) == {}


def test_cudnn_searches_for_the_fastest_kernels_of_steps_alone(monkeypatch):
    """Each size of an evaluation would be searched as well, for one pass."""
    seen = set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda *_: seen.add(torch.backends.cudnn.benchmark)
    )
    with hook:
        waits("cbam_resnet18", 32, 3, Recipe(batch_size=8), monkeypatch, **SMALL_RESNET)
    assert seen == {True}
    assert not torch.backends.cudnn.benchmark


def test_an_evaluation_waits_at_its_end_alone(monkeypatch):
    """Whatever the number of its batches."""
    from regard.predict import Classifier
    from regard.training import scoring

    monkeypatch.setattr(preprocess_module, "_CONSTANTS", {})
    found, watch = [], Waits()
    model = regard.create_model("ag_sononet8", num_classes=10)
    rows, part = np.arange(4), SimpleNamespace(lost=[])
    preprocess = Preprocess((1, 32, 32), (0.5,), (0.25,))
    classifier = Classifier(model, [str(i) for i in range(10)], preprocess)
    monkeypatch.setattr(scoring, "Classifier", lambda *_: classifier)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake(model)
        trainer = SimpleNamespace(
            weights=model, preprocess=preprocess, device=GPU, batch=4, share_buffers=lambda: None,
            accelerator=Accelerator(),
        )  # fmt: skip
        scorer = scoring.Scorer(trainer, [str(i) for i in range(10)])
        images, labels = torch.zeros(4, 1, 32, 32, device=GPU), torch.zeros(4, device=GPU).long()
        for count in (1, 5):
            part.table = SimpleNamespace(labels=np.arange(4 * count))
            batches = [scoring._Labeled(images, labels, rows, [])] * count
            monkeypatch.setattr(scorer, "_batches", lambda *_, batches=batches: iter(batches))
            # the three sums, which the end fetches: with numbers in place of fake ones
            monkeypatch.setattr(scoring, "gathered", lambda *_: [np.array([1.0, 1.0, 4.0])])
            watch.on = True
            with watch:
                scorer.validate(None, part)
            found.append(sum(n for what, n in watch.found.items() if "scoring" in what
                             or "predict" in what))  # fmt: skip
            watch.found.clear()
    assert found == [1, 1]


def test_images_go_where_the_network_is(monkeypatch):
    from regard.predict import Classifier

    monkeypatch.setattr(preprocess_module, "_CONSTANTS", {})
    model = regard.create_model("ag_sononet8", num_classes=10)
    classifier = Classifier(model, list("0123456789"), Preprocess((1, 32, 32), (0.5,), (0.25,)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_to_fake(model)
        assert classifier.answers(torch.zeros(2, 1, 32, 32)).device == GPU


def test_on_mps_which_has_no_float64_sums_are_in_float32():
    from regard.training.feed import Placed

    apple = torch.device("mps")
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs, labels = torch.zeros(4, 10, device=apple), torch.zeros(4, device=apple).long()
        batch = Placed(None, None, labels, None, None, 4, [])
        for tally in (torch.zeros(5, dtype=torch.float64), torch.zeros(5, device=apple)):
            trainer = SimpleNamespace(model=nn.Identity(), tally=tally)
            summed, weight = torch.zeros((), device=apple), torch.ones((), device=apple)
            Trainer._count(trainer, outputs, batch, labels, summed, weight)
            assert (trainer.tally.dtype, trainer.tally.device.type) == (torch.float32, "mps")


def test_the_counter_counts():
    with FakeTensorMode(), Waits() as watch:
        watch.on = True
        x = torch.zeros(3, device=GPU)
        float(x.sum())
        x[x > 0] = 1
        torch.zeros(3).to(GPU)
        torch.tensor([1.0], device=GPU)
        x.cpu()
    assert sum(watch.found.values()) == 5
