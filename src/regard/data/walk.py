"""Lists the images below a folder: what counts as an image, and what is skipped and counted.

Training and prediction list folders by the same rules. Masks next to their images and folders
that Regard itself wrote are left out.
"""

import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from regard.data.images import IMAGE_SUFFIXES, read_stored, to_channels
from regard.errors import FileError, ImageError
from regard.files import plural, reason, shortened

JUNK = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
_MASK_WORDS = r"(?:masks?|seg(?:mentation)?s?|gt|ground[ _-]?truth|labels?|annotations?)"
_MASK_STEM = re.compile(rf"(.+?)[ _.-]{_MASK_WORDS}(?:[ _-]?\d+)?$", re.IGNORECASE)
_MASK_FOLDER = re.compile(_MASK_WORDS, re.IGNORECASE)
_RESULT_FILES = ("run.json", "config.json", "model.safetensors")
_SAMPLED = 24  # possible masks that are opened per listing
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"GIF8", b"RIFF")

logger: logging.Logger = logging.getLogger(__name__)


@dataclass
class Skipped:
    """What was left out of listings.

    Attributes:
        files: number of files by suffix ('' for none); hidden files are not counted.
        masks: mask images next to their images.
        results: folders that Regard wrote.
    """

    files: Counter[str] = field(default_factory=Counter)
    masks: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One sentence for each kind of thing left out."""
        lines = []
        if self.files:
            kinds = [f"{n} {suffix or 'without suffix'}" for suffix, n in self.files.most_common()]
            lines.append(f"skipped: {shortened(kinds, 6)}")
        if self.masks:
            some = os.path.basename(self.masks[0])
            lines.append(
                f"{plural(len(self.masks), 'mask')} next to images left out (such as {some}); "
                "`regard explain --masks` compares maps with masks"
            )
        if self.results:
            count = plural(len(self.results), "folder")
            where = shortened(sorted(self.results))
            lines.append(f"{count} of Regard's results left out: {where}")
        return lines


def list_images(folder: str, skipped: Skipped, *, above: Iterable[str] = ()) -> list[str]:
    """Paths of the images at any depth, sorted, without masks and results.

    A folder that links lead to twice is listed once, those in `above` not at all.
    """
    files = sorted(_walk(folder, skipped, above))
    masks = masks_among(folder, files)
    skipped.masks += sorted(masks)
    return [path for path in files if path not in masks] if masks else files


def images_below(paths: Sequence[Path]) -> Iterator[Path]:
    """The files given, and the images below the folders given, listed as for training.

    Logs at the end what was skipped.
    """
    skipped = Skipped()
    for path in paths:
        if os.path.isdir(path):  # False for paths that can't be looked up; their reader names them
            yield from map(Path, list_images(str(path), skipped))
        else:
            yield path
    for line in skipped.lines():
        logger.warning(line)


def subfolders(folder: str) -> dict[str, str]:
    """{name: path} of the subfolders, without hidden ones, junk and results."""
    folders = {e.name: e.path for e in _scan(folder) if not _hidden(e.name) and _is_folder(e)}
    return dict(sorted(folders.items()))


def has_images(folder: str, *, below: bool = True) -> bool:
    """Whether a folder holds an image, directly or (by default) at any depth."""
    if not below:
        return any(_is_image(e) for e in _scan(folder) if not _hidden(e.name) and not _is_folder(e))
    return next(_walk(folder, Skipped(), ()), None) is not None


def _scan(folder: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder.

    Raises:
        FileError: it can't be read.
    """
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise FileError(f"{folder} can't be listed ({reason(error)})") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _walk(folder: str, skipped: Skipped, above: Iterable[str]) -> Iterator[str]:
    seen = {_identity(path) for path in above}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        identity = _identity(here)
        if identity in seen:
            continue
        seen.add(identity)
        if here != folder and is_result(here):
            skipped.results.append(here)
            continue
        for entry in _scan(here):
            if _hidden(entry.name):
                continue
            if _is_folder(entry):
                waiting.append(entry.path)
            elif _is_image(entry):
                yield entry.path
            else:
                skipped.files[os.path.splitext(entry.name)[1].lower()] += 1


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Recognizes images by suffix; without one, as is common for DICOM, by the first bytes."""
    if entry.name.lower().endswith(IMAGE_SUFFIXES):
        return not entry.name.endswith(".explained.png")  # a figure of `regard explain`
    suffix = os.path.splitext(entry.name)[1]
    if suffix and not suffix[1:].isdigit():  # the name of a DICOM file often ends in a number
        return False
    try:
        if not entry.is_file():  # a pipe would block
            return False
        with open(entry.path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:] == b"DICM" or head.startswith(_SIGNATURES)


# ---- folders that Regard wrote


def is_result(folder: str) -> bool:
    """Whether Regard wrote this folder: a run, a network, explanations, or a folder of these."""
    here = {n for n in _RESULT_FILES if os.path.exists(os.path.join(folder, n))}
    if "run.json" in here or len(here) > 1:
        return True
    names, folders = set(), []
    for entry in _scan(folder):
        if _is_folder(entry):
            folders.append(entry.path)
        elif not entry.name.startswith("."):
            names.add(entry.name)
        if len(names) > 100 and not any(n.endswith(".npz") for n in names):
            return False  # images alone: no need to list them all
    if any(n.endswith(".npz") for n in names):
        return _are_explanations(folder, names)
    return bool(folders) and not names and all(is_result(path) for path in folders)


def _are_explanations(folder: str, names: set[str]) -> bool:
    """Whether every picture but the sheets has its maps, as `regard explain` writes them."""
    stems = {n[:-4] for n in names if n.endswith(".png")} - {"contact-sheet", "curves"}
    pairs = sorted(stem for stem in stems if f"{stem}.npz" in names)
    if not pairs or len(pairs) < len(stems):
        return False
    try:
        with zipfile.ZipFile(os.path.join(folder, f"{pairs[0]}.npz")) as file:
            return {"about.npy", "box.npy"} <= set(file.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


# ---- masks


def is_mask_folder(name: str) -> bool:
    """Whether a folder has a name that is usual for masks."""
    return _MASK_FOLDER.fullmatch(name) is not None


def masks_among(folder: str, files: Sequence[str]) -> set[str]:
    """The files that are masks of others: they are named like masks and nearly two-valued.

    `x_mask.png`, `x_seg_1.png` or `x-label.tif` next to `x.jpg`; or `masks/x.png` if `x.jpg` is
    elsewhere below the folder.
    """
    possible: dict[str, set[str]] = {}  # path: stems that its image may have
    start = len(os.path.join(folder, ""))
    for path in files:
        below, name = os.path.split(path[start:])
        stem = os.path.splitext(name)[0]
        match = _MASK_STEM.fullmatch(stem)
        if any(is_mask_folder(part) for part in below.split(os.sep)):
            possible[path] = {stem, match[1] if match else stem}
        elif match:
            possible[path] = {os.path.join(below, match[1])}
    if not possible:
        return set()
    images = set()
    for path in files:
        if path not in possible:
            stem = os.path.splitext(path[start:])[0]
            images |= {stem, os.path.basename(stem)}
    named = [path for path, stems in possible.items() if stems & images]
    sample = named[:: max(1, len(named) // _SAMPLED)]
    agree = {path: is_mask(path) for path in sample}
    if not any(agree.values()):
        return set()
    masks = set(named)
    if not all(agree.values()):
        masks = {path for path in named if agree.get(path, False) or is_mask(path)}
    # next to masks, one whose image is missing is not an image either
    return masks | {path for path in possible.keys() - set(named) if is_mask(path)}


def is_mask(path: str) -> bool:
    """Whether nearly all pixels have one of two values, or all one of a few values."""
    try:
        pixels = to_channels(read_stored(path).pixels, 1)[..., 0].astype(np.float64)
    except ImageError:
        return False
    low, high = pixels.min(), pixels.max()
    near = (pixels - low <= (high - low) / 16) | (high - pixels <= (high - low) / 16)
    return bool(near.mean() >= 0.95) or len(np.unique(pixels)) <= 8
