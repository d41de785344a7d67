"""`regard models`: the networks, beside the papers' own figures."""

import json
import logging
from dataclasses import asdict

log = logging.getLogger(__name__)


def command(pattern: str = "*", *, json: bool = False) -> int:
    """List the networks: parameters, multiply-adds, and the papers' figures.

    Parameters
    ----------
    pattern
        Part of a name, or a shell pattern such as 'cbam_*'.
    json
        Print JSON with all figures.
    """
    print_figures(pattern, as_json=json)
    return 0


def print_figures(pattern: str = "*", *, as_json: bool = False) -> None:
    """Prints the networks that match as a table, or as JSON with every figure in full.

    Raises:
        UsageError: none matches.
    """
    from regard.models.zoo import PAPERS, figures

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
