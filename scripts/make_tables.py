"""Counts every network and writes the tables that show the counts.

    python scripts/make_tables.py            # writes figures.csv and the README's table
    python scripts/make_tables.py --check    # says what would change; exit code 1 if anything

What it writes: the columns `parameters` and `macs` of src/regard/figures.csv, and
in README.md and docs/training.md what stands between the two comments that name this script;
the latter from benchmarks/recipes.csv.
"""

import csv
import io
import re
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from regard import create_model

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "src/regard/figures.csv"
README = ROOT / "README.md"
TRAINING = ROOT / "docs/training.md"
RECIPES = ROOT / "benchmarks/recipes.csv"
TABLE = re.compile(
    r"(<!-- table: scripts/make_tables.py[ a-z]*-->\n).*?(<!-- end of table -->)", re.S
)


def count(name: str) -> tuple[str, int, int]:
    """Input size, parameters and multiply-adds (half of torch's flops) of one image."""
    with torch.device("meta"), torch.no_grad():
        model = create_model(name).eval()
        size = model.default_cfg["input_size"]
        with FlopCounterMode(display=False) as flops:
            model(torch.zeros(1, *size))
    parameters = sum(p.numel() for p in model.parameters())
    return "x".join(map(str, size)), parameters, flops.get_total_flops() // 2


def counted_csv(text: str) -> str:
    """figures.csv with its counts made again; the papers' figures are kept as they are."""
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        row["input"], row["parameters"], row["macs"] = count(row["name"])  # type: ignore[assignment]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown_table(text: str) -> str:
    """The README's table of networks, with the papers' figures beside ours."""
    lines = [
        "| Network | Input | Parameters (M) | paper | Multiply-adds (G) | paper | Paper's result |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in csv.DictReader(io.StringIO(text)):
        parameters, gmacs = int(row["parameters"]) / 1e6, int(row["macs"]) / 1e9
        mark = " ¹" if row["note"].startswith("stride") else " ²" if row["note"] else ""
        lines.append(
            f"| `{row['name']}` | {row['input']} | {parameters:.3f} | {row['paper_parameters']} "
            f"| {gmacs:.3f} | {row['paper_gmacs']}{mark if row['paper_gmacs'] else ''} "
            f"| {row['paper_result']} |"
        )
    return "\n".join(lines) + "\n"


def recipes_table(text: str) -> str:
    """The table of short runs of docs/training.md."""
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


def main() -> int:
    """Writes both, or checks them."""
    csv_text = counted_csv(FIGURES.read_text(encoding="utf-8"))
    readme = README.read_text(encoding="utf-8")
    table = markdown_table(csv_text)
    training = TRAINING.read_text(encoding="utf-8")
    runs = recipes_table(RECIPES.read_text(encoding="utf-8"))
    wanted = {
        FIGURES: csv_text,
        README: TABLE.sub(lambda m: m[1] + table + m[2], readme),
        TRAINING: TABLE.sub(lambda m: m[1] + runs + m[2], training),
    }
    stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not up to date")
        if "--check" not in sys.argv:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
