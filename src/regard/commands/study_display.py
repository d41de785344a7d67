"""What `regard study` shows while it trains: the runs under way, the time left, the table."""

import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regard.files import plural, signed, signed_range
from regard.log import clock

if TYPE_CHECKING:
    from regard.studies.progress import Progress, Running
    from regard.studies.results import RowResult, StudyResult

log: logging.Logger = logging.getLogger(__name__)

LINE_EVERY = 60.0  # seconds between lines where there is no terminal
FRAME_EVERY = 0.5  # seconds between frames in a terminal
_BAR = 24  # characters
_MOST = 8  # failed runs that are shown


class StudyDisplay:
    """A live display in a terminal; elsewhere a line now and then, and one for each result."""

    def __init__(self) -> None:
        self.live: Any = None
        self.result: StudyResult | None = None
        self.shown: float = 0.0
        self.said: dict[str, str] = {}

    def __enter__(self) -> "StudyDisplay":
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        if console.is_terminal:
            self.live = Live(console=console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def results(self, result: "StudyResult") -> None:
        """Takes the results so far; without a terminal the rows that changed are written."""
        before, self.result = self.result, result
        for row in result.rows:
            line = f"{row.row.name}: {len(row.seeds)} of {plural(result.seeds, 'seed')}"
            line += f", accuracy {accuracy(row)}" if row.seeds else ""
            line += f", difference {difference(row)} points" if difference(row) else ""
            if row.seeds and self.live is None and self.said.get(row.row.name) != line:
                if before is not None:
                    log.info(line)
                self.said[row.row.name] = line

    def show(self, progress: "Progress", now: bool = False) -> None:
        """Draws the display, or writes a line; not more often than it is worth."""
        every = LINE_EVERY if self.live is None else FRAME_EVERY
        if not now and time.monotonic() - self.shown < every:
            return
        self.shown = time.monotonic()
        if self.live is None:
            log.info("; ".join([summary(progress), *map(_words, progress.running.values())]))
        else:
            self.live.update(self._frame(progress), refresh=True)

    def _frame(self, progress: "Progress") -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(summary(progress), style="bold")]
        runs = Table(box=None, pad_edge=False, show_header=False)
        for one in progress.running.values():
            runs.add_row(Text(f"{one.run.row}, {one.run.folder.name}"), *_bar(one))
        if progress.running:
            parts.append(runs)
        failed = list(progress.failed.items())
        for run, why in failed[-_MOST:]:
            parts.append(Text(f"failed: {run.row}, {run.folder.name}: {why}", style="red"))
        if len(failed) > _MOST:
            parts.append(Text(f"and {len(failed) - _MOST} more failed"))
        if self.result is not None:
            parts += ["", results_table(self.result)]
        return Group(*parts)


def summary(progress: "Progress") -> str:
    """Such as "2 of 6 runs done, 1 failed, 1 running; about 12 min left"."""
    line = f"{progress.done} of {plural(progress.total, 'run')} done"
    line += f", {len(progress.failed)} failed" if progress.failed else ""
    line += f", {len(progress.running)} running" if progress.running else ""
    left = progress.left()
    return line + (f"; about {clock(left)} left" if left else "")


def _words(one: "Running") -> str:
    share = f" {one.step:,}/{one.total:,} steps" if one.phase == "training" else ""
    return f"{one.run.row}, {one.run.folder.name}: {one.phase}{share}"


def _bar(one: "Running") -> tuple[Any, str]:
    """A bar and the words after it."""
    from rich.progress_bar import ProgressBar

    left = one.left(None)
    words = one.phase
    if one.phase == "training":
        words = f"step {one.step:,}/{one.total:,}"
        words += f", {clock(left)} left" if left is not None else ""
    return ProgressBar(total=max(one.total, 1), completed=one.step, width=_BAR), words


def results_table(result: "StudyResult") -> Any:
    """The table as it has grown so far."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("network", "seeds", "accuracy", "difference, points", "faithfulness"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in result.rows:
        table.add_row(
            Text(row.row.name), f"{len(row.seeds)}/{result.seeds}",
            accuracy(row) if row.seeds else "", difference(row), faithfulness(row),
        )  # fmt: skip
    return table


def accuracy(row: "RowResult") -> str:
    """Mean and deviation over seeds, in percent."""
    mean = f"{100 * row.mean('accuracy'):.2f}"
    return mean + (f" ± {100 * row.sd('accuracy'):.2f} %" if len(row.seeds) > 1 else " %")


def difference(row: "RowResult") -> str:
    """To the first row with its interval, in points; empty for the first row."""
    d = row.differences.get("accuracy")
    if not d:
        return ""
    value, low, high = signed_range(100 * d.value, 100 * d.low, 100 * d.high, 1)
    return f"{value} ({low} to {high})"


def faithfulness(row: "RowResult") -> str:
    """Of the network's attention, mean and deviation over seeds."""
    values = row.faithfulness.get("attention", [])
    if not values:
        return "–" if row.seeds else ""
    mean = signed(row.mean("attention"), 3)
    return mean + (f" ± {row.sd('attention'):.3f}" if len(values) > 1 else "")
