"""`open_data` reads any kind of DATA as an `ImageTable`.

A table holds paths and labels, not pixels (except for data sets of small images that come as
arrays). A million files are listed in seconds, as files are not opened.
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regard.data.folders import CONTAINERS, READINGS, open_folder
from regard.data.hugging_face import open_hugging_face
from regard.data.known import open_cifar, open_digits, open_medmnist
from regard.data.manifest import SUFFIXES, open_manifest
from regard.data.table import SPLITS, ImageTable, as_known, class_counts
from regard.data.walk import images_below
from regard.data.webdataset import open_webdataset
from regard.errors import FileError, UsageError
from regard.files import plural, reason

NAMES = ("digits", "cifar10", "cifar100")  # data sets, not files
KINDS = ("medmnist:", "wds:", "hf:")  # prefixes of data that is neither a folder nor a CSV file

__all__ = [
    "KINDS",
    "NAMES",
    "SPLITS",
    "ImageTable",
    "as_known",
    "class_counts",
    "images_below",
    "open_data",
]

_LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")
_POINT_ZERO = re.compile(r"(?<=\d)\.0+$")
# what programs write where a value is missing
_NOT_THERE = frozenset({"nan", "<na>", "na", "n/a", "#n/a", "null"})
_MISSING = _NOT_THERE | {"none", "unknown", "?", "-"}  # these may be names of classes
_CHOICES = (
    "digits, a folder of class folders, a CSV file (path, label, optional split and group), "
    "cifar10, cifar100, medmnist:FILE.npz, wds:SHARDS or hf:NAME"
)


def open_data(
    data: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    splits: str = "auto",
    min_classes: int = 2,
) -> ImageTable:
    """The table of images that DATA names.

    Args:
        data: `digits` (scikit-learn's); a folder of class folders, with or without
            train/val/test on top; a CSV file; `cifar10`, `cifar100`; `medmnist:FILE.npz`;
            `wds:SHARDS`; `hf:NAME`. Write ./digits for a folder with one of these names.
        root: folder for downloads; default: ~/.cache/regard.
        splits: whether a folder's top folders are splits: yes, no, or auto (default), which
            raises an error if both are possible.
        min_classes: fewer classes are an error.

    Raises:
        UsageError: DATA is none of these, or its content is invalid.
        OSError: it can't be read or downloaded.
    """
    if splits not in READINGS:
        raise UsageError(f"splits={splits}: choose {', '.join(READINGS)}")
    if not isinstance(data, str | os.PathLike) or isinstance(name := os.fspath(data), bytes):
        raise UsageError(f"DATA {data!r}: a path or a name is expected")
    table = _opened(name, Path(root or "~/.cache/regard").expanduser(), splits)
    if len(table.classes) < min_classes:
        only = f"only one class ({table.classes[0]!r})" if table.classes else "no class"
        left_out = "; ".join(line for line in table.warnings if "left out" in line)
        why = f" ({left_out})" if left_out else ""
        raise UsageError(f"{table.name}: {only}; two or more are needed{why}")
    lines = (
        _spelled_alike("classes", table.classes),
        _spelled_alike("groups", table.groups),
        _missing_groups(table.groups),
        _missing_labels(table),
    )
    warnings = (*table.warnings, *(line for line in lines if line))
    return replace(table, reading=splits, warnings=warnings)


def folded(name: str) -> str:
    """The name without what people and programs change: case, spaces, 007 and 7.0 for 7."""
    plain = _LEADING_ZEROS.sub("", "".join(unicodedata.normalize("NFKC", name).casefold().split()))
    return _POINT_ZERO.sub("", plain) if _is_number(plain) else plain


def _is_number(name: str) -> bool:
    return name.removeprefix("-").replace(".", "", 1).isdigit()


def _spelled_alike(kind: str, names: Sequence[str] | NDArray[np.str_] | None) -> str | None:
    """A warning of names that may mean the same: they are the same when `folded`."""
    first: dict[str, str] = {}
    alike = []
    for name in [] if names is None else np.unique(names).tolist():
        key = folded(name)
        if key in first:
            alike.append((first[key], name))
        first.setdefault(key, name)
    if not alike:
        return None
    more = f" ({len(alike)} such pairs)" if len(alike) > 1 else ""
    one, other = alike[0]
    return f"{kind} that are spelled alike count as different ones: {one!r} and {other!r}{more}"


def _missing_groups(groups: NDArray[np.str_] | None) -> str | None:
    """A warning of groups of several images whose name stands for a missing value."""
    if groups is None:
        return None
    names, counts = np.unique(groups, return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        if count > 1 and folded(name) in _MISSING:
            return (
                f"the {count:,} images of group {name!r} count as one group: where the group is "
                "not known, give each image a unique name"
            )
    return None


def _missing_labels(table: ImageTable) -> str | None:
    """A warning of a class whose name stands for a missing value."""
    for k, name in enumerate(table.classes):
        if folded(name) in _NOT_THERE:
            count = int((table.labels == k).sum())
            return (
                f"the class {name!r} ({plural(count, 'image')}) is a class like any other: where "
                "the label is not known, leave the image out"
            )
    return None


def _opened(data: str, cache: Path, splits: str) -> ImageTable:
    kind, _, rest = data.partition(":")
    if data == "digits":
        return open_digits(data)
    if data in ("cifar10", "cifar100"):
        return open_cifar(data, cache)
    if kind == "medmnist" and rest:
        return open_medmnist(data, Path(rest).expanduser())
    if kind == "wds" and rest:
        return open_webdataset(data, rest, splits)
    if kind == "hf" and rest:
        return open_hugging_face(data, rest, cache)
    path = Path(data).expanduser()
    try:
        if data and path.is_dir():
            return open_folder(data, str(path), splits)
        if path.suffix.lower() in SUFFIXES and path.is_file():
            return open_manifest(data, path)
        exists = bool(data) and path.exists()
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{data[:100]} can't be read ({reason(error)})") from error
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"DATA {data!r} is not a file name ({error})") from error
    if "://" in data:
        raise UsageError(f"DATA {data!r} is a URL: download it, and give the file or folder")
    if exists and (prefix := {".npz": "medmnist:", **CONTAINERS}.get(path.suffix.lower())):
        raise UsageError(f"DATA {data!r} is a {path.suffix} file: give {prefix}{data}")
    if exists:
        raise UsageError(f"DATA {data!r} is a file, but not a CSV file; choose {_CHOICES}")
    where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
    missing = f"no such folder or file{where}; " if data and not data.endswith(":") else ""
    raise UsageError(f"DATA {data!r}: {missing}choose {_CHOICES}")
