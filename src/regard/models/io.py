"""A network as a folder that timm loads: config.json and model.safetensors.

`timm.create_model("local-dir:FOLDER", pretrained=True)` restores it with arguments and weights;
config.json also has the input that it expects and the class names.
"""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from regard.compat import save_config_for_hf
from regard.errors import FileError, UsageError
from regard.files import lacking, plural, reason, shortened
from regard.models.hub import FAMILIARITY, PREFIX, snapshot
from regard.weights import find_shipped, shipped

# affects how a network was made, not what it is: loading a folder must not fetch weights again
_NOT_SAVED = ("pretrained_plain",)
_ENTRIES = {"architecture": str, "num_classes": int, "model_args": dict, "pretrained_cfg": dict}


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Saves a network of Regard's or timm's as a folder in timm's `local-dir` layout.

    Args:
        model: made by create_model().
        folder: created if missing; each file is written under a temporary name and then renamed,
            so that no incomplete file ever has its final name.
        class_names: in the order of the classifier's outputs.
        data_config: timm's preprocessing: input_size (C, H, W), mean, std, interpolation,
            crop_pct, crop_mode.
        extra: further entries of config.json, which timm ignores.

    Returns:
        The folder.

    Raises:
        UsageError: the number of class names differs from that of classes, or the network is not
            what its name and arguments make, so that the folder could not be loaded.
        OSError: the folder can't be written.
    """
    count: Any = model.num_classes
    if class_names is not None and len(class_names) != count:
        raise UsageError(f"{plural(len(class_names), 'class name')} for {plural(count, 'class')}")
    check_loadable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = dict(extra or {})
    if class_names is not None:
        config["label_names"] = list(class_names)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        weights, path = Path(scratch, "model.safetensors"), Path(scratch, "config.json")
        try:
            _write_weights(model, weights)
        except SafetensorError as error:  # e.g. for a full disk; not an OSError there
            raise FileError(f"{folder}: its weights can't be written ({reason(error)})") from error
        with _described_as_it_is(model):
            save_config_for_hf(model, path, model_config=config, data_config=data_config)
        weights.chmod(path.stat().st_mode)  # save_file makes it readable by its owner only
        for name in ("model.safetensors", "config.json"):
            os.replace(Path(scratch, name), folder / name)
    return folder


def _write_weights(model: nn.Module, path: Path) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


@contextlib.contextmanager
def _described_as_it_is(model: nn.Module) -> Iterator[None]:
    """Within this context, timm's record of the arguments describes the network as it is now."""
    made_with: Any = getattr(model, "_model_args", None)
    try:
        model._model_args = arguments_now(model)  # type: ignore[assignment]
        yield
    finally:
        model._model_args = made_with


def arguments_now(model: nn.Module) -> dict[str, Any]:
    """create_model's arguments to rebuild the network, with its current number of classes."""
    made_with: Any = getattr(model, "_model_args", None) or {}
    kept = {k: v for k, v in made_with.items() if k not in _NOT_SAVED}
    return {**kept, "num_classes": model.num_classes}


def check_loadable(model: nn.Module) -> None:
    """Refuses, before writing, a network whose name and arguments make a different one.

    Raises:
        UsageError: they do; the message names the first tensors that differ.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if name is None or not timm.is_model(name):
        raise UsageError(f"{type(model).__name__} was not made by create_model(): it has no name")
    with _described_as_it_is(model):
        arguments = timm.models.get_model_args(model)  # as timm writes them
    for argument, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise UsageError(
                f"{argument}={value!r}: a folder keeps only numbers, words, lists and dicts as "
                f"arguments of {name}"
            ) from None
    with torch.device("meta"):
        made = timm.create_model(name, **arguments)
    own, others = model.state_dict(), made.state_dict()
    odd = sorted(
        key for key in own.keys() | others.keys()
        if key not in own or key not in others or own[key].shape != others[key].shape
    )  # fmt: skip
    if odd := odd or _of_another_kind(model, made):
        raise UsageError(
            f"this network no longer matches {name} with the arguments it was made with "
            f"({shortened(odd)} differ), so the folder could not be loaded again"
        )


def _of_another_kind(model: nn.Module, made: nn.Module) -> list[str]:
    """The modules of a network that are of another kind than those of the one that was made.

    Only leaves without weights, such as activations and poolings: tensors show the others. Another
    `global_pool`, of reset_classifier, and what flattens its map are stored beside the arguments.
    """

    def kinds(network: nn.Module) -> dict[str, type[nn.Module]]:
        return {
            name: type(m) for name, m in network.named_modules()
            if not {"global_pool", "flatten"} & set(name.split("."))
            and not any(True for _ in m.children()) and not any(True for _ in m.parameters())
        }  # fmt: skip

    own, others = kinds(model), kinds(made)
    return sorted(name for name in own.keys() & others.keys() if own[name] is not others[name])


def find_folder(name: str | Path) -> Path | None:
    """The folder of a network, given by its path or by the name of shipped or hub weights.

    Args:
        name: a folder, with or without timm's prefix `local-dir:`, or the name of shipped
            weights, such as "ag_sononet8.digits" (the tag may be left out), or
            `hf-hub:OWNER/NAME` for a repository of the Hugging Face hub.

    Returns:
        The folder; None if there is none.

    Raises:
        CheckpointError: shipped weights have been changed.
        FileError: a repository of the hub can't be loaded.
    """
    if str(name).startswith(PREFIX):
        return snapshot(str(name))
    path = Path(str(name).removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return path
    if (found := find_shipped(str(name))) is None:
        return None
    found.verify()
    return found.folder


def network_folder(name: str | Path) -> Path:
    """Like `find_folder`, but raises if there is none.

    Raises:
        UsageError: there is none.
        CheckpointError: shipped weights have been changed.
    """
    if (folder := find_folder(name)) is not None:
        return folder
    if timm.is_model(str(name)) and not os.path.exists(name):
        raise UsageError(
            f"no weights of {name} come with Regard, only {shortened(shipped(), 8)}; "
            "train it, or give a run's folder"
        )
    path = str(name).removeprefix("local-dir:")
    raise UsageError(lacking(path, "trained network (no config.json)", shipped()))


def load_model(folder: str | Path) -> tuple[Any, dict[str, Any]]:
    """The network in a folder with timm's `local-dir` layout, and its config.json.

    Args:
        folder: see `network_folder`.

    Raises:
        UsageError: the folder holds no network, or one that can't be loaded.
        CheckpointError: shipped weights have been changed.
    """
    folder = network_folder(folder)
    if not (folder / "config.json").is_file():
        hint = " yet: its training has not ended" if (folder / "run.json").is_file() else ""
        raise UsageError(f"{folder} holds no trained network{hint} (no config.json)")
    config = read_config(folder / "config.json")
    _check_has_weights(folder)
    try:
        with _float32_by_default():
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm raises almost anything for damaged files
        raise UsageError(f"{folder}: its network can't be loaded ({reason(error, 300)})") from error
    classes = config.get("num_classes", config.get("pretrained_cfg", {}).get("num_classes"))
    if classes is not None and classes != model.num_classes:  # timm then draws the last layer
        raise UsageError(
            f"{folder / 'config.json'}: num_classes is {classes}, but {model.num_classes} "
            "according to model_args"
        )
    names = config.get("label_names")
    if names is not None and len(names) != model.num_classes:
        raise UsageError(
            f"{folder / 'config.json'}: {len(names)} label_names for "
            f"{plural(model.num_classes, 'class')}"
        )
    return model, config


_ONE_AT_A_TIME = threading.Lock()  # torch's default dtype is global to the process


@contextlib.contextmanager
def _float32_by_default() -> Iterator[None]:
    """Within this context, networks are made in float32, as saved, whatever torch's default is."""
    with _ONE_AT_A_TIME:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _check_has_weights(folder: Path) -> None:
    """Refuses a folder without the network's weights: timm would load any other file of tensors.

    Raises:
        UsageError: there are no weights.
    """
    found = {p.suffix for p in folder.iterdir() if p.is_file() and p.name != FAMILIARITY}
    if not found & {".safetensors", ".bin", ".pth", ".pt", ".tar"}:
        raise UsageError(f"{folder} holds no trained network (no model.safetensors)")


def network_in(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """The network that a config.json describes: its name, arguments, and the inserted attention.

    The attention is "cbam", "se" or "none", as for `--graft`.
    """
    name, own = config.get("architecture"), config.get("model_args") or {}
    if name != "grafted":
        return name, own, "none"
    base = own.get("base_args") or {}
    return own.get("base"), {"in_chans": own.get("in_chans"), **base}, own.get("attention", "cbam")


def network_words(config: Mapping[str, Any]) -> str:
    """The network that a config.json describes, in words: "sononet8 + CBAM"."""
    name, _, inserted = network_in(config)
    return str(name) + (f" + {inserted.upper()}" if inserted != "none" else "")


def read_config(path: Path) -> dict[str, Any]:
    """config.json, checked against the format that `save_model` writes.

    Raises:
        UsageError: it can't be read, or an entry has the wrong type.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8 or not JSON
        raise UsageError(f"{path} can't be read ({reason(error)})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: a JSON object is expected, not {type(config).__name__}")
    for key, kind in _ENTRIES.items():
        if not isinstance(config.get(key, kind()), kind):
            raise UsageError(f"{path}: {key} is {config[key]!r}: {kind.__name__} expected")
    if "architecture" not in config:
        raise UsageError(f"{path} is damaged: it has no architecture")
    names = config.get("label_names")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise UsageError(f"{path}: label_names must be a list of strings")
    if not isinstance(config.get("regard", {}), dict):
        raise UsageError(f'{path}: "regard" must be a JSON object')
    return config
