"""`regard predict`: classes and probabilities of images."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import Parameter

from regard.commands.flags import (
    EngineFlags,
    use_engine,
)
from regard.errors import UsageError

if TYPE_CHECKING:
    from regard.predict import Classifier, Prediction

log = logging.getLogger(__name__)


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    top: int = 5,
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
    json: bool = False,
    csv: Path | None = None,
) -> int:
    """Classify images with a trained network.

    Parameters
    ----------
    run
        A run's folder, such as runs/demo.
    images
        Image files and folders of images.
    top
        Number of classes to list for each image.
    json
        Print one JSON object per line.
    csv
        Write a CSV file instead of printing.
    """
    if top < 1:
        raise UsageError(f"--top {top}: at least 1")
    if json and csv is not None:
        raise UsageError("--json and --csv: give one of them")
    from regard.data.sources import images_below
    from regard.predict import load

    classifier = load(run)
    if not engine.is_default:
        paths = list(images_below(images))
        reads = [lambda p=p: classifier.decode(p) for p in paths[:64]]
        use_engine(classifier, engine, reads, len(paths))
    answered, failed = print_predictions(
        classifier, images, top=top, as_json=json, csv=csv, complain=log.warning
    )
    if answered == failed == 0:
        raise UsageError(f"no image below {', '.join(map(str, images))}")
    return 0 if failed == 0 else 1 if answered else 2


def print_predictions(
    classifier: "Classifier",
    paths: Sequence[Path],
    *,
    top: int,
    as_json: bool,
    csv: Path | None,
    complain: Callable[[str], None],
) -> tuple[int, int]:
    """Answers for every image, as lines, as JSON lines, or in a CSV file.

    Returns:
        How many images were answered, and how many could not be read.

    Raises:
        OSError: the CSV can't be written.
    """
    from regard.data.sources import images_below

    answered = failed = 0
    write, finish = _writer(csv, as_json, min(top, len(classifier.class_names)))
    done = False
    try:
        for prediction in classifier.predict_each(images_below(paths), top):
            if prediction.error is not None:
                complain(prediction.error)
                failed += 1
            else:
                answered += 1
            write(prediction)
        done = True
    finally:
        finish(done)
    return answered, failed


def _writer(
    path: Path | None, as_json: bool, top: int
) -> tuple[Callable[["Prediction"], None], Callable[[bool], None]]:
    """What writes one prediction, and what ends the writing (True: all went well)."""
    if path is None:
        return (_print_json if as_json else _print_line), lambda done: None
    beside = path.with_name(f".{path.name}.writing")
    file = beside.open("w", newline="", encoding="utf-8")

    def finish(done: bool) -> None:
        file.close()
        if done:
            os.replace(beside, path)
        else:
            beside.unlink(missing_ok=True)

    return _csv_writer(file, top), finish


def _csv_writer(file: TextIO, top: int) -> Callable[["Prediction"], None]:
    import csv

    writer = csv.writer(file)
    ranks = [f"{kind}{k}" for k in range(1, top + 1) for kind in ("class", "probability")]
    writer.writerow(["path", *ranks, "error"])

    def write(p: "Prediction") -> None:
        cells = [cell for name, share in p.classes for cell in (name, f"{share:.6f}")]
        cells += [""] * (2 * top - len(cells))
        writer.writerow([p.path, *cells, p.error or ""])

    return write


def _print_json(p: "Prediction") -> None:
    if p.error is not None:
        answer: dict[str, Any] = {"path": p.path, "error": p.error}
    else:
        classes = [{"class": name, "probability": share} for name, share in p.classes]
        answer = {"path": p.path, "classes": classes}
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")


def _print_line(p: "Prediction") -> None:
    if p.error is None:
        told = "  ".join(f"{name} {share:.1%}" for name, share in p.classes)
        sys.stdout.write(f"{p.path}: {told}\n")
