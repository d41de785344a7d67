"""Converts an authors' checkpoint into a folder that timm loads."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regard.errors import UsageError
from regard.files import plural, reason
from regard.models import list_models
from regard.models.create import make
from regard.models.io import save_model
from regard.models.original_weights import (
    arguments_of,
    authors_normalization,
    data_config_of,
    load_authors_weights,
    read_tensors,
)

log: logging.Logger = logging.getLogger(__name__)


def read_class_names(path: Path) -> list[str]:
    """The class names in a file: one per line, or a JSON list, in the order of the outputs.

    Raises:
        UsageError: the file can't be read, or a name is empty, not text, or duplicated.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("[")
        names = json.loads(text) if is_json else [n.strip() for n in text.rstrip().split("\n")]
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({reason(error)})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: the class names are not UTF-8") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({reason(error)})") from error
    if not isinstance(names, list):
        raise UsageError(f"{path}: a JSON list of class names is expected")
    for place, name in enumerate(names, start=1):
        if not isinstance(name, str) or not name:
            raise UsageError(f"{path}: class {place} is {name!r}, not a name")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{path}: two classes are called {twice[0]!r}")
    return names


def convert(
    source: Path,
    *,
    model: str,
    out: Path,
    arguments: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Loads the checkpoint into the network and writes the folder completely or not at all.

    Args:
        source: the authors' checkpoint.
        model: the network's name.
        out: a folder that does not exist or is empty.
        arguments: arguments of the network; they override those inferred from the checkpoint.
        class_names: in the order of the classifier's outputs.

    Raises:
        UsageError: the network is unknown, an argument is wrong, the folder is not new, the
            checkpoint can't be read or does not fit, or a class has no name.
        OSError: the folder can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} already exists: out must be a new or empty folder")
    make(model, {"num_classes": 0} if model in list_models() else {})  # reports unknown names
    tensors = read_tensors(source)
    found = {**arguments_of(model, tensors), **arguments}
    network = make(model, found)
    load_authors_weights(network, tensors)
    count: Any = network.num_classes
    if class_names is not None and len(class_names) != count:
        raise UsageError(
            f"{plural(len(class_names), 'class name')} for a network of "
            f"{plural(count, 'class')}: {source}"
        )
    normalization = authors_normalization(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        extra = {"regard": {"normalization": normalization}}
        save_model(
            network, scratch, class_names=class_names, data_config=data_config_of(network),
            extra=extra,
        )  # fmt: skip
        scratch.chmod(0o755)
        scratch.replace(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    told = ", ".join(f"{key}={value}" for key, value in found.items())
    log.info(f"{source} is {model} ({told}); {len(tensors)} tensors written to {out}")
    log.info(f'timm.create_model("local-dir:{out}", pretrained=True) loads it')
    if normalization == "image":
        log.info(
            "each image is standardized by its own mean and deviation: Regard reads that from "
            "config.json, but timm's own transforms don't: standardize images for them yourself"
        )
