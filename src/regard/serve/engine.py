"""The network behind the page: one thread uses it, and what waits is answered in one batch.

An image that is alone in its batch gets what `regard predict` says of that file alone, to the
last bit. Together with others float32 sums are made in another order: probabilities then
differ by less than 1e-6, as they do within `regard predict` of several files.
"""

import asyncio
import io
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regard.attention import attention_kinds
from regard.data.images import read_image
from regard.explanations.explanation import Explanation, as_picture, explain
from regard.explanations.overlay import Box, Picture
from regard.predict import Classifier
from regard.serve.uploads import as_file

MOST = 16  # images of a batch
SHOWN = 1024  # the longer side of a picture that is sent back, in pixels
READERS = 4  # images that are decoded, and pictures that are drawn, at the same moment

T = TypeVar("T")


@dataclass
class _Waiting:
    image: Tensor
    answer: "asyncio.Future[Tensor]"


@dataclass(frozen=True)
class Looked:
    """An explanation to send back.

    Attributes:
        found: its image at most SHOWN pixels a side, its box in that image's pixels.
        box: the same box in the upload's pixels.
    """

    found: Explanation
    box: Box

    def npz(self) -> bytes:
        """The raw maps, as `regard explain` writes them."""
        with tempfile.TemporaryDirectory(prefix="regard-") as folder:
            path = Path(folder, "maps.npz")
            replace(self.found, box=self.box).save_npz(path)
            return path.read_bytes()

    def png(self) -> bytes:
        """The figure, as `regard explain` draws it."""
        buffer = io.BytesIO()
        self.found.figure().savefig(buffer, format="png", dpi=200)
        return buffer.getvalue()


class Engine:
    """Answers in one thread: hooks that record attention must see their own image only.

    Few threads read and draw, so that what a request holds in memory is bounded, and work that
    was given up while it waited is never begun.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        readers = min(READERS, os.cpu_count() or 1)
        self.readers = ThreadPoolExecutor(readers, thread_name_prefix="reader")
        self.waiting: list[_Waiting] = []
        self.task: asyncio.Task[None] | None = None

    async def beside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Runs what needs no network, beside it."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work, *arguments)

    def _decode(self, body: bytes) -> Tensor:
        with as_file(body) as path:
            return self.classifier.decode(path)

    async def predict(self, body: bytes, top: int) -> list[tuple[str, float]]:
        """The likeliest classes of a checked upload with their probabilities.

        Raises:
            HTTPException: 422 it can't be read.
        """
        loop = asyncio.get_running_loop()
        mine = _Waiting(await self.beside(self._decode, body), loop.create_future())
        self.waiting.append(mine)
        if self.task is None or self.task.done():
            self.task = loop.create_task(self._answer())
        best = (await mine.answer).topk(top)
        names = [self.classifier.class_names[i] for i in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))

    async def _answer(self) -> None:
        """Answers all that wait, a batch at a time; what comes meanwhile is the next batch."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting[:MOST], self.waiting[MOST:]
            batch = [w for w in batch if not w.answer.done()]  # its request may be given up
            if not batch:
                continue
            images = [w.image for w in batch]
            if len({i.dtype for i in images}) > 1:
                images = [i.float() for i in images]
            try:
                found = await loop.run_in_executor(self.thread, self._run, images)
            except Exception as error:
                for w in batch:
                    if not w.answer.done():
                        w.answer.set_exception(error)
                continue
            for w, p in zip(batch, found, strict=True):
                if not w.answer.done():
                    w.answer.set_result(p)

    def _run(self, images: list[Tensor]) -> Tensor:
        return self.classifier.probabilities(torch.stack(images))

    async def explain(self, body: bytes, target: str | None) -> Looked:
        """Where the network looked at a checked upload, and Grad-CAM for a class.

        Raises:
            HTTPException: 422 it can't be read.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, self._explain, body, target)

    def _explain(self, body: bytes, target: str | None) -> Looked:
        preprocess, model = self.classifier.preprocess, self.classifier.model
        with as_file(body) as path:
            x = preprocess.normalize(self.classifier.decode(path)[None])
            pixels = read_image(path, value_range=preprocess.value_range)
        box = preprocess.seen(*pixels.shape[:2])
        picture = _shown(pixels)
        down, across = picture.shape[0] / pixels.shape[0], picture.shape[1] / pixels.shape[1]
        device = next(model.parameters()).device
        own = ("attention",) if attention_kinds(model) else ()
        (found,) = explain(
            model, x.to(device).contiguous(memory_format=torch.channels_last), [picture],
            [(box[0] * across, box[1] * down, box[2] * across, box[3] * down)],
            classes=self.classifier.class_names, target=target, methods=(*own, "gradcam"),
        )  # fmt: skip
        return Looked(found, box)

    def close(self) -> None:
        """Waits for what is in work."""
        self.readers.shutdown()
        self.thread.shutdown()


def _shown(pixels: NDArray[Any]) -> Picture:
    """A decoded image as uint8, made no larger than SHOWN, its aspect kept."""
    if pixels.dtype == np.uint8:
        picture: Picture = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    else:  # as_picture works in float64: a strip at a time
        strips = np.array_split(pixels, 1 + pixels.size // 2**22)
        picture = np.concatenate([as_picture(strip) for strip in strips if len(strip)])
    height, width = picture.shape[:2]
    factor = SHOWN / max(height, width)
    if factor >= 1:
        return picture
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
