"""What a person sees while a network trains: a bar in a terminal, plain lines elsewhere, and
TensorBoard's events.
"""

import contextlib
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from regard.runs import RunFolder
from regard.training.loop import Trainer

PLAIN_EVERY = 30.0  # seconds between plain lines within an epoch


class Display:
    """Shows epoch, step, loss, accuracy, images a second, the share of waiting, and time left."""

    def __init__(
        self, trainer: Trainer, folder: RunFolder, main: bool, say: Callable[[str], None]
    ) -> None:
        self.trainer, self.folder, self.main, self.say = trainer, folder, main, say
        self.loss = math.nan
        self.bar: Any = None
        self.events: Any = None

    def __enter__(self) -> "Display":
        self.started = self.told = time.perf_counter()
        self.first = self.trainer.step
        if not self.main:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(
            str(self.folder.path / "tensorboard"),
            purge_step=self.first + 1 if self.first else None,  # what a resumed run tells again
        )
        console = Console(stderr=True)
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"),
                TextColumn("left"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self.task = self.bar.add_task(
                "training", total=self.trainer.total, completed=self.first, told=""
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
        if self.events is not None:
            with contextlib.suppress(OSError):  # a full disk: nothing that matters is lost
                self.events.close()

    def _rates(self) -> tuple[float, float, float]:
        """Images a second, share of waiting, seconds left."""
        t = self.trainer
        done = t.step - self.first
        seconds = max(1e-9, time.perf_counter() - self.started)
        left = seconds / max(1, done) * (t.total - t.step)
        return done * t.images_a_step / seconds, t.waited / max(1e-9, t.seconds), left

    def step(self, loss: float) -> None:
        """After each step; the loss shown is smoothed over about 20 steps."""
        if not self.main:
            return
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss
        now = time.perf_counter()
        if self.bar is None and now - self.told < PLAIN_EVERY:
            return
        t = self.trainer
        speed, waiting, left = self._rates()
        epoch = f"epoch {t.step / t.steps_an_epoch:.1f} of {t.total / t.steps_an_epoch:.3g}"
        told = f"loss {self.loss:.4f}  {speed:,.0f} images/s  {waiting:.0%} waiting"
        if self.bar is not None:
            self.bar.update(
                self.task, completed=t.step, told=told,
                description=f"{epoch}, step {t.step:,} of {t.total:,}",
            )  # fmt: skip
            return
        self.told = now
        self.say(f"{epoch}, step {t.step:,} of {t.total:,}  {told}  {clock(left)} left")

    def epoch(self, row: dict[str, float]) -> None:
        """After each evaluation."""
        if not self.main:
            return
        t = self.trainer
        speed, waiting, left = self._rates()
        for key, value in row.items():
            if key not in ("epoch", "step"):
                self.events.add_scalar(key, value, t.step)
        self.events.add_scalar("images_a_second", speed, t.step)
        self.events.flush()
        val = f"  validation {row['val_accuracy']:.2%}" if "val_accuracy" in row else ""
        self.told = time.perf_counter()
        line = (
            f"epoch {row['epoch']:g} of {t.total / t.steps_an_epoch:.3g}  loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy']:.2%}{val}  {speed:,.0f} images/s  {waiting:.0%} waiting  "
            f"{clock(left)} left"
        )
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            self.say(line)


def clock(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
