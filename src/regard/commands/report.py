"""`regard report`."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

log = logging.getLogger(__name__)


def command(run: Annotated[Path, Parameter(name="RUN")], /) -> int:
    """Write a run's report.html again.

    Parameters
    ----------
    run
        A run's folder.
    """
    from regard.report.build import report_run

    print(report_run(run))
    return 0
