"""The arguments of the running command, and the processes that were started to run it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


@contextlib.contextmanager
def as_command(words: Sequence[str]) -> Iterator[None]:
    """Sets `command_words` within the context, as sys.argv may be another program's."""
    token = _words.set(tuple(words))
    try:
        yield
    finally:
        _words.reset(token)


def command_words() -> list[str]:
    """The arguments after `regard`; empty if no command is running."""
    return list(_words.get())


def launched_processes() -> int:
    """How many processes torchrun or `accelerate launch` started to run this command, else 1."""
    size = os.environ.get("WORLD_SIZE", "")
    several = "TORCHELASTIC_RUN_ID" in os.environ and size.isdecimal()
    return max(1, int(size)) if several else 1


def is_told_by_another() -> bool:
    """Whether another process, this machine's first, reports errors that all of them find."""
    return launched_processes() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
