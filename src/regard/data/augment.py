"""Augmentation on the device, in batches of images that are decoded and resized.

Every random choice is a function of the numbers from `random_numbers`: WIDTH uniform numbers for
each position in the sample order, from a counter-based generator. The sample at a position is
therefore the same for any batch size and number of workers or processes, and after a resume.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.data.preprocess import Preprocess, constant, resample


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are augmented; the defaults are a recipe's.

    Attributes:
        random_crop: "none", "shift" (pad and crop) or "resized" (random area and aspect).
        crop_shift: padding of random_crop="shift", as a fraction of the side.
        crop_scale: range of the area of random_crop="resized", as fractions of the image.
        flip: probability of a horizontal flip.
        rotate: largest rotation in degrees, either way.
        zoom: range of the zoom factor, log-uniform, the same for both axes.
        axis_scale: range of the scale of the sampling grid, uniform, drawn separately for each
            axis; above 1 shrinks the image (AG-SonoNet: 0.7 to 1.3).
        shift: largest shift, as a fraction of the side, either way.
        color_jitter: largest relative change of brightness, contrast and saturation.
        lighting: standard deviation of AlexNet's PCA color augmentation (the paper's is 0.1);
            color images only.
        random_erasing: probability of erasing a random rectangle.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        full_decode: whether JPEG files are decoded at full size, rather than at 1/2, 1/4 or 1/8
            where that leaves the input's size, of crops of random area that of the smallest.
    """

    random_crop: str = "none"
    crop_shift: float = 0.125
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    rotate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    axis_scale: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    color_jitter: float = 0.0
    lighting: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    full_decode: bool = False


TRIES = 10  # attempts to find a random region, as in torchvision's RandomResizedCrop
WIDTH = 44  # uniform numbers for each sample; a multiple of Philox's four
# index of the number, or of the first of several, that each choice uses
AREA, ASPECT, LEFT, TOP = 0, TRIES, 2 * TRIES, 2 * TRIES + 1
FLIP, ANGLE, ZOOM, SCALE_X, SCALE_Y, SHIFT_X, SHIFT_Y = range(22, 29)
BRIGHTNESS, CONTRAST, SATURATION, LIGHT = range(29, 33)  # LIGHT: three numbers
MIX, ERASE, ERASE_AREA, ERASE_ASPECT, ERASE_X, ERASE_Y = range(35, 41)

# Eigenvalues and eigenvectors (columns) of the covariance of ImageNet's RGB values in 0..1
# (Krizhevsky et al. 2012, section 4.1; the numbers of fb.resnet.torch)
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203),
)  # fmt: skip


def random_numbers(seed: int, start: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) for positions start, start + 1, ...: (count, WIDTH) float32."""
    bits = np.random.Philox(key=seed)
    bits.advance(start * (WIDTH // 4))
    numbers = np.random.Generator(bits).random((count, WIDTH))
    return torch.from_numpy(numbers.astype(np.float32)).clamp_(max=1 - 2**-24)


def random_resized(
    image: Tensor, u: Tensor, augmentation: Augmentation, size: tuple[int, int]
) -> Tensor:
    """A random region of an image, resized: (C, H, W) and its numbers (WIDTH,) -> (C, *size)."""
    box = random_region(image.shape[1], image.shape[2], u, augmentation.crop_scale)
    return resample(image, box, size)


def random_region(
    height: int, width: int, u: Tensor, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a region of random area and aspect.

    Inception's crop (Szegedy et al. 2015) as in torchvision's RandomResizedCrop: the first of ten
    attempts that fits; if none does, the largest centered region with an aspect of 3/4 to 4/3.
    """
    areas = scale[0] + (scale[1] - scale[0]) * u[AREA : AREA + TRIES].double().numpy()
    limit = math.log(4 / 3)
    aspects = np.exp((2 * u[ASPECT : ASPECT + TRIES].double().numpy() - 1) * limit)
    columns = np.rint(np.sqrt(areas * height * width * aspects)).astype(int)
    rows = np.rint(np.sqrt(areas * height * width / aspects)).astype(int)
    fitting = np.flatnonzero((columns > 0) & (columns <= width) & (rows > 0) & (rows <= height))
    if len(fitting):
        h, w = int(rows[fitting[0]]), int(columns[fitting[0]])
        top = int(float(u[TOP]) * (height - h + 1))
        left = int(float(u[LEFT]) * (width - w + 1))
    else:
        h = min(height, max(1, round(width / (3 / 4))))
        w = min(width, max(1, round(height * (4 / 3))))
        top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def augment(
    images: Tensor, u: Tensor, augmentation: Augmentation, preprocess: Preprocess
) -> Tensor:
    """(B, C, H, W) in 0..255 and their random numbers (B, WIDTH) -> augmented, standardized."""
    x = images.float()
    if augmentation.random_crop == "shift":
        x = _pad_and_crop(x, u, augmentation.crop_shift)
    if augmentation.flip > 0:
        flipped = (u[:, FLIP] < augmentation.flip).view(-1, 1, 1, 1)
        x = torch.where(flipped, x.flip(3), x)
    scales = augmentation.zoom, augmentation.axis_scale
    if augmentation.rotate > 0 or augmentation.shift > 0 or scales != ((1.0, 1.0), (1.0, 1.0)):
        x = _affine(x, u, augmentation)
    if augmentation.color_jitter > 0:
        x = _color_jitter(x, u, augmentation.color_jitter)
    if augmentation.lighting > 0 and x.shape[1] == 3:
        x = x + _lighting(u, augmentation.lighting)
    x = preprocess.normalize(x)
    return _erase(x, u, augmentation.random_erasing) if augmentation.random_erasing > 0 else x


def _pad_and_crop(x: Tensor, u: Tensor, share: float) -> Tensor:
    """Pads with black by a share of the side and crops at a random position."""
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
    """Rotates, zooms and shifts about the center; outside, border pixels are repeated."""
    height, width = x.shape[-2:]
    angle = (2 * u[:, ANGLE] - 1) * math.radians(augmentation.rotate)
    low, high = augmentation.zoom
    scale = 1 / torch.exp(math.log(low) + (math.log(high) - math.log(low)) * u[:, ZOOM])
    low, high = augmentation.axis_scale
    across, down = (scale * (low + (high - low) * u[:, k]) for k in (SCALE_X, SCALE_Y))
    cos, sin = angle.cos(), angle.sin()
    aspect = height / width  # the grid goes from -1 to 1 along both axes
    dx, dy = (2 * augmentation.shift * (2 * u[:, k] - 1) for k in (SHIFT_X, SHIFT_Y))
    theta = torch.stack(
        [across * cos, -down * sin * aspect, dx, across * sin / aspect, down * cos, dy], dim=1
    ).view(-1, 2, 3)  # (B, 6) -> (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _color_jitter(x: Tensor, u: Tensor, amount: float) -> Tensor:
    """Scales brightness, contrast and (color images) saturation by 1 - amount to 1 + amount."""

    def factor(k: int) -> Tensor:
        return (1 + amount * (2 * u[:, k] - 1)).view(-1, 1, 1, 1)

    x = x * factor(BRIGHTNESS)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * factor(CONTRAST)
    if x.shape[1] == 3:
        luma = constant((0.299, 0.587, 0.114), x.device).view(1, 3, 1, 1)
        gray = (x * luma).sum(dim=1, keepdim=True)
        x = gray + (x - gray) * factor(SATURATION)
    return x.clamp(0, 255)


def _lighting(u: Tensor, deviation: float) -> Tensor:
    """(B, WIDTH) -> (B, 3, 1, 1): the offset of AlexNet's PCA color augmentation, in 0..255."""
    # (B, 3): normal numbers by the inverse of the cumulative distribution
    alphas = deviation * torch.special.ndtri(u[:, LIGHT : LIGHT + 3].clamp(min=2**-24))
    values = alphas * constant(_EIGENVALUES, u.device)
    return (255 * values @ constant(_EIGENVECTORS, u.device).T).view(-1, 3, 1, 1)


def _erase(x: Tensor, u: Tensor, probability: float) -> Tensor:
    """Sets a rectangle of 2 to 33 % of the area to the mean (Zhong et al. 2017)."""
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
    inside &= (u[:, ERASE] < probability).view(-1, 1, 1)
    return x.masked_fill(inside[:, None], 0.0)


def mixup_shares(u: Tensor, alpha: float) -> Tensor:
    """Each image's own weight in its mixup (Zhang et al. 2018): (B, WIDTH) -> (B,).

    The weights follow Beta(alpha, alpha).
    """
    from scipy.special import betaincinv

    shares = betaincinv(alpha, alpha, u[:, MIX].cpu().double().numpy())
    return torch.from_numpy(shares).to(u.device, u.dtype)


def blend(values: Tensor, shares: Tensor) -> Tensor:
    """Mixes each row with its neighbor's by shares (B,): first and second, third and fourth, ...

    Pairing makes batches of any even size mix the same images. If their number is odd, the last
    is mixed with the first.
    """
    share = shares.to(values).view(-1, *[1] * (values.ndim - 1))
    return values * share + values[neighbors(len(values), values.device)] * (1 - share)


def neighbors(count: int, device: torch.device | None = None) -> Tensor:
    """(count,) index of the row that `blend` mixes with each row."""
    partner = torch.arange(count, device=device) ^ 1
    if count % 2:
        partner[-1] = 0
    return partner
