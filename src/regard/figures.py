"""Every network's parameters and multiply-adds beside the paper's own figures.

The figures are in figures.csv, so that `regard models` need not build 36 networks; the
counts in it are written by scripts/make_tables.py and counted again by the tests.
"""

import csv
import fnmatch
import json
from dataclasses import asdict, dataclass
from importlib import resources

PAPERS = {
    "RAN": "Wang et al., Residual Attention Network for Image Classification, CVPR 2017",
    "CBAM": "Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018",
    "AG": "Schlemper et al., Attention gated networks, Medical Image Analysis 2019",
}


@dataclass(frozen=True)
class Figures:
    """One network.

    Attributes:
        name: for create_model().
        paper: RAN, CBAM or AG, see PAPERS.
        input: the size at which it is counted, "3x224x224".
        parameters: ours, counted.
        macs: ours, multiply-adds of convolutions and products for one image, counted.
        paper_parameters, paper_gmacs: the paper's, in millions and 10^9, as printed; or "".
        paper_result: the paper's, as printed, or "".
        note: where and why the two differ.
    """

    name: str
    paper: str
    input: str
    parameters: int
    macs: int
    paper_parameters: str
    paper_gmacs: str
    paper_result: str
    note: str


def figures(pattern: str = "*") -> list[Figures]:
    """The networks whose name matches a shell pattern; a bare word matches anywhere.

    Raises:
        ValueError: none matches.
    """
    text = resources.files("regard").joinpath("figures.csv").read_text(encoding="utf-8")
    rows = [
        Figures(**{**row, "parameters": int(row["parameters"]), "macs": int(row["macs"])})  # type: ignore[arg-type]
        for row in csv.DictReader(text.splitlines())
    ]
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = [row for row in rows if fnmatch.fnmatch(row.name, glob)]
    if not found:
        raise ValueError(f"no network matches {pattern!r}; `regard models` lists all {len(rows)}")
    return found


def print_figures(pattern: str = "*", *, as_json: bool = False) -> None:
    """Prints the networks that match as a table, or as JSON with every figure in full.

    Raises:
        ValueError: none matches.
    """
    rows = figures(pattern)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("network", no_wrap=True)
    table.add_column("from")
    table.add_column("input", no_wrap=True)
    for heading in ("params M", "paper", "MACs G", "paper"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("the paper's result")
    for row in rows:
        mark = "*" if row.paper_gmacs and row.note else ""
        table.add_row(
            row.name, row.paper, row.input,
            f"{row.parameters / 1e6:.3f}", row.paper_parameters,
            f"{row.macs / 1e9:.3f}", row.paper_gmacs + mark,
            row.paper_result,
        )  # fmt: skip
    console = Console()
    # piped, a table must not be cut to the width of a terminal that is not there
    Console(width=None if console.is_terminal else 160).print(table)
    console.print()
    for key in dict.fromkeys(row.paper for row in rows):
        console.print(f"{key}: {PAPERS[key]}", style="dim", soft_wrap=True)
    for note in dict.fromkeys(row.note for row in rows if row.note and row.paper_gmacs):
        console.print(f"* {note}", style="dim", soft_wrap=True)
