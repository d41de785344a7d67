"""Prediction and training of three networks, each engine beside the authors' way and its twin.

    python benchmarks/performance.py [OUT.csv] [--turns 15] [--models NAME ...] [--no-train]

What `regard bench --train --memory` measures of cbam_resnet50 and attention56 at 224x224 and
ag_sononet8 at 208x272, batch 8, in every engine that is installed. Writes
benchmarks/performance-MACHINE.csv anew; `python scripts/make_tables.py` then writes the tables
of docs/performance.md. For figures worth keeping nothing else may run on the machine.
"""

import argparse
import sys
from pathlib import Path

from regard.bench import DEFAULT_MODELS, append_csv, print_results, run_bench, slug

FOLDER = Path(__file__).parent


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--size", nargs=2, type=int, help="to try it out with")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-train", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    report = run_bench(
        args.models, turns=args.turns, memory=not args.no_memory, threads=args.threads,
        device=args.device, engines=args.engines, train=not args.no_train, peers=args.peers,
        batch_sizes=args.batch_sizes, size=tuple(args.size) if args.size else None,
        echo=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print_results(report.results, report.header)
    out = args.out or FOLDER / f"performance-{slug(report.machine)}.csv"
    beside = out.with_name(f".{out.name}.writing")
    beside.unlink(missing_ok=True)
    append_csv(beside, report.rows())
    beside.replace(out)
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
