"""`regard explain`: figures, raw maps, a contact sheet, and scores of where a network looks."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from regard.commands.flags import (
    DeviceFlag,
    PrecisionFlag,
    SeedFlag,
    check_folder,
    check_image_names,
)
from regard.errors import UsageError
from regard.log import info_on_stderr

if TYPE_CHECKING:
    from regard.explanations.faithfulness import Faithfulness
    from regard.explanations.inputs import Source
    from regard.explanations.pointing import PointingScore
    from regard.explanations.writing import Outcome

log: logging.Logger = logging.getLogger(__name__)


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *images: Annotated[str, Parameter(name="IMAGES", allow_leading_hyphen=True)],
    out: Path = Path("explained"),
    method: Annotated[
        list[Literal["attention", "gradcam"]] | None,
        Parameter(negative=(), consume_multiple=True),
    ] = None,
    target: str | None = None,
    reduce: str | None = None,
    layer: str | None = None,
    channels: Annotated[bool, Parameter(negative=())] = False,
    score: Annotated[bool, Parameter(negative=())] = False,
    masks: Path | None = None,
    baseline: Literal["blur", "mean"] | None = None,
    seed: SeedFlag = 0,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = "fp32",
) -> int:
    """Show where a network looks, and how far that can be believed.

    Writes a figure and the raw maps of each image, and a contact sheet of several images. If the
    command was stopped, running it again continues where it left off.

    Parameters
    ----------
    run
        Folder of a run, or any folder in timm's local-dir layout, or the name of weights that
        come with Regard.
    images
        Image files, folders of images, or - for standard input.
    out
        Output folder.
    method
        attention (the network's own maps), gradcam, or both (default: both).
    target
        Class that Grad-CAM explains and --score follows (default: the predicted class).
    reduce
        How the channels of an attention mask become one map: mean, max or a channel number
        (default: mean).
    layer
        Layer of Grad-CAM (default: the last feature map).
    channels
        Store every channel of the attention masks in the .npz files.
    score
        Measure deletion and insertion against random maps and the image's center, and whether
        the maps depend on the weights and on the image.
    masks
        Masks to outline and to compare with: a CSV file (path, x0, y0, x1, y1 in pixels, and group
        for intervals over groups) or a folder of mask images.
    baseline
        Replacement of the pixels that --score deletes: blur or mean (default: blur).
    seed
        Random seed of the random maps, the random weights and the intervals.
    overwrite
        Replace files in the output folder that Regard did not write.
    """
    check_folder(out)
    from regard.explanations.explanation import METHODS
    from regard.explanations.writing import Options, Writer
    from regard.models.io import network_folder
    from regard.predict import load
    from regard.trained_on import watch

    methods = tuple(method or METHODS)
    _check_used(methods, layer, reduce, channels, baseline if not score else None)
    options = Options(
        target=target, methods=methods, reduce=_reduction(reduce or "mean"), layer=layer,
        keep_channels=channels, score=score, masks=masks, baseline=baseline or "blur", seed=seed,
        overwrite=overwrite, precision=precision,
    )  # fmt: skip
    run = network_folder(run)
    with _sources(images) as sources:
        classifier = load(run, device, precision=precision)
        if classifier.calibration is not None:
            with info_on_stderr():
                log.info(f"{run}: {classifier.calibration.sentence()}")
        outcome = Writer(classifier, sources, out, options).run()
        list(watch(run, [source.path for source in sources if source.path.is_file()]))
    if outcome.faithfulness is not None:
        _print_scores(outcome.faithfulness)
    if masks is not None:
        _print_pointing(outcome)
    if outcome.unreadable == 0 and not outcome.skipped_masks:
        return 0
    return 1 if outcome.explained else 2


def _check_used(
    methods: Sequence[str],
    layer: str | None,
    reduce: str | None,
    channels: bool,
    baseline: str | None,
) -> None:
    """Refuses what would change nothing: flags of another method, or a baseline without scores."""
    if baseline is not None:
        raise UsageError(f"--baseline {baseline}: only with --score")
    if layer is not None and "gradcam" not in methods:
        raise UsageError(f"--layer {layer}: only with --method gradcam")
    for flag, given in ((f"--reduce {reduce}", reduce is not None), ("--channels", channels)):
        if given and "attention" not in methods:
            raise UsageError(f"{flag}: only with --method attention")


def _reduction(text: str) -> Any:
    if text in ("mean", "max"):
        return text
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"--reduce {text}: choose mean, max or a channel number")
    return int(text)


@contextlib.contextmanager
def _sources(images: Sequence[str]) -> Iterator[list["Source"]]:
    """The images; standard input becomes a file for as long as the block runs."""
    from regard.explanations.inputs import Source, list_sources

    if not images:
        raise UsageError("IMAGES: give image files or folders, or - for standard input")
    check_image_names(images)
    for name in images:
        if name.startswith("-") and name != "-" and not os.path.exists(name):
            raise UsageError(f"unknown option {name} (see `regard explain --help`)")
    for name in images:
        if name != "-" and os.path.isfile(os.path.join(name, "config.json")):
            raise UsageError(
                f"{name} is a network's folder: explain shows one network; explain each into its "
                "own --out, or average their maps in Python with "
                "regard.Ensemble.load([RUN, RUN]).explain(image)"
            )
    files = [name for name in images if name != "-"]
    with tempfile.TemporaryDirectory(prefix="regard-") as folder:
        sources = list_sources(files) if files else []
        if len(files) < len(images):
            path = Path(folder, "stdin")
            path.write_bytes(sys.stdin.buffer.read())
            sources.append(Source(path, "stdin"))
        yield sources


def _print_scores(found: "Faithfulness") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from regard.explanations.faithfulness import interval

    table = Table(box=None, pad_edge=False, header_style="bold")
    headings = (
        "map",
        "deletion",
        "insertion",
        "insertion - deletion",
        "over random",
        "over center",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "map" else "right")
    for name, s in found.scores.items():
        cells = [s.deletion, s.insertion, s.difference, s.over_random, s.over_center]
        table.add_row(Text(name), *("" if e is None else interval(e) for e in cells))
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    print("Areas under the curves; low deletion and high insertion are good. The last two columns")
    ending = f"; in brackets 95 % intervals over {found.over}." if found.over else "."
    print(
        f"compare insertion - deletion with that of random maps and of a blob in the center{ending}"
    )
    for sentence in found.sentences():
        print(sentence)


def _print_pointing(outcome: "Outcome") -> None:
    from regard.files import plural, shortened

    for name, score in outcome.pointing.items():
        print(_pointing_line(name, score))
    skipped: dict[str, list[str]] = {}  # often many: only some images have masks
    for name, reason in outcome.skipped_masks.items():
        skipped.setdefault(reason, []).append(name)
    for reason, names in skipped.items():
        log.warning("%s: not compared with a mask (%s)", shortened(names), reason)
    if outcome.skipped_masks:
        log.warning("no usable mask: %s", plural(len(outcome.skipped_masks), "image"))


def _pointing_line(name: str, score: "PointingScore") -> str:
    from regard.explanations.faithfulness import interval
    from regard.files import plural

    groups = "" if score.groups is None else f" in {plural(score.groups, 'group')}"
    return (
        f"{name}: its maximum lies inside the mask in {interval(score.hits, 2)} of "
        f"{plural(score.images, 'image')}{groups}; {interval(score.energy, 2)} of its sum does, "
        f"where {score.chance:.2f} of what the network saw is marked; above half of its range it "
        f"overlaps the mask with IoU {interval(score.iou, 2)}, Dice {interval(score.dice, 2)}"
    )
