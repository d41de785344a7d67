"""What reading a training image costs, from the originals and from smaller copies.

    python benchmarks/reading.py [FOLDER] [--side 256] [--size 224] [--images 200] [--turns 5]
        [--original 375 500]

FOLDER holds class folders; default: crops of scikit-learn's two photographs, resized to the height
and width of --original, as JPEG files. Each turn reads the same images both ways, one after the
other, in this process: decoding, a random resized crop, and a batch of uint8. Prints CPU time per
image, the median of the turns, and the bytes on disk.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from regard.data import open_data
from regard.data.augment import Augmentation
from regard.data.loading import Reader, SampleOrder, StreamingLoader
from regard.data.preprocess import Preprocess
from regard.data.shrink import shrink
from regard.machine import describe_machine


def make_photographs(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Crops of 500x375 pixels, resized to a height and width."""
    rng = np.random.default_rng(0)
    for k, photograph in zip(range(count), load_sample_images().images * count, strict=False):
        height, width = photograph.shape[:2]
        top, left = rng.integers(height - 375), rng.integers(width - 500)
        place = folder / "ab"[k % 2] / f"{k}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        crop = Image.fromarray(photograph[top : top + 375, left : left + 500])
        crop.resize(size[::-1], Image.Resampling.BICUBIC).save(place, quality=90)
    return folder


def seconds(folder: Path, size: int, images: int, seed: int) -> float:
    """CPU seconds per image."""
    preprocess = Preprocess((3, size, size), (0.5,) * 3, (0.5,) * 3)
    table = open_data(folder)
    reader = Reader(table, preprocess, Augmentation(random_crop="resized"))
    loader = StreamingLoader(reader, SampleOrder(len(table), seed), seed, workers=0)
    spans = [(start, 20) for start in range(0, images, 20)]
    started = time.process_time()
    for _ in loader.batches(spans):
        pass
    return (time.process_time() - started) / images


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--original", type=int, nargs=2, default=(375, 500))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        originals = given.folder or make_photographs(
            Path(name, "originals"), given.images, tuple(given.original)
        )
        copies = Path(name, "copies")
        started = time.process_time()
        done = shrink(open_data(originals), copies, side=given.side, test_too=True)
        made = (time.process_time() - started) / (done.smaller + done.copied)
        ways = {"originals": originals, "copies": copies}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(given.turns):
            for way, folder in ways.items():
                times[way].append(seconds(folder, given.size, given.images, turn))
        machine = describe_machine()
        print(machine)
        print(f"making a copy: {1000 * made:.2f} ms an image")
        medians = {way: statistics.median(values) for way, values in times.items()}
        for way, folder in ways.items():
            files = [path for path in folder.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files) / len(files) / 1000
            ratio = medians["originals"] / medians[way]
            print(
                f"{way}: {1000 * medians[way]:.2f} ms an image, {1 / medians[way]:.0f} a second, "
                f"{ratio:.2f} times the originals' rate, {size:.1f} kB"
            )


if __name__ == "__main__":
    main()
