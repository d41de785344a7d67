"""Reads uploads: the bytes of one image, with every limit checked before it is decoded."""

import asyncio
import email
import email.utils
import io
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from fastapi import HTTPException, Request
from PIL import Image, UnidentifiedImageError

from regard.data.dicom import is_dicom
from regard.data.images import FORMATS
from regard.data.tiff import is_tiff, size_with_tifffile
from regard.errors import ImageError, UsageError

SIDE = 32_768  # limit of the longer side, in pixels
ASPECT = 1_024  # limit of longer side over shorter side
_NO_IMAGE = f"no image that can be read ({', '.join(FORMATS)}, DICOM)"
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # PS3.5 A.5: the whole data set in one zlib stream


@dataclass(frozen=True)
class Limits:
    """Limits of what the server accepts.

    Attributes:
        megabytes: size of an upload.
        megapixels: size of an image, from its header, before it is decoded; half of it for
            DICOM, float and 32-bit images, and less for TIFFs with many or wide bands. Its sides
            are limited too, see SIDE and ASPECT.
        requests: maximum concurrent requests; further ones get HTTP 503.
        seconds: time limit of a request; a third of it for the upload.

    Raises:
        UsageError: one is not positive and finite.
    """

    megabytes: float = 20.0
    megapixels: float = 50.0
    requests: int = 16
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels", "requests", "seconds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name}={value}: must be positive and finite")


def check_options(request: Request, options: Collection[str]) -> None:
    """Refuses what the address asks for and nothing would read, such as ?Top=3.

    Raises:
        HTTPException: 422 an unknown option, or one that is given twice.
    """
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in options:
            raise HTTPException(422, f"?{name}=: no such option; choose {', '.join(options)}")
        if given.count(name) > 1:
            raise HTTPException(422, f"?{name}= is given {given.count(name)} times")


async def read_image_bytes(
    request: Request, limits: Limits, options: Collection[str] = ()
) -> bytes:
    """The image file in a request: its body, or the one file of a multipart form.

    Args:
        request, limits: what is asked, and what is accepted.
        options: fields that are read from the address, and refused in a form.

    Raises:
        HTTPException: 413 too large, 408 too slow, 400 empty, not a form with one file, or a form
            with an option.
    """
    body = await _read_body(request, limits)
    kind = Message()
    kind["content-type"] = request.headers.get("content-type", "")
    if kind.get_content_type() == "multipart/form-data":
        body = _file_of_form(body, str(kind.get_param("boundary") or ""), options)
    if not body:
        raise HTTPException(400, "the image is empty (0 bytes): send it as the body of the request")
    return body


async def _read_body(request: Request, limits: Limits) -> bytes:
    most = int(limits.megabytes * 1_000_000)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(f"{int(declared) / 1e6:.1f} MB", limits)
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
    return bytes(body)


MOST_HEAD = 8192  # limit of a part's headers in bytes, as parsing them takes quadratic time


def _file_of_form(body: bytes, boundary: str, options: Collection[str]) -> bytes:
    """The one file of a multipart/form-data body (RFC 7578)."""
    files = []
    # every delimiter except the first follows a line break, which belongs to it
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    for part in parts[1:] if boundary else []:
        head, end, content = part[:MOST_HEAD].partition(b"\r\n\r\n")
        if not end and len(part) > MOST_HEAD:
            raise HTTPException(400, f"a part of the form has headers of over {MOST_HEAD:,} bytes")
        field, name = _names(head)
        content += part[MOST_HEAD:]
        if name is None and field in options and content.strip():
            raise HTTPException(
                400, f"{field} is not read from a form: put it into the address, as ?{field}=..."
            )
        if name or (name is not None and content):  # a browser sends "" for a field left empty
            files.append(content)
    if len(files) != 1:
        found = "no file" if not files else f"{len(files)} files"
        raise HTTPException(400, f"{found} in the form: send one, as with curl -F file=@image.jpg")
    return files[0]


def _names(head: bytes) -> tuple[str, str | None]:
    """The name of a form's part, and that of its file; None: it is a text field."""
    # the name may be in any encoding, which does not matter here
    headers = email.message_from_string(head.lstrip(b"\r\n").decode("latin-1"))
    try:
        field = headers.get_param("name", "", header="content-disposition")
        return email.utils.collapse_rfc2231_value(field), headers.get_filename()
    except ValueError:  # an unknown encoding, or a number of 5,000 digits
        raise HTTPException(400, "the file's name in the form can't be read") from None


def _too_large(what: str, limits: Limits) -> HTTPException:
    most = f"at most {limits.megabytes:g} MB and {limits.megapixels:g} megapixels are accepted"
    return HTTPException(413, f"the image is too large ({what}): {most}")


def check(body: bytes, limits: Limits) -> int:
    """Checks the size in an image's header; decodes nothing.

    Returns:
        The number of pixels; those of DICOM, float and 32-bit images, which take more memory,
        count twice, and those of TIFFs with many or wide bands once for every 8 bytes.

    Raises:
        HTTPException: 413 too many pixels, or too long for its width; 422 not a readable
            image.
    """
    try:
        width, height, times = _dicom_size(body) if is_dicom(body[:132]) else _size(body)
    except Image.DecompressionBombError:
        raise _too_large("far too many pixels", limits) from None
    size = f"{width} x {height} pixels{' of more than 16 bits' * (times > 1)}"
    pixels = width * height * times
    if pixels > limits.megapixels * 1e6:
        raise _too_large(size, limits)
    if max(width, height) > min(SIDE, ASPECT * min(width, height)):
        sides = f"at most {SIDE:,} pixels a side, and {ASPECT:,} times as long as wide"
        raise HTTPException(413, f"the image is too long ({size}): {sides}")
    return pixels


def _size(body: bytes) -> tuple[int, int, int]:
    """Width, height, and the weight of a pixel."""
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            return *image.size, 2 if image.mode in ("F", "I") else 1
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        if not is_tiff(body):
            raise HTTPException(422, _NO_IMAGE) from None
    try:  # as read_image does
        width, height, deep = size_with_tifffile(io.BytesIO(body))
        return width, height, max(2, -(-deep // 8))
    except ImageError as error:
        raise HTTPException(422, f"the image {error}") from None
    except Exception:  # tifffile raises nearly anything for broken files
        raise HTTPException(422, _NO_IMAGE) from None


def _dicom_size(body: bytes) -> tuple[int, int, int]:
    try:
        import pydicom
    except ImportError:
        raise HTTPException(422, "this is DICOM; the server lacks regard[dicom]") from None
    if _DEFLATED in body:  # reading its header would inflate all of it, however large
        raise HTTPException(422, "deflated DICOM is not accepted: send it uncompressed")
    try:
        header = pydicom.dcmread(io.BytesIO(body), force=True, stop_before_pixels=True)
        return int(header.Columns), int(header.Rows), 2  # read as floats
    except Exception:  # pydicom raises nearly anything for broken files
        raise HTTPException(422, _NO_IMAGE) from None


@contextmanager
def as_file(body: bytes) -> Iterator[Path]:
    """A checked upload as a temporary file for read_image; the server chooses its name.

    Raises:
        HTTPException: 422 for an ImageError within the block.
    """
    number, name = tempfile.mkstemp(prefix="regard-")
    try:
        with os.fdopen(number, "wb") as file:  # closed before it is read: Windows opens none twice
            file.write(body)
        yield Path(name)
    except ImageError as error:
        reason = str(error).replace(name, "the image")
        raise HTTPException(422, reason) from None
    finally:
        os.unlink(name)
