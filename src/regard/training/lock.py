"""One training at a time in a run's folder."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from regard.errors import StateError, UsageError
from regard.files import reason

NAME = ".lock"


class Lock:
    """A lock on a run's folder, which the operating system releases however the process ends.

    Args:
        folder: the run's folder; it must exist when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        self.path: Path = folder / NAME
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            UsageError: another process holds it.
            StateError: the file can't be written.
        """
        lock = FileLock(self.path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another training is running in {self.folder}: wait for it, or choose another "
                "folder"
            ) from None
        except NotImplementedError:  # a file system without locks
            return
        except OSError as error:
            raise StateError(f"{self.path} can't be written ({reason(error)})") from error
        self._lock = lock

    def release(self) -> None:
        """Releases the lock and removes its file."""
        if self._lock is not None:
            with contextlib.suppress(OSError):  # Windows can't remove an open file
                self.path.unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
