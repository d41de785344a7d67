"""`regard models`: the networks, beside the papers' own figures."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import JsonFlag

if TYPE_CHECKING:
    from regard.models.zoo import ZooEntry

log: logging.Logger = logging.getLogger(__name__)


def command(
    pattern: Annotated[str, Parameter(name="PATTERN")] = "*", /, *, json: JsonFlag = False
) -> int:
    """List the networks: parameters, multiply-adds, the papers' figures, and shipped weights.

    Parameters
    ----------
    pattern
        Part of a name, or a shell pattern such as 'cbam_*'. The whole name of a network, or of
        weights, also lists the network's arguments and its weights.
    json
        Print JSON with all figures.
    """
    from regard.models.zoo import figures
    from regard.weights import shipped

    if (named := shipped().get(pattern)) is not None:
        pattern = named.architecture
    rows = figures(pattern)
    exact = next((row for row in rows if row.name == pattern), None)
    if exact is not None:
        print_network(exact, as_json=json)
    elif json:
        print(dumps([{**asdict(row), "weights": _weights(row.name)} for row in rows], indent=2))
    else:
        print_figures(rows)
    return 0


def print_network(row: "ZooEntry", *, as_json: bool = False) -> None:
    """Prints the figures of one network, and its arguments with the papers' tables of them."""
    from regard.models.arguments import arguments
    from regard.papers.figures import tables_by_argument

    name, keys = row.name, tables_by_argument(row.paper)
    found = [{**asdict(each), "tables": keys.get(each.name, [])} for each in arguments(name)]
    if as_json:
        content = {**asdict(row), "arguments": found, "weights": _weights(name)}
        print(dumps(content, indent=2))
        return
    print_figures([row])
    print()
    print(f"arguments of {name}, as --arg NAME=VALUE or create_model({name!r}, NAME=VALUE):")
    for each in found:
        choices, default = each["choices"], each["default"]
        told = choices if isinstance(choices, str) else " | ".join(choices)
        shown = str(default).replace(" ", "") if isinstance(default, tuple) else default
        line = f"  {each['name']:<16} {told} (default: {shown})"
        print(line + (f"; table {', '.join(each['tables'])}" if each["tables"] else ""))
    for each in _weights(name):
        print(
            f"weights {each['name']} ({each['bytes'] / 1e6:.1f} MB): {each['accuracy']:.2%} "
            f"({each['low']:.2%} to {each['high']:.2%}) on {each['images']:,} images; "
            f"{each['data']}; {each['card']}"
        )


def _weights(network: str) -> list[dict[str, Any]]:
    """The weights of a network that come with Regard."""
    from regard.weights import shipped

    return [
        {
            "name": w.name, "tag": w.tag, "data": w.data, "images": w.images,
            "accuracy": w.accuracy,
            "low": w.low, "high": w.high, "bytes": w.size, "sha256": w.sha256,
            "card": str(w.folder / "README.md"),
        }
        for w in shipped().values() if w.architecture == network
    ]  # fmt: skip


def print_figures(rows: "Sequence[ZooEntry]") -> None:
    """Prints networks as a table."""
    from rich.console import Console
    from rich.table import Table

    from regard.papers import PAPERS

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("network", no_wrap=True)
    table.add_column("from")
    table.add_column("input", no_wrap=True)
    for heading in ("params M", "paper", "MACs G", "paper"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("the paper's result")
    table.add_column("weights here")
    for row in rows:
        mark = "*" if row.paper_gmacs and row.note else ""
        table.add_row(
            row.name, row.paper, row.input,
            f"{row.parameters / 1e6:.3f}", row.paper_parameters,
            f"{row.macs / 1e9:.3f}", row.paper_gmacs + mark,
            row.paper_result,
            ", ".join(f"{w['tag']} {w['accuracy']:.1%}" for w in _weights(row.name)),
        )  # fmt: skip
    console = Console()
    # piped, a table must not be cut to the width of a terminal that is not there
    Console(width=None if console.is_terminal else 160).print(table)
    console.print()
    for key in dict.fromkeys(row.paper for row in rows):
        console.print(f"{key}: {PAPERS[key]}", style="dim", soft_wrap=True)
    for note in dict.fromkeys(row.note for row in rows if row.note and row.paper_gmacs):
        console.print(f"* {note}", style="dim", soft_wrap=True)
