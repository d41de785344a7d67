"""TIFF features that PIL hides or can't read: signs, inversion, doubles, many bands."""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.errors import ImageError
from regard.extras import hint, missing

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF 6.0, sections 8 and 19
_SAMPLES, _PLANAR = 277, 284
_MIN_IS_WHITE = 0
_SIGNED = 2
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF

log: logging.Logger = logging.getLogger(__name__)
_warned: set[str] = set()


def is_tiff(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a TIFF."""
    return head[:4] in _MAGIC


def is_misread(image: Any) -> bool:
    """Whether PIL (seen in 13.0) opens a planar TIFF, but decodes it wrongly.

    It takes uncompressed 16-bit bands for bytes, and reads only the first band unless they are RGB.
    """
    samples = image.tag_v2.get(_SAMPLES, 1)
    if samples == 1 or image.tag_v2.get(_PLANAR) != 2:
        return False
    raw = image.tag_v2.get(_BITS, (1,))[0] != 8 and image.tile[0].codec_name == "raw"
    return raw or len(image.getbands()) < min(samples, 3)


def stored_tiff(image: Any) -> NDArray[Any] | None:
    """The stored values of a TIFF that PIL has loaded, (H, W, 1); None if PIL's own are right.

    uint16, or int64 and float64 for measurements. For files where small values are white, see
    `_black`.
    """
    bits = image.tag_v2.get(_BITS, (1,))
    kind = image.tag_v2.get(_SAMPLE_FORMAT, (1,))[0]
    inverted = image.tag_v2.get(_PHOTOMETRIC) == _MIN_IS_WHITE
    pixels = np.asarray(image)
    if image.mode == "L" and bits == (8,) and kind == _SIGNED:
        pixels = pixels.view(np.int8).astype(np.int64)
    elif image.mode.startswith("I;16"):
        pixels = pixels.astype(np.uint16)
    elif image.mode == "I":
        unsigned = bits == (32,) and kind != _SIGNED
        pixels = (pixels.view(np.uint32) if unsigned else pixels).astype(np.int64)
    elif image.mode == "F":
        pixels = pixels.astype(np.float64)
    else:
        return None
    return (_black(pixels, bits[0]) if inverted else pixels)[..., None]


def _black(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Converts values from a file where small ones are white to the same picture with black 0.

    Integers are mirrored in the range of their bits, floats in 0 to 1, so that one range of values
    fits both kinds of file.
    """
    if pixels.dtype.kind == "f":
        return 1 - pixels
    if pixels.dtype.kind == "i":
        return ~pixels  # -1 - v
    return pixels.dtype.type(2**bits - 1) - pixels


def _opened(file: Any) -> Any:
    if missing("tiff", "tifffile"):
        raise ImageError(
            "is a TIFF of a kind that Pillow can't read (such as 64-bit floats, floats in color, "
            f"five bands, or separate planes); {hint('tiff')} brings a reader"
        )
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it raises its reasons as exceptions
    file.seek(0)
    return tifffile.TiffFile(file)


def size_with_tifffile(file: Any) -> tuple[int, int, int]:
    """Width, height and bytes per pixel of the first page, from its header; decodes nothing.

    Tiles larger than the image count as its size, since they are decoded as a whole.

    Raises:
        ImageError: tifffile is not installed. What tifffile raises for a broken file is not caught.
    """
    with _opened(file) as tiff:
        page = tiff.pages[0]
        width, height = max(page.imagewidth, page.tilewidth), max(page.imagelength, page.tilelength)
        return width, height, -(-int(page.samplesperpixel) * int(page.bitspersample) // 8)


def read_with_tifffile(file: Any) -> tuple[NDArray[Any], int]:
    """The first page of a TIFF that PIL can't read: (H, W, 1 or 3) as stored, and orientation.

    Of more than three bands, the first three are used; integers with alpha are laid on white.

    Raises:
        ImageError: tifffile is not installed, or can't read it.
    """
    with _opened(file) as tiff:
        page: Any = tiff.pages[0]
        limit = Image.MAX_IMAGE_PIXELS
        if limit and page.imagewidth * page.imagelength * page.samplesperpixel > 6 * limit:
            raise ImageError(f"too large ({page.imagewidth} x {page.imagelength} pixels)")
        pixels = page.asarray()
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)  # (S, H, W) -> (H, W, S)
        elif page.axes == "YX":
            pixels = pixels[..., None]
        elif page.axes != "YXS":
            raise ImageError(f"is a TIFF of axes {page.axes}; height and width are needed")
        orientation = page.tags.get(274)
        inverted = int(page.photometric) == _MIN_IS_WHITE
        bits = min(int(page.bitspersample), 8 * pixels.dtype.itemsize)
        alpha = any(int(sample) in (1, 2) for sample in page.extrasamples)
    return _as_stored(pixels, bits if inverted else None, alpha), int(
        orientation.value
    ) if orientation else 1


def _as_stored(pixels: NDArray[Any], inverted: int | None, alpha: bool) -> NDArray[Any]:
    """(H, W, samples) of any type -> (H, W, 1 or 3) of uint8, uint16, int64 or float64.

    Args:
        pixels: as stored.
        inverted: bits per sample where small values are white, else None.
        alpha: whether the last sample is alpha.
    """
    if pixels.dtype.kind not in "uif":
        raise ImageError(f"is a TIFF of {pixels.dtype}; integers or real numbers are needed")
    count = 3 if pixels.shape[2] >= 3 else 1
    opacity = pixels[..., -1:] if alpha and pixels.shape[2] in (2, 4) else None
    left_out = pixels.shape[2] - count - (opacity is not None)
    if left_out and "bands" not in _warned:
        _warned.add("bands")
        log.warning(
            "a TIFF has %d bands: the first %s read, in this file and others like it",
            pixels.shape[2], "three are" if count == 3 else "is",
        )  # fmt: skip
    pixels = pixels[..., :count]
    if inverted is not None:
        pixels = _black(pixels, inverted)
    if pixels.dtype in (np.uint8, np.uint16):
        top = int(np.iinfo(pixels.dtype).max)
        if opacity is not None:
            share = opacity / top
            pixels = np.rint(pixels * share + top * (1 - share)).astype(pixels.dtype)
        return pixels
    wide = np.float64 if pixels.dtype.kind == "f" or pixels.dtype == np.uint64 else np.int64
    return pixels.astype(wide)
