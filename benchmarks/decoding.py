"""How fast JPEG files are decoded: by Pillow on this machine's cores, and by nvJPEG on its GPU.

    python benchmarks/decoding.py FOLDER [--side 375] [--images 1024] [--rounds 5]

All files are decoded completely to RGB in each round. With --side the images are first resized to
that shorter side (JPEG at quality 90), as ImageNet's are about 500x375. The
GPU's rows need CUDA; nvJPEG is torchcodec's `decode_jpeg`, which decodes a list of files at once.
The last rows are for the training loaders, which crop at random and resize to 224 pixels, in one
thread: `--decode cpu`, and `--decode device`, also with the CPU's share.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchcodec.decoders import decode_jpeg

from regard.data.augment import Augmentation
from regard.data.device_decoding import DecodingLoader
from regard.data.loading import Reader, SampleOrder, StreamingLoader
from regard.data.preprocess import Preprocess
from regard.data.table import ImageTable

BATCH = 128


def main() -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    paths = sorted(p for p in args.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error(f"{args.folder}: no JPEG files in it")
    files = [_resized(p, args.side) for p in paths[:: max(1, len(paths) // args.images)]]
    files = files[: args.images]
    cores = len(os.sched_getaffinity(0))
    sides = np.array([_pillow(file).shape[:2] for file in files])
    print(
        f"{len(files):,} JPEG files of {sides[:, 1].mean():.0f}x{sides[:, 0].mean():.0f} pixels, "
        f"{sum(map(len, files)) / len(files) / 1e3:.0f} kB each (means); torch {torch.__version__}"
    )
    with ThreadPoolExecutor(cores) as pool:
        ways: dict[str, Callable[[], object]] = {
            "Pillow, 1 thread": lambda: [_pillow(file) for file in files],
            f"Pillow, {cores} threads": lambda: list(pool.map(_pillow, files)),
        }
        if torch.cuda.is_available():
            print(torch.cuda.get_device_name())
            ways[f"nvJPEG, batches of {BATCH}"] = lambda: _nvjpeg(files)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for way in ways.values():
            way()  # allocates what is needed once
        for _ in range(args.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:40}{len(files) / statistics.median(times):10,.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        _loaders(files, Path(folder), args.rounds)


def _loaders(files: list[bytes], folder: Path, rounds: int) -> None:
    """Prints how fast the training loaders are, in one thread."""
    for k, file in enumerate(files):
        (folder / f"{k}.jpg").write_bytes(file)
    count = len(files) // BATCH * BATCH
    paths = [str(folder / f"{k}.jpg") for k in range(count)]
    no_splits = np.array([""] * count)
    table = ImageTable("files", ["a", "b"], np.zeros(count, np.int64), no_splits, files=paths)
    preprocess = Preprocess((3, 224, 224), (0.5,) * 3, (0.25,) * 3)
    reader = Reader(table, preprocess, Augmentation(random_crop="resized"))
    spans = [(first, BATCH) for first in range(0, count, BATCH)]
    on_cpu, on_device = (
        loader(reader, SampleOrder(count, 0), 0, 0) for loader in (StreamingLoader, DecodingLoader)
    )
    ways: dict[str, Callable[[], Any]] = {
        "--decode cpu": lambda: list(on_cpu.batches(spans)),
        "--decode device, the CPU's share": lambda: list(on_device.batches(spans)),
    }
    if torch.cuda.is_available():
        device = torch.device("cuda")
        ways["--decode device"] = lambda: [
            batch.decoded(device).images.sum().item() for batch in on_device.batches(spans)
        ]
    for name, way in ways.items():
        times, spent = [], []
        for _ in range(rounds + 1):
            started, used = time.perf_counter(), time.process_time()
            way()
            times.append(time.perf_counter() - started)
            spent.append(time.process_time() - used)
        images_a_second = count / statistics.median(times[1:])
        first, later = (1e3 * s / count for s in (spent[0], statistics.median(spent[1:])))
        print(
            f"{name:40}{images_a_second:10,.0f} images/s, {later:.3f} ms of a core each "
            f"({first:.3f} in the first epoch)"
        )


def _resized(path: Path, side: int | None) -> bytes:
    if side is None:
        return path.read_bytes()
    with Image.open(path) as image:
        factor = side / min(image.size)
        large = image.convert("RGB").resize(
            (round(image.width * factor), round(image.height * factor))
        )
    file = io.BytesIO()
    large.save(file, "JPEG", quality=90)
    return file.getvalue()


def _pillow(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def _nvjpeg(files: list[bytes]) -> None:
    for first in range(0, len(files), BATCH):
        decode_jpeg(files[first : first + BATCH], mode="RGB", device="cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
