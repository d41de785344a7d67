"""The papers' numbers for each network by name, gathered from their tables."""

import functools
from collections.abc import Mapping

from regard.papers import Row, Table, load_table, tables

_ERRORS = ("top1_error", "top5_error")
_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def printed_size(network: str) -> tuple[str, str]:
    """The parameters in millions and multiply-adds in 10^9 of a network, as printed, or ""."""
    rows = _rows_by_network().get(network, [])
    return _first(rows, "parameters"), _first(rows, "gmacs")


def printed_result(network: str) -> str:
    """The results of a network with its own arguments, or "".

    >>> printed_result("cbam_resnet50")
    'top-1 / top-5 error 22.66 / 6.31 %'
    """
    rows = _rows_by_network().get(network, [])
    plain = [row for row in rows if not row[1].changes]
    if not plain:
        return _under_noise(rows)
    best = _fullest_by_data(plain)
    cifar = {_SETS[data]: row for data, row in best.items() if data in _SETS}
    if cifar:
        sets = " / ".join(cifar).replace(" / CIFAR-", " / ")
        return f"{sets} error {_joined([row.paper['top1_error'] for row in cifar.values()])} %"
    row = next(iter(best.values()))
    if all(name in row.paper for name in _ERRORS):
        at = f" at {row.evaluation['size']}x{row.evaluation['size']}" if row.evaluation else ""
        return f"top-1 / top-5 error {_joined([row.paper[name] for name in _ERRORS])} %{at}"
    if "f1" in row.paper:
        return f"accuracy / F1 {_joined([row.paper['accuracy'], row.paper['f1']])}"
    return ""


def tables_by_argument(paper: str) -> dict[str, list[str]]:
    """The keys of a paper's tables that vary each argument of a network."""
    found: dict[str, list[str]] = {}
    for key in tables():
        table = load_table(key)
        if table.paper == paper:
            for name in dict.fromkeys(name for row in table.rows for name in row.arguments):
                found.setdefault(name, []).append(key)
    return found


@functools.cache
def _rows_by_network() -> dict[str, list[tuple[Table, Row]]]:
    """The rows of all tables by network, without those that change its arguments."""
    found: dict[str, list[tuple[Table, Row]]] = {}
    for key in tables():
        table = load_table(key)
        for row in table.rows:
            if not row.arguments:
                found.setdefault(row.network, []).append((table, row))
    return found


def _fullest_by_data(rows: list[tuple[Table, Row]]) -> Mapping[str | None, Row]:
    """The row with the most numbers for each data set, in order of appearance."""
    best: dict[str | None, Row] = {}
    for table, row in rows:
        data = row.data or table.data
        results = [name for name in row.paper if name not in ("parameters", "gmacs")]
        if results and (data not in best or len(row.paper) > len(best[data].paper)):
            best[data] = row
    return best


def _under_noise(rows: list[tuple[Table, Row]]) -> str:
    noisy = [row for _, row in rows if "label_noise" in row.changes]
    if not noisy:
        return ""
    shares = _joined([f"{100 * row.changes['label_noise']:.0f}" for row in noisy])
    errors = _joined([row.paper["top1_error"] for row in noisy])
    return f"CIFAR-10 error at {shares} % label noise {errors} %"


def _joined(values: list[object]) -> str:
    return " / ".join(map(str, values))


def _first(rows: list[tuple[Table, Row]], name: str) -> str:
    return next((str(row.paper[name]) for _, row in rows if name in row.paper), "")
