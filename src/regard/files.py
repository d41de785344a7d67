"""Writing files atomically, and a few phrases that messages about files and lists share."""

import contextlib
import difflib
import errno
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from regard.errors import StateError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def signed(value: float, digits: int) -> str:
    """A difference with its sign, so many decimals, and no "-0.0"."""
    return f"{round(float(value), digits) + 0.0:+.{digits}f}"


def signed_range(value: float, low: float, high: float, digits: int) -> tuple[str, str, str]:
    """A difference and the ends of its interval as `signed`.

    They have up to three more decimals where an interval without 0 would seem to have it.
    """
    nearest = low if low > 0 else high if high < 0 else None
    if nearest is not None:
        digits = next((d for d in range(digits, digits + 3) if round(nearest, d)), digits + 3)
    return signed(value, digits), signed(low, digits), signed(high, digits)


# An underscore within a word is no emphasis, and an & of its own no entity.
_MARKDOWN = re.compile(r"[\\`*\[\]<|$]|(?<![^\W_])_|_(?![^\W_])|&(?=[\w#])|~~")


def markdown(text: str) -> str:
    """Text, such as the name of a class, as Markdown that shows it as it is.

    What stands between backticks in the text remains code.
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick of a name, not of code
        parts = [text]
    parts[::2] = [_MARKDOWN.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


NPZ_FAULTS = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Exceptions of NumPy when it reads an .npz file that is damaged or in another format."""


def read_npz(path: Path) -> "dict[str, NDArray[Any]]":
    """The arrays of an .npz file.

    Raises:
        StateError: it can't be read, is damaged, or is not such a file.
    """
    import numpy as np

    try:
        with path.open("rb") as file:  # NumPy leaves a damaged file open
            arrays = np.load(file)
            return {name: arrays[name] for name in arrays.files}
    except (AttributeError, *NPZ_FAULTS) as error:
        fault = getattr(error, "strerror", None) or "not an .npz file, or damaged"
        raise StateError(f"{path} can't be read ({fault})") from error


LEAST_FREE = 1_000_000  # bytes; where less is free, a disk is full


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes `path` atomically: `write` fills a temporary file, then fsync and rename.

    Raises:
        StateError: it can't be written; a previous file is unchanged.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.unlink(missing_ok=True)
        beside.touch()
        mode = beside.stat().st_mode
        beside.unlink()
        write(beside)
        if beside.stat().st_mode != mode:  # safetensors makes files that only their owner can read
            beside.chmod(mode)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's zip writer: RuntimeError
        why = reason(error)
        if isinstance(error, RuntimeError):  # torch's zip writer names a line of its source
            with contextlib.suppress(OSError):
                if shutil.disk_usage(path.parent).free < LEAST_FREE:
                    why = os.strerror(errno.ENOSPC)
        raise StateError(f"{path} can't be written ({why})") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    if os.name == "posix":  # the rename, too, must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes `path` atomically as UTF-8; file names that are not UTF-8 keep their bytes.

    Raises:
        StateError: it can't be written; a previous file is unchanged.
    """
    data = text.encode("utf-8", "surrogateescape")
    write_atomically(path, lambda beside: beside.write_bytes(data))


def check_space(folder: Path, needed: int) -> None:
    """Refuses a folder that can't be written or a full disk, before hours are spent.

    Args:
        folder: created if missing.
        needed: bytes.

    Raises:
        StateError: the message names the reason, and how much space is missing.
    """
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"regard")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"{folder} can't be written ({error.strerror})") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StateError(
            f"{folder}: {free / 1e6:,.0f} MB are free, and the run needs about "
            f"{needed / 1e6:,.0f} MB for its weights and states"
        )


def reason(error: BaseException, most: int = 200) -> str:
    """The message of an error, on one line of at most `most` characters; never empty."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[:most] or type(error).__name__


def lacking(path: str | os.PathLike[str], what: str, others: Iterable[str] = ()) -> str:
    """Why a path is not the folder that was meant: "runs holds no finished run", or worse.

    Args:
        path: what was given.
        what: should be in the folder, such as "finished run".
        others: names that could have been given as well as those of the folders beside it.
    """
    path = Path(path)
    if path.is_dir():
        return f"{path} holds no {what}"
    if path.exists():
        return f"{path} is a file: give a run's folder"
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [each.name for each in path.absolute().parent.iterdir() if each.is_dir()]
    near = [str(path.with_name(n)) for n in difflib.get_close_matches(path.name, beside, n=2)]
    near += difflib.get_close_matches(path.name, list(others), n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{path}: no such folder{hint}"


def shortened(names: Iterable[object], most: int = 3) -> str:
    """ "a, b, c and 4 more": up to `most` names in full."""
    rows = [str(name) for name in names]
    rest = f" and {len(rows) - most:,} more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + rest


def plural(count: int, noun: str) -> str:
    """ "1 image", "2,000 images", "3 classes": the noun gets an s, or es."""
    ending = "es" if noun.endswith(("s", "x", "batch")) else "s"
    return f"{count:,} {noun}" + ending * (count != 1)


def about(number: float, noun: str) -> str:
    """ "1 epoch", "2.22 epochs": three digits, and the noun gets an s."""
    text = f"{number:.3g}"
    return f"{text} {noun}" + "s" * (text != "1")


def spread(count: int, most: int) -> "NDArray[np.int64]":
    """At most `most` of the indices 0 to count - 1, evenly spread, the first and last included."""
    import numpy as np  # here, so that help and messages need no NumPy

    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
