"""The words of the command that is running, and the processes that were started to run it."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())


@contextlib.contextmanager
def as_command(words: Sequence[str]) -> Iterator[None]:
    """Within, `command_words` are these; sys.argv may be another program's."""
    token = _words.set(tuple(words))
    try:
        yield
    finally:
        _words.reset(token)


def command_words() -> list[str]:
    """What follows `regard`; empty where no command is running."""
    return list(_words.get())


def launched_processes() -> int:
    """How many processes torchrun or `accelerate launch` started to run this command; else 1."""
    size = os.environ.get("WORLD_SIZE", "")
    several = "TORCHELASTIC_RUN_ID" in os.environ and size.isdecimal()
    return max(1, int(size)) if several else 1


def is_told_by_another() -> bool:
    """Whether the first of this machine's processes says what all of them find in their call."""
    return launched_processes() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
