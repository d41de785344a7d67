"""Data sets that are known by name or format: digits, CIFAR, MedMNIST."""

import os
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from regard.data.table import SPLITS, ImageTable, StackedArrays
from regard.errors import FileError, UsageError
from regard.files import NPZ_FAULTS, plural, reason

_FEWEST = 1000  # classes that a MedMNIST file may have, however few its images


def _in_memory(
    name: str, classes: list[str], parts: dict[str, tuple[NDArray[Any], NDArray[Any]]], **more: Any
) -> ImageTable:
    """A table of {split: (images, labels)}, split by split, without a copy."""
    images = [images for images, _ in parts.values()]
    sizes = [len(labels) for _, labels in parts.values()]
    return ImageTable(
        name=name,
        classes=classes,
        labels=np.concatenate([labels for _, labels in parts.values()]).astype(np.int64),
        splits=np.repeat(np.array(list(parts), dtype="U5"), sizes),
        arrays=images[0] if len(images) == 1 else StackedArrays(images),
        **more,
    )


def open_digits(name: str) -> ImageTable:
    """1797 images of 8 x 8, values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _in_memory(name, [str(c) for c in digits.target_names], {"": (images, digits.target)})


def open_cifar(name: str, cache: Path) -> ImageTable:
    """torchvision's CIFAR, downloaded if it is not in the cache.

    Raises:
        FileError: it can't be downloaded.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        cache.mkdir(parents=True, exist_ok=True)
        train = kind(cache, train=True, download=True)
        test = kind(cache, train=False)
    except (OSError, RuntimeError) as error:
        why = " ".join(str(error).split())
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise FileError(
            f"{name} can't be downloaded ({why}); put {kind.url} "
            f"into {cache} by hand and start again"
        ) from error
    parts = {s: (d.data, np.array(d.targets)) for s, d in (("train", train), ("test", test))}
    return _in_memory(name, [str(c) for c in train.classes], parts)


# ---- MedMNIST


def open_medmnist(name: str, path: Path) -> ImageTable:
    """A MedMNIST file: {train,val,test}_{images,labels}.

    Uncompressed arrays are memory-mapped, others are decompressed once, in place.

    Raises:
        UsageError: there is no such file, or it is not in this format.
    """
    parts = {}
    try:
        with zipfile.ZipFile(path) as file:
            keys = sorted(n.removesuffix(".npy") for n in file.namelist())
            for split in SPLITS:
                for key in (f"{split}_images", f"{split}_labels"):
                    if key not in keys:
                        raise UsageError(f"{name}: has no {key}, only {', '.join(keys)}")
                images, labels = (_member(file, path, f"{split}_{k}") for k in ("images", "labels"))
                parts[split] = _medmnist_part(f"{name}: {split}", images, labels)
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file") from error
    except NPZ_FAULTS as error:
        raise UsageError(f"{name}: is not a readable .npz file ({reason(error)})") from error
    highest = max(int(labels.max(initial=0)) for _, labels in parts.values())
    count = sum(len(labels) for _, labels in parts.values())
    if highest >= max(count, _FEWEST):
        raise UsageError(f"{name}: has the label {highest}, but only {plural(count, 'image')}")
    location = os.path.abspath(path)
    return _in_memory(name, [str(c) for c in range(highest + 1)], parts, location=location)


def _member(file: zipfile.ZipFile, path: Path, key: str) -> NDArray[Any]:
    """One array of an .npz file, memory-mapped or read without a second copy."""
    info = file.getinfo(f"{key}.npy")
    with file.open(info) as source:
        version = np.lib.format.read_magic(source)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        header = read.get(version, np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = header(source)
        if dtype.hasobject:
            raise zipfile.BadZipFile(f"{key} holds Python objects")
        start = source.tell()
        if not fortran and dtype.itemsize * int(np.prod(shape)) != info.file_size - start:
            raise zipfile.BadZipFile(f"{key} is cut short")
        if info.compress_type == zipfile.ZIP_STORED and not fortran and np.prod(shape):
            offset = _data_offset(path, info) + start
            return np.memmap(path, dtype, "r", offset, shape)
        array = np.empty(shape[::-1] if fortran else shape, dtype)
        flat = array.reshape(-1).view(np.uint8)
        for at in range(0, len(flat), 1 << 20):
            piece = source.read(min(1 << 20, len(flat) - at))
            flat[at : at + (1 << 20)] = np.frombuffer(piece, np.uint8)  # ValueError if truncated
    return array.T if fortran else array


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin (APPNOTE 4.3.7: 30 bytes, the name, the extra field)."""
    with open(path, "rb") as raw:
        raw.seek(info.header_offset + 26)
        name, extra = np.frombuffer(raw.read(4), "<u2").tolist()
    return info.header_offset + 30 + name + extra


def _medmnist_part(
    where: str, images: NDArray[Any], labels: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    flat_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not flat_shape:
        shape = "x".join(map(str, images.shape))
        raise UsageError(f"{where} images are {images.dtype} {shape}, not uint8 NxHxW or NxHxWx3")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise UsageError(
            f"{where} has {labels.shape[1]} labels per image: multi-label data can't be used, "
            "only one class per image"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(images):
        raise UsageError(f"{where} has {labels.size} {labels.dtype} labels, {len(images)} images")
    if labels.min(initial=0) < 0:
        raise UsageError(f"{where} has the label {labels.min()}")
    return images, np.array(labels.reshape(-1))
