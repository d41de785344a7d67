"""Table 1 of a paper: images, groups, classes and further columns, overall and by split."""

import csv
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regard.cells import is_missing, number_of
from regard.data.table import SPLITS, ImageTable

_MOST_VALUES = 20  # of a column of words; if there are more, only their number is given
_NAMES = {"train": "Training", "val": "Validation", "test": "Test"}


def table_one(table: ImageTable) -> list[list[str]]:
    """Rows of cells, the header first: name, overall, and one column per split.

    Classes and words are given as counts with percentages of the column's images, numbers as
    medians with quartiles. A group in several splits counts in each of them.
    """
    parts = [np.ones(len(table), bool)]
    splits = [s for s in SPLITS if np.any(table.splits == s)]
    parts += [table.splits == s for s in splits]
    rows = [["", "Overall", *(_NAMES[s] for s in splits)]]
    rows.append(["Images, n", *(str(int(part.sum())) for part in parts)])
    if table.groups is not None:
        rows.append(["Groups, n", *(str(len(np.unique(table.groups[p]))) for p in parts)])
        sizes = [np.unique(table.groups[p], return_counts=True)[1] for p in parts]
        rows.append(["Images per group, median (range)", *map(_range, sizes)])
    names = np.array(table.classes)[table.labels]
    rows += _shares("Class", names, table.classes, parts)
    for column, values in table.columns.items():
        rows += _column(column, np.asarray(values).astype(str), parts)
    return rows


def _range(sizes: NDArray[np.int64]) -> str:
    return f"{np.median(sizes):g} ({sizes.min()} to {sizes.max()})" if len(sizes) else "–"


def _shares(
    title: str, values: NDArray[np.str_], names: Sequence[str], parts: list[NDArray[np.bool_]]
) -> list[list[str]]:
    rows = [[f"{title}, n (%)", *("" for _ in parts)]]
    for name in names:
        counts = [int((values[part] == name).sum()) for part in parts]
        cells = [
            f"{n} ({100 * n / max(int(part.sum()), 1):.1f})"
            for n, part in zip(counts, parts, strict=True)
        ]
        rows.append([f"  {name or '(missing)'}", *cells])
    return rows


def _column(
    title: str, values: NDArray[np.str_], parts: list[NDArray[np.bool_]]
) -> list[list[str]]:
    """The rows for a column of numbers or of words."""
    numbers = _numbers(values)
    missing = [is_missing(v, numbers is not None) for v in values.tolist()]
    values = np.where(missing, "", values)
    names = np.unique(values).tolist()
    if numbers is not None and len(names) > 5:
        cells = [_quartiles(numbers[part]) for part in parts]
        rows = [[f"{title}, median (quartiles)", *cells]]
        counts = [int(np.isnan(numbers[part]).sum()) for part in parts]
        return [*rows, ["  (missing), n", *map(str, counts)]] if counts[0] else rows
    if len(names) > _MOST_VALUES:
        return [[f"{title}, different values", *(str(len(np.unique(values[p]))) for p in parts)]]
    return _shares(title, values, [*(n for n in names if n), *(n for n in names if not n)], parts)


def _numbers(values: NDArray[np.str_]) -> NDArray[np.float64] | None:
    """The values as numbers, NaN where missing or infinite; None if any is a word."""
    cells = values.tolist()
    try:
        numbers = np.array([np.nan if is_missing(v, True) else number_of(v) for v in cells])
    except ValueError:
        return None
    numbers[np.isinf(numbers)] = np.nan  # of a division by 0: no value to rank
    return numbers if np.isfinite(numbers).any() else None


def _quartiles(numbers: NDArray[np.float64]) -> str:
    some = numbers[~np.isnan(numbers)]
    if not len(some):
        return "–"
    low, middle, high = (
        f"{x:.0f}" if abs(x) >= 1000 else f"{x:.4g}" for x in np.percentile(some, [25, 50, 75])
    )
    return f"{middle} ({low} to {high})"


def as_csv(rows: list[list[str]]) -> str:
    """The rows as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def as_markdown(rows: list[list[str]]) -> str:
    """The rows as a Markdown table, with numbers right-aligned."""
    escaped = [[_cell(cell) for cell in row] for row in rows]
    head, *body = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]) + "\n"


def _cell(text: str) -> str:
    spaces = len(text) - len(text.lstrip(" "))
    words = text.strip(" ").replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "&nbsp;" * (2 * spaces) + words
