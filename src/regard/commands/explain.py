"""`regard explain`: pictures, raw maps, a contact sheet, and scores of where a network looks."""

import logging
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from regard.errors import UsageError

log = logging.getLogger(__name__)


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    images: Annotated[list[Path], Parameter(negative=())],
    /,
    *,
    out: Path = Path("explained"),
    method: Annotated[list[str] | None, Parameter(negative=())] = None,
    target: str | None = None,
    reduce: str = "mean",
    layer: str | None = None,
    channels: Annotated[bool, Parameter(negative=())] = False,
    score: Annotated[bool, Parameter(negative=())] = False,
    masks: Path | None = None,
    baseline: str = "blur",
    seed: int = 0,
) -> int:
    """Show where a network looks, and measure how far that can be believed.

    Writes a picture and the raw maps (.npz) of each image, and a contact sheet of several.

    Parameters
    ----------
    run
        A run's folder, or any folder in timm's local-dir layout.
    images
        Image files and folders of images.
    out
        Output folder.
    method
        attention (the network's own maps) or gradcam; repeatable. Default: both.
    target
        Class that Grad-CAM explains. Default: the predicted class.
    reduce
        How the channels of a mask become one map: mean, max, or a channel's number.
    layer
        Layer for Grad-CAM. Default: the last feature map.
    channels
        Store every channel of the masks in the .npz.
    score
        Measure deletion and insertion against random maps, a center blob and Grad-CAM, and
        whether the maps depend on the weights.
    masks
        Annotated regions: a CSV file (path, x0, y0, x1, y1) or a folder of mask images.
    baseline
        What replaces deleted pixels: blur or mean.
    seed
        Random seed for random maps, random weights and the bootstrap.
    """
    from regard.explanations.explanation import METHODS
    from regard.explanations.faithfulness import Request
    from regard.explanations.writing import explain_images
    from regard.predict import load

    channel: Any = int(reduce) if reduce.isdecimal() else reduce
    methods = tuple(method or METHODS)
    ask = Request(
        out, methods, target, channel, layer, channels, score, masks, baseline, seed,
        complain=log.warning, echo=print,
    )  # fmt: skip
    done = explain_images(load(run), images, ask)
    if done == ask.failed == 0:
        raise UsageError(f"no image below {', '.join(map(str, images))}")
    return 0 if ask.failed == 0 else 1 if done else 2
