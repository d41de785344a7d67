"""`regard evaluate`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from regard.commands.diagnostics import DiagnosticFlags, Study, study
from regard.commands.flags import (
    DeviceFlag,
    EngineFlags,
    JsonFlag,
    SizeFlag,
    SplitsFlag,
    TtaFlag,
    height_and_width,
    leading_networks,
    require_data,
    use_engine,
)
from regard.commands.subgroups import SubgroupFlags, evaluated, print_subgroups
from regard.errors import UsageError
from regard.files import plural

if TYPE_CHECKING:
    from regard.evaluation import Calibration, Predictions, Subgroups

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputFlags:
    """What the network is given, where that differs from its own preprocessing."""

    size: SizeFlag = None
    crop_pct: Annotated[
        float | None,
        Parameter(
            help="Fraction of the shorter side that the center crop keeps. Default: the network's.",
            validator=Number(gte=0.1, lte=1),
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


def command(
    run: Annotated[str, Parameter(name="RUN")],
    /,
    *more: Annotated[str, Parameter(name="[RUN...] [DATA]", allow_leading_hyphen=False)],
    split: str | None = None,
    splits: SplitsFlag = "auto",
    map: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    weights: Path | None = None,
    root: Path | None = None,
    predictions: Path | None = None,
    tta: TtaFlag = None,
    input: Annotated[InputFlags, Parameter(name="*")] = InputFlags(),
    numbers: Annotated[DiagnosticFlags, Parameter(name="*")] = DiagnosticFlags(),  # noqa: B008
    device: DeviceFlag = "auto",
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
    parts: Annotated[SubgroupFlags, Parameter(name="*")] = SubgroupFlags(),  # noqa: B008
    json: JsonFlag = False,
) -> int:
    """Evaluate a network on labeled images, with 95 % intervals.

    Parameters
    ----------
    run
        A run's folder, the name of weights that come with Regard, or the name of a network
        together with --weights.
    more
        Further runs make an ensemble: the mean of the networks' probabilities, with
        their spread; an image is predicted by the members that were not trained on it, as in
        cross-validation. Last, labeled images, as for training. Default: the run's own data and
        splits. Images that the run was trained on are recognized by their content.
    split
        train, val, test or all. Default: test, else val, else all; from other data without the
        images that the run was trained on and others of their groups (patients).
    splits
        Whether the top folders of DATA are splits rather than classes.
    map
        CLASS=NAME: the network's name for a class of DATA; CLASS= leaves its images out.
        Several may follow. Images of classes that the network does not know are left out too.
    weights
        Weights for a network given by name: a run's folder or an authors' checkpoint.
    root
        Folder of cifar10 and cifar100.
    predictions
        Write the probabilities of each image, of which the metrics are made (with the stored
        temperature, if there is one), to this new .npz file, like a run's predictions.npz.
    json
        Print JSON.
    """
    runs, source = _runs_and_data(run, more)
    numbers.check()
    if len(runs) > 1 and (numbers.at or numbers.calibrate or weights):
        raise UsageError("several runs: --at, --calibrate and --weights work with one run only")
    if tta is not None and input.ten_crop:
        raise UsageError(f"--ten-crop and --tta {tta}: ten crops are mirrored already; give one")
    parts.check()
    engine.require()
    require_data(source)
    _check_output(predictions)
    images = {
        "weights": weights, "root": root, "splits": splits, "renamed": _renamed(map or []),
        "device": device, "size": height_and_width(input.size), "crop_pct": input.crop_pct,
        "ten_crop": input.ten_crop, "flips": tta == "flips",
    }  # fmt: skip
    test = _Test(runs, source, split, images, numbers, parts, engine)
    test.run()
    how = {**test.how, "ten_crop": input.ten_crop, "tta": tta}
    if not json:
        print(_heading(" + ".join(runs), source, test.split, input, how))
    result = study(test.found, numbers, test.validation, test.calibration)
    if predictions is not None:
        from regard.runs import write_predictions

        write_predictions(predictions, test.split, result.predictions)
    columns = evaluated(result.predictions, parts, result.diagnostics.one_class)
    _print(result, columns, {"split": test.split, **how}, test.unreadable, json)
    for line in test.unreadable:
        log.warning(line)
    return 1 if test.unreadable else 0


@dataclass
class _Test:
    """A test of one network, or of several as an ensemble.

    Args:
        runs: the networks.
        source: the images; None: each run's own.
        asked: the split asked for.
        images: how they are read and given to the network, as for `predictions_of`.
        numbers: what is calculated from the predictions.
        parts: columns whose values are parts of the test.
        engine: runs the network.

    Attributes:
        split: that was tested.
        found: the predictions, of an ensemble their mean.
        unreadable: a line for each image that can't be read.
        calibration: stored in the run that is tested alone; its predictions are without it.
        how: the size, the crop, and an ensemble's members, for the JSON.
    """

    runs: list[str]
    source: str | None
    asked: str | None
    images: dict[str, Any]
    numbers: DiagnosticFlags
    parts: SubgroupFlags
    engine: EngineFlags

    split: str = field(init=False)
    found: "Predictions" = field(init=False)
    unreadable: list[str] = field(init=False)
    calibration: "Calibration | None" = None
    how: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Tests the networks, one after the other."""
        alone = len(self.runs) == 1
        each = [
            self._predict(
                run, self.source, self.asked, self._prepare_alone if alone else self._prepare,
                calibrated=self.numbers.calibrate is None,
            )
            for run in self.runs
        ]  # fmt: skip
        self.split, self.found, self.unreadable = (
            each[0] if alone else _averaged(each, self.runs, self.source, self.how)
        )
        stored = self.calibration is not None and self.numbers.calibrate is None
        if stored and self.split == "val" and self.source is None:
            log.warning(
                "the stored temperature and threshold were fitted on the images tested here"
            )

    def validation(self) -> "Predictions":
        """Predictions for the validation images of the only network, which choose a threshold."""
        from regard.calibrating import validation_predictions
        from regard.models.io import find_folder

        if self.split in ("val", "all"):
            log.warning("threshold and temperature are fitted on images that are also tested")
        (run,) = self.runs
        folder = find_folder(run) if self.images["weights"] is None else None
        if folder is not None and not any(
            self.images[name] for name in ("size", "crop_pct", "ten_crop", "flips")
        ):
            return validation_predictions(folder, root=self.images["root"])
        source = self.source if folder is None else None
        return self._predict(run, source, "val", self._prepare, calibrated=False)[1]

    def _predict(
        self, run: str, source: str | None, split: str | None, prepare: Any, *, calibrated: bool
    ) -> "tuple[str, Predictions, list[str]]":
        from regard.run_data import predictions_of

        return predictions_of(
            run, source, split=split, prepare=prepare, calibrated=calibrated, **self.images
        )

    def _prepare_alone(self, classifier: Any, reader: Any) -> None:
        """Takes the calibration from the network, as its predictions are scaled afterwards."""
        self.calibration, classifier.calibration = classifier.calibration, None
        self._prepare(classifier, reader)

    def _prepare(self, classifier: Any, reader: Any) -> None:
        self.numbers.check_classes(classifier.class_names)
        self.parts.check_columns(reader.table.columns)
        preprocess = classifier.preprocess
        self.how.update(size=list(preprocess.size), crop_pct=preprocess.crop_pct)
        count = len(reader.table)
        rows = range(0, count, max(1, count // 64))
        reads = [lambda i=i: preprocess.fit(reader.decode(i)) for i in rows]
        use_engine(classifier, self.engine, reads, count)


def _runs_and_data(run: str, more: Sequence[str]) -> tuple[list[str], str | None]:
    """The networks, and the data behind them if there is any.

    Raises:
        UsageError: more than one DATA, or a run named twice.
    """
    count = leading_networks(more)
    runs, rest = [run, *more[:count]], more[count:]
    if len(rest) > 1:
        raise UsageError(f"{rest[1]}: give the runs, and then one DATA")
    if count == 0:
        return runs, rest[0] if rest else None
    from regard.models.io import network_folder

    resolved = [network_folder(each).resolve() for each in runs]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UsageError(f"{runs[i]} is named twice")
    return runs, rest[0] if rest else None


def _averaged(
    each: "Sequence[tuple[str, Predictions, list[str]]]",
    runs: list[str],
    source: str | None,
    tested: dict[str, Any],
) -> "tuple[str, Predictions, list[str]]":
    """The ensemble's split, predictions and unreadable images; `tested` gets its spread."""
    from regard.evaluation import average
    from regard.models.io import network_folder
    from regard.run_data import with_common_paths

    found = [predictions for _, predictions, _ in each]
    if source is None:
        found = with_common_paths([network_folder(run) for run in runs], found)
    averaged = average(found, runs)
    tested["ensemble"] = averaged.to_dict()
    named = "/".join(dict.fromkeys(name for name, _, _ in each))
    unreadable = list(dict.fromkeys(line for _, _, lines in each for line in lines))
    return named, averaged.predictions, unreadable


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
        raise UsageError(f"--predictions {path}: already exists")
    if not path.parent.is_dir():
        raise UsageError(f"--predictions {path}: its folder does not exist")


def _heading(
    run: str, source: str | None, named: str, given: InputFlags, tested: dict[str, Any]
) -> str:
    """What was tested, on what, and how where it is not as the network was trained."""
    which = "all" if named == "all" else f"the {named}"
    line = f"{run} on {which} images of {source or 'its own data'}"
    if given.size is not None:
        line += " at {}x{}".format(*tested["size"])
    if given.crop_pct is not None:
        line += f", of which the center crop keeps {tested['crop_pct']:g} of the shorter side"
    line += ", the mean of ten crops" if tested["ten_crop"] else ""
    line += ", the mean of each image and its mirror image" if tested["tta"] else ""
    return line + _spread(tested.get("ensemble"))


def _spread(ensemble: dict[str, Any] | None) -> str:
    """The members of an ensemble, and how far they differ."""
    if ensemble is None:
        return ""
    lines = [
        f"{member['run']}: accuracy {member['top1']:.2%} on {plural(member['images'], 'image')}"
        for member in ensemble["members"]
    ]
    lines += [
        f"{plural(n, 'image')} predicted by {k} of {len(ensemble['members'])} networks, without "
        "those that were trained on them"
        for k, n in ensemble["members_per_image"].items()
        if int(k) < len(ensemble["members"])
    ]
    if ensemble["disagreement"] is not None:
        lines.append(
            f"the networks differ in the top-1 class of {ensemble['disagreement']:.2%} of the "
            f"images; standard deviation of the true class's probability {ensemble['sd']:.4f}"
        )
    return "".join(f"\n{line}" for line in lines)


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
    print_subgroups(columns, result.diagnostics.one_class)


def _renamed(pairs: list[str]) -> dict[str, str]:
    """CLASS=NAME pairs as a dictionary.

    Raises:
        UsageError: a pair is none, or a class has two names.
    """
    renamed: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.rpartition("=")
        if not equals or not old:
            raise UsageError(
                f"--map {pair}: give CLASS=NAME, or CLASS= to leave the class out; DATA goes before"
            )
        if renamed.setdefault(old, new) != new:
            raise UsageError(f"--map {pair}: {old} has another name already; name each class once")
    return renamed
