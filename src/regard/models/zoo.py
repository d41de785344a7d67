"""Every network's parameters and multiply-adds beside the paper's own figures.

The figures are in zoo.csv, so that `regard models` need not build 36 networks; the
counts in it are written by scripts/make_tables.py and counted again by the tests.
"""

import csv
import fnmatch
from dataclasses import dataclass
from importlib import resources

from regard.errors import UsageError

PAPERS = {
    "RAN": "Wang et al., Residual Attention Network for Image Classification, CVPR 2017",
    "CBAM": "Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018",
    "AG": "Schlemper et al., Attention gated networks, Medical Image Analysis 2019",
}


@dataclass(frozen=True)
class ZooEntry:
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


def figures(pattern: str = "*") -> list[ZooEntry]:
    """The networks whose name matches a shell pattern; a bare word matches anywhere.

    Raises:
        UsageError: none matches.
    """
    text = resources.files("regard.models").joinpath("zoo.csv").read_text(encoding="utf-8")
    rows = [
        ZooEntry(**{**row, "parameters": int(row["parameters"]), "macs": int(row["macs"])})  # type: ignore[arg-type]
        for row in csv.DictReader(text.splitlines())
    ]
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = [row for row in rows if fnmatch.fnmatch(row.name, glob)]
    if not found:
        raise UsageError(f"no network matches {pattern!r}; `regard models` lists all {len(rows)}")
    return found
