"""`regard convert`: an authors' checkpoint becomes a folder that timm loads."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import (
    parse_arguments,
)

log: logging.Logger = logging.getLogger(__name__)


def command(
    source: Annotated[Path, Parameter(name="SOURCE")],
    /,
    *,
    model: str,
    out: Path,
    arg: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    classes: Path | None = None,
) -> int:
    """Convert an authors' checkpoint into a folder that timm loads.

    Afterwards timm.create_model("local-dir:OUT", pretrained=True) returns the network.

    Parameters
    ----------
    source
        The authors' checkpoint: .pth, .npz or .safetensors. It is never unpickled.
    model
        Name of the network it belongs to, such as cbam_resnet50.
    out
        A new folder.
    arg
        Argument of the network as NAME=VALUE; several may follow. The number of classes, input
        channels and the aggregation are read from the checkpoint.
    classes
        File of the class names in the order of the network's outputs: one a line, or a JSON
        list. Default: the classes are numbered from 0.
    """
    from regard.models.convert import convert as run
    from regard.models.convert import read_class_names

    names = None if classes is None else read_class_names(classes)
    run(source, model=model, out=out, arguments=parse_arguments(arg or []), class_names=names)
    return 0
