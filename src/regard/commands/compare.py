"""`regard compare`: finished runs on the same test images, with what is shown and what is not."""

import json as json_module
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import JsonFlag, SeedFlag, check_page
from regard.errors import UsageError
from regard.files import plural

if TYPE_CHECKING:
    from regard.evaluation.paired import MetricComparison
    from regard.studies.cost import Cost

log: logging.Logger = logging.getLogger(__name__)


def command(
    runs: Annotated[list[Path], Parameter(name="RUN", negative=())],
    /,
    *,
    metric: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    positive: str | None = None,
    resamples: int = 1000,
    seed: SeedFlag = 0,
    html: Path | None = None,
    json: JsonFlag = False,
) -> int:
    """Compare finished runs on the same test images.

    Each run's metrics are compared with the first run's: paired differences with 95 % intervals,
    p-values corrected for all comparisons (Holm), and whether a difference is shown. Each run has
    one seed, so a result holds only for these trained networks; `regard study` compares networks
    over seeds. Networks are compared as they were trained: without a temperature or threshold
    that `regard calibrate` stored, so the most probable class decides.

    Parameters
    ----------
    runs
        Folders of finished runs, at least two.
    metric
        Metrics to compare, such as top1 and roc_auc_macro. Default: all.
    positive
        The positive class of a diagnostic test, for its AUC and other metrics.
    resamples
        Bootstrap resamples of images, or of groups.
    seed
        Random seed of the bootstrap.
    html
        Write a page to this file as well.
    json
        Print JSON.
    """
    from regard.evaluation.calibration import read_calibration
    from regard.evaluation.paired import adjust
    from regard.studies.cost import measure_costs

    if len(runs) < 2:
        raise UsageError("compare needs at least two runs")
    if html is not None:
        check_page(html)
    if len({run.resolve() for run in runs}) < len(runs):
        raise UsageError("compare: the same run is given twice")
    split, predictions = _aligned(runs)
    for run in runs:
        if read_calibration(run) is not None:
            log.warning(f"{run}: compared without its stored temperature and threshold")
    costs = measure_costs(runs)
    found: list[MetricComparison] = []
    pairs: list[Path] = []
    for run, said in list(zip(runs, predictions, strict=True))[1:]:
        each = _compare(said, predictions[0], metric, positive, resamples, seed)
        found += each
        pairs += [run] * len(each)
    found = adjust(found)
    content = _content(runs, split, predictions, costs, list(zip(pairs, found, strict=True)))
    if json:
        print(json_module.dumps(content, indent=2, allow_nan=False))
    else:
        _print(content)
    if html is not None:
        from regard.studies.compare_page import write_comparison

        write_comparison(content, html)
    return 0


def _compare(
    a: Any, b: Any, metrics: list[str] | None, positive: str | None, resamples: int, seed: int
) -> "list[MetricComparison]":
    from regard.evaluation.paired import compare_metrics

    return compare_metrics(a, b, metrics=metrics, positive=positive, resamples=resamples, seed=seed)


def _aligned(runs: list[Path]) -> tuple[str, list[Any]]:
    """The split, and each run's predictions in the order of the first run's images.

    Raises:
        UsageError: a run is not finished, or the runs were tested on different images.
    """
    from regard.runs import RunFolder

    read = []
    for path in runs:
        folder = RunFolder(path)
        folder.require_finished()
        read.append(folder.read_named())
    split, first = read[0]
    for path, (other, said) in zip(runs, read, strict=True):
        if other != split:
            raise UsageError(
                f"{path} was tested on its {other} images, {runs[0]} on its {split} images"
            )
        if sorted(said.paths or []) != sorted(first.paths or []):
            mine = len(set(first.paths or []) - set(said.paths or []))
            raise UsageError(
                f"{runs[0]} and {path} were tested on different images ({mine} of "
                f"{len(first)} are missing in {path}): train both with the same data and "
                "--split-seed"
            )
    return split, [_reordered(said, first) for _, said in read]


def _reordered(said: Any, like: Any) -> Any:
    from dataclasses import replace

    import numpy as np

    if said.paths == like.paths:
        return said
    place = {path: i for i, path in enumerate(said.paths)}
    order = np.array([place[path] for path in like.paths], dtype=np.int64)
    groups = None if said.groups is None else said.groups[order]
    return replace(
        said, probabilities=said.probabilities[order], labels=said.labels[order],
        groups=groups, paths=list(like.paths),
    )  # fmt: skip


def _content(
    runs: list[Path],
    split: str,
    predictions: list[Any],
    costs: "list[Cost]",
    compared: "list[tuple[Path, MetricComparison]]",
) -> dict[str, Any]:
    first = predictions[0]
    names = _names(runs)
    return {
        "reference": str(runs[0]),
        "split": split,
        "images": len(first),
        "groups": None if first.groups is None else len(set(first.groups.tolist())),
        "runs": [
            {"run": str(run), "name": names[run], "cost": cost.to_dict()}
            for run, cost in zip(runs, costs, strict=True)
        ],
        "comparisons": [
            {
                "run": str(run), "name": names[run], **one.to_dict(),
                "sentence": one.sentence(names[run], names[runs[0]]),
            }
            for run, one in compared
        ],
    }  # fmt: skip


def _names(runs: list[Path]) -> dict[Path, str]:
    """The paths without the folders that all of them are in."""
    whole = {run: run.resolve() for run in runs}
    common = Path(os.path.commonpath([path.parent for path in whole.values()]))
    return {run: str(path.relative_to(common)) for run, path in whole.items()}


def _print(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from regard.studies.compare_page import difference_words

    groups = f" in {plural(content['groups'], 'group')}" if content["groups"] else ""
    images = plural(content["images"], f"{content['split']} image")
    print(f"{images}{groups}; against {content['reference']}")
    console = Console()
    wide = Console(width=None if console.is_terminal else 140)
    costs = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "parameters, M", "MACs, G", "ms an image", "ms a training step"):
        costs.add_column(heading, justify="left" if heading == "run" else "right")
    for run in content["runs"]:
        c = run["cost"]
        step = "" if c["ms_a_step"] is None else f"{c['ms_a_step']:.0f}"
        costs.add_row(
            run["name"], f"{c['parameters'] / 1e6:.3f}", f"{c['macs'] / 1e9:.3f}",
            f"{c['ms_an_image']:.2f}", step,
        )  # fmt: skip
    wide.print(costs)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "metric", "value", "reference", "difference (95 % interval)", "p, Holm",
                    "shown", "could have shown"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("run", "metric") else "right")
    for one in content["comparisons"]:
        table.add_row(
            one["name"], one["metric"].replace("_", " "), _number(one["a"]), _number(one["b"]),
            difference_words(one["difference"]),
            _p_value(one["adjusted"]), one["shown"], _number(one["detectable"]),
        )  # fmt: skip
    wide.print(table)
    for one in content["comparisons"]:
        if one["metric"] == "top1":
            print(one["sentence"])
    print("These are single trainings: another seed may differ by as much. See `regard study`.")


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p_value(value: float | None) -> str:
    return "< 0.001" if value is not None and value < 0.001 else _number(value, 3)
