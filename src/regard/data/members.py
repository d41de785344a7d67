"""Files inside tar files, read in place by their offset and size."""

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from regard.data.paths import PathList
from regard.errors import FileError


class Member(str):
    """The path SHARD/NAME of a file within a tar file.

    Attributes:
        shard: path of the tar file.
        offset, size: where its bytes are in the tar file.
    """

    shard: str
    offset: int
    size: int

    def __new__(cls, shard: str, name: str, offset: int, size: int) -> "Member":
        path = super().__new__(cls, f"{shard}/{name}")
        path.shard, path.offset, path.size = shard, offset, size
        return path

    def __reduce__(self) -> Any:
        return Member, (self.shard, self[len(self.shard) + 1 :], self.offset, self.size)

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            OSError: the tar file can't be read, or (FileError) is shorter than when it was indexed.
        """
        with open(self.shard, "rb", buffering=0) as file:
            file.seek(self.offset)
            content = bytearray()
            while missing := self.size - len(content):  # a read may return less than requested
                if not (block := file.read(missing)):
                    raise FileError(f"{os.path.basename(self.shard)} is cut short")
                content += block
        return bytes(content)


class MemberList(PathList):
    """Members of several tar files, as arrays; each `Member` is made on access."""

    def __init__(
        self, names: PathList, shards: Sequence[str], of: NDArray[np.int32],
        offsets: NDArray[np.int64], sizes: NDArray[np.int64],
    ) -> None:  # fmt: skip
        super().__init__(names._text, names._starts, names._ends)
        self._shards, self._of, self._offsets, self._sizes = shards, of, offsets, sizes

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> "MemberList": ...
    def __getitem__(self, i: int | slice) -> "str | MemberList":
        if isinstance(i, slice):
            return self.select(np.arange(len(self))[i])
        place = (int(self._offsets[i]), int(self._sizes[i]))
        return Member(self._shards[int(self._of[i])], super().__getitem__(i), *place)

    def select(self, at: NDArray[np.int64]) -> "MemberList":
        """These members, in this order."""
        of, offsets, sizes = self._of[at], self._offsets[at], self._sizes[at]
        return MemberList(super().select(at), self._shards, of, offsets, sizes)


def open_binary(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file, or a member of a tar file, for reading.

    Raises:
        OSError: it can't be read, or is not a regular file but, say, a pipe, which would block.
    """
    if isinstance(path, Member):
        return io.BytesIO(path.read())
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    return open(path, "rb")


def on_disk(path: str) -> str:
    """The file that holds an image: the image file itself, or the tar file of a member."""
    return path.shard if isinstance(path, Member) else path
