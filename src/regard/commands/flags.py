"""Flags and small services that several commands share."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from regard.errors import UsageError
from regard.extras import require
from regard.log import Heartbeat, info_on_stderr

log: logging.Logger = logging.getLogger(__name__)


def require_data(source: str | None) -> None:
    """Refuses data whose package is not installed, before anything slow is imported.

    Raises:
        UsageError: names the command that installs it.
    """
    if source is not None and source.startswith("hf:"):
        require("hf", source)


DeviceFlag = Annotated[
    Literal["auto", "cpu", "cuda", "mps", "xpu"],
    Parameter(
        help="Device that the network runs on; auto is $REGARD_DEVICE, else this machine's "
        "accelerator, else the CPU. cuda is an NVIDIA or AMD GPU."
    ),
]


PrecisionFlag = Annotated[
    Literal["fp32", "bf16"],
    Parameter(
        help="Precision that the network computes in; in bf16 probabilities are within 0.05 of "
        "those in fp32."
    ),
]


SizeFlag = Annotated[
    tuple[int, ...] | None,
    Parameter(
        help="Input size in pixels: one number, or height and width. Default: the network's.",
        consume_multiple=True,
        negative_iterable=(),
        validator=Number(gte=4, lte=8192),
    ),
]


JsonFlag = Annotated[bool, Parameter(negative=())]


SeedFlag = Annotated[int, Parameter(validator=Number(gte=0, lte=2**31))]
"""A random seed, in the range that recipes have."""


def height_and_width(size: Sequence[int] | None) -> tuple[int, int] | None:
    """A --size as two numbers.

    Raises:
        UsageError: it is more than two.
    """
    if size is None:
        return None
    if len(size) > 2:
        given = " ".join(map(str, size))
        raise UsageError(f"--size {given}: give one number, or height and width")
    return size[0], size[-1]


@dataclass(frozen=True)
class EngineFlags:
    """How a network is run: the flags that evaluate, predict and serve share."""

    engine: Annotated[
        Literal["eager", "compiled", "onnxruntime", "openvino", "auto"] | None,
        Parameter(
            help="Engine that runs the network; auto benchmarks the installed ones, once per "
            "network and machine, and uses the fastest whose answers agree with eager's. Default: "
            "the network itself (eager); the fastest in fp32, which is logged, for jobs that take "
            "minutes, and for serve if an earlier benchmark knows it. eager gives bit-identical "
            "results each time."
        ),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Parameter(
            help="Precision; auto is bf16 with compiled and openvino where the hardware supports "
            "it, fp32 with eager and onnxruntime, and fp32 where no engine is given."
        ),
    ] = "auto"

    def require(self) -> None:
        """Refuses an engine that is not installed, before anything slow is imported.

        Raises:
            UsageError: names the command that installs it.
        """
        if self.engine == "onnxruntime":
            require("onnxruntime", "--engine onnxruntime")
        elif self.engine == "openvino":
            require("openvino", "--engine openvino", "openvino")

    @property
    def is_eager(self) -> bool:
        """Whether the network itself is asked for, operator by operator in fp32."""
        return self.engine == "eager" and self.precision != "bf16"

    @property
    def is_open(self) -> bool:
        """Whether the length of the job may choose."""
        return self.engine is None and self.precision != "bf16"


def use_engine(
    classifier: Any,
    use: EngineFlags,
    reads: Sequence[Callable[[], Any]],
    count: int | None,
    sizes: tuple[int, ...] = (32,),
) -> None:
    """Gives a classifier the engine that was asked for; the plain network is one already.

    Args:
        classifier: from `regard.load`.
        use: what was asked for.
        reads: of some images, on which engines are compared.
        count: of all images; None: not known.
        sizes: of batches, the last one is measured.
    """
    from regard.engines import open_engine, open_if_it_pays, probe_images
    from regard.machine import keep_freed_memory

    keep_freed_memory()
    if use.is_eager:
        return
    with info_on_stderr():
        if use.is_open:
            classifier.engine = open_if_it_pays(
                classifier, sizes=sizes, images=lambda: probe_images(reads), count=count
            )
            return
        classifier.engine = open_engine(
            classifier, use.engine or "eager", precision=use.precision, sizes=sizes,
            images=probe_images(reads), count=count,
        )  # fmt: skip


def check_image_names(images: Sequence[str]) -> None:
    """Refuses names that can't be those of images.

    Raises:
        UsageError: an empty one, standard input twice, or closed standard input.
    """
    if "" in images:  # an unset variable in quotes; as a path it would be the current folder
        raise UsageError("IMAGES: '' is not a file name")
    if images.count("-") > 1:
        raise UsageError("-: standard input is read as one image; give - once")
    if "-" in images and sys.stdin is None:
        raise UsageError("-: standard input is closed")


def check_folder(out: Path | None) -> None:
    """Refuses a file as the folder to write to, before any work.

    Raises:
        UsageError: it is a file, or lies in one.
    """
    for path in (out, *out.parents) if out is not None else ():
        if path.is_file():
            raise UsageError(f"--out {out}: {path} is a file; give a folder")


def check_page(path: Path) -> None:
    """Refuses a page that can't be written, or that would replace something else, at once.

    Raises:
        UsageError: the path is a folder or lies in none, or the file there is no HTML page.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        kind = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"--html {path}: {kind}")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(15).lower() != b"<!doctype html>":
                raise UsageError(f"--html {path}: is not an HTML page; it is not replaced")


def leading_networks(names: Sequence[str]) -> int:
    """How many of the names, from the first on, are networks: folders, or names of weights."""
    from regard.weights import find_shipped

    def is_network(name: str) -> bool:
        if name.startswith(("local-dir:", "hf-hub:")):
            return True
        if os.path.exists(name):
            return os.path.isfile(os.path.join(name, "config.json"))
        return find_shipped(name) is not None

    return next((k for k, name in enumerate(names) if not is_network(name)), len(names))


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments; values are Python literals or plain words.

    Raises:
        UsageError: a pair is not NAME=VALUE.
    """
    import ast

    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--arg {pair}: give NAME=VALUE, such as aggregation=concat")
        found[name] = value
        if re.search(r"\d_\d", re.sub(r"'[^']*'|\"[^\"]*\"", "", value)):  # 1_6: no number
            continue
        with contextlib.suppress(ValueError, SyntaxError):  # a word, as `concat`
            found[name] = ast.literal_eval(value)
    return found


TtaFlag = Annotated[
    Literal["flips"] | None,
    Parameter(
        help="Test-time augmentation: the mean of the probabilities of each image and its mirror "
        "image. Default: off."
    ),
]


SplitsFlag = Annotated[
    Literal["auto", "yes", "no"],
    Parameter(
        help="Whether the top folders of DATA are splits (train, val, test) rather than classes. "
        "auto ends with an error where both are possible."
    ),
]


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, called with (done, total); without a terminal a line every half minute."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Heartbeat(title, level=logging.WARNING)  # on stderr: stdout is for results
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
