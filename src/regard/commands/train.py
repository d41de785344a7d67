"""`regard train`: trains a network, tests it, and writes the report of the run."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from regard.report.build import report_run
from regard.training import run


def train(data: str, **arguments: Any) -> Path:
    """Trains a network on labeled images and writes a run's folder with its report.

    Takes the arguments of `regard.training.run.train`, and raises what it raises.

    Returns:
        The run's folder.
    """
    folder = run.train(data, **arguments)
    if PartialState().is_main_process and not (folder / "report.html").is_file():
        echo = arguments.get("echo", print)
        echo(f"the report: {report_run(folder)}")
    return folder
