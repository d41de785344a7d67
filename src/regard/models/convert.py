"""An authors' checkpoint becomes a folder that timm loads."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regard.errors import UsageError
from regard.models import list_models
from regard.models.create import make
from regard.models.io import save_model
from regard.models.original_weights import (
    arguments_of,
    authors_normalization,
    load_authors_weights,
    read_tensors,
)


def convert(
    source: Path,
    *,
    model: str,
    out: Path,
    arguments: Mapping[str, Any],
    echo: Callable[[str], None],
) -> None:
    """Loads the checkpoint into the network and writes the folder, whole or not at all.

    Args:
        source: the authors' checkpoint.
        model: the network's name.
        out: a folder that does not exist yet, or is empty.
        arguments: of the network, above what the checkpoint tells.
        echo: is given the lines for the person.

    Raises:
        UsageError: the network is unknown, an argument is wrong, the folder is not new, or
            the checkpoint can't be read or does not fit.
        OSError: the folder can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already: give --out a new folder")
    make(model, {"num_classes": 0} if model in list_models() else {})  # an unknown name first
    tensors = read_tensors(source)
    found = {**arguments_of(model, tensors), **arguments}
    network = make(model, found)
    load_authors_weights(network, tensors)
    normalization = authors_normalization(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        save_model(network, scratch, extra={"regard": {"normalization": normalization}})
        scratch.chmod(0o755)
        scratch.replace(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    told = ", ".join(f"{key}={value}" for key, value in found.items())
    echo(f"{source} is {model} ({told}); {len(tensors)} tensors written to {out}")
    echo(f'timm.create_model("local-dir:{out}", pretrained=True) loads it')
    if normalization == "image":
        echo(
            "each image is standardized by its own mean and deviation: Regard reads that from "
            "config.json, but timm's own transforms can't, so with those do it yourself"
        )
