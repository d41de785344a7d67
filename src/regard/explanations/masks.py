"""What people marked in images: boxes from a CSV file, or a folder of mask images.

Everything is checked before the work starts: an image without a usable mask is named with the
reason and skipped; a path that could belong to several images is an error.
"""

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from regard.cells import number_of
from regard.data.images import IMAGE_SUFFIXES, opacity, read_stored, to_channels
from regard.errors import ImageError, UsageError
from regard.explanations.inputs import Source
from regard.explanations.pointing import Mask
from regard.files import shortened

Corners = tuple[float, float, float, float]
_COLUMNS = ("path", "x0", "y0", "x1", "y1")
_LABELS = 32  # whole numbers below this are numbers of labels, not shades
_MASK = re.compile(r"(.+?)[ _.-](?:mask|seg|gt|label)s?(?:[ _-]?\d+)?$", re.IGNORECASE)


@dataclass
class Masks:
    """The masks of images, by the images' names.

    Attributes:
        boxes: left, top, right, bottom in the original's pixels, upright; several form one mask.
        files: mask images, marked where brighter than half their maximum, and never where they are
            transparent; several are combined.
        problems: why an image has no usable mask.
        groups: of the images, such as patients, if the table has a column group.
    """

    boxes: dict[str, list[Corners]] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def read(self, name: str, size: tuple[int, int]) -> Mask:
        """The mask (H, W) of an image of this size.

        Raises:
            UsageError: it marks nothing in the image, or has another size.
            ImageError: a mask image can't be read.
        """
        mask = np.zeros(size, dtype=bool)
        for x0, y0, x1, y1 in self.boxes.get(name, []):
            mask[max(0, round(y0)) : max(0, round(y1)), max(0, round(x0)) : max(0, round(x1))] = (
                True
            )
        for path in self.files.get(name, []):
            marked = _marked(path)
            if marked.shape != size:
                height, width = marked.shape
                raise UsageError(
                    f"{path} has {width}x{height} pixels, the image {size[1]}x{size[0]}"
                )
            mask |= marked
        if not mask.any():
            raise UsageError("nothing inside the image is marked")
        return mask


def open_masks(source: Path, images: Sequence[Source]) -> Masks:
    """Finds and checks the masks of images.

    Args:
        source: a CSV file with the columns path, x0, y0, x1, y1 (pixels of the original, any
            number of rows per image) and optionally group, or a folder with a mask image for each
            image: with the same relative path and any image suffix, or with _mask, _seg, _gt or
            _label before it. The end of a path is enough if only one image matches.
        images: the images.

    Raises:
        UsageError: no such file or folder; a CSV file without these columns or numbers, with a
            group in only some rows, or with several groups for one image; a path that matches
            several images; or no usable mask at all.
    """
    if source.is_dir():
        masks = _from_folder(source, images)
    elif source.is_file():
        masks = _from_csv(source, images)
    else:
        raise UsageError(f"masks={source}: there is no such file or folder")
    if len(masks.problems) == len(images):
        name, reason = next(iter(masks.problems.items()))
        raise UsageError(f"masks={source}: no image has a usable one ({name}: {reason})")
    return masks


class _Names:
    """Finds images by the end of their path."""

    def __init__(self, images: Sequence[Source], *, suffixes: bool) -> None:
        self.suffixes = suffixes
        self.by_name: dict[str, list[tuple[tuple[str, ...], str]]] = {}
        for image in images:
            parts = self._parts(image.path.as_posix())
            self.by_name.setdefault(parts[-1], []).append((parts, image.name))
        self.exact = {self._parts(image.name): image.name for image in images}

    def _parts(self, path: str) -> tuple[str, ...]:
        pure = PurePosixPath(os.path.normpath(path.replace("\\", "/")))
        return (pure if self.suffixes else pure.with_suffix("")).parts

    def of(self, path: str, where: str) -> str | None:
        """The image with this path, by its name or else by the end of its path, or None."""
        parts = self._parts(path)
        if parts in self.exact:
            return self.exact[parts]
        ends = [
            name
            for full, name in self.by_name.get(parts[-1] if parts else "", [])
            if full[-len(parts) :] == parts
        ]
        if len(ends) > 1:
            raise UsageError(
                f"{where}: {path} could be {shortened(sorted(ends))}: give relative paths"
            )
        return ends[0] if ends else None


# ---- boxes -------------------------------------------------------------------------------
def _from_csv(source: Path, images: Sequence[Source]) -> Masks:
    rows = _rows(source)
    _check_groups(source, rows)
    names = _Names(images, suffixes=True)
    fractions = all(0 <= v <= 1 for _, _, corners, _ in rows for v in corners)
    masks = Masks()
    for line, path, corners, group in rows:
        name = names.of(path, f"{source}, line {line}")
        if name is None:
            continue
        problem = _box_problem(corners, fractions)
        if problem:
            masks.problems.setdefault(name, f"{source}, line {line}: {problem}")
        masks.boxes.setdefault(name, []).append(corners)
        if group and masks.groups.setdefault(name, group) != group:
            raise UsageError(
                f"{source}, line {line}: {path} has group {group!r}, but "
                f"{masks.groups[name]!r} in an earlier line"
            )
    for image in images:
        if image.name not in masks.boxes:
            masks.problems[image.name] = f"{source} has no box for it"
    return masks


def _check_groups(source: Path, rows: list[tuple[int, str, Corners, str]]) -> None:
    """Checks that every row or no row has a group, as for training images."""
    empty = [line for line, *_, group in rows if not group]
    if empty and len(empty) < len(rows):
        raise UsageError(f"{source}, line {empty[0]}: group is empty, but other rows have one")


def _rows(source: Path) -> list[tuple[int, str, Corners, str]]:
    rows = []
    done = 0  # lines that were read
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)  # else an open quote takes further rows
            if missing := [c for c in _COLUMNS if c not in (reader.fieldnames or ())]:
                raise UsageError(f"{source} lacks the columns {', '.join(missing)}")
            for row in reader:
                line = done = reader.line_num
                if not row["path"]:
                    raise UsageError(f"{source}, line {line}: path is empty")
                try:
                    x0, y0, x1, y1 = (number_of(row[c]) for c in _COLUMNS[1:])
                except (TypeError, ValueError):
                    raise UsageError(
                        f"{source}, line {line}: x0, y0, x1, y1 must be numbers"
                    ) from None
                rows.append((line, row["path"], (x0, y0, x1, y1), (row.get("group") or "").strip()))
    except csv.Error as error:
        raise UsageError(f"{source}, line {done + 1}: is not CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is not a CSV file in UTF-8 ({error})") from error
    except OSError as error:
        raise UsageError(f"{source} can't be read ({error.strerror})") from error
    return rows


def _box_problem(corners: Corners, fractions: bool) -> str:
    x0, y0, x1, y1 = corners
    if not all(math.isfinite(v) for v in corners):
        return "a corner is not finite"
    if x1 <= x0 or y1 <= y0:
        return f"x1 and y1 must be larger than x0 and y0 (x {x0:g} to {x1:g}, y {y0:g} to {y1:g})"
    whole = all(v == round(v) for v in corners)
    if max(corners) <= 1 and (fractions or not whole):
        return "all corners lie between 0 and 1: fractions, where pixels are needed"
    if x1 <= 0 or y1 <= 0:
        return "the box lies outside the image"
    if round(x1) <= round(x0) or round(y1) <= round(y0):
        return "the box covers no pixel"
    return ""


# ---- mask images -------------------------------------------------------------------------
def _from_folder(source: Path, images: Sequence[Source]) -> Masks:
    names, masks = _Names(images, suffixes=False), Masks()
    given = {os.path.realpath(image.path) for image in images}
    for path in _files(source):
        if os.path.realpath(path) in given:  # masks next to their images
            continue
        relative = path.relative_to(source).as_posix()
        stem = _MASK.fullmatch(path.stem)
        name = names.of(relative, str(source))
        if name is None and stem is not None:
            called = PurePosixPath(relative).with_name(f"{stem[1]}{path.suffix}")
            name = names.of(str(called), str(source))
        if name is not None:
            masks.files.setdefault(name, []).append(path)
    for image in images:
        masks.problems |= _file_problem(image, masks.files.get(image.name, []), source)
    return masks


def _files(folder: Path) -> list[Path]:
    return sorted(
        Path(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )


def _file_problem(image: Source, files: Sequence[Path], source: Path) -> dict[str, str]:
    """{image's name: reason}; empty if its masks are usable."""
    stems = [path.with_suffix("") for path in files]
    if not files:
        reason = f"{source} has no mask for it"
    elif len(set(stems)) < len(stems):
        raise UsageError(f"{image.name} has several masks: {shortened(files)}")
    else:
        try:
            if any(_marked(path).any() for path in files):
                return {}
            reason = f"{shortened(files)} marks nothing"
        except ImageError as error:
            reason = str(error)
    return {image.name: reason}


def _marked(path: Path) -> Mask:
    """Where a mask image is brighter than half its maximum. Transparent pixels mark nothing.

    Raises:
        ImageError: it can't be read, or holds the numbers of several labels.
    """
    pixels = to_channels(read_stored(path).pixels, 1)[..., 0]
    alpha = opacity(path)  # `pixels` has white where the file is transparent
    if alpha is not None:
        pixels = np.where(alpha > alpha.max() / 2, pixels, 0)
    if pixels.dtype.kind in "iu" and pixels.max() < _LABELS:
        values = np.unique(pixels).tolist()
        if len(values) > 2:
            some = shortened([str(v) for v in values])
            raise ImageError(f"{path} holds the labels {some}: a mask has two values, or shades")
    return pixels > pixels.max() / 2
