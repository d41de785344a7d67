"""How fast each engine predicts on this machine: the measurement of `regard bench`."""

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from regard.data.preprocess import Preprocess
from regard.engines.backends import ENGINES, Engine, OpenVino
from regard.engines.choose import missing_engines
from regard.engines.conversion import Deployed, openvino_int8
from regard.errors import UsageError
from regard.extras import missing, require
from regard.files import reason
from regard.machine import has_bf16
from regard.models.create import make
from regard.predict import load

log: logging.Logger = logging.getLogger(__name__)
Clock = Callable[[], float]


@dataclass
class Timing:
    """One engine: seconds per call in each round, seconds until it was ready, or a fault."""

    engine: str
    precision: str
    seconds: list[float] = field(default_factory=list)
    startup: float = 0.0
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.engine}, {self.precision}"

    def fail(self, error: Exception) -> None:
        """Keeps the reason, and warns of it."""
        self.fault = reason(error, 300)
        log.warning("%s: %s", self, self.fault)

    @property
    def quartiles(self) -> list[float]:
        """First quartile, median and third quartile of the seconds per call."""
        return np.quantile(self.seconds, (0.25, 0.5, 0.75)).tolist()


class OpenVinoInt8(OpenVino):
    """OpenVINO in 8 bits as `export` writes it, but calibrated on noise, with the same speed."""

    needs: tuple[str, ...] = ("openvino", "nncf")
    precisions: tuple[str, ...] = ("int8",)

    def _convert(self, deployed: Deployed) -> Any:
        return openvino_int8(deployed, noise(16, deployed.preprocess.input_size).float())


def bench(
    model: nn.Module,
    preprocess: Preprocess,
    engines: Sequence[tuple[str, str]],
    *,
    batch: int,
    rounds: int = 10,
    clock: Clock = time.perf_counter,
) -> list[Timing]:
    """Times predicting one batch, uint8 images in memory to probabilities on the CPU.

    `preprocess` has the input size to measure; `engines` are (engine, precision) from `installed`.
    """
    images, ready = noise(batch, preprocess.input_size), list[tuple[Timing, Guarded]]()
    timings = [Timing(name, precision) for name, precision in engines]
    for number, t in enumerate(timings, start=1):
        made: type[Engine] = OpenVinoInt8 if t.precision == "int8" else ENGINES[t.engine]
        started = time.perf_counter()
        try:
            engine = made(model, preprocess, (batch,), t.precision)
        except Exception as error:  # converters and compilers raise almost anything
            t.fail(error)
            continue
        t.startup = time.perf_counter() - started
        log.info("  %d/%d %r: ready in %.1f s", number, len(timings), engine, t.startup)
        ready.append((t, Guarded(partial(engine, images))))
    time_all(ready, rounds, clock)
    return timings


@dataclass
class Guarded:
    """A step that does nothing more once it has failed, so that what others took is not lost."""

    step: Callable[[], object]
    error: Exception | None = None

    def __call__(self) -> None:
        if self.error is None:
            try:
                self.step()
            except Exception as error:  # out of memory, or nearly anything of a compiler's
                self.error = error


def time_all(ready: Sequence[tuple[Timing, Guarded]], rounds: int, clock: Clock) -> None:
    """Sets the seconds of each timing, or the fault of one whose step fails in a round."""
    timed = time_in_rounds([step for _, step in ready], rounds, clock)
    for (timing, step), seconds in zip(ready, timed, strict=True):
        if step.error is None:
            timing.seconds = seconds
        else:
            timing.fail(step.error)


def time_in_rounds(
    steps: Sequence[Callable[[], object]], rounds: int, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds per call of each step in each round; the order of the steps differs by round.

    A step shorter than 0.1 s is called several times per round.
    """
    calls, seconds = [], [[0.0] * rounds for _ in steps]
    for step in steps:
        step()
        once = _seconds(step, 1, clock)
        calls.append(max(1, min(1000, math.ceil(0.1 / once))) if once > 0 else 1000)
    for number in range(rounds):
        order = list(range(len(steps)))
        random.Random(number).shuffle(order)
        for k in order:
            if calls[k] > 1:
                steps[k]()  # untimed: threads of the previous step may still be spinning
            seconds[k][number] = _seconds(steps[k], calls[k], clock)
    return seconds


def _seconds(step: Callable[[], object], calls: int, clock: Clock) -> float:
    started = clock()
    for _ in range(calls):
        step()
    return (clock() - started) / calls


def installed(
    engines: Sequence[str],
    precisions: Sequence[str],
    device: torch.device = torch.device("cpu"),  # noqa: B008 (it is immutable)
) -> list[tuple[str, str]]:
    """The (engine, precision) pairs that this machine can run; "auto" is every precision.

    Raises:
        UsageError: this machine does not support the precision, or no engine does.
    """
    able = {
        "fp32": True,
        "bf16": has_bf16(device),
        "int8": device.type == "cpu" and not missing("openvino", *OpenVinoInt8.needs),
    }
    if "int8" in precisions:
        require("openvino", "precision 'int8'", *OpenVinoInt8.needs)
    for precision in precisions:
        if not able.get(precision, True):
            raise UsageError(
                f"precision {precision!r}: not available on this machine's {device.type}"
            )
    wanted = [p for p in able if p in precisions or ("auto" in precisions and able[p])]
    if absent := missing_engines(engines):
        log.info("not installed: %s", ", ".join(f"{n} ({how})" for n, how in absent.items()))
    pairs = [
        (name, p) for name in dict.fromkeys(engines) for p in wanted if name not in absent
        and (p in ENGINES[name].precisions or (name, p) == ("openvino", "int8"))
    ]  # fmt: skip
    if not pairs:
        raise UsageError(f"none of {', '.join(engines)} computes in {' or '.join(precisions)} here")
    return pairs


def network(name: str, size: tuple[int, int] | None = None) -> tuple[nn.Module, Preprocess]:
    """A run's network, or a named one with the same random weights each time, for measurement.

    Raises:
        UsageError: there is no such network, or it can't take images of this height and width.
    """
    if Path(name).is_dir():
        classifier = load(name)
        model, own = classifier.model, classifier.preprocess
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(name, {}).eval().to(memory_format=torch.channels_last)
        cfg: Any = get_pretrained_cfg(name)
        own = Preprocess.from_config(cfg.to_dict())
    preprocess = replace(own, input_size=(own.input_size[0], *(size or own.size)))
    try:
        with torch.no_grad():
            model(torch.zeros(1, *preprocess.input_size))
    except Exception as error:  # each network refuses a size in its own way
        asked, made_for = (f"{p.size[0]} {p.size[1]}" for p in (preprocess, own))
        message = f"size {asked}: {name}, made for {made_for}, can't take it ({reason(error)})"
        raise UsageError(message) from error
    return model, preprocess


def noise(batch: int, size: tuple[int, int, int]) -> Tensor:
    """(batch, C, H, W) uint8 images, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, *size), dtype=torch.uint8, generator=generator)
