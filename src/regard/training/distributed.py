"""One run in several processes: starting them, deciding together, reporting an error once."""

import datetime
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from regard.called import is_told_by_another
from regard.compat import default_store
from regard.data.workers import kill_workers
from regard.errors import FileError, RegardError, Replacing, UsageError
from regard.files import reason
from regard.machine import choose_device
from regard.training.places import checked_places, meeting, unreachable_told, waiting_told
from regard.version import __version__

# the others wait while the first process downloads, groups and hashes images; NCCL's default is
# 10 minutes. A failed process is not waited for: see Watch
LONGEST_EXCHANGE = datetime.timedelta(hours=2)


def start_accelerator(device: str = "auto") -> Accelerator:
    """Accelerate's view of devices and processes; `torchrun` without a GPU trains on CPUs.

    Accelerate's environment variables do not change how a run computes: precision, compiling and
    gradient accumulation are the recipe's.

    Args:
        device: as for `choose_device`; with several processes each uses one of the machine's.

    Raises:
        UsageError: this machine has no such device; `accelerate launch --cpu` was asked for
            several processes, which it does not start; Accelerate was configured for DeepSpeed,
            FSDP or another way of dividing the network; machines have different numbers of
            processes, or versions of Regard, torch or timm; or the variables that give the rank
            and the number of processes are not numbers or contradict each other.
        FileError: the processes can't reach each other.
    """
    global _runs
    _runs += 1  # the same in all processes, as each takes part in each run
    _refuse_other_ways()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        raise UsageError(
            "accelerate launch --cpu starts one process, whatever its --num_processes: leave "
            "that out, or use torchrun --nproc_per_node N -m regard train ..."
        )
    chosen = "cpu" if on_cpu else choose_device(device).type
    on_cpu = chosen == "cpu"
    with checked_places(chosen), waiting_told(), unreachable_told():
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=True if on_cpu else None,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                InitProcessGroupKwargs(init_method=meeting(), timeout=LONGEST_EXCHANGE)
            ],
        )
    _refuse_unlike_machines(accelerator)
    return accelerator


def _refuse_unlike_machines(accelerator: Accelerator) -> None:
    mine = {
        "": os.environ.get("LOCAL_WORLD_SIZE"),
        "Regard": __version__,
        "torch": torch.__version__.partition("+")[0],
        "timm": timm.__version__,
    }
    several = gathered(accelerator, mine)
    for name in mine:
        if len(found := {str(each.get(name)) for each in several}) == 1:
            continue
        listed = ", ".join(sorted(found))
        if not name:
            raise UsageError(
                f"the run's processes are on machines with {listed} of them: each machine must "
                "have the same number"
            )
        raise UsageError(
            f"the run's machines have different versions of {name} ({listed}): install the same "
            "on each"
        )


# variables by which `accelerate launch` says how the network is divided among processes
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
                f"{way} ({variable} is set): not supported, only data parallelism (DDP) is; choose "
                "multi-GPU in `accelerate config`, or use torchrun"
            )


def is_main_process() -> bool:
    """Whether this process is the first of its run, or the only one."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:
    """Calls `work` in the first process and returns its result in all of them, which wait for it.

    Raises:
        RegardError: raised by `work`, then in all processes.
    """
    error: RegardError | None = None
    result = None
    if accelerator.is_main_process:
        try:
            result = work()
        except RegardError as raised:
            error = raised
    if accelerator.num_processes > 1:
        error, result = broadcast_object_list([error, result], from_process=0)
    try:
        if error is not None:
            raise error
        return result
    finally:
        del error  # its traceback references this frame and the run's


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def gathered_first(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes in the first one; an empty list in the others."""
    if accelerator.num_processes == 1:
        return [value]
    values = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


class Ranks:
    """This process's rank in the run, used to divide work and to combine results.

    Attributes:
        rank, count: rank and number of processes in the run.
        place, local: the same on this machine, whose ranks are consecutive.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        several = accelerator is not None
        self.rank: int = accelerator.process_index if several else 0  # type: ignore[union-attr]
        self.count: int = accelerator.num_processes if several else 1  # type: ignore[union-attr]
        here = os.environ.get("LOCAL_WORLD_SIZE", self.count)
        self.local: int = int(here) if self.count > 1 else 1
        self.place = int(os.environ.get("LOCAL_RANK", self.rank)) if self.count > 1 else 0

    def all(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return [value] if self._accelerator is None else gathered(self._accelerator, value)


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Broadcasts the first process's tensors; tensors of one dtype are sent together."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.detach())
    for alike in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        torch.distributed.broadcast(flat, 0)
        for tensor, value in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(value.view(tensor.shape))


# ---------------------------------------------------------------------- errors, reported once
FAILED = "failed"  # in the store: how many processes have failed
GRACE = 10.0  # seconds that a process has to end by itself once another has failed
_runs = 0  # runs of this process: one group of processes may train several in turn
LOST = ("closed by peer", "reset by peer", "Connection refused", "NCCL", "Broken pipe")


def run_store() -> Any:
    """The processes' key-value store, with a prefix for the newest run.

    An error or a stop of an earlier run of the same processes does not reach this one.
    """
    return torch.distributed.PrefixStore(f"regard/{_runs}", default_store())


def is_first_to_tell(error: BaseException) -> bool:
    """Whether this process is the first of the run to fail, so that its error is reported.

    What follows from it in the others, such as a lost connection, is not reported.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return not (isinstance(error, UsageError) and is_told_by_another())
    try:
        return run_store().add(FAILED, 1) == 1
    except Exception:  # the process that holds the store has ended, after reporting its error
        return torch.distributed.get_rank() == 0


def lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the run is gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    if "Duplicate GPU" in str(error):  # more processes than GPUs: no process is gone
        return False
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in LOST)


def lost_processes(count: int) -> Replacing:
    """Turns a lost connection to another of `count` processes into an error that explains it.

    Raises:
        FileError: another process has ended or can't be reached.
    """

    def explained(error: Exception) -> FileError | None:
        if count == 1 or not isinstance(error, RuntimeError) or not lost_process(error):
            return None
        # without gloo's source location before it, and its advice after it
        why = re.sub(r"^\[\S+\] ", "", reason(error, 400)).partition(". ")[0][:120]
        return FileError(
            f"another of the run's {count} processes has ended, or can't be reached any more "
            f"({why}): its own output may say why; resume the run, or start it again"
        )

    return Replacing(explained)


class Watch:
    """Ends this process some seconds after another one has failed, unless it ends by itself.

    It may be waiting in a collective that the failed process will never join.

    Args:
        end: ends the process (default: at once, together with its loader processes).
        grace: seconds to wait before that.
    """

    def __init__(self, end: Callable[[], object] | None = None, grace: float = GRACE) -> None:
        self._end, self._grace = end or _end, grace
        self._done = threading.Event()
        self._store = run_store()
        threading.Thread(target=self._look, name="regard-watch", daemon=True).start()

    def close(self) -> None:
        """Stops watching: this process ends by itself."""
        self._done.set()

    def _look(self) -> None:
        while not self._done.wait(1.0):
            try:
                failed = self._store.add(FAILED, 0) > 0
            except Exception:  # the process that holds the store has ended
                failed = True
            if failed:
                if not self._done.wait(self._grace):
                    self._end()
                return


def _end() -> None:
    kill_workers()
    os._exit(1)


# --------------------------------------------------------------------------------- requests
ASKED = "stop"  # in the store: the signal by which some process was asked to stop


class Requests:
    """Stop and save requests from signals and clocks, agreed among a run's processes.

    They are exchanged after every step and read after the next one, so that no process waits:
    all processes meet a request after the same step, at most two steps after it came.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.several: bool = accelerator.num_processes > 1
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None
        self._looked_at, self._heard, self._told = 0.0, 0, False

    def agree(self, stop: int, save: bool, *, now: bool = False) -> tuple[int, bool]:
        """The signal to stop for (0: none), and whether to save, if any process was asked to.

        Args:
            stop: the signal that this process got.
            save: whether this process has a reason to save.
            now: read this step's requests too; must be the same in all processes.
        """
        if not self.several:
            return stop, save
        number, saving = self._answer()
        self._ask(stop, save)
        if now:
            others = self._answer()
            number, saving = max(number, others[0]), max(saving, others[1])
        return number, bool(saving)

    def _ask(self, stop: int, save: bool) -> None:
        if self._group is None:  # on CPUs, so that it does not wait for a GPU
            self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_EXCHANGE)
        mine = torch.tensor([stop, int(save)])
        work = torch.distributed.all_reduce(
            mine, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = work, mine

    def _answer(self) -> tuple[int, int]:
        if self._pending is None:
            return 0, 0
        work, found = self._pending
        self._pending = None
        work.wait()
        stop, save = found.tolist()
        return stop, save

    def heard(self, stop: int, *, at_once: bool = False) -> int:
        """The signal that any process got, looked up at most once a second; 0: none yet.

        For stretches without steps: processes see it at different moments. `at_once` looks now.
        """
        if stop or not self.several:
            if stop and self.several and not self._told:
                self._told = True
                run_store().set(ASKED, str(stop))
            return stop
        now = time.monotonic()
        if not self._heard and (at_once or now - self._looked_at >= 1):
            self._looked_at = now
            if (store := run_store()).check([ASKED]):
                self._heard = int(store.get(ASKED))
        return self._heard
