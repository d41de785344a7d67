"""A study that is killed repeatedly ends with the same study.json as an undisturbed one.

    python benchmarks/killed_study.py [OUT] [--kills 20] [--seed 0]

`regard study` trains two small networks on `digits` with several seeds, twice: once undisturbed,
and once killed with SIGKILL at random moments and restarted with the same command. For each
seed of the study it is killed five times: at the start of a run, during training, during evaluation
and report, during the separate test of a row, and between two runs, while the results
are written. The delay of each kill after the beginning of its phase is drawn from --seed; the phase
in which it happened is read from the study's processes and printed. At the end study.json and the
weights, predictions and scores of all runs must be identical, byte by byte.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

STUDY = """\
title = "Gates on digits"
recipe = "demo"

[[rows]]
name = "SonoNet-8"
network = "sononet8"

[[rows]]
name = "AG-SonoNet-8"
network = "ag_sononet8"
evaluation = { size = 24 }
"""
FLAGS = [
    "--size", "16", "--limit", "600", "--epochs", "6", "--workers", "0",
    "--lr", "0.02", "--faithfulness-images", "4", "--log", "none",
]  # fmt: skip
PHASES = {  # what to wait for, and the longest delay after its beginning, in seconds
    "start": 4.0, "training": 2.0, "evaluation": 2.5, "test": 2.5, "between runs": 0.1,
}  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out: Path, seeds: int) -> list[str]:
    """The study's command, the same each time."""
    words = ["study", str(out.parent / "gates.toml"), "digits", "--out", str(out), *FLAGS]
    return [sys.executable, "-m", "regard", *words, "--seeds", str(seeds)]


def phase_of(study: psutil.Process, out: Path) -> str:
    """The current phase of the study."""
    for child in study.children():
        try:
            words = child.cmdline()
        except psutil.Error:
            continue
        if "evaluate" in words:
            return "test"
        if "train" in words:
            note = Path(f"{words[words.index('--out') + 1]}.progress")
            try:
                step, total = map(int, note.read_text(encoding="utf-8").split())
            except (OSError, ValueError):
                return "start"
            return "training" if step < total else "evaluation"
    return "between runs" if any(out.glob("runs/*/*/report.html")) else "start"


def kill_in(phase: str, delay: float, out: Path, seeds: int) -> str | None:
    """Starts the study and kills it in a phase; returns where that was; None: the study ended."""
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command(out, seeds), env=ENVIRONMENT, stdout=log, stderr=log)
    study = psutil.Process(process.pid)
    has_run = False
    while process.poll() is None:
        now = phase_of(study, out)
        has_run = has_run or now not in ("start", "between runs")
        if now == phase and (has_run or phase != "between runs"):
            time.sleep(delay)
            fell = phase_of(study, out) if process.poll() is None else None
            process.send_signal(signal.SIGKILL)
            process.wait()
            return fell
        time.sleep(0.02)  # a poll costs about a millisecond
    return None


def bytes_of(out: Path) -> dict[str, bytes]:
    """The results and their sources, by path, with OUT for the study's folder."""
    names = ("study.json", "model.safetensors", "predictions*.npz", "faithfulness.json")
    files = sorted(path for name in names for path in out.rglob(name))
    return {
        str(path.relative_to(out)): path.read_bytes().replace(str(out).encode(), b"OUT")
        for path in files
    }


def main() -> int:
    """Runs both studies and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/killed-study"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    (args.out / "gates.toml").write_text(STUDY, encoding="utf-8")
    whole, killed = args.out / "whole", args.out / "killed"
    seeds = math.ceil(args.kills / len(PHASES))
    started = time.monotonic()
    subprocess.run(command(whole, seeds), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    rng = random.Random(args.seed)
    fell: list[str] = []
    for n, phase in zip(range(1, args.kills + 1), itertools.cycle(PHASES), strict=False):
        where = kill_in(phase, rng.uniform(0, PHASES[phase]), killed, seeds)
        if where is None:
            break
        fell.append(where)
        done = len(list(killed.rglob("report.html")))
        print(f"kill {n}: {where}; {done} of {2 * seeds} runs trained", flush=True)
    subprocess.run(command(killed, seeds), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    a, b = bytes_of(whole), bytes_of(killed)
    differ = sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))
    counts = {phase: fell.count(phase) for phase in PHASES}
    print(f"{len(fell)} kills: {json.dumps(counts)}; {time.monotonic() - started:.0f} s in all")
    print(f"{len(a)} files compared, " + (f"these differ: {differ}" if differ else "all the same"))
    return 1 if differ or len(fell) < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
