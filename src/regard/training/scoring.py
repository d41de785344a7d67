"""A split's images under the network: a few sums for validation, all probabilities for the test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.data.loading import Batch, InMemoryLoader, Spans, StreamingLoader
from regard.data.workers import WaitInterrupted, never
from regard.errors import FileError
from regard.evaluation import Predictions
from regard.predict import Classifier
from regard.training.distributed import gathered
from regard.training.loop import Trainer
from regard.training.splits import LoadedSplit

LEAST_BATCH = 32
SMALLEST = 1e-12  # probability of the true class in the loss: 27.6 nats, not infinity


@dataclass(frozen=True)
class Scores:
    """Mean cross entropy (nats) and accuracy over the images of a split."""

    loss: float
    accuracy: float


class Scorer:
    """Scores splits with a trainer's network, each process its share, no image twice.

    Args:
        trainer: its `weights` answer.
        classes: names, in the order of the outputs.
        stop: is asked between batches whether to give up.
    """

    def __init__(
        self, trainer: Trainer, classes: list[str], stop: Callable[[], bool] = never
    ) -> None:
        self.trainer, self.stop = trainer, stop
        self.classifier = Classifier(trainer.weights, classes, trainer.preprocess)

    def validate(self, loader: InMemoryLoader | StreamingLoader, part: LoadedSplit) -> Scores:
        """Loss and accuracy, of which each batch leaves three numbers.

        Raises:
            FileError: no image can be read.
            NotFiniteError: an answer is not finite.
            WaitInterrupted: `stop` answered True.
        """
        labels = torch.from_numpy(part.table.labels)
        sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
        for batch in self._batches(loader, part):
            probabilities = self._answers(batch)
            target = labels[batch.indices]
            true = probabilities.gather(1, target[:, None]).double().clamp_min(SMALLEST)
            correct = (probabilities.argmax(dim=1) == target).sum()
            sums += torch.stack([-true.log().sum(), correct.double(), sums.new_tensor(len(target))])
        loss, correct, seen = sum(gathered(self.trainer.accelerator, sums)).tolist()
        self._check_readable(part, seen)
        return Scores(loss / seen, correct / seen)

    def predict(self, loader: InMemoryLoader | StreamingLoader, part: LoadedSplit) -> Predictions:
        """The probabilities of all images that can be read, in the table's order.

        Raises:
            as `validate`.
        """
        count = len(part.table)
        answered = np.zeros(count, dtype=bool)
        answers = np.empty((count, len(self.classifier.class_names)), dtype=np.float32)
        mine = []
        for batch in self._batches(loader, part):
            rows = batch.indices.numpy()
            answers[rows] = self._answers(batch).numpy()
            answered[rows] = True
            mine.append(rows)
        if self.trainer.accelerator.num_processes > 1:
            rows = np.concatenate([np.zeros(0, np.int64), *mine])
            for others, found in gathered(self.trainer.accelerator, (rows, answers[rows])):
                answers[others], answered[others] = found, True
        self._check_readable(part, int(answered.sum()))
        table = part.table
        if not answered.all():
            table, answers = table.select(answered), answers[answered]
        paths = [table.path(i) for i in range(len(table))]
        halves: Any = answers  # float32 takes half the memory of float64
        return Predictions(halves, table.labels, table.classes, table.groups, paths, table.columns)

    def _batches(
        self, loader: InMemoryLoader | StreamingLoader, part: LoadedSplit
    ) -> Iterator[Batch]:
        """This process's batches; what can't be read is noted in `part.lost`."""
        trainer = self.trainer
        trainer.share_buffers()
        size, count = max(LEAST_BATCH, trainer.batch), len(part.table)
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        lost: list[tuple[int, str]] = []
        if isinstance(loader, StreamingLoader):
            loader.stop = self.stop
        self.classifier.model.eval()
        try:
            spans = Spans(range(rank * size, count, world * size), size, count)
            for batch in loader.batches(spans):
                if self.stop():
                    raise WaitInterrupted("stopped while images were evaluated")
                lost += batch.unreadable
                if len(batch.indices):
                    yield batch
        finally:
            loader.close()
        part.lost = [entry for entries in gathered(trainer.accelerator, lost) for entry in entries]

    def _answers(self, batch: Batch) -> Tensor:
        probabilities = self.classifier.probabilities(batch.images)
        if not bool(probabilities.isfinite().all()):
            raise self.trainer.not_finite("what the network answers after the update")
        return probabilities

    def _check_readable(self, part: LoadedSplit, seen: float) -> None:
        if not seen:
            raise FileError(f"no image of a split can be read: {part.lost[0][1]}")
