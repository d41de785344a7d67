"""Arrays and tensors as images: unambiguous shapes and types are accepted, others refused."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import ImageError

_KINDS = "uint8 (0 to 255), uint16 (0 to 65535) or floats from 0 to 1"


def array_pixels(array: NDArray[Any]) -> NDArray[Any]:
    """(H, W) or (H, W, C) of numbers -> (H, W, C) of uint8, uint16, int64 or float64.

    Raises:
        ImageError: another shape or type; the message says what is expected.
    """
    return _pixels(array, "an array", "(H, W), (H, W, 1) or (H, W, 3)")


def tensor_pixels(tensor: Any) -> NDArray[Any]:
    """A tensor (H, W) or (C, H, W) -> (H, W, C) of uint8, uint16, int64 or float64.

    Raises:
        ImageError: another shape or type; the message says what is expected.
    """
    shape = tuple(tensor.shape)
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.double()  # NumPy has no bfloat16
    if len(shape) == 3:
        if shape[0] not in (1, 2, 3, 4):
            hint = " (a tensor's channels come first)" if shape[2] in (1, 3) else ""
            raise ImageError(
                f"a tensor of {tensor.dtype} and shape {shape}{hint}: one image is (H, W), "
                f"(1, H, W) or (3, H, W) of {_KINDS}"
            )
        tensor = tensor.movedim(0, 2)  # (C, H, W) -> (H, W, C)
    return _pixels(tensor.numpy(), "a tensor", "(H, W), (1, H, W) or (3, H, W)")


def _pixels(array: NDArray[Any], what: str, expected: str) -> NDArray[Any]:
    kind = array.dtype.kind
    if kind in "uif" and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    pixels = array[..., None] if array.ndim == 2 else array
    good_shape = pixels.ndim == 3 and pixels.shape[2] in (1, 2, 3, 4) and pixels.size
    if not good_shape or kind not in "buif":
        hint = ""
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and what == "an array":
            hint = " (an array's channels come last)"
        raise ImageError(
            f"{what} of {array.dtype} and shape {array.shape}{hint}: one image is {expected} of "
            f"{_KINDS}"
        )
    if kind == "b":
        return pixels.astype(np.uint8) * 255
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    if kind == "f":
        return pixels.astype(np.float64)
    if pixels.shape[2] in (2, 4):
        raise ImageError(f"{what} of {array.dtype} with alpha: {_KINDS} is expected")
    return pixels.astype(np.int64)


def over_white(values: NDArray[Any]) -> NDArray[Any]:
    """(H, W, C + alpha) of uint16, or of floats from 0 to 1, -> (H, W, C) over white."""
    white = 65535 if values.dtype == np.uint16 else 1.0
    color, alpha = values[..., :-1].astype(np.float64), values[..., -1:] / white
    laid = white + (color - white) * alpha
    return np.rint(laid).astype(np.uint16) if values.dtype == np.uint16 else laid
