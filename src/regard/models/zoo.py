"""Every network's parameters and multiply-adds next to the paper's own figures.

The counts are in zoo.csv, so that `regard models` need not build the networks;
scripts/make_tables.py writes them and the tests count again. The papers' figures are those of
the tables in `regard.papers`.

Twins are networks that differ only in their attention.
"""

import csv
import fnmatch
from dataclasses import dataclass
from importlib import resources

from regard.errors import UsageError
from regard.papers.figures import printed_result, printed_size


@dataclass(frozen=True)
class ZooEntry:
    """One network.

    Attributes:
        name: for create_model().
        paper: RAN, CBAM or AG, see `regard.papers.PAPERS`.
        input: the input size for the counts, "3x224x224".
        parameters: counted here.
        macs: counted here: multiply-adds of convolutions and products for one image.
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
    rows = [_entry(row) for row in csv.DictReader(text.splitlines())]
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = [row for row in rows if fnmatch.fnmatch(row.name, glob)]
    if not found:
        raise UsageError(f"no network matches {pattern!r}; `regard models` lists all {len(rows)}")
    return found


def _entry(row: dict[str, str]) -> ZooEntry:
    parameters, gmacs = printed_size(row["name"])
    return ZooEntry(
        name=row["name"], paper=row["paper"], input=row["input"],
        parameters=int(row["parameters"]), macs=int(row["macs"]), paper_parameters=parameters,
        paper_gmacs=gmacs, paper_result=printed_result(row["name"]), note=row["note"],
    )  # fmt: skip


def _twin_families() -> list[dict[str, str]]:
    """All families of twins, each as {kind: name}."""
    resnets = ("resnet18", "resnet34", "resnet50", "resnet101")
    resnexts = ("resnext50_32x4d", "resnext101_32x4d")
    wide = ("wide_resnet18_1_5", "wide_resnet18_2")
    plain = {name: f"plain_{name}" for name in (*resnets, *resnexts)} | {w: w for w in wide}
    families = [{"plain": p, "se": f"se_{n}", "cbam": f"cbam_{n}"} for n, p in plain.items()]
    mobile = ("mobilenet_100", "mobilenet_070")
    families += [{"plain": f"plain_{n}", "se": f"se_{n}", "cbam": f"cbam_{n}"} for n in mobile]
    families += [{"plain": f"sononet{f}", "ag": f"ag_sononet{f}"} for f in (8, 16, 32, 64)]
    residual = [f"attention{n}" for n in (56, 92)] + [f"attentionnext{n}" for n in (56, 92)]
    residual += [f"attention{n}_cifar" for n in (56, 92, 128, 164, 236, 452)]
    families += [{"plain": f"plain_{name}", "attention": name} for name in residual]
    return families


def twins_of(name: str) -> dict[str, str]:
    """Like `twins`, but empty if the network has none."""
    for family in _twin_families():
        # timm's resnet18 is plain_resnet18 with another initialization
        if name in family.values() or f"plain_{name}" == family["plain"]:
            return family
    return {}


def twins(name: str) -> dict[str, str]:
    """The names of a network and its twins, which differ only in their attention.

    Examples:
        >>> twins("cbam_resnet50")
        {'plain': 'plain_resnet50', 'se': 'se_resnet50', 'cbam': 'cbam_resnet50'}
        >>> twins("sononet8")
        {'plain': 'sononet8', 'ag': 'ag_sononet8'}
        >>> twins("attention56")
        {'plain': 'plain_attention56', 'attention': 'attention56'}

    Built with the same arguments after the same `torch.manual_seed`, twins have the same initial
    weights in every tensor that they share. timm's `resnet50` has the twins of `plain_resnet50`,
    which is the same network with the authors' initialization. AG-SonoNet and SonoNet share all
    convolution blocks; their classifiers are the paper's, and differ.

    Raises:
        UsageError: the network has no twin; the message names the networks that have one.
    """
    if family := twins_of(name):
        return family
    known = ", ".join(family["plain"] for family in _twin_families())
    raise UsageError(f"{name!r} has no twin; these have: {known}")
