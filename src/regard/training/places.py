"""This process's rank and the number of processes, from the environment or an existing group."""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from regard.errors import FileError, Replacing, UsageError
from regard.files import reason

log: logging.Logger = logging.getLogger(__name__)

# torchrun's variables, each with MPI's equivalents, which Accelerate reads on CPUs
VARIABLES = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": (
        "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"
    ),
}  # fmt: skip
DEVICE = "ACCELERATE_TORCH_DEVICE"  # which Accelerate prefers to any other device
ADVICE = "torchrun (or MPI) sets them for several processes; unset them to train in one process"
LONG = 30.0  # seconds of waiting after which a message says so


@contextlib.contextmanager
def checked_places(device: str) -> Iterator[None]:
    """Context in which Accelerate finds this process's rank in variables that are consistent.

    What another program left in the environment of a single-process training is hidden.

    Args:
        device: the type of device to train on, such as "cuda".

    Raises:
        UsageError: a variable is not a number, or the variables contradict each other.
    """
    hidden = []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _take_places_of_group()
    elif _number_of_processes(device) == 1 and not os.environ.get("MASTER_ADDR"):
        hidden += list(VARIABLES)
        _warn_of_single_tasks()
    if not os.environ.get(DEVICE, device).startswith(device):
        hidden.append(DEVICE)
    before = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _warn_of_single_tasks() -> None:
    """Warns where srun started one copy of the command per task, which don't know of each other."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and os.environ.get("SLURM_PROCID") == "0":
        log.warning(
            f"srun started {tasks} tasks, and each trains its own run: for one run in several "
            "processes, have srun start torchrun once per machine"
        )


def _number_of_processes(device: str) -> int:
    """The number of processes according to the variables."""
    named: dict[str, tuple[str, int]] = {}  # by torchrun's name: the variable that is set
    for name, others in VARIABLES.items():
        for variable in (name, *others) if device == "cpu" else (name,):
            if os.environ.get(variable) and name not in named:
                named[name] = variable, _number(variable)
    of, world = named.get("WORLD_SIZE", ("WORLD_SIZE", 1))
    if "RANK" in named and ("WORLD_SIZE" in named or "LOCAL_RANK" in named):
        variable, rank = named["RANK"]
        if not 0 <= rank < max(1, world):
            raise UsageError(f"{variable}={rank} with {of}={world}: {ADVICE}")
    variable, here = named.get("LOCAL_WORLD_SIZE", ("LOCAL_WORLD_SIZE", 1))
    if here < 1 or 1 < world < here:
        raise UsageError(f"{variable}={here} with {of}={world}: {ADVICE}")
    if os.environ.get("MASTER_PORT"):
        _number("MASTER_PORT")
    if world > 1 and not os.environ.get("MASTER_ADDR"):
        raise UsageError(f"{of}={world}, but MASTER_ADDR is not set: {ADVICE}")
    return max(1, world)


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError:
        raise UsageError(f"{variable}={os.environ[variable]} is not a number: {ADVICE}") from None


def _take_places_of_group() -> None:
    """Sets torchrun's variables for a process group that the caller made, as with `mp.spawn`.

    Raises:
        UsageError: the ranks on this machine are not consecutive.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if world == 1 or {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys():
        return
    hosts = [""] * world
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    here = [k for k, host in enumerate(hosts) if host == hosts[rank]]
    if here[-1] - here[0] >= len(here):
        raise UsageError(f"the ranks on {hosts[rank]} are {here}: they must be consecutive")
    os.environ |= {"LOCAL_RANK": str(here.index(rank)), "LOCAL_WORLD_SIZE": str(len(here))}


@contextlib.contextmanager
def waiting_told() -> Iterator[None]:
    """Says after a while that other processes are being waited for; they may not be running."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield
        return
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    line = f"the run's other processes have not joined yet ({said}). {ADVICE}"
    timer = threading.Timer(LONG, log.warning, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def unreachable_told() -> Replacing:
    """Reports in one line that the processes can't reach each other.

    Raises:
        FileError: a port is in use, an address is unknown, or some processes never joined.
    """

    def explained(error: Exception) -> FileError | None:
        if not isinstance(error, torch.distributed.DistError):
            return None
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return FileError(
            f"the run's processes can't reach each other at {at} ({reason(error, 160)}): is "
            "another run using it? torchrun --standalone chooses a free port"
        )

    return Replacing(explained)


# ------------------------------------------------------------------------------- restarts
POLL = 0.2  # seconds between polls of the store
SCHEME = "regard-attempt"


def meeting() -> str | None:
    """The init_method of the run's process group; None: torch's default.

    Where torchrun may restart the processes, all attempts share one store, and a process could
    find the address of one that ended in an earlier attempt (PyTorch issue 135712).
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    again = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if not (shared and again):
        return None
    from torch.distributed.rendezvous import register_rendezvous_handler

    with contextlib.suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler(SCHEME, _meet)
    return f"{SCHEME}://"


def _meet(_: str, timeout: timedelta, **more: Any) -> Iterator[tuple[Any, int, int]]:
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=timeout, **more))
    name = agreed_attempt(store, rank, world, timeout.total_seconds())
    yield torch.distributed.PrefixStore(f"regard/{name}", store), rank, world


def agreed_attempt(store: Any, rank: int, world: int, longest: float) -> str:
    """A name that all processes of this attempt share, and none of an earlier one used.

    The first process chooses it, and lets the others go on once each has seen it. If one has ended
    meanwhile, that never happens, and the name is given up for the next attempt's.

    Raises:
        DistStoreError: not all processes joined within `longest` seconds.
    """
    ends, mine = time.monotonic() + longest, ""
    if rank == 0:
        store.set("regard/attempt", mine := uuid.uuid4().hex)
    while time.monotonic() < ends:
        name = mine if rank == 0 else store.get("regard/attempt").decode()
        if rank == 0 and store.add(f"regard/{name}/seen", 0) == world - 1:
            store.set(f"regard/{name}/go", "")
        if name != mine and store.add(f"regard/{name}/{rank}", 1) == 1:
            store.add(f"regard/{name}/seen", 1)
            mine = name  # otherwise this rank saw it in an earlier attempt
        if name == mine and store.check([f"regard/{name}/go"]):
            return name
        time.sleep(POLL)
    raise torch.distributed.DistStoreError(f"not all of {world} processes joined")
