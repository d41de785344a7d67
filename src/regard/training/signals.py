"""Signals as requests, checked between steps and while waiting for images.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) save and stop; SIGUSR1, which SLURM can
send ahead of a time limit, saves and continues. A second SIGINT ends at once, without saving.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from regard.signals import heeded
from regard.training.distributed import Requests

SAVING = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
PATIENCE = 10.0  # seconds that a step of several processes has to begin after a stop request


class Signals:
    """The signals that this process got.

    Attributes:
        stop: the number of the signal that asked to stop, or 0.
        save: whether one asked to save.
    """

    def __init__(self) -> None:
        self.stop: int = 0
        self.save: bool = False

    def _request(self, number: int, _: FrameType | None) -> None:
        if number in SAVING:
            self.save = True
            return
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = number

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Turns signals into requests; outside the main thread signals are left alone."""
        before = {}
        saving = [n for n in SAVING if signal.getsignal(n) != signal.SIG_IGN]
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in [*heeded(), *saving]:
                before[number] = signal.signal(number, self._request)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Stop:
    """Whether a run was asked to stop; loaders call it, so it holds no reference to the run.

    Args:
        signals: this process's.
        requests: the requests shared by the run's processes.
    """

    def __init__(self, signals: Signals, requests: Requests) -> None:
        self.signals: Signals = signals
        self.requests: Requests = requests
        self.asked_at: float | None = None  # when the request was first seen

    def asked(self) -> bool:
        """Whether any process was asked to stop."""
        return self.requests.heard(self.signals.stop) != 0

    def overdue(self) -> bool:
        """Whether a stop was requested and a step that has not begun should not be waited for.

        Several processes can save only after a step that all of them finish: it gets some seconds.
        """
        if not self.asked():
            return False
        if not self.requests.several:
            return True
        self.asked_at = self.asked_at or time.monotonic()
        return time.monotonic() - self.asked_at > PATIENCE
