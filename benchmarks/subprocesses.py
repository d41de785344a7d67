"""Cases in separate processes: their peak memory, and timing with glibc's memory defaults."""

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

from cases import Case, Step, prepare
from regard.engines.bench import time_in_rounds
from regard.files import reason
from results import Result


def measure_alone(cases: Sequence[Case], rounds: int) -> list[Result]:
    """Measures each case in a new process, one after the other.

    The processes are forked from one that has only imported torch, so that the memory is the
    case's own.
    """
    results = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=_context()) as pool:
            try:
                results.append(pool.submit(_measure, case, rounds).result())
            except Exception as error:  # includes a process that was killed
                results.append(Result(case, fault=reason(error, 300)))
    return results


class SecondProcess:
    """A process for the cases that run as they would without Regard.

    Regard keeps freed memory for later tensors (`keep_freed_memory`), which would speed up every
    case in the same process. The process is started by the first case, and waits between calls.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, case: Case) -> tuple[Step, float]:
        """Like `cases.prepare`, in that process.

        Raises:
            RuntimeError: any error there, on one line.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=_context())
        number, startup = self._pool.submit(_prepare_here, case).result()
        return functools.partial(self._call, number), startup

    def _call(self, number: int) -> None:
        assert self._pool is not None
        self._pool.submit(_call_here, number).result()

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


_ready: list[Step] = []  # in the second process


def _prepare_here(case: Case) -> tuple[int, float]:
    torch.set_num_threads(case.threads)
    try:
        step, startup = prepare(case)
    except Exception as error:  # its class may not be picklable
        raise RuntimeError(reason(error, 300)) from None
    _ready.append(step)
    return len(_ready) - 1, startup


def _call_here(number: int) -> None:
    try:
        _ready[number]()
    except Exception as error:
        raise RuntimeError(reason(error, 300)) from None


def _context() -> Any:
    """A context that forks from a process that has only imported torch, where forking is safe."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["torch"])
    return context


def _measure(case: Case, rounds: int) -> Result:
    torch.set_num_threads(case.threads)
    on_gpu = torch.device(case.device).type == "cuda"
    try:
        step, startup = prepare(case)
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
        gc.collect()
        known = forget_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            known = True
        (seconds,) = time_in_rounds([step], rounds)
    except Exception as error:
        return Result(case, fault=reason(error, 300))
    running = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    return Result(
        case, seconds, startup, peak=max(peak, running), running=running if known else None
    )


def peak_memory() -> int:
    """The peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    # not getrusage: a forked process starts with its parent's peak there
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> bool:
    """Resets the peak to the current use, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False
