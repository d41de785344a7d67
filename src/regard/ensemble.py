"""Several networks as one: the mean of their probabilities, and how much they differ."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.classifier import Classifier, load
from regard.data.images import ImageSource, name_of, rereadable
from regard.data.loading import default_workers, read_ahead
from regard.data.preprocess import Preprocess
from regard.errors import ImageError, UsageError
from regard.evaluation.ensembles import check_same_classes
from regard.predict import BATCH, Prediction, stacked

_ASK = "call predict(images), or one of ensemble.members"


def _of_each(name: str, *, is_none: bool = False) -> Any:
    """An attribute that each network has for itself: reading it is refused, or returns None."""

    def refuse(_: Any, *__: Any) -> None:
        raise UsageError(
            f"an ensemble has no {name}: its networks have their own, ensemble.members[0].{name}"
        )

    return property((lambda _: None) if is_none else refuse, refuse)


class Ensemble(Classifier):
    """The mean of several networks' probabilities.

    The networks may differ in kind, input size and preprocessing; their classes must be the same,
    in any order. Each one's probabilities are scaled by its own temperature. There is no decision,
    as a threshold belongs to one network. `explain` shows the mean of the members' maps, see
    `regard.explanations.averaging`.

    `decode`, `probabilities`, `answers` and `with_distances` need networks that preprocess images
    in the same way; `predict` does not. What belongs to one network is an attribute of the
    `members` and raises a UsageError here: `model`, `features`, `temperature`, `preprocess` (if
    they differ), and setting an `engine` or a `calibration`.

    Args:
        members: two or more networks.
        names: their names in messages.

    Raises:
        UsageError: fewer than two, different classes, or a member that is an ensemble.
    """

    model = _of_each("model")
    temperature = _of_each("temperature")
    engine = _of_each("engine", is_none=True)
    calibration = _of_each("calibration", is_none=True)
    flipped_calibration = _of_each("flipped_calibration", is_none=True)
    familiarity = _of_each("familiarity", is_none=True)

    def __init__(self, members: Sequence[Classifier], names: Sequence[str]) -> None:
        check_same_classes([m.class_names for m in members], names)
        for member, name in zip(members, names, strict=True):
            if len(member.members) > 1:
                raise UsageError(f"{name} is an ensemble: give its members")
        self.class_names: list[str] = list(members[0].class_names)
        self.config: dict[str, Any] = {}
        self._members: list[Classifier] = list(members)
        self._orders = [[m.class_names.index(c) for c in self.class_names] for m in members]

    @property
    def members(self) -> list[Classifier]:
        """The networks whose probabilities are averaged."""
        return self._members

    @property
    def preprocess(self) -> Preprocess:  # type: ignore[override]
        """The preprocessing that all networks share.

        Raises:
            UsageError: they differ.
        """
        first = self.members[0].preprocess
        if any(m.preprocess != first for m in self.members):
            raise UsageError(
                f"an ensemble has no single preprocess, as its networks differ: {_ASK}"
            )
        return first

    @property
    def mirrors(self) -> bool:
        """Whether all members average each image and its mirror image."""
        return all(m.mirrors for m in self.members)

    @property
    def measures_distances(self) -> bool:
        """Whether all members measure an image's distance from their training images."""
        return all(m.measures_distances for m in self.members)

    def use_flips(self) -> None:
        """Makes every member average each image and its mirror image."""
        for member in self.members:
            member.use_flips()

    def drop_calibration(self) -> None:
        """Makes every member ignore its temperature and threshold."""
        for member in self.members:
            member.drop_calibration()

    def decode(self, image: ImageSource) -> Tensor:
        """Like that of a single network, for all members.

        Raises:
            ImageError: as for a single network.
            UsageError: the members preprocess images differently.
        """
        self._check_alike()
        return self.members[0].decode(image)

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..255 -> (B, classes), the mean of the members' probabilities.

        Raises:
            UsageError: the members preprocess images differently.
        """
        self._check_alike()
        return self._mean_of([m.probabilities(images) for m in self.members])

    def answers(self, images: Tensor) -> Tensor:
        """Like `probabilities`, from the networks rather than engines, on the first one's device.

        Raises:
            UsageError: the members preprocess images differently.
        """
        self._check_alike()
        return self._mean_of([m.answers(images) for m in self.members])

    def with_distances(self, images: Tensor) -> tuple[Tensor, list[float | None]]:
        """`probabilities`, and each image's mean distance, each relative to the member's threshold.

        Raises:
            UsageError: the members preprocess images differently.
        """
        self._check_alike()
        each = self._by_member([images] * len(self.members))
        distances = zip(*(far for _, far in each), strict=True)
        return torch.stack([p for p, _ in each]).mean(dim=0), [*map(_mean_distance, distances)]

    def features(self, images: Tensor) -> list[NDArray[np.float32]]:
        """Not available: the members' features differ in size and kind.

        Raises:
            UsageError: always.
        """
        raise UsageError("an ensemble has no features: call ensemble.members[0].features(images)")

    def _check_alike(self) -> None:
        if len({_view(m.preprocess) for m in self.members}) > 1:
            raise UsageError(f"an ensemble's networks prepare images differently: {_ASK}")

    def _mean_of(self, each: Sequence[Tensor]) -> Tensor:
        """Probabilities (B, classes) of each member, in its own class order -> (B, classes)."""
        pairs = zip(each, self._orders, strict=True)
        return torch.stack([p[:, order].to(each[0].device) for p, order in pairs]).mean(dim=0)

    @classmethod
    def load(
        cls, folders: Sequence[str | Path], device: str = "cpu", *, flips: bool = False
    ) -> "Ensemble":
        """The networks of several runs' folders, each loaded as by `regard.load`.

        Raises:
            UsageError: as in `regard.load`, or the classes are not the same.
        """
        members = [load(folder, device, flips=flips) for folder in folders]
        return cls(members, [str(f) for f in folders])

    def predict_each(
        self, images: Iterable[ImageSource], top: int = 5, batch: int = BATCH
    ) -> Iterator[Prediction]:
        """As for a single network; each prediction also has `sd` and `disagreement`."""
        decoded = read_ahead(
            enumerate(images, start=1), self._views_or_error, default_workers(), 2 * batch
        )
        while chunk := list(islice(decoded, batch)):
            good = [views for _, views in chunk if not isinstance(views, str)]
            answers: Iterator[tuple[Tensor, tuple[float | None, ...]]] = iter(())
            if good:
                each = self._by_member([stacked(list(v)) for v in zip(*good, strict=True)])
                shares: Any = torch.stack([p for p, _ in each], dim=1)  # (B, members, classes)
                answers = zip(shares, zip(*(far for _, far in each), strict=True), strict=True)
            for name, views in chunk:
                if isinstance(views, str):
                    yield Prediction(name, [], views)
                else:
                    yield self._mean(name, *next(answers), top)

    def _views_or_error(self, numbered: tuple[int, ImageSource]) -> tuple[str, list[Tensor] | str]:
        """One image as each member's input; members with the same preprocessing share it."""
        number, image = numbered
        name, source = name_of(image) or f"image {number}", rereadable(image)
        known: dict[Any, Tensor] = {}
        views = []
        try:
            for member in self.members:
                key = _view(member.preprocess)
                if key not in known:
                    known[key] = member.decode(source)
                views.append(known[key])
        except ImageError as error:
            return name, str(error) if name_of(source) else f"{name}: {error}"
        return name, views

    def _by_member(self, batches: Sequence[Tensor]) -> list[tuple[Tensor, list[float | None]]]:
        """Each member's probabilities (B, classes) and distances relative to its threshold.

        Args:
            batches: each member's input, for the same images.
        """
        each = []
        for member, order, batch in zip(self.members, self._orders, batches, strict=True):
            shares, far = member.with_distances(batch)
            limit = 1.0 if member.familiarity is None else member.familiarity.threshold
            each.append((shares[:, order], [None if d is None else d / limit for d in far]))
        return each

    def _mean(
        self, name: str, shares: Tensor, distances: Sequence[float | None], top: int
    ) -> Prediction:
        mean = shares.mean(dim=0)
        found = self.prediction(name, mean, _mean_distance(distances), top)
        if found.error is not None:
            return found
        differs = (shares.argmax(dim=1) != mean.argmax()).float().mean()
        sd = dict(zip(self.class_names, shares.std(dim=0, correction=1).tolist(), strict=True))
        return replace(found, sd=sd, disagreement=float(differs))

    def is_unlike(self, distance: float | None) -> bool | None:
        """Whether the members' mean distance, each relative to its threshold, is above 1."""
        return None if distance is None else not distance <= 1.0


def _view(p: Preprocess) -> tuple[Any, ...]:
    """All that determines how an image becomes a network's input."""
    return (type(p), p.input_size, p.resize, p.crop_pct, p.resize_first, p.value_range)


def _mean_distance(distances: Sequence[float | None]) -> float | None:
    """The mean of the members' relative distances; None if one is unknown."""
    known = [d for d in distances if d is not None]
    return float(np.mean(known)) if len(known) == len(distances) else None


def load_all(
    folders: Sequence[str | Path], device: str = "cpu", *, flips: bool = False
) -> Classifier:
    """One network, or the `Ensemble` of several.

    Raises:
        UsageError: as in `regard.load`, a network given twice, or classes that are not the same.
    """
    if len(folders) == 1:
        return load(folders[0], device, flips=flips)
    resolved = [Path(f).resolve() for f in folders]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UsageError(f"{folders[i]} is named twice")
    return Ensemble.load(folders, device, flips=flips)
