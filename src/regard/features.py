"""The features by which a network tells images apart: its classifier's inputs, and pixels."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.attention import of_this_thread


def last_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that make up a network's classifier."""
    get: Any = getattr(model, "get_classifier", None)
    last = None if get is None else get()
    if isinstance(last, nn.ModuleList | tuple | list):
        return list(last)
    return [last] if isinstance(last, nn.Module) else []


@contextlib.contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects the inputs of the modules in this thread, in the order of their calls."""
    recorded: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for module in modules:
            keep = of_this_thread(lambda _, inputs: recorded.append(inputs[0]))
            hook = module.register_forward_pre_hook(keep)
            hooks.callback(hook.remove)
        yield recorded


def joined_features(features: Sequence[Tensor]) -> Tensor:
    """Vectors (B, d), or maps (B, d, h, w), which are averaged, as one (B, D), float32."""
    vectors = [f.flatten(2).mean(dim=2) if f.ndim > 2 else f for f in features]
    return torch.cat(vectors, dim=1).float()


def appearance(images: Tensor) -> NDArray[np.float32]:
    """Statistics of pixels: (B, C, H, W) in 0..255 -> (B, 2 C + 4).

    Each channel's mean and logarithmic standard deviation, and the logarithmic mean differences of
    neighbors along rows and columns, in the image and in a copy 4 times smaller.
    """
    x = images.detach().float().cpu() / 255
    found = [x.mean(dim=(2, 3)), (x.std(dim=(2, 3), correction=0) + 1e-3).log()]
    small = F.adaptive_avg_pool2d(x, (max(2, x.shape[2] // 4), max(2, x.shape[3] // 4)))
    for pixels in (x, small):
        for axis in (2, 3):
            difference = pixels.diff(dim=axis).abs().mean(dim=(1, 2, 3))
            found.append((difference + 1e-3).log()[:, None])
    return torch.cat(found, dim=1).numpy()
