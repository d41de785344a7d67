"""Progress of a study: which runs are under way, done or failed, and the time left."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from regard.runs import read_progress
from regard.studies.plan import PlannedRun


@dataclass
class Running:
    """A run under way.

    Attributes:
        run: the run.
        started: when it was started, in the clock's seconds.
        step, total: optimizer steps done, and of the whole run; total 0: training has not begun.
        first: step and time when it was first seen training.
        seen: when `step` was read.
    """

    run: PlannedRun
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    total: int = 0
    first: tuple[int, float] | None = None
    seen: float = 0.0

    def look(self) -> None:
        """Reads its progress file."""
        found = read_progress(self.run.progress_file)
        if found is None or found == (self.step, self.total):
            return
        self.step, self.total = found
        self.seen = time.monotonic()
        if self.first is None:
            self.first = self.step, self.seen

    @property
    def phase(self) -> str:
        """Its phase: starting, training or testing."""
        if not self.total:
            return "starting"
        return "testing" if self.step >= self.total else "training"

    def left(self, expected: float | None) -> float | None:
        """Seconds until its end: by its own speed, else from `expected`, the usual duration."""
        if self.first is not None and self.step > self.first[0]:
            pace = (self.seen - self.first[1]) / (self.step - self.first[0])
            return max(pace * (self.total - self.step) - (time.monotonic() - self.seen), 0.0)
        return None if expected is None else max(expected - (time.monotonic() - self.started), 0.0)


@dataclass
class Progress:
    """Progress of a study.

    Attributes:
        total: number of runs in this part of the study.
        jobs: runs at a time.
        waiting: runs that have not been started.
        running: runs under way.
        done: runs that are finished, including those of earlier calls.
        failed: the reason for each failed run.
        seconds: duration of each run that this call finished.
        earlier: duration of the runs that were finished before.
    """

    total: int
    jobs: int = 1
    waiting: list[PlannedRun] = field(default_factory=list)
    running: dict[PlannedRun, Running] = field(default_factory=dict)
    done: int = 0
    failed: dict[PlannedRun, str] = field(default_factory=dict)
    seconds: dict[PlannedRun, float] = field(default_factory=dict)
    earlier: dict[PlannedRun, float] = field(default_factory=dict)

    def look(self) -> None:
        """Updates the progress of the runs under way."""
        for one in self.running.values():
            one.look()

    def left(self) -> float | None:
        """Estimated seconds until the end; None if nothing was measured yet.

        A row's runs are expected to last as long as its finished ones, else as estimated from those
        under way, else as the mean of all rows.
        """
        known = self._durations()
        everywhere = [s for found in known.values() for s in found]
        mean = fmean(everywhere) if everywhere else None

        def expected(run: PlannedRun) -> float | None:
            return fmean(known[run.row]) if run.row in known else mean

        under_way = [one.left(expected(run)) for run, one in self.running.items()]
        parts = under_way + [expected(run) for run in self.waiting]
        if not parts or any(part is None for part in parts):
            return None if parts else 0.0
        longest = max((s for s in under_way if s is not None), default=0.0)
        return max(longest, sum(s for s in parts if s is not None) / self.jobs)

    def _durations(self) -> dict[str, list[float]]:
        """By row, the seconds of its finished runs, or the estimate for a run under way."""
        known: dict[str, list[float]] = {}
        for run, seconds in (self.earlier | self.seconds).items():
            known.setdefault(run.row, []).append(seconds)
        for run, one in self.running.items():
            if run.row not in known and (left := one.left(None)) is not None:
                known[run.row] = [time.monotonic() - one.started + left]
        return known


def earlier_seconds(runs: Sequence[PlannedRun]) -> dict[PlannedRun, float]:
    """Durations of finished runs, as they recorded them."""
    found = {}
    for run in runs:
        try:
            content = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
            found[run] = float(content["facts"]["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
