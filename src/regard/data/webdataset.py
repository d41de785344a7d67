"""`wds:SHARDS`: images in tar files, as WebDataset lays them out, which are read in place.

A sample is the members of one name: `n01440764/17.jpg` with `n01440764/17.cls` or `.json`. The
shards are indexed once, so that training visits every image in each epoch in an order that can
be resumed at any step, as it does with files; nothing is unpacked.

The layout: https://github.com/webdataset/webdataset (as of version 1.0).
"""

import glob
import itertools
import json
import logging
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regard.data.folders import SPLIT_WORDS, split_word
from regard.data.images import IMAGE_SUFFIXES
from regard.data.members import MemberList
from regard.data.paths import PathList
from regard.data.table import ImageTable
from regard.errors import FileError, UsageError
from regard.files import plural, reason, shortened

log: logging.Logger = logging.getLogger(__name__)

CLASSES = "classes.txt"  # beside the shards: a line for each class
_EVERY = 5.0  # seconds between lines of progress
_LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json
_LABEL_KEYS = ("label", "cls", "class")  # of a .json, the first that is there


def open_webdataset(name: str, pattern: str) -> ImageTable:
    """The labeled images of tar files.

    A sample's label is in NAME.cls, else in NAME.json as `label`, `cls` or `class`, else the
    folder of NAME; its group, if any, is `group` in NAME.json. Whole numbers are indices into
    the lines of a classes.txt beside the shards, where there is one. The split is what the
    name of a shard says, or its folder, if that is called train, val, test or the like.
    Samples without an image or a label are left out, with a warning.

    Args:
        name: DATA as it was given.
        pattern: path of a tar file, a folder of tar files, or a pattern with *, ?, [ab],
            {000..127} or {train,val}.

    Raises:
        UsageError: no such shards, or none holds an image with a label.
        FileError: a shard can't be read.
    """
    shards = _shards(name, pattern)
    samples = _Samples(name)
    said = time.monotonic()
    for k, shard in enumerate(shards, start=1):
        samples.add_shard(shard)
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            log.info("%s: %d of %d shards indexed", name, k, len(shards))
    return samples.table(shards, pattern)


def _shards(name: str, pattern: str) -> list[str]:
    """Absolute paths of the shards."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UsageError(f"{name}: shards are read in place: download them, and give their paths")
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = sorted(glob.glob(os.path.join(glob.escape(pattern), "**", "*.tar"), recursive=True))
        if not found:
            raise UsageError(f"{name}: no .tar file in this folder")
    else:
        found = list(dict.fromkeys(itertools.chain(*map(_matches, _expanded(pattern)))))
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        raise UsageError(f"{name}: no such file: {shortened(missing or [pattern], 3)}")
    if packed := [path for path in found if path.endswith((".gz", ".tgz", ".zst", ".bz2", ".xz"))]:
        raise UsageError(
            f"{name}: {packed[0]} is compressed, so that nothing in it can be read in place: "
            "unpack it to a .tar (images are compressed already)"
        )
    return [os.path.abspath(path) for path in found]


def _matches(path: str) -> list[str]:
    """The files that a pattern names; a path that exists names itself."""
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    return sorted(glob.glob(path))


def _expanded(pattern: str) -> Iterator[str]:
    """What the shell makes of {a,b} and {000..127}, the first braces first."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers is None:
        values = braces[1].split(",")
    else:
        width = len(numbers[1])
        values = [f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    for value in values:
        yield from _expanded(before + value + after)


@dataclass
class _Samples:
    """What the shards hold, as lists that grow by one entry an image."""

    name: str
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # one a shard
    places: list[tuple[int, int, int]] = field(default_factory=list)  # shard, offset, size
    left_out: Counter[str] = field(default_factory=Counter)

    def add_shard(self, shard: str) -> None:
        """Adds the samples of a tar file."""
        path = Path(shard)
        self.splits.append(split_word(path.stem) or SPLIT_WORDS.get(path.parent.name.lower(), ""))
        try:
            with tarfile.open(shard, "r:") as tar:
                for key, parts in itertools.groupby(_files(tar), key=lambda member: member[0]):
                    self._add(shard, tar, key, {kind: member for _, kind, member in parts})
                _check_end(tar)
        except tarfile.TarError as error:
            raise FileError(f"{shard}: is no tar file, or is cut short ({error})") from error
        except OSError as error:
            raise FileError(f"{shard}: can't be read ({reason(error)})") from error

    def _add(
        self, shard: str, tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]
    ) -> None:
        images = [kind for kind in parts if f".{kind}" in IMAGE_SUFFIXES]
        if len(images) > 1:
            kinds = ", ".join(images)
            raise UsageError(f"{shard}: {key} has several images ({kinds})")
        if not images:
            self.left_out["samples without an image"] += 1
            return
        where = f"{shard}: {key}"
        more = _json(where, _content(tar, where, parts["json"])) if "json" in parts else {}
        label = _label_in(more)
        if "cls" in parts:
            label = _text(where, _content(tar, where, parts["cls"]))
        label = label or os.path.basename(os.path.dirname(key))
        if not label:
            self.left_out["images without a label"] += 1
            return
        image = parts[images[0]]
        self.names.append(image.name)
        self.labels.append(label)
        self.groups.append(str(more.get("group", "")))
        self.places.append((len(self.splits) - 1, image.offset_data, image.size))

    def table(self, shards: Sequence[str], pattern: str) -> ImageTable:
        """The table of all samples."""
        if not self.names:
            why = f" ({self._left_out()})" if self.left_out else ""
            raise UsageError(f"{self.name}: has no image with a label{why}")
        if "" in self.splits and set(self.splits) != {""}:
            other = shards[self.splits.index("")]
            raise UsageError(
                f"{self.name}: {other} has no train, val or test in its name, as others have"
            )
        base = os.path.commonpath([os.path.dirname(shard) for shard in shards])
        classes, labels = _classes(self.name, self.labels, Path(base) / CLASSES)
        places = np.array(self.places, np.int64)
        of = places[:, 0]
        return ImageTable(
            name=self.name, classes=classes, labels=labels,
            splits=np.array(self.splits, "U5")[of],
            groups=self._groups(),
            files=MemberList(
                PathList.of(self.names), shards, of.astype(np.int32), places[:, 1], places[:, 2]
            ),
            base=base,
            location=os.path.abspath(os.path.expanduser(pattern)),
            warnings=(f"left out: {self._left_out()}",) if self.left_out else (),
        )  # fmt: skip

    def _groups(self) -> Any:
        if not any(self.groups):
            return None
        if missing := self.groups.count(""):
            count = plural(missing, "image")
            raise UsageError(f"{self.name}: {count} without a group, while others have one")
        return np.array(self.groups)

    def _left_out(self) -> str:
        return ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(sample, extension in lower case, member) of each file; hidden and meta files are not."""
    for member in tar:
        folder, base = os.path.split(member.name)
        if not member.isreg() or member.issparse() or base.startswith((".", "__")):
            continue
        stem, _, kind = base.partition(".")
        yield os.path.join(folder, stem), kind.lower(), member


def _check_end(tar: tarfile.TarFile) -> None:
    """Makes sure that the members end where the file does: tarfile ends at what it can't read.

    Raises:
        tarfile.TarError: there is more, or the last header is not whole.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE and block:
        raise tarfile.ReadError(f"no header at byte {tar.offset:,}")


def _content(tar: tarfile.TarFile, where: str, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None or member.size > _LARGEST_LABEL:
        raise UsageError(f"{where}: {member.size:,} bytes are too many for a label")
    return file.read()


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: its .cls is no UTF-8 text") from error


def _json(where: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{where}: its .json can't be read ({error})") from error
    return value if isinstance(value, dict) else {}


def _label_in(more: dict[str, Any]) -> str:
    value = next((more[key] for key in _LABEL_KEYS if key in more), None)
    return str(value).strip() if isinstance(value, str | int) else ""


def _classes(name: str, labels: Sequence[str], listed: Path) -> tuple[list[str], Any]:
    """Class names and (N,) indices of labels, which are names or indices."""
    numbers = all(label.isascii() and label.isdigit() for label in set(labels))
    classes: list[str] = []
    if listed.is_file():
        try:
            classes = listed.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise FileError(f"{listed}: can't be read ({reason(error)})") from error
    elif not numbers:
        classes = sorted(set(labels))
    if not numbers:
        index = {c: i for i, c in enumerate(classes)}
        if unknown := sorted(set(labels) - index.keys()):
            raise UsageError(f"{name}: {listed} does not name {shortened(unknown, 5)}")
        return classes, np.array([index[label] for label in labels], np.int64)
    indices = np.array(list(map(int, labels)), np.int64)
    highest = int(indices.max())
    if classes and highest >= len(classes):
        raise UsageError(f"{name}: has class {highest}, while {listed} names {len(classes)}")
    return classes or [str(c) for c in range(highest + 1)], indices
