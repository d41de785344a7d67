"""Counts the parameters of every network and writes the tables of the docs.

    python scripts/make_tables.py            # writes zoo.csv and the tables of docs/
    python scripts/make_tables.py --check    # says what would change; exit code 1 if anything

It writes the columns `parameters` and `macs` of src/regard/models/zoo.csv, and in
docs/models.md, docs/training.md, docs/results.md and docs/performance.md the text between
two comments that name this script: from benchmarks/recipes.csv, benchmarks/results, and, machine
by machine, from benchmarks/performance-*.csv, scaling-*.csv, freed-memory-*.csv and stream.csv.
"""

import csv
import io
import json
import re
import shlex
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from regard import create_model
from regard.models.counting import count_multiply_adds, count_parameters
from regard.papers import PAPERS, evaluate_words, load_table, tables, train_command
from regard.papers.figures import printed_result, printed_size

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "src/regard/models/zoo.csv"
MODELS = ROOT / "docs/models.md"
PAPERS_PAGE = ROOT / "docs/papers.md"
TRAINING = ROOT / "docs/training.md"
RESULTS_PAGE = ROOT / "docs/results.md"
PERFORMANCE = ROOT / "docs/performance.md"
BENCHMARKS = ROOT / "benchmarks"
RECIPES = BENCHMARKS / "recipes.csv"
RESULTS = BENCHMARKS / "results"
AUTHORS = "eager-nchw"  # benchmarks/cases.py
NOTHING = "Not measured yet.\n"
TABLE = re.compile(
    r"(<!-- table: scripts/make_tables.py[ a-z]*-->\n).*?(<!-- end of table -->)", re.S
)


@dataclass(frozen=True)
class Target:
    """Performance targets of a network.

    Attributes:
        predict: speed-up over the authors' way, in fp32 or bf16.
        int8: the same in INT8; None: no separate target.
        twin: largest ratio of its time to its plain twin's on the same engine; None: no twin.
        train: speed-up of a training step over the authors' way.
    """

    predict: float
    int8: float | None
    twin: float | None
    train: float


TARGETS = {
    "cbam_resnet50": Target(3.3, 5.0, 1.12, 2.4),
    "attention56": Target(3.4, 5.0, None, 2.4),
    "ag_sononet8": Target(5.0, None, 1.0, 1.8),
}
TARGET_BATCH = "8"


def count(name: str) -> tuple[str, int, int]:
    """Input size, parameters and multiply-adds (half of torch's flops) for one image."""
    with torch.device("meta"):
        model = create_model(name)
    size = model.default_cfg["input_size"]
    return "x".join(map(str, size)), count_parameters(model), count_multiply_adds(model, size)


def counted_csv(text: str) -> str:
    """zoo.csv with its counts computed anew."""
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        row["input"], row["parameters"], row["macs"] = count(row["name"])  # type: ignore[assignment]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown_table(text: str) -> str:
    """The table of networks in docs/models.md, with the papers' figures."""
    lines = [
        "| Network | Input | Parameters (M) | paper | Multiply-adds (G) | paper | Paper's result |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in csv.DictReader(io.StringIO(text)):
        parameters, gmacs = int(row["parameters"]) / 1e6, int(row["macs"]) / 1e9
        mark = " ¹" if row["note"].startswith("stride") else " ²" if row["note"] else ""
        printed, printed_gmacs = printed_size(row["name"])
        lines.append(
            f"| `{row['name']}` | {row['input']} | {parameters:.3f} | {printed} "
            f"| {gmacs:.3f} | {printed_gmacs}{mark if printed_gmacs else ''} "
            f"| {printed_result(row['name'])} |"
        )
    return "\n".join(lines) + "\n"


def recipes_table(text: str) -> str:
    """The table of short runs in docs/training.md."""
    lines = [
        "| Recipe | Images | Steps | Loss, first to last epoch | Test accuracy (95 % interval) "
        "| s | Machine and date |",
        "|---|---:|---:|---|---|---:|---|",
    ]
    commands = []
    for row in csv.DictReader(io.StringIO(text)):
        shares = [f"{100 * float(row[k]):.1f}" for k in ("test accuracy", "low", "high")]
        lines.append(
            f"| `{row['recipe']}` | {row['training images']} | {row['steps']} "
            f"| {row['first loss']} to {row['last loss']} "
            f"| {shares[0]} % ({shares[1]}–{shares[2]}) | {row['seconds in all']} "
            f"| {row['machine']}, torch {row['torch']}, {row['date']} |"
        )
        commands.append(row["command"])
    return "\n".join([*lines, "", "```", *commands, "```"]) + "\n"


# ---------------------------------------------------------------------------- docs/results.md
OF_THE_MACHINE = ("seed", "compile", "workers", "memory", "save_minutes", "faithfulness_images")
"""Recipe entries that change no result, or over which a row is averaged."""


@dataclass(frozen=True)
class Kept:
    """One run in benchmarks/results, as stored by scripts/keep_result.py."""

    benchmark: str
    network: str
    recipe: str  # entries that affect the result, as JSON: without OF_THE_MACHINE
    command: str  # without seed and folder, which differ between the runs of a row
    seed: int
    accuracy: tuple[float, float, float]  # with its interval over images
    epochs: float
    hours: float
    crop: str  # what the test saw of each image, where not all of it
    where: str


def read_kept(folder: Path) -> Kept:
    """Reads one folder."""
    run, about, tested = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("run", "about", "evaluation")
    )
    recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
    values = tomllib.loads(recipe)
    words = shlex.split(recipe.splitlines()[1].lstrip("# "))
    for flag in ("--seed", "--out"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    words = [w for w in words if w != "--resume"]
    facts, top1 = run["facts"], tested["metrics"]["top1"]
    threads = facts["threads"]
    arguments = "".join(f", {k}={v}" for k, v in run["plan"]["model_args"].items())
    gates = f" + {values['graft'].upper()}" if values.get("graft", "none") != "none" else ""
    crop = run["plan"]["preprocess"]["crop_pct"]
    return Kept(
        about["benchmark"], f"`{run['plan']['model']}`{gates}{arguments}",
        json.dumps({k: v for k, v in values.items() if k not in OF_THE_MACHINE}),
        shlex.join(words), values["seed"], (top1["value"], top1["low"], top1["high"]),
        facts["epochs"], facts["seconds"] / 3600,
        f", center crop of {crop:g} of the shorter side" if crop < 1 else "",
        f"{about['machine']}, {threads} thread{'s' * (threads > 1)}, "
        f"{'bf16' if facts['bf16'] else 'fp32'}, commit {about['commit']}, {run['started'][:10]}",
    )  # fmt: skip


def _hours(runs: Sequence[Kept]) -> str:
    """The mean hours of the runs on each machine."""
    by_machine: dict[str, list[float]] = {}
    for run in runs:
        by_machine.setdefault(run.where, []).append(run.hours)
    return " and ".join(f"{statistics.mean(hours):.2g}" for hours in by_machine.values())


def results_table(folder: Path) -> str:
    """The public benchmarks: one row per command, averaged over its seeds."""
    marks = tomllib.loads((folder / "benchmarks.toml").read_text(encoding="utf-8"))
    kept = [read_kept(path.parent) for path in sorted(folder.glob("*/about.json"))]
    if not kept:
        return NOTHING
    lines = [
        "| Benchmark | Network | Test accuracy | Training | Others have |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for key, mark in marks.items():
        of_mark = [k for k in kept if k.benchmark == key]
        for row in dict.fromkeys((k.network, k.recipe) for k in of_mark):
            runs = [k for k in of_mark if (k.network, k.recipe) == row]
            first, values = runs[0], [100 * k.accuracy[0] for k in runs]
            if len(runs) > 1:
                found = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"
            else:
                low, high = (100 * x for x in first.accuracy[1:])
                found = f"{values[0]:.2f} % ({low:.2f} to {high:.2f})"
            lines.append(
                f"| {mark['title']} | {first.network} | {found}, {len(runs)} "
                f"seed{'s' * (len(runs) > 1)} | {first.epochs:.3g} epochs, {_hours(runs)} h "
                f"| {mark['mark'] or '–'} |"
            )
            for how in dict.fromkeys((k.command, k.crop, k.where) for k in runs):
                alike = [k for k in runs if (k.command, k.crop, k.where) == how]
                seeds = ", ".join(str(k.seed) for k in alike)
                command, crop, where = how
                tested = f"tested on {mark['test']}{crop}"
                notes.append(f"- `{command}`, seed {seeds}, {tested}; {where}")
    return "\n".join([*lines, "", *notes]) + "\n"


# ----------------------------------------------------------------------------- docs/papers.md
UNITS = {"parameters": "parameters (M)", "gmacs": "multiply-adds (G)"}


def papers_tables() -> str:
    """Each table of the papers, with the command that trains each row."""
    parts = []
    for key in tables():
        table = load_table(key)
        metrics = [m for m in table.metrics if any(m in row.paper for row in table.rows)]
        head = [UNITS.get(m, m.replace("_", " ")) for m in metrics]
        lines = [
            f"### `{key}`: {table.title}", "",
            f"{PAPERS[table.paper or 'RAN']}. {table.source}", "",
            f"| Row | Network | {' | '.join(head)} |" if head else "| Row | Network |",
            "|---|---|" + "---:|" * len(head),
        ]  # fmt: skip
        for row in table.rows:
            arguments = "".join(f", {k}={v}" for k, v in row.arguments.items())
            cells = [row.name, f"`{row.network}`{arguments}"]
            cells += [f"{row.paper[m]:g}" if m in row.paper else "" for m in metrics]
            lines.append(f"| {' | '.join(cells)} |")
        commands = []
        for row in table.rows:
            commands.append(shlex.join(["regard", *train_command(table, row)]))
            if words := evaluate_words(row):
                run = f"runs/{row.data or table.data}-{row.network}"
                commands.append(shlex.join(["regard", "evaluate", run, *words]))
        parts.append("\n".join([*lines, "", "```", *commands, "```", ""]))
    return "\n".join(parts)


# ------------------------------------------------------------------------ docs/performance.md
Row = Mapping[str, str]


def performance_tables(texts: Sequence[str]) -> dict[str, str]:
    """The tables `targets`, `prediction` and `training` from CSV texts of performance.py.

    One part for each text, that is, for each machine.
    """
    parts: dict[str, list[str]] = {"targets": [], "prediction": [], "training": []}
    for text in texts:
        rows = list(csv.DictReader(io.StringIO(text)))
        if not rows:
            continue
        told = _machine(rows[0])
        parts["targets"] += [told, "", *_targets(rows), ""]
        parts["prediction"] += [told, "", *_prediction(rows), ""]
        parts["training"] += [told, "", *_training(rows), ""]
    return {name: "\n".join(lines) if lines else NOTHING for name, lines in parts.items()}


def _machine(row: Row) -> str:
    on = row["machine"] + ("" if row["device"] == "cuda" else f", {row['threads']} threads")
    return f"**{on}** ({row['extensions']}); {row['versions']}; {row['date']}:"


def _best(rows: Sequence[Row], of: str, kind: str, int8: bool) -> Row | None:
    """The fastest way of a network other than the authors', in floating point or in INT8."""
    good = [
        r for r in rows
        if (r["of"], r["kind"], r["role"], r["batch"]) == (of, kind, "network", TARGET_BATCH)
        and not r["fault"] and r["engine"] != AUTHORS and r["times"]
        and (r["precision"] == "int8") == int8
    ]  # fmt: skip
    return min(good, key=lambda r: float(r["median_ms"]), default=None)


def _targets(rows: Sequence[Row]) -> list[str]:
    lines = ["| Network | What | Measured | Target | |", "|---|---|---:|---:|---|"]
    for of in dict.fromkeys(r["of"] for r in rows):
        if of not in TARGETS:
            continue
        target = TARGETS[of]
        wanted = [
            ("predict", "prediction", "times", target.predict),
            ("int8", "prediction in INT8", "times", target.int8),
            ("predict", "prediction", "to_twin", target.twin),
            ("train", "training step", "times", target.train),
        ]
        columns = {
            "times": "times as fast as the authors' way",
            "to_twin": "time over its plain twin's",
        }
        for which, kind, column, number in wanted:
            if number is None:
                continue
            what = f"{kind}, {columns[column]}"
            best = _best(rows, of, "train" if which == "train" else "predict", which == "int8")
            at_most = column == "to_twin"
            bound = f"{'at most' if at_most else 'at least'} {number:g}"
            if best is None or not best[column]:
                lines.append(f"| `{of}` | {what} | not measured | {bound} | |")
                continue
            value = float(best[column])
            good = value <= number if at_most else value >= number
            mark = "reached" if good else "**falls short**"
            with_what = f"{what} ({best['engine']}, {best['precision']})"
            lines.append(f"| `{of}` | {with_what} | {value:.2f} | {bound} | {mark} |")
    return lines


def _way(row: Row) -> str:
    return "authors' way" if row["engine"] == AUTHORS and row["role"] != "peer" else row["engine"]


def _time(row: Row) -> str:
    ms = [f"{float(row[k]):.1f}" for k in ("median_ms", "low_ms", "high_ms")]
    return f"{ms[0]} ({ms[1]}–{ms[2]})"


def _number(text: str, digits: int) -> str:
    return f"{float(text):,.{digits}f}" if text else ""


def _prediction(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| Network | Engine | Precision | Batch | ms (quartiles) | Images/s "
        "| Times the authors' way | Time over the twin's | Start (s) | Peak memory (MB) |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    faults = []
    for r in rows:
        if r["kind"] != "predict":
            continue
        if r["fault"]:
            faults.append(f"- {r['network']}, {_way(r)}, {r['precision']}: {r['fault']}")
            continue
        lines.append(
            f"| `{r['network']}` | {_way(r)} | {r['precision']} | {r['batch']} | {_time(r)} "
            f"| {_number(r['images_per_s'], 1)} | {_number(r['times'], 2)} "
            f"| {_number(r['to_twin'], 2)} | {_number(r['start_s'], 1)} "
            f"| {_number(r['peak_mb'], 0)} |"
        )
    return [*lines, *(["", "Not measured:", "", *faults] if faults else [])]


def _training(rows: Sequence[Row]) -> list[str]:
    training = [r for r in rows if r["kind"] == "train"]
    if not training:
        return [NOTHING.strip()]
    lines = [
        "| Network | Way | Precision | Batch | ms a step (quartiles) | Images/s "
        "| Times the authors' way | Start (s) | Peak memory (MB) |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in training:
        way = _way(r) if r["engine"] == AUTHORS else f"{r['engine']}, channels_last"
        head = f"| `{r['network']}` | {way} | {r['precision']} | {r['batch']} "
        if r["fault"]:
            lines.append(f"{head}| {r['fault']} | | | | |")
            continue
        lines.append(
            f"{head}| {_time(r)} | {_number(r['images_per_s'], 1)} | {_number(r['times'], 2)} "
            f"| {_number(r['start_s'], 1)} | {_number(r['peak_mb'], 0)} |"
        )
    return lines


def scaling_table(texts: Mapping[str, str], pictures: Sequence[str]) -> str:
    """Pictures and numbers from benchmarks/scaling.py: {machine's slug: CSV text}."""
    lines: list[str] = []
    for name, text in texts.items():
        rows = list(csv.DictReader(io.StringIO(text)))
        if not rows:
            continue
        lines += [_machine(rows[0] | {"threads": "1 to 2"}), ""]
        for what in ("size", "batch", "threads"):
            if f"scaling-{what}-{name}.svg" in pictures:
                alt = f"Time and peak memory of prediction by {what}"
                lines += [f"![{alt}](images/scaling-{what}-{name}.svg)", ""]
        lines += [
            "| Network | Engine | Size | Batch | Threads | ms an image | Peak memory (MB) |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        for r in rows:
            head = (
                f"| `{r['network']}` | {r['engine']}, {r['precision']} | {r['size']} "
                f"| {r['batch']} | {r['threads']} "
            )
            if r["fault"]:
                lines.append(f"{head}| {r['fault']} | |")
            else:
                each = float(r["median_ms"]) / int(r["batch"])
                lines.append(f"{head}| {each:.2f} | {_number(r['peak_mb'], 0)} |")
        lines.append("")
    return "\n".join(lines) if lines else NOTHING


def stream_table(text: str) -> str:
    """The table from benchmarks/stream.py."""
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        return NOTHING
    lines = [
        "| Network | Engine | Images | Seconds in all | Peak memory (MB) | Images/s "
        "| decoding alone | network alone | Machine and date |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        lines.append(
            f"| `{r['network']}` {r['size']} | {r['engine']} | {int(r['images']):,} "
            f"| {r['seconds']} | {r['peak_mb']} | {r['images_per_s']} | {r['decoding_per_s']} "
            f"| {r['network_per_s']} "
            f"| {r['machine']}, {r['threads']} threads, torch {r['torch']}, {r['date']} |"
        )
    return "\n".join(lines) + "\n"


def freed_table(texts: Sequence[str]) -> str:
    """The table from benchmarks/freed_memory.py, for all machines."""
    rows = [row for text in texts for row in csv.DictReader(io.StringIO(text))]
    if not rows:
        return NOTHING
    lines = [
        "| Network | What | Batch | ms, as glibc has it | ms, kept | Times as fast "
        "| Page faults | kept | Peak memory (MB) | kept | Machine and date |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        what = "a training step" if r["kind"] == "train" else "prediction"
        lines.append(
            f"| `{r['network']}` | {what}, {r['precision']} | {r['batch']} | {r['usual_ms']} "
            f"| {r['kept_ms']} | {r['times']} | {int(r['usual_faults']):,} "
            f"| {int(r['kept_faults']):,} | {r['usual_peak_mb']} | {r['kept_peak_mb']} "
            f"| {r['machine']}, {r['threads']} threads, torch {r['torch']}, {r['date']} |"
        )
    return "\n".join(lines) + "\n"


def performance_page(page: str, benchmarks: Path, pictures: Path) -> str:
    """docs/performance.md with the tables made from a folder of benchmarks."""
    texts = [p.read_text(encoding="utf-8") for p in sorted(benchmarks.glob("performance-*.csv"))]
    scaling = {
        p.stem.removeprefix("scaling-"): p.read_text(encoding="utf-8")
        for p in sorted(benchmarks.glob("scaling-*.csv"))
    }
    stream = benchmarks / "stream.csv"
    tables = {
        **performance_tables(texts),
        "scaling": scaling_table(scaling, [p.name for p in pictures.glob("*.svg")]),
        "freed": freed_table(
            [p.read_text(encoding="utf-8") for p in sorted(benchmarks.glob("freed-memory-*.csv"))]
        ),
        "stream": stream_table(stream.read_text(encoding="utf-8") if stream.exists() else ""),
    }
    return TABLE.sub(lambda m: m[1] + tables[m[1].split()[-2]] + m[2], page)


def main() -> int:
    """Writes the tables, or checks them."""
    csv_text = counted_csv(FIGURES.read_text(encoding="utf-8"))
    models = MODELS.read_text(encoding="utf-8")
    table = markdown_table(csv_text)
    training = TRAINING.read_text(encoding="utf-8")
    runs = recipes_table(RECIPES.read_text(encoding="utf-8"))
    performance = PERFORMANCE.read_text(encoding="utf-8")
    wanted = {
        FIGURES: csv_text,
        MODELS: TABLE.sub(lambda m: m[1] + table + m[2], models),
        PAPERS_PAGE: TABLE.sub(
            lambda m: m[1] + papers_tables() + m[2], PAPERS_PAGE.read_text(encoding="utf-8")
        ),
        TRAINING: TABLE.sub(lambda m: m[1] + runs + m[2], training),
        RESULTS_PAGE: TABLE.sub(
            lambda m: m[1] + results_table(RESULTS) + m[2], RESULTS_PAGE.read_text(encoding="utf-8")
        ),
        PERFORMANCE: performance_page(performance, BENCHMARKS, PERFORMANCE.parent / "images"),
    }
    stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not up to date")
        if "--check" not in sys.argv:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
