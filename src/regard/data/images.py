"""Reads one image file into an array without losing what it holds.

PNG, JPEG, BMP, TIFF, WebP and, with the extra `dicom`, DICOM, told by their content. A file
that can't be read is an ImageError of one line, whatever its decoder raised.
"""

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.errors import ImageError, UsageError

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom",
)  # fmt: skip


_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF 2.3, table 4


def read_image(
    path: str | Path, *, channels: int | None = None, at_least: int | None = None
) -> NDArray[Any]:
    """One image as (H, W, C), turned upright as its EXIF orientation says.

    C is 1 or 3, as the file is. Transparency is composed over white; palettes and CMYK become
    RGB; of several pages or frames the first is read (but see DICOM).

    - uint8, 0 to 255: the usual. PIL cuts 16-bit color to 8 bits.
    - uint16: 16-bit grayscale PNG and TIFF, every bit kept; wider integers are clipped
      to 0..65535.
    - float32, 0 to 1: grayscale TIFF of floats, its own minimum to 0 and maximum to 1
      (a constant image and values that are not finite to 0).
    - float32, 0 to 1: DICOM. Grayscale: after rescaling, its VOI table or (the first)
      window, else the minimum to 0 and the maximum to 1; MONOCHROME1 inverted. Color:
      stored values over the largest that can be stored. Several frames are an error.

    Args:
        path: the file.
        channels: 1 or 3: grayscale is repeated; color becomes ITU-R 601 luma, as PIL's "L".
        at_least: JPEG only: may be decoded at 1/2, 1/4 or 1/8 of its size, as long as the
            shorter side keeps this many pixels. Several times faster for large photos.

    Raises:
        ImageError: missing, empty, broken, no image, larger than PIL's limit for
            decompression bombs, or DICOM while pydicom is not installed.
        UsageError: channels is neither 1 nor 3.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"channels={channels}: choose 1 or 3")
    try:
        head = _head(path)
    except OSError as error:
        raise ImageError(f"{path}: {_reason(error)}") from error
    try:
        dicom = head[128:132] == b"DICM" or head[:2] == b"\x08\x00"  # with and without preamble
        pixels = _read_dicom(path) if dicom else _read_pil(path, at_least)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path}: is no PNG, JPEG, BMP, TIFF, WebP or DICOM image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: too large, maybe a decompression bomb ({error})") from error
    except Exception as error:  # of broken files decoders raise nearly anything
        raise ImageError(f"{path}: can't be read as an image ({_reason(error)})") from error
    return to_channels(pixels, channels)


def to_channels(pixels: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """(H, W, 1 or 3) -> (H, W, channels); None leaves it as it is. dtype and range stay."""
    have = pixels.shape[2]
    if channels is None or channels == have:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)  # (H, W, 1) -> (H, W, 3)
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # (H, W, 3) -> (H, W)
    return luma.astype(pixels.dtype)[..., None]


def _head(path: str | Path) -> bytes:
    """The first bytes of a regular file; a pipe would block, so it is not opened."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ImageError(f"{path}: is a folder, not an image")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{path}: is not a regular file")
    with open(path, "rb") as file:
        head = file.read(132)
    if not head:
        raise ImageError(f"{path}: is empty (0 bytes)")
    return head


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return " ".join(str(error).split()) or type(error).__name__


def _read_pil(path: str | Path, at_least: int | None) -> NDArray[Any]:
    with Image.open(path, formats=_FORMATS) as image:
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        image.load()
        # only after load(): PIL itself turns TIFFs, and then drops the tag
        return _upright(_pixels(image), _orientation(image))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block is no reason to lose a good picture
        return 1


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undoes an EXIF orientation, (H, W, C) -> (H, W, C) or (W, H, C)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _pixels(image: Image.Image) -> NDArray[Any]:
    """A loaded PIL image of any mode -> (H, W, 1 or 3)."""
    if image.mode.startswith("I"):  # I;16, I;16B, I;16N of two bytes; I of four, signed
        return np.clip(np.asarray(image), 0, 65535).astype(np.uint16)[..., None]
    if image.mode == "F":
        return _stretch(np.asarray(image))[..., None]
    gray = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    array = np.array(image.convert("L" if gray else "RGB"))
    return array[..., None] if gray else array


def _stretch(values: NDArray[Any]) -> NDArray[np.float32]:
    """Minimum to 0, maximum to 1; a constant and what is not finite to 0."""
    values = values.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.float32)
    low, high = values[finite].min(), values[finite].max()
    if low == high:
        return np.zeros(values.shape, np.float32)
    values = np.where(finite, values, low)
    # halves: the range of doubles near the largest would overflow
    return ((values / 2 - low / 2) / (high / 2 - low / 2)).astype(np.float32)


def _read_dicom(path: str | Path) -> NDArray[np.float32]:
    try:
        import pydicom
    except ImportError as error:
        raise ImageError(f"{path}: is DICOM; install regard[dicom] to read it") from error
    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset:
        raise ImageError(f"{path}: is DICOM without an image")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ImageError(f"{path}: holds {frames} frames; write each as a file of its own")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and dataset.Rows * dataset.Columns > 2 * limit:
        raise ImageError(f"{path}: too large ({dataset.Columns} x {dataset.Rows} pixels)")
    stored = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = pydicom.pixels.apply_color_lut(stored, dataset)
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    else:
        bits = int(dataset.BitsStored)
    if stored.ndim == 3:
        return (stored / (2**bits - 1)).astype(np.float32)
    return _dicom_gray(stored, dataset)[..., None]


def _dicom_gray(stored: NDArray[Any], dataset: Any) -> NDArray[np.float32]:
    """Stored values (H, W) -> what a viewer shows, 0 black to 1 white (PS3.3 C.11.1, C.11.2)."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    values = apply_modality_lut(stored, dataset)
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        shown = apply_voi(np.rint(values).astype(np.int64), dataset) / (2**bits - 1)
    elif all(dataset.get(key) not in (None, "") for key in ("WindowWidth", "WindowCenter")):
        # the range that pydicom maps the window to, seen from values beyond its ends
        with np.errstate(over="ignore"):
            black, white = apply_windowing(np.array([-1e30, 1e30]), dataset)
            shown = (apply_windowing(values, dataset) - black) / (white - black or 1.0)
    else:
        shown = _stretch(values)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return np.clip(shown, 0, 1).astype(np.float32)
