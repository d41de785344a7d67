"""The words of the command that is running: recipes and scripts say them."""

import contextlib
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
