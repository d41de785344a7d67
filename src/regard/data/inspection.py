"""What each image of a table holds: decoded once, by worker processes if there are many."""

import hashlib
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.cores import cores
from regard.data.images import Stored, is_gray, read_stored
from regard.data.sources import ImageTable
from regard.data.thumbnails import thumbnail
from regard.errors import FileError, ImageError

_CHUNK = 32  # images per task of a worker
_SEQUENTIAL = 200  # for up to this many files, starting workers takes longer than reading


class Inspection(NamedTuple):
    """What is recorded of one image.

    Attributes:
        lowest, highest: of the finite values, as stored.
        finite: number of finite values per channel.
        digest: hash of shape and pixels, 16 bytes.
        sums: (channels, 2) of values scaled to 0..1 and of their squares; measurements unscaled.
        thumbnail: see `regard.data.thumbnails`.
    """

    shape: tuple[int, int, int]
    dtype: str
    gray: bool  # one channel, or three that are equal
    lowest: float
    highest: float
    finite: int
    digest: bytes
    sums: NDArray[np.float64]
    thumbnail: NDArray[np.uint8]


def _inspect(stored: Stored) -> Inspection:
    pixels = np.ascontiguousarray(stored.pixels)
    height, width, channels = pixels.shape
    hashed = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    hashed.update(pixels.data)
    known = pixels if pixels.dtype.kind != "f" else pixels[np.isfinite(pixels)]
    return Inspection(
        (height, width, channels),
        pixels.dtype.name,
        is_gray(pixels),
        float(known.min()) if known.size else 0.0,
        float(known.max()) if known.size else 0.0,
        known.size // channels,
        hashed.digest(),
        np.array([_sums(pixels[..., c]) for c in range(channels)]),
        thumbnail(pixels),
    )


def _sums(values: NDArray[Any]) -> tuple[float, float]:
    """(H, W) -> sum and sum of squares of values scaled to 0..1; measurements are not scaled."""
    if values.dtype not in (np.uint8, np.uint16):
        values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
        return float(values.sum()), float(np.square(values).sum())
    if values.dtype == np.uint8:  # PIL counts several times faster than numpy
        counts = np.array(Image.fromarray(np.ascontiguousarray(values)).histogram(), np.float64)
    else:
        counts = np.bincount(values.ravel(), minlength=65536).astype(np.float64)
    levels = np.linspace(0, 1, len(counts))
    return float(counts @ levels), float(counts @ levels**2)


def _inspect_files(paths: list[str]) -> list[Inspection | str]:
    """In a worker: what each file holds, or the reason why it can't be read."""
    results: list[Inspection | str] = []
    for path in paths:
        try:
            results.append(_inspect(read_stored(path)))
        except ImageError as error:
            results.append(str(error).removeprefix(f"{path}: "))
    return results


def inspect_images(
    table: ImageTable, indices: NDArray[np.int64], workers: int | None
) -> Iterator[tuple[int, Inspection | str]]:
    """(index, inspection or the reason why it can't be read) of each image, in order."""
    if table.files is None:
        yield from ((int(i), _inspect(Stored(table.read(int(i))))) for i in indices)
        return
    if workers is None:
        workers = cores() if len(indices) > _SEQUENTIAL else 1
    files = table.files
    chunks = (indices[at : at + _CHUNK].tolist() for at in range(0, len(indices), _CHUNK))
    if workers == 1:
        for i in itertools.chain.from_iterable(chunks):
            yield i, _inspect_files([files[i]])[0]
        return
    # never fork: the caller may have threads (torch's) whose locks a forked child would wait for
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    waiting: list[tuple[list[int], Future[list[Inspection | str]]]] = []
    try:
        for chunk in itertools.chain(chunks, [None] * (2 * workers)):
            if chunk is not None:
                paths = [files[i] for i in chunk]
                waiting.append((chunk, pool.submit(_inspect_files, paths)))
            if waiting and (chunk is None or len(waiting) >= 2 * workers):
                first, future = waiting.pop(0)
                yield from zip(first, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise FileError("a process that read images died (memory?); try one worker") from error
    finally:
        pool.shutdown(cancel_futures=True)
