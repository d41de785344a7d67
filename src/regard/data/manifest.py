"""A CSV file of images as a table; errors name the file and the line."""

import csv
import os
import re
from array import array
from collections.abc import Iterator, Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

from regard.data.folders import split_cell, two_names, unlike_name
from regard.data.paths import PathList
from regard.data.table import SPLITS, ImageTable
from regard.errors import UsageError
from regard.files import shortened

SUFFIXES = (".csv", ".tsv")
_USED = ("path", "label", "split", "group")
_SPLITS = ("", *SPLITS)
_MOST_VALUES = 100_000  # in a further column; one with more, such as free text, is not read
# columns that may say which images belong together
_OF_GROUPS = re.compile("patient|subject|participant|person|case|donor|animal|lesion|study")
_EXCELS_SEPARATOR = re.compile("sep=(.)", re.IGNORECASE)  # on the first line by itself
_LINE_BREAK = re.compile("\r\n?|\n")
_CONTENT = "content"  # a further column of the splits.csv that a run writes


def open_manifest(name: str, path: Path) -> ImageTable:
    """The images that a CSV file lists in columns path and label, and optionally split and group.

    Separators are commas, semicolons or tabs, in UTF-8 or UTF-16. Paths are relative to its folder.

    Raises:
        UsageError: a fault in the file, with its line, or the first image does not exist.
    """
    with open(path, "rb") as raw:
        utf16 = raw.read(2) in (b"\xff\xfe", b"\xfe\xff")
    # surrogateescape: a file name may not be UTF-8 although the rest is
    with open(
        path, encoding="utf-16" if utf16 else "utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
        # absolute, so that an image has one path and key however the file is named
        manifest = _Manifest(name, os.path.abspath(path.parent), file)
        try:
            manifest.read()
        except csv.Error as error:
            manifest.broken(error)
    return manifest.table(str(path))


class _Manifest:
    """The cells of a CSV file, collected in arrays as it is read."""

    def __init__(self, name: str, base: str, file: TextIO) -> None:
        self.name, self.base = name, base
        head, self.head_line = file.readline(), 1
        while head and not head.strip():
            head = file.readline()
            self.head_line += 1
        if told := _EXCELS_SEPARATOR.fullmatch(head.strip("\r\n")):
            head = file.readline()
            self.head_line += 1
        delimiter = told[1] if told else max(",;\t", key=head.count)
        # strict: otherwise a quote that is never closed takes all further rows into one cell
        self.reader = csv.reader(
            chain([head], file), delimiter=delimiter, strict=True, skipinitialspace=True
        )
        self.delimiter = delimiter
        self.before = self.after = 0  # lines from the header's on, before and after the current row
        self.columns: list[str] = []
        self.further: dict[str, _Cells] = {}
        self.lines, self.labels, self.splits = array("q"), array("q"), array("b")
        self.groups = array("q")
        self.split_of: dict[str, str] = {"": ""}  # of each cell, in lower case
        self.label_index: dict[str, int] = {}
        self.group_index: dict[str, int] = {}

    @property
    def line(self) -> int:
        """The first line of the current row."""
        return self.head_line + self.before

    def fault(self, what: str, line: int | None = None) -> NoReturn:
        """Raises an error that names the line; default: that of the current row."""
        raise UsageError(f"{self.name} line {self.line if line is None else line}: {what}")

    def broken(self, error: csv.Error) -> NoReturn:
        """Raises an error for the row after the current one, which the reader refused."""
        first, last = self.head_line + self.after, self.head_line + self.reader.line_num - 1
        quote = f"; look for a quote without its partner up to line {last}" if last > first else ""
        self.fault(f"is not CSV ({error}){quote}", first)

    def read(self) -> None:
        """Reads the header and all rows."""
        self.columns = [c.strip().lower() for c in next(self.reader, [])]
        names = [c for c in self.columns if c not in (*_USED, _CONTENT, "")]
        self.further = {c: _Cells(self.columns.index(c)) for c in dict.fromkeys(names)}
        self.after = self.reader.line_num
        for wanted in _USED:
            if self.columns.count(wanted) > 1:
                self.fault(f"two columns are called {wanted!r}", self.head_line)
            if wanted not in self.columns and wanted in ("path", "label"):
                columns = shortened([c[:40] for c in self.columns if c.isprintable()], 8)
                self.fault(f"no column {wanted!r} among {columns}", self.head_line)
        for column in self.columns:
            self._check_text("column", column, self.head_line)
        self.paths = PathList.of(self._rows())
        if not self.paths:
            raise UsageError(f"{self.name}: lists no images")
        if not os.path.exists(self.paths[0]) and os.path.exists(_from_windows(self.paths[0])):
            self.paths = PathList.of(map(_from_windows, self.paths))
        self._check_repeated()
        self._check_groups()

    def _rows(self) -> Iterator[str]:
        """The path of each row; its other cells are added to the arrays."""
        at = {c: i for i, c in enumerate(self.columns) if c in _USED}
        for fields in self.reader:
            self.before, self.after = self.after, self.reader.line_num
            if self.after > self.before + 1:
                self._check_breaks(fields)
            if not any(cell.strip() for cell in fields):
                continue
            if any(cell.strip() for cell in fields[len(self.columns) :]):
                self.fault(
                    f"{len(fields)} fields, but the header has {len(self.columns)}; a comma "
                    "within a field needs quotes around the field"
                )
            fields += [""] * (len(self.columns) - len(fields))
            self._add({c: fields[i].strip() for c, i in at.items()})
            for column, cells in self.further.items():
                cell = fields[cells.place].strip()
                self._check_text(column, cell)
                cells.add(cell)
            yield os.path.normpath(os.path.join(self.base, fields[at["path"]].strip()))

    def _add(self, row: dict[str, str]) -> None:
        if [row[c].strip("\ufeff").lower() for c in ("path", "label")] == ["path", "label"]:
            self.fault("the header again: files that were joined have one each")
        for column, cell in row.items():
            if cell == "" and column in ("path", "label"):
                self.fault(f"empty {column}")
            if "\0" in cell or "\n" in cell or "\r" in cell:
                kind = "NUL byte" if "\0" in cell else "line break"
                self.fault(f"a {kind} in {column} {cell[:40]!r}")
            if column != "path":
                self._check_text(column, cell)
        self.splits.append(_SPLITS.index(self._split(row.get("split", ""))))
        self.lines.append(self.line)
        self.labels.append(self.label_index.setdefault(row["label"], len(self.label_index)))
        group = row.get("group", "")
        self.groups.append(self.group_index.setdefault(group, len(self.group_index)))

    def _split(self, cell: str) -> str:
        word = cell.lower()
        if word not in self.split_of:
            split = split_cell(cell)
            if split is None:
                self.fault(f"split {cell!r}: choose train, val, test or leave it empty")
            if other := unlike_name(word, split, self.split_of):
                self.fault(two_names(cell, other, split))
            self.split_of[word] = split
        return self.split_of[word]

    def _check_breaks(self, fields: list[str]) -> None:
        """Refuses a cell of several lines that look like rows, as its quotes were not meant so."""
        most, path = len(self.columns) - 1, self.columns.index("path")
        suffix = _suffix(fields[path]) if path < len(fields) else ""
        for place, cell in enumerate(fields):
            if len(lines := _LINE_BREAK.split(cell)) == 1:
                continue
            first, *whole, last = (line.split(self.delimiter) for line in lines)
            rows = [row for row in whole if len(row) == most + 1]
            if len(last) == place + 1 and len(first) >= most + 1 - place:
                rows.append(last if path < place else [""] * place + first)
            if any(self._is_like(row[path], suffix) for row in rows):
                column = self.columns[place] if place < len(self.columns) else ""
                self.fault(
                    f"the quote in {column!r} takes {len(lines)} lines into one cell, which look "
                    "like rows: close it, or write it twice within a quoted cell"
                )

    def _is_like(self, cell: str, suffix: str) -> bool:
        """Whether a cell looks like the row's path; without a suffix, if there is such a file."""
        if suffix:
            return _suffix(cell) == suffix
        return bool(cell.strip()) and os.path.exists(os.path.join(self.base, cell.strip()))

    def _check_text(self, column: str, cell: str, line: int | None = None) -> None:
        """Checks that a cell can be written to UTF-8 files later, as all but paths are."""
        if not cell.isascii() and not _encodable(cell):
            self.fault(f"{column} {cell[:40]!r} is not UTF-8; save the file as UTF-8", line)

    def _check_repeated(self) -> None:
        hashes = np.fromiter((hash(path) for path in self.paths), np.int64, len(self.paths))
        values, counts = np.unique(hashes, return_counts=True)
        first: dict[str, int] = {}
        for i in np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist():
            path = self.paths[i]
            if path in first:
                shown = os.path.relpath(path, self.base)
                self.fault(f"path {shown!r} again, after line {first[path]}", self.lines[i])
            first[path] = self.lines[i]

    def _check_groups(self) -> None:
        """Checks that every row or no row has a group."""
        empty = self.group_index.get("")
        if empty is not None and len(self.group_index) > 1:
            self.fault(
                "empty group, but other images have one: give each image without a group a unique "
                "name",
                self.lines[self.groups.index(empty)],
            )

    def table(self, path: str) -> ImageTable:
        """The table that was read.

        Raises:
            UsageError: the first image does not exist.
        """
        if not os.path.exists(self.paths[0]):
            raise UsageError(
                f"{self.name} line {self.lines[0]}: {self.paths[0]} does not exist; "
                f"paths are relative to {self.base}"
            )
        classes, labels = _sorted(list(self.label_index), self.labels)
        groups, group = _sorted(list(self.group_index), self.groups)
        return ImageTable(
            name=self.name,
            classes=classes,
            labels=labels,
            splits=np.array(_SPLITS, "U5")[np.asarray(self.splits)],
            groups=None if groups == [""] else np.array(groups)[group],
            files=self.paths,
            base=self.base,
            location=os.path.abspath(path),
            warnings=tuple(self._further_lines()),
            columns={c: cells.array() for c, cells in self.further.items() if cells.usable},
        )

    def _further_lines(self) -> Iterator[str]:
        if not self.further:
            return
        yield f"columns that are used for subgroups only: {shortened(list(self.further), 6)}"
        for name in self.further:
            if (times := self.columns.count(name)) > 1:
                yield f"{times} columns are called {name!r}: the first one is used"
        if "group" in self.columns:
            return
        for name, cells in self.further.items():
            if may_be_groups(name) and (line := groups_line(name, cells.index, len(self.labels))):
                yield line


class _Cells:
    """A further column: its distinct values, and a number for each row."""

    def __init__(self, place: int) -> None:
        self.place, self.codes = place, array("q")
        self.index: dict[str, int] = {}

    @property
    def usable(self) -> bool:
        return len(self.index) <= _MOST_VALUES

    def add(self, cell: str) -> None:
        if self.usable:
            self.codes.append(self.index.setdefault(cell, len(self.index)))

    def array(self) -> NDArray[np.object_]:
        """(N,) strings; equal ones are one object."""
        return np.array(list(self.index), dtype=object)[np.asarray(self.codes)]


def may_be_groups(column: str) -> bool:
    """Whether the name of a column says that it may hold groups, such as patients."""
    return bool(_OF_GROUPS.search(column.lower()))


def groups_line(column: str, values: Sized, images: int) -> str | None:
    """A warning that a column may hold the groups, which are not known; None if it may not.

    Args:
        column: its name, for which `may_be_groups`.
        values: the distinct ones.
        images: their number.
    """
    # some groups have several images, and there are too many for a category
    if not images / 20 < len(values) < images:
        return None
    return (
        f"images with the same {column!r} may end up in different splits, which makes scores too "
        "good: call the column 'group' to keep them together"
    )


def _suffix(path: str) -> str:
    return os.path.splitext(path.strip())[1].lower()


def _from_windows(path: str) -> str:
    return os.path.normpath(path.replace("\\", os.sep))


def _encodable(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _sorted(names: Sequence[str], codes: array) -> tuple[list[str], NDArray[np.int64]]:
    """The names in sorted order, and the codes renumbered accordingly."""
    order = sorted(range(len(names)), key=names.__getitem__)
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names))
    return [names[i] for i in order], place[np.asarray(codes)]
