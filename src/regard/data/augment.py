"""Augmentation in batches, on the device, of images that are decoded and resized.

Every random choice comes from `draws`: WIDTH uniform numbers for each place in the order of
training, from a counter-based generator. So the image at a place is the same whatever the
batch size, the number of workers or processes, and wherever a run was resumed.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.data.preprocess import Preprocess, resample


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are augmented; the defaults are a recipe's.

    Attributes:
        random_crop: "none", "shift" (pad and crop) or "resized" (random area and aspect).
        crop_shift: padding of random_crop="shift", as a fraction of the side.
        crop_scale: least and largest area of random_crop="resized", as fractions.
        flip: probability of a horizontal flip.
        rotate: largest rotation in degrees, either way.
        zoom: least and largest zoom factor.
        shift: largest shift, as a fraction of the side, either way.
        color_jitter: largest relative change of brightness, contrast and saturation.
        random_erasing: probability of erasing a random rectangle.
        mixup: alpha of mixup's Beta distribution; 0 is off.
    """

    random_crop: str = "none"
    crop_shift: float = 0.125
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    rotate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0


WIDTH = 24  # uniform numbers for each image; a multiple of Philox's four
# which number is for what
CROP, AREA, ASPECT, LEFT, TOP, FLIP, ANGLE, ZOOM, SHIFT_X, SHIFT_Y = range(10)
BRIGHTNESS, CONTRAST, SATURATION, MIX, ERASE, ERASE_AREA, ERASE_ASPECT = range(10, 17)
ERASE_X, ERASE_Y = 17, 18


def draws(seed: int, start: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) of the places start, start + 1, ...: (count, WIDTH) float32."""
    bits = np.random.Philox(key=seed)
    bits.advance(start * (WIDTH // 4))
    numbers = np.random.Generator(bits).random((count, WIDTH))
    return torch.from_numpy(numbers.astype(np.float32)).clamp_(max=1 - 2**-24)


def random_resized(
    image: Tensor, u: Tensor, augmentation: Augmentation, size: tuple[int, int]
) -> Tensor:
    """A region of random area and aspect (3/4 to 4/3), resized: (C, H, W) -> (C, *size).

    Inception's crop (Szegedy et al. 2015), as in torchvision's RandomResizedCrop, with one
    try: an aspect that does not fit is cut to what does.
    """
    _, height, width = image.shape
    low, high = augmentation.crop_scale
    area = (low + (high - low) * float(u[AREA])) * height * width
    aspect = math.exp((2 * float(u[ASPECT]) - 1) * math.log(4 / 3)) * size[1] / size[0]
    rows = max(1, min(height, round(math.sqrt(area / aspect))))
    columns = max(1, min(width, round(math.sqrt(area * aspect))))
    left = int(float(u[LEFT]) * (width - columns + 1))
    top = int(float(u[TOP]) * (height - rows + 1))
    return resample(image, (left, top, left + columns, top + rows), size)


def augment(
    images: Tensor, u: Tensor, augmentation: Augmentation, preprocess: Preprocess
) -> Tensor:
    """(B, C, H, W) in 0..255 and their draws (B, WIDTH) -> augmented and standardized."""
    x = images.float()
    if augmentation.random_crop == "shift":
        x = _shifted(x, u, augmentation.crop_shift)
    if augmentation.flip > 0:
        flipped = (u[:, FLIP] < augmentation.flip).view(-1, 1, 1, 1)
        x = torch.where(flipped, x.flip(3), x)
    if augmentation.rotate > 0 or augmentation.zoom != (1.0, 1.0) or augmentation.shift > 0:
        x = _affine(x, u, augmentation)
    if augmentation.color_jitter > 0:
        x = _color(x, u, augmentation.color_jitter)
    x = preprocess.normalize(x)
    return _erased(x, u, augmentation.random_erasing) if augmentation.random_erasing > 0 else x


def _shifted(x: Tensor, u: Tensor, share: float) -> Tensor:
    """Padded with black by a share of the side, and cut at a random place of that frame."""
    _, _, height, width = x.shape
    pad_y, pad_x = round(height * share), round(width * share)
    padded = F.pad(x, (pad_x, pad_x, pad_y, pad_y))
    top = (u[:, TOP] * (2 * pad_y + 1)).long()
    left = (u[:, LEFT] * (2 * pad_x + 1)).long()
    rows = top[:, None] + torch.arange(height, device=x.device)  # (B, H)
    columns = left[:, None] + torch.arange(width, device=x.device)  # (B, W)
    cut = padded.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, padded.shape[3]))
    return cut.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], height, -1))


def _affine(x: Tensor, u: Tensor, augmentation: Augmentation) -> Tensor:
    """Rotation, zoom and shift about the middle; the border is continued outside."""
    height, width = x.shape[-2:]
    angle = (2 * u[:, ANGLE] - 1) * math.radians(augmentation.rotate)
    low, high = augmentation.zoom
    scale = 1 / torch.exp(math.log(low) + (math.log(high) - math.log(low)) * u[:, ZOOM])
    # grid coordinates go from -1 to 1 in either direction, so a rotation keeps the aspect
    cos, sin = scale * angle.cos(), scale * angle.sin()
    aspect = height / width
    dx, dy = (2 * augmentation.shift * (2 * u[:, k] - 1) for k in (SHIFT_X, SHIFT_Y))
    theta = torch.stack([cos, -sin * aspect, dx, sin / aspect, cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _color(x: Tensor, u: Tensor, amount: float) -> Tensor:
    """Brightness, contrast and, of color images, saturation, each by 1 - amount to 1 + amount."""

    def factor(k: int) -> Tensor:
        return (1 + amount * (2 * u[:, k] - 1)).view(-1, 1, 1, 1)

    x = x * factor(BRIGHTNESS)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * factor(CONTRAST)
    if x.shape[1] == 3:
        luma = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
        gray = (x * luma).sum(dim=1, keepdim=True)
        x = gray + (x - gray) * factor(SATURATION)
    return x.clamp(0, 255)


def _erased(x: Tensor, u: Tensor, chance: float) -> Tensor:
    """A rectangle of 2 to 33 % of the area is set to the mean (Zhong et al. 2017)."""
    height, width = x.shape[-2:]
    area = (0.02 + 0.31 * u[:, ERASE_AREA]) * height * width
    aspect = torch.exp((2 * u[:, ERASE_ASPECT] - 1) * math.log(1 / 0.3))
    rows = torch.sqrt(area * aspect).clamp(max=height)
    columns = torch.sqrt(area / aspect).clamp(max=width)
    top, left = u[:, ERASE_Y] * (height - rows), u[:, ERASE_X] * (width - columns)
    y = torch.arange(height, device=x.device).view(1, -1, 1) + 0.5
    z = torch.arange(width, device=x.device).view(1, 1, -1) + 0.5
    top, left, rows, columns = (t.view(-1, 1, 1) for t in (top, left, rows, columns))
    inside = (y >= top) & (y < top + rows) & (z >= left) & (z < left + columns)
    inside &= (u[:, ERASE] < chance).view(-1, 1, 1)
    return x.masked_fill(inside[:, None], 0.0)


def mixed(x: Tensor, target: Tensor, u: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): each image with the next of the batch, by Beta(alpha, alpha).

    Shapes: x (B, C, H, W), target (B, classes) probabilities -> the same.
    """
    from scipy.special import betaincinv

    share = torch.from_numpy(betaincinv(alpha, alpha, u[:, MIX].cpu().double().numpy()))
    share = share.to(x.device, x.dtype)
    mixed_x = x * share.view(-1, 1, 1, 1) + x.roll(1, 0) * (1 - share).view(-1, 1, 1, 1)
    return mixed_x, target * share[:, None] + target.roll(1, 0) * (1 - share)[:, None]
