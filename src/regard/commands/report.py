"""`regard report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, PrecisionFlag
from regard.commands.subgroups import BandsFlag, parse_bands
from regard.errors import UsageError


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    masks: Path | None = None,
    positive: str | None = None,
    bands: BandsFlag = None,
    explained: int = 48,
    methods: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = "fp32",
) -> int:
    """Write the report.html of a finished run again.

    Parameters
    ----------
    run
        Folder of the run.
    masks
        Masks to outline in the images: a CSV file (path, x0, y0, x1, y1 in pixels) or a folder
        of mask images.
    positive
        Class of the ROC, precision-recall and decision curves and of the diagnostic numbers
        (default: the rarer of two classes; with more classes, each against the rest).
    explained
        Number of images that are stored at their own resolution with all maps, as far as a page
        of 10 MB has room.
    methods
        Also write the methods paragraph and the checklists (CLAIM, STARD-AI, TRIPOD+AI) to this
        .md or .txt file.
    overwrite
        Replace a file of --methods that Regard did not write.
    """
    limits = parse_bands(bands)
    if explained < 0:
        raise UsageError(f"--explained {explained}: at least 0")
    if overwrite and methods is None:
        raise UsageError("--overwrite: only with --methods")
    if methods is not None:
        _check_output(methods, overwrite)
    from regard.report.build import report_run

    page = report_run(
        run, device, masks=masks, positive=positive, bands=limits, explained=explained,
        methods=methods, precision=precision,
    )  # fmt: skip
    print(page)
    if methods is not None:
        print(methods)
    return 0


def _check_output(path: Path, overwrite: bool) -> None:
    """Checks the file of --methods before anything is computed.

    Raises:
        UsageError: its suffix, its folder, or a file that Regard did not write.
    """
    from regard.explanations.inputs import refuse_to_replace

    if path.suffix.lower() not in (".md", ".txt"):
        raise UsageError(f"--methods {path}: give the name of a .md or .txt file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--methods {path}: its folder does not exist")
    refuse_to_replace([path], [], overwrite=overwrite)
