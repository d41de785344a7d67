"""Which images are explained, their names, and which files their results may replace.

An image's name is its path relative to the closest folder that holds all given images. Its
results are `NAME.explained.png` and `NAME.explained.npz`, which are unique whatever else is in
the folder. A file that Regard did not write is never replaced unless asked to.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regard.data.walk import images_below
from regard.errors import UsageError
from regard.evaluation.subgroups import CSV_HEADER
from regard.explanations.pointing import COLUMNS
from regard.files import NPZ_FAULTS, plural, shortened

PICTURE, NUMBERS = ".explained.png", ".explained.npz"
SHEET, CURVES = "contact-sheet.explained.png", "curves.explained.png"
SCORES_HEADER = ["path", "class", "map", "deletion", "insertion", *COLUMNS]
CSV_HEADERS = (
    "path,map,deletion,insertion",  # of `explain`, first old ones
    "path,class,map,deletion,insertion,hit,energy,chance,iou,dice,x0,y0,x1,y1",
    ",".join(SCORES_HEADER),
    ",".join(CSV_HEADER),  # of subgroups
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An image file, and its name: a relative path with forward slashes, unique in a call."""

    path: Path
    name: str


def list_sources(arguments: Sequence[str]) -> list[Source]:
    """The files given and the images below the folders given, each once.

    Raises:
        UsageError: a URL, no image at all, or paths without a common folder.
    """
    paths, roots = [], []
    for argument in arguments:
        if "://" in argument:
            raise UsageError(f"{argument} is a URL: download the image and give its file")
        where = Path(os.path.abspath(argument))
        roots.append(where if where.is_dir() else where.parent)
        paths += [Path(os.path.abspath(p)) for p in images_below([Path(argument)])]
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise UsageError(f"no image below {shortened(arguments)}")
    try:
        root = os.path.commonpath(roots)
    except ValueError as error:  # several drives
        raise UsageError(f"{shortened(arguments)} have no common folder") from error
    return [Source(p, Path(os.path.relpath(p, root)).as_posix()) for p in paths]


def refuse_to_replace(
    outputs: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool = False
) -> None:
    """Refuses to replace an input, or a file that Regard did not write.

    Raises:
        UsageError: names the files.
    """
    given = {os.path.realpath(path) for path in inputs}
    foreign = []
    for path in outputs:
        if os.path.realpath(path) in given:
            raise UsageError(f"{path} is one of the images given and would be replaced")
        if not os.path.lexists(path):
            continue
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} exists and is not a regular file")
        if not overwrite and not is_ours(path):
            foreign.append(path)
    if foreign:
        exists = "exists and was" if len(foreign) == 1 else "exist and were"
        raise UsageError(
            f"{plural(len(foreign), 'file')} ({shortened(foreign)}) {exists} not written by "
            "Regard: choose another folder, or give overwrite=True"
        )


def is_ours(path: Path) -> bool:
    """Whether a file was written by `explain`, `figures` or `report`, by a mark inside it."""
    kind = path.suffix.lower()
    try:
        if kind in (".png", ".tiff", ".tif"):
            with Image.open(path) as image:
                software = image.info.get("Software") or getattr(image, "tag_v2", {}).get(305, "")
                return str(software).startswith("Regard")
        if kind == ".npz":
            with np.load(path) as arrays:
                return "about" in arrays and "software" in json.loads(str(arrays["about"]))
        if kind == ".csv":
            with path.open(encoding="utf-8") as file:
                return file.readline().strip() in CSV_HEADERS
        if kind == ".txt":
            return path.read_bytes().startswith(b"Regard ")
        if kind in (".pdf", ".svg", ".md"):
            marks = {".pdf": b"/Creator (Regard ", ".svg": b"Regard ", ".md": b"<!-- Regard "}
            return marks[kind] in path.read_bytes()
        return "Regard" in json.loads(path.read_text(encoding="utf-8"))["software"]
    except (TypeError, *NPZ_FAULTS):
        return False
