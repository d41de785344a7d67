"""`regard evaluate`."""

import logging
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from regard.commands.diagnostics import DiagnosticFlags, Study, study
from regard.commands.flags import (
    DeviceFlag,
    EngineFlags,
    SplitsFlag,
    naming_flags,
    require_data,
    use_engine,
)
from regard.commands.subgroups import SubgroupFlags, evaluated, print_subgroups
from regard.errors import UsageError

if TYPE_CHECKING:
    from regard.evaluation import Subgroups

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFlags:
    """What the network is given, where that differs from its own preprocessing."""

    size: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help="Input size in pixels: one number, or height and width. Default: the network's.",
            consume_multiple=True,
            negative_iterable=(),
            validator=Number(gte=4, lte=8192),
        ),
    ] = None
    ten_crop: Annotated[
        bool,
        Parameter(
            help="Average the probabilities of ten crops: the corners and the center, and their "
            "flips.",
            negative=(),
        ),
    ] = False

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """--size as two numbers.

        Raises:
            UsageError: it is more than two.
        """
        if self.size is None:
            return None
        if len(self.size) > 2:
            given = " ".join(map(str, self.size))
            raise UsageError(f"--size {given}: give one number, or height and width")
        return self.size[0], self.size[-1]


def command(
    run: Annotated[str, Parameter(name="RUN")],
    source: Annotated[str | None, Parameter(name="DATA")] = None,
    /,
    *,
    split: str | None = None,
    splits: SplitsFlag = "auto",
    map: Annotated[list[str] | None, Parameter(negative=())] = None,
    weights: Path | None = None,
    root: Path | None = None,
    predictions: Path | None = None,
    input: Annotated[InputFlags, Parameter(name="*")] = InputFlags(),
    numbers: Annotated[DiagnosticFlags, Parameter(name="*")] = DiagnosticFlags(),  # noqa: B008
    device: DeviceFlag = "auto",
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
    parts: Annotated[SubgroupFlags, Parameter(name="*")] = SubgroupFlags(),  # noqa: B008
    json: bool = False,
) -> int:
    """Evaluate a network on labeled images, with 95 % intervals.

    Parameters
    ----------
    run
        A run's folder, the name of weights that come with Regard, or the name of a network
        together with --weights.
    source
        Labeled images, as for training. Default: the run's own data and splits. Images that the
        run was trained on are recognized by their content.
    split
        train, val, test or all. Default: test, else val, else all; from other data without the
        images that the run was trained on.
    splits
        Whether the top folders of DATA are splits rather than classes.
    map
        CLASS=NAME: the network's name of a class of DATA; CLASS= leaves its images out. May be
        repeated. Images of classes that the network does not know are left out, too.
    weights
        For the name of a network: a run's folder or an authors' checkpoint.
    root
        Folder of cifar10 and cifar100.
    predictions
        Write the probabilities of each image to this new .npz file, as predictions.npz of a run.
    json
        Print JSON.
    """
    numbers.check()
    parts.check()
    engine.require()
    require_data(source)
    size = input.height_and_width
    _check_output(predictions)
    from regard.calibrating import validation_predictions
    from regard.models.io import find_folder
    from regard.run_data import predictions_of
    from regard.runs import write_predictions

    tested: dict[str, Any] = {}

    def prepare(classifier: Any, reader: Any) -> None:
        numbers.check_classes(classifier.class_names)
        parts.check_columns(list(reader.table.columns))
        tested["stored"], classifier.calibration = classifier.calibration, None
        tested.update(size=list(classifier.preprocess.size), ten_crop=input.ten_crop)
        count = len(reader.table)
        rows = range(0, count, max(1, count // 64))
        reads = [lambda i=i: classifier.preprocess.fit(reader.decode(i)) for i in rows]
        use_engine(classifier, engine, reads, count)

    def predict(data: str | None, which: str | None) -> tuple[str, Any, list[str]]:
        with naming_flags():
            return predictions_of(
                run, data, split=which, weights=weights, root=root, splits=splits,
                renamed=_renamed(map or []), size=size, ten_crop=input.ten_crop, device=device,
                prepare=prepare,
            )  # fmt: skip

    def validation() -> Any:
        if named in ("val", "all"):
            log.warning("threshold and temperature fit images that are also tested on")
        folder = find_folder(run) if weights is None else None
        own = folder is not None
        if folder is not None and size is None and not input.ten_crop:
            return validation_predictions(folder, root=root)
        return predict(None if own else source, "val")[1]

    named, found, unreadable = predict(source, split)
    stored = tested.pop("stored")
    if stored is not None and numbers.calibrate is None and named == "val" and source is None:
        log.warning("the stored temperature and threshold fit the images that are tested on")
    if predictions is not None:
        write_predictions(predictions, named, found)
    if not json:
        print(_heading(run, source, named, size, tested))
    result = study(found, numbers, validation, stored)
    columns = evaluated(result.predictions, parts, result.diagnostics.one_class)
    _print(result, columns, {"split": named, **tested}, unreadable, json)
    for line in unreadable:
        log.warning(line)
    return 1 if unreadable else 0


def _check_output(path: Path | None) -> None:
    """Refuses a file that is there, before the network is loaded.

    Raises:
        UsageError: it is there, or its folder is not.
    """
    if path is None:
        return
    if path.suffix != ".npz":
        raise UsageError(f"--predictions {path}: give the name of an .npz file")
    if path.exists() or path.is_symlink():
        raise UsageError(f"--predictions {path}: is there already")
    if not path.parent.is_dir():
        raise UsageError(f"--predictions {path}: its folder does not exist")


def _heading(
    run: str, source: str | None, named: str, size: tuple[int, int] | None, tested: dict[str, Any]
) -> str:
    """What was tested, on what, and how where it is not as the network was trained."""
    which = "all" if named == "all" else f"the {named}"
    line = f"{run} on {which} images of {source or 'its own data'}"
    if size is not None:
        line += " at {}x{}".format(*tested["size"])
    return line + (", the mean of ten crops" if tested["ten_crop"] else "")


def _print(
    result: Study,
    columns: "list[Subgroups]",
    tested: dict[str, Any],
    unreadable: list[str],
    as_json: bool,
) -> None:
    from regard.commands.tables import print_diagnostics, print_evaluation
    from regard.evaluation import evaluate

    found = evaluate(result.predictions)
    if as_json:
        content = {**tested, **found.to_dict(), "diagnostics": result.content}
        content["subgroups"] = [each.to_dict() for each in columns]
        print(dumps({**content, "unreadable": unreadable}, indent=2))
        return
    for line in result.lines:
        print(line)
    print_evaluation(found)
    print_diagnostics(result.diagnostics)
    print_subgroups(columns)


def _renamed(pairs: list[str]) -> dict[str, str]:
    """CLASS=NAME pairs as a dictionary."""
    renamed = {}
    for pair in pairs:
        old, equals, new = pair.rpartition("=")
        if not equals or not old:
            raise UsageError(f"--map {pair}: give CLASS=NAME, or CLASS= to leave the class out")
        renamed[old] = new
    return renamed
