"""The file of `regard predict --csv`: written row by row, so that what is done is never lost."""

import contextlib
import csv
import io
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from regard.commands.written_rows import WrittenRows
from regard.errors import FileError, UsageError

if TYPE_CHECKING:
    from regard.predict import Classifier, Prediction

_FLUSH_EVERY = 1.0  # seconds


def check_output(
    path: Path, images: Sequence[str], run: Path, *, overwrite: bool, resume: bool
) -> None:
    """Refuses a path where writing would destroy something, before the network is loaded.

    Raises:
        UsageError: the path is a folder, an image or another input, or a file that exists.
    """
    from regard.data.images import IMAGE_SUFFIXES

    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UsageError(f"--csv {path}: is the name of an image; give the name of the CSV file")
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if not Path(os.path.realpath(path)).parent.is_dir():
            raise UsageError(f"--csv {path}: its folder does not exist") from None
        if resume:
            raise UsageError(f"--resume: {path} does not exist") from None
        return
    except OSError as error:
        raise FileError(f"--csv {path}: {(error.strerror or str(error)).lower()}") from error
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"--csv {path}: is a folder; give the name of the CSV file")
    if not stat.S_ISREG(status.st_mode):
        if resume:
            raise UsageError(f"--resume: {path} is not a regular file")
        return
    files = [*images, *(os.path.join(run, n) for n in ("config.json", "model.safetensors"))]
    if any(os.path.exists(f) and os.path.samestat(os.stat(f), status) for f in files):
        raise UsageError(f"--csv {path}: is an input of this command")
    if status.st_size and not (overwrite or resume or _is_standard_output(status)):
        raise UsageError(
            f"--csv {path}: exists; --overwrite replaces it, --resume continues one that was "
            "stopped"
        )


def _is_standard_output(status: os.stat_result) -> bool:
    try:
        return os.path.samestat(status, os.fstat(sys.__stdout__.fileno()))  # type: ignore[union-attr]
    except (AttributeError, OSError, ValueError):
        return False


class PredictionsCsv:
    """A CSV file of predictions; links are followed, and pipes are written to.

    Args:
        path: as `check_output` allows it.
        top: classes for each image, the most probable first.
        classifier: makes the predictions; the probability of each of its classes has a column.
        resume: append to the rows that are there.

    Raises:
        UsageError: the rows there are of another call.
        FileError: it can't be opened or written.
    """

    def __init__(self, path: Path, top: int, classifier: "Classifier", *, resume: bool) -> None:
        ranks = [f"{kind}{k}" for k in range(1, top + 1) for kind in ("class", "probability")]
        stored = classifier.calibration
        self.decides: bool = stored is not None and stored.threshold is not None
        self.path: Path = path
        self.top: int = top
        self.classifier: Classifier = classifier
        self.measures: bool = classifier.measures_distances
        self.columns: list[str] = ["path", *ranks, *(["decision"] if self.decides else [])]
        self.columns += ["distance", "unlike_training"] if self.measures else []
        self.averages: bool = len(classifier.members) > 1
        self.columns += ["sd1", "disagreement"] if self.averages else []
        self.flips: bool = classifier.mirrors
        self.columns += ["tta"] if self.flips else []
        self.columns += [*(f"p_{name}" for name in classifier.class_names), "error"]
        self.repeated: int = 0
        self._flushed = time.monotonic()
        with contextlib.ExitStack() as undo:
            try:
                self._file = self._open()
                if self._file is not sys.stdout:
                    undo.callback(self._file.close)
                    self._prepare(resume)
            except OSError as error:
                raise FileError(f"{path}: {(error.strerror or str(error)).lower()}") from error
            undo.pop_all()
        self._writer = csv.writer(self._file)
        self._resumed = resume and os.stat(path).st_size > 0
        if not self._resumed:
            self._put(self.columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is sys.stdout:
            self._file.flush()
            return
        try:
            self._file.close()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritten(error) from error

    def _open(self) -> Any:
        if os.path.exists(self.path) and _is_standard_output(os.stat(self.path)):
            if isinstance(sys.stdout, io.TextIOWrapper):  # the same bytes in every locale
                sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
            return sys.stdout  # what a shell redirects is appended to
        # file names that are not UTF-8 go through as they are
        return open(self.path, "a", newline="", encoding="utf-8", errors="surrogateescape")

    def _prepare(self, resume: bool) -> None:
        """Takes the file for this process alone, and leaves in it the rows to go on from.

        Raises:
            UsageError: another process writes it, or it is no file of predictions.
        """
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            return
        if not _take(self._file.fileno()):
            raise UsageError(f"--csv {self.path}: another process is writing it")
        if not resume:
            self._file.truncate(0)
            return
        text = io.StringIO()
        csv.writer(text).writerow(self.columns)
        line = text.getvalue().encode("utf-8", "surrogateescape")
        with open(self.path, "rb") as file:
            start = file.read(len(line))
        for end in (b"\r\n", b"\n"):  # an editor may have changed the first to the second
            header = line.removesuffix(b"\r\n") + end
            if header.startswith(start[: len(header)]):
                _cut_last_line(self.path, end)
                return
        raise UsageError(  # before a byte of somebody's file is changed
            f"--resume: {self.path} has other columns; its --top or classes may differ, or it was "
            "not written by `regard predict`"
        )

    def write(self, p: "Prediction") -> None:
        """Appends one row; it is on the disk within a second."""
        self._put(self.cells(p))

    def cells(self, p: "Prediction") -> list[str]:
        """The row of a prediction."""
        cells = [cell for name, share in p.classes for cell in (name, _cell(share))]
        cells += [""] * (2 * self.top - len(cells))
        cells += [p.decision or ""] if self.decides else []
        if self.measures:
            known = p.distance is not None
            cells += (
                [f"{p.distance:.4g}", "yes" if p.unlike_training else "no"] if known else ["", ""]
            )
        if self.averages:
            sd = p.sd or {}
            known = bool(sd) and p.disagreement is not None
            cells += [_cell(sd[p.classes[0][0]]), f"{p.disagreement:.4g}"] if known else ["", ""]
        cells += ["flips"] if self.flips else []
        shares = [_cell(share) for share in p.probabilities]
        cells += shares or [""] * len(self.classifier.class_names)
        return [p.path, *cells, p.error or ""]

    def _put(self, cells: Sequence[str]) -> None:
        try:
            self._writer.writerow(cells)
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                self._file.flush()
                self._flushed = time.monotonic()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> FileError:
        reason = (error.strerror or str(error)).lower()
        # rows may be lost with the buffer, and one may be cut
        hint = "; --resume goes on after its last whole row" if self.path.is_file() else ""
        return FileError(f"{self.path}: {reason}{hint}")

    def skip_done(self, names: Iterator[str]) -> tuple[int, int, Iterator[str]]:
        """Compares the rows that are there with the images, one by one.

        Returns:
            Images answered, images that could not be read, and the names of the others. The
            first `repeated` of these are the images of a batch that was written in part: they
            are predicted once more, for a batch decides the last digits of what is in it.

        Raises:
            UsageError: the rows are of other images or columns, another network or calibration.
        """
        if not self._resumed:
            return 0, 0, names
        from regard.predict import BATCH

        answered = failed = 0
        written = WrittenRows(self)
        started: list[str] = []  # images of the batch that is not whole
        with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            next(rows)  # the columns, which are these
            for number, row in enumerate(rows, start=1):
                name = next(names, None)
                if not row or name != row[0] or len(row) != len(self.columns):
                    there = row[0] if row else "an empty line"
                    raise UsageError(
                        f"--resume: image {number} in {self.path} is {there}, but in this call it "
                        f"is {name or 'missing'}: give the same images, or --overwrite"
                    )
                failed += row[-1] != ""
                answered += row[-1] == ""
                written.add(number, row)
                started = [*started, name] if number % BATCH else []
        written.check()
        if "-" in started:  # standard input can't be read twice
            return answered, failed, names
        self.repeated = len(started)
        return answered, failed, chain(started, names)


def _cell(share: float) -> str:
    """A probability with the digits that tell any two float32 numbers apart."""
    return f"{share:.9g}"


def _take(descriptor: int) -> bool:
    """Locks a file until it is closed; False where another process has it.

    True where locks are not to be had: on Windows, and on disks of other machines without them.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _cut_last_line(path: Path, end: bytes) -> None:
    """Removes a last row that was not written to the `end` of its line."""
    with open(path, "rb+") as file:
        at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - 2**16)
            file.seek(start)
            found = file.read(at - start + 1).rfind(end)
            if found >= 0:
                file.truncate(start + found + len(end))
                return
            at = start
        file.truncate(0)
