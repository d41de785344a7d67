"""`regard report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, PrecisionFlag
from regard.errors import UsageError


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    masks: Path | None = None,
    positive: str | None = None,
    explained: int = 48,
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
        (default: of two classes the rarer; of more, each against the rest).
    explained
        Number of images that are stored at their own resolution with all maps, as far as a page
        of 10 MB has room.
    """
    from regard.report.build import report_run

    if explained < 0:
        raise UsageError(f"--explained {explained}: at least 0")
    path = report_run(
        run, device, masks=masks, positive=positive, explained=explained, precision=precision
    )
    print(path)
    return 0
