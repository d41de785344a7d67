"""Runs the network for the server: one thread, in which waiting requests form one batch.

An image that is alone in its batch gets exactly the probabilities of `regard predict` for that
file alone. In a larger batch float32 sums are computed in another order: probabilities then
differ by less than 1e-6, as they do within `regard predict` for several files.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regard.attention import attention_kinds
from regard.cores import cores
from regard.data.images import read_image
from regard.errors import ImageError
from regard.explanations.explanation import Explanation, explain_batch
from regard.explanations.overlay import Box, Picture
from regard.explanations.reading import as_picture
from regard.predict import Classifier, Prediction
from regard.serve.uploads import as_file

BATCH = 16  # images in a batch
SHOWN = 1024  # longer side of a returned picture, in pixels
READERS = 4  # images decoded, and pictures drawn, at the same time
LARGE = 12_000_000  # pixels; larger images are decoded one at a time

T = TypeVar("T")


@dataclass(frozen=True)
class Upload:
    """A checked image file: its bytes, and its number of pixels as `uploads.check` counts them."""

    body: bytes
    pixels: int


@dataclass
class _Waiting:
    image: Tensor
    answer: "asyncio.Future[tuple[Tensor, float | None]]"


class BatchingWorker:
    """Runs the network in one thread, as hooks that record attention must see only one image.

    A few more threads decode and draw. That bounds the memory of all requests together, and work
    whose request is abandoned while it waits is never started.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.thread: ThreadPoolExecutor = ThreadPoolExecutor(1, thread_name_prefix="network")
        readers = min(READERS, cores())
        self.readers: ThreadPoolExecutor = ThreadPoolExecutor(readers, thread_name_prefix="reader")
        self.one_large: threading.Lock = threading.Lock()
        self.waiting: list[_Waiting] = []
        self.task: asyncio.Task[None] | None = None

    async def in_reader(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs work that does not need the network in one of the reader threads."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work, *arguments)

    @contextmanager
    def _file_of(self, upload: Upload) -> Iterator[Path]:
        """The upload as a file; one large image at a time, which bounds the memory."""
        alone = self.one_large if upload.pixels > LARGE else nullcontext()
        with alone, as_file(upload.body) as path:
            yield path

    def _decode(self, upload: Upload) -> Tensor:
        with self._file_of(upload) as path:
            return self.classifier.decode(path)

    async def predict(self, upload: Upload, top: int) -> Prediction:
        """The prediction for a checked upload, with the `top` most probable classes.

        Raises:
            HTTPException: 422 it can't be read.
            ImageError: the network's output is not finite.
        """
        loop = asyncio.get_running_loop()
        mine = _Waiting(await self.in_reader(self._decode, upload), loop.create_future())
        self.waiting.append(mine)
        if self.task is None or self.task.done():
            self.task = loop.create_task(self._answer())
        return self._prediction(*await mine.answer, top)

    def _prediction(self, probabilities: Tensor, distance: float | None, top: int) -> Prediction:
        prediction = self.classifier.prediction("the image", probabilities, distance, top)
        if prediction.error is not None:
            raise ImageError(prediction.error)
        return prediction

    async def _answer(self) -> None:
        """Answers all waiting requests, batch by batch; new ones form the next batch."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting[:BATCH], self.waiting[BATCH:]
            batch = [w for w in batch if not w.answer.done()]  # done: its request was abandoned
            if not batch:
                continue
            images = [w.image for w in batch]
            if len({i.dtype for i in images}) > 1:
                images = [i.float() for i in images]
            try:
                answers = await loop.run_in_executor(self.thread, self._run, images)
            except Exception as error:
                for w in batch:
                    if not w.answer.done():
                        w.answer.set_exception(error)
                continue
            for w, answer in zip(batch, answers, strict=True):
                if not w.answer.done():
                    w.answer.set_result(answer)

    def _run(self, images: list[Tensor]) -> list[tuple[Tensor, float | None]]:
        return list(zip(*self.classifier.with_distances(torch.stack(images)), strict=True))

    async def explain(
        self, upload: Upload, target: str | None
    ) -> tuple[Explanation, Box, float | None]:
        """Where the network looked at a checked upload, and Grad-CAM for a class.

        Returns:
            The explanation, whose image has at most SHOWN pixels a side, the box that the
            network saw, in pixels of the upload, and the distance from the training images.

        Raises:
            HTTPException: 422 it can't be read.
            ImageError: the network's output is not finite.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, self._explain, upload, target)

    def _explain(self, upload: Upload, target: str | None) -> tuple[Explanation, Box, float | None]:
        preprocess, model = self.classifier.preprocess, self.classifier.model
        names = self.classifier.class_names
        with self._file_of(upload) as path:
            decoded = self.classifier.decode(path)[None]
            x = preprocess.normalize(decoded)
            pixels = read_image(path, value_range=preprocess.value_range)
            picture = _shown(pixels)
        # an engine's output differs in the last digits: this way both routes give the engine's
        told = self.classifier.engine is not None or self.classifier.familiarity is not None
        said = self._prediction(*self._run([decoded[0]])[0], len(names)) if told else None
        box = preprocess.seen(*pixels.shape[:2])
        down, across = picture.shape[0] / pixels.shape[0], picture.shape[1] / pixels.shape[1]
        device = next(model.parameters()).device
        own = ("attention",) if attention_kinds(model) else ()
        (explanation,) = explain_batch(
            model, x.to(device).contiguous(memory_format=torch.channels_last), [picture],
            [(box[0] * across, box[1] * down, box[2] * across, box[3] * down)],
            classes=names, target=said.classes[0][0] if said and target is None else target,
            methods=(*own, "gradcam"), temperature=self.classifier.temperature, paths=["the image"],
        )  # fmt: skip
        if said is None:
            return explanation, box, None
        name = explanation.target[0]
        target_said = name, dict(said.classes)[name]
        return replace(explanation, classes=said.classes, target=target_said), box, said.distance

    def close(self) -> None:
        """Waits for work in progress; work that has not started is dropped."""
        self.readers.shutdown(cancel_futures=True)
        self.thread.shutdown(cancel_futures=True)


def _shown(pixels: NDArray[Any]) -> Picture:
    """A decoded image as uint8, with its longer side reduced to SHOWN pixels."""
    if pixels.dtype == np.uint8:
        picture: Picture = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    else:  # as_picture computes in float64: a strip at a time
        strips = np.array_split(pixels, 1 + pixels.size // 2**22)
        picture = np.concatenate([as_picture(strip) for strip in strips if len(strip)])
    height, width = picture.shape[:2]
    factor = SHOWN / max(height, width)
    if factor >= 1:
        return picture
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
