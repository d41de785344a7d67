"""Tables of labeled images from everything that people have: `open_data` reads DATA.

A table holds names and labels, not pixels (but for data sets of small images that come as one
array). A million files are listed in seconds: folders are streamed, no file is looked at.
"""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO
from urllib.error import HTTPError

import numpy as np
from numpy.typing import NDArray

from regard.data.images import IMAGE_SUFFIXES, read_image, to_channels
from regard.errors import FileError, ImageError, UsageError

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"": "", **{s: s for s in SPLITS}, "valid": "val", "validation": "val"}
_CHOICES = (
    "digits, a folder of class folders, a CSV file (path, label, optional split and group), "
    "cifar10, cifar100, medmnist:FILE.npz or hf:NAME"
)


@dataclass(frozen=True, eq=False)
class ImageTable:
    """N labeled images: where they are, not what they show.

    Attributes:
        name: DATA as it was given.
        classes: the classes' names.
        labels: (N,) int64, indices into classes.
        splits: (N,) of '', 'train', 'val' or 'test'.
        groups: (N,) names, such as patients, that must not be divided between splits; or None.
        files: N paths as open() takes them, or None.
        arrays: (N, H, W) or (N, H, W, C) uint8, the images themselves; or None.
        base: the folder that the files' names are told from in a file of splits.
        rows: (N,) where a selection's arrays stood in the whole table; None: it is whole.
        warnings: what a person should know of how the table was made, a line each.
    """

    name: str
    classes: list[str]
    labels: NDArray[np.int64]
    splits: NDArray[np.str_]
    groups: NDArray[np.str_] | None = None
    files: list[str] | None = None
    arrays: NDArray[np.uint8] | None = None
    base: str = ""
    rows: NDArray[np.int64] | None = None
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self, i: int, *, channels: int | None = None, at_least: int | None = None
    ) -> NDArray[Any]:
        """Image i as (H, W, C); see `read_image`.

        Raises:
            ImageError: its file can't be read.
        """
        if self.files is not None:
            return read_image(self.files[i], channels=channels, at_least=at_least)
        assert self.arrays is not None
        pixels = self.arrays[i]
        return to_channels(pixels if pixels.ndim == 3 else pixels[..., None], channels)

    def path(self, i: int) -> str:
        """The file of image i, or as 'digits[12]' its place in the data set."""
        if self.files is not None:
            return self.files[i]
        return f"{self.name}[{i if self.rows is None else self.rows[i]}]"

    def select(self, indices: Sequence[int] | NDArray[Any]) -> "ImageTable":
        """The table of these images, in this order. A mask of N booleans will do too."""
        at = np.asarray(indices)
        at = np.flatnonzero(at) if at.dtype == bool else at.astype(np.int64)
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return replace(
            self,
            labels=self.labels[at],
            splits=self.splits[at],
            groups=None if self.groups is None else self.groups[at],
            files=None if self.files is None else [self.files[i] for i in at],
            arrays=None if self.arrays is None else self.arrays[at],
            rows=None if self.arrays is None else rows[at],
        )


def class_counts(table: ImageTable) -> dict[str, dict[str, int]]:
    """Images of each class in each split that the table has: {split: {class: images}}."""
    found = [s for s in ("", *SPLITS) if np.any(table.splits == s)]
    counts = {
        s: np.bincount(table.labels[table.splits == s], minlength=len(table.classes)).tolist()
        for s in found
    }
    return {s: dict(zip(table.classes, counts[s], strict=True)) for s in found}


def open_data(data: str, *, root: str | Path | None = None) -> ImageTable:
    """The table of images that DATA names.

    Args:
        data: `digits` (scikit-learn's); a folder of class folders, with or without
            train/val/test on top; a CSV file; `cifar10`, `cifar100`; `medmnist:FILE.npz`;
            `hf:NAME`. A folder that is called as one of the words is given as ./digits.
        root: where downloads are kept; ~/.cache/regard by default.

    Raises:
        UsageError: DATA is none of these, or what it names is not as it should be.
        OSError: it can't be read or downloaded.
    """
    cache = Path(root) if root is not None else Path("~/.cache/regard").expanduser()
    kind, _, rest = data.partition(":")
    if data == "digits":
        table = _digits(data)
    elif data in ("cifar10", "cifar100"):
        table = _cifar(data, cache)
    elif kind == "medmnist" and rest:
        table = _medmnist(data, Path(rest).expanduser())
    elif kind == "hf" and rest:
        table = _hugging_face(data, rest, cache)
    elif (path := Path(data).expanduser()).is_dir() and data:
        table = _folder(data, str(path))
    elif path.suffix.lower() == ".csv" and path.is_file():
        table = _manifest(data, path)
    elif path.suffix.lower() == ".csv" or "/" in data:
        raise UsageError(f"DATA {data!r}: no such folder or CSV file; choose {_CHOICES}")
    else:
        raise UsageError(f"DATA {data!r}: choose {_CHOICES}")
    if len(table.classes) < 2:
        raise UsageError(f"{data}: only one class ({table.classes[0]!r}); two or more are needed")
    return table


def _in_memory(
    name: str, classes: list[str], parts: dict[str, tuple[NDArray[Any], NDArray[Any]]]
) -> ImageTable:
    """A table of {split: (images, labels)}, one split after the other."""
    sizes = [len(labels) for _, labels in parts.values()]
    return ImageTable(
        name=name,
        classes=classes,
        labels=np.concatenate([labels for _, labels in parts.values()]).astype(np.int64),
        splits=np.repeat(np.array(list(parts), dtype="U5"), sizes),
        arrays=np.concatenate([images for images, _ in parts.values()]),
    )


def _digits(name: str) -> ImageTable:
    """1797 images of 8 x 8, values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _in_memory(name, [str(c) for c in digits.target_names], {"": (images, digits.target)})


# ---- a folder of class folders


def _folder(name: str, root: str) -> ImageTable:
    folders = dict(_subfolders(root))
    words = {f: _SPLIT_WORDS[f.lower()] for f in folders if f.lower() in _SPLIT_WORDS}
    if "train" in words.values() and len(words) < len(folders):
        strange = ", ".join(sorted(set(folders) - set(words)))
        raise UsageError(f"{name}: beside {', '.join(sorted(words))} there is also {strange}")
    if len(words) != len(folders) or not folders:  # the folders are classes
        tops = {"": root}
    elif len(set(words.values())) < len(words):
        raise UsageError(f"{name}: two folders for one split: {', '.join(sorted(words))}")
    else:
        tops = {words[f]: path for f, path in sorted(folders.items(), key=_by_split(words))}
    class_folders = {split: dict(sorted(_subfolders(top))) for split, top in tops.items()}
    classes = _same_classes(name, tops, class_folders)
    files: list[str] = []
    runs: list[tuple[int, str, int]] = []  # (label, split, how many files)
    for split, found in class_folders.items():
        for label, class_name in enumerate(classes):
            images = sorted(_images_below(found[class_name], above=(root, tops[split])))
            if not images:
                raise UsageError(f"{name}: the class folder {found[class_name]} has no images")
            files += images
            runs.append((label, split, len(images)))
    counts = [n for _, _, n in runs]
    return ImageTable(
        name=name,
        classes=classes,
        labels=np.repeat(np.array([label for label, _, _ in runs], np.int64), counts),
        splits=np.repeat(np.array([split for _, split, _ in runs], "U5"), counts),
        files=files,
        base=root,
    )


def _by_split(words: dict[str, str]) -> Any:
    return lambda item: SPLITS.index(words[item[0]])


def _same_classes(name: str, tops: dict[str, str], found: dict[str, dict[str, str]]) -> list[str]:
    """The classes, sorted; the same in every split."""
    classes = sorted(set().union(*found.values()))
    if not classes:
        raise UsageError(f"{name}: has no class folders (FOLDER/CLASS/IMAGE)")
    gaps = [f"{tops[s]} has no {c}" for s in found for c in classes if c not in found[s]]
    if gaps:
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        raise UsageError(f"{name}: classes differ between splits: {', '.join(gaps[:3])}{more}")
    return classes


def _subfolders(folder: str) -> Iterator[tuple[str, str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield entry.name, entry.path


def _images_below(folder: str, *, above: Iterable[str]) -> Iterator[str]:
    """Image files at any depth. A folder reached twice through links is read once."""
    seen = {_identity(path) for path in above}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        identity = _identity(here)
        if identity in seen:
            continue
        seen.add(identity)
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    yield entry.path


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


# ---- a CSV manifest


def _manifest(name: str, path: Path) -> ImageTable:
    """Columns path and label, and split and group where there are such."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(name, file))
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise UsageError(f"{name}: is no CSV file ({error})") from error
    if not rows:
        raise UsageError(f"{name}: lists no images")
    base = str(path.parent)
    files = [os.path.normpath(os.path.join(base, row[0])) for row in rows]
    if not os.path.exists(files[0]):
        raise UsageError(f"{name}: {files[0]} does not exist; paths are told from {base}")
    names = [row[1] for row in rows]
    classes = sorted(set(names))
    index = {c: i for i, c in enumerate(classes)}
    grouped = rows[0][3] is not None
    return ImageTable(
        name=name,
        classes=classes,
        labels=np.array([index[c] for c in names], np.int64),
        splits=np.array([row[2] for row in rows], "U5"),
        groups=np.array([row[3] for row in rows], np.str_) if grouped else None,
        files=files,
        base=os.path.normpath(base),
    )


def _rows(name: str, file: TextIO) -> Iterator[tuple[str, str, str, str | None]]:
    """(path, label, split, group or None) of each line, checked."""
    head = file.readline()
    delimiter = ";" if head.count(";") > head.count(",") else ","
    columns = [c.strip().lower() for c in next(csv.reader([head], delimiter=delimiter), [])]
    for wanted in ("path", "label"):
        if wanted not in columns:
            raise UsageError(f"{name} line 1: no column {wanted!r} among {', '.join(columns)}")
    at = {c: i for i, c in enumerate(columns)}
    reader = csv.reader(file, delimiter=delimiter)
    first_on: dict[str, int] = {}
    for fields in reader:
        line = reader.line_num + 1
        if not any(field.strip() for field in fields):
            continue
        fields += [""] * (len(columns) - len(fields))
        row = {c: fields[at[c]].strip() for c in ("path", "label", "split", "group") if c in at}
        for column in ("path", "label", "group"):
            if row.get(column) == "":
                raise UsageError(f"{name} line {line}: empty {column}")
        split = _SPLIT_WORDS.get(row.get("split", "").lower())
        if split is None:
            told = f"{name} line {line}: split {row['split']!r}"
            raise UsageError(f"{told}: choose train, val, test or leave it empty")
        earlier = first_on.setdefault(os.path.normpath(row["path"]), line)
        if earlier != line:
            told = f"{name} line {line}: path {row['path']!r}"
            raise UsageError(f"{told} again, after line {earlier}")
        yield row["path"], row["label"], split, row.get("group")


# ---- data sets


def _cifar(name: str, cache: Path) -> ImageTable:
    """torchvision's CIFAR, downloaded when it is not in the cache yet."""
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        cache.mkdir(parents=True, exist_ok=True)
        train = kind(cache, train=True, download=True)
        test = kind(cache, train=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise FileError(
            f"{name} can't be downloaded ({reason}); put {kind.url} "
            f"into {cache} by hand and start again"
        ) from error
    parts = {s: (d.data, np.array(d.targets)) for s, d in (("train", train), ("test", test))}
    return _in_memory(name, [str(c) for c in train.classes], parts)


def _medmnist(name: str, path: Path) -> ImageTable:
    """A file of MedMNIST's: {train,val,test}_{images,labels}."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file") from error
    except Exception as error:  # zipfile's, zlib's and numpy's own, a dozen kinds
        raise UsageError(f"{name}: is no .npz file that can be read ({error})") from error
    parts = {}
    for split in SPLITS:
        for key in (f"{split}_images", f"{split}_labels"):
            if key not in arrays:
                raise UsageError(f"{name}: has no {key}, but {', '.join(sorted(arrays))}")
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        parts[split] = _medmnist_part(f"{name}: {split}", images, labels)
    highest = max(int(labels.max(initial=0)) for _, labels in parts.values())
    return _in_memory(name, [str(c) for c in range(highest + 1)], parts)


def _medmnist_part(
    told: str, images: NDArray[Any], labels: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    flat_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not flat_shape:
        shape = "x".join(map(str, images.shape))
        raise UsageError(f"{told} images are {images.dtype} {shape}, not uint8 NxHxW or NxHxWx3")
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise UsageError(
            f"{told} has {labels.shape[1]} labels an image: multi-label data can't be used, "
            "only one class an image"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(images):
        raise UsageError(f"{told} has {labels.size} {labels.dtype} labels, {len(images)} images")
    if labels.min(initial=0) < 0:
        raise UsageError(f"{told} has the label {labels.min()}")
    return images, labels.reshape(-1)


def _hugging_face(name: str, source: str, cache: Path) -> ImageTable:
    """A data set of the hub or a local folder; its image files are unpacked into the cache."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{name}: install regard[hf] to read Hugging Face datasets") from error
    try:
        loaded = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(f"{name}: can't be loaded ({' '.join(str(error).split())})") from error
    features = next(iter(loaded.values())).features
    image = _column(name, features, datasets.Image)
    label = _column(name, features, datasets.ClassLabel)
    files: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    for key, part in loaded.items():
        split = _SPLIT_WORDS.get(key)
        if not split:
            raise UsageError(f"{name}: has a split {key!r}; only train, validation and test")
        found = _unpack(part.cast_column(image, datasets.Image(decode=False)), image, key, cache)
        files += found
        labels += part[label]
        splits += [split] * len(found)
    if min(labels, default=0) < 0:
        raise UsageError(f"{name}: has images without a label ({labels.index(-1) + 1}th)")
    return ImageTable(
        name=name,
        classes=list(features[label].names),
        labels=np.array(labels, np.int64),
        splits=np.array(splits, "U5"),
        files=files,
        base=str(cache / "hf"),
    )


def _column(name: str, features: Any, kind: type) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        told = f"{name}: needs one column of type {kind.__name__}, has {found or 'none'}"
        raise UsageError(f"{told} among {', '.join(features)}")
    return found[0]


def _unpack(part: Any, image: str, key: str, cache: Path) -> list[str]:
    """Each image as the data set holds it, in a file; those already there are kept."""
    folder = cache / "hf" / part._fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, row in enumerate(part.select_columns([image])):
        held = row[image]
        if held is None:
            raise ImageError(f"{key}[{i}]: has no image")
        path = held["path"]
        if held["bytes"] is not None:
            path = str(folder / f"{key}-{i:08d}{Path(path or '').suffix}")
            if not os.path.exists(path):
                Path(path + ".part").write_bytes(held["bytes"])
                os.replace(path + ".part", path)
        files.append(path)
    return files


def as_known(table: ImageTable, classes: list[str]) -> ImageTable:
    """With labels as the network counts them.

    Raises:
        UsageError: the data has classes that the network was not trained on.
    """
    if strange := [c for c in table.classes if c not in classes]:
        raise UsageError(
            f"{table.name} has classes that the network does not know: {', '.join(strange[:10])}; "
            f"it knows {', '.join(classes[:10])}"
        )
    places = np.array([classes.index(c) for c in table.classes], dtype=np.int64)
    return replace(table, classes=classes, labels=places[table.labels])


# ------------------------------------------------------------------------- the command
def images_below(paths: Sequence[Path]) -> Iterator[Path]:
    """The files named, and the images below the folders named, sorted in each folder."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for folder, folders, files in os.walk(path):
            folders.sort()
            for name in sorted(files):
                if name.lower().endswith(tuple(IMAGE_SUFFIXES)) and not name.startswith("."):
                    yield Path(folder, name)
