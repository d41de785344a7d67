"""`wds:SHARDS`: images in tar files with WebDataset's layout, read in place.

A sample is the members with one name: `n01440764/17.jpg` with `n01440764/17.cls` or `.json`. The
shards are indexed once, so that training visits every image once per epoch in an order that can
be resumed at any step, as with files; nothing is unpacked.

The layout: https://github.com/webdataset/webdataset (as of version 1.0).
"""

import copy
import glob
import itertools
import json
import logging
import os
import posixpath
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.data.folders import SPLIT_WORDS, split_word
from regard.data.images import IMAGE_SUFFIXES
from regard.data.manifest import groups_line, may_be_groups
from regard.data.members import MemberList
from regard.data.paths import PathList
from regard.data.table import ImageTable, all_or_no_groups
from regard.errors import FileError, UsageError
from regard.files import plural, reason, shortened

log: logging.Logger = logging.getLogger(__name__)

CLASSES = "classes.txt"  # next to the shards: a line for each class
_EVERY = 5.0  # seconds between progress messages
_LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json
_LABEL_KEYS = ("label", "cls", "class")  # keys in a .json; the first one present is used


def open_webdataset(name: str, pattern: str, splits: str = "auto") -> ImageTable:
    """The labeled images of tar files.

    A sample's label is in NAME.cls, else in NAME.json as `label`, `cls` or `class`; if no sample of
    any shard has one, the folder of NAME is the label. The group, if any, is `group` in NAME.json.
    Whole numbers are class indices, into the lines of a classes.txt next to the shards if there is
    one. The split comes from the name of the shard, or from its folder if that is called train,
    val, test or the like. Samples without an image or a label are left out with a warning. If
    there are two members of one name, the last counts, as when tar unpacks them.

    Args:
        name: DATA as given.
        pattern: path of a tar file, a folder of tar files, or a pattern with *, ?, [ab],
            {000..127} or {train,val}.
        splits: yes: every shard's name must give its split; no: none does.

    Raises:
        UsageError: there are no such shards, or none holds an image with a label.
        FileError: a shard can't be read.
    """
    shards, warnings = _shards(name, pattern)
    samples = _Samples(name, splits, warnings)
    said = time.monotonic()
    for k, shard in enumerate(shards, start=1):
        samples.add_shard(shard)
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            log.info("%s: %d of %d shards indexed", name, k, len(shards))
    return samples.table(shards, pattern)


def _shards(name: str, pattern: str) -> tuple[list[str], list[str]]:
    """Absolute paths of the shards, and warnings about them."""
    if "://" in pattern or pattern.startswith("pipe:"):
        raise UsageError(f"{name}: shards are read in place: download them, and give their paths")
    pattern = os.path.expanduser(pattern)
    warnings = []
    if os.path.isdir(pattern):
        below = sorted(os.path.join(at, f) for at, _, files in os.walk(pattern) for f in files)
        found = [path for path in below if path.lower().endswith(".tar")]
        if not found:
            raise UsageError(f"{name}: no .tar file in this folder")
        if packed := [path for path in below if _is_packed(path) and ".tar" in path.lower()]:
            warnings = [f"left out: {plural(len(packed), 'compressed shard')}, such as {packed[0]}"]
    else:
        found = list(dict.fromkeys(itertools.chain(*map(_matches, _expanded(pattern)))))
    missing = [path for path in found if not os.path.isfile(path)]
    if missing or not found:
        raise UsageError(f"{name}: no such file: {shortened(missing or [pattern], 3)}")
    if packed := [path for path in found if _is_packed(path)]:
        raise UsageError(
            f"{name}: {packed[0]} is compressed, so that nothing in it can be read in place: "
            "unpack it to a .tar (images are compressed already)"
        )
    return [os.path.abspath(path) for path in found], warnings


def _is_packed(path: str) -> bool:
    return path.lower().endswith((".gz", ".tgz", ".zst", ".bz2", ".xz"))


def _matches(path: str) -> list[str]:
    """The files that match a pattern; the path of an existing file matches only itself."""
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    return sorted(glob.glob(path))


def _expanded(pattern: str) -> Iterator[str]:
    """Expands {a,b} and {000..127} as a shell does, the first braces first."""
    braces = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if braces is None or os.path.exists(pattern):
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
    """The content of the shards, as lists that grow by one entry per image."""

    name: str
    reading: str
    warnings: list[str]
    names: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # "": no label
    groups: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)  # one per shard
    further: dict[str, set[str]] = field(default_factory=dict)  # values of what may be groups
    places: list[tuple[int, int, int]] = field(default_factory=list)  # shard, offset, size
    left_out: Counter[str] = field(default_factory=Counter)

    def add_shard(self, shard: str) -> None:
        """Adds the samples of a tar file."""
        self.splits.append("" if self.reading == "no" else self._split(Path(shard)))
        try:
            with tarfile.open(shard, "r:") as tar:
                members = _members(shard, tar)
                for key, parts in self._grouped(members).items():
                    self._add(f"{shard}: {key}", tar, key, parts)
        except tarfile.TarError as error:
            raise _broken(shard, error) from error
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{shard}: can't be read ({reason(error)})") from error

    def _split(self, shard: Path) -> str:
        split = split_word(shard.stem) or SPLIT_WORDS.get(shard.parent.name.lower(), "")
        if not split and self.reading == "yes":
            raise UsageError(f"{self.name}: {shard} has no train, val or test in its name")
        return split

    def _grouped(self, members: Sequence[tarfile.TarInfo]) -> dict[str, dict[str, tarfile.TarInfo]]:
        """{sample: {extension in lower case: member}}; hidden and meta files are in none."""
        held: dict[str, tarfile.TarInfo] = {}
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in members:
            folder, base = posixpath.split(posixpath.normpath(member.name))
            if member.isdir() or base.startswith((".", "__")):
                continue
            # tar stores another name of an earlier file as a hard link to it
            whole = held.get(member.linkname) if member.islnk() else member
            if whole is None or not whole.isreg() or whole.issparse():
                self.left_out["member other than a regular file, such as a link"] += 1
                continue
            held[member.name] = whole
            stem, _, kind = base.partition(".")
            parts = samples.setdefault(posixpath.join(folder, stem), {})
            if kind.lower() in parts:
                self.left_out["member replaced by a later one of the same name"] += 1
            whole = copy.copy(whole)
            whole.name = member.name
            parts[kind.lower()] = whole
        return samples

    def _add(
        self, where: str, tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]
    ) -> None:
        images = [kind for kind in parts if f".{kind}" in IMAGE_SUFFIXES]
        if len(images) > 1:
            raise UsageError(f"{where} has several images ({', '.join(images)})")
        if not images:
            dotted = sum(kind.endswith(IMAGE_SUFFIXES) for kind in parts)
            what = "image with another dot in the name" if dotted else "sample without an image"
            self.left_out[what] += max(1, dotted)
            return
        more = _json(where, _content(tar, where, parts["json"])) if "json" in parts else {}
        label = _scalar(where, *next(((k, more[k]) for k in _LABEL_KEYS if k in more), ("", None)))
        if "cls" in parts:
            label = _text(where, _content(tar, where, parts["cls"])) or label
        image = parts[images[0]]
        self.names.append(image.name)
        self.labels.append(label)
        self.groups.append(_scalar(where, "group", more.get("group")))
        for column, value in more.items():
            if may_be_groups(column) and isinstance(value, str | int):
                self.further.setdefault(column, set()).add(str(value))
        self.places.append((len(self.splits) - 1, image.offset_data, image.size))

    def table(self, shards: Sequence[str], pattern: str) -> ImageTable:
        """The table of all samples that have a label."""
        if not any(self.labels):
            self.labels = [_folder(name) for name in self.names]
        known = np.array([bool(label) for label in self.labels], bool)
        if missing := int((~known).sum()):
            self.left_out["image without a label"] = missing
        if not known.any():
            why = f" ({self._left_out()})" if self.left_out else ""
            raise UsageError(f"{self.name}: has no image with a label{why}")
        if "" in self.splits and set(self.splits) != {""}:
            other = shards[self.splits.index("")]
            raise UsageError(
                f"{self.name}: {other} has no train, val or test in its name, but others have"
            )
        base = _common_folder(shards)
        rows = np.flatnonzero(known)
        labels = [self.labels[row] for row in rows.tolist()]
        classes, indices = _classes(self.name, labels, Path(base or shards[0]) / CLASSES)
        places = np.array(self.places, np.int64)[rows]
        of = places[:, 0]
        names = PathList.of(self.names[row] for row in rows.tolist())
        lines = [f"left out: {self._left_out()}"] if self.left_out else []
        groups = all_or_no_groups(self.name, [self.groups[row] for row in rows.tolist()])
        if groups is None:
            told = (groups_line(key, found, len(rows)) for key, found in self.further.items())
            lines += [line for line in told if line]
        return ImageTable(
            name=self.name, classes=classes, labels=indices,
            splits=np.array(self.splits, "U5")[of],
            groups=groups,
            files=MemberList(names, shards, of.astype(np.int32), places[:, 1], places[:, 2]),
            base=base,
            location=_location(pattern),
            warnings=(*self.warnings, *lines),
        )  # fmt: skip

    def _left_out(self) -> str:
        counted = ((count, *what.partition(" ")[::2]) for what, count in self.left_out.items())
        return ", ".join(f"{plural(count, noun)} {which}" for count, noun, which in counted)


def _broken(shard: str, error: Exception) -> FileError:
    return FileError(f"{shard}: is not a tar file, or is cut short or damaged ({error})")


def _members(shard: str, tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All members of a complete file: tarfile stops silently at anything it can't read.

    Raises:
        FileError: a header is invalid, or data follows the end.
    """
    try:
        members = tar.getmembers()
    except (ValueError, OverflowError) as error:  # raised for a size out of range
        raise _broken(shard, error) from error
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    while block := tar.fileobj.read(1 << 20):
        if any(block):
            raise _broken(shard, tarfile.ReadError(f"no header at or after byte {tar.offset:,}"))
    return members


def _folder(name: str) -> str:
    """The folder that holds a member, "" if there is none."""
    folder = posixpath.basename(posixpath.dirname(posixpath.normpath(name)))
    return "" if folder in (".", "..") else folder


def _common_folder(shards: Sequence[str]) -> str:
    """The deepest folder above all shards, "" if they are on several drives."""
    try:
        return os.path.commonpath([os.path.dirname(shard) for shard in shards])
    except ValueError:
        return ""


def _location(pattern: str) -> str:
    """The pattern as an absolute path, or "" where a { in the current folder would be expanded."""
    pattern = os.path.expanduser(pattern)
    if os.path.isabs(pattern) or os.path.exists(pattern):
        return os.path.abspath(pattern)
    here = os.getcwd()
    return "" if "{" in here else os.path.join(glob.escape(here), pattern)


def _content(tar: tarfile.TarFile, where: str, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None or member.size > _LARGEST_LABEL:
        raise UsageError(f"{where}: {member.size:,} bytes are too many for a label")
    return file.read()


def _text(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: its .cls is not UTF-8 text") from error


def _json(where: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{where}: its .json can't be read ({error})") from error
    return value if isinstance(value, dict) else {}


def _scalar(where: str, key: str, value: Any) -> str:
    """A label or group as a string; null counts as missing."""
    if isinstance(value, float) and value.is_integer():  # pandas writes integers with gaps so
        value = int(value)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"{where}: {key} is {value!r}, neither text nor a whole number")
    return str(value).strip()


def _classes(name: str, labels: Sequence[str], listed: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Class names and (N,) class indices, from labels that are names or indices."""
    distinct = set(labels)
    classes = _listed_classes(listed)
    if not classes or distinct <= set(classes):
        if not classes and _are_indices(distinct):
            classes = [str(c) for c in range(max(map(int, distinct)) + 1)]
        names = classes or sorted(distinct, key=lambda label: (len(label), label)
                                  if label.isdigit() else (0, label))  # fmt: skip
        index = {c: i for i, c in enumerate(names)}
        return names, np.array([index[label] for label in labels], np.int64)
    unknown = [x for x in distinct if not (x.isascii() and x.isdigit() and len(x) < 10)]
    if unknown:
        raise UsageError(f"{name}: {listed} does not name {shortened(sorted(unknown), 5)}")
    highest = max(map(int, distinct))
    if highest >= len(classes):
        raise UsageError(f"{name}: has class {highest}, while {listed} names {len(classes)}")
    return classes, np.array([int(label) for label in labels], np.int64)


def _are_indices(distinct: set[str]) -> bool:
    """Whether labels are 0, 1, 2, ... with few gaps; otherwise numbers are names, such as codes."""
    if not all(x.isascii() and x.isdigit() and len(x) < 10 and str(int(x)) == x for x in distinct):
        return False
    return 2 * len(distinct) > max(map(int, distinct))


def _listed_classes(listed: Path) -> list[str]:
    """The lines of a classes.txt; empty if there is no such file.

    Raises:
        FileError: it can't be read.
        UsageError: a class is listed twice, or a line between others is empty.
    """
    if not listed.is_file():
        return []
    try:
        lines = listed.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        raise FileError(f"{listed}: can't be read ({reason(error)})") from error
    classes = [line.strip() for line in lines]
    if "" in classes:
        raise UsageError(f"{listed}: line {classes.index('') + 1} is empty, and names no class")
    if twice := [c for c, count in Counter(classes).items() if count > 1]:
        raise UsageError(f"{listed}: names {twice[0]!r} twice")
    return classes
