"""Training progress: a bar in a terminal, plain lines elsewhere, and experiment trackers."""

import logging
import math
import time
from types import TracebackType
from typing import Any

from regard.log import clock
from regard.runs import note_progress
from regard.training.loop import Trainer
from regard.training.trackers import Trackers

log: logging.Logger = logging.getLogger(__name__)

PLAIN_EVERY = 30.0  # seconds between plain lines within an epoch
NOTE_EVERY = 1.0  # seconds between progress notes for the process that started the run


class Display:
    """Shows epoch, step, loss, accuracy, images per second, share of time waiting, and time left.

    Args:
        trainer: the trainer to show.
        trackers: they log each epoch's metrics; None in all processes but the first, where
            nothing is shown.
    """

    def __init__(self, trainer: Trainer, trackers: Trackers | None) -> None:
        self.trainer: Trainer = trainer
        self.trackers: Trackers | None = trackers
        self.loss: float = math.nan
        self.bar: Any = None

    def __enter__(self) -> "Display":
        self.started: float = time.monotonic()
        self.shown: float = self.started
        self.first: int = self.trainer.step
        self.seconds_before: float = self.trainer.seconds
        if self.trackers is None:
            return self
        self.noted: float = self.started
        note_progress(self.first, self.trainer.total)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}"),
                TextColumn("left"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self.task: int = self.bar.add_task(
                "training", total=self.trainer.total, completed=self.first, numbers=""
            )
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.trackers is not None:
            self.trackers.close()

    def _rates(self) -> tuple[float, float, float]:
        """Images per second in training, share of time waiting, seconds left.

        Evaluations count only towards the time left. A resumed run uses its rates from before the
        stop until it has done a step.
        """
        t = self.trainer
        first, seconds, passed = 0, t.seconds, t.seconds
        if t.step > self.first:
            first, seconds = self.first, t.seconds - self.seconds_before
            passed = time.monotonic() - self.started
        speed = t.steps.images_in(first, t.step) / max(1e-9, seconds)
        left = passed / max(1, t.step - first) * (t.total - t.step)
        return speed, t.waited / max(1e-9, t.seconds), left

    def epoch(self, step: int) -> str:
        """Such as "epoch 3/15": the epoch that a step is in, counted from 1."""
        # an epoch is rarely a whole number of steps: a step belongs to the epoch that it begins in
        number, last = (
            math.floor(max(0, s - 1) / self.trainer.steps_an_epoch + 1e-6) + 1
            for s in (step, self.trainer.total)
        )
        return f"epoch {number}/{last}"

    def step(self, loss: float) -> None:
        """Called after each step; the loss shown is smoothed over about 20 steps."""
        if self.trackers is None:
            return
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        now = time.monotonic()
        if now - self.noted >= NOTE_EVERY or self.trainer.step == self.trainer.total:
            self.noted = now
            note_progress(self.trainer.step, self.trainer.total)
        if self.bar is None and now - self.shown < PLAIN_EVERY:
            return
        t = self.trainer
        speed, waiting, left = self._rates()
        where = f"{self.epoch(t.step)}, step {t.step:,}/{t.total:,}"
        numbers = f"objective {self.loss:.4f}  {speed:,.0f} images/s  {waiting:.0%} waiting"
        if self.bar is not None:
            self.bar.update(self.task, completed=t.step, numbers=numbers, description=where)
            return
        self.shown = now
        log.info(f"{where}  {numbers}  {clock(left)} left")

    def evaluated(self, row: dict[str, float]) -> None:
        """Called after each evaluation, with its row of metrics.csv."""
        if self.trackers is None:
            return
        t = self.trainer
        speed, waiting, left = self._rates()
        values = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        self.trackers.log({**values, "images_a_second": speed}, t.step)
        val = f"  validation {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
        self.shown = time.monotonic()
        line = (
            f"{self.epoch(t.step)}  loss {row['loss']:.4f}  accuracy {row['accuracy']:.2%}{val}  "
            f"{speed:,.0f} images/s  {waiting:.0%} waiting  {clock(left)} left"
        )
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            log.info(line)
