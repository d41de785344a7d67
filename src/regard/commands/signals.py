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


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """A signal to stop raises `Signaled`; a second one acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        raise Signaled(number)

    before = {n: signal.signal(n, stop) for n in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
