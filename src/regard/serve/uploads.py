"""What is taken from a request: bytes of an image, bounded before anything is decoded."""

import asyncio
import io
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError

from regard.errors import ImageError, UsageError

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # what read_image takes beside DICOM
_NO_IMAGE = "no image that can be read (PNG, JPEG, BMP, TIFF, WebP, DICOM)"
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # PS3.5 A.5: all of the data set in one zlib stream


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        megabytes: of an upload.
        megapixels: of an image, by its header, before it is decoded.
        requests: in work at the same moment; the rest are told to come again.
        seconds: for a whole request; a third of it for the upload.

    Raises:
        UsageError: one is not above 0, or not finite.
    """

    megabytes: float = 20.0
    megapixels: float = 50.0
    requests: int = 16
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels", "requests", "seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name} {value}: more than 0, and finite, is needed")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The request's body.

    Raises:
        HTTPException: 413 too large, 408 too slow, 400 empty.
    """
    most = int(limits.megabytes * 1_000_000)
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > most:
        raise _too_large(f"{int(told) / 1e6:.1f} MB", limits)
    body = bytearray()

    async def receive() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > most:
                raise _too_large(f"more than {limits.megabytes:g} MB", limits)

    try:
        await asyncio.wait_for(receive(), limits.seconds / 3)
    except TimeoutError:
        raise HTTPException(408, "the upload took too long") from None
    if not body:
        raise HTTPException(400, "send the image's bytes as the body of the request")
    return bytes(body)


def _too_large(what: str, limits: Limits) -> HTTPException:
    most = f"at most {limits.megabytes:g} MB and {limits.megapixels:g} megapixels are taken"
    return HTTPException(413, f"the image is too large ({what}): {most}")


def check(body: bytes, limits: Limits) -> None:
    """Looks at an image's header and decodes nothing.

    Raises:
        HTTPException: 413 too many pixels; 422 no image that can be read.
    """
    dicom = body[128:132] == b"DICM" or body[:2] == b"\x08\x00"  # as read_image tells it
    try:
        width, height = _dicom_size(body) if dicom else _size(body)
    except Image.DecompressionBombError:
        raise _too_large("far too many pixels", limits) from None
    if width * height > limits.megapixels * 1e6:
        raise _too_large(f"{width} x {height} pixels", limits)


def _size(body: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            return image.size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise HTTPException(422, _NO_IMAGE) from None


def _dicom_size(body: bytes) -> tuple[int, int]:
    try:
        import pydicom
    except ImportError:
        raise HTTPException(422, "this is DICOM; the server lacks regard[dicom]") from None
    if _DEFLATED in body:  # would be inflated as a whole, however large, to see its header
        raise HTTPException(422, "deflated DICOM is not taken: send it uncompressed")
    try:
        header = pydicom.dcmread(io.BytesIO(body), force=True, stop_before_pixels=True)
        return int(header.Columns), int(header.Rows)
    except Exception:  # of broken files pydicom raises nearly anything
        raise HTTPException(422, _NO_IMAGE) from None


@contextmanager
def as_file(body: bytes) -> Iterator[Path]:
    """A checked upload as a file for read_image, gone afterwards; its name is the server's own.

    Raises:
        HTTPException: 422 where what is done with it raises ImageError.
    """
    with tempfile.NamedTemporaryFile(prefix="regard-") as file:
        file.write(body)
        file.flush()
        try:
            yield Path(file.name)
        except ImageError as error:
            reason = str(error).replace(file.name, "the image")
            raise HTTPException(422, reason) from None
