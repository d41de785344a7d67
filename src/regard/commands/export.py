"""`regard export`: a network as one file."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, PrecisionFlag, require_data
from regard.errors import UsageError
from regard.extras import require


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    /,
    *,
    to: Literal["onnx", "openvino", "torch"],
    out: Path,
    data: str | None = None,
    root: Path | None = None,
    maps: Annotated[bool, Parameter(negative=())] = False,
    int8: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = "fp32",
) -> int:
    """Export a network as one file that runs without Regard.

    The file takes batches of resized images in 0..255 and returns probabilities; its metadata
    holds class names and preprocessing. It is compared with the network on real images before
    it is written. --precision bf16 is for --to torch, without --int8.

    Parameters
    ----------
    run
        A run's folder; or, with --data, any folder in timm's local-dir layout or the name of
        weights that come with Regard.
    to
        Format: onnx, openvino (FILE.xml and FILE.bin) or torch (.pt2 of torch.export).
    out
        Output file: .onnx, .xml or .pt2.
    data
        Images to compare on, as for training. Default: the run's own.
    root
        Folder of cifar10 and cifar100.
    maps
        Return the attention maps as well.
    int8
        Quantize weights and activations to 8 bits (onnx, openvino), calibrated on training images;
        the loss of accuracy is measured on the validation images.
    force
        With --int8: write the file even if it loses more than 1 point of accuracy.
    overwrite
        Replace an existing file.
    """
    if force and not int8:
        raise UsageError("--force: only with --int8")
    if to == "onnx":
        require("onnxruntime", "--to onnx")
    if to == "openvino":
        require("openvino", "--to openvino", "openvino", *(["nncf"] if int8 else []))
    require_data(data)
    from regard.export import export as write

    write(
        run, to=to, out=out, data=data, root=root, maps=maps, int8=int8, force=force,
        overwrite=overwrite, device=device, precision=precision,
    )  # fmt: skip
    return 0
