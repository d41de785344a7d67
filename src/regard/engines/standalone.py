"""Predicts the classes of images with an exported network.

Prints one JSON object per image, its classes with the most probable first:

    python THIS_FILE photo.jpg folder/ --top 3

Needs NumPy, Pillow and the runtime of the network's file: onnxruntime for .onnx, openvino for
.xml, torch for .pt2. Images are decoded and resized as in training: EXIF orientation,
transparency over white, 16 bits, channels, and crop, margins or squash as the network's metadata
says; its normalization is part of the network.
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODEL = "net.onnx"  # the network's file, in the folder of this one

Array = NDArray[Any]
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif",
)  # fmt: skip
JUNK = ("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information")
BATCH = 16


# ------------------------------------------------------------------------------ the network
class Network:
    """An exported network with its metadata.

    Attributes:
        facts: the metadata.
        run: (B, C, H, W) float32 in 0..255 -> probabilities (B, classes).
    """

    def __init__(self, path: Path) -> None:
        opened = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_torch}[path.suffix]
        self.facts: dict[str, Any]
        self.run: Callable[[Array], Array]
        self.facts, self.run = opened(str(path))

    def predict(self, paths: list[str], top: int) -> Iterator[dict[str, Any]]:
        """The classes of each image, or the reason why it has none."""
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            inputs = [_read_or_error(path, self.facts) for path in part]
            good = [x for x in inputs if not isinstance(x, str)]
            answers: Iterator[Array] = iter(self.run(np.stack(good)) if good else ())
            for path, x in zip(part, inputs, strict=True):
                if isinstance(x, str):
                    yield {"path": path, "error": x}
                    continue
                shares = next(answers)
                if not np.isfinite(shares).all():  # NaN is not valid JSON
                    yield {"path": path, "error": f"{path}: its answer is not finite"}
                    continue
                order = np.argsort(-shares, kind="stable")[:top]
                classes = [
                    {"class": self.facts["class_names"][i], "probability": float(shares[i])}
                    for i in order
                ]
                yield {"path": path, "classes": classes, **_decision(shares, self.facts)}


def _decision(shares: Array, facts: dict[str, Any]) -> dict[str, str]:
    """The decision at the threshold that the network was exported with, if it has one."""
    threshold = (facts.get("calibration") or {}).get("threshold")
    if threshold is None:
        return {}
    names, positive = facts["class_names"], threshold["positive"]
    value = math.inf if threshold["value"] is None else threshold["value"]
    # within rounding, as in regard.evaluation.statistics.reaches
    least = value - 1e-5 * value * (1 - value) - 1.5e-7 * value if value < math.inf else value
    if float(shares[names.index(positive)]) >= least:
        return {"decision": positive}
    others = [name for name in names if name != positive]
    return {"decision": others[0] if len(others) == 1 else f"not {positive}"}


Opened = tuple[dict[str, Any], Callable[[Array], Array]]


def _open_onnx(path: str) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    facts = {k.removeprefix("regard."): json.loads(v) for k, v in texts.items() if "regard." in k}
    return facts, lambda x: session.run(["probabilities"], {"images": x})[0]


def _open_openvino(path: str) -> Opened:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    texts = model.get_rt_info(["regard"]).value
    facts = {k: json.loads(v if isinstance(v, str) else v.value) for k, v in texts.items()}
    # the default is bf16 if the processor supports it, even for each image's own mean
    f32 = facts["precision"] == "fp32" or facts["normalization"] == "image"
    hint = {"INFERENCE_PRECISION_HINT": "f32"} if f32 else {}
    compiled = core.compile_model(model, "CPU", hint)
    return facts, lambda x: compiled(x)[0].copy()


def _open_torch(path: str) -> Opened:
    import torch

    extra = {"regard.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    facts = {k: json.loads(v) for k, v in json.loads(extra["regard.json"]).items()}

    def run(x: Array) -> Array:
        with torch.no_grad():
            answers = module(torch.from_numpy(x))
        return (answers[0] if isinstance(answers, tuple) else answers).numpy()

    return facts, run


# ---------------------------------------------------------------------------- reading images
class ImageError(Exception):
    """An image can't be read; the message says why."""


def _read_or_error(path: str, facts: dict[str, Any]) -> Array | str:
    try:
        return read_input(path, facts)
    except FileNotFoundError:
        return f"{path}: no such file"
    except Image.UnidentifiedImageError:
        return f"{path}: is no image that Pillow can read"
    except Exception as error:  # decoders raise almost anything for broken files
        return f"{path}: {' '.join(str(error).split()) or type(error).__name__}"


def read_input(path: str, facts: dict[str, Any]) -> Array:
    """An image file -> (C, H, W) float32 in 0..255, the network's input."""
    pixels = to_channels(_decode(Path(path).read_bytes(), facts.get("value_range")), facts)
    if pixels.dtype == np.uint16:
        pixels = pixels.astype(np.float32) * np.float32(255 / 65535)
    elif pixels.dtype == np.float32:
        pixels = pixels * np.float32(255)
    return fit(pixels, facts).astype(np.float32).transpose(2, 0, 1)


def _decode(content: bytes, value_range: list[float] | None) -> Array:
    """(H, W, 1 or 3), upright: uint8, uint16, or float32 from 0 to 1."""
    if not content:
        raise ImageError("is empty (0 bytes)")
    if content[128:132] == b"DICM":
        raise ImageError("is DICOM: convert it to 16-bit PNG first")
    gray_alpha_16 = content[:8] == b"\x89PNG\r\n\x1a\n" and content[24:26] == b"\x10\x04"
    if gray_alpha_16:  # Pillow would reduce it to 8 bits; read as 8-bit RGBA its bytes are the same
        header = content[12:24] + b"\x08\x06" + content[26:29]
        checksum = zlib.crc32(header).to_bytes(4, "big")
        content = content[:12] + header + checksum + content[33:]
    Image.init()
    with Image.open(io.BytesIO(content), formats=[f for f in FORMATS if f in Image.OPEN]) as image:
        if image.format == "TIFF":
            _correct_tiff(image)
        image.load()
        try:
            orientation = int(image.getexif().get(0x0112, 1))
        except Exception:  # a broken EXIF block is no reason to lose a good image
            orientation = 1
        if gray_alpha_16:
            pixels = _over_white_16(np.asarray(image).view(">u2").astype(np.float64))
        else:
            pixels = _scaled(_pixels(image), value_range)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _pixels(image: Any) -> Array:
    """A loaded image of any mode -> (H, W, 1 or 3).

    uint8 and uint16, or int64 and float64 for signed, 32-bit and float images.
    """
    if hasattr(image, "tag_v2") and (stored := _tiff_pixels(image)) is not None:
        return stored[..., None]
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)[..., None]
        return np.where(values == image.info.get("transparency", -1), np.uint16(65535), values)
    if image.mode == "I":  # also Pillow's container for 16 bits
        values = np.asarray(image)
        wide = values.min() < 0 or values.max() > 65535
        return values.astype(np.int64 if wide else np.uint16)[..., None]
    if image.mode == "F":
        return np.asarray(image).astype(np.float64)[..., None]
    if image.mode == "La":  # premultiplied alpha, which PIL converts only to LA
        image = image.convert("LA")
    gray, palette = image.mode in ("1", "L", "LA"), image.mode == "P"
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    array = np.array(image.convert("L" if gray else "RGB"))
    if gray:
        return array[..., None]
    gray = palette and bool((array[..., 1:] == array[..., :1]).all())
    return array[..., :1].copy() if gray else array


def _correct_tiff(image: Any) -> None:
    """Corrects what Pillow (seen in 13.0) would misread in a TIFF, or refuses the file."""
    samples, bits = image.tag_v2.get(277, 1), image.tag_v2.get(258, (1,))[0]
    if samples > 1 and image.tag_v2.get(284) == 2:  # planes, one after the other
        raw = bits != 8 and image.tile[0].codec_name == "raw"
        if raw or len(image.getbands()) < min(samples, 3):
            raise ImageError("is a TIFF of separate bands, which Pillow misreads: convert it first")
    if sys.byteorder == "little":  # libtiff has already swapped the bytes
        native = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
        image.tile = [
            tile._replace(args=(native[tile.args[0]], *tile.args[1:]))
            if tile.codec_name == "libtiff" and tile.args[0] in native else tile
            for tile in image.tile
        ]  # fmt: skip


def _tiff_pixels(image: Any) -> Array | None:
    """Values (H, W) of a TIFF as its tags say; None if Pillow's own are right."""
    bits, sample_format = image.tag_v2.get(258, (1,)), image.tag_v2.get(339, (1,))[0]
    inverted = image.tag_v2.get(262) == 0  # small values are white
    pixels = np.asarray(image)
    if image.mode == "L" and bits == (8,) and sample_format == 2:
        pixels = pixels.view(np.int8).astype(np.int64)
    elif image.mode.startswith("I;16"):
        pixels = pixels.astype(np.uint16)
        return 65535 - pixels if inverted else pixels
    elif image.mode == "I":
        unsigned = bits == (32,) and sample_format != 2
        pixels = (pixels.view(np.uint32) if unsigned else pixels).astype(np.int64)
    elif image.mode == "F":
        pixels = pixels.astype(np.float64)
    else:
        return None
    return 1 - pixels if inverted else pixels  # Pillow has no integers of this kind


def _over_white_16(values: Array) -> Array:
    """(H, W, gray and alpha) of 0..65535 -> (H, W, 1) uint16."""
    gray, alpha = values[..., :1], values[..., 1:]
    return np.rint(65535 + (gray - 65535) * (alpha / 65535)).astype(np.uint16)


def _scaled(pixels: Array, value_range: list[float] | None) -> Array:
    """Scales signed, 32-bit and float values to 0..1 by the range of the training data."""
    if pixels.dtype not in (np.int64, np.float64):
        return pixels
    finite = np.isfinite(pixels)
    if value_range is None:
        within = finite.all() and pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
        if pixels.dtype == np.int64 or not within:
            raise ImageError("has values outside 0 to 1, and the network knows no range for them")
        levels = np.rint(pixels * 255)
        if np.abs(pixels * 255 - levels).max() < 1e-4:  # an 8-bit image, divided by 255
            return levels.astype(np.uint8)
        return np.clip(pixels, 0, 1).astype(np.float32)
    if not finite.any():
        raise ImageError(f"all of its {pixels.size} values are NaN or infinite")
    low, high = value_range
    if low == high:
        return np.zeros(pixels.shape, np.float32)
    values = np.where(np.isnan(pixels), low, pixels).clip(low, high)
    return ((values / 2 - low / 2) / (high / 2 - low / 2)).astype(np.float32)


def to_channels(pixels: Array, facts: dict[str, Any]) -> Array:
    """(H, W, 1 or 3) -> (H, W, C): gray is repeated, color becomes ITU-R 601 luma."""
    channels = facts["input_size"][0]
    if channels == pixels.shape[2]:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    return (np.rint(luma) if pixels.dtype == np.uint16 else luma).astype(pixels.dtype)[..., None]


# ---------------------------------------------------------------------------------- resizing
def fit(pixels: Array, facts: dict[str, Any]) -> Array:
    """(H, W, C) of any size -> the network's height and width."""
    _, rows, columns = facts["input_size"]
    height, width = pixels.shape[:2]
    if (
        facts["resize"] == "crop"
        and facts.get("resize_first")
        and (max(height, width) <= 16 * min(height, width))
    ):
        return resized_and_cropped(pixels, rows, columns, facts["crop_pct"])
    y, x = rows / height, columns / width  # scale factors
    if facts["resize"] == "crop":
        y = x = max(y, x)
    elif facts["resize"] == "pad":
        y = x = min(y, x)
    y, x = y / facts["crop_pct"], x / facts["crop_pct"]
    high = max(1, min(height, round(rows / y)))  # of the part of the image that is used
    wide = max(1, min(width, round(columns / x)))
    top, left = (height - high) // 2, (width - wide) // 2
    pixels = pixels[top : top + high, left : left + wide]
    if facts["resize"] != "pad":
        return resized(pixels, rows, columns)
    high, wide = max(1, min(rows, round(high * y))), max(1, min(columns, round(wide * x)))
    small = resized(pixels, high, wide)
    fill = np.rint(small.mean(axis=(0, 1), dtype=np.float64)).astype(small.dtype)
    out = np.broadcast_to(fill, (rows, columns, small.shape[2])).copy()
    top, left = (rows - high) // 2, (columns - wide) // 2
    out[top : top + high, left : left + wide] = small
    return out


def resized_and_cropped(pixels: Array, rows: int, columns: int, crop_pct: float) -> Array:
    """The whole image resized, then its center cropped: (H, W, C) -> (rows, columns, C)."""
    height, width = pixels.shape[:2]
    if rows / height >= columns / width:
        high = math.floor(rows / crop_pct)
        wide = max(columns, int(high * width / height))
    else:
        wide = math.floor(columns / crop_pct)
        high = max(rows, int(wide * height / width))
    top, left = round((high - rows) / 2), round((wide - columns) / 2)
    return resized(pixels, high, wide)[top : top + rows, left : left + columns]


def resized(pixels: Array, rows: int, columns: int) -> Array:
    """Bilinear with antialiasing, (H, W, C) -> (rows, columns, C), along the rows first."""
    height, width = pixels.shape[:2]
    if height * columns > 4 * max(height * width, rows * columns):  # needs less memory
        pixels = _resized_axis(pixels, rows, 0)
    return _resized_axis(_resized_axis(pixels, columns, 1), rows, 0)


def _resized_axis(pixels: Array, size: int, axis: int) -> Array:
    """One axis resized; uint8 in integer arithmetic with 15-bit weights, as in torchvision."""
    have = pixels.shape[axis]
    if have == size:
        return pixels
    scale = have / size
    reach = max(scale, 1.0)
    taps = []  # for each output position: where its pixels begin, and their weights
    for place in range(size):
        center = scale * (place + 0.5)
        first, last = max(int(center - reach + 0.5), 0), min(int(center + reach + 0.5), have)
        weights = np.maximum(0, 1 - np.abs(np.arange(first, last) - center + 0.5) / reach)
        taps.append((first, weights / weights.sum()))
    whole, bits = pixels.dtype == np.uint8, 0
    largest = max(weights.max() for _, weights in taps)
    while whole and bits < 22 and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    lines = np.moveaxis(pixels, axis, 0)  # moves the axis to the front
    out = np.empty((size, *lines.shape[1:]), pixels.dtype)
    for place, (first, weights) in enumerate(taps):
        part = lines[first : first + len(weights)].astype(np.float64)
        if whole:
            weights = np.floor(weights * 2**bits + 0.5)
        value = np.tensordot(weights, part, 1)
        out[place] = np.clip(np.floor(value / 2**bits + 0.5), 0, 255) if whole else value
    return np.moveaxis(out, 0, axis)


# ------------------------------------------------------------------------------ command line
def _files(names: list[str]) -> Iterator[str]:
    """The files given, and the images below the folders given."""
    for name in names:
        if os.path.isdir(name):
            yield from sorted(_below(name))
        else:
            yield name


def _below(folder: str) -> Iterator[str]:
    """Images at any depth, following links, without hidden files and system folders."""
    seen = set()  # a folder that is reached twice through links is listed once
    for here, folders, files in os.walk(folder, followlinks=True):
        identity = os.stat(here).st_dev, os.stat(here).st_ino
        new = identity not in seen
        seen.add(identity)
        folders[:] = [n for n in folders if new and n[0] != "." and n.lower() not in JUNK]
        for name in files if new else ():
            path = os.path.join(here, name)
            shown = name[0] != "." and name.lower().endswith(SUFFIXES)
            if shown and (os.path.isfile(path) or not os.path.exists(path)):  # no pipes
                yield path


def _whole_number(text: str) -> int:
    if not text.isdecimal():  # Python reads 1_0 as 10
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def main() -> int:
    """Prints the predictions; returns 1 if some images can't be read, 2 if none can."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="+", help="image files and folders of images")
    parser.add_argument("--model", type=Path, default=Path(__file__).with_name(MODEL))
    parser.add_argument("--top", type=_whole_number, default=5, help="classes to list (default: 5)")
    arguments = parser.parse_args()
    if arguments.top < 1:
        parser.error(f"--top {arguments.top}: at least 1")
    if arguments.model.suffix not in (".onnx", ".xml", ".pt2") or not arguments.model.is_file():
        parser.error(f"--model {arguments.model}: no such file of .onnx, .xml or .pt2")
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd tags of a file
    names = list(_files(arguments.images))
    if not names:
        parser.error(f"no image below {', '.join(arguments.images)}")
    answered = failed = 0
    for answer in Network(arguments.model).predict(names, arguments.top):
        print(json.dumps(answer), flush=True)
        failed += "error" in answer
        answered += "error" not in answer
    return 0 if answered and not failed else 1 if answered else 2


if __name__ == "__main__":
    sys.exit(main())
