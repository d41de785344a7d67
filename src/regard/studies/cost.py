"""The cost of a run's network: parameters, multiply-adds, and measured times."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from regard.models.counting import count_multiply_adds, count_parameters
from regard.predict import load
from regard.runs import RunFolder

BATCH = 8
ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """The cost of one network.

    Attributes:
        parameters: number of parameters.
        macs: multiply-adds per image.
        ms_an_image: prediction time at batch size 8 on this machine, median of the rounds.
        ms_a_step: time of a training step, as the run measured it; None if not known.
    """

    parameters: int
    macs: int
    ms_an_image: float
    ms_a_step: float | None

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        return asdict(self)


def measure_costs(folders: Sequence[Path]) -> list[Cost]:
    """The cost of each run's network; predictions are timed in turns, so that load is shared."""
    classifiers = [load(folder) for folder in folders]
    inputs = [torch.zeros(BATCH, *c.preprocess.input_size) for c in classifiers]
    times: list[list[float]] = [[] for _ in classifiers]
    for turn in range(ROUNDS + 1):
        for found, classifier, images in zip(times, classifiers, inputs, strict=True):
            started = time.perf_counter()
            classifier.probabilities(images)
            if turn:  # the first turn is a warm-up
                found.append(time.perf_counter() - started)
    return [
        Cost(
            parameters=count_parameters(classifier.model),
            macs=count_multiply_adds(classifier.model, classifier.preprocess.input_size),
            ms_an_image=1000 * median(found) / BATCH,
            ms_a_step=_step(folder),
        )
        for folder, classifier, found in zip(folders, classifiers, times, strict=True)
    ]


def _step(folder: Path) -> float | None:
    run = RunFolder(folder)
    if not run.finished:
        return None
    facts = run.read_facts()
    if not facts.get("steps") or "seconds" not in facts:
        return None
    return 1000 * float(facts["seconds"]) / float(facts["steps"])
