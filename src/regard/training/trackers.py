"""Experiment tracking through Accelerate's trackers: TensorBoard, Weights & Biases, MLflow, ...

TensorBoard's event files are in the run's folder, and a resumed run shows each epoch once. The
other services get the same numbers; each needs its package and its own login. A resumed run
continues the same run in Weights & Biases, and starts a new run of the same name elsewhere.
"""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from regard.errors import FileError, UsageError
from regard.extras import EXTRAS, is_installed, require
from regard.files import reason

# Accelerate's trackers that need only a package of the same name
TRACKERS = ("tensorboard", "wandb", "mlflow", "aim", "clearml", "comet_ml", "swanlab", "trackio")
NONE = "none"


def check_trackers(names: Sequence[str]) -> list[str]:
    """The trackers to use, in order and without repetitions; "none" stands for no tracker.

    Raises:
        UsageError: an unknown name, one whose package is not installed, or "none" beside others.
    """
    chosen = list(dict.fromkeys(name for name in names if name != NONE))
    if chosen and NONE in names:
        raise UsageError(f"log={' '.join(names)}: give {NONE}, or the trackers alone")
    for name in chosen:
        if name not in TRACKERS:
            raise UsageError(f"log={name}: choose {', '.join([*TRACKERS, NONE])}")
        if name in EXTRAS:
            require(name, f"log={name}")
        elif not is_installed(name):
            raise UsageError(f"log={name} needs {name}: pip install {name}")
    return chosen


class Trackers:
    """The trackers of one run, in its first process.

    Args:
        names: as returned by `check_trackers`.
        folder: the run's folder; its name is the run's name.
        config: the recipe and the like, stored with the run.
        step: the step from which the run continues; TensorBoard drops later entries.

    Raises:
        FileError: a tracker can't be started (no login, no network).
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: dict[str, Any], step: int
    ) -> None:
        self._trackers: list[Any] = []
        for name in names:
            try:
                self._trackers.append(_start(name, folder, config, step))
            except Exception as error:  # services raise nearly anything
                raise FileError(f"log={name}: it can't be started ({reason(error)})") from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs values after a step."""
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Flushes and closes the trackers."""
        for tracker in self._trackers:
            with contextlib.suppress(OSError):  # the disk is full: nothing that matters is lost
                tracker.finish()


def _start(name: str, folder: Path, config: dict[str, Any], step: int) -> Any:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        # the run's own folder, as TensorBoard lists all of runs/
        tracker = kind("tensorboard", folder, purge_step=step + 1 if step else None)
        tracker.start()
        return tracker
    if name == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")
        own = hashlib.sha256(f"{folder.resolve()} {config['started']}".encode()).hexdigest()
        tracker = kind(
            "regard", name=folder.name, dir=str(folder), id=own[:16], resume="allow",
        )  # fmt: skip
    elif name == "mlflow":
        tracker = kind("regard", run_name=folder.name)
    elif kind.requires_logging_directory:
        tracker = kind("regard", logging_dir=str(folder))
    else:
        tracker = kind("regard")
    tracker.start()
    tracker.store_init_configuration({k: str(v) for k, v in config.items()})
    return tracker
