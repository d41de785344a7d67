"""`regard report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag


def command(run: Annotated[Path, Parameter(name="RUN")], /, *, device: DeviceFlag = "auto") -> int:
    """Write the report.html of a finished run again.

    Parameters
    ----------
    run
        Folder of the run.
    """
    from regard.report.build import report_run

    print(report_run(run, device))
    return 0
