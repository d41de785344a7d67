"""A trained network with everything in its folder: `load` reads it, and it classifies images."""

import logging
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.data.content import file_hash
from regard.data.images import ImageSource, name_of, read_image
from regard.data.loading import InMemoryLoader, StreamingLoader, default_workers, read_ahead
from regard.data.preprocess import Flips, Preprocess, to_tensor
from regard.errors import ImageError, UsageError
from regard.evaluation import familiarity
from regard.evaluation.calibration import FILE, Calibration, read_calibration
from regard.evaluation.familiarity import Familiarity, read_familiarity
from regard.features import appearance, inputs_of, joined_features, last_layers
from regard.machine import choose_device, in_channels_last
from regard.models.io import load_model, network_folder

log: logging.Logger = logging.getLogger(__name__)

BATCH = 32
UNFIT = (
    "the stored temperature and threshold are not used, as they were fitted for another input "
    "size, crop or test-time augmentation: calibrate with these settings"
)
FLIPS_ALONE = "was fitted for test-time flips and is used with them alone"


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: the image's path or name; "image 3" for the third input if it has none.
        classes: (class name, probability), the most probable first; empty if there is an error.
        error: why there is no prediction, or None.
        probabilities: of all classes, in the network's order; empty if there is an error.
        decision: at the run's threshold, see `Calibration.decide`; None if it has none.
        distance: from the training images, see `Familiarity`; None if unknown.
        unlike_training: whether the distance is above the run's threshold; None if unknown.
        sd: for an ensemble, the members' standard deviation of each class's probability.
        disagreement: for an ensemble, the share of members with a different top-1 class.
    """

    path: str
    classes: list[tuple[str, float]]
    error: str | None = None
    probabilities: tuple[float, ...] = ()
    decision: str | None = None
    distance: float | None = None
    unlike_training: bool | None = None
    sd: Mapping[str, float] | None = None
    disagreement: float | None = None


class Classifier:
    """A network with its class names and its preprocessing.

    Attributes:
        model: put in evaluation mode, its weights in channels_last.
        class_names: in the order of its outputs.
        preprocess: from a decoded image to the network's input.
        config: the folder's config.json; what timm does not know is under "regard".
        engine: computes probabilities in place of the model, see `regard.engines`, or None. An
            engine with `gives_features` also returns the inputs of the last layer.
        calibration: the temperature that scales the probabilities, and the threshold; or None.
        familiarity: detects images that are unlike the training images; or None.
        flipped_calibration: the calibration to use with flips, see `use_flips`; or None.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        preprocess: Preprocess,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model: nn.Module = in_channels_last(model.eval())
        self.class_names: list[str] = list(class_names)
        self.preprocess: Preprocess = preprocess
        self.config: dict[str, Any] = config or {}
        self.engine: Callable[[Tensor], Tensor] | None = None
        self.calibration: Calibration | None = None
        self.flipped_calibration: Calibration | None = None
        self.familiarity: Familiarity | None = None

    @property
    def members(self) -> Sequence["Classifier"]:
        """The networks whose probabilities are averaged: only this one, but see `Ensemble`."""
        return [self]  # not stored: a reference cycle is only freed by the garbage collector

    @property
    def mirrors(self) -> bool:
        """Whether its probabilities are those of each image and its mirror image."""
        return isinstance(self.preprocess, Flips)

    def use_flips(self) -> None:
        """From now on, averages the probabilities of each image and its mirror image.

        A temperature and a threshold that were fitted without flips are then ignored.
        """
        self.preprocess = Flips.of(self.preprocess)
        if self.flipped_calibration is None:
            self.drop_calibration()
        self.calibration = self.flipped_calibration

    def drop_calibration(self) -> None:
        """From now on, ignores temperature and threshold, as is right for another input size."""
        if self.calibration is not None:
            log.warning(UNFIT)
        self.calibration = None

    @property
    def temperature(self) -> float:
        """The divisor of the logits."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    def decode(self, image: ImageSource) -> Tensor:
        """One image as (C, H, W) at the input's size, in 0..255.

        It is decoded at full size, so that a file, its bytes, and the array that PIL makes of it
        give the same result.

        Args:
            image: a path, bytes, a file object, a PIL image, an array (H, W[, C]) or a tensor
                ([C, ]H, W); see `read_image`.

        Raises:
            ImageError: it can't be read, or is not an image.
        """
        preprocess = self.preprocess
        channels, value_range = preprocess.input_size[0], preprocess.value_range
        return preprocess.fit(
            to_tensor(read_image(image, channels=channels, value_range=value_range))
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..255 -> (B, classes), float32, scaled by the temperature.

        For several views of each image, (B, views, C, H, W), the result is the mean of their
        probabilities, scaled by the temperature afterwards, as it was fitted to such means.
        """
        if images.ndim == 5:
            views = [self._unscaled(images[:, i].contiguous()) for i in range(images.shape[1])]
            return with_temperature(torch.stack(views).mean(dim=0), self.temperature)
        if self.engine is not None:
            return with_temperature(self.engine(images), self.temperature)
        return self.answers(images).cpu()

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Like `probabilities`, from the network itself, without synchronizing with its device."""
        return (self._logits(images) / self.temperature).softmax(dim=1)

    def _logits(self, images: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        x = self.preprocess.normalize(images.to(device, non_blocking=True))
        logits: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return logits

    @torch.no_grad()
    def _unscaled(self, images: Tensor) -> Tensor:
        """`probabilities` at a temperature of 1."""
        if self.engine is not None:
            return self.engine(images)
        return self._logits(images).softmax(dim=1).cpu()

    def with_distances(self, images: Tensor) -> tuple[Tensor, list[float | None]]:
        """`probabilities`, and each image's distance from the training images.

        The distance is None if it can't be measured. For several views it is the mean.
        """
        if self.familiarity is None or not self.measures_distances:
            return self.probabilities(images), [None] * len(images)
        views = images.unbind(dim=1) if images.ndim == 5 else [images]
        unscaled = images.ndim == 5  # the temperature scales the mean
        answers = [self._with_features(view.contiguous(), unscaled) for view in views]
        each = [self.familiarity.distances(features) for _, features in answers]
        probabilities = torch.stack([p for p, _ in answers]).mean(dim=0)
        if unscaled:
            probabilities = with_temperature(probabilities, self.temperature)
        return probabilities, np.mean(each, axis=0).tolist()

    @property
    def measures_distances(self) -> bool:
        """Whether `with_distances` can: there is `familiarity`, and the engine returns features."""
        able = self.engine is None or getattr(self.engine, "gives_features", False)
        return self.familiarity is not None and able

    def _with_features(
        self, images: Tensor, unscaled: bool = False
    ) -> tuple[Tensor, list[NDArray[np.float32]]]:
        """(B, C, H, W) in 0..255 -> probabilities, and `features`."""
        if self.engine is None:
            answer = self._unscaled if unscaled else self.probabilities
            return self._recorded(answer, images)
        probabilities, vectors = self.engine.with_features(images)  # type: ignore[attr-defined]
        if not unscaled:
            probabilities = with_temperature(probabilities, self.temperature)
        return probabilities, [vectors.cpu().numpy(), appearance(images)]

    def _recorded(
        self, answer: Callable[[Tensor], Tensor], images: Tensor
    ) -> tuple[Tensor, list[NDArray[np.float32]]]:
        """The network's probabilities, and `features`."""
        with inputs_of(last_layers(self.model)) as recorded:
            answered = answer(images)
        if not recorded:
            raise UsageError("this network's classifier receives no features")
        return answered, [joined_features(recorded).cpu().numpy(), appearance(images)]

    def features(self, images: Tensor) -> list[NDArray[np.float32]]:
        """(B, C, H, W) in 0..255 -> the last layer's inputs, and `appearance`; each (B, D).

        Raises:
            UsageError: the network has none.
        """
        with torch.no_grad():
            return self._recorded(self._logits, images)[1]

    def predict(
        self, images: ImageSource | Iterable[ImageSource], top: int = 5
    ) -> list[Prediction]:
        """Classifies one image or several: anything that `decode` accepts, or a 4D batch.

        Raises:
            ImageError: one can't be read, or has no finite prediction; `predict_each` goes on.
        """
        predictions = list(self.predict_each(as_several(images), top))
        for prediction in predictions:
            if prediction.error is not None:
                raise ImageError(prediction.error)
        return predictions

    def predict_each(
        self, images: Iterable[ImageSource], top: int = 5, batch: int = BATCH
    ) -> Iterator[Prediction]:
        """A prediction for each image in order, read ahead by threads; memory use stays constant.

        An image that can't be read results in a `Prediction` with an error.
        """
        count = min(top, len(self.class_names))
        decoded = read_ahead(
            enumerate(images, start=1), self._decode_or_error, default_workers(), 2 * batch
        )
        while chunk := list(islice(decoded, batch)):
            good = [image for _, image in chunk if isinstance(image, Tensor)]
            answers: Iterator[Any] = iter(())
            if good:
                found, distances = self.with_distances(stacked(good))
                answers = zip(found, distances, strict=True)
            for name, image in chunk:
                if isinstance(image, str):
                    yield Prediction(name, [], image)
                else:
                    probabilities, distance = next(answers)
                    yield self.prediction(name, probabilities, distance, count)

    def prediction(
        self, name: str, probabilities: Tensor, distance: float | None, top: int
    ) -> Prediction:
        """The prediction for one image, from its probabilities, (classes,), and its distance."""
        shares = probabilities.tolist()
        if not all(map(math.isfinite, shares)):
            return Prediction(name, [], f"{name}: its answer is not finite")
        # of equal ones the first, as in evaluation
        order = probabilities.argsort(descending=True, stable=True)[:top].tolist()
        listed = [(self.class_names[i], shares[i]) for i in order]
        unlike = self.is_unlike(distance)
        decision = self.decision(shares)
        return Prediction(name, listed, None, tuple(shares), decision, distance, unlike)

    def is_unlike(self, distance: float | None) -> bool | None:
        """Whether an image at this distance is unlike the training images; None if unknown."""
        if self.familiarity is None or distance is None:
            return None
        return not distance <= self.familiarity.threshold  # also for NaN

    def decision(self, probabilities: Sequence[float]) -> str | None:
        """The run's decision from the probabilities of all classes, see `Calibration.decide`."""
        if self.calibration is None:
            return None
        return self.calibration.decide(dict(zip(self.class_names, probabilities, strict=True)))

    def _decode_or_error(self, numbered: tuple[int, ImageSource]) -> tuple[str, Tensor | str]:
        number, image = numbered
        name = name_of(image)
        try:
            return name or f"image {number}", self.decode(image)
        except ImageError as error:
            return (name, str(error)) if name else (f"image {number}", f"image {number}: {error}")


Kind = TypeVar("Kind", bound=Classifier)


def as_several(images: Any) -> Iterable[ImageSource]:
    """One image as a list of one; several unchanged; a batch with four axes as its images."""
    axes = getattr(images, "ndim", None)
    if axes is not None and not isinstance(images, memoryview):
        return images if axes == 4 else [images]
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview)
    if single or hasattr(images, "read") or hasattr(images, "convert"):
        return [images]
    if not isinstance(images, Iterable):
        return [images]  # not an image: `read_image` says what is one
    return images


def stacked(images: list[Tensor]) -> Tensor:
    """Images of one shape as a batch; if their dtypes differ, as float32."""
    if len({i.dtype for i in images}) > 1:
        images = [i.float() for i in images]
    return torch.stack(images)


def with_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities (B, classes) with their logits divided by a temperature."""
    if temperature == 1.0:
        return probabilities
    return (probabilities.double().clamp_min(1e-38).log() / temperature).softmax(dim=1).float()


def use_precision(model: nn.Module, precision: str) -> None:
    """Makes a network and its copies compute in a precision from now on; outputs are float32.

    Args:
        model: the network; its weights stay float32.
        precision: "fp32", or "bf16" for autocast, with probabilities within 0.05.

    Raises:
        UsageError: another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"precision={precision!r}: choose fp32 or bf16")
    vars(model).pop("forward", None)
    if precision == "bf16":
        model.forward = types.MethodType(_forward_in_bf16, model)


def _forward_in_bf16(model: nn.Module, x: Tensor) -> Any:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        found = type(model).forward(model, x)
    return found.float() if isinstance(found, Tensor) else found


def load(
    folder: str | Path,
    device: str = "cpu",
    *,
    calibrated: bool = True,
    precision: str = "fp32",
    flips: bool = False,
) -> Classifier:
    """`load_as` a plain `Classifier`."""
    return load_as(
        Classifier, folder, device, calibrated=calibrated, precision=precision, flips=flips
    )


@torch.inference_mode(False)  # inference-mode parameters would have no gradients for Grad-CAM
def load_as(
    kind: type[Kind],
    folder: str | Path,
    device: str = "cpu",
    *,
    calibrated: bool = True,
    precision: str = "fp32",
    flips: bool = False,
) -> Kind:
    """Implements `regard.load`, with the same arguments and errors, for any class of classifiers.

    Args:
        kind: the class of the result.
        folder, device, calibrated, precision, flips: see `regard.load`.
    """
    where, folder = choose_device(device), network_folder(folder)
    model, config = load_model(folder)
    own = config.get("regard", {})
    try:
        preprocess = Preprocess.from_config(
            model.pretrained_cfg, own.get("normalization", "fixed"), own.get("value_range"),
            own.get("resize_first", False),
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}") from error
    names = config.get("label_names") or [str(i) for i in range(model.num_classes)]
    classifier = kind(model.to(where), names, preprocess, config)
    use_precision(classifier.model, precision)
    if calibrated:
        stored = stored_calibration(folder, names)
        if stored is not None and stored.tta is not None:
            classifier.flipped_calibration = stored
            if not flips:
                log.warning(f"{folder / FILE} {FLIPS_ALONE}")
        else:
            classifier.calibration = stored
        classifier.familiarity = _familiarity(folder)
    if flips:
        classifier.use_flips()
    return classifier


def network_hash(folder: str | Path) -> str:
    """A content hash of the weights in a run's folder."""
    return f"{file_hash(Path(folder) / 'model.safetensors'):016x}"


def stored_calibration(folder: Path, classes: Sequence[str]) -> Calibration | None:
    """The stored calibration, unless it belongs to other weights or classes."""
    stored = read_calibration(folder)
    if stored is None:
        return None
    known = stored.threshold is None or stored.threshold.positive in classes
    if known and stored.network in ("", network_hash(folder)):
        return stored
    log.warning(f"{folder / FILE} was fitted for another network and is not used")
    return None


def _familiarity(folder: Path) -> Familiarity | None:
    """The stored familiarity, unless it belongs to other weights."""
    stored = read_familiarity(folder)
    if stored is None or stored.network in ("", network_hash(folder)):
        return stored
    log.warning(f"{folder / familiarity.FILE} was measured for another network and is not used")
    return None


@torch.no_grad()
def probabilities_of(
    classifier: Classifier,
    source: InMemoryLoader | StreamingLoader,
    count: int,
    *,
    batch: int = BATCH,
    rank: int = 0,
    world: int = 1,
) -> tuple[NDArray[np.int64], NDArray[Any], list[tuple[int, str]]]:
    """Probabilities of this process's share of `count` images, each image once.

    The images are divided into batches, and this process takes every `world`-th batch.

    Returns:
        Rows (n,), float32 probabilities (n, classes), and (row, reason) of unreadable images.
    """
    spans = [(start, min(batch, count - start)) for start in range(0, count, batch)][rank::world]
    most = sum(size for _, size in spans)
    rows = np.zeros(most, np.int64)
    probabilities = np.zeros((most, len(classifier.class_names)), np.float32)
    unreadable: list[tuple[int, str]] = []
    done = 0
    for part in source.batches(spans):
        unreadable += part.unreadable
        if size := len(part.indices):
            rows[done : done + size] = part.indices.numpy()
            probabilities[done : done + size] = classifier.probabilities(part.images).numpy()
            done += size
    return rows[:done], probabilities[:done], unreadable
