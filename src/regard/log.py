"""Regard's messages: the standard `logging`, under the name "regard", shown as plain lines.

Modules log to `logging.getLogger(__name__)`: `info` for what a person follows, `warning` for
what they should act on. Nothing is shown until `show_messages` is called, which the command
line and the long-running functions of the Python API do.
"""

import logging
import sys
import time

_ROOT = "regard"


class _Current(logging.StreamHandler):
    """Writes to what `sys.stdout` or `sys.stderr` is now, which tests and notebooks replace."""

    def __init__(self, stream: str) -> None:
        logging.Handler.__init__(self)
        self._name_of_stream = stream

    @property
    def stream(self):
        """The stream as it is at this moment."""
        return getattr(sys, self._name_of_stream)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Lets a broken pipe end the command, as print would."""
        raise


def show_messages(*, force: bool = False) -> None:
    """Prints information to standard output and warnings to standard error.

    Does nothing where the program has configured logging itself, unless `force` is given.
    """
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


class Heartbeat:
    """Progress as a line every half minute, for those who look at no progress bar.

    Call it with (done, total).
    """

    def __init__(self, what: str, *, seconds: float = 30, level: int = logging.INFO) -> None:
        self.what, self.seconds, self.level = what, seconds, level
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self._last = time.monotonic()
            line = f"{self.what}: {done:,} of {total:,}"
            logging.getLogger(__name__).log(self.level, line)
