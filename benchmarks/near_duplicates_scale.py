"""What the search for near-duplicates costs among a million images: time and memory.

    nice -n 10 python benchmarks/near_duplicates_scale.py [--images 1000000] [--copies 1000]

The thumbnails are generated, with the spectrum of photographs and a few shapes, so that reading
files is not included; `--copies` of them are copies of others, brightened and cropped by a
pixel. Adds a row to benchmarks/near_duplicates_scale.csv: CPU seconds and memory per
image for finding the pairs, and the share of copies found.
"""

import argparse
import csv
import datetime
import resource
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from regard.data.near_duplicates import Thumbnails, find_near_duplicates
from regard.data.table import ImageTable
from regard.data.thumbnails import SIDE
from regard.machine import describe, describe_machine

RESULTS = Path(__file__).with_name("near_duplicates_scale.csv")
COLUMNS = (
    "images", "copies", "found", "pairs", "cpu_seconds", "bytes_per_image", "machine", "date",
)  # fmt: skip
_CHUNK = 8192
_SHORTER_SIDE = 40  # pixels: such images are compared by thumbnails alone, no file is read


def photographs(count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(count, SIDE, SIDE) noise whose amplitude falls as 1 / frequency, with three rectangles."""
    y, x = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
    radius = np.maximum(np.hypot(y, x), 1 / SIDE)
    steepness = rng.uniform(0.9, 1.6, (count, 1, 1))
    waves = rng.normal(size=(count, *radius.shape)) + 1j * rng.normal(size=(count, *radius.shape))
    images = np.fft.irfft2(waves * radius**-steepness, (SIDE, SIDE))
    images /= images.std(axis=(1, 2), keepdims=True)
    rows, columns = np.arange(SIDE)[None, :, None], np.arange(SIDE)[None, None]
    for _ in range(3):
        top, left = rng.integers(0, SIDE - 6, (2, count, 1, 1))
        height, width = rng.integers(5, 18, (2, count, 1, 1))
        inside = (rows >= top) & (rows < top + height) & (columns >= left)
        inside &= columns < left + width
        images += inside * rng.normal(0, 1.2, (count, 1, 1))
    levels = 128 + images * rng.uniform(20, 50, (count, 1, 1)) + rng.normal(0, 20, (count, 1, 1))
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def copies_of(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Brightened copies without their outermost pixels."""
    pixels = torch.from_numpy(images[:, 1:-1, 1:-1].astype(np.float32))[:, None]
    larger = torch.nn.functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    return (larger[:, 0] * 1.15).clamp(0, 255).round().byte().numpy()


def thumbnails_of(count: int, copies: int) -> tuple[Thumbnails, NDArray[np.int64]]:
    """Thumbnails of `count` images, the last `copies` of which are copies, and their originals."""
    rng = np.random.default_rng(0)
    made = Thumbnails(count)
    own = count - copies
    for start in range(0, own, _CHUNK):
        some = min(_CHUNK, own - start)
        made.pixels[start : start + some] = photographs(some, rng)
    copied = rng.choice(own, copies, replace=False)
    made.pixels[own:] = copies_of(made.pixels[copied])
    made.sides[:] = _SHORTER_SIDE
    return made, copied


def main() -> None:
    """Measures once and adds a row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--copies", type=int, default=1000)
    asked = parser.parse_args()
    made, copied = thumbnails_of(asked.images, asked.copies)
    table = ImageTable(
        name="made", classes=["a", "b"], labels=np.zeros(asked.images, np.int64),
        splits=np.full(asked.images, ""), files=["none"] * asked.images,
    )  # fmt: skip
    own = asked.images - asked.copies
    without = psutil.Process().memory_info().rss - made.pixels.nbytes
    started = time.process_time()
    pairs = find_near_duplicates(table, made)
    seconds = time.process_time() - started
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {p.second - own for p in pairs if p.second >= own and p.first == copied[p.second - own]}
    per_image = (peak - without) / asked.images
    machine = describe(describe_machine(torch.device("cpu"))).partition(";")[0]
    today = datetime.date.today().isoformat()
    row = [asked.images, asked.copies, f"{len(found) / asked.copies:.3f}", len(pairs),
           round(seconds), round(per_image), machine, today]  # fmt: skip
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, row] if new else [row])
    print(*row)


if __name__ == "__main__":
    main()
