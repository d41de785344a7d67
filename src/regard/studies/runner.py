"""Trains the runs of a study, each in a process of its own.

A finished run is never run again and a stopped one is resumed, so that a study which was killed
goes on with the same command. A run that fails does not end the others.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from regard.errors import Stopped, UsageError
from regard.studies.plan import PlannedRun

log = logging.getLogger(__name__)

_POLL = 0.2  # seconds between looks at the processes
_PATIENCE = 30.0  # seconds that a stopped run has to save its state
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


@dataclass
class Progress:
    """Where a study stands.

    Attributes:
        total: runs of this part of the study.
        done: runs that are finished, also those of earlier calls.
        running: runs under way.
        failed: why each failed run did.
        seconds: how long each run took that was finished by this call.
    """

    total: int
    done: int = 0
    running: list[PlannedRun] = field(default_factory=list)
    failed: dict[PlannedRun, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def left(self, jobs: int) -> float | None:
        """Estimated seconds until the end; None where no run has been finished yet."""
        if not self.seconds:
            return None
        mean = sum(self.seconds) / len(self.seconds)
        return mean * (self.total - self.done - len(self.failed)) / jobs


def is_finished(run: PlannedRun) -> bool:
    """Whether a run has ended with its network and the predictions of its test written."""
    return is_trained(run) and (run.folder / run.predictions).is_file()


def is_trained(run: PlannedRun) -> bool:
    """Whether a run has ended with its network and its own predictions written."""
    return _status(run) == "finished" and (run.folder / "predictions.npz").is_file()


def next_command(run: PlannedRun) -> list[str]:
    """What brings a run that is not finished further: its training, or then its test."""
    if is_trained(run):
        return list(run.test)
    # also where it is finished, but was killed in its last moment
    resume = ["--resume"] if _status(run) in ("running", "finished") else []
    return [*run.command, *resume]


def _status(run: PlannedRun) -> str | None:
    try:
        content = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
        return str(content["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_all(
    runs: Sequence[PlannedRun],
    *,
    jobs: int = 1,
    python: Sequence[str] = (sys.executable, "-m", "regard"),
    after_each: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Trains what is not finished, `jobs` at a time, with the cores (or GPUs) dealt out.

    Args:
        runs: in the order in which they are started.
        jobs: processes at a time.
        python: what runs `regard`.
        after_each: called whenever a run starts, ends or fails.

    Raises:
        Stopped: SIGINT or SIGTERM; the runs under way have saved their states.
        UsageError: fewer than one job.
    """
    if jobs < 1:
        raise UsageError(f"jobs={jobs}: at least 1")
    waiting = [run for run in runs if not is_finished(run)]
    progress = Progress(len(runs), done=len(runs) - len(waiting))
    slots: dict[int, _Process] = {}
    stop = _StopSignals()
    with stop:
        while (waiting or slots) and not stop.number:
            for slot in [s for s in range(jobs) if s not in slots][: len(waiting)]:
                run = waiting.pop(0)
                slots[slot] = _Process(run, slot, jobs, python)
                progress.running.append(run)
                after_each(progress)
            for slot, process in list(slots.items()):
                if process.poll():
                    del slots[slot]
                    process.note(progress)
                    after_each(progress)
            time.sleep(_POLL)
        if stop.number:
            for process in slots.values():
                process.stop()
            raise Stopped(progress.done, stop.number)
    return progress


class _StopSignals:
    """Notes a SIGINT or SIGTERM instead of dying of it."""

    number = 0

    def __enter__(self) -> "_StopSignals":
        def note(number: int, _: FrameType | None) -> None:
            self.number = number

        try:
            self.before: dict[int, Any] = {
                s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not in the main thread, whose signals they are
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Process:
    """One run, in a process for its training and one for a test of its own."""

    def __init__(self, run: PlannedRun, slot: int, jobs: int, python: Sequence[str]) -> None:
        self.run, self.started = run, time.monotonic()
        self.log = run.folder.with_name(f"{run.folder.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.python, self.environment = list(python), _environment(slot, jobs)
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.tests = is_trained(self.run)
        with self.log.open("ab") as file:
            return subprocess.Popen(
                [*self.python, *next_command(self.run)], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env=self.environment,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Whether the run has ended; starts its test after its training."""
        if self.process.poll() is None:
            return False
        trained = self.process.returncode == 0 and not self.tests and is_trained(self.run)
        if trained and not is_finished(self.run):
            self.process = self._start()
            return False
        return True

    def note(self, progress: Progress) -> None:
        """Counts the run as done or failed."""
        progress.running.remove(self.run)
        # a test has exit code 1 where an image can't be read; its file is written whole or not
        if is_finished(self.run) and (self.tests or self.process.returncode == 0):
            progress.done += 1
            progress.seconds.append(time.monotonic() - self.started)
            return
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        reason = lines[-1] if lines else f"exit code {self.process.returncode}"
        progress.failed[self.run] = reason.removeprefix("regard: ")
        log.warning("%s failed: %s (%s)", self.run.folder.name, reason, self.log)

    def stop(self) -> None:
        """Lets the run save its state, and waits."""
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _die_with_parent() -> None:
    """A killed study leaves no run behind that would go on beside its resumed twin."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """The environment of a job: its share of the cores, and one GPU of those there are."""
    environment = dict(os.environ)
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        environment["OMP_NUM_THREADS"] = str(max(1, (cores or 1) // jobs))
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else _gpus()
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def _gpus() -> list[str]:
    """The numbers of the NVIDIA GPUs, without importing torch."""
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i, _ in enumerate(folder.iterdir())] if folder.is_dir() else []
