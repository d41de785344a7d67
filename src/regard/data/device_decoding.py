"""JPEG files decoded on the network's device: by nvJPEG on NVIDIA GPUs, through torchcodec.

Threads read the files and their headers; the device decodes, crops and resizes. Files that it
may decode differently from Pillow, or not at all, are left to Pillow: other formats, CMYK, colors
stored as red, green and blue, truncated files. Only training reads images this way: evaluation
sees the same pixels as prediction.
"""

import functools
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from regard.data.augment import random_numbers
from regard.data.images import MAX_SIDE, orientation_of
from regard.data.loading import Batch, Reader, SampleOrder, StreamingLoader, stacked
from regard.data.members import open_binary
from regard.data.workers import read_ahead
from regard.errors import ImageError, UsageError
from regard.extras import require
from regard.files import reason
from regard.machine import is_out_of_memory

UNKNOWN, PLAIN, OTHER = 0, 1, 2  # kinds of file
TOGETHER = 64  # files that are decoded at once: decoded in full, they may take 100 MB each
_RGB_IDS = [82, 71, 66]  # components named R, G and B, which libjpeg takes to be RGB


def check_device_decoding(device: torch.device) -> None:
    """Refuses a device that can't decode JPEG files, by decoding a small one.

    Raises:
        UsageError: neither CUDA nor a CPU, or torchcodec is not installed or can't decode there.
    """
    if device.type not in ("cuda", "cpu"):
        raise UsageError(f"decode=device: CUDA decodes JPEG files, {device.type} does not; use cpu")
    require("gpu", "decode=device")
    Image.new("RGB", (64, 64)).save(file := io.BytesIO(), "JPEG")
    try:
        from torchcodec.decoders import decode_jpeg

        decode_jpeg([file.getvalue()], mode="UNCHANGED", device=device)
    except (ImportError, OSError, RuntimeError) as error:  # from another build of torch; no nvJPEG
        raise UsageError(
            f"decode=device: torchcodec can't decode on {device} with torch {torch.__version__} "
            f"({reason(error)}): install the release for it, or use decode=cpu"
        ) from error


@dataclass
class EncodedBatch:
    """The files of a batch, still encoded.

    Attributes:
        reader: crops the images.
        indices: (B,) rows of the table.
        random_numbers: (B, WIDTH) random numbers of the images.
        files: those that the device decodes, by position in the batch.
        images: those that Pillow decoded, cropped, (C, H, W), by position.
        unreadable: reasons, by position.
    """

    reader: Reader
    indices: Tensor
    random_numbers: Tensor
    files: dict[int, bytes]
    images: dict[int, Tensor]
    unreadable: dict[int, str]

    def decoded(self, device: torch.device) -> Batch:
        """The batch, with its images on the device."""
        images: dict[int, Tensor] = {}
        for k, image in zip(self.files, self._decoded(device), strict=True):
            if image is not None:
                pixels = in_channels(image, self.reader.preprocess.input_size[0])
                images[k] = self.reader.crop(pixels, self.random_numbers[k])
        for k, cropped in (self.images | self._by_pillow(set(self.files) - set(images))).items():
            images[k] = cropped.to(device)
        readable = sorted(images)
        bad = [(int(self.indices[k]), why) for k, why in sorted(self.unreadable.items())]
        some = [images[k] for k in readable]
        empty = torch.zeros((0, *self.reader.preprocess.input_size), device=device)
        return Batch(
            stacked(some) if some else empty,
            self.indices[readable], self.random_numbers[readable], bad,
        )  # fmt: skip

    def _decoded(self, device: torch.device) -> Iterator[Tensor | None]:
        """(C, H, W) uint8 of each file, upright; None if it is broken."""
        from torchcodec.decoders import decode_jpeg

        decode = functools.partial(decode_jpeg, mode="UNCHANGED", device=device)
        files = list(self.files.values())
        for first in range(0, len(files), TOGETHER):
            some = files[first : first + TOGETHER]
            if (found := _attempted(decode, some)) is None:  # one broken file fails the call
                found = (_attempted(decode, file) for file in some)
            yield from found

    def _by_pillow(self, places: set[int]) -> dict[int, Tensor]:
        """The images that the device could not decode; records those that Pillow can't read."""
        images = {}
        for k in sorted(places):
            try:
                decoded = self.reader.decode(int(self.indices[k]))
                images[k] = self.reader.crop(decoded, self.random_numbers[k])
            except ImageError as error:
                self.unreadable[k] = str(error)
        return images


ReadBatch = Batch | EncodedBatch


class DecodingLoader(StreamingLoader):
    """Gives out `EncodedBatch`es in order, read ahead by threads, for a device that decodes JPEG.

    Uses the same random numbers for a position, and so the same crops, as `StreamingLoader`.
    """

    def __init__(self, reader: Reader, order: SampleOrder | None, seed: int, workers: int) -> None:
        super().__init__(reader, order, seed, workers)
        # headers are read only once: parsing them in threads would hold up the training thread
        self._kinds: NDArray[np.int8] = np.full(len(reader.table), UNKNOWN, np.int8)
        self._seed = seed

    def _read(self, spans: Sequence[tuple[int, int]]) -> Iterator[EncodedBatch]:  # type: ignore[override]
        if self.workers == 0:
            return map(self._encoded, spans)
        return read_ahead(spans, self._encoded, self.workers, self.workers + 1, self.stop)

    def _encoded(self, span: tuple[int, int]) -> EncodedBatch:
        start, count = span
        u = random_numbers(self._seed, start, count)
        rows = np.arange(start, start + count) if self.order is None else self.order.at(*span)
        batch = EncodedBatch(self.reader, torch.from_numpy(rows), u, {}, {}, {})
        by_pillow = set()
        for k, row in enumerate(rows.tolist()):
            if (file := self._file(row)) is None:
                by_pillow.add(k)
            else:
                batch.files[k] = file
        batch.images.update(batch._by_pillow(by_pillow))
        return batch

    def _file(self, row: int) -> bytes | None:
        """The content of a file that the device decodes as Pillow does, or None."""
        files = self.reader.table.files
        if files is None or self._kinds[row] == OTHER:
            return None
        try:
            with open_binary(files[row]) as file:
                content = file.read()
        except OSError:  # reading it with Pillow will say why
            return None
        if self._kinds[row] == UNKNOWN:
            self._kinds[row] = PLAIN if is_plain_jpeg(content) else OTHER
        complete = content.rstrip(b"\0").endswith(b"\xff\xd9")  # the end marker
        return content if complete and self._kinds[row] == PLAIN else None


def is_plain_jpeg(content: bytes) -> bool:
    """Whether this is a JPEG file that torchcodec decodes as Pillow does: gray, or YCbCr color."""
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.format != "JPEG" or max(image.size) > MAX_SIDE:
                return False
            turned = orientation_of(image)
            if turned != 1 and not _is_read_by_torchcodec(turned, content):
                return False
            ids = [layer[0] for layer in getattr(image, "layer", [])]
            stored_rgb = image.info.get("adobe_transform") == 0 or ids == _RGB_IDS
            return image.mode == "L" or (image.mode == "RGB" and not stored_rgb)
    except Exception:  # Pillow raises it again when it reads the broken file
        return False


def in_channels(image: Tensor, channels: int) -> Tensor:
    """(1 or 3, H, W) uint8 -> (channels, H, W): gray is repeated, color becomes Pillow's "L"."""
    if len(image) == channels:
        return image
    if channels == 3:
        return image.expand(3, -1, -1)
    red, green, blue = image.int()
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16  # weights 0.299, 0.587, 0.114
    return luma.to(torch.uint8)[None]


def _is_read_by_torchcodec(orientation: int, content: bytes) -> bool:
    """Whether EXIF has the orientation as one 16-bit number with no fill bytes before it.

    Pillow also reads other kinds of number, XMP, and what follows fill bytes.
    """
    before, _, after = content[: 2**18].partition(b"Exif\0\0")
    entries = [struct.pack(order + "HHIH", 0x0112, 3, 1, orientation) for order in "<>"]
    return b"\xff\xff" not in before and any(entry in after[: 2**16] for entry in entries)


def _attempted(decode: Callable[[Any], Any], source: Any) -> Any:
    """What `decode` returns, or None if it fails for any reason but lack of memory."""
    try:
        return decode(source)
    except RuntimeError as error:
        if is_out_of_memory(error):  # torchcodec does not raise torch.OutOfMemoryError
            raise
        return None
