"""`regard evaluate`."""

import logging
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from regard.commands.diagnostics import DiagnosticFlags, Study, study
from regard.commands.flags import (
    EngineFlags,
    SplitsFlag,
    naming_flags,
    require_data,
    use_engine,
)
from regard.errors import UsageError

log = logging.getLogger(__name__)


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
    numbers: Annotated[DiagnosticFlags, Parameter(name="*")] = DiagnosticFlags(),  # noqa: B008
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
    json: bool = False,
) -> int:
    """Evaluate a network on labeled images, with 95 % intervals.

    Parameters
    ----------
    run
        A run's folder, or the name of a network together with --weights.
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
    json
        Print JSON.
    """
    numbers.check()
    engine.require()
    require_data(source)
    from regard.run_data import predictions_of

    def prepare(classifier: Any, reader: Any) -> None:
        numbers.check_classes(classifier.class_names)
        count = len(reader.table)
        rows = range(0, count, max(1, count // 64))
        reads = [lambda i=i: classifier.preprocess.fit(reader.decode(i)) for i in rows]
        use_engine(classifier, engine, reads, count)

    def predict(data: str | None, which: str | None) -> tuple[str, Any, list[str]]:
        with naming_flags():
            return predictions_of(
                run, data, split=which, weights=weights, root=root, splits=splits,
                renamed=_renamed(map or []), prepare=prepare,
            )  # fmt: skip

    def validation() -> Any:
        if named in ("val", "all"):
            log.warning("threshold and temperature fit images that are also tested on")
        own = weights is None and Path(run).is_dir()
        return predict(None if own else source, "val")[1]

    named, predictions, unreadable = predict(source, split)
    _print(run, source, named, study(predictions, numbers, validation), unreadable, json)
    for line in unreadable:
        log.warning(line)
    return 1 if unreadable else 0


def _print(
    run: str, source: str | None, named: str, result: Study, unreadable: list[str], as_json: bool
) -> None:
    from regard.commands.tables import print_diagnostics, print_evaluation
    from regard.evaluation import evaluate

    found = evaluate(result.predictions)
    if as_json:
        content = {"split": named, **found.to_dict(), "diagnostics": result.content}
        print(dumps({**content, "unreadable": unreadable}, indent=2))
        return
    which = "all" if named == "all" else f"the {named}"
    print(f"{run} on {which} images of {source or 'its own data'}")
    for line in result.lines:
        print(line)
    print_evaluation(found)
    print_diagnostics(result.diagnostics)


def _renamed(pairs: list[str]) -> dict[str, str]:
    """CLASS=NAME pairs as a dictionary."""
    renamed = {}
    for pair in pairs:
        old, equals, new = pair.rpartition("=")
        if not equals or not old:
            raise UsageError(f"--map {pair}: give CLASS=NAME, or CLASS= to leave the class out")
        renamed[old] = new
    return renamed
