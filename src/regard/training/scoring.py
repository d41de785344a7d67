"""Evaluates a network on a split: sums for validation, all probabilities for the test."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.loading import Batch, InMemoryLoader, Spans, StreamingLoader
from regard.data.workers import WaitInterrupted, never
from regard.errors import FileError, NotFiniteError
from regard.evaluation import Predictions
from regard.machine import most_precise
from regard.predict import Classifier
from regard.training.distributed import gathered, gathered_first
from regard.training.feed import feed
from regard.training.loop import Trainer
from regard.training.splits import LoadedSplit

LEAST_BATCH = 32
SMALLEST = 1e-12  # lower bound of the true class's probability in the loss: 27.6 nats


@dataclass(frozen=True)
class Scores:
    """Mean cross entropy (nats) and accuracy over the images of a split."""

    loss: float
    accuracy: float


class Scorer:
    """Scores splits with a trainer's network; each process does its share, no image twice.

    Args:
        trainer: its `weights` are evaluated.
        classes: names, in the order of the outputs.
        stop: called between batches; True ends the evaluation.
    """

    def __init__(
        self, trainer: Trainer, classes: list[str], stop: Callable[[], bool] = never
    ) -> None:
        self.trainer: Trainer = trainer
        self.stop: Callable[[], bool] = stop
        self.classifier: Classifier = Classifier(trainer.weights, classes, trainer.preprocess)

    def validate(self, loader: InMemoryLoader | StreamingLoader, part: LoadedSplit) -> Scores:
        """Loss and accuracy, computed from three sums per batch.

        Raises:
            FileError: no image can be read.
            NotFiniteError: an output is not finite.
            WaitInterrupted: `stop` returned True.
        """
        labels = torch.from_numpy(part.table.labels)
        device = self.trainer.device
        precise = most_precise(device)
        sums = torch.zeros(3, dtype=precise, device=device)  # loss, correct, images
        for batch in self._batches(loader, part, labels):
            probabilities = self.classifier.answers(batch.images)
            true = probabilities.gather(1, batch.labels[:, None]).to(precise).clamp_min(SMALLEST)
            correct = (probabilities.argmax(dim=1) == batch.labels).sum()
            # infinite or NaN as soon as an output is
            finite = (probabilities - probabilities).sum().to(precise)
            loss = finite - true.log().sum()
            sums += torch.stack([loss, correct.to(precise), torch.ones_like(true).sum()])
        gathered_sums = gathered(self.trainer.accelerator, sums.cpu().double())
        loss, correct, seen = sum(gathered_sums).tolist()
        if not math.isfinite(loss):
            raise self._not_finite()
        self._check_readable(part, seen)
        return Scores(loss / seen, correct / seen)

    def predict(
        self, loader: InMemoryLoader | StreamingLoader, part: LoadedSplit
    ) -> Predictions | None:
        """The probabilities of all readable images, in the table's order.

        Returns them in the first process only; None in the others.

        Raises:
            as `validate`.
        """
        count, classes = len(part.table), len(self.classifier.class_names)
        answered = np.zeros(count, dtype=bool)
        answers = np.empty((count, classes), dtype=np.float32)
        rows, found = [np.zeros(0, np.int64)], [torch.zeros(0, classes, device=self.trainer.device)]
        for batch in self._batches(loader, part, torch.from_numpy(part.table.labels)):
            found.append(self.classifier.answers(batch.images).float())
            rows.append(batch.rows)
        mine = np.concatenate(rows), torch.cat(found).cpu().numpy()
        if not all(gathered(self.trainer.accelerator, bool(np.isfinite(mine[1]).all()))):
            raise self._not_finite()
        for at, values in gathered_first(self.trainer.accelerator, mine):
            answers[at], answered[at] = values, True
        if not self.trainer.accelerator.is_main_process:
            return None
        self._check_readable(part, int(answered.sum()))
        table = part.table
        if not answered.all():
            table, answers = table.select(answered), answers[answered]
        paths = [table.path(i) for i in range(len(table))]
        halves: Any = answers  # float32 takes half the memory of float64
        return Predictions(halves, table.labels, table.classes, table.groups, paths, table.columns)

    def _batches(
        self, loader: InMemoryLoader | StreamingLoader, part: LoadedSplit, labels: Tensor
    ) -> Iterator["_Labeled"]:
        """This process's batches on the device; unreadable images are recorded in `part.lost`."""
        trainer = self.trainer
        trainer.share_buffers()
        size, count = max(LEAST_BATCH, trainer.batch), len(part.table)
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        lost: list[tuple[int, str]] = []
        stopped = False
        if isinstance(loader, StreamingLoader):
            loader.stop = self.stop
        self.classifier.model.eval()

        def labeled(batch: Batch) -> _Labeled:
            rows = batch.indices.numpy()
            return _Labeled(batch.images, labels[batch.indices], rows, batch.unreadable)

        spans = Spans(range(rank * size, count, world * size), size, count)
        batches = feed(loader.batches(spans), labeled, trainer.device)
        try:
            for batch in batches:
                if self.stop():
                    raise WaitInterrupted("stopped while images were evaluated")
                lost += batch.unreadable
                if len(batch.rows):
                    yield batch
        except WaitInterrupted:
            stopped = True
        finally:
            getattr(batches, "close", lambda: None)()
            loader.close()
        each = gathered(trainer.accelerator, (stopped, lost))
        if any(stopped for stopped, _ in each):
            raise WaitInterrupted("stopped while images were evaluated")
        part.lost = [entry for _, entries in each for entry in entries]

    def _not_finite(self) -> NotFiniteError:
        return self.trainer.not_finite("what the network answers after the update")

    def _check_readable(self, part: LoadedSplit, seen: float) -> None:
        if not seen:
            raise FileError(f"no image of a split can be read: {part.lost[0][1]}")


@dataclass
class _Labeled:
    """Images (B, C, H, W) with labels (B,) and table rows; the rows stay on the CPU."""

    images: Tensor
    labels: Tensor
    rows: NDArray[np.int64]
    unreadable: list[tuple[int, str]]

    def moved(self, move: Callable[[Tensor], Tensor]) -> "_Labeled":
        return _Labeled(move(self.images), move(self.labels), self.rows, self.unreadable)
