"""`regard convert`: an authors' checkpoint becomes a folder that timm loads."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import (
    parse_arguments,
)

log = logging.getLogger(__name__)


def command(
    source: Path,
    *,
    model: str,
    out: Path,
    arg: Annotated[list[str] | None, Parameter(negative=())] = None,
) -> int:
    """Turn an authors' checkpoint into a folder that timm loads.

    Afterwards timm.create_model("local-dir:OUT", pretrained=True) is the network.

    Parameters
    ----------
    source
        The authors' checkpoint: .pth, .npz or .safetensors. Never unpickled.
    model
        The network of Regard's that it belongs to, such as cbam_resnet50.
    out
        A new folder.
    arg
        A further argument of the network as NAME=VALUE; may be repeated. Classes, input
        channels and the aggregation are seen from the checkpoint.
    """
    from regard.models.convert import convert as run

    run(source, model=model, out=out, arguments=parse_arguments(arg or []), echo=print)
    return 0
