"""The subgroups of `regard evaluate`: flags, tables and the CSV file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.cells import number_of
from regard.errors import UsageError

if TYPE_CHECKING:
    from regard.evaluation import OneClass, Predictions, Subgroups

_SHOWN = ("top1", "balanced_accuracy", "macro_f1", "roc_auc", "sensitivity", "specificity")


BandsFlag = Annotated[
    list[str] | None,
    Parameter(
        help="COLUMN=A,B,C: divide a numeric column into bands: below A, A to below B, ..., C and "
        "up.",
        consume_multiple=True,
        negative=(),
    ),
]


def parse_bands(given: Sequence[str] | None) -> dict[str, list[float]]:
    """The limits of --bands by column.

    Raises:
        UsageError: they are not COLUMN=A,B,C with increasing numbers, or name a column twice.
    """
    found: dict[str, list[float]] = {}
    for each in given or ():
        column, _, numbers = each.partition("=")
        column = column.strip().lower()
        try:
            limits = [number_of(n) for n in numbers.split(",")] if column else []
        except ValueError:
            limits = []
        if not limits:
            raise UsageError(f"--bands {each}: give COLUMN=A,B,C, such as age=40,60")
        if column in found:
            raise UsageError(f"--bands {each}: {column} has bands already; name it once")
        if limits != sorted(set(limits)) or not all(map(math.isfinite, limits)):
            raise UsageError(f"--bands {each}: give increasing limits")
        found[column] = limits
    return found


@dataclass(frozen=True)
class SubgroupFlags:
    """Which parts of the images get rows of their own."""

    subgroups: Annotated[
        list[str] | None,
        Parameter(
            help="Further columns of a CSV source, such as site sex age: the images of each value "
            "are evaluated separately.",
            consume_multiple=True,
            negative=(),
        ),
    ] = None
    bands: BandsFlag = None
    smallest: Annotated[
        int,
        Parameter(
            help="Smallest number of images (groups, where there are groups) for which a subgroup "
            "gets metrics; smaller ones are only counted."
        ),
    ] = 10
    subgroups_csv: Annotated[
        Path | None,
        Parameter(
            help="Write the subgroups to this CSV file; an earlier one of Regard's is replaced."
        ),
    ] = None

    @property
    def limits(self) -> dict[str, list[float]]:
        """The bands by column.

        Raises:
            UsageError: see `parse_bands`.
        """
        return parse_bands(self.bands)

    @property
    def columns(self) -> list[str]:
        """The columns of --subgroups, and those that only --bands names."""
        named = [name.strip().lower() for name in self.subgroups or ()]
        return list(dict.fromkeys([*named, *self.limits]))

    def check(self) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            UsageError: a value that can't be, or a file that can't be written.
        """
        parse_bands(self.bands)
        if self.smallest < 2:
            raise UsageError(f"--smallest {self.smallest}: at least 2")
        path = self.subgroups_csv
        if path is None:
            return
        if not self.columns:
            raise UsageError(f"--subgroups-csv {path}: name the columns with --subgroups")
        if path.suffix.lower() != ".csv" or path.is_dir() or not path.absolute().parent.is_dir():
            raise UsageError(f"--subgroups-csv {path}: give a .csv file in a folder that exists")
        from regard.explanations.inputs import is_ours

        if path.exists() and not is_ours(path):
            raise UsageError(
                f"--subgroups-csv {path}: exists and was not written by Regard; it is not replaced"
            )

    def check_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Checks the columns before the images are classified.

        Raises:
            UsageError: the data has no such column, or not the numbers that bands need.
        """
        from regard.evaluation.subgroups import parts_of

        for name in self.columns:
            if name not in columns:
                has = f"choose of {', '.join(columns)}" if columns else "the data has none"
                flag = "--bands" if name in self.limits else "--subgroups"
                raise UsageError(f"{flag} {name}: no further column of the data; {has}")
            parts_of(name, columns[name], self.limits.get(name))


def evaluated(
    predictions: "Predictions", flags: SubgroupFlags, one: "OneClass | None"
) -> list["Subgroups"]:
    """The subgroups that were asked for, and their CSV file.

    Raises:
        UsageError: a value is no number where bands need one.
        StateError: the file can't be written.
    """
    from regard.evaluation import evaluate_subgroups, subgroups_csv
    from regard.files import write_text

    found = [
        evaluate_subgroups(
            predictions, column, bands=flags.limits.get(column), at_least=flags.smallest,
            positive=None if one is None else one.positive,
            threshold=None if one is None else one.threshold,
        )
        for column in flags.columns
    ]  # fmt: skip
    if flags.subgroups_csv is not None:
        write_text(flags.subgroups_csv, subgroups_csv(found))
    return found


def print_subgroups(found: Sequence["Subgroups"], one: "OneClass | None") -> None:
    """Prints tables for each column, as wide as the console, with the largest gaps.

    one: the class as a test, whose decisions may be others than the most probable class.
    """
    from rich.console import Console
    from rich.text import Text

    from regard.commands.tables import DIAGNOSTIC_NAMES, NAMES

    console = Console()
    names = {m: {**DIAGNOSTIC_NAMES, **NAMES}[m].partition(" (")[0] for m in _SHOWN}
    for each in found:
        metrics = [m for m in _SHOWN if any(m in p.metrics for p in each.parts.values())]
        console.print(Text(f"By {each.column}", style="bold"))
        _print_parts(console, each, {m: names[m] for m in metrics})
        for metric in metrics:
            gap = each.gap(metric)
            if gap is not None and gap[2] > 0:
                high, low, difference = gap
                line = f"{names[metric]}: {100 * difference:.1f} points"
                console.print(Text(f"largest gap in {line}, {high} over {low}"))
        small = [name for name, part in each.parts.items() if part.too_small]
        if small:
            kind = "groups" if next(iter(each.parts.values())).n_groups is not None else "images"
            line = f"too small (fewer than {each.at_least} {kind}): {', '.join(small)}"
            console.print(Text(line))
        console.print()
    if found and one is not None and one.threshold is not None:
        line = f"sensitivity and specificity: {one.positive}, {one.decision()}; accuracy, "
        console.print(Text(f"{line}balanced accuracy and F1: the most probable class"))


def _print_parts(console: Any, found: "Subgroups", titles: dict[str, str]) -> None:
    """The parts' metrics, in as many tables as the console's width asks for."""
    unbounded = console.options.update(width=10_000)  # else it measures the console's width
    shown: dict[str, str] = {}
    for metric, title in titles.items():
        wider = {**shown, metric: title}
        width = console.measure(_parts_table(found, wider), options=unbounded).maximum
        if shown and width > console.width:
            console.print(_parts_table(found, shown))
            console.print()
            wider = {metric: title}
        shown = wider
    console.print(_parts_table(found, shown))
    console.print()


def _parts_table(found: "Subgroups", titles: dict[str, str]) -> Any:
    """A row for each part, with these metrics."""
    from rich.text import Text

    from regard.commands.tables import estimate_cells, plain_table

    table = plain_table(found.column)
    for heading in ("images", "groups"):
        table.add_column(heading, justify="right", no_wrap=True)
    for title in titles.values():
        table.add_column(title, justify="right", no_wrap=True)
        table.add_column("interval", justify="right", no_wrap=True)
    for name, part in found.parts.items():
        groups = "" if part.n_groups is None else str(part.n_groups)
        cells = [c for m in titles for c in estimate_cells(part.metrics.get(m))]
        if part.too_small:
            cells = ["too small", *cells[1:]]
        table.add_row(Text(name), str(part.n), groups, *cells)
    return table
