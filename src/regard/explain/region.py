"""Which part of an image a network saw, through the transform that prepared it."""

from typing import Any

from PIL import Image

from regard.explain.overlay import Box

_STILL = frozenset(
    {
        "ConvertImageDtype", "Grayscale", "Identity", "MaybePILToTensor", "MaybeToTensor",
        "Normalize", "PILToTensor", "RGB", "ToDtype", "ToImage", "ToNumpy", "ToPureTensor",
        "ToTensor",
    }
)  # fmt: skip
_SCALING = frozenset({"Resize", "ResizeKeepRatio"})
_CENTRED = frozenset({"CenterCrop", "CenterCropOrPad"})


def seen_box(transform: Any, size: tuple[int, int]) -> Box:
    """The part of an image that a network sees through a transform of torchvision's or timm's.

    Follows resizing and centre crops (with padding), in any order, back to the original; what
    does not move pixels is passed over.

    Args:
        transform: Compose, or one transform.
        size: (height, width) of the original, in pixels.

    Returns:
        left, top, right, bottom in the original's pixels; beyond the image where it is padded.

    Raises:
        ValueError: a transform that moves pixels in another way.
    """
    height, width = size
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    for step in getattr(transform, "transforms", [transform]):
        kind = type(step).__name__
        if kind in _STILL:
            continue
        if kind not in _SCALING | _CENTRED:
            raise ValueError(f"{kind}: what it shows can't be followed back to the image")
        # the transform itself says what size it gives
        new_width, new_height = step(Image.new("L", (width, height))).size
        if kind in _CENTRED:
            x, y = (right - left) / width, (bottom - top) / height  # original pixels a pixel
            left += _offset(width, new_width) * x
            top += _offset(height, new_height) * y
            right, bottom = left + new_width * x, top + new_height * y
        height, width = new_height, new_width
    return left, top, right, bottom


def _offset(before: int, after: int) -> int:
    """Where a centre crop begins, or minus the padding before the image, as torchvision rounds."""
    return round((before - after) / 2.0) if after <= before else -((after - before) // 2)
