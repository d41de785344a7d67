"""Commands that can be gone on with end at a signal as they would at an error: in order."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from regard.signals import heeded


class Signaled(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Holder:
    """Holds a signal back while something is done that must be done as a whole."""

    def __init__(self) -> None:
        self._holding, self._held = False, 0

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """A signal that comes in this block raises `Signaled` at its end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._held:
            raise Signaled(self._held)

    def take(self, number: int) -> None:
        """Raises `Signaled`, or keeps the signal for the end of the block."""
        if not self._holding:
            raise Signaled(number)
        self._held = number


@contextlib.contextmanager
def signals_raise() -> Iterator[Holder]:
    """A signal to stop raises `Signaled`; a second one acts as usual."""
    holder = Holder()
    if threading.current_thread() is not threading.main_thread():
        yield holder
        return

    def stop(number: int, _: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        holder.take(number)

    before = {n: signal.signal(n, stop) for n in heeded()}
    try:
        yield holder
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
