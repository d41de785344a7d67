"""Where a study stands: what runs, what is done, what failed, and how long the rest will take."""

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
        run: which.
        started: when, in the clock's seconds.
        step, total: optimizer steps done, and of the whole run; total 0: it has not begun to train.
        first: the step and the time at which it was first seen to train.
        seen: when `step` was read.
    """

    run: PlannedRun
    started: float = field(default_factory=time.monotonic)
    step: int = 0
    total: int = 0
    first: tuple[int, float] | None = None
    seen: float = 0.0

    def look(self) -> None:
        """Reads how far it is."""
        found = read_progress(self.run.progress_file)
        if found is None or found == (self.step, self.total):
            return
        self.step, self.total = found
        self.seen = time.monotonic()
        if self.first is None:
            self.first = self.step, self.seen

    @property
    def phase(self) -> str:
        """What it does, in a word: starts, trains or tests."""
        if not self.total:
            return "starting"
        return "testing" if self.step >= self.total else "training"

    def left(self, expected: float | None) -> float | None:
        """Seconds until its end: by its own speed, else by how long such runs take."""
        if self.first is not None and self.step > self.first[0]:
            pace = (self.seen - self.first[1]) / (self.step - self.first[0])
            return max(pace * (self.total - self.step) - (time.monotonic() - self.seen), 0.0)
        return None if expected is None else max(expected - (time.monotonic() - self.started), 0.0)


@dataclass
class Progress:
    """Where a study stands.

    Attributes:
        total: runs of this part of the study.
        jobs: runs at a time.
        waiting: runs that have not been started.
        running: runs under way.
        done: runs that are finished, also those of earlier calls.
        failed: why each failed run did.
        seconds: how long each run took that was finished by this call.
        earlier: how long those took that were finished before.
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
        """Reads how far the runs under way are."""
        for one in self.running.values():
            one.look()

    def left(self) -> float | None:
        """Estimated seconds until the end; None where nothing was measured yet.

        A row's runs are taken to last as long as its finished ones, else as those under way say,
        else as the mean of all rows.
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
        """By row, the seconds of its finished runs, or what those under way will take."""
        known: dict[str, list[float]] = {}
        for run, seconds in (self.earlier | self.seconds).items():
            known.setdefault(run.row, []).append(seconds)
        for run, one in self.running.items():
            if run.row not in known and (left := one.left(None)) is not None:
                known[run.row] = [time.monotonic() - one.started + left]
        return known


def earlier_seconds(runs: Sequence[PlannedRun]) -> dict[PlannedRun, float]:
    """How long finished runs trained, as they measured it."""
    found = {}
    for run in runs:
        try:
            content = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
            found[run] = float(content["facts"]["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
