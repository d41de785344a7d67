"""Prediction and training of three networks, each engine beside the authors' way and its twin.

    python benchmarks/performance.py [OUT.csv] [--rounds 3] [--turns 5] [--models NAME ...]

What `regard bench --train --peers --memory` measures of cbam_resnet50 and attention56 at
224x224 and ag_sononet8 at 208x272, batch 8, in every engine that is installed. Each network is
measured in several rounds, each in a new process, as where memory comes to lie differs from
process to process and stays; their turns are put together. What torch.compile keeps begins
empty. Writes benchmarks/performance-MACHINE.csv anew; `python scripts/make_tables.py` then
writes the tables of docs/performance.md. For figures worth keeping nothing else may run on the
machine.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from regard.bench import DEFAULT_MODELS, Report, append_csv, pooled, print_results, run_bench, slug

FOLDER = Path(__file__).parent


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def in_rounds(model: str, rounds: int, memory: bool, **choices: Any) -> Report:
    """A network's report over several processes."""
    reports = []
    for number in range(rounds):
        say(f"{model}, round {number + 1} of {rounds}")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            task = pool.submit(
                run_bench, [model], memory=memory and number == 0, echo=say, **choices
            )
            reports.append(task.result())
    return replace(reports[0], results=pooled([r.results for r in reports]))


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5, help="of a round")
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--size", nargs=2, type=int, help="to try it out with")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="regard-compiled-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        reports = [
            in_rounds(
                model, args.rounds, not args.no_memory, turns=args.turns, threads=args.threads,
                device=args.device, engines=args.engines, train=not args.no_train,
                peers=not args.no_peers, batch_sizes=args.batch_sizes,
                size=tuple(args.size) if args.size else None,
            )
            for model in args.models
        ]  # fmt: skip
    whole = replace(reports[0], results=[r for report in reports for r in report.results])
    print_results(whole.results, whole.header)
    out = args.out or FOLDER / f"performance-{slug(whole.machine)}.csv"
    beside = out.with_name(f".{out.name}.writing")
    beside.unlink(missing_ok=True)
    append_csv(beside, whole.rows())
    beside.replace(out)
    say(f"written to {out}")


if __name__ == "__main__":
    main()
