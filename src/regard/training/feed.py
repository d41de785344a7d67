"""Batches on the way to the device: prepared ahead by a thread, copied while it computes."""

import functools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.training.graphs import ALONE

AHEAD = 2  # batches on the device besides the one in use
POLL = 0.2  # seconds between checks whether the reader has given up


@dataclass
class Placed:
    """A training batch as the loop uses it.

    Attributes:
        images: (B, C, H, W) in 0..255.
        random_numbers: (B, WIDTH) for the augmentation.
        labels: (count,) class indices.
        shares: (B,) mixup coefficients, or None without mixup.
        partners: (count,) labels of the images mixed in, or None.
        count: images that count; those after them replace unreadable ones.
        unreadable: (row, reason) of the images left out.
        rows: (count,) rows in the table of training images, where targets are looked up by row.
    """

    images: Tensor
    random_numbers: Tensor
    labels: Tensor
    shares: Tensor | None
    partners: Tensor | None
    count: int
    unreadable: list[tuple[int, str]]
    rows: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Placed":
        """The batch with `move` applied to each of its tensors."""
        shares = None if self.shares is None else move(self.shares)
        partners = None if self.partners is None else move(self.partners)
        return Placed(
            move(self.images), move(self.random_numbers), move(self.labels), shares, partners,
            self.count, self.unreadable, None if self.rows is None else move(self.rows),
        )  # fmt: skip


class Mover:
    """Copies tensors to a device, from pinned memory on a side stream where the device has them.

    CUDA and XPU devices have streams; Apple's GPUs copy in the order in which work is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; within `copy`, copied on its stream."""
        if self.device.type == "cpu" or tensor.device.type != "cpu":
            return tensor
        if self.device.type not in ("cuda", "xpu"):
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def copy(self, make: Callable[[Any], Any], batch: Any) -> tuple[Any, Any]:
        """make(batch), moved to the device by its method `moved`, and the event of its arrival.

        `make` may run work on the device, such as decoding.
        """
        if self.device.type not in ("cuda", "xpu"):
            return make(batch).moved(self), None
        with ALONE, (stream := _side_stream(self.device)):
            return make(batch).moved(self), stream.record_event()

    def receive(self, batch: Any, arrival: Any) -> Any:
        """The batch, safe to use in work that is queued on the device from now on."""
        if arrival is not None:
            current = torch.accelerator.current_stream(self.device)
            current.wait_event(arrival)
            batch.moved(lambda tensor: _in_use(tensor, current))
        return batch


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The device's copy stream: only one, as the allocator holds memory for each stream."""
    return torch.Stream(device=device)


def _in_use(tensor: Tensor, stream: Any) -> Tensor:
    tensor.record_stream(stream)  # its memory is not reused before the stream is done with it
    return tensor


def feed(batches: Iterator[Any], make: Callable[[Any], Any], device: torch.device) -> Iterator[Any]:
    """make(batch) for each batch, on the device.

    On a CPU, batches are made when asked for; so they are on Apple's GPUs, where two threads that
    queue work at once crash the process (PyTorch 2.14, issue 197805). Otherwise a thread runs up to
    AHEAD batches ahead, so that the device never waits for a copy; its errors are raised here.
    """
    if device.type == "cpu":
        return map(make, batches)
    mover = Mover(device)
    if device.type == "mps":
        return (make(batch).moved(mover) for batch in batches)
    placed = _by_thread(batches, functools.partial(mover.copy, make), device)
    return (mover.receive(*each) for each in placed)


def _by_thread(
    batches: Iterator[Any], work: Callable[[Any], Any], device: torch.device
) -> Iterator[Any]:
    """work(batch) for each batch, by a thread that runs up to AHEAD batches ahead.

    The thread sets its device: a new thread starts on the first one, and would take memory there.
    """
    done: queue.Queue[tuple[str, Any]] = queue.Queue(AHEAD)
    given_up = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not given_up.is_set():
            try:
                done.put((kind, value), timeout=POLL)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            if device.type in ("cuda", "xpu") and device.index is not None:
                torch.accelerator.set_device_index(device.index)
            for batch in batches:
                if not put("batch", work(batch)):
                    return
        except BaseException as error:  # any error is raised again in the reader
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=run, name="regard-feed", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = done.get()
            if kind == "error":
                try:
                    raise value
                finally:
                    del value  # its traceback references this frame and those of the training
            if kind == "end":
                return
            yield value
    finally:
        given_up.set()
        thread.join()
