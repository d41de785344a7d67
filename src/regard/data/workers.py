"""Batches from worker processes or threads: always in order, and never waited for endlessly.

Worker processes ignore the signals that are sent to a whole process group (Ctrl-C, `timeout`,
systemd, SLURM), as the parent needs them until its step is done. The parent ends them when the
batches are closed, and kills any that are left when the interpreter exits, for whatever reason.
"""

import atexit
import contextlib
import errno
import logging
import math
import multiprocessing.connection
import multiprocessing.util
import shutil
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from regard.compat import release_killed
from regard.cores import cores, processes_here
from regard.errors import RegardError, Replacing, ResourceError

log: logging.Logger = logging.getLogger(__name__)

POLL = 1.0  # seconds between checks whether to stop, while waiting for a batch
LONGEST_WAIT = 600.0  # seconds without a batch, after which it is considered lost
PREFETCH = 4  # batches read ahead by each worker
SHARE = 0.8  # of the free shared memory that batches may use
SHARED_MEMORY = Path("/dev/shm")
GROUP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


class WaitInterrupted(RegardError):  # noqa: N818 (somebody asked for it)
    """Stopped waiting for a batch because `stop` returned True."""


def never() -> bool:
    """The default for `stop`: never."""
    return False


def default_workers() -> int:
    """One per core that this process may use, at most eight."""
    return min(cores(), 8)


# ------------------------------------------------------------------------------ processes
def read_by_processes(
    batches: Dataset[Any],
    spans: Sequence[tuple[int, int]],
    workers: int,
    prefetch: int,
    stop: Callable[[], bool] = never,
) -> Iterator[Any]:
    """batches[span] for each span, in order, read by worker processes.

    Raises:
        WaitInterrupted: `stop` returned True while the next batch was not ready.
        ResourceError: a worker was killed, or no batch came for `LONGEST_WAIT`.
    """
    before = set(multiprocessing.active_children())
    # workers share this process's temporary folder, as a killed worker would leave its own behind
    multiprocessing.util.get_temp_dir()
    with warnings.catch_warnings(), _signals_blocked(), worker_errors():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message="This process .* is multi-threaded, use of fork")
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=spans,
            num_workers=workers,
            prefetch_factor=prefetch,
            worker_init_fn=_ignore_group_signals,
            multiprocessing_context=_start_method(),
            timeout=POLL,
        )
        source = iter(loader)
    mine = set(multiprocessing.active_children()) - before
    _alive.update(mine)
    left = len(spans)
    try:
        for _ in spans:
            with worker_errors(), lost_connections(mine):
                batch = _waited(partial(_poll, source), stop)
            left -= 1
            yield batch
    finally:
        if not left:
            del source  # ends the workers
        else:  # torch would wait for busy workers
            _kill(mine)
            release_killed(source)
        _alive.difference_update(mine)


def _poll(source: Iterator[Any], _: float) -> Any:
    try:
        return next(source)
    except RuntimeError as error:
        if "timed out" in str(error):
            raise TimeoutError from None
        raise


def worker_errors() -> Replacing:
    """Turns torch's errors about its worker processes into a ResourceError.

    torch raises them wherever the main thread happens to be when a worker dies.
    """
    return Replacing(_explained)


def _explained(error: Exception) -> ResourceError | None:
    if not isinstance(error, RuntimeError | OSError):
        return None
    text = str(error)
    if "DataLoader worker (pid" in text:
        cause = text.partition("killed by signal: ")[2].split(".")[0]
        return _worker_lost(f"was killed ({cause})" if cause else "ended unexpectedly")
    full = getattr(error, "errno", None) == errno.ENOSPC  # for semaphores, which live there
    if full or "shared memory" in text or "shm" in text:
        return ResourceError(
            "no shared memory (/dev/shm) is left for images that worker processes read: lower "
            "workers (0 = no processes) or batch_size"
        )
    if "Too many open files" in text or "ancdata" in text:
        return ResourceError(
            "too many files are open for more worker processes: lower workers "
            "(0 = no processes), or raise the limit (ulimit -n)"
        )
    return None


def lost_connections(workers: Iterable[BaseProcess]) -> Replacing:
    """Turns the error for a batch whose worker died before handing it over into a ResourceError.

    Its tensors arrive through a socket of the worker; which call fails depends on the moment.
    """

    def explained(error: Exception) -> ResourceError | None:
        if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
            return None
        ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], POLL)
        for worker in (worker for worker in workers if worker.sentinel in ended):
            worker.join(POLL)
            if worker.exitcode:
                return _worker_lost("was killed" if worker.exitcode < 0 else "ended unexpectedly")
        return None

    return Replacing(explained)


def _worker_lost(how: str) -> ResourceError:
    return ResourceError(
        f"a process that reads images {how}, as happens when memory runs out: lower "
        "workers (0 = no processes), batch_size or size"
    )


def _start_method() -> str | None:
    """How workers are started: as somebody has chosen, else on Linux by fork.

    Python 3.14 changed its own choice to forkserver. Each worker would import torch in each epoch,
    and a signal to the whole group, such as Ctrl-C, would end it while it does.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return "fork" if chosen is None and sys.platform == "linux" else chosen


def _ignore_group_signals(_: int) -> None:
    """Run in a worker, which then ends only when its parent says so or is gone."""
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks signals until a worker that is forked here ignores them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_alive: set[Any] = set()  # workers


@atexit.register  # before multiprocessing's own, which would wait endlessly for workers
def kill_workers() -> None:
    """Kills all worker processes of this process.

    An uncaught error keeps the batches referenced, and so their workers alive, until the exit.
    """
    _kill(_alive)


def _kill(workers: Iterable[Any]) -> None:
    """Kills workers at once, without the error that torch raises when one dies."""
    before = None
    if hasattr(signal, "SIGCHLD"):
        with contextlib.suppress(ValueError):  # not in the main thread
            before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in list(workers):
        with contextlib.suppress(Exception):  # workers of the process that forked this one
            worker.kill()
            worker.join()
    if before is not None:
        signal.signal(signal.SIGCHLD, before)


def shared_memory_free() -> float:
    """Bytes of shared memory that this process may use for batches; Docker's default is 64 MB."""
    if sys.platform != "linux" or not SHARED_MEMORY.is_dir():
        return math.inf
    return shutil.disk_usage(SHARED_MEMORY).free / processes_here()


def processes_that_fit(workers: int, batch_bytes: float, free: float) -> tuple[int, int]:
    """How many worker processes, and batches ahead of each, fit in shared memory.

    Returns:
        (workers, prefetch): as requested, or reduced; (0, 0) if not even one worker fits.
    """
    for fewer in range(workers, 0, -1):
        for prefetch in (PREFETCH, 2, 1):
            # plus two: one in use, one in transit
            if (fewer * prefetch + 2) * batch_bytes <= SHARE * free:
                return fewer, prefetch
    return 0, 0


# -------------------------------------------------------------------------------- threads
def read_ahead(
    items: Iterable[Any],
    read: Callable[[Any], Any],
    threads: int,
    window: int,
    stop: Callable[[], bool] = never,
) -> Iterator[Any]:
    """read(item) for each item, in order, by threads, with at most `window` items in progress.

    Raises:
        WaitInterrupted: `stop` returned True while the next result was not ready.
        ResourceError: no result came for `LONGEST_WAIT`.
    """
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) >= window:
                yield _waited(waiting.popleft().result, stop)
        while waiting:
            yield _waited(waiting.popleft().result, stop)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _waited(poll: Callable[[float], Any], stop: Callable[[], bool]) -> Any:
    """The result of `poll`, which waits for POLL seconds and then raises a TimeoutError."""
    waited = 0.0
    while True:
        try:
            return poll(POLL)
        except TimeoutError:
            waited += POLL
        if stop():
            raise WaitInterrupted("stopped while waiting for images")
        if waited >= LONGEST_WAIT:
            raise ResourceError(
                f"no image was read for {LONGEST_WAIT / 60:.0f} minutes: are their disk "
                "and network still available? Otherwise set workers=0"
            )
