"""Starts every row of every table of the papers: one training step on small images.

    python benchmarks/paper_rows.py [TABLE ...] [--first]

The commands are those in docs/papers.md, with 40 of the digits instead of the data set,
a small size, a small batch and one step; a row with a test at another size is tested that way, too.
`--first` starts only the first row of each table. The exit code is 1 if any row does not start.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from regard.papers import Row, Table, evaluate_words, load_table, tables, train_command

SIZE = 64  # for ImageNet and ultrasound networks; CIFAR networks take 32
CLASSES, EACH = 4, 10

# One step at the recipe's first rate: this replaces the recipe's schedule, which is longer than
# this run; the row's other changes (such as its label noise) remain.
ONE_STEP = ["--steps", "1", "--schedule", "constant", "--batch-size", "8", "--accumulate", "1"]
CHEAP = ["--faithfulness-images", "0", "--workers", "0", "--log", "none"]


def write_images(folder: Path) -> None:
    """Some of the digits as PNG files in class folders."""
    digits = load_digits()
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        for k, image in enumerate(digits.images[digits.target == label][:EACH]):
            pixels = np.kron(image / 16 * 255, np.ones((SIZE // 8, SIZE // 8))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{k}.png")


def commands(table: Table, row: Row, data: Path, out: Path) -> list[list[str]]:
    """The row's training, and its test if that differs from the training's."""
    words = train_command(table, row, str(data))
    words += ["--size", "32" if row.network.endswith("_cifar") else str(SIZE), *ONE_STEP, *CHEAP]
    if table.paper != "AG":
        words += ["--channels", "3"]  # as in the papers' data sets; the digits are gray
    test = evaluate_words(row)
    return [[*words, "--out", str(out)], *([["evaluate", str(out), *test]] if test else [])]


def start(table: Table, row: Row, data: Path, out: Path) -> str | None:
    """Runs the commands of a row; returns the last line of one that failed, else None."""
    for words in commands(table, row, data, out):
        done = subprocess.run(
            [sys.executable, "-m", "regard", *words], capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None


def main(words: list[str]) -> int:
    """Starts the rows of the tables named, or of all."""
    first = "--first" in words
    failed = count = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "digits")
        write_images(data)
        for key in [w for w in words if w != "--first"] or tables():
            table = load_table(key)
            for n, row in enumerate(table.rows[:1] if first else table.rows, start=1):
                started = time.perf_counter()
                fault = start(table, row, data, Path(folder, f"{key}-{n}"))
                count, failed = count + 1, failed + (fault is not None)
                seconds = time.perf_counter() - started
                mark = "ok  " if fault is None else "FAIL"
                print(f"{mark} {key} {n} {row.name}: {seconds:.0f} s", flush=True)
                if fault is not None:
                    print(f"     {fault}", flush=True)
    print(f"{count - failed} of {count} rows start")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
