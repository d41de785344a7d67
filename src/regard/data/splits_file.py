"""The file of a run's splits: the split of each image, and its content whatever its name."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from regard.data.table import SPLITS, ImageTable
from regard.errors import UsageError
from regard.files import plural

_COLUMNS = ["path", "label", "split", "group"]
_HASHES = ["content", "original"]  # optional columns: both, the first or neither


def write_splits(
    table: ImageTable,
    path: str | Path,
    contents: NDArray[np.uint64] | None = None,
    originals: NDArray[np.uint64] | None = None,
) -> None:
    """Writes a CSV file with a line per image: path, label, split, group, and hashes if given.

    Paths are relative to the data's own folder, so that the data can be moved.

    Args:
        table: N images.
        path: the file.
        contents: (N,) hashes from `content_hashes`.
        originals: (N,) hashes of the images that these are copies of; requires `contents`.

    Raises:
        OSError: it can't be written.
    """
    hashes = [given for given in (contents, originals) if given is not None]
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    # file names may not be UTF-8; surrogateescape writes their bytes unchanged
    with open(partial, "w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS, *_HASHES[: len(hashes)]])
        for i in range(len(table)):
            group = "" if table.groups is None else table.groups[i]
            row = [table.key(i), table.classes[table.labels[i]], table.splits[i], group]
            row += [f"{int(given[i]):016x}" if given[i] else "" for given in hashes]
            writer.writerow(row)
    os.replace(partial, path)


def read_splits(table: ImageTable, path: str | Path) -> ImageTable:
    """The table with the splits from a file that write_splits wrote.

    Raises:
        UsageError: the file is for other data (the first difference is named), or broken.
        OSError: it can't be read.
    """
    rows = {row.key: row for row in read_rows(path)}
    keys = [table.key(i) for i in range(len(table))]
    for i, key in enumerate(keys):
        if key not in rows:
            count = sum(k not in rows for k in keys)
            raise UsageError(
                f"{path}: {count} of {table.name}'s images are not in it, such as {key}"
            )
        row = rows[key]
        if row.label != (mine := table.classes[table.labels[i]]):
            raise UsageError(f"{path}: {key} is {row.label!r}, but in {table.name} it is {mine!r}")
        if table.groups is not None and row.group != table.groups[i]:
            other = f"in {table.name} of {str(table.groups[i])!r}"
            raise UsageError(f"{path}: {key} is of group {row.group!r}, but {other}")
    if extra := set(rows).difference(keys):
        raise UsageError(
            f"{path}: lists {plural(len(extra), 'image')} that {table.name} lacks, such as "
            f"{min(extra)}"
        )
    return replace(table, splits=np.array([rows[key].split for key in keys], "U5"))


def rows_of(paths: Sequence[str], path: str | Path) -> "list[Row] | None":
    """The line of each image, by path, in a file that write_splits wrote.

    The path may be from before the data was moved. None if an image has no line of its own.

    Raises:
        as in `read_rows`.
    """
    rows = {row.key: row for row in read_rows(path)}
    found = [
        next((rows[key] for key in (image, *_endings(image)) if key in rows), None)
        for image in paths
    ]
    known = [row for row in found if row is not None]
    return known if len({row.key for row in known}) == len(paths) else None


def _endings(path: str) -> Iterator[str]:
    """The rest of a path after each of its folders, or after the kind of data; longest first."""
    return (path[found.end() :] for found in re.finditer(r"[/\\:]", path))


class Row(NamedTuple):
    """One line of the file; content and original are 0 if unknown."""

    key: str
    label: str
    split: str
    group: str
    content: int
    original: int


def read_rows(path: str | Path) -> Iterator[Row]:
    """The lines of a file that write_splits wrote.

    Raises:
        UsageError: it is broken; the message names the line.
        OSError: it can't be read.
    """
    seen: set[str] = set()
    with open(path, encoding="utf-8", newline="", errors="surrogateescape") as file:
        rows = _numbered(file, path)
        _, header = next(rows, (1, []))
        if header[:4] != _COLUMNS or header[4:] != _HASHES[: len(header) - 4]:
            raise UsageError(f"{path} line 1: is not {','.join(_COLUMNS)}")
        for line, cells in rows:
            if len(cells) != len(header) or cells[2] not in ("", *SPLITS) or cells[0] in seen:
                raise UsageError(f"{path} line {line}: can't be right: {','.join(cells)}")
            seen.add(cells[0])
            try:
                content, original = (int(cell or "0", 16) for cell in (*cells[4:], "", "")[:2])
            except ValueError:
                raise UsageError(
                    f"{path} line {line}: {','.join(cells[4:])} is not a content hash"
                ) from None
            yield Row(cells[0], cells[1], cells[2], cells[3], content, original)


def _numbered(file: TextIO, path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row, with the number of its last line."""
    reader = csv.reader(file, strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise UsageError(f"{path} line {reader.line_num}: is not CSV ({error})") from error
