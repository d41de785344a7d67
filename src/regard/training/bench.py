"""How fast networks train on this machine: what `regard bench --train` measures.

A step is the network's forward pass, the recipe's loss, the backward pass and the recipe's
optimizer (with clipping and averaging where the recipe has them), on images and labels that are
already on the device: no decoding, augmentation or loader.
"""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard.data.preprocess import Preprocess
from regard.engines.bench import Clock, Guarded, Timing, network, noise, time_all
from regard.errors import UsageError
from regard.log import silence_libraries
from regard.machine import fastest_kernels, has_bf16, keep_freed_memory, synchronize
from regard.models._onednn import without_strided_pointwise
from regard.models.fused import can_fuse, set_fused
from regard.models.zoo import twins_of
from regard.training.config import Recipe
from regard.training.graphs import Graphed
from regard.training.losses import multi_head_cross_entropy, total_weight
from regard.training.memory import peak_of
from regard.training.update import Updater

log: logging.Logger = logging.getLogger(__name__)

ENGINES = ("eager", "fused", "compiled", "graphs")
USUAL = ("eager", "compiled")  # measured by default
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass
class TrainTiming(Timing):
    """A `Timing` with `memory`: peak bytes of weights, optimizer state and two steps."""

    network: str = ""
    memory: int | None = None

    def __str__(self) -> str:
        return f"{self.network}, {super().__str__()}"


@dataclass
class Case:
    """One network, engine and precision, ready to train on one batch."""

    model: nn.Module
    timing: TrainTiming
    images: Tensor
    labels: Tensor
    recipe: Recipe
    updater: Updater = field(init=False)
    forward: Any = field(init=False)

    def __post_init__(self) -> None:
        self.updater = Updater(self.model, self.recipe, self.images.device, self.timing.precision)
        self.forward = self.model
        if self.timing.engine == "fused":
            set_fused(self.model)
        elif self.timing.engine == "compiled":
            silence_libraries()
            self.forward = torch.compile(self.model, dynamic=False)
        elif self.timing.engine == "graphs":
            set_fused(self.model)
            self.forward = Graphed(self.model, self.images, lambda: self.updater.autocast(False))

    def step(self) -> None:
        """Runs one step and waits until the device has finished it."""
        with fastest_kernels():
            with self.updater.autocast():
                outputs = self.forward(self.images).float()
            loss = multi_head_cross_entropy(
                outputs, self.labels, getattr(self.model, "head_weights", None),
                reduction="sum", label_smoothing=self.recipe.label_smoothing,
            ) / total_weight(self.labels, None)  # fmt: skip
            self.updater.backward(loss)
        self.updater.update()
        synchronize(self.images.device)


def bench_training(
    names: Sequence[str],
    cases: Sequence[tuple[str, str]],
    recipe: Recipe,
    device: torch.device,
    *,
    batch: int,
    size: tuple[int, int] | None = None,
    rounds: int = 10,
    clock: Clock = time.perf_counter,
) -> list[TrainTiming]:
    """Times a training step of every network in every (engine, precision), all in each round.

    Args:
        names: names of networks or folders of runs.
        cases: (engine, precision) pairs, as `trainable` returns them.
        recipe: gives the optimizer and the loss.
        device: where the steps run.
        batch: images per step.
        size: height and width of the images (default: each network's own).
        rounds: timing rounds.
        clock: returns seconds.

    Raises:
        UsageError: there is no such network, or it can't take images of this size.
    """
    if device.type == "cpu":
        keep_freed_memory()
    timings, ready = [], list[tuple[Timing, Guarded]]()
    networks = {name: network(name, size) for name in names}  # none is measured if one is wrong
    for name, (model, preprocess) in networks.items():
        for engine, precision in cases:
            timing = TrainTiming(engine, precision, network=name)
            timings.append(timing)
            case = _prepared(model, preprocess, timing, recipe, device, batch)
            if case is not None:
                ready.append((timing, Guarded(case.step)))
    time_all(ready, rounds, clock)
    return timings


def _prepared(
    model: nn.Module, preprocess: Preprocess, timing: TrainTiming, recipe: Recipe,
    device: torch.device, batch: int,
) -> Case | None:  # fmt: skip
    """A case after its first two steps; None if it fails, with the reason in its timing."""
    started = time.perf_counter()
    cases: list[Case] = []

    def start() -> None:
        own = copy.deepcopy(model).train().to(device)
        if device.type == "cpu":
            without_strided_pointwise(own)
        images = preprocess.normalize(noise(batch, preprocess.input_size).to(device))
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.arange(batch, device=device) % int(getattr(model, "num_classes", 2))
        cases.append(Case(own, timing, images, labels, recipe))
        for _ in range(2):  # the second with the optimizer's state allocated
            cases[0].step()

    try:
        timing.memory = peak_of(start, device)
    except Exception as error:  # compilers and devices raise nearly anything
        timing.fail(error)
        return None
    timing.startup = time.perf_counter() - started
    log.info("  %s: ready in %.1f s", timing, timing.startup)
    return cases[0]


def trainable(
    engines: Sequence[str], precisions: Sequence[str], device: torch.device
) -> list[tuple[str, str]]:
    """The (engine, precision) pairs in which this machine can train; "auto" is fp32, plus bf16
    where the device multiplies in bf16.

    Raises:
        UsageError: an engine that does not train, or a precision that the device lacks.
    """
    for engine in engines:
        if engine not in ENGINES:
            raise UsageError(f"engine {engine!r} only predicts; choose {', '.join(ENGINES)}")
        if engine == "fused" and not can_fuse(device):
            raise UsageError(f"engine 'fused': not available on this machine's {device.type}")
        if engine == "graphs" and device.type != "cuda":
            raise UsageError(f"engine 'graphs': needs CUDA, this is {device.type}")
    able = {
        "fp32": True,
        "tf32": device.type == "cuda",
        "bf16": has_bf16(device),
        "fp16": device.type == "cuda",
    }
    for precision in precisions:
        if not able.get(precision, precision == "auto"):
            where = f"on this machine's {device.type}"
            raise UsageError(f"precision {precision!r}: not available for training {where}")
    usual = ("fp32", "bf16")
    wanted = [
        p for p in PRECISIONS
        if p in precisions or ("auto" in precisions and p in usual and able[p])
    ]  # fmt: skip
    return [(engine, p) for engine in dict.fromkeys(engines) for p in wanted]


def over_plain(timing: TrainTiming, timings: Sequence[TrainTiming]) -> float | None:
    """Images per second relative to the plain twin's, in the same engine and precision.

    None for a plain network, or if its plain twin was not measured.
    """
    plain = twins_of(timing.network).get("plain")
    if plain is None or timing.fault is not None:
        return None
    for other in timings:
        if timing.network in (other.network, plain) or other.fault is not None:
            continue
        alike = (other.engine, other.precision) == (timing.engine, timing.precision)
        if alike and plain in (other.network, f"plain_{other.network}"):
            return other.quartiles[1] / timing.quartiles[1]
    return None
