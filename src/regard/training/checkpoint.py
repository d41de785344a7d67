"""Training states to resume from, written atomically.

The previous state is removed only once the newest is on disk, so a run that is killed at any
moment can be resumed.
"""

import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from regard.errors import StateError, UsageError
from regard.files import reason, write_atomically

_NAME = re.compile(r"step-(\d{9})\.pt")
_BROKEN = (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile)
KEPT = 2  # the newest, and the one before it in case the newest is damaged on disk


class Checkpoints:
    """The training states in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _newest_first(self) -> Iterator[tuple[int, Path]]:
        states: list[tuple[int, Path]] = []
        if self.folder.is_dir():
            states = [
                (int(m[1]), p) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))
            ]
        return iter(sorted(states, reverse=True))

    def any(self) -> bool:
        """Whether a state was saved; it may be damaged."""
        return self.newest() > 0

    def newest(self) -> int:
        """The step of the newest state, or 0."""
        return next((step for step, _ in self._newest_first()), 0)

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Writes the state after `step` steps: tensors, numbers, strings, lists and dicts.

        Raises:
            StateError: it can't be written; the earlier states are unchanged.
        """
        path = self.folder / f"step-{step:09d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda beside: torch.save(content, beside))
        except OSError as error:
            raise StateError(f"the state can't be saved: {error}") from error
        left = [old for _, old in list(self._newest_first())[KEPT:]]
        for old in [*left, *self.folder.glob(".step-*.writing")]:  # of a killed process
            old.unlink(missing_ok=True)

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest readable state, and one line for each that can't be read.

        Raises:
            StateError: there are states, and none can be read.
        """
        broken: list[str] = []
        for _, path in self._newest_first():
            try:
                return _read(path), broken
            except _BROKEN as error:
                broken.append(f"{path} can't be read ({reason(error, 120)})")
        if broken:
            raise StateError("; ".join(broken))
        return None, []

    def clear(self) -> None:
        """Removes the states."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as file:  # torch.load does not check the checksums
        if (damaged := file.testzip()) is not None:
            raise UsageError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)
