"""`regard convert`: an authors' checkpoint becomes a folder that timm loads."""

import difflib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from regard.models import create_model, list_models
from regard.models.authors import arguments_of, load_authors_weights, read_tensors
from regard.models.folder import save_model


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """create_model(), with errors for a person.

    Raises:
        ValueError: the network is unknown (the nearest names are told), or an argument is
            not one of its arguments or has a value that it does not take.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`regard models` lists them"
        raise ValueError(f"no network is called {name!r}; {hint}")
    try:
        return create_model(name, **arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = str(error).rpartition("__init__() ")[2]
        raise ValueError(f"{name} with {given}: {reason}") from error


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
        ValueError: the network is unknown, an argument is wrong, the folder is not new, or
            the checkpoint can't be read or does not fit.
        OSError: the folder can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give --out a new folder")
    make(model, {"num_classes": 0} if model in list_models() else {})  # an unknown name first
    tensors = read_tensors(source)
    found = {**arguments_of(model, tensors), **arguments}
    network = make(model, found)
    load_authors_weights(network, tensors)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        save_model(network, scratch)
        scratch.chmod(0o755)
        scratch.replace(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    told = ", ".join(f"{key}={value}" for key, value in found.items())
    echo(f"{source} is {model} ({told}); {len(tensors)} tensors written to {out}")
    echo(f'timm.create_model("local-dir:{out}", pretrained=True) loads it')
