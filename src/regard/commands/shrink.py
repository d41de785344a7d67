"""`regard shrink`: smaller copies of a data set's images, which training reads faster."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from regard.commands.flags import SplitsFlag, progress_bar, require_data
from regard.commands.signals import Signaled, signals_raise
from regard.files import plural

if TYPE_CHECKING:
    from regard.data.shrink import Shrunk

log: logging.Logger = logging.getLogger(__name__)


def command(
    source: Annotated[str, Parameter(name="DATA")],
    out: Path,
    /,
    *,
    side: int = 256,
    quality: int = 90,
    test_too: Annotated[bool, Parameter(negative=())] = False,
    workers: int | None = None,
    splits: SplitsFlag = "auto",
    root: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Copy a data set with its images made smaller, which training reads faster.

    The copies have the names, labels, splits and groups of the originals. Choose a side somewhat
    above the --size that you train at: 256 for 224.

    Parameters
    ----------
    source
        A folder of class folders, a CSV file, or any other DATA that train takes.
    out
        A new folder. For a folder of class folders it has the same layout; for other data it
        holds the images and an images.csv.
    side
        Pixels of the shorter side; images that are smaller are copied as they are.
    quality
        Quality of JPEG, WebP and AVIF files, 1 to 100.
    test_too
        Make the test images of DATA smaller too. Default: they are copied unchanged.
    workers
        Threads. Default: one per core.
    splits
        Whether the top folders of DATA are splits rather than classes.
    root
        Folder of cifar10 and cifar100.
    resume
        Continue where the same command was stopped.
    """
    require_data(source)
    from regard.data import open_data
    from regard.data.shrink import shrink

    done = 0

    try:
        with signals_raise():
            table = open_data(source, root=root, splits=splits)
            for line in table.warnings:
                log.warning(line)
            with progress_bar("making copies") as shown:

                def progress(now: int, total: int) -> None:
                    nonlocal done
                    done = now
                    shown(now, total)

                made = shrink(
                    table, out, side=side, quality=quality, test_too=test_too, workers=workers,
                    resume=resume, progress=progress,
                )  # fmt: skip
    except Signaled as stopped:
        log.warning(
            f"stopped after {plural(done, 'image')}: continue with the same command and --resume"
        )
        return 128 + stopped.number
    _print(made, whole_test=not test_too and bool((table.splits == "test").any()))
    reading = "" if splits == "auto" or not made.data.is_dir() else f" --splits {splits}"
    print(f"next: regard train {made.data}{reading}")
    return 1 if made.unreadable else 0


def _print(made: "Shrunk", *, whole_test: bool) -> None:
    for path, fault in made.unreadable:
        log.warning(fault if fault.startswith(path) else f"{path}: {fault}")
    parts = [f"{made.smaller:,} made smaller", f"{made.copied:,} copied as they are"]
    if made.earlier:
        parts.append(f"{made.earlier:,} made earlier")
    if made.unreadable:
        parts.append(f"{len(made.unreadable):,} can't be read, and are copied as they are")
    print(f"{', '.join(parts)}; {made.size / 1e6:,.1f} MB")
    if whole_test:
        print("test images are unchanged, so that accuracy is measured on the originals")
