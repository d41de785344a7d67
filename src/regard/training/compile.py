"""Chooses eager, compiled or CUDA graphs for a run; "auto" is decided by timing a few steps."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from regard.data.loading import Batch
from regard.errors import UsageError
from regard.files import plural, reason
from regard.training.distributed import gathered
from regard.training.graphs import Graphed
from regard.training.loop import Trainer
from regard.training.trial import first_batches, loss_and_gradient, trial, trial_step

log: logging.Logger = logging.getLogger(__name__)

LEAST_COMPILING = 10.0  # seconds; compiling forward and backward rarely takes less
MOST_SAVED = 0.5  # of a step's time; compiling rarely saves more
Compiler = Callable[..., Any]
Recorder = Callable[..., Any]
Clock = Callable[[], float]


def choose_compiled(
    trainer: Trainer,
    decided: bool | str | None = None,
    *,
    compiler: Compiler = torch.compile,
    recorder: Recorder = Graphed,
    clock: Clock = time.perf_counter,
) -> str:
    """Compiles the trainer's network or records CUDA graphs, by the recipe or by measuring.

    With several processes the first one's measurement decides for all.

    Args:
        trainer: its `compiled` is set; nothing else in it changes.
        decided: the choice stored by a run that is now resumed.
        compiler: torch.compile, or a substitute.
        recorder: records CUDA graphs: `Graphed`, or a substitute.
        clock: returns seconds.

    Returns:
        "no", "yes" (compiled) or "graphs".

    Raises:
        UsageError: the recipe says "yes" or "graphs", and that is not possible.
    """
    want = _decided(decided) or trainer.recipe.compile
    if want == "no":
        return "no"
    with trial(trainer) as at_trial:
        timer = _Timer(at_trial, first_batches(at_trial), clock)
        timer.seconds(trainer.model)  # the first call is slow: memory is allocated, kernels chosen
        if want == "auto":
            chosen, trainer.compiled = _measured(timer, compiler, recorder)
            return chosen
        made, failure = _made(timer, want, compiler, recorder)
        if failure and decided is None:
            raise UsageError(f"compile={want}: {failure}")
        if failure:  # the stored choice of a run that is resumed on another machine
            log.info(f"note: started with compile={want}, continues without it: {failure}")
        trainer.compiled = None if failure else made
        return "no" if failure else want


def _decided(before: bool | str | None) -> str:
    """The choice stored when the run was started; "" if there is none yet."""
    if isinstance(before, bool):  # written by older versions
        return "yes" if before else "no"
    return before or ""


def _measured(timer: "_Timer", compiler: Compiler, recorder: Recorder) -> tuple[str, Any]:
    """The name of the fastest way, and the callable network for it (None: eager)."""
    trainer = timer.trainer
    name, forward = "no", None
    best = _from_main(trainer, timer.seconds(trainer.model))
    if not _obstacle(trainer):  # recording takes a second
        name, forward, best = _or_recorded(timer, recorder, best)
    left = trainer.total - trainer.step
    if left * best * MOST_SAVED < LEAST_COMPILING:
        log.info(f"not compiled: too short, about {left * best:.0f} s for {plural(left, 'step')}")
        return name, forward
    log.info(f"{best:.3g} s a step; compiling to compare ...")
    compiled = compiler(trainer.model)
    first, failure = timer.try_seconds(compiled)
    if failure := _failure(trainer, failure):
        log.info(f"not compiled: compiling fails here ({failure})")
        return name, forward
    pays, message = _from_main(trainer, _compare(timer, forward, compiled, first, best, left))
    log.info(message)
    return ("yes", compiled) if pays else (name, forward)


def _or_recorded(timer: "_Timer", recorder: Recorder, eager: float) -> tuple[str, Any, float]:
    """CUDA graphs if they are faster: name, forward pass and seconds per step."""
    try:
        recorded = timer.recorded(recorder)
    except RuntimeError as error:  # the network waits for the device, or memory ran out
        log.info(f"no CUDA graphs: {reason(error)}")
        return "no", None, eager
    seconds, failure = timer.try_seconds(recorded)
    if failure:
        log.info(f"no CUDA graphs: {failure}")
        return "no", None, eager
    seconds = min(timer.seconds(recorded) for _ in range(3))
    if seconds >= eager:
        return "no", None, eager
    log.info(f"CUDA graphs: {seconds:.3g} s a step against {eager:.3g} s eager")
    return "graphs", recorded, seconds


def _made(timer: "_Timer", how: str, compiler: Compiler, recorder: Recorder) -> tuple[Any, str]:
    """The network compiled ("yes") or recorded ("graphs"), and why it failed or ""."""
    trainer = timer.trainer
    if how == "yes":
        log.info("compiling ...")
        compiled = compiler(trainer.model)
        failure = _failure(trainer, timer.try_seconds(compiled)[1])
        return compiled, failure and f"the network can't be compiled here ({failure})"
    if obstacle := _obstacle(trainer):
        return None, obstacle
    try:
        recorded = timer.recorded(recorder)
    except RuntimeError as error:
        return None, f"the network can't be recorded ({reason(error)})"
    failure = timer.try_seconds(recorded)[1]
    return recorded, failure and f"the network can't be recorded ({failure})"


def _obstacle(trainer: Trainer) -> str:
    """Why this run can't use CUDA graphs, or ""."""
    recipe = trainer.recipe
    if trainer.device.type != "cuda":
        return f"CUDA graphs need CUDA, this is {trainer.device}"
    if trainer.accelerator.num_processes > 1:
        return "only in one process, as gradients are exchanged while they are computed"
    if recipe.accumulate > 1:
        return "only with accumulate=1, as each pass overwrites the gradients of the one before"
    if recipe.grad_checkpointing:
        return "only without grad_checkpointing, which runs parts of the network twice"
    return ""


def _failure(trainer: Trainer, own: str) -> str:
    """The reason of the first process that failed, or ""."""
    return next(filter(None, gathered(trainer.accelerator, own)), "")


class _Timer:
    """Times one trial step on the same batches."""

    def __init__(self, trainer: Trainer, batches: Sequence[Batch], clock: Clock) -> None:
        self.trainer, self.batches, self.clock = trainer, batches, clock
        self.eagerly = loss_and_gradient(trainer, batches, trainer.model)

    def seconds(self, forward: Any) -> float:
        started = self.clock()
        trial_step(self.trainer, self.batches, forward)
        return self.clock() - started

    def recorded(self, recorder: Recorder) -> Any:
        """The network recorded by `recorder` with the images of a step."""
        trainer = self.trainer
        images = trainer.input_of(self.batches[0])
        return recorder(trainer.model, images, lambda: trainer.updater.autocast(cache=False))

    def try_seconds(self, forward: Any) -> tuple[float, str]:
        """Seconds of the first step, and why it failed or differs from the eager network; or ""."""
        started = self.clock()
        try:
            failure = self.differs(forward)
            return self.clock() - started, failure
        except Exception as error:  # compilers raise what they like
            return 0.0, reason(error)

    def differs(self, forward: Any) -> str:
        """Which of a step's loss and gradient differs from the eager network's, or "".

        The tolerance is a factor of two, as compiled dropout draws other random numbers and bf16
        rounds; this catches code that computes something else.
        """
        found = loss_and_gradient(self.trainer, self.batches, forward)
        for name, eager, other in zip(("loss", "gradient"), self.eagerly, found, strict=True):
            if name == "gradient" and self.trainer.updater.scaler is not None:
                continue  # in fp16 it may overflow, which the loss scaler handles
            if eager and math.isfinite(eager) and not 0.5 < other / eager < 2:
                return f"its {name} is {other:.3g}, {eager:.3g} eagerly"
        return ""


def _compare(
    timer: _Timer, forward: Any, compiled: Any, first: float, once: float, left: int
) -> tuple[bool, str]:
    """Whether to compile, and why, from timed steps; `forward`: uncompiled (None: eager)."""
    eager = forward or timer.trainer.model
    rounds = [(timer.seconds(eager), timer.seconds(compiled)) for _ in range(3 if once > 1 else 9)]
    # the minimum, as other work on the machine can only slow a step down
    slow, fast = (min(times) for times in zip(*rounds, strict=True))
    many = timer.trainer.accelerator.num_processes > 1
    return _decision(slow, fast, max(0.0, first - fast), left, many)


def _decision(
    eager: float, compiled: float, compiling: float, left: int, again: bool
) -> tuple[bool, str]:
    """Whether to compile, and why, from the seconds of a step either way.

    The time already spent on compiling doesn't count, so the faster one wins; where the network
    must be compiled `again`, only if the remaining steps win that time back.
    """
    times = f"{compiled:.3g} s a step against {eager:.3g} s eager; compiling took {compiling:.0f} s"
    if compiled >= eager:
        return False, f"not compiled: {times}"
    after = compiling / (eager - compiled)
    if after <= left:
        return True, f"compiled: {times}, won back after {after:,.0f} of {plural(left, 'step')}"
    return (
        not again,
        f"{'not ' * again}compiled: {times}, more than {plural(left, 'step')} can win back",
    )


def _from_main(trainer: Trainer, value: Any) -> Any:
    """The first process's value, in all processes."""
    if trainer.accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value], from_process=0)[0]
