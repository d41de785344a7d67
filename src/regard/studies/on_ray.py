"""The runs of a study as tasks of an existing Ray cluster (extra: ray).

All nodes must see the study's folder; each task trains one run as `regard train`
does. If a task's worker or node dies, Ray restarts the task, which resumes its run.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from regard.errors import StudyStopped, UsageError
from regard.extras import require
from regard.files import reason
from regard.runs import PROGRESS
from regard.studies.plan import PlannedRun
from regard.studies.progress import Progress, Running
from regard.studies.runner import (
    StopSignals,
    begin,
    die_with,
    failure_in,
    is_finished,
    is_trained,
    next_command,
    note_end,
)

RETRIES = 3  # for a run whose worker died
_POLL = 0.5  # seconds between polls of the tasks
_ELSEWHERE = "its folder lacks its results, or this machine does not see it"


def run_on_ray(
    runs: Sequence[PlannedRun],
    *,
    address: str = "auto",
    cpus: float = 1,
    python: Sequence[str] = (sys.executable, "-m", "regard"),
    after_each: Callable[[Progress], None] = lambda progress: None,
    meanwhile: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Trains the unfinished runs on a Ray cluster.

    Args:
        runs: in the order in which they are submitted.
        address: of the cluster, or "auto" for this machine's.
        cpus: per task; each also gets a GPU if the cluster has any.
        python: the command that runs `regard` on the nodes.
        after_each, meanwhile: as for `run_all`.

    Raises:
        StudyStopped: a signal to stop; the tasks are ended, and can be resumed from their last
            states.
        UsageError: Ray is not installed, or there is no cluster.
    """
    require("ray", "a study on Ray")
    import ray

    _connect(address)
    progress = begin(runs, jobs=1)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0  # with 0 GPUs a task sees none
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_train)
    folder = str(Path.cwd())
    for run in progress.waiting:
        run.failure_file.unlink(missing_ok=True)
        run.progress_file.unlink(missing_ok=True)
    pending = {task.remote(run, folder, list(python)): run for run in progress.waiting}
    with StopSignals() as stop:
        after_each(progress)
        while pending and not stop.number:
            for ready in ray.wait(list(pending), timeout=_POLL)[0]:
                run = pending.pop(ready)
                _started(progress, run)
                note_end(progress, run, _failure(ray, ready, run))
                after_each(progress)
            for run in [r for r in progress.waiting if r.progress_file.is_file()]:
                _started(progress, run)
            progress.jobs = max(progress.jobs, len(progress.running))
            progress.look()
            meanwhile(progress)
        if stop.number:
            for each in pending:
                ray.cancel(each, force=True)
            raise StudyStopped(progress.done, progress.total, stop.number)
    return progress


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address!r} ({reason(error)})") from error


def _started(progress: Progress, run: PlannedRun) -> None:
    if run in progress.waiting:
        progress.waiting.remove(run)
        progress.running[run] = Running(run)


def _failure(ray: Any, ready: Any, run: PlannedRun) -> str | None:
    """Why a task that has ended failed; None: its run is finished."""
    try:
        failure: str | None = ray.get(ready)
    except ray.exceptions.RayTaskError as error:  # raised in the worker, such as by os.chdir
        return f"its task failed ({' '.join(str(error.cause or error).split())[:200]})"
    except ray.exceptions.RayError as error:
        return f"its worker died, even after {RETRIES} retries ({type(error).__name__})"
    return failure or (None if is_finished(run) else _ELSEWHERE)


def _train(run: PlannedRun, working_directory: str, python: Sequence[str]) -> str | None:
    """Runs in a worker: trains and tests one run; returns why it failed, or None."""
    os.chdir(working_directory)
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        run.progress_file.touch()  # marks the run as started
    environment = {**os.environ, PROGRESS: str(run.progress_file.absolute())}
    while not is_finished(run):
        tests = is_trained(run)
        with run.log.open("ab") as log:
            done = subprocess.run(
                [*python, *next_command(run)], stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                preexec_fn=partial(die_with, os.getpid()) if sys.platform == "linux" else None,
            )  # fmt: skip
        if failure := failure_in(run, done.returncode, tests):
            return failure
    return None
