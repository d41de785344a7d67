"""Measures what training images look like to a network; see `evaluation.familiarity`."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from regard.data.loading import Reader, StreamingLoader, default_workers
from regard.data.table import ImageTable
from regard.evaluation.familiarity import Familiarity, fit_familiarity
from regard.files import spread
from regard.predict import BATCH, Classifier, network_hash

MOST_TRAINING, MOST_VALIDATION = 2000, 1000  # images


def measure_familiarity(
    classifier: Classifier, training: ImageTable, validation: ImageTable, run: str | Path
) -> Familiarity:
    """Fits the familiarity to at most 2,000 training and 1,000 validation images, evenly spread.

    Raises:
        UsageError: too few images, or a network whose classifier has no features.
    """
    features, rows = features_of(classifier, training, MOST_TRAINING)
    others, of = features_of(classifier, validation, MOST_VALIDATION)
    groups = None if validation.groups is None else validation.groups[of]
    return fit_familiarity(
        features, training.labels[rows], others, network=network_hash(run), groups=groups
    )


def features_of(
    classifier: Classifier, table: ImageTable, most: int
) -> tuple[list[NDArray[np.float32]], NDArray[np.int64]]:
    """Features (n, D) of each kind, for at most `most` readable images, and their rows."""
    found: list[Any] = []
    rows: list[Any] = []
    with contextlib.closing(read_some(classifier, table, most)) as batches:
        for images, of in batches:
            found.append(classifier.features(images))
            rows.append(of)
    if not found:
        return [np.zeros((0, 1), np.float32)], np.zeros(0, np.int64)
    kinds = [np.concatenate(each) for each in zip(*found, strict=True)]
    return kinds, np.concatenate(rows)


def read_some(
    classifier: Classifier, table: ImageTable, most: int
) -> Generator[tuple[Tensor, NDArray[np.int64]]]:
    """At most `most` readable images, evenly spread: batches (B, C, H, W) in 0..255, and rows."""
    chosen = spread(len(table), most) if len(table) else np.zeros(0, np.int64)
    some = table.select(chosen)
    source = StreamingLoader(Reader(some, classifier.preprocess), None, 0, default_workers())
    spans = [(start, min(BATCH, len(some) - start)) for start in range(0, len(some), BATCH)]
    try:
        for batch in source.batches(spans):
            if len(batch.indices):
                yield batch.images, chosen[batch.indices.numpy()]
    finally:
        source.close()
