"""What happens to a decoded image before the network: one definition for training, test,
prediction, explanation and export, read from and written to a network's folder.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2.functional import ten_crop

from regard.errors import UsageError
from regard.files import plural

RESIZES = ("squash", "crop", "pad")
_TIMM_MODES = {"squash": "squash", "crop": "center", "pad": "border"}

LONGEST = 16  # sides' ratio beyond which `resize_first` would take much memory
MOST_SHRUNK = 50  # largest reduction on GPUs: torch's kernel lacks shared memory for 90 (AMD's: 60)

Box = tuple[float, float, float, float]


_CONSTANTS: dict[Any, Tensor] = {}


def constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Numbers in float32 on a device, made once per device, as making them synchronizes with it."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float32, device=device)
    if (values, device) not in _CONSTANTS:
        _CONSTANTS[values, device] = torch.tensor(values, dtype=torch.float32, device=device)
    return _CONSTANTS[values, device]


def to_tensor(image: NDArray[Any]) -> Tensor:
    """(H, W, C) uint8, uint16 or float in 0..1 -> (C, H, W) in 0..255: uint8, else float32."""
    if image.dtype == np.uint8:
        pixels = np.require(image, requirements=["C", "W"])  # PIL's arrays can't be written
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    scale = 255 / 65535 if image.dtype == np.uint16 else 255.0
    return torch.from_numpy(image.astype(np.float32) * np.float32(scale)).permute(2, 0, 1)


def resample(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """The region (left, top, right, bottom) of (C, H, W), resized to (C, *size), antialiased.

    torch resizes along the rows first. Where that would take several times the memory of the
    image and the result, as for an image 1 pixel wide that becomes lower and wider, the columns
    are resized first.
    """
    left, top, right, bottom = box
    region = image[:, top:bottom, left:right]
    height, width = region.shape[-2:]
    if (height, width) == size:
        return region.contiguous()
    if height * size[1] > 4 * max(height * width, size[0] * size[1]):
        region = _interpolate(region, (size[0], width))
    return _interpolate(region, size)


def _interpolate(image: Tensor, size: tuple[int, int]) -> Tensor:
    # torch (seen in 2.14) mixes up the rows of floats if the result is 1 pixel wide, and the values
    # of bytes whose strides differ from a new tensor's, which contiguous() keeps if a side is 1
    transposed = size[1] == 1
    image = image.mT if transposed else image
    image = image.clone(memory_format=torch.contiguous_format) if 1 in image.shape else image
    image = image.contiguous()
    size = size[::-1] if transposed else size
    resize = functools.partial(F.interpolate, size=size, mode="bilinear", antialias=True)
    device = image.device
    if max(image.shape[-2] / size[0], image.shape[-1] / size[1]) > MOST_SHRUNK:
        image = image.cpu()
    if image.dtype == torch.uint8 and image.device.type != "cpu":  # GPUs only resize floats
        resized = resize(image[None].float())[0].round_().clamp_(0, 255).to(torch.uint8)
    else:
        resized = resize(image[None])[0].to(device)
    return resized.mT.contiguous() if transposed else resized


@dataclass(frozen=True)
class Preprocess:
    """Resize, scale and standardize.

    Attributes:
        input_size: (C, H, W) of the network's input.
        mean, std: of each channel, on a scale of 0 to 1; not used if `normalization` is
            "image".
        resize: "squash" the whole image, "crop" its center to the input's aspect, or "pad"
            it with margins of its mean.
        crop_pct: fraction of the side that the center crop covers, as timm's for its crop
            modes; with "squash" and "pad", 1 covers the whole image.
        normalization: "fixed", by mean and std, or "image", each image by its own statistics.
        resize_first: with "crop", resize the whole image and then crop it (torchvision's Resize
            and CenterCrop), instead of resizing only the cropped region. The results differ by
            a fraction of a pixel.
        value_range: lowest and highest value of measurements (signed, 32-bit and float images)
            in the training data, which become 0 and 1; None if there are none. See `read_image`.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "crop"
    crop_pct: float = 1.0
    normalization: str = "fixed"
    value_range: tuple[float, float] | None = None
    resize_first: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.input_size[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `fit` returns."""
        return self.input_size

    @property
    def at_least(self) -> int:
        """The shorter side that a decoded image needs so that its middle is not enlarged."""
        return math.ceil(max(self.size) / self.crop_pct)

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom): the part of an image that the network sees."""
        y, x = self._scales(height, width)
        rows = max(1, min(height, round(self.size[0] / y)))
        columns = max(1, min(width, round(self.size[1] / x)))
        top, left = (height - rows) // 2, (width - columns) // 2
        return left, top, left + columns, top + rows

    def seen(self, height: int, width: int) -> Box:
        """(left, top, right, bottom) of what the input shows, in the image's own pixels.

        Equals `box`, except that margins ("pad") extend it beyond the image, and that with
        `resize_first` it is exact to a fraction of a pixel.
        """
        if self._resizes_first(height, width):
            (h, w), (rows, columns) = self.size, self._whole_size(height, width)
            (top, left), y, x = self._corner(rows, columns), height / rows, width / columns
            return left * x, top * y, (left + w) * x, (top + h) * y
        if self.resize != "pad":
            left, top, right, bottom = self.box(height, width)
            return float(left), float(top), float(right), float(bottom)
        (h, w), (left, top, right, bottom) = self.size, self.box(height, width)
        rows, columns = self._inner(height, width)
        y, x = (bottom - top) / rows, (right - left) / columns  # image pixels per input pixel
        above, before = (h - rows) // 2, (w - columns) // 2
        return (
            left - before * x, top - above * y, left + (w - before) * x, top + (h - above) * y,
        )  # fmt: skip

    def _inner(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the part inside the margins of "pad"."""
        (h, w), (y, x) = self.size, self._scales(height, width)
        left, top, right, bottom = self.box(height, width)
        return max(1, min(h, round((bottom - top) * y))), max(1, min(w, round((right - left) * x)))

    def _scales(self, height: int, width: int) -> tuple[float, float]:
        """The vertical and horizontal scale factors from image to input."""
        y, x = self.size[0] / height, self.size[1] / width
        if self.resize != "squash":
            y = x = max(y, x) if self.resize == "crop" else min(y, x)
        return y / self.crop_pct, x / self.crop_pct

    def fit(self, image: Tensor) -> Tensor:
        """(C, H, W) of any size in 0..255 -> (C, *size), of the same dtype."""
        _, height, width = image.shape
        if self._resizes_first(height, width):
            return self._resize_and_crop(image)
        box = self.box(height, width)
        if self.resize != "pad":
            return resample(image, box, self.size)
        (h, w), inner = self.size, self._inner(height, width)
        small = resample(image, box, inner)
        fill = small.float().mean(dim=(1, 2), keepdim=True).round()
        out = fill.to(small.dtype).expand(-1, h, w).clone()
        top, left = (h - inner[0]) // 2, (w - inner[1]) // 2
        out[:, top : top + inner[0], left : left + inner[1]] = small
        return out

    def _resizes_first(self, height: int, width: int) -> bool:
        """Whether an image is resized as a whole and then cropped."""
        is_strip = max(height, width) > LONGEST * min(height, width)
        return self.resize_first and self.resize == "crop" and not is_strip

    def _resize_and_crop(self, image: Tensor) -> Tensor:
        """(C, H, W) -> (C, *size): torchvision's Resize of the limiting side, then CenterCrop."""
        (h, w), resized = self.size, self._resized(image)
        top, left = self._corner(*resized.shape[-2:])
        return resized[:, top : top + h, left : left + w].contiguous()

    def _corner(self, rows: int, columns: int) -> tuple[int, int]:
        """The first row and column of the center of a resized image, computed as by CenterCrop."""
        return round((rows - self.size[0]) / 2), round((columns - self.size[1]) / 2)

    def _resized(self, image: Tensor) -> Tensor:
        """(C, H, W) -> the whole image, resized so that the limiting side is size / crop_pct."""
        _, height, width = image.shape
        return resample(image, (0, 0, width, height), self._whole_size(height, width))

    def _whole_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what `_resized` returns."""
        h, w = self.size
        if h / height >= w / width:
            rows = math.floor(h / self.crop_pct)
            return rows, max(w, int(rows * width / height))
        columns = math.floor(w / self.crop_pct)
        return max(h, int(columns * height / width)), columns

    def at_size(self, height: int, width: int) -> "Preprocess":
        """The same preprocessing, with the same crop_pct, for another input size."""
        return replace(self, input_size=(self.input_size[0], height, width))

    def without_normalization(self) -> "Preprocess":
        """The same preprocessing, with a `normalize` that leaves the values unchanged."""
        mean, std = (0.0,) * self.input_size[0], (1 / 255,) * self.input_size[0]
        return replace(self, mean=mean, std=std, normalization="fixed")

    def normalize(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..255 -> standardized float32."""
        x = images.float()
        if self.normalization == "image":
            return normalize_each(x)
        mean = constant(self.mean, x.device).view(1, -1, 1, 1) * 255
        std = constant(self.std, x.device).view(1, -1, 1, 1) * 255
        return (x - mean) / std

    def __call__(self, image: NDArray[Any]) -> Tensor:
        """A decoded image (H, W, C) -> the network's input (C, H, W)."""
        return self.normalize(self.fit(to_tensor(image))[None])[0]

    def data_config(self) -> dict[str, Any]:
        """timm's configuration, which has no place for the entries of `regard_config`."""
        return {
            "input_size": self.input_size, "mean": self.mean, "std": self.std,
            "interpolation": "bilinear", "crop_pct": self.crop_pct,
            "crop_mode": _TIMM_MODES[self.resize],
        }  # fmt: skip

    def regard_config(self) -> dict[str, Any]:
        """The entries under "regard" in a folder's config.json, which `from_config` reads."""
        entries: dict[str, Any] = {"normalization": self.normalization}
        if self.value_range is not None:
            entries["value_range"] = list(self.value_range)
        if self.resize_first:
            entries["resize_first"] = True
        return entries

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        normalization: str = "fixed",
        value_range: Sequence[float] | None = None,
        resize_first: bool = False,
    ) -> "Preprocess":
        """Built from timm's configuration of a network (its pretrained_cfg).

        Raises:
            UsageError: an entry is missing, of the wrong type, or out of range.
        """
        modes = {v: k for k, v in _TIMM_MODES.items()}
        mode = config.get("crop_mode") or "center"
        size = _numbers("input_size", config, 3, least=1)
        channels = int(size[0])
        crop_pct = _numbers(
            "crop_pct", {"crop_pct": [config.get("crop_pct") or 1.0]}, 1, least=1e-3
        )
        if mode not in modes:
            raise UsageError(f"crop_mode {mode!r}: choose {', '.join(modes)}")
        if normalization not in ("fixed", "image"):
            raise UsageError(f"normalization {normalization!r}: choose fixed, image")
        ends = None
        if value_range is not None:
            ends = _numbers("value_range", {"value_range": value_range}, 2)
            if ends[0] > ends[1]:
                raise UsageError(f"value_range {value_range}: give the lowest value first")
        return cls(
            input_size=(channels, int(size[1]), int(size[2])),
            mean=_numbers("mean", config, channels),
            std=_numbers("std", config, channels, least=1e-6),
            resize=modes[mode],
            crop_pct=crop_pct[0],
            normalization=normalization,
            value_range=None if ends is None else (ends[0], ends[1]),
            resize_first=bool(resize_first),
        )


@dataclass(frozen=True)
class TenCrop(Preprocess):
    """Ten views of each image: the four corners and the center, and their horizontal flips.

    The geometry is torchvision's TenCrop after a Resize to size / crop_pct.

    Raises:
        UsageError: `resize` is not "crop", so there are no corners to crop.
    """

    def __post_init__(self) -> None:
        if self.resize != "crop":
            raise UsageError(
                f"ten crops: images of this network are fitted by resize={self.resize!r}; only "
                "resize='crop' has corners to cut"
            )

    @classmethod
    def of(cls, preprocess: Preprocess) -> "TenCrop":
        """Ten crops in place of the center crop of `preprocess`."""
        return cls(**{f.name: getattr(preprocess, f.name) for f in fields(preprocess)})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `fit` returns."""
        return (10, *self.input_size)

    def fit(self, image: Tensor) -> Tensor:
        """(C, H, W) of any size in 0..255 -> (10, C, *size), of the same dtype."""
        _, height, width = image.shape
        if max(height, width) <= LONGEST * min(height, width):
            return torch.stack(ten_crop(self._resized(image), list(self.size)))
        left, top, right, bottom = self.box(height, width)  # of a strip: crop, then resize
        rows, columns = bottom - top, right - left
        corners = [(y, x) for y in (0, height - rows) for x in (0, width - columns)]
        views = [
            resample(image, (x, y, x + columns, y + rows), self.size)
            for y, x in [*corners, (top, left)]
        ]
        return torch.stack([*views, *(view.flip(-1) for view in views)])


class Flips(Preprocess):
    """Two views of each image: unchanged, and flipped horizontally."""

    @classmethod
    def of(cls, preprocess: Preprocess) -> "Flips":
        """The two views of each image that `preprocess` prepares."""
        return cls(**{f.name: getattr(preprocess, f.name) for f in fields(preprocess)})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `fit` returns."""
        return (2, *self.input_size)

    def fit(self, image: Tensor) -> Tensor:
        """(C, H, W) of any size in 0..255 -> (2, C, *size), of the same dtype."""
        fitted = super().fit(image)
        return torch.stack([fitted, fitted.flip(-1)])


def _numbers(
    name: str, config: Mapping[str, Any], count: int, *, least: float = -math.inf
) -> tuple[float, ...]:
    """An entry of a configuration that is a list of finite numbers, at least `least`.

    Raises:
        UsageError: it is something else.
    """
    values = config.get(name)
    good = isinstance(values, list | tuple) and len(values) == count
    if not good or not all(
        isinstance(v, int | float) and math.isfinite(v) and v >= least for v in values or ()
    ):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise UsageError(
            f"{name} {values!r}: a list of {plural(count, 'number')}{bound} is expected"
        )
    return tuple(values or ())


def normalize_each(x: Tensor) -> Tensor:
    """Normalizes each image by its own mean and deviation (as AG-SonoNet's authors do)."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    std = (x - mean).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return (x - mean) / std.clamp_min(1e-3)
