"""How prediction's time and memory grow with image size, batch size and threads.

    python benchmarks/scaling.py [--engine NAME] [--precision bf16] [--rounds 5] [--models NAME ...]
    python benchmarks/scaling.py --plot-only      # draws the pictures from the CSV again

Each point is measured in a separate process, for its peak memory; the time is the median of the
rounds after warming up. Eager fp32 and the fastest engine are measured: --engine and --precision,
or by default the fastest in benchmarks/performance-MACHINE.csv, or else in a short measurement.
Overwrites benchmarks/scaling-MACHINE.csv and docs/images/scaling-WHAT-MACHINE.svg.
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from cases import AUTHORS, DEFAULT_MODELS, Case, input_size
from measure import measure, plan
from regard.machine import describe_machine
from results import as_rows, slug, write_csv
from subprocesses import measure_alone

FOLDER = Path(__file__).parent
IMAGES = FOLDER.parent / "docs/images"
SHARES = (0.5, 0.75, 1.0, 1.5)  # fractions of the network's own height and width
BATCHES = (1, 4, 8, 16)
THREADS = (1, 2)
BATCH = 8  # unless the batch size varies
# Okabe and Ito's colors, which color-blind people can distinguish; the line style is the engine
COLORS = {"cbam_resnet50": "#0072B2", "attention56": "#D55E00", "ag_sononet8": "#009E73"}
LINES = {"eager": ("--", "o"), "fastest": ("-", "s")}


def say(line: str) -> None:
    """Prints progress."""
    print(line, file=sys.stderr, flush=True)


def fastest(name: str, performance: Path) -> tuple[str, str]:
    """The engine and precision that predicted fastest."""
    rows = []
    if performance.exists():
        with performance.open(newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if r["of"] == name]
    if not rows:
        say(f"{name}: looking for the fastest engine")
        rows = [{k: str(v) for k, v in r.items()} for r in measure([name], rounds=3).rows()]
    good = [
        r for r in rows
        if r["kind"] == "predict" and r["role"] == "network" and r["batch"] == str(BATCH)
        and not r["fault"] and r["engine"] != AUTHORS
    ]  # fmt: skip
    best = min(good, key=lambda r: float(r["median_ms"]))
    return best["engine"], best["precision"]


def points(
    name: str, engine: str, precision: str, shares: list[float], batches: list[int],
    threads: list[int],
) -> list[tuple[str, Case]]:  # fmt: skip
    """(what varies, case): along one axis at a time; their common point is included once."""
    channels, height, width = input_size(name, None)
    base = Case(
        "predict", name, name, "network", engine, precision, BATCH, (channels, height, width),
        max(threads),
    )  # fmt: skip
    found = [("base", base)]
    for share in shares:
        # multiples of 16, which every network here accepts
        size = (channels, *(max(32, round(side * share / 16) * 16) for side in (height, width)))
        found.append(("size", replace(base, size=size)))
    found += [("batch", replace(base, batch=batch)) for batch in batches]
    found += [("threads", replace(base, threads=count)) for count in threads]
    return [found[0], *((what, c) for what, c in found[1:] if c != base)]


def draw(rows: list[dict[str, str]], name: str, folder: Path) -> list[Path]:
    """One figure each for size, batch and threads, with time and memory side by side."""
    matplotlib.rcParams["svg.hashsalt"] = "regard"
    written = []
    for what in ("size", "batch", "threads"):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), facecolor="white")
        for model in dict.fromkeys(r["network"] for r in rows):
            for which in LINES:
                mine = [
                    r for r in rows
                    if r["network"] == model and r["which"] == which and not r["fault"]
                    and r["varies"] in (what, "base")
                ]  # fmt: skip
                base = [r for r in mine if r["varies"] == "base"]
                if not base:
                    continue
                base_pixels = pixels(base[0]["size"])
                x = [
                    pixels(r["size"]) / base_pixels if what == "size" else int(r[what])
                    for r in mine
                ]
                order = sorted(range(len(x)), key=x.__getitem__)
                line, marker = LINES[which]
                label = f"{model}, {mine[0]['engine']} {mine[0]['precision']}"
                per_image = [float(r["median_ms"]) / int(r["batch"]) for r in mine]
                memory = [float(r["peak_mb"]) for r in mine]
                for axis, y in zip(axes, (per_image, memory), strict=True):
                    axis.plot(
                        [x[k] for k in order], [y[k] for k in order], line, marker=marker,
                        markersize=4, color=COLORS.get(model, "#000000"), label=label,
                    )  # fmt: skip
        wording = {"size": "pixels, relative to the network's own input",
                   "batch": "batch size", "threads": "threads"}[what]  # fmt: skip
        ticks = sorted({int(r[what]) for r in rows}) if what != "size" else None
        for axis, title in zip(axes, ("ms an image", "peak memory, MB"), strict=True):
            axis.set_xlabel(wording)
            axis.set_title(title, loc="left", fontsize=10)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            if ticks:
                axis.set_xticks(ticks)
        axes[0].set_yscale("log")  # AG-SonoNet-8 is much faster than the others
        axes[1].set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
        figure.tight_layout(rect=(0, 0.14, 1, 1))
        path = folder / f"scaling-{what}-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        written.append(path)
    return written


def pixels(size: str) -> int:
    """Pixels of an image of size "3x224x224"."""
    _, height, width = map(int, size.split("x"))
    return height * width


def main() -> None:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--engine")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=Path, default=IMAGES, help="folder")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(max(args.threads))
    machine = describe_machine()
    name = slug(machine)
    out = args.out or FOLDER / f"scaling-{name}.csv"
    if not args.plot_only:
        plan(args.models, engines=[args.engine] if args.engine else None)  # wrong names first
        planned = []
        for model in args.models:
            chosen = (args.engine, args.precision) if args.engine else fastest(
                model, FOLDER / f"performance-{name}.csv"
            )  # fmt: skip
            for which, (engine, precision) in (("eager", ("eager", "fp32")), ("fastest", chosen)):
                planned += [
                    (which, what, c)
                    for what, c in points(
                        model, engine, precision, args.shares, args.batches, args.threads
                    )
                ]
        measured = []
        for number, (which, what, c) in enumerate(planned, start=1):
            size = "x".join(map(str, c.size))
            say(f"{number}/{len(planned)} {c}, {size}, batch {c.batch}, {c.threads} threads")
            results = measure_alone([c], args.rounds)
            if results[0].fault is not None:
                say(f"  {results[0].fault}")
            (row,) = as_rows(results, machine, time.strftime("%Y-%m-%d"))
            measured.append({"which": which, "varies": what, **row})
        write_csv(out, measured)
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for path in draw(rows, name, args.pictures):
        say(f"written: {path}")


if __name__ == "__main__":
    main()
