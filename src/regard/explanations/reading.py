"""An image prepared for explaining: the network's input, the picture, and the part seen."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.images import ImageSource, read_image, to_channels
from regard.data.preprocess import Preprocess, to_tensor
from regard.explanations.overlay import Box, Picture
from regard.predict import Classifier


def read_to_explain(classifier: Classifier, image: ImageSource) -> tuple[Tensor, Picture, Box]:
    """An image as the network's input (1, C, H, W) and as a picture, and the box the network sees.

    With test-time augmentation, this is the unchanged view.

    Raises:
        ImageError: it can't be read.
    """
    preprocess, weights = classifier.preprocess, next(classifier.model.parameters())
    pixels = read_image(image, value_range=preprocess.value_range)
    # one view, even if `preprocess` makes several
    fitted = Preprocess.fit(preprocess, to_tensor(to_channels(pixels, preprocess.input_size[0])))
    x = preprocess.normalize(fitted[None].to(weights.device))  # as Classifier.decode does
    x = x.contiguous(memory_format=torch.channels_last)
    return x, as_picture(pixels), preprocess.seen(*pixels.shape[:2])


def as_picture(pixels: NDArray[Any]) -> Picture:
    """A decoded image (H, W, C) of any depth as uint8, (H, W) or (H, W, 3)."""
    if pixels.dtype != np.uint8:
        scale = 255 / 65535 if pixels.dtype == np.uint16 else 255.0
        pixels = np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels
