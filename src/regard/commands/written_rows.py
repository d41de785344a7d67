"""Whether the rows of a CSV file that `predict --resume` continues are those of this call.

Each row's decision is compared with the threshold, and some of the images are predicted again:
evenly spread ones, and those whose probability another temperature would move most.
"""

import heapq
import math
import re
from typing import TYPE_CHECKING

from regard.errors import UsageError

if TYPE_CHECKING:
    from regard.commands.predictions_csv import PredictionsCsv
    from regard.predict import Prediction

_SENSITIVE, _SPREAD = 4, 8  # images that are predicted again, at most, and the last one
_ROUNDED = re.compile(r"[01]\.\d{6}")  # a probability in files of Regard 0.1
_DISTANCE = 0.01  # relative difference of an image's distance by two engines in fp32
_SLOPE = 0.1  # relative difference of the log-odds, in bf16


class WrittenRows:
    """The rows that are there: `add` takes them one by one, then `check` predicts some again.

    Args:
        table: the file; its columns are this call's.
    """

    def __init__(self, table: "PredictionsCsv") -> None:
        self.table: PredictionsCsv = table
        self._own = len(table.columns) - 1 - len(table.classifier.class_names)  # where p_CLASS are
        self._ranked = range(2, 2 * table.top + 1, 2)  # the columns probability1, ...
        self._threshold = self._decisions()
        self._sensitive: list[tuple[float, int, list[str]]] = []  # a heap
        self._spread: dict[int, list[str]] = {}
        self._last: dict[int, list[str]] = {}
        self._step = 1

    def _decisions(self) -> tuple[int, float, str, str] | None:
        """The positive class's column, the threshold, and the decisions from there up and below."""
        stored = self.table.classifier.calibration
        if stored is None or stored.threshold is None:
            return None
        names, positive = self.table.classifier.class_names, stored.threshold.positive
        at = self._own + len(names) - 1 - names[::-1].index(positive)
        below = stored.decide({**dict.fromkeys(names, 0.0), positive: -math.inf})
        return at, stored.threshold.value, positive, str(below)

    def add(self, number: int, row: list[str]) -> None:
        """Takes the row of one image, which are numbered from 1.

        Raises:
            UsageError: its decision is of another threshold.
        """
        if row[-1] or row[0] == "-":  # no answer, or no file
            return
        if self._threshold is not None:
            at, limit, positive, below = self._threshold
            share, written = _number(row[at]), row[self.table.columns.index("decision")]
            decision = positive if share >= limit else below
            if written != decision and not abs(share - limit) <= _rounding(row[at], limit):
                raise self._refusal(row, f"decided as {written}, which is {decision} now")
        self._last = {number: row}
        p = _number(row[2])
        moves = p * (1 - p) * abs(math.log(p / (1 - p))) if 0 < p < 1 else 0.0
        put = heapq.heappush if len(self._sensitive) < _SENSITIVE else heapq.heappushpop
        put(self._sensitive, (moves, number, row))
        if number % self._step == 0:
            self._spread[number] = row
        if len(self._spread) == _SPREAD:
            self._step *= 2
            self._spread = {n: row for n, row in self._spread.items() if n % self._step == 0}

    def check(self) -> None:
        """Predicts some of the images again.

        Raises:
            UsageError: an answer is another than in its row.
        """
        from regard.engines import TOLERANCES

        engines = [member.engine for member in self.table.classifier.members]
        exact = all(getattr(engine, "precision", "fp32") == "fp32" for engine in engines)
        # in fp32 the rows may be of another engine, and each be so far from eager
        bound = 2 * TOLERANCES["fp32"] if exact else TOLERANCES["bf16"]
        sensitive = {number: row for _, number, row in self._sensitive}
        rows = list((sensitive | self._spread | self._last).values())
        predicted = self.table.classifier.predict_each([row[0] for row in rows], self.table.top)
        pairs = [
            (row, p) for row, p in zip(rows, predicted, strict=True)
            if p.error is None  # the image may be gone
        ]  # fmt: skip
        for row, p in pairs:
            self._compare(row, p, bound, exact)
        if not exact and pairs and abs(_slope(self._own, pairs) - 1) > _SLOPE:
            row, p = pairs[0]
            raise self._refusal(row, f"{row[1]} at {row[2]}, which is {p.classes[0][1]:.6f} now")

    def _compare(self, row: list[str], p: "Prediction", bound: float, exact: bool) -> None:
        columns, now = self.table.columns, self.table.cells(p)
        near = [*self._ranked, *range(self._own, len(columns) - 1)]
        if self.table.averages and row[1] == now[1]:
            near.append(columns.index("sd1"))
        same = all(abs(_number(row[i]) - _number(now[i])) <= bound for i in near)
        if self.table.measures and exact:
            far = [_number(each[columns.index("distance")]) for each in (row, now)]
            same = same and not abs(far[0] - far[1]) > _DISTANCE * max(far)  # NaN: not known
        if not same:
            raise self._refusal(row, f"{row[1]} at {row[2]}, which is {now[1]} at {now[2]} now")

    def _refusal(self, row: list[str], what: str) -> UsageError:
        return UsageError(
            f"--resume: {self.table.path} is of another network, calibration or precision: "
            f"{row[0]} was {what}; give the same, or --overwrite"
        )


def _number(cell: str) -> float:
    """NaN, which is near no number, for what is none."""
    try:
        return float(cell)
    except ValueError:
        return math.nan


def _rounding(cell: str, limit: float) -> float:
    """How far from its threshold a probability can have been decided either way."""
    from regard.evaluation.statistics import tolerated

    lost = 6e-7 if _ROUNDED.fullmatch(cell) else 1e-9 * limit
    return float(limit - tolerated(limit)) + lost


def _slope(first: int, pairs: "list[tuple[list[str], Prediction]]") -> float:
    """By how much the log-odds of the rows are those of now; 1 where all are near 0 or infinite.

    Another temperature scales them all alike, whereas bf16 moves them to either side.
    """
    products = squares = 0.0
    for row, p in pairs:
        now = max(p.probabilities)
        before = _number(row[first + p.probabilities.index(now)])
        if 0.001 < before < 0.999 and 0.001 < now < 0.999:
            a, b = (math.log(share / (1 - share)) for share in (before, now))
            products, squares = products + a * b, squares + b * b
    return products / squares if squares > 1 else 1.0
