"""A study on a local Ray cluster of two nodes has the same results as without Ray.

    python benchmarks/ray_study.py [OUT]

`regard study` trains two small networks on `digits` with two seeds, and a third row that can't be
trained: once without Ray, and once with `--ray` on a cluster of two nodes with one CPU each. A
Ray worker is killed with SIGKILL while its run trains. At the end study.json must be the same,
with the failed runs listed, and the killed worker's run finished. Needs the extra `ray`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from ray.cluster_utils import Cluster

STUDY = """\
title = "Gates on digits"
recipe = "demo"

[[rows]]
name = "SonoNet-8"
network = "sononet8"

[[rows]]
name = "AG-SonoNet-8"
network = "ag_sononet8"

[[rows]]
name = "batches of one image"
network = "sononet8"
changes = { batch_size = 1 }
"""
FLAGS = [
    "--seeds", "2", "--size", "16", "--limit", "600", "--epochs", "6", "--workers", "0",
    "--lr", "0.02", "--faithfulness-images", "4", "--log", "none",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(out: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """Starts the study in a new process."""
    words = ["study", str(out.parent / "gates.toml"), "digits", "--out", str(out), *FLAGS, *flags]
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "regard", *words], env=ENVIRONMENT, stdout=log, stderr=log
        )


def worker_in_training(out: Path) -> psutil.Process | None:
    """A Ray worker whose run is training now."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" not in words or not any(str(out) in word for word in words):
            continue
        note = Path(f"{words[words.index('--out') + 1]}.progress")
        if note.is_file() and note.read_text(encoding="utf-8").strip():
            return process.parent()
    return None


def killed_once(study: "subprocess.Popen[bytes]", out: Path) -> str:
    """Kills a worker as soon as one trains, and returns a description of it."""
    while study.poll() is None:
        try:
            worker = worker_in_training(out)
        except (psutil.Error, OSError, ValueError):
            worker = None
        if worker is not None and worker.pid != study.pid:
            name = worker.name()
            worker.send_signal(signal.SIGKILL)
            return name
        time.sleep(0.05)
    return "none"


def result(out: Path) -> dict:
    """study.json, with OUT for the study's folder."""
    return json.loads((out / "study.json").read_text().replace(str(out), "OUT"))


def main() -> int:
    """Runs both studies and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/ray-study"))
    args = parser.parse_args()
    out = args.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "gates.toml").write_text(STUDY, encoding="utf-8")
    started = time.monotonic()
    start(out / "without").wait()
    print(f"without Ray: {time.monotonic() - started:.0f} s", flush=True)
    os.environ.setdefault("RAY_worker_niceness", "0")  # default 15: on a busy machine they starve
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        started = time.monotonic()
        study = start(out / "with", "--ray", cluster.address)
        print(f"killed while it trained: {killed_once(study, out / 'with')}", flush=True)
        code = study.wait()
        print(f"with Ray: {time.monotonic() - started:.0f} s, exit code {code}", flush=True)
    finally:
        cluster.shutdown()
    a, b = result(out / "without"), result(out / "with")
    print(f"{a['done']} of {a['total']} runs done without Ray, {b['done']} with; failed: "
          f"{sorted(b['failed'].values())}")  # fmt: skip
    print("study.json is the same" if a == b else f"these differ: {[k for k in a if a[k] != b[k]]}")
    return 0 if a == b and code == 1 and len(b["failed"]) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
