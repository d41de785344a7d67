"""Compares measurements, prints them, and writes them as JSON and CSV."""

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from cases import AUTHORS, Case
from regard.errors import UsageError
from regard.files import write_atomically


@dataclass
class Result:
    """The measurements of one case.

    Attributes:
        seconds: of one call, for each round.
        startup: seconds for conversion, compiling and the first call.
        times: speed-up over the same network (for a peer: the network that it is a
            peer of) in the authors' way, in the same rounds.
        to_twin: its time divided by its plain twin's on the same engine.
        peak, running: peak resident memory of a separate process in bytes (on a GPU: allocated
            memory), with and without start-up.
        fault: why it could not be measured, or None.
    """

    case: Case
    seconds: list[float] = field(default_factory=list)
    startup: float | None = None
    times: float | None = None
    to_twin: float | None = None
    peak: int | None = None
    running: int | None = None
    fault: str | None = None

    @property
    def median(self) -> float:
        """Median seconds of one call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the seconds of one call."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.case.batch / self.median


def compare(results: Sequence[Result]) -> None:
    """Fills in `times` and `to_twin` if the other case was measured as well."""
    good = {r.case: r for r in results if r.fault is None}
    by_what = {
        (c.kind, c.of, c.network, c.role, c.engine, c.precision, c.batch, c.size, c.threads): r
        for c, r in good.items()
    }

    def find(c: Case, network: str, role: str, engine: str, precision: str) -> Result | None:
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


def pooled(processes: Sequence[Sequence[Result]]) -> list[Result]:
    """The results of the same cases in several processes, with their rounds concatenated.

    Start-up and memory are the first process's: later ones find compiled kernels in the cache.
    """
    found = []
    for same in zip(*processes, strict=True):
        first = same[0]
        assert all(r.case == first.case for r in same)
        faults = [r.fault for r in same if r.fault is not None]
        seconds = [s for r in same for s in r.seconds]
        found.append(replace(first, seconds=seconds, fault=faults[0] if faults else None))
    compare(found)
    return found


def as_rows(
    results: Sequence[Result], machine: dict[str, Any], date: str
) -> list[dict[str, str | int | float]]:
    """Rows of the CSV: one for each result, with the machine in each."""
    rows: list[dict[str, str | int | float]] = []
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    for r in results:
        c = r.case
        row: dict[str, str | int | float] = {
            "kind": c.kind, "of": c.of, "network": c.network, "role": c.role,
            "engine": c.engine, "precision": c.precision, "batch": c.batch,
            "size": "x".join(map(str, c.size)), "threads": c.threads, "device": c.device,
            "median_ms": "", "low_ms": "", "high_ms": "", "images_per_s": "", "times": "",
            "to_twin": "", "rounds": len(r.seconds), "start_s": "",
            "peak_mb": "", "running_mb": "", "fault": r.fault or "", "date": date,
            "machine": machine["accelerator"] or machine["processor"],
            "extensions": " ".join(machine["extensions"]), "versions": versions,
        }  # fmt: skip
        if r.fault is None:
            low, high = r.quartiles
            row |= {"median_ms": _round(1e3 * r.median), "low_ms": _round(1e3 * low),
                    "high_ms": _round(1e3 * high), "images_per_s": _round(r.rate)}  # fmt: skip
        known = {"times": r.times, "to_twin": r.to_twin, "start_s": r.startup}
        row |= {name: _round(value) for name, value in known.items() if value is not None}
        memory = {"peak_mb": r.peak, "running_mb": r.running}
        row |= {name: round(value / 1e6) for name, value in memory.items() if value is not None}
        rows.append(row)
    return rows


def append_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file, which is created if it is missing.

    Raises:
        UsageError: the file has other columns.
        FileError: it can't be written.
    """
    before: list[dict[str, Any]] = []
    if path.exists() and path.stat().st_size:
        with path.open(newline="", encoding="utf-8") as file:
            before = list(csv.DictReader(file))
            if before and list(before[0]) != list(rows[0]):
                raise UsageError(f"{path} has other columns than this benchmark's")
    write_csv(path, [*before, *rows])


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a CSV file, replacing an existing one.

    Raises:
        FileError: it can't be written.
    """

    def write(beside: Path) -> None:
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


def slug(machine: dict[str, Any]) -> str:
    """A machine's name for file names, such as amd-epyc-9r14-2-threads."""
    name = machine["accelerator"] or f"{machine['processor']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def print_results(results: Sequence[Result], header: Sequence[str]) -> None:
    """Prints a table for each group."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    # in a pipe, don't cut a table to the width of a terminal
    wide = Console(width=None if console.is_terminal else 160, highlight=False)
    for line in header:
        console.print(line, soft_wrap=True, markup=False)

    def group(r: Result) -> tuple[Any, ...]:
        c = r.case
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
        headings = ["ms", "quartiles", "images/s", "x authors'", "time / twin's", "start s"]
        for heading in headings + ["peak MB", "running MB"] * with_memory:
            table.add_column(heading, justify="right", no_wrap=True)
        for r in rows:
            table.add_row(*_cells(r, with_memory))
        wide.print(table)


def _cells(r: Result, with_memory: bool) -> list[str]:
    c = r.case
    cells = [c.network, c.engine_label, c.precision]
    if r.fault is not None:
        return [*cells, "-"]  # the reason was logged
    low, high = r.quartiles
    cells += [
        f"{1e3 * r.median:.1f}", f"{1e3 * low:.1f} - {1e3 * high:.1f}", f"{r.rate:,.1f}",
        "" if r.times is None else f"{r.times:.2f}",
        "" if r.to_twin is None else f"{r.to_twin:.2f}",
        "" if r.startup is None else f"{r.startup:.1f}",
    ]  # fmt: skip
    if with_memory:
        cells += ["" if m is None else f"{m / 1e6:,.0f}" for m in (r.peak, r.running)]
    return cells


def _round(value: float) -> float:
    return float(f"{value:.5g}")
