"""`regard train`: trains a network, tests it, and writes the report of the run."""

import logging
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter

from regard.commands.flags import parse_arguments
from regard.training.config import Recipe, fields_of

log = logging.getLogger(__name__)

RecipeFlags = make_dataclass(
    "RecipeFlags",
    [
        (
            f.name,
            Annotated[
                get_type_hints(Recipe, include_extras=True)[f.name] | None,
                Parameter(
                    help=f.metadata["help"],
                    group=f"{f.metadata['group']} (recipe)",
                    consume_multiple=True,
                    negative_iterable=(),
                ),
            ],
            field(default=None),
        )
        for f in fields_of()
    ],
)
"""Every field of a recipe as a flag; None where it was not given."""


RecipeFlags.__module__ = __name__  # Python 3.11 says "types", which cyclopts takes for builtin


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
    arg: Annotated[list[str] | None, Parameter(negative=())] = None,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a network on labeled images.

    Writes a run's folder: the network in timm's layout, the recipe, splits, metrics and
    report.html. Starts several processes under `accelerate launch -m regard train ...` or
    torchrun.

    Parameters
    ----------
    source
        A folder of class folders (with or without train, val and test above them), a CSV file
        (path, label, split, group), digits, cifar10, cifar100, medmnist:FILE.npz or hf:NAME.
    model
        Name of a network of Regard's (`regard models`) or timm's. Default: the recipe's.
    recipe
        Name of a recipe (`regard recipes`) or path of a TOML file. Flags override its values.
    out
        Folder of the run. Default: runs/DATA-MODEL.
    resume
        Continue the run in that folder from its last saved state.
    weights
        Start from the network of a run's folder, or from an authors' checkpoint.
    pretrained
        Start from timm's pretrained weights; CBAM and SE networks are grafted onto them.
    root
        Folder of cifar10 and cifar100.
    arg
        Argument of the network as NAME=VALUE, such as aggregation=concat; repeatable.
    """
    changes = {k: v for k, v in vars(flags).items() if v is not None}
    train(
        source, model=model, recipe=recipe, out=out, resume=resume, weights=weights,
        pretrained=pretrained, root=root, model_args=parse_arguments(arg or []), echo=print,
        **changes,
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
