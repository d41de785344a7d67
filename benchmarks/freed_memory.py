"""The gain from keeping freed memory for later tensors, on the CPU.

    python benchmarks/freed_memory.py [--processes 3] [--calls 3] [--batch 32] [--models NAME ...]

Training steps (bf16 if the machine computes in it, channels_last) and prediction (eager,
fp32) with freed memory kept, as in Regard's own runs, and with glibc's defaults. Each is measured
in new processes, alternately, and the calls of all processes are pooled.
Overwrites benchmarks/freed-memory-MACHINE.csv; `python scripts/make_tables.py` writes
its table.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import cases
from cases import DEFAULT_MODELS, Case, input_size, prepare
from regard.engines import backends
from regard.machine import describe_machine, has_bf16
from results import slug, write_csv
from subprocesses import peak_memory

FOLDER = Path(__file__).parent


def measure(case: Case, kept: bool, calls: int) -> tuple[list[float], int, int]:
    """Seconds of each step, page faults per step, and the process's peak memory in bytes."""
    torch.set_num_threads(case.threads)
    if not kept:
        cases.keep_freed_memory = backends.keep_freed_memory = lambda: False
    step, _ = prepare(case)
    step()
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return seconds, faults // calls, peak_memory()


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    machine = describe_machine()
    threads = torch.get_num_threads()
    rows: list[dict[str, str | int | float]] = []
    for name in args.models:
        size = input_size(name, None)
        for kind, precision in (("train", "bf16" if has_bf16() else "fp32"), ("predict", "fp32")):
            case = Case(kind, name, name, "network", "eager", precision, args.batch, size, threads)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            faults, peaks = {}, {}
            for _ in range(args.processes):
                for kept in (False, True):
                    context = multiprocessing.get_context("spawn")
                    with ProcessPoolExecutor(1, mp_context=context) as pool:
                        found, faults[kept], peaks[kept] = pool.submit(
                            measure, case, kept, args.calls
                        ).result()
                    seconds[kept] += found
            median = {kept: statistics.median(s) for kept, s in seconds.items()}
            row = {
                "network": name, "kind": kind, "precision": precision, "batch": args.batch,
                "threads": threads, "usual_ms": f"{1e3 * median[False]:.1f}",
                "kept_ms": f"{1e3 * median[True]:.1f}",
                "times": f"{median[False] / median[True]:.2f}",
                "usual_faults": faults[False], "kept_faults": faults[True],
                "usual_peak_mb": round(peaks[False] / 1e6),
                "kept_peak_mb": round(peaks[True] / 1e6), "calls": len(seconds[True]),
                "date": time.strftime("%Y-%m-%d"), "machine": machine["processor"],
                "torch": torch.__version__,
            }  # fmt: skip
            print(*row.values(), sep=", ", file=sys.stderr, flush=True)
            rows.append(row)
    out = args.out or FOLDER / f"freed-memory-{slug(machine)}.csv"
    write_csv(out, rows)


if __name__ == "__main__":
    main()
