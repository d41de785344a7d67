"""Stores a finished run's settings and results in benchmarks/results/NAME.

    python scripts/keep_result.py RUN NAME --benchmark KEY --commit HASH [--machine TEXT]

KEY is a table of benchmarks/results/benchmarks.toml. The folder gets run.json, recipe.toml,
metrics.csv and evaluation.json of the run, without this machine's paths, and about.json;
scripts/make_tables.py makes the table of docs/results.md from them.
"""

import argparse
import json
import shutil
import sys
import tomllib
from pathlib import Path

from regard.errors import UsageError
from regard.files import write_text
from regard.runs import RunFolder
from ship_weights import this_machine, write_run

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results"
KEPT = ("run.json", "recipe.toml", "metrics.csv", "evaluation.json", "about.json")


def keep(
    run_folder: Path, name: str, *, benchmark: str, commit: str, machine: str = "",
    root: Path = RESULTS,
) -> Path:  # fmt: skip
    """Writes the folder of this result and returns it.

    Raises:
        UsageError: the run is not finished or not tested on its test split, there is no such
            benchmark, or another run is stored under this name.
    """
    run = RunFolder(run_folder)
    known = tomllib.loads((RESULTS / "benchmarks.toml").read_text(encoding="utf-8"))
    if benchmark not in known:
        raise UsageError(f"--benchmark {benchmark}: choose {', '.join(known)}")
    if not run.finished or run.read_facts()["tested_on"] != "test":
        raise UsageError(f"{run_folder} holds no finished run that was tested on a test split")
    folder = root / name
    if folder.exists():
        raise UsageError(f"{folder} exists; give another name")
    folder.mkdir(parents=True)
    write_run(run, folder)
    shutil.copy(run.path / "evaluation.json", folder / "evaluation.json")
    about = {"benchmark": benchmark, "commit": commit, "machine": machine or this_machine()}
    write_text(folder / "about.json", json.dumps(about, indent=1) + "\n")
    return folder


def main(words: list[str] | None = None) -> int:
    """Stores one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--benchmark", required=True)
    parser.add_argument("--commit", required=True, help="of the source that trained it")
    parser.add_argument("--machine", default="")
    asked = parser.parse_args(words)
    try:
        print(keep(asked.run, asked.name, benchmark=asked.benchmark, commit=asked.commit,
                   machine=asked.machine))  # fmt: skip
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
