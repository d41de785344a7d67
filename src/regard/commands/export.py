"""`regard export`."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

log = logging.getLogger(__name__)


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    to: str,
    out: Path,
    data: str | None = None,
    root: Path | None = None,
    maps: Annotated[bool, Parameter(negative=())] = False,
    int8: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Write a network as one file that runs without Regard.

    The file takes resized images in 0..255, any number at once, and gives probabilities; class
    names and how to resize are in its metadata. It is loaded again and compared on real images
    before it appears.

    Parameters
    ----------
    run
        The run's folder; any folder in timm's local-dir layout with --data.
    to
        onnx, openvino (FILE.xml with FILE.bin beside) or torch (.pt2, of torch.export).
    out
        The file: .onnx, .xml or .pt2.
    data
        Images to compare on, as for training; without: the run's own.
    root
        Where cifar10 and cifar100 are kept.
    maps
        The attention maps come out as well.
    int8
        8-bit weights and activations (onnx, openvino), calibrated on training images; what it
        costs on the validation images is counted.
    force
        Keep an 8-bit file that loses more than 1 point of the accuracy.
    overwrite
        Replace a file that is there already.
    """
    from regard.export import export as write

    write(
        run, to=to, out=out, data=data, root=root, maps=maps, int8=int8, force=force,
        overwrite=overwrite, echo=print,
    )  # fmt: skip
    return 0
