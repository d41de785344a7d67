"""`regard predict` over many images: its memory, and its rate compared with those of its parts.

    python benchmarks/stream.py [RUN] [--images FOLDER] [--counts 1000 20000] [--engine auto]

The images are hard links (or copies) to the JPEG files of FOLDER, repeated, in a temporary
folder; default: 64 generated files of 320x240. RUN is a run's folder; default: an untrained
ag_sononet8 for 208x272 images. For each count a process runs `regard predict RUN FOLDER --csv ...`,
whose resident memory, including that of its children, is sampled ten times a second. The rate is
computed from the images between the first count and the last, which excludes start-up. Decoding
alone, in as many threads, and the network alone, on images in memory, are measured too.
Appends a row per count to benchmarks/stream.csv; the samples go to --samples FILE.
"""

import argparse
import csv
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

import regard
from regard.data.loading import default_workers
from regard.engines import open_engine, probe_images
from regard.engines.bench import time_in_rounds
from regard.machine import describe_machine
from regard.predict import BATCH
from results import append_csv

RESULTS = Path(__file__).with_name("stream.csv")


def make_run(folder: Path) -> Path:
    """An untrained AG-SonoNet-8, as a run's folder."""
    torch.manual_seed(0)
    regard.save_model(
        regard.create_model("ag_sononet8", num_classes=14), folder,
        class_names=[f"plane{i}" for i in range(14)],
    )  # fmt: skip
    return folder


def make_images(folder: Path, count: int = 64) -> Path:
    """Smooth noise as JPEG files of 320x240."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        small = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC)
        picture.save(folder / f"{k:03d}.jpg", quality=90)
    return folder


def repeat(files: list[Path], folder: Path, count: int) -> Path:
    """`count` names for these files, in folders of 1000."""
    for k, file in zip(range(count), itertools.cycle(files), strict=False):
        target = folder / f"{k // 1000:03d}" / f"{k:06d}{file.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:  # another file system, or too many links
            shutil.copyfile(file, target)
    return folder


def resident(process: psutil.Process) -> int:
    """Bytes of a process and its children; 0 when it has ended."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:
        pass
    return total


def predict(
    run: Path, folder: Path, engine: str, precision: str, threads: int, scratch: Path
) -> dict[str, Any]:
    """Runs the command; returns its seconds, samples of (second, bytes), and prediction count."""
    out = scratch / "answers.csv"
    command = [sys.executable, "-m", "regard", "predict", run, folder, "--csv", out, "--top", "1",
               "--engine", engine, "--precision", precision]  # fmt: skip
    started = time.perf_counter()
    samples = []
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([*map(str, command)], env=environment)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        samples.append((time.perf_counter() - started, resident(watched)))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        sys.exit(f"regard predict ended with {process.returncode}")
    with out.open(newline="", encoding="utf-8") as file:
        answered = sum(1 for _ in csv.DictReader(file))
    return {"seconds": seconds, "samples": samples, "answered": answered}


def decoding(classifier: regard.Classifier, files: list[Path], least: float) -> float:
    """Images per second of decoding and resizing alone, in as many threads as `regard predict`."""
    done, started = 0, time.perf_counter()
    with ThreadPoolExecutor(default_workers()) as pool:
        while time.perf_counter() - started < least:
            done += len(list(pool.map(classifier.decode, files)))
    return done / (time.perf_counter() - started)


def network(classifier: regard.Classifier, files: list[Path], rounds: int) -> float:
    """Images per second of the network alone, in batches like those of `regard predict`."""
    images = torch.stack([classifier.decode(f) for f in (files * BATCH)[:BATCH]])
    (seconds,) = time_in_rounds([lambda: classifier.probabilities(images)], rounds)
    return BATCH / statistics.median(seconds)


def main() -> None:
    """Prints and appends one row per count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--counts", nargs="+", type=int, default=[1000, 20000])
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--samples", type=Path, help="CSV of count, second, resident MB")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="regard-stream-") as name:
        scratch = Path(name)
        run = args.run or make_run(scratch / "run")
        source = args.images or make_images(scratch / "images")
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not files:
            sys.exit(f"no JPEG file below {source}")
        classifier = regard.load(run)
        engine = "eager fp32"
        if args.engine != "eager" or args.precision != "auto":
            classifier.engine = open_engine(
                classifier, args.engine, precision=args.precision, count=max(args.counts),
                images=probe_images([lambda f=f: classifier.decode(f) for f in files[:32]]),
            )  # fmt: skip
            engine = repr(classifier.engine)
        alone = {"decoding": decoding(classifier, files, 3.0),
                 "network": network(classifier, files, args.rounds)}  # fmt: skip
        found = []
        for count in args.counts:
            folder = repeat(files, scratch / f"of-{count}", count)
            print(f"{count} images", file=sys.stderr, flush=True)
            found.append(
                predict(run, folder, args.engine, args.precision, args.threads, scratch)
            )  # fmt: skip
            shutil.rmtree(folder)
    machine = describe_machine()
    first, last = found[0], found[-1]
    rate = (args.counts[-1] - args.counts[0]) / (last["seconds"] - first["seconds"]) if (
        len(found) > 1
    ) else args.counts[0] / first["seconds"]  # fmt: skip
    rows = [
        {
            "network": (classifier.model.pretrained_cfg or {}).get("architecture", ""),
            "size": "x".join(map(str, classifier.preprocess.input_size)), "engine": engine,
            "threads": args.threads, "images": count, "answered": f["answered"],
            "seconds": f"{f['seconds']:.2f}",
            "peak_mb": round(max(b for _, b in f["samples"]) / 1e6),
            "images_per_s": f"{rate:.1f}", "decoding_per_s": f"{alone['decoding']:.1f}",
            "network_per_s": f"{alone['network']:.1f}",
            "date": time.strftime("%Y-%m-%d"), "machine": machine["processor"],
            "torch": machine["versions"]["torch"],
        }
        for count, f in zip(args.counts, found, strict=True)
    ]  # fmt: skip
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()))
    append_csv(args.out, rows)
    if args.samples:
        samples = [
            {"images": count, "second": f"{second:.1f}", "resident_mb": round(b / 1e6)}
            for count, f in zip(args.counts, found, strict=True)
            for second, b in f["samples"]
        ]
        args.samples.unlink(missing_ok=True)
        append_csv(args.samples, samples)


if __name__ == "__main__":
    main()
