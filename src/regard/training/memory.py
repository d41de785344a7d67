"""Fits a step into memory: as few equal batches as there is room for, found by trial steps.

On a GPU batches are tried from the largest down. On a CPU, where running out of memory kills the
process, small batches are measured and larger ones extrapolated.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size

from regard.data.loading import repeated
from regard.errors import UsageError
from regard.machine import free_memory, is_out_of_memory, trim_memory
from regard.training.distributed import Ranks, gathered
from regard.training.loop import Trainer
from regard.training.trial import first_batches, trial, trial_step

log: logging.Logger = logging.getLogger(__name__)

SHARE = 0.9  # of the free memory that a step may take, as the measurement is not exact
ENOUGH = 512e6  # measured batches differing by this many bytes suffice to extrapolate
LONGEST = 60.0  # seconds after which no larger batch is measured
_RESET_PEAK = Path("/proc/self/clear_refs")

Peak = Callable[[Trainer, int], int | None]  # bytes that a batch of this size takes; None: too many


def fit_memory(
    trainer: Trainer, *, peak: Peak | None = None, free: float | None = None
) -> tuple[int, int]:
    """The batch size and the gradient accumulation steps with which a step fits in memory.

    The number of images per step is unchanged, so the learning rate stays right.

    Args:
        trainer: with the recipe's batches; it is not changed.
        peak: measures a batch (default: trial steps on the trainer's device).
        free: bytes available (default: what is free now).

    Raises:
        UsageError: not even the smallest batch fits, or several processes synchronize their BN.
    """
    device, world = trainer.accelerator.device, trainer.accelerator.num_processes
    if world > 1 and trainer.recipe.sync_bn:  # one out of memory would leave the others waiting
        raise UsageError("fit_memory measures each process alone: leave fit_memory or sync_bn out")
    images = trainer.batch * trainer.recipe.accumulate
    sizes = [images // n for n in range(1, images + 1) if images % n == 0]
    # BN needs at least two images to have a variance
    sizes = [s for s in sizes if s <= trainer.count and (s > 1 or images == 1)]
    if device.type == "cuda":
        free = free or _free_on_gpu(device)
        needed = _largest_that_fits(trainer, sizes, SHARE * free, peak or peak_on_gpu)
    elif device.type == "cpu" and (peak is not None or _RESET_PEAK.exists()):
        free = (free or free_memory()) / Ranks(trainer.accelerator).local
        needed = extrapolated(
            measured_peaks(trainer, sizes, SHARE * free, peak or PeakOnCPU()), sizes
        )
    else:
        log.info(f"memory can't be measured on {device.type} here: the batch size stays as it is")
        return trainer.batch, trainer.recipe.accumulate
    chosen = next((s for s in sizes if needed.get(s, math.inf) <= SHARE * free), 0)
    if world > 1:  # on CPUs the first process's choice; on GPUs that of the one with least room
        several = gathered(trainer.accelerator, chosen)
        chosen = broadcast_object_list([several[0]])[0] if device.type == "cpu" else min(several)
    if not chosen:
        least = needed.get(sizes[-1], math.inf)
        raise UsageError(
            f"fit_memory: a batch of {sizes[-1]}, the smallest equal part of a step of {images}, "
            f"needs {_need(least)} {_bytes(free)} free: try grad_checkpointing, a smaller size, "
            "or another batch_size"
        )
    log.info(_message(images, chosen, trainer.batch, needed, free))
    return chosen, images // chosen


def _message(images: int, chosen: int, before: int, needed: dict[int, float], free: float) -> str:
    whole = needed.get(images, math.inf)
    parts = f"{images // chosen} part{'s' * (chosen < images)} of {chosen}"
    text = f"a step of {images} needs {_need(whole)} {_bytes(free)} free: {parts}"
    if chosen < images and chosen in needed:  # the GPU with least room may be another process's
        text += f", {_bytes(needed[chosen])} each"
    if chosen != before:
        text += f"; BN sees batches of {chosen} instead of {before}"
    return text


def _need(count: float) -> str:
    return f"{_bytes(count)} of" if count < math.inf else "more than"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _two_steps(trainer: Trainer, size: int) -> None:
    """Two steps of two batches each: the second with the optimizer's state allocated."""
    with trial(trainer, recipe=trainer.recipe.changed(accumulate=2)) as at_trial:
        batch = repeated(first_batches(at_trial)[0], size)
        for _ in range(2):
            trial_step(at_trial, [batch, batch])


def peak_of(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes that `work` takes beyond what was in use before; None: not measurable here.

    On a CPU that is the whole process's memory (Linux), on a GPU what torch allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _RESET_PEAK.exists():
        work()
        return None
    peak = PeakOnCPU()
    _RESET_PEAK.write_text("5", encoding="ascii")
    work()
    return peak.now()


# ------------------------------------------------------------------------------- on a GPU
def _largest_that_fits(
    trainer: Trainer, sizes: list[int], limit: float, peak: Peak
) -> dict[int, float]:
    """Bytes by batch size, from the largest down to the first within the limit; inf: it failed."""
    needed: dict[int, float] = {}
    for size in sizes:
        taken = peak(trainer, size)
        needed[size] = math.inf if taken is None else float(taken)
        if needed[size] <= limit:
            break
    return needed


def peak_on_gpu(trainer: Trainer, size: int) -> int | None:
    """Peak bytes allocated in steps with batches of this size; None: out of memory."""
    device = trainer.accelerator.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    taken: int | None = None
    try:
        _two_steps(trainer, size)
        taken = torch.cuda.max_memory_allocated(device) - before
    except RuntimeError as error:
        if not is_out_of_memory(error) and not should_reduce_batch_size(error):
            raise
    torch.cuda.empty_cache()
    return taken


def _free_on_gpu(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


# ------------------------------------------------------------------------------- on a CPU
class PeakOnCPU:
    """Measures this process's peak memory beyond what it held at first (Linux)."""

    def __init__(self) -> None:
        trim_memory()
        self.before: int = psutil.Process().memory_info().rss

    def __call__(self, trainer: Trainer, size: int) -> int:
        _RESET_PEAK.write_text("5", encoding="ascii")  # resets the peak to current use
        _two_steps(trainer, size)
        return self.now()

    def now(self) -> int:
        """The peak since the reset, beyond what was held at first."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return max(0, 1024 * int(peak.split()[1]) - self.before)


def measured_peaks(
    trainer: Trainer, sizes: list[int], limit: float, peak: Peak
) -> list[tuple[int, int]]:
    """(batch size, bytes) for 2, 4, 8, ... up to the largest size.

    Stops early where twice the last would not fit, where they differ by ENOUGH, or after LONGEST.
    """
    largest, points = max(sizes), []
    started = time.monotonic()
    for size in [*(2**k for k in range(1, 31) if 2**k < largest), largest]:
        taken = peak(trainer, size) or 0
        points.append((size, taken))
        if 2 * taken > limit or taken - points[0][1] > ENOUGH:
            break
        if time.monotonic() - started > LONGEST:
            break
    return points


def extrapolated(points: list[tuple[int, int]], sizes: list[int]) -> dict[int, float]:
    """Bytes by batch size: linear between the measured batches, and beyond them.

    At small batches the weights and the optimizer's state dominate, so that two of them may differ
    by less than larger ones do, or by more: the steeper of two slopes is used.
    """
    if len(points) == 1:
        points = [(0, 0), *points]
    batches, peaks = zip(*points, strict=True)
    slopes = [(peaks[-1] - peaks[k]) / (batches[-1] - batches[k]) for k in (0, -2)]
    return {
        size: float(np.interp(size, batches, peaks)) + max(slopes) * max(0, size - batches[-1])
        for size in sizes
    }
