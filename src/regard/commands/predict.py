"""`regard predict`: classes and probabilities of images."""

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.commands.flags import (
    DeviceFlag,
    EngineFlags,
    JsonFlag,
    TtaFlag,
    check_image_names,
    leading_networks,
    use_engine,
)
from regard.commands.predictions_csv import PredictionsCsv, check_output
from regard.commands.signals import Signaled, signals_raise
from regard.errors import UsageError
from regard.files import plural
from regard.log import info_on_stderr

if TYPE_CHECKING:
    from regard.predict import Classifier, Prediction

log: logging.Logger = logging.getLogger(__name__)

FEW = 512  # images; so many are predicted before an engine has started
PROGRESS_EVERY = 30.0  # seconds between progress messages, where predictions are not on a screen


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *images: Annotated[str, Parameter(name="IMAGES", allow_leading_hyphen=True)],
    top: int | None = None,
    device: DeviceFlag = "auto",
    tta: TtaFlag = None,
    engine: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # noqa: B008
    json: JsonFlag = False,
    csv: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    resume: Annotated[bool, Parameter(negative=())] = False,
    shard: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
) -> int:
    """Classify images with a trained network.

    Parameters
    ----------
    run
        A run's folder, such as runs/demo, or the name of weights that come with Regard
        (`regard models` shows them), such as ag_sononet8.
    images
        Image files and folders of images; - reads one image from standard input. Further runs
        before them make an ensemble: the mean of the networks' probabilities.
    top
        Number of classes to list for each image. Default: 5, and 1 with --csv.
    json
        Print one JSON object per line.
    csv
        Write a CSV file instead of printing: the most probable class, the decision at the run's
        threshold (`regard calibrate`), the distance from the training images and whether it is
        beyond that of 99 % of the validation images (unlike_training: a false alarm rate of 1 %),
        and the probability of each class, p_CLASS. Finished rows are kept if the command is
        stopped.
    overwrite
        Replace a CSV file that exists.
    resume
        Continue the CSV file of a command that was stopped; give the same images.
    shard
        I/N: only every N-th image, starting with the I-th, so that N machines share the images;
        each writes its own file.
    """
    share = None if shard is None else _share(shard)
    top = (5 if csv is None else 1) if top is None else top
    count = leading_networks(images)
    more, images = images[:count], images[count:]
    _check_arguments(images, top, json, csv, overwrite, resume)
    engine.require()
    if csv is not None:
        check_output(csv, images, run, overwrite=overwrite, resume=resume)
    from regard.ensemble import load_all
    from regard.models.io import network_folder
    from regard.trained_on import watch

    runs = [network_folder(name) for name in (str(run), *more)]
    classifier = load_all(runs, device, flips=tta == "flips")
    names = _prepared(classifier, engine, images, share)
    top = min(top, len(classifier.class_names))
    if classifier.calibration is not None:
        with info_on_stderr():
            log.info(f"{runs[0]}: {classifier.calibration.sentence()}")
    with info_on_stderr():
        if classifier.familiarity is not None and csv is not None:
            log.info(classifier.familiarity.sentence())
        if more and classifier.measures_distances and csv is not None:
            log.info("unlike_training: mean over networks of distance / threshold is above 1")
        if more:
            log.info(f"the mean of {len(runs)} networks: {', '.join(map(str, runs))}")
        if tta is not None:
            log.info("the mean of each image and its mirror image")
    with contextlib.ExitStack() as stack:
        write: Callable[[Prediction], None] = partial(_print_json, tta) if json else _print_line
        counts, repeated = _Counts(csv), 0
        if csv is not None:
            table = stack.enter_context(PredictionsCsv(csv, top, classifier, resume=resume))
            write = table.write
            counts.answered, counts.failed, names = table.skip_done(iter(names))
            repeated = table.repeated
        again, others = list(islice(names, repeated)), names
        for each in runs:
            others = watch(each, others, named=len(runs) > 1)  # earlier answers were counted then
        names = chain(again, others)
        code = _predict(classifier, names, top, write, counts, repeated)
    if counts.done == 0 and code == 0 and (share is None or next(_names(images), None) is None):
        raise UsageError(f"no image below {', '.join(images)}")
    return code


def _prepared(
    classifier: "Classifier",
    engine: EngineFlags,
    images: Sequence[str],
    share: tuple[int, int] | None = None,
) -> Iterable[str]:
    """The images' names, once the engine that was asked for is in place."""
    listed: Iterable[str] = _names(images)
    if share is not None:
        listed = islice(listed, share[0] - 1, None, share[1])
    if engine.is_eager:
        return listed
    if engine.is_open:  # a short job needs no list of all its files
        first = list(islice(listed, FEW))
        if len(first) < FEW:
            return first
        listed = chain(first, listed)
    from regard.data.paths import PathList

    names = PathList.of(listed)
    for member in classifier.members:
        reads = [lambda p=p, m=member: m.decode(p) for p in islice(names, 64) if p != "-"]
        use_engine(member, engine, reads, len(names))
    return names


def _share(text: str) -> tuple[int, int]:
    """I/N as two numbers.

    Raises:
        UsageError: it is not I/N with I from 1 to N.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {text}: give I/N with I from 1 to N, such as 1/8")
    return int(found[1]), int(found[2])


def _check_arguments(
    images: Sequence[str], top: int, json: bool, csv: Path | None, overwrite: bool, resume: bool
) -> None:
    if not images:
        raise UsageError("IMAGES: give image files or folders, or - for standard input")
    from regard.data.sources import KINDS, NAMES

    check_image_names(images)
    for name in images:
        if name.startswith("-") and name != "-" and not os.path.exists(name):
            raise UsageError(f"unknown option {name} (see `regard predict --help`)")
        if (name in NAMES or name.startswith(KINDS)) and not os.path.exists(name):
            raise UsageError(
                f"{name}: predict reads image files and folders; `regard evaluate RUN {name}` "
                "takes labeled data"
            )
    if top < 1:
        raise UsageError(f"--top {top}: at least 1")
    if json and csv is not None:
        raise UsageError("--json and --csv: give one of them")
    if (overwrite or resume) and csv is None:
        raise UsageError(f"{'--overwrite' if overwrite else '--resume'}: only with --csv")
    if overwrite and resume:
        raise UsageError("--overwrite and --resume: give one of them")


class _Counts:
    """How many images were answered and could not be read, with progress messages."""

    def __init__(self, csv: Path | None) -> None:
        self.csv, self.answered, self.failed = csv, 0, 0
        self._shown = csv is None and sys.stdout.isatty()  # the predictions show the progress
        self._started = self._said = time.monotonic()

    @property
    def done(self) -> int:
        return self.answered + self.failed

    def add(self, failed: bool) -> None:
        """Counts one image."""
        self.failed += failed
        self.answered += not failed
        now = time.monotonic()
        if now - self._said >= PROGRESS_EVERY and not self._shown:
            self._said = now
            # standard output may hold the predictions
            print(
                f"regard: {plural(self.done, 'image')} in {now - self._started:.0f} s",
                file=sys.stderr,
            )

    def stopped(self) -> str:
        """What is said when a signal ends the command."""
        images = plural(self.done, "image")
        if self.csv is None:
            return f"stopped after {images}"
        return (
            f"stopped after {images}, all in {self.csv}: continue with the same command and "
            "--resume"
        )


def _predict(
    classifier: "Classifier",
    names: Iterable[str],
    top: int,
    write: Callable[["Prediction"], None],
    counts: _Counts,
    repeated: int,
) -> int:
    """Writes all predictions but the first `repeated`, and returns the exit code."""
    try:
        with signals_raise() as signals:
            # what is printed may wait for its reader, which Ctrl-C must end
            row = contextlib.nullcontext if counts.csv is None else signals.whole
            found = classifier.predict_each(map(_source, names), top)
            for prediction in islice(found, repeated, None):
                if prediction.error is not None:
                    log.warning(prediction.error)
                with row():
                    write(prediction)
                    counts.add(prediction.error is not None)
    except Signaled as stopped:
        log.warning(counts.stopped())
        return 128 + stopped.number
    return 0 if counts.failed == 0 else 1 if counts.answered else 2


# ------------------------------------------------------------------------------ the images
def _names(images: Sequence[str]) -> Iterator[str]:
    """The files given and those below the folders given; "-" is standard input."""
    from regard.data.walk import images_below

    for name in images:
        if name == "-" or "://" in name:  # a URL, which no path may change
            yield name
        else:
            paths = map(str, images_below([Path(name)]))
            yield from (os.path.join(".", p) if p == "-" else p for p in paths)


class _StandardInput(io.BytesIO):
    name = "-"


def _source(name: str) -> Any:
    return _StandardInput(sys.stdin.buffer.read()) if name == "-" else name


# ------------------------------------------------------------------------------ the output
def _print_json(tta: str | None, p: "Prediction") -> None:
    if p.error is not None:
        answer: dict[str, Any] = {"path": p.path, "error": p.error}
    else:
        classes = [{"class": name, "probability": share} for name, share in p.classes]
        answer = {"path": p.path, "classes": classes}
        if p.decision is not None:
            answer["decision"] = p.decision
        if p.distance is not None:
            answer |= {"distance": p.distance, "unlike_training": p.unlike_training}
        if p.sd is not None:
            answer["classes"] = [{**c, "sd": p.sd[str(c["class"])]} for c in classes]
            answer["disagreement"] = p.disagreement
        if tta is not None:
            answer["tta"] = tta
    # ASCII: a class or file name may have letters that the reader's encoding lacks
    sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")


def _print_line(p: "Prediction") -> None:
    if p.error is None:
        classes = "  ".join(f"{name} {share:.1%}" for name, share in p.classes)
        decision = "" if p.decision is None else f"  decision: {p.decision}"
        unlike = "  (unlike the training images)" if p.unlike_training else ""
        sys.stdout.write(f"{p.path}: {classes}{decision}{unlike}\n")
