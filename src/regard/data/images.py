"""Reads an image into an array without losing information: one definition for all inputs.

A path, bytes, a binary file object, a PIL image, an array and a tensor of the same picture give
the same pixels. Formats are recognized by content: PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, JPEG
2000, AVIF and, with the extra `dicom`, DICOM. Whatever a decoder raises becomes an ImageError
with a message of one line.
"""

import io
import logging
import os
import re
import stat
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.compat import read_in_native_order, silence_libtiff
from regard.data.arrays import array_pixels, over_white, tensor_pixels
from regard.data.dicom import is_dicom, read_dicom
from regard.data.members import Member, open_binary
from regard.data.tiff import is_misread, is_tiff, read_with_tifffile, stored_tiff
from regard.errors import ImageError, UsageError
from regard.files import plural, reason

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".dcm", ".dicom",
)  # fmt: skip
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_SIDE = 100_000  # pixels; PIL's cost per row is far above its cost per pixel

ValueRange = tuple[float, float]
ImageSource = str | os.PathLike[str] | bytes | Any  # Any: a file object, PIL image, array, tensor

_ORIENTATION = 0x0112  # EXIF 2.3, table 4
_URL = re.compile(r"(https?|ftp|s3|gs|hdfs|file|data):/", re.IGNORECASE)
_NAMED = 5  # images with clipped values that get a line each
_clipped_images = 0
_pil_lock = threading.Lock()

log: logging.Logger = logging.getLogger(__name__)

# Pillow warns of every odd tag, although it reads the file
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class Stored(NamedTuple):
    """An image's values as stored.

    Attributes:
        pixels: (H, W, 1 or 3). uint8, uint16, and float32 from 0 to 1 have a known range. int64
            and float64 are measurements (16-bit signed, 32-bit and float files and arrays), which
            take the data set's range.
        own_range: the range to use for measurements if the data set's is not known.
    """

    pixels: NDArray[Any]
    own_range: ValueRange | None = None

    @property
    def is_measurement(self) -> bool:
        """Whether the values need a range from outside."""
        return self.pixels.dtype in (np.int64, np.float64)


def read_image(
    source: ImageSource,
    *,
    channels: int | None = None,
    at_least: int | None = None,
    value_range: ValueRange | None = None,
) -> NDArray[Any]:
    """One image as (H, W, C), with EXIF orientation applied and transparency laid on white.

    C is 1 or 3, as in the image; palettes and CMYK become RGB, gray palettes gray. The first page
    or frame is read (but see DICOM).

    - uint8, 0 to 255: the usual case. PIL reduces 16-bit color to 8 bits.
    - uint16: 16-bit grayscale at full depth, with or without alpha.
    - float32, 0 to 1: DICOM. Grayscale: after rescaling, by its VOI table or (first) window, else
      by `value_range`, else from its own minimum to its maximum without padding; MONOCHROME1 is
      inverted, without table and window in the range that its bits can store. Color: stored
      values divided by the largest that can be stored. Several frames are an error.
    - float32, 0 to 1: measurements, that is, signed, 32-bit and float images: `value_range` is
      mapped to 0..1, with values outside clipped and a warning. Without it, floats from 0 to 1 are
      used unchanged (as uint8 if all are multiples of 1/255), and everything else is an error.
      Where small values are white, integers are inverted in the range of their bits, and floats
      are 1 - v.

    Args:
        source: a path, bytes, a binary file object, a PIL image, an array (H, W) or (H, W, C), or
            a tensor (H, W) or (C, H, W); with C = 2 or 4 the last channel is alpha. Arrays and
            tensors: bool, uint8, uint16, or floats from 0 to 1 (measurements with `value_range`).
        channels: 1 or 3: grayscale is repeated; color becomes ITU-R 601 luma, as PIL's "L".
        at_least: only for JPEG files: the file may be decoded at 1/2, 1/4 or 1/8 of its size, as
            long as the shorter side has this many pixels. Several times faster for large photos.
        value_range: lowest and highest value of measurements in the data set.

    Raises:
        ImageError: missing, empty, broken, not an image, too large, or of a format whose extra is
            not installed; an array of another shape, type or range.
        UsageError: channels is neither 1 nor 3.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"channels={channels}: choose 1 or 3")
    name = name_of(source)
    stored = read_stored(source, at_least=at_least)
    try:
        return to_channels(scaled(stored, value_range, name or "an image"), channels)
    except ImageError as error:
        raise ImageError(f"{name}: {error}" if name else str(error)) from error


def read_stored(source: ImageSource, *, at_least: int | None = None) -> Stored:
    """An image's values as stored; see `read_image`.

    Raises:
        ImageError: as in `read_image`.
    """
    name = name_of(source)
    try:
        return _read(source, at_least)
    except Exception as error:  # decoders raise almost anything for broken files
        fault = _fault(error)
        raise ImageError(f"{name}: {fault}" if name else fault) from error


def _fault(error: Exception) -> str:
    """Describes what is wrong with an image, from the exception that reading it raised."""
    match error:
        case ImageError():
            return str(error)
        case Image.UnidentifiedImageError():
            return "is not a PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, JPEG 2000, AVIF or DICOM image"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning():
            return f"too large, maybe a decompression bomb ({error})"
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return "no permission to read it"
        case MemoryError():
            return "out of memory while reading it"
    return f"can't be read as an image ({reason(error)})"


def format_of(path: str | os.PathLike[str]) -> str | None:
    """Pillow's name for a file's format; None if Pillow does not recognize it.

    Raises:
        OSError: the file can't be opened.
    """
    with open_binary(path) as file:
        if is_dicom(file.read(132)):
            return None
        file.seek(0)
        try:
            with Image.open(file, formats=_formats()) as image:
                return image.format
        except Image.UnidentifiedImageError:  # a TIFF that needs tifffile
            return None


def name_of(source: ImageSource) -> str | None:
    """The path of a source, or the name of a file object; None if it has neither."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    name = getattr(source, "name", None) if hasattr(source, "read") else None
    return name if isinstance(name, str) else None


def rereadable(source: ImageSource) -> ImageSource:
    """A source that can be read several times: of a file object, the content from its position."""
    if not hasattr(source, "read"):
        return source
    try:
        content = source.read()
    except Exception:  # `read_image` says why
        return source
    return content if isinstance(content, bytes) else source


def to_channels(pixels: NDArray[Any], channels: int | None) -> NDArray[Any]:
    """(H, W, 1 or 3) -> (H, W, channels); None changes nothing. dtype and range stay the same."""
    have = pixels.shape[2]
    if channels is None or channels == have:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)  # (H, W, 1) -> (H, W, 3)
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # (H, W, 3) -> (H, W)
    if pixels.dtype == np.uint16:
        luma = np.rint(luma)
    return luma.astype(pixels.dtype)[..., None]


def scaled(stored: Stored, value_range: ValueRange | None, name: str) -> NDArray[Any]:
    """The pixels of an image: measurements as float32 in 0..1, others unchanged.

    Values outside the range are clipped, and NaN, as outside of a field of view, becomes its lower
    end; both are counted in a warning.

    Raises:
        ImageError: there is no range, and the values are not floats from 0 to 1; or no value is
            finite.
    """
    pixels = stored.pixels
    if not stored.is_measurement:
        return pixels
    value_range = value_range or stored.own_range
    if value_range is None:
        return _from_zero_to_one(pixels)
    low, high = value_range
    finite, outside, shown = False, 0, np.zeros(pixels.shape, np.float32)
    strip = max(1, 2**20 // (pixels.shape[1] * pixels.shape[2]))  # rows; limits the memory needed
    for top in range(0, len(pixels), strip):
        part = pixels[top : top + strip].astype(np.float64)
        finite = finite or bool(np.isfinite(part).any())
        outside += int((~((part >= low) & (part <= high))).sum())  # NaN too
        part = np.where(np.isnan(part), low, part).clip(low, high)
        if low < high:  # halved, as the range of the largest doubles would overflow
            shown[top : top + strip] = (part / 2 - low / 2) / (high / 2 - low / 2)
    if not finite:
        raise ImageError(f"all of its {pixels.size} values are NaN or infinite")
    if outside and stored.own_range is None:
        _warn_of_clipping(name, outside, pixels.size, value_range)
    return shown


def _from_zero_to_one(pixels: NDArray[Any]) -> NDArray[Any]:
    """Floats that are valid without a range; uint8 if they are 8-bit values divided by 255."""
    kind = "integers" if pixels.dtype == np.int64 else "floats"
    described = f"{kind} of shape {'x'.join(map(str, pixels.shape))}"
    if unknown := int((~np.isfinite(pixels)).sum()):
        raise ImageError(f"{described}: NaN or infinite in {plural(unknown, 'value')}")
    low, high, tolerance = pixels.min(), pixels.max(), 1e-6  # of float32 arithmetic
    if pixels.dtype == np.int64 or low < -tolerance or high > 1 + tolerance:
        raise ImageError(
            f"{described}, from {low:.6g} to {high:.6g}: without a known range of values, uint8 "
            "(0 to 255), uint16 (0 to 65535) or floats from 0 to 1 are expected"
        )
    levels = np.rint(pixels * 255)
    if np.abs(pixels * 255 - levels).max() < 1e-4:  # an 8-bit image, divided by 255
        return levels.astype(np.uint8)
    return np.clip(pixels, 0, 1).astype(np.float32)


def _warn_of_clipping(name: str, count: int, total: int, value_range: ValueRange) -> None:
    global _clipped_images
    _clipped_images += 1
    if _clipped_images <= _NAMED:
        more = "; further images are not reported" if _clipped_images == _NAMED else ""
        low, high = value_range
        log.warning(
            "%s: %d of %d values are NaN or outside %.6g to %.6g, the range of the data set, and "
            "were clipped%s", name, count, total, low, high, more,
        )  # fmt: skip


def _read(source: ImageSource, at_least: int | None) -> Stored:
    if isinstance(source, str | os.PathLike):
        return _read_path(os.fspath(source), at_least)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read_file(io.BytesIO(source), at_least)
    if isinstance(source, Image.Image):
        with _pil_lock:  # PIL decodes in place, and two calls may get the same image
            unread = _unread_file(source)
            if unread is None:
                return _stored_pil(source)
        return _read_file(unread, at_least)
    if hasattr(source, "read"):
        content = source.read()
        if not isinstance(content, bytes):
            raise ImageError("a file opened as text; open it in binary mode ('rb')")
        return _read_file(io.BytesIO(content), at_least)
    if isinstance(source, np.ndarray):
        return _stored_array(array_pixels(source))
    if hasattr(source, "detach") and hasattr(source, "movedim"):  # torch's, without importing it
        return _stored_array(tensor_pixels(source))
    raise ImageError(
        f"{type(source).__name__} is not an image: give a path, bytes, a file object, a PIL image, "
        "an array (H, W, C) or a tensor (C, H, W)"
    )


def _read_path(path: str, at_least: int | None) -> Stored:
    if isinstance(path, Member):
        return _read_file(io.BytesIO(path.read()), at_least)
    if _URL.match(path):
        raise ImageError("is a URL; download it and give the file")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ImageError("is a folder, not an image")
    if not stat.S_ISREG(mode):  # a pipe would block
        raise ImageError("is not a regular file")
    with open(path, "rb") as file:
        return _read_file(file, at_least)


def _read_file(file: Any, at_least: int | None) -> Stored:
    """Reads a seekable binary file."""
    head = file.read(132)
    if not head:
        raise ImageError("is empty (0 bytes)")
    file.seek(0)
    if is_dicom(head):
        return Stored(*read_dicom(file))
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:26] == b"\x10\x04":
        return Stored(_gray_alpha_16(file.read()))
    try:
        return _read_with_pil(file, at_least)
    except (Image.UnidentifiedImageError, ValueError) as error:
        unread = isinstance(error, Image.UnidentifiedImageError) or "raw mode" in str(error)
        if not is_tiff(head) or not unread:
            raise
        pixels, orientation = read_with_tifffile(file)
        return Stored(_upright(pixels, orientation))


def _read_with_pil(file: Any, at_least: int | None) -> Stored:
    with Image.open(file, formats=_formats()) as image:
        if max(image.size) > MAX_SIDE:
            width, height = image.size
            raise ImageError(f"too large ({width} x {height} pixels): at most {MAX_SIDE} a side")
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        if image.format == "TIFF":
            if is_misread(image):
                raise Image.UnidentifiedImageError("a TIFF of separate bands")
            silence_libtiff()
            read_in_native_order(image)
        return _stored_pil(image)


def _formats() -> list[str]:
    """The formats that this Pillow knows; AVIF was added in 11.3."""
    Image.preinit()
    known = [f for f in FORMATS if f in Image.OPEN]
    if len(known) < len(FORMATS):
        Image.init()
        known = [f for f in FORMATS if f in Image.OPEN]
    return known


def _unread_file(image: Image.Image) -> io.BytesIO | None:
    """What an opened but undecoded PIL image reads from; None if only its pixels are left."""
    file = getattr(image, "fp", None)
    if file is None or not getattr(image, "tile", None) or image.tell() != 0:
        return None
    try:
        at = file.tell()
        file.seek(0)
        content = file.read()
        file.seek(at)
    except (OSError, ValueError):
        return None
    return io.BytesIO(content)


def _stored_pil(image: Image.Image) -> Stored:
    image.load()
    # after load(), where PIL turns TIFFs upright and drops the tag
    orientation = orientation_of(image)
    pixels = _pixels(image)
    return Stored(_upright(pixels, orientation))


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 if it has none."""
    try:
        value = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block is no reason to lose a good image
        return 1
    return value if 1 <= value <= 8 else 1


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
    if hasattr(image, "tag_v2") and (stored := stored_tiff(image)) is not None:
        return stored
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)[..., None]
        return np.where(values == image.info.get("transparency", -1), np.uint16(65535), values)
    if image.mode == "I":  # PIL's container for 16 bits, where the values fit
        values = np.asarray(image)
        wide = values.min() < 0 or values.max() > 65535
        return values.astype(np.int64 if wide else np.uint16)[..., None]
    if image.mode == "F":
        return np.asarray(image).astype(np.float64)[..., None]
    if image.mode == "La":  # premultiplied alpha, which PIL converts only to LA
        image = image.convert("LA")
    gray = image.mode in ("1", "L", "LA")
    palette = image.mode in ("P", "PA")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    array = np.array(image.convert("L" if gray else "RGB"))
    if gray:
        return array[..., None]
    return array[..., :1].copy() if palette and is_gray(array) else array


def is_gray(pixels: NDArray[Any]) -> bool:
    """Whether (H, W, C) has one channel, or channels that are all equal."""
    return pixels.shape[2] == 1 or bool((pixels[..., 1:] == pixels[..., :1]).all())


def opacity(path: str | os.PathLike[str]) -> NDArray[np.uint8] | None:
    """The alpha channel of an image file, (H, W), upright; None if it has no transparency.

    Only for the files that Pillow reads: None for others.

    Raises:
        ImageError: it can't be read.
    """
    try:
        if format_of(path) is None:
            return None
        with Image.open(path, formats=_formats()) as image:
            if not image.has_transparency_data:
                return None
            image.load()
            if image.mode.startswith("I;16"):
                clear = np.asarray(image) == image.info["transparency"]
                alpha = np.where(clear, 0, 255).astype(np.uint8)
            else:
                alpha = np.asarray(image.convert("RGBA").getchannel("A"))
            return _upright(alpha[..., None], orientation_of(image))[..., 0]
    except Exception as error:  # decoders raise almost anything for broken files
        raise ImageError(f"{os.fsdecode(path)}: {_fault(error)}") from error


def _gray_alpha_16(content: bytes) -> NDArray[np.uint16]:
    """A PNG of 16-bit gray and alpha, over white; PIL would reduce it to 8 bits.

    Its four bytes per pixel are filtered and interlaced like those of 8-bit RGBA, so PIL decodes
    the file under such a header.
    """
    import zlib

    header = content[12:24] + b"\x08\x06" + content[26:29]
    changed = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    with Image.open(io.BytesIO(changed), formats=["PNG"]) as image:
        if max(image.size) > MAX_SIDE:
            raise ImageError(f"too large ({image.size[0]} x {image.size[1]} pixels)")
        image.load()
        orientation = orientation_of(image)
        values = np.asarray(image).view(">u2").astype(np.uint16)  # (H, W, 4) bytes -> (H, W, 2)
    return _upright(over_white(values), orientation)


def _stored_array(pixels: NDArray[Any]) -> Stored:
    """(H, W, 1 to 4) of uint8, uint16, int64 or float64; the last of 2 or 4 channels is alpha."""
    if pixels.shape[2] in (1, 3):
        return Stored(np.ascontiguousarray(pixels))
    if pixels.dtype != np.uint8:
        return Stored(over_white(pixels))
    mode, size = "LA" if pixels.shape[2] == 2 else "RGBA", pixels.shape[1::-1]
    return Stored(_pixels(Image.frombytes(mode, size, np.ascontiguousarray(pixels).tobytes())))
