"""Batches for training and evaluation, from memory or streamed by workers.

Both give the same images: position p of the training order holds the image `SampleOrder.at(p)`,
cropped and augmented with the random numbers of position p, whatever decodes it and whatever the
batch size. The order is a pure function of the seed, so resuming just means starting at a position.
"""

import functools
import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from regard.data.augment import Augmentation, random_numbers, random_resized
from regard.data.preprocess import Preprocess, to_tensor
from regard.data.sources import ImageTable
from regard.data.workers import (
    PREFETCH,
    default_workers,
    never,
    processes_that_fit,
    read_ahead,
    read_by_processes,
    shared_memory_free,
)
from regard.errors import ImageError
from regard.files import spread

log: logging.Logger = logging.getLogger(__name__)

CHUNK = 8  # images that a thread decodes at a time
FIRST = 8  # chunks decoded before the time per image is estimated
PYTHON = 2e-4  # seconds per image that threads can't share
MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded images that memory="auto" holds


class SampleOrder:
    """Deterministic sample order: position to dataset index, epoch after epoch.

    Args:
        count: number of images.
        seed: random seed of the order.
        weights: (count,) sampling weights; each epoch is then `count` draws with replacement
            (default: a permutation each epoch).
    """

    def __init__(self, count: int, seed: int, weights: NDArray[Any] | None = None) -> None:
        self.count: int = count
        self.seed: int = seed
        self.chances: NDArray[np.float64] | None = (
            None if weights is None else weights / weights.sum()
        )
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        order = self._epochs.get(epoch)
        if order is None:
            rng = np.random.default_rng([self.seed, epoch])
            if self.chances is None:
                order = rng.permutation(self.count)
            else:
                order = rng.choice(self.count, self.count, p=self.chances)
            previous = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs = previous | {epoch: order}  # atomic: threads may be reading it
        return order

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The images at `count` (at least 1) positions from `start` on."""
        positions = np.arange(start, start + count)
        epochs = positions // self.count
        return np.concatenate(
            [self._epoch(int(e))[positions[epochs == e] % self.count] for e in np.unique(epochs)]
        )


class Spans(Sequence[Any]):
    """Batches as (start position, count), computed on access, so that millions cost nothing.

    Args:
        starts: the start positions.
        size: images in a batch.
        end: number of positions; shortens the last batch (default: all are full).
    """

    def __init__(self, starts: range, size: int, end: int | None = None) -> None:
        self.starts: range = starts
        self.size: int = size
        self.end: int | None = end

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return Spans(self.starts[k], self.size, self.end)
        start = self.starts[k]
        return start, self.size if self.end is None else min(self.size, self.end - start)


@dataclass
class Batch:
    """Images with their rows and random numbers; unreadable ones are left out.

    Attributes:
        images: (B, C, H, W) in 0..255.
        indices: (B,) rows of the table.
        random_numbers: (B, WIDTH) uniform random numbers for the augmentation.
        unreadable: (row, reason) of the images left out.
    """

    images: Tensor
    indices: Tensor
    random_numbers: Tensor
    unreadable: list[tuple[int, str]] = field(default_factory=list)


def repeated(batch: Batch, size: int) -> Batch:
    """A batch of `size` images that repeats the images of another."""
    rows = torch.arange(size) % len(batch.indices)
    return Batch(batch.images[rows], batch.indices[rows], batch.random_numbers[rows])


@dataclass
class Reader:
    """Reads images of a table at the network's input size, before normalization."""

    table: ImageTable
    preprocess: Preprocess
    augmentation: Augmentation | None = None  # None: evaluation

    def decode(self, index: int) -> Tensor:
        """(C, H, W) in 0..255, at the image's own size.

        Large JPEGs are decoded at a fraction of their size only for training, and not if the recipe
        decodes in full: evaluation sees the same pixels as prediction.
        """
        preprocess = self.preprocess
        pixels = self.table.read(
            index,
            channels=preprocess.input_size[0],
            at_least=self._at_least,
            value_range=preprocess.value_range,
        )
        return to_tensor(pixels)

    @property
    def _at_least(self) -> int | None:
        """The shorter side that a decoded image needs; None: it is decoded in full.

        With crops of random area, a square one of the smallest area is not enlarged.
        """
        if self.augmentation is None or self.augmentation.full_decode:
            return None
        if self.crops_at_random:
            smallest = math.sqrt(self.augmentation.crop_scale[0])
            return math.ceil(max(self.preprocess.size) / smallest)
        return self.preprocess.at_least

    def crop(self, image: Tensor, u: Tensor) -> Tensor:
        """(C, H, W) -> (C, *size): cropped at random in training, otherwise as in evaluation."""
        if self.augmentation is not None and self.augmentation.random_crop == "resized":
            return random_resized(image, u, self.augmentation, self.preprocess.size)
        return self.preprocess.fit(image)

    @property
    def crops_at_random(self) -> bool:
        """Whether the crop differs from epoch to epoch."""
        return self.augmentation is not None and self.augmentation.random_crop == "resized"


def stacked(images: Sequence[Tensor]) -> Tensor:
    """(C, H, W) each -> (B, C, H, W); if one image is float, all become float."""
    if len({image.dtype for image in images}) > 1:
        images = [image.float() for image in images]
    return torch.stack(list(images))


class _Batches(Dataset[Batch]):
    """Item (start position, count) is the batch at these positions, decoded on access."""

    def __init__(self, reader: Reader, order: SampleOrder | None, seed: int) -> None:
        self.reader, self.order, self.seed = reader, order, seed

    def __getitem__(self, span: tuple[int, int]) -> Batch:
        start, count = span
        u = random_numbers(self.seed, start, count)
        rows = np.arange(start, start + count) if self.order is None else self.order.at(*span)
        images, readable, unreadable = [], [], []
        for k, row in enumerate(rows.tolist()):
            try:
                images.append(self.reader.crop(self.reader.decode(row), u[k]))
                readable.append(k)
            except ImageError as error:
                unreadable.append((row, str(error)))
        shape = (0, *self.reader.preprocess.input_size)
        together = stacked(images) if images else torch.zeros(shape)
        batch = Batch(together, torch.from_numpy(rows)[readable], u[readable], unreadable)
        if get_worker_info() is not None:
            # raised here, it is an error of this batch; the queue's thread would only print it, and
            # the batch would never arrive
            for tensor in (batch.images, batch.indices, batch.random_numbers):
                tensor.share_memory_()
        return batch


class StreamingLoader:
    """Batches in order, decoded by worker processes, or by threads where those can't be used.

    Threads are used if shared memory is too small for batches from processes, or if OpenVINO is
    loaded: processes forked from this one would crash it when they end.

    Attributes:
        order: the sample order, or None for rows in order.
        stop: called while a batch is not ready; True means to give up waiting.
    """

    def __init__(self, reader: Reader, order: SampleOrder | None, seed: int, workers: int) -> None:
        self.reader: Reader = reader
        self.order: SampleOrder | None = order
        self.workers: int = workers
        self.stop: Callable[[], bool] = never
        self._dataset = _Batches(reader, order, seed)
        self._running: Iterator[Batch] = iter(())

    def batches(self, spans: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """The batches at these (start, count), in this order.

        Raises:
            WaitInterrupted: `stop` returned True while a batch was not ready.
            ResourceError: memory ran out, a worker was killed, or no batch came for minutes.
        """
        self.close()
        self._running = self._read(spans)
        return self._running

    def close(self) -> None:
        """Ends the workers of the latest call of `batches`."""
        getattr(self._running, "close", lambda: None)()

    def _read(self, spans: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        read, threads = self._dataset.__getitem__, min(self.workers, len(spans))
        if threads == 0:
            return map(read, spans)
        if len(spans) > 1 and "openvino" not in sys.modules:  # processes take long to start
            processes, prefetch = self._fitting(spans, threads)
            if processes:
                return read_by_processes(self._dataset, spans, processes, prefetch, self.stop)
        return read_ahead(spans, read, threads, PREFETCH * threads, self.stop)

    def _fitting(self, spans: Sequence[tuple[int, int]], workers: int) -> tuple[int, int]:
        """Worker processes and their prefetching, limited by the free shared memory."""
        free = shared_memory_free()
        if math.isinf(free):
            return workers, PREFETCH
        size = spans[0][1] * math.prod(self.reader.preprocess.shape)
        size *= value_bytes(self.reader, most=1) or 1
        processes, prefetch = processes_that_fit(workers, size, free)
        if processes < workers:
            _announce_small_memory(workers, processes)
        return processes, prefetch


@functools.cache  # once per process
def _announce_small_memory(workers: int, processes: int) -> None:
    instead = f"only {processes}" if processes else "threads"
    log.info(
        f"shared memory (/dev/shm) is too small for batches from {workers} worker processes: "
        f"{instead} read the images"
    )


class InMemoryLoader:
    """Batches from decoded images held in memory, as one tensor or as a list of tensors.

    Args:
        reader: how the images are cropped.
        order: the sample order, or None for rows in order.
        seed: random seed of the augmentation.
        images: (N, C, H, W), or N of (C, H, W).
        unreadable: reasons by row, for rows that are left out of every batch.
        threads: threads that crop the images of a list ahead of use, one batch each, for a device
            that computes meanwhile; 0: the caller crops.
    """

    def __init__(
        self,
        reader: Reader,
        order: SampleOrder | None,
        seed: int,
        images: Tensor | list[Tensor],
        unreadable: dict[int, str] | None = None,
        threads: int = 0,
    ) -> None:
        self.reader: Reader = reader
        self.order: SampleOrder | None = order
        self.seed: int = seed
        self.images: Tensor | list[Tensor] = images
        self.unreadable: dict[int, str] = unreadable or {}
        self.threads: int = threads

    def close(self) -> None:
        """Does nothing: the threads end with the batches."""

    def batches(self, spans: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """The batches at these (start, count), in this order."""
        if self.threads and not isinstance(self.images, Tensor):
            return read_ahead(spans, self._batch, self.threads, self.threads + 1)
        return map(self._batch, spans)

    def _batch(self, span: tuple[int, int]) -> Batch:
        start, count = span
        rows = np.arange(start, start + count)
        if self.order is not None:
            rows = self.order.at(start, count)
        u = random_numbers(self.seed, start, count)
        bad: list[tuple[int, str]] = []
        if self.unreadable:
            bad = [(r, self.unreadable[r]) for r in rows.tolist() if r in self.unreadable]
            good = np.array([r not in self.unreadable for r in rows.tolist()], dtype=bool)
            rows, u = rows[good], u[torch.from_numpy(good)]
        indices = torch.from_numpy(rows)
        if isinstance(self.images, Tensor):
            return Batch(self.images[indices], indices, u, bad)
        images = [self.reader.crop(self.images[r], u[k]) for k, r in enumerate(rows.tolist())]
        shape = (0, *self.reader.preprocess.input_size)
        return Batch(stacked(images) if images else torch.zeros(shape), indices, u, bad)


def decode_all(
    reader: Reader,
    *,
    rows: Sequence[int] | None = None,
    skip: Collection[int] = (),
    limit: float = math.inf,
    on_image: Callable[[int], None] | None = None,
) -> tuple[Tensor | list[Tensor] | None, list[tuple[int, str]]]:
    """Decodes all images of the reader's table with threads, into one tensor where sizes allow.

    Args:
        reader: reads the images.
        rows: which to decode (default: all).
        skip: rows that are not read; their images are zeros.
        limit: maximum bytes of the decoded images.
        on_image: called with 1 after each image.

    Returns:
        The images, with zeros for those that can't be read or are skipped, or None if they take
        more than `limit`; and (row, reason) of those that can't be read.
    """
    unreadable: list[tuple[int, str]] = []
    zero = torch.zeros(reader.preprocess.input_size, dtype=torch.uint8)

    def one(row: int) -> Tensor:
        if row in skip:
            return zero
        try:
            image = reader.decode(row)
        except ImageError as error:
            unreadable.append((row, str(error)))
            return zero
        return image if reader.crops_at_random else reader.preprocess.fit(image)

    def chunk(of: Sequence[int]) -> list[Tensor]:
        return [one(row) for row in of]

    several: list[Tensor] = []
    rows = range(len(reader.table)) if rows is None else rows
    count = 0 if reader.crops_at_random else len(rows)
    together = torch.zeros((count, *zero.shape), dtype=torch.uint8)
    size = 0
    chunks = [rows[k : k + CHUNK] for k in range(0, len(rows), CHUNK)]
    for k, image in enumerate(itertools.chain.from_iterable(_by_threads(chunks, chunk))):
        if reader.crops_at_random:
            several.append(image)
            size += image.nbytes
        else:  # one float image makes all float
            kind = torch.promote_types(together.dtype, image.dtype)
            size = together.numel() * kind.itemsize
            if size <= limit:
                together = together.to(kind)
                together[k] = image
        if size > limit:
            return None, []
        if on_image is not None:
            on_image(1)
    unreadable.sort()
    return several if reader.crops_at_random else together, unreadable


def _by_threads(
    chunks: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], list[Tensor]]
) -> Iterator[list[Tensor]]:
    """decode(chunk) for each chunk, with as many threads as are useful.

    Most of the time for a small image is spent in Python, which runs one thread at a time:
    sixteen threads take twice as long as one to read 32x32 pixels.
    """
    started, count = time.perf_counter(), 0
    for chunk in chunks[:FIRST]:
        yield decode(chunk)
        count += len(chunk)
    of_an_image = (time.perf_counter() - started) / max(1, count)
    threads = min(default_workers(), round(of_an_image / PYTHON))
    if threads <= 1:
        yield from map(decode, chunks[FIRST:])
    else:
        yield from read_ahead(chunks[FIRST:], decode, threads, 2 * threads)


def value_bytes(reader: Reader, most: int = 32) -> int:
    """Bytes per value of the decoded images: 1, or 4 for more than 8 bits; 0: none is readable.

    Args:
        reader: reads the images.
        most: number of images that are decoded to find out, evenly spread.
    """
    return max((image.element_size() for image in _sample(reader, most)), default=0)


def _sample(reader: Reader, most: int) -> Iterator[Tensor]:
    for row in spread(len(reader.table), most).tolist():
        try:
            yield reader.decode(row)
        except ImageError:
            continue


def fits_in_memory(reader: Reader, limit: float = MEMORY_LIMIT) -> bool:
    """Whether the decoded images take at most `limit` bytes, estimated from a sample of 32.

    Images that are cropped at random are held at their own size, others at the input size; those
    with more than 8 bits as float32. If own sizes differ, the limit is a quarter.
    """
    table = reader.table
    images = list(_sample(reader, 32))
    if not images:
        return False
    width = max(image.element_size() for image in images)  # bytes per value
    if not reader.crops_at_random:
        return len(table) * math.prod(reader.preprocess.input_size) * width <= limit
    limit = limit if table.arrays is not None else limit / 4
    return float(np.mean([image.numel() for image in images])) * width * len(table) <= limit
