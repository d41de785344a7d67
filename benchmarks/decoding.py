"""How fast JPEG files are decoded: by Pillow on this machine's cores, by nvJPEG on its GPU.

    python benchmarks/decoding.py FOLDER [--side 375] [--images 1024] [--rounds 5]

All files are held in memory, and decoded whole to RGB. With --side the images are made as large
as asked first (their shorter side, JPEG at quality 90), as ImageNet's are some 500x375. The GPU's
rows need CUDA; nvJPEG is torchvision's `decode_jpeg`, which decodes a list of files at once.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

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
            way()  # what is made once
        for _ in range(args.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:24}{len(files) / statistics.median(times):10,.0f} images/s")


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
        encoded = [
            torch.frombuffer(bytearray(file), dtype=torch.uint8)
            for file in files[first : first + BATCH]
        ]
        decode_jpeg(encoded, mode=ImageReadMode.RGB, device="cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
