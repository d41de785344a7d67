"""Prediction and training of three networks, compared with the authors' way and the plain twin.

    python benchmarks/performance.py [OUT.csv] [--processes 3] [--rounds 5] [--models NAME ...]

Measures cbam_resnet50 and attention56 at 224x224 and ag_sononet8 at 208x272, batch 8, in every
engine that is installed, with peers and peak memory. Each network is measured in several new
processes, because the placement of memory differs between processes and persists within one; their
rounds are pooled. torch.compile's cache is empty at the start. Overwrites
benchmarks/performance-MACHINE.csv; `python scripts/make_tables.py` then writes the tables of
docs/performance.md. For results to be published nothing else may run on the machine.
"""

import argparse
import logging
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import DEFAULT_MODELS
from measure import Report, measure
from regard.log import info_on_stderr, show_messages
from results import append_csv, pooled, print_results, slug, write_csv

FOLDER = Path(__file__).parent
log = logging.getLogger("regard.benchmarks")


def _measure(model: str, **choices: Any) -> Report:
    show_messages()
    with info_on_stderr():
        return measure([model], **choices)


def in_processes(model: str, processes: int, memory: bool, **choices: Any) -> Report:
    """A network's report over several processes."""
    reports = []
    for number in range(processes):
        log.info("%s, process %d of %d", model, number + 1, processes)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            task = pool.submit(_measure, model, memory=memory and number == 0, **choices)
            reports.append(task.result())
    return replace(reports[0], results=pooled([r.results for r in reports]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds of each process")
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--size", nargs=2, type=int, help="height and width, for a quick try")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--append", action="store_true", help="add to OUT instead of replacing it")
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    args = arguments()
    show_messages()
    with tempfile.TemporaryDirectory(prefix="regard-compiled-") as cache, info_on_stderr():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        reports = [
            in_processes(
                model, args.processes, not args.no_memory, rounds=args.rounds,
                threads=args.threads, device=args.device, engines=args.engines,
                train=not args.no_train, peers=not args.no_peers, batch_sizes=args.batch_sizes,
                size=tuple(args.size) if args.size else None,
            )
            for model in args.models
        ]  # fmt: skip
    whole = replace(reports[0], results=[r for report in reports for r in report.results])
    print_results(whole.results, whole.header)
    out = args.out or FOLDER / f"performance-{slug(whole.machine)}.csv"
    (append_csv if args.append else write_csv)(out, whole.rows())
    print(f"written to {out}")


if __name__ == "__main__":
    main()
