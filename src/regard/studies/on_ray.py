"""The runs of a study as tasks of an existing Ray cluster (extra: ray).

The study's folder must be one that all nodes see; each task trains one run as `regard train`
does, and is started again on another node if its node dies.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from regard.errors import UsageError
from regard.extras import require
from regard.studies.plan import PlannedRun
from regard.studies.runner import Progress, is_finished, is_trained, next_command


def run_on_ray(
    runs: Sequence[PlannedRun],
    *,
    address: str = "auto",
    cpus: float = 1,
    after_each: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Trains what is not finished on a Ray cluster.

    Args:
        runs: in the order in which they are submitted.
        address: of the cluster, or "auto" for the one of this machine.
        cpus: of each task.
        after_each: called whenever a run ends or fails.

    Raises:
        UsageError: Ray is not installed, or no cluster is there.
    """
    require("ray", "a study on Ray")
    import ray

    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"no Ray cluster at {address!r} ({error})") from error
    waiting = [run for run in runs if not is_finished(run)]
    progress = Progress(len(runs), done=len(runs) - len(waiting), running=list(waiting))
    task = ray.remote(num_cpus=cpus, max_retries=3)(_train)
    folder = str(Path.cwd())
    pending = {task.remote(r, folder): r for r in waiting}
    after_each(progress)
    while pending:
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        run = pending.pop(ready)
        progress.running.remove(run)
        try:
            reason = ray.get(ready)
        except ray.exceptions.RayError as error:
            reason = f"its worker died ({type(error).__name__})"
        if reason is None and is_finished(run):
            progress.done += 1
        else:
            progress.failed[run] = (
                reason or "its results are not in a folder that this machine sees"
            )
        after_each(progress)
    return progress


def _train(run: PlannedRun, working_directory: str) -> str | None:
    """In a worker: trains and tests one run; returns why it failed, or None."""
    os.chdir(working_directory)
    while not is_finished(run):
        tests = is_trained(run)
        done = subprocess.run(
            [sys.executable, "-m", "regard", *next_command(run)], capture_output=True, text=True
        )
        if done.returncode and not (tests and is_finished(run)):
            lines = done.stderr.splitlines()
            return lines[-1].removeprefix("regard: ") if lines else f"exit code {done.returncode}"
        if not (is_trained(run) if not tests else is_finished(run)):
            return "its results are not in a folder that this machine sees"
    return None
