"""Plans the measurements, and runs them group by group."""

import gc
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cases import (
    AUTHORS,
    COMPILE,
    DEFAULT_MODELS,
    TRAIN_ENGINES,
    Case,
    input_size,
    peers_of,
    prepare,
    twin_of,
    with_noise_statistics,
)
from regard.engines import ENGINES
from regard.engines.bench import Clock, Guarded, installed, time_in_rounds
from regard.engines.choose import missing_engines
from regard.files import reason
from regard.machine import describe, describe_machine
from results import Result, as_rows, compare
from subprocesses import SecondProcess, measure_alone

log = logging.getLogger("regard.benchmarks")

METHOD = (
    "Weights: random, BN statistics of noise. Images: seeded noise, uint8, in memory. Median and "
    "quartiles over timing rounds that go through all cases of a group; x authors': how many times "
    "as fast as the same network eager, fp32, NCHW, in the same rounds."
)


@dataclass
class Report:
    """All measurements.

    Attributes:
        machine: from describe_machine().
        date: of the measurement.
        results: group by group.
        notes: a line for each case that could not be measured.
    """

    machine: dict[str, Any]
    date: str
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def header(self) -> list[str]:
        """Machine, date and method."""
        return [f"{describe(self.machine)}; {self.date}", METHOD]

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each result."""
        return as_rows(self.results, self.machine, self.date)


def plan(
    models: Sequence[str] = DEFAULT_MODELS,
    *,
    engines: Sequence[str] | None = None,
    predict: bool = True,
    train: bool = False,
    peers: bool = False,
    batch_sizes: Sequence[int] = (8,),
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> tuple[list[list[Case]], list[str]]:
    """The groups of cases that are timed together, and a note for each that can't be measured.

    Raises:
        UsageError: no such network or device, or a size that a network can't take.
    """
    absent = missing_engines(engines or ENGINES)
    notes = [f"{name}: not installed ({how})" for name, how in absent.items()]
    ways = [(AUTHORS, "fp32"), *installed(engines or list(ENGINES), ["auto"], torch.device(device))]
    floats = {p for _, p in installed(["eager"], ["auto"], torch.device(device))}
    training = [("bf16" if "bf16" in floats else "fp32", e) for e in TRAIN_ENGINES]
    count = threads or torch.get_num_threads()
    groups = []
    for name in dict.fromkeys(models):
        shape = input_size(name, size)
        theirs, missing = peers_of(name) if peers and predict else ([], [])
        notes += [line for line in missing if line not in notes]
        both = [(name, "network"), (twin_of(name), "twin")]
        for batch in dict.fromkeys(batch_sizes):
            rest = (batch, shape, count, device)
            if predict:
                group = [
                    Case("predict", name, network, role, engine, precision, *rest)
                    for network, role in both if network is not None
                    for engine, precision in ways
                ]  # fmt: skip
                group += [Case("predict", name, n, "peer", e, "fp32", *rest) for n in theirs
                          for e in (AUTHORS, COMPILE)]  # fmt: skip
                groups.append(group)
            if train:
                trained = [("fp32", AUTHORS), *training]
                groups.append(
                    [Case("train", name, name, "network", e, p, *rest) for p, e in trained]
                )
    return groups, notes


def measure(
    models: Sequence[str] = DEFAULT_MODELS,
    *,
    rounds: int = 10,
    memory: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    **choices: Any,
) -> Report:
    """Measures networks on this machine.

    Args:
        models: names of networks.
        rounds: timing rounds.
        memory: whether each case's peak memory is measured, in a separate process.
        threads: number of CPU threads; default: as many as torch has.
        device: "cpu" or "cuda".
        clock: returns seconds.
        choices: passed to `plan`.

    Raises:
        UsageError: as for `plan`.
    """
    groups, notes = plan(models, threads=threads, device=device, **choices)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        machine = describe_machine(torch.device(device))
        report = Report(machine, time.strftime("%Y-%m-%d"), notes=notes)
        for line in notes:
            log.warning("%s", line)
        for group in groups:
            results = measure_group(group, rounds, clock=clock)
            if memory:
                _add_memory(results)
            report.results += results
            report.notes += [f"{r.case}: {r.fault}" for r in results if r.fault is not None]
        return report
    finally:
        torch.set_num_threads(before)


def measure_group(
    group: Sequence[Case], rounds: int, *, clock: Clock = time.perf_counter
) -> list[Result]:
    """Prepares all cases of a group, times them round by round, and compares them."""
    first = group[0]
    what = "prediction" if first.kind == "predict" else "training"
    log.info("%s, %s, batch %d: preparing %d (compiling takes up to minutes)",
             first.of, what, first.batch, len(group))  # fmt: skip
    results = [Result(case) for case in group]
    ready: list[tuple[Result, Guarded]] = []
    second = SecondProcess()
    try:
        for number, r in enumerate(results, start=1):
            case = r.case
            theirs = case.engine in (AUTHORS, COMPILE) and case.device == "cpu"
            try:
                step, r.startup = second.prepare(case) if theirs else prepare(case)
            except Exception as error:  # converters and compilers raise nearly anything
                _fail(r, error)
                continue
            ready.append((r, Guarded(step)))
            log.info("  %d/%d %s: ready in %.1f s", number, len(group), case, r.startup)
        timed = time_in_rounds([step for _, step in ready], rounds, clock)
        for (r, step), seconds in zip(ready, timed, strict=True):
            if step.error is not None:
                _fail(r, step.error)
            else:
                r.seconds = seconds
    finally:
        ready.clear()
        second.close()
        with_noise_statistics.cache_clear()
        # torch.compile stops compiling a function after a few networks, so each group starts anew
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
    compare(results)
    return results


def _fail(r: Result, error: Exception) -> None:
    r.fault = reason(error, 300)
    log.warning("%s: %s", r.case, r.fault)


def _add_memory(results: Sequence[Result]) -> None:
    good = [r for r in results if r.fault is None]
    if good:
        log.info("%s: memory of %d cases, each in a new process", good[0].case.of, len(good))
    for r, alone in zip(good, measure_alone([r.case for r in good], rounds=1), strict=True):
        if alone.fault is not None:
            log.warning("%s: memory: %s", r.case, alone.fault)
        r.peak, r.running = alone.peak, alone.running
