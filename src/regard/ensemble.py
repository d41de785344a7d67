"""Several networks as one: the mean of their probabilities, and how far they differ."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.classifier import Classifier, load
from regard.data.images import ImageSource, name_of
from regard.data.loading import default_workers, read_ahead
from regard.data.preprocess import Flips
from regard.errors import ImageError, UsageError
from regard.evaluation.ensembles import check_same_classes
from regard.predict import BATCH, Prediction, stacked


class Ensemble(Classifier):
    """The mean of several networks' probabilities.

    The networks may differ in kind, input size and preprocessing; their classes must be the same,
    in any order. Each one's probabilities are scaled by its own temperature. There is no
    decision: a threshold belongs to one network. `explain` shows the mean of the members' maps,
    see `regard.explanations.averaging`.

    Args:
        members: two or more.
        names: what messages call them.

    Raises:
        UsageError: fewer than two, or other classes.
    """

    def __init__(self, members: Sequence[Classifier], names: Sequence[str]) -> None:
        check_same_classes([m.class_names for m in members], names)
        first = members[0]
        super().__init__(first.model, first.class_names, first.preprocess, first.config)
        self.members: list[Classifier] = list(members)
        self._orders = [[m.class_names.index(c) for c in self.class_names] for m in members]
        if all(m.familiarity is not None for m in members):
            self.familiarity = first.familiarity

    def use_flips(self) -> None:
        """Has every member average each image and its mirror image."""
        self.preprocess = Flips.of(self.preprocess)
        for member in self.members:
            member.use_flips()

    @classmethod
    def load(
        cls, folders: Sequence[str | Path], device: str = "cpu", *, flips: bool = False
    ) -> "Ensemble":
        """The networks of several runs' folders, each as by `regard.load`.

        Raises:
            UsageError: as `regard.load`, or the classes are not the same.
        """
        members = [load(folder, device, flips=flips) for folder in folders]
        return cls(members, [str(f) for f in folders])

    def predict_each(
        self, images: Iterable[ImageSource], top: int = 5, batch: int = BATCH
    ) -> Iterator[Prediction]:
        """As of one network; each prediction also has `sd` and `disagreement`."""
        decoded = read_ahead(
            enumerate(images, start=1), self._views_or_error, default_workers(), 2 * batch
        )
        while chunk := list(islice(decoded, batch)):
            good = [views for _, views in chunk if not isinstance(views, str)]
            answers = iter(self._of_all(good) if good else ())
            for name, views in chunk:
                if isinstance(views, str):
                    yield Prediction(name, [], views)
                else:
                    yield self._mean(name, *next(answers), top)

    def _views_or_error(self, numbered: tuple[int, ImageSource]) -> tuple[str, list[Tensor] | str]:
        """One image as each member's input; members that prepare it alike share it."""
        number, image = numbered
        name = name_of(image) or f"image {number}"
        known: dict[Any, Tensor] = {}
        views = []
        try:
            for member in self.members:
                p = member.preprocess
                key = (type(p), p.input_size, p.resize, p.crop_pct, p.resize_first, p.value_range)
                if key not in known:
                    if hasattr(image, "seek"):
                        image.seek(0)
                    known[key] = member.decode(image)
                views.append(known[key])
        except ImageError as error:
            return name, str(error) if name_of(image) else f"{name}: {error}"
        return name, views

    def _of_all(self, images: list[list[Tensor]]) -> Iterator[tuple[Tensor, list[float | None]]]:
        """For each image the members' probabilities (members, classes) and relative distances."""
        shares, distances = [], []
        for k, (member, order) in enumerate(zip(self.members, self._orders, strict=True)):
            found, far = member.with_distances(stacked([views[k] for views in images]))
            shares.append(found[:, order])
            limit = 1.0 if member.familiarity is None else member.familiarity.threshold
            distances.append([None if d is None else d / limit for d in far])
        each: Any = torch.stack(shares, dim=1)
        yield from zip(each, map(list, zip(*distances, strict=True)), strict=True)

    def _mean(
        self, name: str, shares: Tensor, distances: list[float | None], top: int
    ) -> Prediction:
        known = [d for d in distances if d is not None]
        distance = float(np.mean(known)) if len(known) == len(distances) else None
        mean = shares.mean(dim=0)
        found = self.prediction(name, mean, distance, top)
        if found.error is not None:
            return found
        differs = (shares.argmax(dim=1) != mean.argmax()).float().mean()
        sd = dict(zip(self.class_names, shares.std(dim=0, correction=1).tolist(), strict=True))
        return replace(found, sd=sd, disagreement=float(differs))

    def is_unlike(self, distance: float | None) -> bool | None:
        """Whether the members' mean distance, each relative to its threshold, is above 1."""
        return None if distance is None or self.familiarity is None else not distance <= 1.0


def load_all(
    folders: Sequence[str | Path], device: str = "cpu", *, flips: bool = False
) -> Classifier:
    """One network, or the `Ensemble` of several.

    Raises:
        UsageError: as `regard.load`, a network named twice, or classes that are not the same.
    """
    if len(folders) == 1:
        return load(folders[0], device, flips=flips)
    resolved = [Path(f).resolve() for f in folders]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UsageError(f"{folders[i]} is named twice")
    return Ensemble.load(folders, device, flips=flips)
