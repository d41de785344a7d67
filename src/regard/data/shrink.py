"""Smaller copies of a data set's images, as training often waits for decoding large files.

The copies keep the names of the originals, in a folder that any other program can read. The
original of each copy is recorded, so that a run that was trained on copies also recognizes the
originals (`regard.trained_on`).
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regard.cores import cores
from regard.data.content import content_hash, write_originals
from regard.data.images import Stored, format_of, read_stored
from regard.data.members import open_binary
from regard.data.sources import KINDS, ImageTable
from regard.errors import FileError, ImageError, UsageError
from regard.files import reason, write_text

PLAN = ".shrink.json"  # hidden, so that listings skip it silently
MADE = ".shrink-made.jsonl"  # what each copy was made from
MANIFEST = "images.csv"  # written if DATA is not a folder of class folders
OUTSIDE = "outside"  # subfolder for images outside the data's folder

_AHEAD = 16  # images in progress per thread
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")
# format of the copy; the others, such as GIF and DICOM, become PNG
_SAME = {"JPEG": "JPEG", "MPO": "JPEG", "PNG": "PNG", "TIFF": "TIFF", "BMP": "BMP",
         "WEBP": "WEBP", "AVIF": "AVIF", "JPEG2000": "JPEG2000"}  # fmt: skip
_DEEP = ("PNG", "TIFF")  # these store 16 bits


@dataclass
class Shrunk:
    """The result of `shrink`.

    Attributes:
        data: what to give as DATA from now on.
        smaller: images that were made smaller.
        copied: images that were copied byte for byte: small ones, test images, and measurements,
            whose range is the data set's.
        unreadable: (path, reason) of the images that could not be read. Their files are copied as
            they are, empty if not a byte can be read: training leaves them out of OUT as of the
            data, and the splits are the same.
        earlier: images that an interrupted call had already made.
        size: total bytes of the copies.
    """

    data: Path
    smaller: int = 0
    copied: int = 0
    earlier: int = 0
    size: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def shrink(
    table: ImageTable,
    out: str | os.PathLike[str],
    *,
    side: int = 256,
    quality: int = 90,
    test_too: bool = False,
    workers: int | None = None,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Shrunk:
    """Copies a data set; images whose shorter side is above `side` are resized to it.

    EXIF orientation is applied and transparency laid on white. The copy has the format of the
    original if that can store it, else PNG. 16-bit gray stays 16-bit, and DICOM with a window
    becomes 16-bit PNG. Resizing is bicubic with antialiasing. JPEG files are decoded at a fraction
    of their size if at least twice `side` is left.

    The copies are made in OUT.unfinished, which is renamed to OUT when all are complete.

    Args:
        table: from `open_data`.
        out: a new folder.
        side: pixels.
        quality: of JPEG, WebP and AVIF files, 1 to 100.
        test_too: also shrink the images of the data's own test split, which are copied unchanged by
            default: a test should use real images.
        workers: number of threads; default: one per core.
        resume: continue an OUT.unfinished that the same call left.
        progress: called with (images done, images in total).

    Raises:
        UsageError: a number is out of range; OUT exists, or lies within the data; OUT.unfinished
            exists and `resume` is not given, or comes from a different call.
        FileError: no image could be read.
        OSError: the disk is full, or a folder can't be written.
    """
    for name, value, most in (("side", side, 10**5), ("quality", quality, 100)):
        if not 1 <= value <= most:
            raise UsageError(f"{name}={value}: a number from 1 to {most}")
    if workers is not None and workers < 1:
        raise UsageError(f"workers={workers}: at least 1")
    places = _Places(table)
    out = Path(out).expanduser()
    work = _work_folder(table, out, _plan(table, side, quality, test_too), resume)
    done = Shrunk(out / MANIFEST if places.manifest else out)
    originals: dict[str, int] = {}
    with _Record(work / MADE) as record:
        maker = _Maker(table, side, quality, test_too, record)
        for i, made in _in_order(
            range(len(table)), lambda i: maker.copy(i, work / places.of(i)), workers or cores()
        ):
            if made.original:
                copy = _existing(work / places.of(i))
                originals[copy.relative_to(work).as_posix()] = made.original
            _count(done, table.path(i), made)
            if progress is not None:
                progress(i + 1, len(table))
    if len(done.unreadable) == len(table):
        shutil.rmtree(work)
        raise FileError(f"{table.name}: no image can be read, {done.unreadable[0][1]}")
    if places.manifest:
        _write_manifest(table, work / MANIFEST, places)
    write_originals(work, originals)
    (work / PLAN).unlink()
    (work / MADE).unlink()
    if hasattr(os, "sync"):
        os.sync()  # once: the copies must be on disk before their folder gets its name
    os.rename(work, out)
    return done


def _count(done: Shrunk, path: str, made: "_Made") -> None:
    done.size += made.size
    if made.fault is not None:
        done.unreadable.append((path, made.fault))
        return
    done.earlier += made.how == "earlier"
    done.copied += made.how == "copied"
    done.smaller += made.how == "smaller"


def _plan(table: ImageTable, side: int, quality: int, test_too: bool) -> dict[str, Any]:
    """What a call must have in common with an earlier one to continue it."""
    hashed = hashlib.blake2b(digest_size=16)
    for i in range(len(table)):
        hashed.update(os.fsencode(f"{table.key(i)}\n{table.splits[i]}\n"))
    return {
        "data": table.name, "images": len(table), "keys": hashed.hexdigest(),
        "side": side, "quality": quality, "test_too": test_too,
    }  # fmt: skip


def _work_folder(table: ImageTable, out: Path, plan: dict[str, Any], resume: bool) -> Path:
    """OUT.unfinished, newly made or left by the same call."""
    work = out.with_name(f"{out.name}.unfinished")
    if out.exists():
        raise UsageError(f"{out}: exists; nothing in it is replaced, choose a new folder")
    where = os.path.realpath(table.location) if table.location else ""
    if os.path.isdir(where) and Path(os.path.realpath(out)).is_relative_to(where):
        raise UsageError(f"{out}: lies within {table.name}, which would then hold the copies")
    if resume and not work.exists():
        raise UsageError(f"{work}: no such folder, so that there is nothing to resume")
    if work.exists():
        if not resume:
            raise UsageError(f"{work}: was left by a call that was stopped; resume it or remove it")
        if _read_plan(work / PLAN) != plan:
            raise UsageError(f"{work}: is of other data or other values; remove it")
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / PLAN, json.dumps(plan, indent=2) + "\n")
    return work


def _read_plan(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _in_order(
    items: range, make: Callable[[int], "_Made"], threads: int
) -> Iterator[tuple[int, "_Made"]]:
    """(item, make(item)) in order, computed by threads, as decoders release the GIL."""
    waiting: deque[tuple[int, Future[_Made]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append((item, pool.submit(make, item)))
            if len(waiting) >= _AHEAD * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---- where copies lie


class _Places:
    """The path of each copy below OUT: that of the image below the data's own folder."""

    def __init__(self, table: ImageTable) -> None:
        self.table = table
        self.manifest: bool = table.name.startswith(KINDS) or not os.path.isdir(table.location)
        self._outside: dict[str, str] = {}  # {key: path}; most data sets have none
        if table.files is not None:
            keys = [table.key(i) for i in range(len(table))]
            self._taken = set(keys)  # an image below the data's folder may lie in one of this name
            self._check_names(keys)
            for key in keys if self.manifest else ():
                self._place_outside(key)

    def of(self, i: int) -> PurePath:
        """The path of image i, with the name of the original."""
        if self.table.files is None:
            return PurePath("images", f"{self.table.row(i):07d}.png")
        key = self.table.key(i)
        return PurePath(self._outside.get(key, key))

    def _check_names(self, keys: Sequence[str]) -> None:
        """Refuses scan.dcm next to scan.dcm.png, as the copy of the former has that name."""
        for key in set(keys) & {key[:-4] for key in keys if key.lower().endswith(".png")}:
            raise UsageError(
                f"{self.table.name}: {key} and {key}.png are both there: leave one out"
            )

    def _place_outside(self, key: str) -> None:
        """Assigns a path of its own to an image that is not below the data's folder."""
        path = PurePath(os.path.normpath(key))
        if key in self._outside or not (path.is_absolute() or ".." in path.parts):
            return
        parts = [part for part in path.parts if part not in ("..", path.anchor)]
        place = name = PurePath(OUTSIDE, *parts)
        number = 1
        while str(place) in self._taken:
            number += 1
            place = name.with_name(f"{name.stem}-{number}{name.suffix}")
        self._taken.add(str(place))
        self._outside[key] = str(place)


def _write_manifest(table: ImageTable, path: Path, places: _Places) -> None:
    """Writes the CSV file of the copies: path, label, split, group and the further columns."""
    root = path.parent
    columns = [c for c in table.columns if c not in ("path", "label", "split", "group")]
    with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        group = ["group"] if table.groups is not None else []
        writer.writerow(["path", "label", "split", *group, *columns])
        for i in range(len(table)):
            place = _existing(root / places.of(i)).relative_to(root)
            groups = [] if table.groups is None else [table.groups[i]]
            further = [table.columns[c][i] for c in columns]
            label = table.classes[table.labels[i]]
            writer.writerow([place.as_posix(), label, table.splits[i], *groups, *further])


def _existing(place: Path) -> Path:
    """The copy at this path, whatever format it got."""
    other = _as_png(place)
    return other if os.path.exists(other) else place  # copying reports a name that is too long


def _as_png(place: Path) -> Path:
    return place.with_name(f"{place.name}.png")


# ---- making them


@dataclass
class _Made:
    how: str  # smaller, copied, unreadable, earlier
    size: int
    original: int  # hash of the original, 0 if its bytes are those of the copy
    fault: str | None = None


class _Record:
    """The file that says what each finished copy was made from; read again by `resume`."""

    def __init__(self, path: Path) -> None:
        self.earlier: dict[int, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short
                    row = json.loads(line)
                    self.earlier[row["i"]] = row
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, **row: Any) -> None:
        """Adds a row, after a line break, as the one before may have been cut short."""
        with self._lock:
            self._file.write(f"\n{json.dumps(row)}")
            self._file.flush()


@dataclass
class _Maker:
    """Makes the copy of one image; shared by several threads."""

    table: ImageTable
    side: int
    quality: int
    test_too: bool
    record: _Record

    def copy(self, i: int, place: Path) -> _Made:
        """Writes the copy of image i, unless one of the same original is there already."""
        # not by size and time: those of a file put in its place may be the same, members of tar
        # files and arrays have none, and hashing takes a tenth of the time of decoding. Before the
        # copy is made: if the file is replaced meanwhile, a resumed call makes the copy again.
        original = content_hash(self.table, i)
        earlier = self._earlier(i, _existing(place), original)
        if earlier is not None:
            return earlier
        for stale in (place, _as_png(place)):
            if os.path.exists(stale):
                stale.unlink()
        fault = None
        try:
            content, place, how = self._content(i, place)
        except ImageError as error:
            content, how, fault = self._unreadable(i), "unreadable", str(error)
        self._write(i, place, content)
        self.record.add(i=i, how=how, size=len(content), original=original, fault=fault)
        return self._made(how, len(content), original, fault)

    def _earlier(self, i: int, place: Path, original: int) -> _Made | None:
        """What an interrupted call made of this original."""
        row = self.record.earlier.get(i)
        if row is None or row["original"] != original or not os.path.exists(place):
            return None
        if place.stat().st_size != row["size"]:
            return None
        made = self._made(row["how"], row["size"], original, row["fault"])
        return replace(made, how="earlier")

    def _made(self, how: str, size: int, original: int, fault: str | None) -> _Made:
        same = how != "smaller" and self.table.files is not None  # an array's file is a new one
        return _Made(how, size, 0 if same else original, fault)

    def _unreadable(self, i: int) -> bytes:
        """The bytes of a file that is no image, as far as they can be had."""
        assert self.table.files is not None
        try:
            return _bytes_of(self.table.files[i])
        except ImageError:
            return b""

    def _write(self, i: int, place: Path, content: bytes) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{i}.writing")  # short, as the image's name may be long
        try:
            partial.write_bytes(content)
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)

    def _content(self, i: int, place: Path) -> tuple[bytes, Path, str]:
        """The bytes of a copy, its path, and "smaller" or "copied"."""
        table = self.table
        whole = table.splits[i] == "test" and not self.test_too
        if table.files is None:
            stored = Stored(table.read(i))
            if whole or min(stored.pixels.shape[:2]) <= self.side:
                return _encoded(stored.pixels, "PNG", self.quality), place, "copied"
            return self._smaller(stored.pixels, "PNG", place)
        path = table.files[i]
        if whole:
            return _bytes_of(path), place, "copied"
        stored = read_stored(path, at_least=2 * self.side)
        pixels = stored.pixels
        small = min(pixels.shape[:2]) <= self.side
        if small or stored.is_measurement or (pixels.dtype != np.uint8 and pixels.shape[2] > 1):
            return _bytes_of(path), place, "copied"
        return self._smaller(pixels, format_of(path), place)

    def _smaller(
        self, pixels: NDArray[Any], was: str | None, place: Path
    ) -> tuple[bytes, Path, str]:
        kind = _SAME.get(was or "", "PNG")
        if pixels.dtype != np.uint8 and kind not in _DEEP:
            kind = "PNG"
        if kind != was and not (was == "MPO" and kind == "JPEG") and was != "PNG":
            place = _as_png(place)
        return _encoded(_resized(pixels, self.side), kind, self.quality), place, "smaller"


def _bytes_of(path: str) -> bytes:
    try:
        with open_binary(path) as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{path}: can't be read ({reason(error)})") from error


def _resized(pixels: NDArray[Any], side: int) -> NDArray[Any]:
    """(H, W, C) uint8, or (H, W, 1) uint16 or float32 of 0 to 1 -> uint8 or uint16."""
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    if pixels.dtype == np.uint8:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        return resized if resized.ndim == 3 else resized[..., None]
    values = pixels[..., 0].astype(np.float32)
    if pixels.dtype != np.uint16:
        values *= 65535
    floats = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC))
    return np.rint(floats.clip(0, 65535)).astype(np.uint16)[..., None]


def _encoded(pixels: NDArray[Any], kind: str, quality: int) -> bytes:
    """(H, W, 1 or 3) uint8 or (H, W, 1) uint16 as the bytes of a file."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options: dict[str, Any] = {"quality": quality} if kind in _LOSSY else {}
    if kind == "TIFF":
        options = {"compression": "tiff_adobe_deflate"}
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
