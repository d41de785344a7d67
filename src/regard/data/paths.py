"""Lists of file paths that take little memory."""

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray


class PathList(Sequence[str]):
    """File paths in one block of bytes, read as strings one at a time.

    A million paths are three Python objects, so forked workers share their memory pages; selections
    share the text.
    """

    def __init__(self, text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._text, self._starts, self._ends = text, starts, ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathList":
        """The paths from any iterable, which is read once."""
        text = bytearray()
        ends = np.fromiter(_appended(text, paths), np.int64)
        starts = np.zeros_like(ends)
        starts[1:] = ends[:-1]
        return cls(bytes(text), starts, ends)

    @classmethod
    def joined(cls, lists: Sequence["PathList"]) -> "PathList":
        """The paths of several lists, one after the other."""
        shifts = np.cumsum([0, *(len(paths._text) for paths in lists)])[:-1]
        pairs = list(zip(lists, shifts, strict=True))
        return cls(
            b"".join(paths._text for paths in lists),
            np.concatenate([paths._starts + shift for paths, shift in pairs]),
            np.concatenate([paths._ends + shift for paths, shift in pairs]),
        )

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> "PathList": ...
    def __getitem__(self, i: int | slice) -> "str | PathList":
        if isinstance(i, slice):
            return PathList(self._text, self._starts[i], self._ends[i])
        return os.fsdecode(self._text[self._starts[i] : self._ends[i]])

    def select(self, at: NDArray[np.int64]) -> "PathList":
        """These paths, in this order."""
        return PathList(self._text, self._starts[at], self._ends[at])


def _appended(text: bytearray, paths: Iterable[str]) -> Iterable[int]:
    for path in paths:
        text += os.fsencode(path)
        yield len(text)
