"""`regard evaluate`."""

import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import (
    EngineFlags,
    use_engine,
)

log = logging.getLogger(__name__)


def command(
    run: Annotated[str, Parameter(name="RUN")],
    source: Annotated[str | None, Parameter(name="DATA")] = None,
    /,
    *,
    split: str | None = None,
    weights: Path | None = None,
    root: Path | None = None,
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
    json: bool = False,
) -> int:
    """Evaluate a network on labeled images, with 95 % intervals.

    Parameters
    ----------
    run
        A run's folder, or the name of a network together with --weights.
    source
        Labeled images, as for training. Default: the run's own data and splits.
    split
        train, val, test or all. Default: test, if there is one.
    weights
        For the name of a network: a run's folder or an authors' checkpoint.
    root
        Folder of cifar10 and cifar100.
    json
        Print JSON.
    """
    from regard.commands.tables import print_evaluation
    from regard.evaluation import evaluate as measure
    from regard.runs import predictions_of

    def prepare(classifier: Any, reader: Any) -> None:
        count = len(reader.table)
        rows = range(0, count, max(1, count // 64))
        reads = [lambda i=i: classifier.preprocess.fit(reader.decode(i)) for i in rows]
        use_engine(classifier, engine, reads, count)

    unreadable: list[str] = []
    named, predictions = predictions_of(
        run, source, split=split, weights=weights, root=root, complain=unreadable.append,
        prepare=prepare,
    )  # fmt: skip
    found = measure(predictions)
    if json:
        from json import dumps

        content = {"split": named, **found.to_dict(), "unreadable": unreadable}
        print(dumps(content, indent=2, ensure_ascii=False))
    else:
        which = "all" if named == "all" else f"the {named}"
        print(f"{run} on {which} images of {source or 'its own data'}")
        print_evaluation(found)
    for line in unreadable:
        log.warning(line)
    return 1 if unreadable else 0
