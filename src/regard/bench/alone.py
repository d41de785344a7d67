"""Contestants in processes of their own: their peak memory, and memory as others handle it."""

import contextlib
import functools
import gc
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from regard.bench.contestants import Contestant, Step, prepare
from regard.bench.results import Result
from regard.bench.timing import take_turns


def measure_alone(contestants: Sequence[Contestant], turns: int) -> list[Result]:
    """Each contestant, one after the other, each in a new process.

    The processes are forked from one that has imported torch and nothing more, so that what
    one of them uses is its own network's.
    """
    found = []
    for c in contestants:
        with ProcessPoolExecutor(1, mp_context=_context()) as pool:
            try:
                found.append(pool.submit(_measure, c, turns).result())
            except Exception as error:  # a process that was killed is one of them
                found.append(Result(c, fault=first_line(error)))
    return found


class Elsewhere:
    """A second process for those contestants that run as they would without Regard.

    Regard keeps freed memory for the next tensors (`keep_freed_memory`). In a process that
    does so everybody else would gain by it as well; so they have one where nobody did. It is
    started by the first of them, and called from this process's turns: what it does by itself
    is wait.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, c: Contestant) -> tuple[Step, float]:
        """As `contestants.prepare`, in that process.

        Raises:
            RuntimeError: whatever was thrown there, in one line.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=_context())
        number, start = self._pool.submit(_make_ready, c).result()
        return functools.partial(self._call, number), start

    def _call(self, number: int) -> None:
        assert self._pool is not None
        self._pool.submit(_call_ready, number).result()

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


_ready: list[Step] = []  # in the second process


def _make_ready(c: Contestant) -> tuple[int, float]:
    torch.set_num_threads(c.threads)
    try:
        step, start = prepare(c)
    except Exception as error:  # its own class may be one that can't be sent
        raise RuntimeError(first_line(error)) from None
    _ready.append(step)
    return len(_ready) - 1, start


def _call_ready(number: int) -> None:
    try:
        _ready[number]()
    except Exception as error:
        raise RuntimeError(first_line(error)) from None


def _context() -> Any:
    """Forks from a process that has imported torch and nothing more, where forking is safe."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["regard.bench.alone"])
    return context


def _measure(c: Contestant, turns: int) -> Result:
    torch.set_num_threads(c.threads)
    on_gpu = torch.device(c.device).type == "cuda"
    try:
        step, start = prepare(c)
    except Exception as error:
        return Result(c, fault=first_line(error))
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    gc.collect()
    known = forget_peak()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        known = True
    (timed,) = take_turns([step], turns)
    if isinstance(timed, Exception):
        return Result(c, fault=first_line(timed))
    running = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    return Result(
        c, timed[0], timed[1], start,
        peak=max(peak, running), running=running if known else None,
    )  # fmt: skip


def peak_memory() -> int:
    """The most resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    # not getrusage: a process that was forked begins with its parent's peak there
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> bool:
    """Lets the peak begin anew with what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
