"""`regard bench`: plans what competes, measures it group by group, and tells the figures."""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regard.bench.alone import Elsewhere, first_line, measure_alone
from regard.bench.contestants import (
    AUTHORS,
    COMPILE,
    DEFAULT_MODELS,
    TRAIN_ENGINES,
    Contestant,
    absent_packages,
    input_size,
    peers_of,
    prepare,
    trained_looking,
    twin_of,
)
from regard.bench.results import Result, as_rows, compare, describe
from regard.bench.timing import take_turns
from regard.engines import ENGINES, PRECISIONS
from regard.errors import UsageError
from regard.machine import describe_machine, has_bf16

Echo = Callable[[str], None]
Clock = Callable[[], float]
METHOD = (
    "Weights: random, BN statistics of noise. Images: seeded noise, uint8, in memory. Median and "
    "quartiles over turns that go round all contestants of a group; x authors': how many times "
    "as fast as the same network eager, fp32, NCHW, in the same run."
)


@dataclass
class Report:
    """All that a run of `regard bench` found.

    Attributes:
        machine: of describe_machine().
        date: of the day.
        results: group by group.
        told: a line for each contestant that could not be measured.
    """

    machine: dict[str, Any]
    date: str
    results: list[Result] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def header(self) -> list[str]:
        """Machine, date and method."""
        return [f"{describe(self.machine)}; {self.date}", METHOD]

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each result."""
        return as_rows(self.results, self.machine, self.date)

    def to_dict(self) -> dict[str, Any]:
        """Everything, each turn's seconds too."""
        pairs = zip(self.rows(), self.results, strict=True)
        return {
            "machine": self.machine,
            "date": self.date,
            "method": METHOD,
            "results": [{**row, "seconds": r.seconds} for row, r in pairs],
            "told": self.told,
        }


def plan(
    models: Sequence[str] = DEFAULT_MODELS,
    *,
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] = ("auto",),
    predict: bool = True,
    train: bool = False,
    peers: bool = False,
    batch_sizes: Sequence[int] = (8,),
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> tuple[list[list[Contestant]], list[str]]:
    """What competes, in groups that are measured turn by turn; and what can't, one line each.

    Raises:
        UsageError: no such network, engine, precision or device, or a size that can't be.
    """
    for name in engines or ():
        if name not in ENGINES:
            raise UsageError(f"engine {name!r}: choose {', '.join(ENGINES)}")
    _check_device(device)
    for what, numbers in (("batch size", batch_sizes), ("size", size or ()),
                          ("threads", () if threads is None else (threads,))):  # fmt: skip
        if any(n < 1 for n in numbers):
            raise UsageError(f"{what} {' '.join(map(str, numbers))}: at least 1")
    kinds = _precisions(precisions, torch.device(device))
    sizes = {name: input_size(name, size) for name in dict.fromkeys(models)}
    told = []
    installed = []
    for name in dict.fromkeys(engines or ENGINES):
        if absent := absent_packages(name) if predict else []:
            told.append(f"{name}: needs {' and '.join(absent)}: pip install 'regard[{name}]'")
        else:
            installed.append(name)
    usable = [(e, p) for e in installed for p in kinds if p in ENGINES[e].precisions]
    if "int8" in kinds and "openvino" in installed:
        usable.append(("openvino", "int8"))
    floats = [p for p in kinds if p != "int8"]
    training = [p for p in floats if p == "bf16" or "bf16" not in kinds or "auto" not in precisions]
    groups = []
    count = threads or torch.get_num_threads()
    for name, shape in sizes.items():
        theirs, missing = peers_of(name) if peers and predict else ([], [])
        told += [line for line in missing if line not in told]
        for batch in dict.fromkeys(batch_sizes):

            def one(
                kind: str, network: str, role: str, engine: str, precision: str,
                of: str = name, batch: int = batch, shape: tuple[int, int, int] = shape,
            ) -> Contestant:  # fmt: skip
                return Contestant(
                    kind, of, network, role, engine, precision, batch, shape, count, device
                )

            if predict:
                both = [(name, "network"), (twin_of(name), "twin")]
                group = [
                    one("predict", network, role, engine, precision)
                    for network, role in both if network is not None
                    for engine, precision in [(AUTHORS, "fp32"), *usable]
                ]  # fmt: skip
                group += [one("predict", n, "peer", e, "fp32") for n in theirs
                          for e in (AUTHORS, COMPILE)]  # fmt: skip
                groups.append(group)
            if train:
                ways = [(AUTHORS, "fp32"), *((e, p) for p in training for e in TRAIN_ENGINES)]
                groups.append([one("train", name, "network", e, p) for e, p in ways])
    return groups, told


def run_bench(
    models: Sequence[str] = DEFAULT_MODELS,
    *,
    turns: int = 10,
    memory: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    echo: Echo = lambda line: None,
    clock: Clock = time.perf_counter,
    **choices: Any,
) -> Report:
    """Measures networks on this machine.

    Args:
        models: names of networks.
        turns: in which each contestant is timed.
        memory: whether each contestant's peak memory is measured, in a process of its own.
        threads: of the CPU; None: as many as torch has.
        device: "cpu" or "cuda".
        echo: is told what is being measured, how long it takes, and what can't be measured.
        clock: seconds.
        choices: of `plan`.

    Raises:
        UsageError: no such network, engine, precision or device, or a size that can't be.
    """
    if turns < 1:
        raise UsageError(f"turns {turns}: at least 1")
    groups, told = plan(models, threads=threads, device=device, **choices)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        machine = describe_machine(torch.device(device))
        report = Report(machine, time.strftime("%Y-%m-%d"), told=told)
        for line in told:
            echo(line)
        for group in groups:
            results = measure_group(group, turns, echo=echo, clock=clock)
            if memory:
                _add_memory(results, echo)
            report.results += results
            report.told += [f"{r.contestant}: {r.fault}" for r in results if r.fault is not None]
        return report
    finally:
        torch.set_num_threads(before)


def measure_group(
    group: Sequence[Contestant], turns: int, *, echo: Echo, clock: Clock = time.perf_counter
) -> list[Result]:
    """Makes all contestants of a group ready, times them turn by turn, and compares them."""
    first = group[0]
    what = "prediction" if first.kind == "predict" else "training"
    title = f"{first.of}, {what}, batch {first.batch}"
    echo(f"{title}: making {len(group)} ready (compiling takes up to minutes)")
    results = [Result(c) for c in group]
    steps: list[Any] = []
    ready: list[Result] = []
    elsewhere = Elsewhere()
    try:
        for number, r in enumerate(results, start=1):
            try:
                c = r.contestant
                theirs = c.engine in (AUTHORS, COMPILE) and c.device == "cpu"
                step, r.start = elsewhere.prepare(c) if theirs else prepare(c)
            except Exception as error:  # whatever a converter or a compiler throws
                _fail(r, error, echo)
                continue
            steps.append(step)
            ready.append(r)
            echo(f"  {number}/{len(group)} {r.contestant}: ready in {r.start:.1f} s")
        timed = take_turns(steps, turns, clock=clock, echo=lambda line: echo(f"{title}: {line}"))
        for r, found in zip(ready, timed, strict=True):
            if isinstance(found, Exception):
                _fail(r, found, echo)
            else:
                r.seconds, r.calls = found
    finally:
        steps.clear()
        elsewhere.close()
        trained_looking.cache_clear()
        # torch.compile gives up on a function after a few networks: the next group starts anew
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
    compare(results)
    return results


def _fail(r: Result, error: Exception, echo: Echo) -> None:
    r.fault = first_line(error)
    echo(f"{r.contestant}: {r.fault}")


def _add_memory(results: Sequence[Result], echo: Echo) -> None:
    good = [r for r in results if r.fault is None]
    if good:
        echo(f"{good[0].contestant.of}: memory of {len(good)}, each in a process of its own")
    for r, alone in zip(good, measure_alone([r.contestant for r in good], turns=1), strict=True):
        if alone.fault is not None:
            echo(f"{r.contestant}: memory: {alone.fault}")
        r.peak, r.running = alone.peak, alone.running


def _precisions(asked: Sequence[str], device: torch.device) -> list[str]:
    """fp32, bf16 and int8 in order; "auto" is all that the device computes in."""
    fast = has_bf16(device)
    eight = device.type == "cpu" and not absent_packages("openvino", "int8")
    choices = (*PRECISIONS, "int8")
    for name in asked:
        if name not in choices:
            raise UsageError(f"precision {name!r}: choose {', '.join(choices)}")
        if name == "int8" and not eight:
            raise UsageError(
                "precision 'int8': on the CPU, by openvino and nncf: "
                "pip install 'regard[openvino]' brings them"
            )
        if name == "bf16" and not fast:
            raise UsageError("precision 'bf16': this machine only emulates it; choose fp32 or auto")
    everything = {"fp32", *(["bf16"] if fast else []), *(["int8"] if eight else [])}
    chosen = set(asked) | (everything if "auto" in asked else set())
    return [p for p in ("fp32", "bf16", "int8") if p in chosen]


def _check_device(name: str) -> None:
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: choose cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': this machine has no GPU that torch can use; choose cpu")
