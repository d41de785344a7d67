"""Opens a run in the first process and sends it to the others, which may share no disk."""

import dataclasses
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from regard.data.content import UNREADABLE, content_hashes
from regard.data.members import on_disk
from regard.data.sources import ImageTable, open_data
from regard.errors import FileError, UsageError
from regard.files import plural, spread
from regard.log import Heartbeat
from regard.runs import RunFolder, choose_out
from regard.trained_on import COMPARED, changed_line, moved_table
from regard.training.checkpoint import Checkpoints
from regard.training.distributed import Ranks, gathered, on_main
from regard.training.run_plan import Plan, Request, new_plan, resumed_plan

log: logging.Logger = logging.getLogger(__name__)

Resume = bool | Literal["auto"]


@dataclass(frozen=True)
class Opened:
    """A run to be started or resumed.

    Attributes:
        path: its folder, which exists only for the first process.
        plan: the run's plan.
        table: its images with their splits.
        stored: what was measured when it was started.
        resumed: whether it is resumed.
        has_state: whether a state was saved.
        finished: whether nothing is left to do.
    """

    path: Path
    plan: Plan
    table: ImageTable
    stored: dict[str, Any]
    resumed: bool
    has_state: bool
    finished: bool


def open_run(
    accelerator: Accelerator, asked: Request, out: str | Path | None, resume: Resume
) -> Opened:
    """The requested run, the same in all processes.

    Args:
        accelerator: this process's.
        asked: the arguments.
        out: the run's folder, or None.
        resume: whether to resume the run in it; "auto": if there is one.

    Raises:
        UsageError: there is no run to resume, or another one is in the folder; the data can't be
            used; there is no such network; or the request differs from what the run was started
            with.
        FileError: a machine lacks the images, or has others.
    """
    opened: Opened = on_main(
        accelerator, lambda: _open(asked, out, resume, accelerator.num_processes)
    )
    _fetch_images(accelerator, asked, opened.table)
    if not opened.finished:
        _compare_images(accelerator, opened.table)
    return opened


def _open(asked: Request, out: str | Path | None, resume: Resume, world: int) -> Opened:
    model = asked.model or asked.recipe.model
    if resume == "auto":
        resume = _holds_run(out, asked.data, model)
    folder = RunFolder(choose_out(out, asked.data, model, resume))
    if not (resume and folder.exists):
        folder.refuse_others()
        plan, table = new_plan(asked, world)
        return Opened(folder.path, plan, table, {}, False, False, False)
    plan, states = resumed_plan(folder, asked, world), Checkpoints(folder.path / "state")
    table, keys = moved_table(folder.path, folder.read_plan(), asked.data, plan.root)
    folder.attach(table)
    stored = folder.read_measured()
    if "left_out" in stored:  # by the keys that the files have now
        stored["left_out"] = {keys.get(key, key): why for key, why in stored["left_out"].items()}
    if line := changed_line(table, folder.path / "splits.csv", stored.get("left_out", ())):
        table = dataclasses.replace(table, warnings=(*table.warnings, line))
    told = dict.fromkeys([*stored.get("warnings", ()), *table.warnings])  # then and now
    table = dataclasses.replace(table, warnings=tuple(told))
    if folder.finished:
        states.clear()
        log.info(f"{folder.path} is finished: nothing is left to do")
    return Opened(folder.path, plan, table, stored, True, states.any(), folder.finished)


def _holds_run(out: str | Path | None, data: str, model: str | None) -> bool:
    try:
        return RunFolder(choose_out(out, data, model, True)).exists
    except UsageError:
        return False


def _fetch_images(accelerator: Accelerator, asked: Request, table: ImageTable) -> None:
    """Downloads the images again on machines that can't see the first one's disk."""
    if accelerator.num_processes == 1:
        return
    if accelerator.is_local_main_process and table.files is not None and len(table.files):
        first = on_disk(table.files[0])
        if asked.data.startswith("hf:") and not os.path.exists(first):
            open_data(asked.data, root=asked.root)
        if not os.path.exists(first):
            # `datasets` names what it reads from a Parquet file by the file's times and inode
            copy = " (of local hf: data, the folder that `save_to_disk` writes can be copied)"
            raise FileError(
                f"{first} is not on this machine: every machine needs the images, under "
                f"the same absolute path{copy * asked.data.startswith('hf:')}"
            )
    accelerator.wait_for_everyone()


def _compare_images(accelerator: Accelerator, table: ImageTable) -> None:
    """Refuses images with other contents than the first machine's, which has hashed its own.

    Up to COMPARED of them are compared, evenly spread. Those that a machine can't read are left
    out later, by all of them.
    """
    ranks = Ranks(accelerator)
    if table.files is None or ranks.local == ranks.count:
        return
    rows, mine = spread(len(table), COMPARED), None
    if accelerator.is_local_main_process:
        mine = content_hashes(table.select(rows), Heartbeat("images compared between machines"))
    (_, first), *others = gathered(accelerator, (socket.gethostname(), mine))
    for host, theirs in others:
        if theirs is None:
            continue
        other = (theirs != first) & (theirs != UNREADABLE) & (first != UNREADABLE)
        if other.any():
            raise FileError(
                f"{int(other.sum()):,} of {plural(len(rows), 'image')} that were compared are not "
                f"the first machine's on {host}, such as {table.path(int(rows[other.argmax()]))}: "
                "every machine needs the same images"
            )
