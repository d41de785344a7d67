"""`regard train`: trains a network, tests it, and writes the report of the run."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter

from regard.called import is_told_by_another
from regard.commands.flags import (
    DeviceFlag,
    SplitsFlag,
    parse_arguments,
    require_data,
)
from regard.errors import RegardError, ToldElsewhere, UsageError
from regard.extras import EXTRAS, require
from regard.log import show_messages
from regard.training.config import Recipe, fields_of

messages: logging.Logger = logging.getLogger(__name__)

RecipeFlags: type = make_dataclass(
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
    resume_auto: Annotated[bool, Parameter(negative=())] = False,
    weights: Path | None = None,
    root: Path | None = None,
    splits: SplitsFlag = "auto",
    arg: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    log: Annotated[
        list[str] | None, Parameter(alias="--trackers", negative=(), consume_multiple=True)
    ] = None,
    device: DeviceFlag = "auto",
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> int:
    """Train a network on labeled images.

    Writes a run's folder: the network in timm's layout, the recipe, splits, metrics and
    report.html. Under `torchrun --nproc-per-node N -m regard train ...` or `accelerate launch`,
    N processes train as one run, on GPUs or CPUs.

    Parameters
    ----------
    source
        A folder of class folders (with or without train, val and test above them), a CSV file
        (path, label, split, group), digits, cifar10, cifar100, medmnist:FILE.npz,
        wds:SHARDS (tar files) or hf:NAME.
    model
        Name of one of Regard's networks (`regard models`) or timm's. Default: the recipe's.
    recipe
        Name of a recipe (`regard recipes`) or path of a TOML file. Flags override its values.
    out
        Folder of the run. Default: runs/DATA-MODEL.
    resume
        Continue the run in that folder from its last saved state.
    resume_auto
        Continue the run in that folder if there is one, else start it: for jobs that restart
        automatically (SLURM's requeue, torchrun --max-restarts). Also --resume auto.
    weights
        Start from the network of a run's folder, or from an authors' checkpoint.
    root
        Folder of cifar10 and cifar100.
    splits
        Whether the top folders of DATA are splits rather than classes.
    arg
        Argument of the network as NAME=VALUE, such as aggregation=concat; several may follow.
    log
        Experiment trackers: tensorboard, wandb, mlflow, aim, clearml, comet_ml, swanlab,
        trackio, or none. Default: tensorboard. --trackers is the same, for torchrun, which may
        take --log as its own flag.
    """
    changes = {k: v for k, v in vars(flags).items() if v is not None}
    with _told_once():
        require_data(source)
        for name in log or ():
            if name in EXTRAS:
                require(name, f"--log {name}")
        _train(
            source, model=model, recipe=recipe, out=out,
            resume="auto" if resume_auto else resume, weights=weights, root=root, splits=splits,
            model_args=parse_arguments(arg or []), trackers=log or ("tensorboard",), device=device,
            **changes,
        )  # fmt: skip
    return 0


def train(
    data: str | Path,
    *,
    model: str | None = None,
    recipe: str | Path | Recipe = "quick",
    out: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    weights: str | Path | None = None,
    root: str | Path | None = None,
    splits: str = "auto",
    model_args: Mapping[str, Any] | None = None,
    trackers: Sequence[str] = ("tensorboard",),
    device: str = "auto",
    **changes: Any,
) -> Path:
    """Trains a network on labeled images and writes a run's folder with its report.

    Progress is logged to the logger "regard", and printed where logging is not configured.

    Args:
        data: digits, a folder, a CSV file, cifar10, ...; see `regard.data.open_data`.
        model: a network's name (default: the recipe's).
        recipe: a shipped recipe's name, a TOML file, or a Recipe.
        out: the run's folder (default: runs/DATA-MODEL).
        resume: resume the run in that folder from its last saved state; "auto": if there is one,
            else start it.
        weights: a run's folder or an authors' checkpoint to start from.
        root: the folder that holds cifar10 and cifar100.
        splits: whether a folder's top folders are splits: yes, no, or auto.
        model_args: arguments of the network, which override the recipe's.
        trackers: experiment trackers: tensorboard, wandb, mlflow, ...; "none" for none.
        device: cpu, cuda, mps, xpu, or auto for this machine's accelerator.
        changes: values of the recipe's fields, which override the recipe's, such as
            pretrained="no".

    Returns:
        The run's folder.

    Raises:
        UsageError: a wrong argument, data that can't be used, or a folder that is taken.
        FileError: something can't be read or written.
        NotFiniteError: the loss or a weight became infinite or NaN; the last state is kept.
        ResourceError: memory ran out.
        Stopped: SIGINT, SIGTERM or SIGHUP; the state is saved, and `resume` goes on from it.
    """
    from regard.training.distributed import is_first_to_tell

    show_messages()
    try:
        return _train(
            data, model=model, recipe=recipe, out=out, resume=resume, weights=weights,
            root=root, splits=splits, model_args=model_args,
            trackers=trackers, device=device, **changes,
        )  # fmt: skip
    except Exception as error:
        is_first_to_tell(error)  # which ends the processes that wait for this one
        raise


def _train(data: str | Path, *, device: str, **arguments: Any) -> Path:
    """As `train`."""
    from regard.training import run
    from regard.training.distributed import is_main_process

    folder = run.train(data, device=device, **arguments)
    if is_main_process() and not (folder / "report.html").is_file():
        messages.info(f"the report: {_report(folder, device)}")
    return folder


def _report(folder: Path, device: str) -> Path:
    from regard.report.build import report_run

    return report_run(folder, device)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Has one process of a run tell what went wrong.

    Raises:
        ToldElsewhere: another one tells it.
    """
    try:
        yield
    except Exception as error:
        if "regard.training.distributed" in sys.modules:
            from regard.training.distributed import is_first_to_tell

            elsewhere = not is_first_to_tell(error)
        else:  # before anything slow was imported
            elsewhere = isinstance(error, UsageError) and is_told_by_another()
        if elsewhere:
            code = error.exit_code if isinstance(error, RegardError) else 1
            raise ToldElsewhere(code) from None
        raise
