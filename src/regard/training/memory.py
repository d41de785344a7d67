"""A step of training in as few equal batches as fit in memory.

On a GPU steps are tried, largest batch first. On a CPU, where too much memory ends not the
step but the process, another process tries small batches and the rest is extrapolated.
"""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size

from regard.data.augment import random_numbers
from regard.data.loading import Batch
from regard.data.preprocess import Preprocess
from regard.errors import UsageError
from regard.models.create import make_model
from regard.training.activation_checkpointing import set_checkpointing
from regard.training.config import Recipe
from regard.training.loop import Trainer
from regard.training.trial import first_batches, rehearsal, rehearse

SHARE = 0.9  # of the free memory that a step may take: the measurement is not exact
ENOUGH = 512e6  # bytes by which the batches measured differ, when no larger one is needed
LONGEST = 60.0  # seconds in which another larger batch is measured
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@dataclass(frozen=True)
class Described:
    """What another process needs to train the same network."""

    name: str
    arguments: Mapping[str, Any]
    classes: int
    preprocess: Preprocess
    recipe: Recipe
    bf16: bool
    threads: int


def fit_memory(
    trainer: Trainer,
    described: Described,
    say: Callable[[str], None],
    *,
    measure: Callable[[Described, list[int], float], list[tuple[int, int]]] | None = None,
    attempt: Callable[[Trainer, int], int | None] | None = None,
    free: float | None = None,
) -> tuple[int, int]:
    """The images of a batch, and the batches of a step, so that each fits in memory.

    A step has as many images as before, so that the learning rate is right as it is.

    Args:
        trainer: of the recipe's batches; it stays as it is.
        described: its network.
        say: is given a line.
        measure, attempt: instead of `peaks_of` and `peak_on_gpu`.
        free: bytes, instead of what is free.

    Raises:
        UsageError: not even the smallest batch fits.
    """
    device, world = trainer.accelerator.device, trainer.accelerator.num_processes
    images = trainer.batch * trainer.recipe.accumulate
    sizes = [images // n for n in range(1, images + 1) if images % n == 0]
    # a batch of one image has no variance for BN
    sizes = [s for s in sizes if s <= trainer.count and (s > 1 or images == 1)]
    if device.type == "cuda":
        free = free or _free_on_gpu(device)
        needed = _tried(trainer, sizes, attempt or peak_on_gpu)
    elif device.type == "cpu":
        free = (free or free_memory()) / int(os.environ.get("LOCAL_WORLD_SIZE", world))
        points: list[tuple[int, int]] = []
        if trainer.accelerator.is_main_process:
            points = (measure or peaks_of)(described, sizes, SHARE * free)
        needed = _extrapolated(points, sizes)
    else:
        say(f"memory can't be measured on {device.type}: batches stay as they are")
        return trainer.batch, trainer.recipe.accumulate
    if not needed:
        say("the memory of a step could not be measured: batches stay as they are")
        chosen = trainer.batch
    else:
        chosen = next((s for s in sizes if needed.get(s, free) <= SHARE * free), 0)
    if world > 1:  # on a CPU the first process's; of GPUs, the one with least room
        several = gather_object([chosen])
        chosen = broadcast_object_list([several[0]])[0] if device.type == "cpu" else min(several)
    if not chosen:
        raise UsageError(
            f"--fit-memory: a batch of {sizes[-1]}, the smallest equal part of a step of {images}, "
            f"needs {_need(needed[sizes[-1]])} {_bytes(free)} free: try --grad-checkpointing, "
            "a smaller --size, or another --batch-size"
        )
    if needed:
        say(_told(images, chosen, trainer.batch, needed, free))
    return chosen, images // chosen


def _told(images: int, chosen: int, before: int, needed: dict[int, float], free: float) -> str:
    whole = needed.get(images, float("inf"))
    parts = f"{images // chosen} part{'s' * (chosen < images)} of {chosen}"
    told = f"a step of {images} needs {_need(whole)} {_bytes(free)} free: {parts}"
    if chosen < images:
        told += f", {_bytes(needed[chosen])} each"
    if chosen != before:
        told += f"; BN sees batches of {chosen} instead of {before}"
    return told


def _need(count: float) -> str:
    return f"{_bytes(count)} of" if count < float("inf") else "more than"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# ------------------------------------------------------------------------------- on a GPU
def _tried(
    trainer: Trainer, sizes: list[int], attempt: Callable[[Trainer, int], int | None]
) -> dict[int, float]:
    """Bytes by batch, from the largest to the first that fits; infinite for what does not."""
    needed: dict[int, float] = {}
    for size in sizes:
        peak = attempt(trainer, size)
        needed[size] = float("inf") if peak is None else float(peak)
        if peak is not None:
            break
    return needed


def peak_on_gpu(trainer: Trainer, size: int) -> int | None:
    """Bytes allocated at most in two steps of two batches of this size; None: too many."""
    device = trainer.accelerator.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with rehearsal(trainer, recipe=trainer.recipe.changed(accumulate=2)) as at_trial:
            batch = _repeated(first_batches(at_trial)[0], size)
            for _ in range(2):
                rehearse(at_trial, [batch, batch])
        peak = torch.cuda.max_memory_allocated(device) - before
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
        peak = None
    torch.cuda.empty_cache()
    return peak


def _repeated(batch: Batch, size: int) -> Batch:
    rows = torch.arange(size) % len(batch.indices)
    return Batch(batch.images[rows], batch.indices[rows], batch.draws[rows])


def _free_on_gpu(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


# ------------------------------------------------------------------------------- on a CPU
def free_memory(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process may still use: of the machine, and of its control group.

    root: where control groups are; of version 2, or of version 1 with its folder `memory`.
    """
    free = float(psutil.virtual_memory().available)
    for folder, limit, used, cache in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:  # "max", no number: there is no limit
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        free = min(free, most - taken + int(stat.get(cache, 0)))
    return max(free, 0.0)


def peaks_of(described: Described, sizes: list[int], limit: float) -> list[tuple[int, int]]:
    """Batches and the bytes that steps of them take at most, measured in another process.

    Batches of 2, 4, 8 ... up to the largest of `sizes`, while the next may not exceed `limit`.
    Empty where the process fails.
    """
    largest = max(sizes)
    batches = [2**k for k in range(1, largest.bit_length()) if 2**k < largest] + [largest]
    # a new process, as a forked one hangs where OpenMP has run; not one of several that train
    environment = {k: v for k, v in os.environ.items() if k not in _DISTRIBUTED}
    code = "from regard.training.memory import measure_here; measure_here()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((described, batches, limit)),
        capture_output=True, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    lines = done.stdout.decode().splitlines()
    return [(int(batch), int(peak)) for batch, peak in map(json.loads, lines)]


def measure_here() -> None:
    """Of the process that `peaks_of` starts: prints a line for each batch."""
    described, batches, limit = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(described.threads)
    started, before = time.monotonic(), _peak(now=True)
    first = 0
    for batch in batches:
        trainer = _random_trainer(described, batch)
        for _ in range(2):  # the second with all that the optimizer keeps
            rehearse(trainer, [next(iter(trainer.source.batches([(0, batch)])))] * 2)
        peak = max(0, _peak() - before)
        print(json.dumps([batch, peak]), flush=True)
        first = first or peak
        if 2 * peak > limit or peak - first > ENOUGH or time.monotonic() - started > LONGEST:
            return


class _Random:
    """A source of noise."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def batches(self, spans: Any) -> Any:
        for start, count in spans:
            images = torch.randint(256, (count, *self.shape), dtype=torch.uint8)
            yield Batch(
                images, torch.zeros(count, dtype=torch.int64), random_numbers(0, start, count)
            )


def _random_trainer(described: Described, batch: int) -> Trainer:
    d, shape = described, described.preprocess.input_size
    model = make_model(d.name, d.arguments, d.classes, shape, False, None)
    if d.recipe.grad_checkpointing:
        set_checkpointing(model, d.name)
    return Trainer(
        model=model.to(memory_format=torch.channels_last).train(),
        recipe=d.recipe.changed(batch_size=batch, accumulate=2), preprocess=d.preprocess,
        source=_Random(shape), labels=torch.zeros(1, dtype=torch.int64), classes=d.classes,
        count=batch, total=2, accelerator=Accelerator(cpu=True), bf16=d.bf16,
    )  # fmt: skip


def _peak(now: bool = False) -> int:
    """Bytes of memory that this process holds `now`, or held at most."""
    info = psutil.Process().memory_info()
    if now:
        return int(info.rss)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what this process was forked from
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS: bytes


def _extrapolated(points: list[tuple[int, int]], sizes: list[int]) -> dict[int, float]:
    """Bytes by batch: linear between the batches measured, and beyond them.

    Of small batches the weights and what the optimizer does take the most, so that they differ
    by less than larger ones may, or by more: beyond, the steeper of two lines is followed.
    """
    if not points:
        return {}
    if len(points) == 1:
        points = [(0, 0), *points]
    batches, peaks = zip(*points, strict=True)
    slopes = [(peaks[-1] - peaks[k]) / (batches[-1] - batches[k]) for k in (0, -2)]
    return {
        size: float(np.interp(size, batches, peaks)) + max(slopes) * max(0, size - batches[-1])
        for size in sizes
    }
