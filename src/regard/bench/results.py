"""What was measured: compared, printed, and written as JSON and CSV."""

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from regard.bench.contestants import AUTHORS, Contestant
from regard.errors import UsageError


@dataclass
class Result:
    """One contestant's figures.

    Attributes:
        seconds: of one call, in each turn.
        calls: timed in each turn.
        start: seconds until it was ready: conversion and compiling.
        times: how many times as fast as the authors' way of the same network (of a peer: of
            the network it is a peer of) in the same run.
        to_twin: its time as a part of its plain twin's on the same engine.
        peak, running: peak resident memory of a process of its own in bytes (on a GPU: what
            was allocated), with start-up and without.
        fault: why it could not be measured, or None.
    """

    contestant: Contestant
    seconds: list[float] = field(default_factory=list)
    calls: int = 0
    start: float | None = None
    times: float | None = None
    to_twin: float | None = None
    peak: int | None = None
    running: int | None = None
    fault: str | None = None

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The spread: seconds of one call, the first and the third quartile of the turns."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.contestant.batch / self.median


def compare(results: Sequence[Result]) -> None:
    """Fills in `times` and `to_twin` where what is compared with was measured as well."""
    good = {r.contestant: r for r in results if r.fault is None}
    by_what = {
        (c.kind, c.of, c.network, c.role, c.engine, c.precision, c.batch, c.size, c.threads): r
        for c, r in good.items()
    }

    def find(c: Contestant, network: str, role: str, engine: str, precision: str) -> Result | None:
        key = (c.kind, c.of, network, role, engine, precision, c.batch, c.size, c.threads)
        return by_what.get(key)

    twins = {c.of: c.network for c in good if c.role == "twin"}
    for c, r in good.items():
        network, role = (c.of, "network") if c.role == "peer" else (c.network, c.role)
        base = find(c, network, role, AUTHORS, "fp32")
        r.times = base.median / r.median if base is not None else None
        if c.role == "network" and c.of in twins:
            twin = find(c, twins[c.of], "twin", c.engine, c.precision)
            r.to_twin = r.median / twin.median if twin is not None else None


def pooled(rounds: Sequence[Sequence[Result]]) -> list[Result]:
    """The results of the same contestants in several processes, their turns put together.

    Start and memory are the first round's: later ones find compiled kernels in the cache.
    """
    found = []
    for same in zip(*rounds, strict=True):
        first = same[0]
        assert all(r.contestant == first.contestant for r in same)
        faults = [r.fault for r in same if r.fault is not None]
        seconds = [s for r in same for s in r.seconds]
        found.append(replace(first, seconds=seconds, fault=faults[0] if faults else None))
    compare(found)
    return found


def as_rows(
    results: Sequence[Result], machine: dict[str, Any], date: str
) -> list[dict[str, str | int | float]]:
    """One flat row for each result, the machine in each, as the CSV has them."""
    rows: list[dict[str, str | int | float]] = []
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    for r in results:
        c = r.contestant
        row: dict[str, str | int | float] = {
            "kind": c.kind, "of": c.of, "network": c.network, "role": c.role,
            "engine": c.engine, "precision": c.precision, "batch": c.batch,
            "size": "x".join(map(str, c.size)), "threads": c.threads, "device": c.device,
            "median_ms": "", "low_ms": "", "high_ms": "", "images_per_s": "", "times": "",
            "to_twin": "", "turns": len(r.seconds), "calls": r.calls, "start_s": "",
            "peak_mb": "", "running_mb": "", "fault": r.fault or "", "date": date,
            "machine": machine["accelerator"] or machine["processor"],
            "extensions": " ".join(machine["extensions"]), "versions": versions,
        }  # fmt: skip
        if r.fault is None:
            low, high = r.quartiles
            row |= {"median_ms": _round(1e3 * r.median), "low_ms": _round(1e3 * low),
                    "high_ms": _round(1e3 * high), "images_per_s": _round(r.rate)}  # fmt: skip
        known = {"times": r.times, "to_twin": r.to_twin, "start_s": r.start}
        row |= {name: _round(value) for name, value in known.items() if value is not None}
        memory = {"peak_mb": r.peak, "running_mb": r.running}
        row |= {name: round(value / 1e6) for name, value in memory.items() if value is not None}
        rows.append(row)
    return rows


def columns() -> list[str]:
    """The columns of the CSV."""
    nobody = Contestant("", "", "", "", "", "", 0, (0, 0, 0), 0)
    nowhere: dict[str, Any] = {
        "accelerator": None,
        "processor": "",
        "extensions": [],
        "versions": {},
    }
    return list(as_rows([Result(nobody, fault="-")], nowhere, "")[0])


def append_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file, which is made where there is none.

    Raises:
        UsageError: the file has other columns.
        OSError: it can't be written.
    """
    if not rows:
        return
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        check_csv(path, list(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_csv(path: Path, columns: Sequence[str]) -> None:
    """Refuses a CSV file that rows of these columns can't be added to.

    Raises:
        UsageError: the file has other columns.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8") as file:
        first = next(csv.reader(file), [])
    if first != list(columns):
        raise UsageError(f"{path} has other columns than a benchmark's: give another file")


def slug(machine: dict[str, Any]) -> str:
    """A machine's name in file names, such as amd-epyc-9r14-2-threads."""
    name = machine["accelerator"] or f"{machine['processor']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    name = machine["processor"]
    if machine["accelerator"]:
        name = f"{machine['accelerator']}, {name}"
    return (
        f"{name} ({' '.join(machine['extensions']) or 'no vector extension known'}), "
        f"{machine['threads']} threads, {machine['system']}; {versions}"
    )


def print_results(results: Sequence[Result], header: Sequence[str]) -> None:
    """Prints a table for each group, what could not be measured with the reason."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    # piped, a table must not be cut to the width of a terminal that is not there
    wide = Console(width=None if console.is_terminal else 160, highlight=False)
    for line in header:
        console.print(line, soft_wrap=True, markup=False)

    def group(r: Result) -> tuple[Any, ...]:
        c = r.contestant
        return c.of, c.kind, c.batch, c.size

    for (of, kind, batch, size), members in groupby(results, group):
        rows = list(members)
        with_memory = any(r.peak is not None for r in rows)
        what = "prediction" if kind == "predict" else "a training step"
        console.print()
        console.print(
            f"[bold]{of}[/bold], {what}, batch {batch}, {'x'.join(map(str, size))}",
            soft_wrap=True,
        )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("network", "engine", "precision"):
            table.add_column(heading, no_wrap=True)
        headings = ["ms", "quartiles", "images/s", "x authors'", "of twin's time", "start s"]
        for heading in headings + ["peak MB", "running MB"] * with_memory:
            table.add_column(heading, justify="right", no_wrap=True)
        for r in rows:
            table.add_row(*_cells(r, with_memory))
        wide.print(table)


def _cells(r: Result, with_memory: bool) -> list[str]:
    c = r.contestant
    engine = "authors' way" if c.engine == AUTHORS and c.role != "peer" else c.engine
    cells = [c.network, engine, c.precision]
    if r.fault is not None:
        return [*cells, "-"]  # the reason is a line of its own
    low, high = r.quartiles
    cells += [
        f"{1e3 * r.median:.1f}", f"{1e3 * low:.1f} - {1e3 * high:.1f}", f"{r.rate:,.1f}",
        "" if r.times is None else f"{r.times:.2f}",
        "" if r.to_twin is None else f"{r.to_twin:.2f}",
        "" if r.start is None else f"{r.start:.1f}",
    ]  # fmt: skip
    if with_memory:
        cells += ["" if m is None else f"{m / 1e6:,.0f}" for m in (r.peak, r.running)]
    return cells


def _round(value: float) -> float:
    return float(f"{value:.5g}")
