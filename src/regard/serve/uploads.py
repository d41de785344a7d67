"""What is taken from a request: bytes of an image, bounded before anything is decoded."""

import asyncio
import io
import tempfile
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from regard.data.images import ImageError, read_image


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        megabytes: of an upload.
        megapixels: of an image, by its header, before it is decoded.
        requests: in work at the same moment; the rest are told to come again.
        seconds: for a whole request; a third of it for the upload.
    """

    megabytes: float = 20.0
    megapixels: float = 50.0
    requests: int = 16
    seconds: float = 60.0


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


def decode(body: bytes, limits: Limits) -> NDArray[Any]:
    """The image, (H, W, C); whatever its name or type was said to be.

    Raises:
        HTTPException: 413 too many pixels, told by its header; 422 no image that can be read.
    """
    try:
        with Image.open(io.BytesIO(body)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise _too_large("far too many pixels", limits) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise HTTPException(422, "this is no image that can be read") from None
    if width * height > limits.megapixels * 1e6:
        raise _too_large(f"{width} x {height} pixels", limits)
    with tempfile.NamedTemporaryFile(prefix="regard-") as file:
        file.write(body)
        file.flush()
        try:
            return read_image(file.name)
        except ImageError as error:
            reason = str(error).replace(file.name, "the image")
            raise HTTPException(422, reason) from None
