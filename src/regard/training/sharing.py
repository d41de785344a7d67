"""Decoded images in memory shared by the processes of a machine: each decodes its share.

The images are in a file that all of them map into memory, in /dev/shm if that has room, else
in the temporary directory. It is unlinked as soon as all have mapped it, so it disappears with
the last process, however that ends.
"""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.loading import Reader, decode_all
from regard.training.distributed import Ranks

SPARE = 64e6  # bytes to leave free where the file is
SHARED_MEMORY = Path("/dev/shm")

Images = Tensor | list[Tensor]


def decode_together(
    reader: Reader,
    ranks: Ranks,
    *,
    skip: Collection[int] = (),
    limit: float = math.inf,
    on_image: Callable[[int], None] | None = None,
) -> tuple[Images | None, list[tuple[int, str]]]:
    """Like `decode_all`, by all processes of the machine; lists its own share's unreadable images.

    If no file system has room for the images, each process holds all of them.
    """
    if ranks.local == 1:
        return decode_all(reader, skip=skip, limit=limit, on_image=on_image)
    rows = range(ranks.place, len(reader.table), ranks.local)
    mine, bad = decode_all(reader, rows=rows, skip=skip, limit=limit, on_image=on_image)
    kinds = None if mine is None else [(tuple(image.shape), image.dtype) for image in mine]
    each = ranks.all(kinds)
    shares = each[ranks.rank - ranks.place :][: ranks.local]
    if any(one is None for one in each) or mine is None:
        return None, []
    shapes = [shares[row % ranks.local][row // ranks.local][0] for row in range(len(reader.table))]
    dtype = torch.uint8
    for kind in {kind for share in shares for _, kind in share}:
        dtype = torch.promote_types(dtype, kind)
    values = sum(math.prod(shape) for shape in shapes)
    if any(ranks.all(values * dtype.itemsize > limit)):
        return None, []
    memory = _mapped(values, dtype, ranks)
    if memory is None:
        return decode_all(reader, skip=skip, limit=limit / ranks.local)
    images = [
        part.view(shape)
        for part, shape in zip(memory.split([*map(math.prod, shapes)]), shapes, strict=True)
    ]
    for row, image in zip(rows, mine, strict=True):
        images[row].copy_(image)
    ranks.all(None)  # all images are there
    if isinstance(mine, Tensor):
        return memory.view(len(shapes), *mine.shape[1:]), bad
    return images, bad


def _mapped(values: int, dtype: torch.dtype, ranks: Ranks) -> Tensor | None:
    """A tensor of so many values shared by the machine's processes; None: no room."""
    size, path = values * dtype.itemsize, None
    if ranks.place == 0:
        path = _file(size)
    paths = ranks.all(path)
    found = paths[ranks.rank - ranks.place]
    machines = paths[:: ranks.local]
    memory = None
    if found is not None and None not in machines:
        memory = torch.from_file(str(found), shared=True, size=values, dtype=dtype)
    ranks.all(None)  # all have mapped it
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink()
    return memory


def _file(size: int) -> Path | None:
    """A new file of `size` bytes, where there is room for it."""
    for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free < size + SPARE:
                continue
            number, name = tempfile.mkstemp(prefix="regard-", dir=folder)
            try:
                # allocated now: a write to a page that finds no room later would kill the process
                getattr(os, "posix_fallocate", _truncate)(number, 0, size)
                return Path(name)
            except OSError:
                os.unlink(name)
            finally:
                os.close(number)
    return None


def _truncate(number: int, _: int, size: int) -> None:
    os.ftruncate(number, size)


def rows_of(images: Tensor, rows: NDArray[np.int64], ranks: Ranks) -> Tensor:
    """These rows of held images, in increasing order; shared images are moved in place."""
    if images.untyped_storage().filename is None:
        return images[torch.from_numpy(rows)]
    if ranks.place == 0:
        for k, row in enumerate(rows.tolist()):
            if k != row:
                images[k] = images[row]
    ranks.all(None)
    return images[: len(rows)]
