"""How many of this machine's cores this process may use."""

import os

SHARE = "REGARD_CORES"  # set for runs of a study that are trained at the same time


def cores() -> int:
    """Cores that this process may use, at least 1.

    The processes of one distributed run on a machine (LOCAL_WORLD_SIZE) share its cores, as do
    runs of a study that are trained at the same time (REGARD_CORES is the share of each).
    """
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    share = os.environ.get(SHARE, "")
    if share.isdecimal():
        available = min(available, int(share))
    return max(1, available // processes_here())


def processes_here() -> int:
    """How many processes of one distributed run are on this machine (LOCAL_WORLD_SIZE)."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(processes) if processes.isdecimal() else 1)
