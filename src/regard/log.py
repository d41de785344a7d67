"""Regard's messages: the standard `logging`, under the name "regard", shown as plain lines.

Modules log to `logging.getLogger(__name__)`: `info` for progress, `warning` for what users should
act on. Nothing is shown until `show_messages` is called, as the command line and the long-running
functions of the Python API do.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_ROOT = "regard"
# loggers of libraries with warnings that users can't act on: torch's "No CUDA runtime is found"
# without a GPU, and matplotlib's lines about its font cache
_NOISY = ("torch.utils.cpp_extension", "matplotlib", "matplotlib.font_manager")


class _Current(logging.StreamHandler):
    """Writes to the current `sys.stdout` or `sys.stderr`, which tests and notebooks replace."""

    def __init__(self, stream: str) -> None:
        logging.Handler.__init__(self)
        self._name_of_stream = stream
        self.diverted = 0  # contexts that are open, in any thread

    @property
    def stream(self):
        """The current stream."""
        return getattr(sys, "stderr" if self.diverted else self._name_of_stream)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lets a broken pipe end the command, as print would."""
        raise


def silence_libraries() -> None:
    """Hides warnings of other libraries that users can't act on."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def info_on_stderr() -> Iterator[None]:
    """Sends information to standard error within the context: standard output is for results.

    Several threads may be in it; it ends with the last of them.
    """
    handlers = [h for h in logging.getLogger(_ROOT).handlers if isinstance(h, _Current)]
    _divert(handlers, 1)
    try:
        yield
    finally:
        _divert(handlers, -1)


_DIVERTING = threading.Lock()


def _divert(handlers: Iterable[_Current], by: int) -> None:
    with _DIVERTING:
        for handler in handlers:
            handler.diverted += by


def show_messages(*, force: bool = False) -> None:
    """Prints information to standard output and warnings to standard error.

    Does nothing if the program has configured logging itself, unless `force` is given.
    """
    silence_libraries()
    logger = logging.getLogger(_ROOT)
    if logger.handlers or (logging.getLogger().handlers and not force):
        if force:
            logger.setLevel(logging.INFO)
        else:
            return
    if any(isinstance(h, _Current) for h in logger.handlers):
        return
    told, warned = _Current("stdout"), _Current("stderr")
    told.addFilter(lambda record: record.levelno < logging.WARNING)
    told.setFormatter(logging.Formatter("%(message)s"))
    warned.setLevel(logging.WARNING)
    warned.setFormatter(logging.Formatter("regard: %(message)s"))
    logger.addHandler(told)
    logger.addHandler(warned)
    logger.setLevel(logging.INFO)


def clock(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Heartbeat:
    """Progress as a line every half minute, for logs and other places without a progress bar.

    Call it with (done, total).
    """

    def __init__(self, what: str, *, seconds: float = 30, level: int = logging.INFO) -> None:
        self.what: str = what
        self.seconds: float = seconds
        self.level: int = level
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            line = f"{self.what}: {done:,} of {total:,}"
            logging.getLogger(__name__).log(self.level, line)


@contextlib.contextmanager
def counting(
    what: str, total: int | None = None, *, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a long task: a bar in a terminal, else a line now and then.

    Args:
        what: such as "reading training images".
        total: the total number, if known.
        show: if False, nothing is shown.

    Yields:
        A function to call with the number of items done since its last call.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not show:
        yield lambda n: None
    elif console.is_terminal:
        with _bar(console, what, total) as advance:
            yield advance
    else:
        yield _lines(what, total)


@contextlib.contextmanager
def _bar(console: Any, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.update(task, advance=n)


def _lines(what: str, total: int | None) -> Callable[[int], None]:
    heartbeat, done = Heartbeat(what), 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        heartbeat(done, total or done)

    return advance
