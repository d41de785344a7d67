"""The network behind the page: one thread uses it, and what waits is answered in one batch."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.attention import attention_kinds
from regard.data.images import to_channels
from regard.data.preprocess import to_tensor
from regard.explain.maps import Explanation, explain
from regard.explain.of_run import as_picture
from regard.prediction import Classifier

MOST = 16  # images of a batch
SHOWN = 1024  # the longer side of a picture that is sent back, in pixels


@dataclass
class _Waiting:
    image: Tensor
    answer: "asyncio.Future[NDArray[np.float32]]"


class Engine:
    """Answers in one thread: hooks that record attention must see their own image only."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="network")
        self.waiting: list[_Waiting] = []
        self.task: asyncio.Task[None] | None = None
        self.batches: list[int] = []  # sizes of the last ones

    def _fit(self, pixels: NDArray[Any]) -> Tensor:
        channels = self.classifier.preprocess.input_size[0]
        return self.classifier.preprocess.fit(to_tensor(to_channels(pixels, channels)))

    async def predict(self, pixels: NDArray[Any], top: int) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities."""
        loop = asyncio.get_running_loop()
        image = await loop.run_in_executor(None, self._fit, pixels)
        mine = _Waiting(image, loop.create_future())
        self.waiting.append(mine)
        if self.task is None or self.task.done():
            self.task = loop.create_task(self._answer())
        p = await mine.answer
        order = np.argsort(-p, kind="stable")[:top]
        return [(self.classifier.class_names[i], float(p[i])) for i in order]

    async def _answer(self) -> None:
        """Answers all that wait, a batch at a time; what comes meanwhile is the next batch."""
        loop = asyncio.get_running_loop()
        while self.waiting:
            batch, self.waiting = self.waiting[:MOST], self.waiting[MOST:]
            images = [w.image for w in batch]
            if len({i.dtype for i in images}) > 1:
                images = [i.float() for i in images]
            try:
                found = await loop.run_in_executor(self.thread, self._run, torch.stack(images))
            except Exception as error:
                for w in batch:
                    if not w.answer.done():
                        w.answer.set_exception(error)
                continue
            self.batches = [*self.batches[-99:], len(batch)]
            for w, p in zip(batch, found, strict=True):
                if not w.answer.done():  # its request may have timed out
                    w.answer.set_result(p)

    def _run(self, images: Tensor) -> NDArray[np.float32]:
        return self.classifier.probabilities(images).numpy()

    async def explain(self, pixels: NDArray[Any], target: str | None) -> Explanation:
        """Where the network looked, and Grad-CAM for a class."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, self._explain, pixels, target)

    def _explain(self, pixels: NDArray[Any], target: str | None) -> Explanation:
        preprocess, model = self.classifier.preprocess, self.classifier.model
        x = preprocess.normalise(self._fit(pixels)[None])
        box = preprocess.seen(*pixels.shape[:2])
        own = ("attention",) if attention_kinds(model) else ()
        (found,) = explain(
            model, x, [as_picture(pixels)], [box], classes=self.classifier.class_names,
            target=target, methods=(*own, "gradcam"),
        )  # fmt: skip
        return found

    def close(self) -> None:
        """Waits for what is in work."""
        self.thread.shutdown()


def npz_bytes(found: Explanation) -> bytes:
    """The raw maps, as `regard explain` writes them."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(prefix="regard-") as folder:
        path = Path(folder, "maps.npz")
        found.save_npz(path)
        return path.read_bytes()


def figure_bytes(found: Explanation) -> bytes:
    """The figure as PNG, as `regard explain` writes it."""
    buffer = io.BytesIO()
    found.figure().savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
