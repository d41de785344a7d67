"""Batches for training and for evaluation, from memory or streamed by workers.

Both ways give the same images: place p in the order of training holds the image
`SampleOrder.at(p)`, cut and augmented by the random numbers of place p, whoever decodes it and
whatever the batch. The order is a pure function of the seed, so that resuming is starting at a
place.
"""

import math
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from regard.data.augment import Augmentation, random_numbers, random_resized
from regard.data.preprocess import Preprocess, to_tensor
from regard.data.sources import ImageTable
from regard.errors import ImageError

MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded images that are held


class SampleOrder:
    """Which image stands at each place: epoch after epoch, shuffled, or drawn by weight.

    Args:
        count: of images.
        seed: of the order.
        weights: (count,) each image's weight; then every epoch is `count` draws with
            replacement, else a permutation.
    """

    def __init__(self, count: int, seed: int, weights: NDArray[Any] | None = None) -> None:
        self.count, self.seed = count, seed
        self.chances = None if weights is None else weights / weights.sum()
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        order = self._epochs.get(epoch)
        if order is None:
            rng = np.random.default_rng([self.seed, epoch])
            if self.chances is None:
                order = rng.permutation(self.count)
            else:
                order = rng.choice(self.count, self.count, p=self.chances)
            kept = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs = kept | {epoch: order}  # replaced whole: threads may be reading
        return order

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The images at `count` places from `start` on, at least one."""
        places = np.arange(start, start + count)
        epochs = places // self.count
        return np.concatenate(
            [self._epoch(int(e))[places[epochs == e] % self.count] for e in np.unique(epochs)]
        )


@dataclass
class Batch:
    """images (B, C, H, W) in 0..255 and what belongs to them; unreadable ones are left out."""

    images: Tensor
    indices: Tensor  # (B,) rows of the table
    draws: Tensor  # (B, WIDTH)
    unreadable: list[tuple[int, str]] = field(default_factory=list)


@dataclass
class Reader:
    """Reads one image of a table as the network's input needs it, before standardizing."""

    table: ImageTable
    preprocess: Preprocess
    augmentation: Augmentation | None = None  # for its random crop; None: evaluation

    def decode(self, index: int) -> Tensor:
        """(C, H, W) in 0..255, of the image's own size.

        Only for training are large JPEGs decoded at a part of their size: evaluation sees the
        pixels that prediction sees.
        """
        preprocess = self.preprocess
        pixels = self.table.read(
            index,
            channels=preprocess.input_size[0],
            at_least=None if self.augmentation is None else preprocess.at_least,
            value_range=preprocess.value_range,
        )
        return to_tensor(pixels)

    def place(self, image: Tensor, u: Tensor) -> Tensor:
        """(C, H, W) -> (C, *size): cut at random where the recipe does so, else as in a test."""
        if self.augmentation is not None and self.augmentation.random_crop == "resized":
            return random_resized(image, u, self.augmentation, self.preprocess.size)
        return self.preprocess.fit(image)

    @property
    def cuts_at_random(self) -> bool:
        """Whether the cut differs from epoch to epoch."""
        return self.augmentation is not None and self.augmentation.random_crop == "resized"


def _stack(images: Sequence[Tensor]) -> Tensor:
    """(C, H, W) each -> (B, C, H, W); one that is float makes all float."""
    if len({image.dtype for image in images}) > 1:
        images = [image.float() for image in images]
    return torch.stack(list(images))


class _Places(Dataset[Batch]):
    """Item k is the k-th batch, given as (start place, count); decoded in a worker."""

    def __init__(self, reader: Reader, order: SampleOrder | None, seed: int) -> None:
        self.reader, self.order, self.seed = reader, order, seed

    def __getitem__(self, span: tuple[int, int]) -> Batch:
        start, count = span
        u = random_numbers(self.seed, start, count)
        rows = np.arange(start, start + count) if self.order is None else self.order.at(*span)
        images, kept, unreadable = [], [], []
        for k, row in enumerate(rows.tolist()):
            try:
                images.append(self.reader.place(self.reader.decode(row), u[k]))
                kept.append(k)
            except ImageError as error:
                unreadable.append((row, str(error)))
        shape = (0, *self.reader.preprocess.input_size)
        stacked = _stack(images) if images else torch.zeros(shape)
        return Batch(stacked, torch.from_numpy(rows)[kept], u[kept], unreadable)


_ENDING = {signal.SIGINT, signal.SIGTERM}


def _leave_signals_to_the_parent(_: int) -> None:
    """For a worker: one signal to the whole group of processes is for the parent to act on.

    Ctrl-C, `timeout`, systemd and SLURM all signal the group. The parent then needs its
    workers for as long as it takes to end a step; afterwards it ends them itself, by a SIGTERM
    where it must, which is why only the first is ignored.
    """

    def first(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


def default_workers() -> int:
    """One a core that this process may use, eight at most."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)


class StreamingLoader:
    """Batches decoded by workers, in order: processes, or threads where none may be forked.

    Processes forked beside OpenVINO, which has threads of its own, were seen to crash this one
    later, at the next end of a child.
    """

    def __init__(self, reader: Reader, order: SampleOrder | None, seed: int, workers: int) -> None:
        self.places = _Places(reader, order, seed)
        self.workers = workers

    def batches(self, spans: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """The batches of these (start, count), in this order."""
        if self.workers and "openvino" in sys.modules:
            return read_ahead(spans, self.places.__getitem__, self.workers, 4 * self.workers)
        loader = DataLoader(
            self.places,
            batch_size=None,
            sampler=spans,
            num_workers=self.workers,
            worker_init_fn=_leave_signals_to_the_parent if self.workers else None,
            prefetch_factor=4 if self.workers else None,
        )
        if not self.workers:
            return iter(loader)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # until a worker is ready
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_ahead(
    items: Iterable[Any], read: Callable[[Any], Any], threads: int, window: int
) -> Iterator[Any]:
    """read(item) of each item, in order, with at most `window` of them under way."""
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) >= window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class InMemoryLoader:
    """Batches from images that are held decoded in memory, as one tensor where they can be."""

    def __init__(
        self,
        reader: Reader,
        order: SampleOrder | None,
        seed: int,
        images: Tensor | list[Tensor],
    ) -> None:
        self.reader, self.order, self.seed, self.images = reader, order, seed, images

    def batches(self, spans: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """The batches of these (start, count), in this order."""
        for start, count in spans:
            rows = np.arange(start, start + count)
            if self.order is not None:
                rows = self.order.at(start, count)
            u = random_numbers(self.seed, start, count)
            indices = torch.from_numpy(rows)
            if isinstance(self.images, Tensor):
                yield Batch(self.images[indices], indices, u)
            else:
                cut = [self.reader.place(self.images[r], u[k]) for k, r in enumerate(rows.tolist())]
                yield Batch(_stack(cut), indices, u)


def decode_all(
    reader: Reader, *, on_image: Any = None
) -> tuple[Tensor | list[Tensor], list[tuple[int, str]]]:
    """Every image of the reader's table decoded, by threads: one tensor where sizes allow.

    Returns:
        The images, a zero image where one can't be read, and the rows that can't with why.
    """
    unreadable: list[tuple[int, str]] = []
    zero = torch.zeros(reader.preprocess.input_size, dtype=torch.uint8)

    def one(row: int) -> Tensor:
        try:
            image = reader.decode(row)
        except ImageError as error:
            unreadable.append((row, str(error)))
            return zero
        return image if reader.cuts_at_random else reader.preprocess.fit(image)

    several: list[Tensor] = []
    together = torch.zeros(
        (0 if reader.cuts_at_random else len(reader.table), *zero.shape), dtype=torch.uint8
    )
    with ThreadPoolExecutor(default_workers()) as pool:
        for row, image in enumerate(pool.map(one, range(len(reader.table)))):
            if reader.cuts_at_random:
                several.append(image)
            else:  # one float image makes all float
                together = together.to(torch.promote_types(together.dtype, image.dtype))
                together[row] = image
            if on_image is not None:
                on_image(1)
    unreadable.sort()
    return several if reader.cuts_at_random else together, unreadable


def fits_in_memory(reader: Reader) -> bool:
    """Whether `memory="auto"` holds the images: small enough, all together.

    Where the cut is random, images are held in their own size, otherwise in the input's;
    of more than 8 bits as float32. Sizes and bits are those of a sample of 32.
    """
    table = reader.table
    images = []
    for row in np.linspace(0, len(table) - 1, min(len(table), 32)).astype(int).tolist():
        try:
            images.append(reader.decode(row))
        except ImageError:
            continue
    if not images:
        return False
    width = max(image.element_size() for image in images)  # bytes of a value
    if not reader.cuts_at_random:
        return len(table) * math.prod(reader.preprocess.input_size) * width <= MEMORY_LIMIT
    limit = MEMORY_LIMIT if table.arrays is not None else MEMORY_LIMIT / 4  # sizes may differ
    return float(np.mean([image.numel() for image in images])) * width * len(table) <= limit
