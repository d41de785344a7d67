"""One run in many processes: starting them, deciding together, and telling an error once."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object

from regard.errors import RegardError, UsageError
from regard.machine import choose_device

T = TypeVar("T")
ASK_SECONDS = 1.0  # between the processes' asking each other whether to stop or to save
MOST_STEPS = 50  # and the most steps, as a step may become slower than those before


def start_accelerator(device: str = "auto") -> Accelerator:
    """Accelerate's view of devices and processes; `torchrun` without a GPU trains on CPUs.

    No variable of Accelerate's changes how a run computes: precision, compiling and the
    accumulation of gradients are the recipe's.

    Args:
        device: as for `choose_device`; with several processes each has one of the machine's.

    Raises:
        UsageError: this machine has no such device; `accelerate launch --cpu` was asked for
            several processes, which it does not start; or Accelerate was configured for
            DeepSpeed, FSDP or another way of dividing the network.
    """
    _refuse_other_ways()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UsageError(
            "accelerate launch --cpu starts one process, whatever its --num_processes: leave "
            "that out, or use torchrun --nproc_per_node N -m regard train ..."
        )
    on_cpu = on_cpu or choose_device(device).type == "cpu"
    return Accelerator(
        mixed_precision="no",
        cpu=True if on_cpu else None,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


# variables by which `accelerate launch` says how a network is divided among processes
OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def _refuse_other_ways() -> None:
    for variable, way in OTHER_WAYS.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"{way} ({variable} is set): every process holds the whole network here, and the "
                "images are divided (DDP); choose multi-GPU in `accelerate config`, or use torchrun"
            )


def is_main_process() -> bool:
    """Whether this process is the first of its run, or the only one."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> None:
    """Does `work` in the first process; all processes wait for it, and raise what it raised.

    Raises:
        RegardError: as `work` does.
    """
    error: RegardError | None = None
    if accelerator.is_main_process:
        try:
            work()
        except RegardError as raised:
            error = raised
    if accelerator.num_processes > 1:
        error = broadcast_object_list([error], from_process=0)[0]
    if error is not None:
        raise error


def decided_on_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, for all of them.

    Raises:
        RegardError: as `decide` does.
    """
    decided: list[Any] = [None]

    def work() -> None:
        decided[0] = decide()

    on_main(accelerator, work)
    if accelerator.num_processes > 1:
        broadcast_object_list(decided, from_process=0)
    result: T = decided[0]
    return result


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def is_first_to_tell(error: BaseException) -> bool:
    """Whether no other process of this run has told the same error."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return True
    try:
        from regard.compat import default_store

        return default_store().add(f"regard: {type(error).__name__}: {error}", 1) == 1
    except Exception:  # the process that holds the store has ended: of an error that it told
        return torch.distributed.get_rank() == 0


class Requests:
    """What the processes of a run were asked for by signals and clocks, agreed among them.

    They ask each other about once a second: after how many steps is agreed on each time, from
    how long the steps took.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.steps, self.countdown = 1, 1
        self.asked_at = time.monotonic()

    def agree(self, stop: int, save: bool, *, now: bool = False) -> tuple[int, bool]:
        """The signal to stop for (0: none), and whether to save, as any process was asked.

        Args:
            stop: the signal that this process got.
            save: whether this process has reason to save.
            now: ask even if it is not time; must be the same in all processes.
        """
        if self.accelerator.num_processes == 1:
            return stop, save
        self.countdown -= 1
        if self.countdown > 0 and not now:
            return 0, False
        taken = (time.monotonic() - self.asked_at) / (self.steps - max(self.countdown, 0))
        mine = torch.tensor([[stop, save, taken]], device=self.accelerator.device)
        number, saving, seconds = self.accelerator.gather(mine).amax(dim=0).tolist()
        most = min(2 * self.steps, MOST_STEPS)
        self.steps = self.countdown = max(1, min(most, int(ASK_SECONDS / max(seconds, 1e-6))))
        self.asked_at = time.monotonic()
        return int(number), bool(saving)
