"""A trained network with all that its folder says: `load` reads it, and it classifies images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.data.images import read_image, to_channels
from regard.data.loading import InMemoryLoader, StreamingLoader, default_workers, read_ahead
from regard.data.preprocess import Preprocess, to_tensor
from regard.errors import ImageError
from regard.models.io import load_model

BATCH = 32
ImageLike = str | Path | NDArray[Any] | Any  # a file, an array (H, W[, C]), or a PIL image


@dataclass(frozen=True)
class Prediction:
    """One image: its classes and their probabilities, the likeliest first; or why it has none."""

    path: str
    classes: list[tuple[str, float]]
    error: str | None = None


class Classifier:
    """A network with its classes' names and its preprocessing.

    Attributes:
        model: put in evaluation mode, its weights in channels_last.
        class_names: in the order of its outputs.
        preprocess: from a decoded image to its input.
        config: the folder's config.json, under "regard" what timm does not know.
        engine: what answers instead of the model itself, see `regard.engines`; None: nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        preprocess: Preprocess,
        config: dict[str, Any] | None = None,
    ) -> None:
        # an input of one channel is of both layouts: only the weights can tell which is meant
        self.model = model.eval().to(memory_format=torch.channels_last)
        self.class_names = list(class_names)
        self.preprocess = preprocess
        self.config = config or {}
        self.engine: Callable[[Tensor], Tensor] | None = None

    def decode(self, image: ImageLike) -> Tensor:
        """One image as (C, H, W) of the input's size, in 0..255.

        Raises:
            ImageError: the file can't be read, or the array is no image.
        """
        channels = self.preprocess.input_size[0]
        if isinstance(image, str | Path):
            pixels = read_image(image, channels=channels, at_least=self.preprocess.at_least)
        else:
            pixels = to_channels(_as_pixels(image), channels)
        return self.preprocess.fit(to_tensor(pixels))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..255 -> (B, classes), float32."""
        if self.engine is not None:
            return self.engine(images)
        device = next(self.model.parameters()).device
        x = self.preprocess.normalize(images.to(device))
        return self.model(x.contiguous(memory_format=torch.channels_last)).softmax(dim=1).cpu()

    def predict(self, images: ImageLike | Iterable[ImageLike], top: int = 5) -> list[Prediction]:
        """Classifies files, arrays (H, W[, C]) or PIL images, one or several.

        Raises:
            ImageError: one can't be read; `predict_each` goes on instead.
        """
        if isinstance(images, str | Path | np.ndarray) or hasattr(images, "convert"):
            images = [images]
        answers = list(self.predict_each(images, top))
        for answer in answers:
            if answer.error is not None:
                raise ImageError(answer.error)
        return answers

    def predict_each(
        self, images: Iterable[ImageLike], top: int = 5, batch: int = BATCH
    ) -> Iterator[Prediction]:
        """An answer for each image in turn, read ahead by threads; memory stays constant."""
        count = min(top, len(self.class_names))
        decoded = read_ahead(images, self._decode_or_error, default_workers(), 2 * batch)
        while chunk := list(islice(decoded, batch)):
            good = [image for _, image in chunk if isinstance(image, Tensor)]
            answers: Iterator[Any] = iter(())
            if good:
                best = self.probabilities(_stack(good)).topk(count)
                answers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for name, image in chunk:
                if isinstance(image, Tensor):
                    rows = zip(*next(answers), strict=True)
                    yield Prediction(name, [(self.class_names[i], p) for i, p in rows])
                else:
                    yield Prediction(name, [], image)

    def _decode_or_error(self, image: ImageLike) -> tuple[str, Tensor | str]:
        name = str(image) if isinstance(image, str | Path) else "image"
        try:
            return name, self.decode(image)
        except ImageError as error:
            return name, str(error)


def _stack(images: list[Tensor]) -> Tensor:
    if len({i.dtype for i in images}) > 1:
        images = [i.float() for i in images]
    return torch.stack(images)


def _as_pixels(image: Any) -> NDArray[Any]:
    if hasattr(image, "convert"):  # PIL's, without importing it
        mode = "L" if image.mode in ("L", "1") else "RGB"
        image = np.asarray(image.convert(mode))
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    good = pixels.ndim == 3 and pixels.shape[2] in (1, 3) and pixels.size
    if not good or pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise ImageError(
            f"an array of {pixels.dtype} {pixels.shape}: (H, W), (H, W, 1) or (H, W, 3) of uint8, "
            "uint16, or float32 in 0..1 is needed"
        )
    return pixels


def load(folder: str | Path) -> Classifier:
    """The network of a run's folder, or of any folder in timm's `local-dir` layout.

    Raises:
        UsageError: the folder holds no network, or one that can't be loaded.
    """
    model, config = load_model(folder)
    normalization = config.get("regard", {}).get("normalization", "fixed")
    preprocess = Preprocess.from_config(model.pretrained_cfg, normalization)
    names = config.get("label_names") or [str(i) for i in range(model.num_classes)]
    return Classifier(model, names, preprocess, config)


@torch.no_grad()
def probabilities_of(
    classifier: Classifier,
    source: InMemoryLoader | StreamingLoader,
    count: int,
    *,
    batch: int = BATCH,
    rank: int = 0,
    world: int = 1,
) -> tuple[NDArray[np.int64], NDArray[np.float64], list[tuple[int, str]]]:
    """This process's share of `count` images, none of them twice: rows, (n, classes), unreadable.

    The images are cut into batches, and every `world`-th is this process's.
    """
    spans = [(start, min(batch, count - start)) for start in range(0, count, batch)][rank::world]
    rows: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    found = [np.zeros((0, len(classifier.class_names)))]
    unreadable = []
    for part in source.batches(spans):
        unreadable += part.unreadable
        if len(part.indices):
            rows.append(part.indices.numpy())
            found.append(classifier.probabilities(part.images).double().numpy())
    return np.concatenate(rows), np.concatenate(found), unreadable
