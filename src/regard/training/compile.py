"""Whether a run is compiled: measured by a few steps both ways, where the recipe says auto."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from regard.data.loading import Batch
from regard.errors import UsageError
from regard.files import reason
from regard.training.distributed import gathered
from regard.training.loop import Trainer
from regard.training.trial import first_batches, trial, trial_step

log: logging.Logger = logging.getLogger(__name__)

LEAST_COMPILING = 10.0  # seconds; compiling forward and backward hardly takes less
MOST_SAVED = 0.5  # of a step's time; compiling hardly saves more
Compiler = Callable[..., Any]
Clock = Callable[[], float]


def choose_compiled(
    trainer: Trainer,
    decided: bool | None = None,
    *,
    compiler: Compiler = torch.compile,
    clock: Clock = time.perf_counter,
) -> bool:
    """Compiles the trainer's network where the recipe says so, or where measuring says it pays.

    With several processes the first one's measurement decides for all.

    Args:
        trainer: its `compiled` is set; nothing else of it is changed.
        decided: what a resumed run decided when it was started.
        compiler: torch.compile, or another.
        clock: seconds.

    Returns:
        Whether it is compiled.

    Raises:
        UsageError: the recipe says "yes" or "graphs", and it can't be compiled so.
    """
    want = trainer.recipe.compile
    if want == "no" or decided is False:
        return False
    mode = _mode(trainer)
    left = trainer.total - trainer.step
    with trial(trainer) as at_trial:
        timer = _Timer(at_trial, first_batches(at_trial), clock)
        timer.seconds(trainer.model)  # the first is slow: memory is allocated, kernels chosen
        measuring = want == "auto" and decided is None
        eager = _from_main(trainer, timer.seconds(trainer.model)) if measuring else 0.0
        if measuring and left * eager * MOST_SAVED < LEAST_COMPILING:
            log.info(f"not compiled: {left:,} steps take about {left * eager:.0f} s: too short")
            return False
        log.info(
            f"{eager:.3g} s a step; compiling, to compare ..." if measuring else "compiling ..."
        )
        compiled, first = compiler(trainer.model, **mode), 0.0
        first, failure = timer.try_seconds(compiled)
        failure = next(filter(None, gathered(trainer.accelerator, failure)), "")
        if failure and want != "auto":
            raise UsageError(f"compile={want}: the network can't be compiled here ({failure})")
        if failure:
            log.info(f"not compiled: it can't be here ({failure})")
            return False
        chosen = True
        if measuring:
            chosen, message = _from_main(trainer, _compare(timer, compiled, first, eager, left))
            log.info(message)
    trainer.compiled = compiled if chosen else None
    return chosen


def _mode(trainer: Trainer) -> dict[str, str]:
    """torch.compile's argument for what the recipe says."""
    if trainer.recipe.compile != "graphs":
        return {}
    if trainer.device.type != "cuda":
        raise UsageError(f"compile=graphs: CUDA graphs are on CUDA alone, this is {trainer.device}")
    if trainer.recipe.accumulate > 1:
        # a graph's gradients lie where its next call writes them
        raise UsageError("compile=graphs: only with accumulate=1")
    return {"mode": "reduce-overhead"}


class _Timer:
    """Times one trial step on the same batches."""

    def __init__(self, trainer: Trainer, batches: Sequence[Batch], clock: Clock) -> None:
        self.trainer, self.batches, self.clock = trainer, batches, clock

    def seconds(self, forward: Any) -> float:
        started = self.clock()
        trial_step(self.trainer, self.batches, forward)
        return self.clock() - started

    def try_seconds(self, forward: Any) -> tuple[float, str]:
        """Its seconds, and the reason where it fails."""
        try:
            return self.seconds(forward), ""
        except Exception as error:  # compilers raise what they like
            return 0.0, reason(error)


def _compare(
    timer: _Timer, compiled: Any, first: float, once: float, left: int
) -> tuple[bool, str]:
    """Whether to compile, and why, from steps both ways."""
    eager = timer.trainer.model
    rounds = [(timer.seconds(eager), timer.seconds(compiled)) for _ in range(3 if once > 1 else 9)]
    # the fastest, as other work on the machine only ever adds
    slow, fast = (min(times) for times in zip(*rounds, strict=True))
    many = timer.trainer.accelerator.num_processes > 1
    return _decision(slow, fast, max(0.0, first - fast), left, many)


def _decision(
    eager: float, compiled: float, compiling: float, left: int, again: bool
) -> tuple[bool, str]:
    """Whether to compile, and why, from the seconds of a step both ways.

    The time that compiling took is spent, so the faster is chosen; but where the network must be
    compiled `again`, only if the steps that are left win that time back.
    """
    times = f"{compiled:.3g} s a step against {eager:.3g} s eager; compiling took {compiling:.0f} s"
    if compiled >= eager:
        return False, f"not compiled: {times}"
    after = compiling / (eager - compiled)
    if after <= left:
        return True, f"compiled: {times}, won back after {after:,.0f} of {left:,} steps"
    return not again, f"{'not ' * again}compiled: {times}, more than {left:,} steps win back"


def _from_main(trainer: Trainer, value: Any) -> Any:
    """The first process's value, in all of them."""
    if trainer.accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]
