"""The positions of the sample order in each optimizer step, for each process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.training.config import Recipe

SMALLEST = 2  # fewest images of a batch at an epoch's end: batch norm needs two


@dataclass(frozen=True)
class StepPlan:
    """How the sample order is divided into steps, and a step into batches.

    A step has `processes * accumulate` batches, in this order: the first of each process, the
    second of each process, ... An epoch's last step may be divided into fewer, of at least
    SMALLEST images each.

    Attributes:
        count: training images; an epoch is as many positions.
        batch: images per batch.
        accumulate: batches per step in each process.
        processes: number of processes that train.
        partial: whether an epoch's last step takes the rest of the epoch. Otherwise steps
            continue into the next epoch.
        planned: batches of a step as the run was planned, before they were fitted into memory;
            0: as now. They decide whether an epoch has a last step, so that fitting changes
            neither the steps nor their images.
    """

    count: int
    batch: int
    accumulate: int = 1
    processes: int = 1
    partial: bool = False
    planned: int = 0

    @property
    def images(self) -> int:
        """Images of a full step."""
        return self.batch * self.accumulate * self.processes

    @property
    def an_epoch(self) -> float:
        """Steps per epoch; a whole number if the last one is partial.

        The last step is left out if its planned batches would have fewer than SMALLEST images.
        """
        if not self._ends_epochs:
            return self.count / self.images
        full, rest = divmod(self.count, self.images)
        return full + (rest >= self._fewest)

    @property
    def _fewest(self) -> int:
        """Fewest images of an epoch's last step."""
        return SMALLEST * (self.planned or self.accumulate * self.processes)

    @property
    def _ends_epochs(self) -> bool:
        return self.partial and self.count >= self._fewest

    def parts(self, step: int) -> int:
        """Batches of a step (from 0) in each process."""
        images = self.positions(step)[1]
        if images == self.images:
            return self.accumulate
        return max(1, min(self.accumulate, images // (SMALLEST * self.processes)))

    def total(self, epochs: float) -> int:
        """Steps in that many epochs, at least one."""
        return max(1, math.ceil(epochs * self.an_epoch - 1e-6))  # 0.07 * 100 exceeds 7

    def images_in(self, first: int, end: int) -> int:
        """Images in the steps from `first` to before `end`; an epoch's last may have fewer."""
        if not self._ends_epochs:
            return (end - first) * self.images
        an_epoch = int(self.an_epoch)
        whole = min(self.count, an_epoch * self.images)

        def before(step: int) -> int:
            epochs, k = divmod(step, an_epoch)
            return epochs * whole + k * self.images

        return before(end) - before(first)

    def positions(self, step: int) -> tuple[int, int]:
        """The first position of a step (from 0), and its number of positions."""
        if not self._ends_epochs:
            return step * self.images, self.images
        epoch, k = divmod(step, int(self.an_epoch))
        return epoch * self.count + k * self.images, min(self.images, self.count - k * self.images)

    def spans(self, process: int, first: int, end: int) -> "StepSpans":
        """One process's batches of the steps from `first` up to, not including, `end`."""
        return StepSpans(self, process, range(self._before(first), self._before(end)))

    def _before(self, step: int) -> int:
        """Batches of the steps before this one, in each process."""
        if not self._ends_epochs:
            return step * self.accumulate
        epoch, k = divmod(step, int(self.an_epoch))
        return epoch * self._batches_an_epoch + k * self.accumulate

    @property
    def _batches_an_epoch(self) -> int:
        last = int(self.an_epoch) - 1
        return last * self.accumulate + self.parts(last)

    def batch_at(self, number: int) -> tuple[int, int]:
        """The step of a process's batch (from 0), and the batch's number within the step."""
        if not self._ends_epochs:
            return divmod(number, self.accumulate)
        epoch, left = divmod(number, self._batches_an_epoch)
        k = min(left // self.accumulate, int(self.an_epoch) - 1)
        return epoch * int(self.an_epoch) + k, left - k * self.accumulate


@dataclass(frozen=True)
class StepSpans(Sequence[Any]):
    """Batches as (start position, count), computed when asked for."""

    plan: StepPlan
    process: int
    numbers: range  # of the process's batches

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return StepSpans(self.plan, self.process, self.numbers[index])
        step, part = self.plan.batch_at(self.numbers[index])
        start, images = self.plan.positions(step)
        batches = self.plan.parts(step) * self.plan.processes
        k = part * self.plan.processes + self.process  # number in the step
        begin, end = k * images // batches, (k + 1) * images // batches
        return start + begin, end - begin


def step_plan(recipe: Recipe, count: int, processes: int, planned: int = 0) -> StepPlan:
    """How the recipe's batches divide `count` training images among processes."""
    batch = min(recipe.batch_size, count)
    return StepPlan(count, batch, recipe.accumulate, processes, recipe.partial_batch, planned)
