"""Starts every row of every table of the papers: one training step on small images.

    python benchmarks/paper_rows.py [TABLE ...]

The command is the one that docs/papers.md prints, with small images in place of the data set, a
small batch and one step. It exits with 1 if any row does not start.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from regard.papers import Row, Table, load_table, tables, train_command

SIZES = {"RAN": "64", "CBAM": "64", "AG": "64"}
RECIPE = {  # what a full run of the recipe needs and one step does not
    "attention-cifar": ["--milestones"],
    "attention-imagenet": ["--milestones"],
    "cbam-imagenet": ["--milestones"],
    "ag-sononet": ["--milestones", "--lr-factors"],
}


def start(table: Table, row: Row, out: Path) -> tuple[bool, str]:
    """Trains one step of a row; whether it went, and what was said last."""
    size = "32" if row.network.endswith("_cifar") else SIZES[table.paper or "RAN"]
    words = train_command(table, row, "digits")
    words += [
        "--size",
        size,
        "--steps",
        "1",
        "--batch-size",
        "8",
        "--limit",
        "40",
        "--out",
        str(out),
    ]
    words += ["--faithfulness-images", "0", "--schedule", "constant"]
    done = subprocess.run(
        [sys.executable, "-m", "regard", *words], capture_output=True, text=True, timeout=600
    )
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def main() -> int:
    """Starts the rows of the tables named, or of all."""
    failed = count = 0
    for key in sys.argv[1:] or tables():
        table = load_table(key)
        for n, row in enumerate(table.rows):
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                good, said = start(table, row, Path(folder, "run"))
            count += 1
            failed += not good
            seconds = time.perf_counter() - started
            print(
                f"{'ok  ' if good else 'FAIL'} {key} {n + 1} {row.name}: {seconds:.0f} s",
                flush=True,
            )
            if not good:
                print(f"     {said}")
    print(f"{count - failed} of {count} rows start")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
