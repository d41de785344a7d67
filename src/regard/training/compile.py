"""Whether a run is compiled: where it is left to us, a few steps are measured both ways."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from regard.errors import UsageError
from regard.training.loop import Trainer
from regard.training.trial import first_batches, rehearsal, rehearse

LEAST_COMPILING = 10.0  # seconds; less it hardly takes, forward and backward
MOST_SAVED = 0.5  # of a step's time; more it hardly saves


def choose_compiled(
    trainer: Trainer,
    say: Callable[[str], None],
    kept: bool | None = None,
    *,
    compiler: Callable[[Any], Any] = torch.compile,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Compiles the trainer's network where the recipe says so, or where it pays; tells why.

    Of many processes the first one's measurement decides for all.

    Args:
        trainer: its `compiled` is set; all else of it stays as it is.
        say: is given a line.
        kept: what was decided before, for a run that is resumed.
        compiler: torch.compile, or another.
        clock: seconds.

    Returns:
        Whether it is compiled.

    Raises:
        UsageError: the recipe says "yes", and it can't be compiled.
    """
    want = trainer.recipe.compile
    if want == "no" or kept is False:
        return False
    left = trainer.total - trainer.step
    with rehearsal(trainer) as at_trial:
        batches = first_batches(at_trial)

        def seconds(forward: Any) -> float:
            started = clock()
            rehearse(at_trial, batches, forward)
            return clock() - started

        eager = trainer.model
        seconds(eager)  # the first is slow: memory is asked for, kernels are chosen
        measuring = want == "auto" and kept is None
        once = _first_ones(trainer, seconds(eager)) if measuring else 0.0
        if measuring and left * once * MOST_SAVED < LEAST_COMPILING:
            say(f"not compiled: {left:,} steps take about {left * once:.0f} s, which is too short")
            return False
        say(f"{once:.3g} s a step; compiling, to compare ..." if measuring else "compiling ...")
        compiled, first, reason = compiler(eager), 0.0, ""
        try:
            first = seconds(compiled)
        except Exception as error:  # of any compiler, which raise what they like
            reason = " ".join(str(error).split())[:200] or type(error).__name__
        reason = next(filter(None, _everyones(trainer, reason)), "")
        if reason and want == "yes":
            raise UsageError(f"--compile yes: the network can't be compiled here ({reason})")
        if reason:
            say(f"not compiled: it can't be here ({reason})")
            return False
        if not measuring:
            trainer.compiled = compiled
            return True
        rounds = [(seconds(eager), seconds(compiled)) for _ in range(3 if once > 1 else 9)]
        # the least, as other work on the machine only ever adds
        slow, fast = (min(times) for times in zip(*rounds, strict=True))
    many = trainer.accelerator.num_processes > 1
    chosen, told = _first_ones(trainer, _decision(slow, fast, max(0.0, first - fast), left, many))
    say(told)
    trainer.compiled = compiled if chosen else None
    return chosen


def _decision(
    eager: float, compiled: float, compiling: float, left: int, again: bool
) -> tuple[bool, str]:
    """Whether to compile, and what to tell, from the seconds of a step both ways.

    What compiling took is spent, so the faster is chosen; but where it must be compiled
    `again`, only if the steps that are left win that back.
    """
    times = f"{compiled:.3g} s a step against {eager:.3g} s eager; compiling took {compiling:.0f} s"
    if compiled >= eager:
        return False, f"not compiled: {times}"
    after = compiling / (eager - compiled)
    if after <= left:
        return True, f"compiled: {times}, won back after {after:,.0f} of {left:,} steps"
    return not again, f"{'not ' * again}compiled: {times}, more than {left:,} steps win back"


def _first_ones(trainer: Trainer, value: Any) -> Any:
    """The first process's value, for all."""
    if trainer.accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]


def _everyones(trainer: Trainer, value: Any) -> list[Any]:
    return [value] if trainer.accelerator.num_processes == 1 else gather_object([value])
