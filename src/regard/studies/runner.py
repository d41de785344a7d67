"""Trains the runs of a study, each in its own process.

A finished run is not run again and a stopped one is resumed, so that a study that was killed
continues with the same command. If a run fails, the others still run.
"""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from regard.cores import SHARE, cores
from regard.errors import StudyStopped, UsageError
from regard.files import plural
from regard.log import clock
from regard.runs import PROGRESS
from regard.signals import heeded
from regard.studies.plan import PlannedRun
from regard.studies.progress import Progress, Running, earlier_seconds

log: logging.Logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds between polls of the processes
_PATIENCE = 30.0  # seconds that a stopped run has to save its state
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


def is_finished(run: PlannedRun) -> bool:
    """Whether a run has ended and its network and test predictions are written."""
    return is_trained(run) and (run.folder / run.predictions).is_file()


def is_trained(run: PlannedRun) -> bool:
    """Whether a run has ended and its network, its own predictions and its report are written.

    Training writes the report last, after the faithfulness of the maps.
    """
    files = ("predictions.npz", "report.html")
    return _status(run) == "finished" and all((run.folder / f).is_file() for f in files)


def next_command(run: PlannedRun) -> list[str]:
    """The next command of a run that is not finished: its training, or then its test."""
    if is_trained(run):
        return list(run.test)
    # "finished" too: it may have been killed just before the report was written
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
    meanwhile: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Trains unfinished runs, `jobs` at a time, dividing the cores (or GPUs) among them.

    Args:
        runs: in the order in which they are started.
        jobs: processes at a time.
        python: the command that runs `regard`.
        after_each: called at the beginning, and whenever a run ends or fails.
        meanwhile: called several times a second, with the current progress.

    Raises:
        StudyStopped: a signal to stop; the runs under way have saved their states, as they
            have if `after_each` raises.
        UsageError: fewer than one job.
    """
    if jobs < 1:
        raise UsageError(f"jobs={jobs}: give at least 1")
    progress = begin(runs, jobs)
    slots: dict[int, _Process] = {}
    stop = StopSignals()
    with stop:
        after_each(progress)
        try:
            while (progress.waiting or slots) and not stop.number:
                for slot in [s for s in range(jobs) if s not in slots][: len(progress.waiting)]:
                    run = progress.waiting.pop(0)
                    slots[slot] = _Process(run, slot, jobs, python)
                    progress.running[run] = Running(run)
                for slot, process in list(slots.items()):
                    if process.poll():
                        del slots[slot]
                        note_end(progress, process.run, process.failure())
                        after_each(progress)
                progress.look()
                meanwhile(progress)
                time.sleep(_POLL)
        finally:
            _stop(slots.values())  # after a signal, or where the results can't be written
        if stop.number:
            raise StudyStopped(progress.done, progress.total, stop.number)
    return progress


def begin(runs: Sequence[PlannedRun], jobs: int) -> Progress:
    """The progress before anything is started."""
    done = [run for run in runs if is_finished(run)]
    waiting = [run for run in runs if run not in done]
    if done:
        log.info(f"{len(done)} of {plural(len(runs), 'run')} are finished already")
    return Progress(len(runs), jobs, waiting, done=len(done), earlier=earlier_seconds(done))


def note_end(progress: Progress, run: PlannedRun, failure: str | None) -> None:
    """Counts a run as done or as failed, and logs it."""
    one = progress.running.pop(run)
    run.progress_file.unlink(missing_ok=True)
    seconds = time.monotonic() - one.started
    name = f"{run.row}, {run.folder.name}"
    if failure is None:
        progress.done += 1
        progress.seconds[run] = seconds
        log.info(f"{name}: done in {clock(seconds)}")
        return
    progress.failed[run] = failure
    run.failure_file.parent.mkdir(parents=True, exist_ok=True)
    run.failure_file.write_text(failure + "\n", encoding="utf-8")
    log.warning("%s failed: %s (%s)", name, failure, run.log)


def failure_of(run: PlannedRun) -> str | None:
    """Why an unfinished run failed, in whatever part of the study; else None."""
    try:
        return run.failure_file.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def failure_in(run: PlannedRun, code: int, tests: bool) -> str | None:
    """Why a process failed, from the last line that it printed; None: it succeeded.

    Args:
        run: the run.
        code: the exit code of its process.
        tests: whether the process tested a network that was already trained.
    """
    # a test has exit code 1 if an image can't be read; its file is written whole or not at all
    if (is_finished(run) if tests else is_trained(run)) and (tests or code == 0):
        return None
    if code < 0:
        return f"its process was ended by signal {-code}"
    if code == 0:
        return "its folder lacks its results, or this machine does not see it"
    lines = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1].removeprefix("regard: ") if lines else f"exit code {code}"


class StopSignals:
    """Records a signal to stop instead of being ended by it."""

    number = 0

    def __enter__(self) -> "StopSignals":
        def note(number: int, _: FrameType | None) -> None:
            self.number = number

        try:
            self.before: dict[int, Any] = {s: signal.signal(s, note) for s in heeded()}
        except ValueError:  # not in the main thread, which handles the signals
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Process:
    """One run: a process for its training, and another if it has a separate test."""

    def __init__(self, run: PlannedRun, slot: int, jobs: int, python: Sequence[str]) -> None:
        self.run = run
        run.log.parent.mkdir(parents=True, exist_ok=True)
        for left in (run.failure_file, run.progress_file):  # left by an earlier attempt
            left.unlink(missing_ok=True)
        environment = {**_environment(slot, jobs), PROGRESS: str(run.progress_file.absolute())}
        self.python, self.environment = list(python), environment
        self.process = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        self.tests = is_trained(self.run)
        with self.run.log.open("ab") as file:
            return subprocess.Popen(
                [*self.python, *next_command(self.run)], stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env=self.environment,
                preexec_fn=partial(die_with, os.getpid()) if sys.platform == "linux" else None,
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

    def failure(self) -> str | None:
        """Why the run failed; None: it is finished."""
        return failure_in(self.run, self.process.returncode, self.tests)

    def end(self, deadline: float) -> None:
        """Waits until the run has saved its state, and kills it at the deadline."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _stop(processes: Collection[_Process]) -> None:
    """Lets the runs save their states, all at the same time."""
    for each in processes:
        each.process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for each in processes:
        each.end(deadline)
        each.run.progress_file.unlink(missing_ok=True)


def die_with(parent: int) -> None:
    """Makes a run die with its study, so that it does not go on while it is being resumed."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """The environment of a job: its share of the cores, and one of the GPUs, if any."""
    environment = dict(os.environ)
    if jobs > 1:
        environment[SHARE] = environment["OMP_NUM_THREADS"] = str(max(1, cores() // jobs))
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else _gpus()
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def _gpus() -> list[str]:
    """The indices of the NVIDIA GPUs, without importing torch."""
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i, _ in enumerate(folder.iterdir())] if folder.is_dir() else []
