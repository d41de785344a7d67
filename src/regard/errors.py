"""The errors that Regard raises for its users; any other exception is a bug in Regard.

Each also has the built-in type that a Python caller would expect (`ValueError` for a wrong
call, `OSError` for a file), and carries the exit code of the command line: 2 for a wrong call,
1 for work that failed.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any


class RegardError(Exception):
    """Anything that went wrong for a reason that the user can act on; the message names it."""

    exit_code = 1


class UsageError(RegardError, ValueError):
    """A wrong call: an unknown name, a value out of range, data that does not fit."""

    exit_code = 2


class ImageError(RegardError, ValueError):
    """A file that can't be read as an image: one line that names the file and the reason."""

    exit_code = 2


class CheckpointError(RegardError, ValueError):
    """A weights file that can't be read or does not fit the network."""

    exit_code = 2


class FileError(RegardError, OSError):
    """Something outside Regard failed: a file, a disk, a download, a port."""


class StateError(FileError):
    """A training state that can't be written, or no state that can be read."""


class ExportError(RegardError, ArithmeticError):
    """An exported file's outputs differ from the network's; the file was not kept."""


class ResourceError(RegardError, MemoryError):
    """Out of memory; the message says what to lower."""


class _ValuesError(RegardError):
    """An error that is built from values rather than a message, and can still be pickled.

    Otherwise processes that pass it on (multiprocessing, concurrent.futures) would lose it.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(
    kind: type[RegardError], arguments: tuple[Any, ...], values: dict[str, Any]
) -> RegardError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(values)
    return error


class NotFiniteError(_ValuesError, ArithmeticError):
    """Loss or weights are infinite or NaN.

    Attributes:
        step: the optimizer step at which this was noticed, counted from 1.
        rate: the learning rate of that step.
        rows: the training images of that step, as rows of the training split.
    """

    def __init__(self, step: int, rate: float, rows: Sequence[int], what: str = "the loss") -> None:
        super().__init__(f"{what} of step {step} is not finite (learning rate {rate:.3g})")
        self.step: int = step
        self.rate: float = rate
        self.rows: list[int] = list(rows)


class Stopped(_ValuesError):  # noqa: N818 (no error: somebody asked for it)
    """A signal asked the run to stop; its state is saved.

    Attributes:
        step: the last completed optimizer step.
        signal_number: such as signal.SIGTERM.
    """

    def __init__(self, step: int, signal_number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step: int = step
        self.signal_number: int = signal_number
        self.exit_code: int = 128 + signal_number


class StudyStopped(Stopped):
    """A signal asked a study to stop; its active runs have saved their states.

    Attributes:
        step: the number of completed runs.
    """

    def __init__(self, done: int, total: int, signal_number: int) -> None:
        super().__init__(done, signal_number)
        self.args = (f"stopped with {done} of {total} runs done; the same command continues",)


class ToldElsewhere(SystemExit):
    """Ends one process of a run silently: another one has reported what went wrong."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on an accelerator."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which this module can't import
        or (isinstance(error, RuntimeError) and "not enough memory" in text)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in text)
    )


class Replacing:
    """A context manager that raises, for an error within, another one from it.

    `contextlib.contextmanager` would do, but since Python 3.12 an error that its generator replaces
    is in a reference cycle: with it, all that the frames hold, such as a network on a GPU, would
    stay until the next garbage collection.

    Args:
        replacement: returns the error to raise in place of one; None: that one.
    """

    def __init__(self, replacement: Callable[[Exception], Exception | None]) -> None:
        self.replacement = replacement

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        other = self.replacement(error) if isinstance(error, Exception) else None
        try:
            if other is not None:
                raise other from error
        finally:
            del other  # whose traceback has this frame
