"""`regard train`: trains a network, tests it, and writes the report of the run."""

import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import (
    RecipeFlags,
)

log = logging.getLogger(__name__)


def command(
    source: Annotated[str, Parameter(name="DATA")],
    /,
    *,
    model: str | None = None,
    recipe: str = "quick",
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    weights: Path | None = None,
    pretrained: Annotated[bool, Parameter(negative=())] = False,
    root: Path | None = None,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a network on labeled images.

    Writes a run's folder: the network (timm loads it), recipe, splits, metrics, report.html.
    Under `accelerate launch -m regard train ...` or torchrun it runs in many processes.

    Parameters
    ----------
    source
        digits, a folder of class folders (with train, val, test or without), a CSV file
        (path, label, split, group), cifar10, cifar100, medmnist:FILE.npz or hf:NAME.
    model
        A network's name, see `regard models`, or any of timm's; without: the recipe's.
    recipe
        A name, see `regard recipes`, or a TOML file; the flags below go on top.
    out
        The run's folder; without: runs/DATA-MODEL.
    resume
        Go on with the run in that folder from its last saved state.
    weights
        Start from the network of another run's folder, or from an authors' checkpoint.
    pretrained
        Start from timm's pretrained weights; for CBAM and SE the plain network's, grafted.
    root
        Where cifar10 and cifar100 are kept.
    """
    changes = {k: v for k, v in vars(flags).items() if v is not None}
    train(
        source, model=model, recipe=recipe, out=out, resume=resume, weights=weights,
        pretrained=pretrained, root=root, echo=print, **changes,
    )  # fmt: skip
    return 0


def train(data: str, **arguments: Any) -> Path:
    """Trains a network on labeled images and writes a run's folder with its report.

    Takes the arguments of `regard.training.run.train`, and raises what it raises.

    Returns:
        The run's folder.
    """
    from accelerate import PartialState

    from regard.report.build import report_run
    from regard.training import run

    folder = run.train(data, **arguments)
    if PartialState().is_main_process and not (folder / "report.html").is_file():
        echo = arguments.get("echo", print)
        echo(f"the report: {report_run(folder)}")
    return folder
