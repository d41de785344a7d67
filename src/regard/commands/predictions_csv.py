"""The file of `regard predict --csv`: written row by row, so that what is done is never lost."""

import csv
import io
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from regard.errors import FileError, UsageError

if TYPE_CHECKING:
    from regard.predict import Classifier, Prediction

_FLUSH_EVERY = 1.0  # seconds
_AGREE = 0.05  # probabilities of one network by two engines differ less


def check_output(
    path: Path, images: Sequence[str], run: Path, *, overwrite: bool, resume: bool
) -> None:
    """Refuses a path where writing would destroy something, before the network is loaded.

    Raises:
        UsageError: the path is a folder, an image or another input, or a file that exists.
    """
    from regard.data.images import IMAGE_SUFFIXES

    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UsageError(f"--csv {path}: is an image's name; give the name of the CSV file")
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
        self.rows: int = 0
        self._flushed = time.monotonic()
        if resume:
            _cut_last_line(path)
        try:
            self._file = self._open("a" if resume else "w")
        except OSError as error:
            raise FileError(f"{path}: {(error.strerror or str(error)).lower()}") from error
        self._writer = csv.writer(self._file)
        self._resumed = resume and os.stat(path).st_size > 0
        if not self._resumed:
            self._put(self.columns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is sys.stdout:
            self._file.flush()
        else:
            self._file.close()

    def _open(self, mode: str) -> Any:
        if os.path.exists(self.path) and _is_standard_output(os.stat(self.path)):
            if isinstance(sys.stdout, io.TextIOWrapper):  # the same bytes in every locale
                sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
            return sys.stdout  # what a shell redirects is appended to
        # file names that are not UTF-8 go through as they are
        return open(self.path, mode, newline="", encoding="utf-8", errors="surrogateescape")

    def write(self, p: "Prediction") -> None:
        """Appends one row; it is on the disk within a second."""
        cells = [cell for name, share in p.classes for cell in (name, f"{share:.6f}")]
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
            cells += [f"{sd[p.classes[0][0]]:.6f}", f"{p.disagreement:.4g}"] if known else ["", ""]
        cells += ["flips"] if self.flips else []
        shares = [f"{share:.6f}" for share in p.probabilities]
        cells += shares or [""] * len(self.classifier.class_names)
        self._put([p.path, *cells, p.error or ""])
        self.rows += 1

    def _put(self, cells: Sequence[str]) -> None:
        try:
            self._writer.writerow(cells)
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                self._file.flush()
                self._flushed = time.monotonic()
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise FileError(f"{self.path}: {reason}, after {self.rows} rows") from error

    def skip_done(self, names: Iterator[str]) -> tuple[int, int, Iterator[str]]:
        """Compares the rows that are there with the images, one by one.

        Returns:
            Images answered, images that could not be read, and the names of the others.

        Raises:
            UsageError: the rows are of other images, columns or of another network.
        """
        if not self._resumed:
            return 0, 0, names
        answered = failed = 0
        last: list[str] = []
        with open(self.path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            if next(rows, None) != self.columns:
                raise UsageError(
                    f"--resume: {self.path} has other columns; its --top or classes may differ, or "
                    "it is no file of `regard predict`"
                )
            for number, row in enumerate(rows, start=1):
                name = next(names, None)
                if name != row[0] or len(row) != len(self.columns):
                    raise UsageError(
                        f"--resume: image {number} in {self.path} is {row[0]}, and of this call "
                        f"{name or 'there is none'}: give the same images, or --overwrite"
                    )
                failed += row[-1] != ""
                answered += row[-1] == ""
                last = row if row[-1] == "" else last
        self._check_network(last)
        self.rows = answered + failed
        return answered, failed, names

    def _check_network(self, row: list[str]) -> None:
        """Refuses rows of another network, by predicting the last image again."""
        if not row or row[0] == "-":
            return
        (again,) = self.classifier.predict_each([row[0]], top=1)
        shares: dict[str, Any] = dict(
            zip(self.classifier.class_names, again.probabilities, strict=again.error is None)
        )
        if again.error is None and abs(shares.get(row[1], -1.0) - float(row[2])) > _AGREE:
            raise UsageError(
                f"--resume: {self.path} is of another network: {row[0]} was {row[1]} at {row[2]}"
            )


def _cut_last_line(path: Path) -> None:
    """Removes a last row that was not written to its end."""
    with open(path, "rb+") as file:
        size = at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - 2**16)
            file.seek(start)
            found = file.read(at - start + 1).rfind(b"\r\n")
            if found >= 0:
                if start + found + 2 < size:
                    file.truncate(start + found + 2)
                return
            at = start
        file.truncate(0)
