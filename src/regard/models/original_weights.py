"""Reads the authors' own checkpoints, in their own layouts, into Regard's networks.

There are three layouts, one per family. A few rules derive a tensor's name in its layout from its
name here, so that every depth, width and number of classes is covered:

residual attention  Caffe's LAYER/weight, and for BN LAYER/weight, bias, mean, var
                    (fwang91/residual-attention-network, imagenet_model/*.prototxt);
                    `var` is the variance: a caffemodel of theirs has b = 1 / sqrt(var + 1e-5)
                    as a BN's fourth blob (their Caffe's bn_layer.cpp), so 1 / b**2 - 1e-5
CBAM, ResNet        PyTorch names (Jongchan/attention-module, MODELS/model_resnet.py)
SonoNet             PyTorch names (ozan-oktay/Attention-Gated-Networks, models/networks/)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from regard.errors import CheckpointError
from regard.files import shortened
from regard.models.residual_attention import AttentionModule, PreActUnit, ResidualAttentionNet
from regard.models.sononet import AGSonoNet, SonoNet

Source = str | Path | Mapping[str, Any]


def load_authors_weights(model: nn.Module, source: Source) -> None:
    """Loads an authors' checkpoint into the network of Regard's that it belongs to.

    Args:
        model: one of Regard's networks, or a plain timm ResNet, in any precision, with the same
            classes, input channels and arguments as the checkpoint.
        source: a `.pth` (tensors by name, possibly under "state_dict" or with "module."; read with
            weights_only=True), an `.npz`, or a mapping of names to tensors or arrays.

    Raises:
        CheckpointError: the file can't be read, the network has no authors' layout, or tensors
            are missing, extra, or of another shape; the message names the first and counts the
            others. The model is then unchanged.
    """
    tensors = read_tensors(source)
    names = authors_names(model, tensors)
    target = model.state_dict()
    problems = []
    if prefix := _foreign_prefix(tensors, set(names.values())):
        raise CheckpointError(
            f"{_describe(source)}: every tensor's name begins with {prefix!r}, unlike the "
            "authors' names: remove this prefix"
        )
    if missing := sorted(theirs for theirs in names.values() if theirs not in tensors):
        problems.append(f"missing: {shortened(missing, 8)}")
    if extra := sorted(set(tensors) - set(names.values())):
        problems.append(f"extra: {shortened(extra, 8)}")
    found, misshaped = {}, []
    for ours, theirs in names.items():
        if theirs in tensors:
            tensor, shape = tensors[theirs], target[ours].shape
            # Caffe stores vectors and matrices with leading ones, as (1, C, 1, 1)
            if _no_ones(tensor.shape) == _no_ones(shape):
                found[ours] = tensor.reshape(shape)
            else:
                misshaped.append(
                    f"shape of {theirs}: {tuple(tensor.shape)}, the network's is {tuple(shape)}"
                )
    if misshaped:
        problems.append(shortened(misshaped, 4))
    if problems:
        raise CheckpointError("the checkpoint does not fit the network; " + "; ".join(problems))
    if broken := [names[ours] for ours, t in found.items() if not bool(t.isfinite().all())]:
        raise CheckpointError(
            f"{_describe(source)}: NaN or infinite weights in {shortened(broken, 5)}"
        )
    model.load_state_dict(found, strict=False)


def _foreign_prefix(tensors: Mapping[str, Any], wanted: set[str]) -> str:
    """The common prefix of all names, if the names without it are wanted."""
    if not tensors or wanted & set(tensors):
        return ""
    first = next(iter(tensors))
    parts = first.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        rest = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        if len(rest) == len(tensors) and wanted & set(rest):
            return prefix
    return ""


def _no_ones(shape: torch.Size) -> list[int]:
    return [n for n in shape if n != 1]


def read_tensors(source: Source) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without "module." and BN's batch counts.

    Raises:
        CheckpointError: the file can't be read, or holds anything but tensors.
    """
    content: Any = source
    if isinstance(source, str | Path):
        content = _read_file(Path(source))
    while isinstance(content, Mapping):  # {"model": {"state_dict": {...}}}
        inner = [content[key] for key in ("state_dict", "model") if key in content]
        if not inner or not isinstance(inner[0], Mapping):
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{_describe(source)}: not a mapping of names to tensors")
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.number):
            value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{_describe(source)}: {name!r} is not a tensor")
        if not str(name).endswith("num_batches_tracked"):
            tensors[str(name).removeprefix("module.")] = value
    return tensors


def _describe(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the mapping"


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader raises for a broken or foreign file
        raise CheckpointError(f"{path}: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    """Why a file is not a checkpoint, in one line without the reader's advice."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        return "the file is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (HTML), not a checkpoint: download the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint: fetch the file with `git lfs pull`"
    if start.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"BM")):
        return "an image, not a checkpoint (.pth, .pt, .npz or .safetensors)"
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {match[1]}; only tensors and plain values are read, for safety"
    if "Weights only load failed" in str(error) or start[:1] == b"\x80":
        return "a pickle of other objects; only tensors and plain values are read, for safety"
    if path.suffix == ".npz" and "pickle" in str(error).lower():
        return "it holds pickled objects; only arrays of numbers are read, for safety"
    return (
        f"can't be read as a checkpoint ({type(error).__name__}): it is damaged or another kind of "
        "file"
    )


def authors_names(model: nn.Module, tensors: Mapping[str, Any] = {}) -> dict[str, str]:
    """The authors' name of every tensor of `model`, by its name here.

    `tensors` shows which of two spellings a residual attention checkpoint uses.

    Raises:
        CheckpointError: the authors have no such network.
    """
    ours = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
    if isinstance(model, ResidualAttentionNet):
        rename = _residual_attention_rule(model, tensors)
    elif isinstance(model, AGSonoNet | SonoNet):
        rename = _sononet_rule(model)
    elif isinstance(model, ResNet):
        rename = _cbam_name
    else:
        raise CheckpointError(f"the authors have no checkpoint layout for {type(model).__name__}")
    return {name: rename(name) for name in ours}


# ---------------------------------------------------------------------------------- CBAM
def _cbam_name(name: str) -> str:
    name = name.replace(".se.channel.mlp.0.", ".cbam.ChannelGate.mlp.1.")
    name = name.replace(".se.channel.mlp.2.", ".cbam.ChannelGate.mlp.3.")
    return name.replace(".se.spatial.", ".cbam.SpatialGate.spatial.")


# ------------------------------------------------------------------------------- SonoNet
def _sononet_rule(model: SonoNet | AGSonoNet) -> Any:
    def rename(name: str) -> str:
        if found := re.fullmatch(r"block(\d)\.(\d+)\.(.+)", name):
            block, place, rest = found.groups()
            conv = int(place) + (block == "1")  # the other blocks begin with their pooling
            return f"conv{block}.conv{conv}.{rest}"
        if found := re.fullmatch(r"gate([34])\.map\.(.+)", name):
            return f"compatibility_score{int(found[1]) - 2}.{found[2]}"
        if found := re.fullmatch(r"heads\.(\d)\.(.+)", name):
            return f"classifier{int(found[1]) + 1}.{found[2]}"
        if isinstance(model, SonoNet):
            name = re.sub(r"^adapt\.", "conv5_p.cbr_unit.", name)
            name = re.sub(r"^classifier\.", "conv6_p.cb_unit.", name)
        return name

    return rename


# -------------------------------------------------------------------- residual attention
_BN = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _residual_attention_rule(model: ResidualAttentionNet, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(model.maxpool, nn.MaxPool2d):
        raise CheckpointError("the authors published no definition of the CIFAR networks")
    if not all(
        len(m.mask.down) for m in model.modules() if isinstance(m, AttentionModule) and m.mask
    ):
        raise CheckpointError("the authors published no definition of masks without pooling")
    if not any(isinstance(m, AttentionModule) and m.mask for m in model.modules()):
        raise CheckpointError("the authors published no definition of the trunk alone")
    preact = isinstance(model.layer1[0], PreActUnit)
    short = not preact
    if any("/mask/" in name for name in tensors):
        short = any("/mask/down/" in name for name in tensors)
    layers = _CaffeLayers(
        model, "down" if short else "down_sample", "up" if short else "up_sample"
    ).layers

    def rename(name: str) -> str:
        module, _, tensor = name.rpartition(".")
        layer = layers[module]
        is_bn = isinstance(model.get_submodule(module), nn.BatchNorm2d)
        return f"{layer}/{_BN[tensor] if is_bn else tensor}"

    return rename


class _CaffeLayers:
    """The Caffe layer of every convolution, BN and linear layer, by its name here.

    In the pre-activation networks, a BN between two units is named after the previous unit, so
    each unit receives the name of its input.
    """

    def __init__(self, model: ResidualAttentionNet, down: str, up: str) -> None:
        self.model, self.down, self.up = model, down, up
        self.layers: dict[str, str] = {"conv1": "conv1", "bn1": "conv1/bn", "fc": "classifier"}
        fed_by = "pool1_3x3_s2"
        for s in (1, 2, 3):
            fed_by = self._unit(f"layer{s}.0", f"pre_res_{s}", fed_by)
            stage = model.get_submodule(f"layer{s}")
            assert isinstance(stage, nn.Sequential)
            for n in range(1, len(stage)):
                there = f"Attention{'_ABC'[s]}_{n}"
                fed_by = self._module(stage[n], f"layer{s}.{n}", there, fed_by)
        for i in range(3):
            fed_by = self._unit(f"layer4.{i}", f"post_res_4_{i + 1}", fed_by)
        self.layers["norm"] = f"{fed_by}/bn"

    def _unit(self, ours: str, theirs: str, fed_by: str) -> str:
        preact = isinstance(self.model.get_submodule(ours), PreActUnit)
        convs = [f"{theirs}/branch1/conv{i}" for i in ("1_1x1", "2_3x3", "3_1x1")]
        for i, conv in enumerate(convs, start=1):
            self.layers[f"{ours}.conv{i}"] = conv
            if preact:  # bn i comes before convolution i
                bn = f"{fed_by}/bn" if i == 1 else f"{convs[i - 2]}/bn"
                self.layers[f"{ours}.bn{i}"] = bn
            else:
                self.layers[f"{ours}.bn{i}"] = f"{conv}/bn"
        shortcut = f"{theirs}/branch2/conv1_1x1"
        self.layers[f"{ours}.shortcut" if preact else f"{ours}.shortcut.0"] = shortcut
        self.layers[f"{ours}.shortcut.1"] = f"{shortcut}/bn"
        return theirs

    def _units(self, ours: str, names: list[str], fed_by: str) -> str:
        for i, name in enumerate(names):
            fed_by = self._unit(f"{ours}.{i}", name, fed_by)
        return fed_by

    def _module(self, module: Any, ours: str, theirs: str, fed_by: str) -> str:
        p, t = len(module.pre), len(module.trunk)
        names = [f"{theirs}/trunk/res{i + 1}" for i in range(p + t)]
        fed_by = self._units(f"{ours}.pre", names[:p], fed_by)
        self._units(f"{ours}.trunk", names[p:], fed_by)
        self._mask(module, f"{ours}.mask", f"{theirs}/mask")
        # units after (1 + M) * T have no name of their own, but the module's
        fed_by = f"{theirs}/fusion"
        for i in range(p):
            fed_by = self._unit(f"{ours}.post.{i}", theirs, fed_by)
        return fed_by

    def _mask(self, module: Any, ours: str, theirs: str) -> None:
        down, up = f"{theirs}/{self.down}", f"{theirs}/{self.up}"
        r, depth = len(module.mask.bottom), len(module.mask.down)
        for d in range(1, depth + 1):
            names = [f"{down}/res{d}_{i + 1}" for i in range(2 * r)]
            bottom = self._units(f"{ours}.down.{d - 1}", names[:r], f"{down}/pool{d}_3x3_s2")
        self._units(f"{ours}.bottom", names[r:], bottom)
        for i, d in enumerate(range(depth - 1, 0, -1)):
            self._unit(f"{ours}.skip.{i}", f"{theirs}/skip/res{d}", f"{down}/res{d}_{r}")
            names = [f"{up}/res{d}_{j + 1}" for j in range(r)]
            self._units(f"{ours}.up.{i}", names, f"{up}{d}")
        linear = [f"{theirs}/linear_{i}" for i in (1, 2)]
        tail = (
            [f"{up}/interp_1/bn", None, linear[0], f"{linear[0]}/bn", None, linear[1]]
            if isinstance(module.pre[0], PreActUnit)
            else [linear[0], f"{linear[0]}/bn", None, linear[1]]
        )
        self.layers |= {f"{ours}.tail.{i}": name for i, name in enumerate(tail) if name}


def arguments_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments that make the network `name` fit an authors' checkpoint.

    Classes, input channels, AG-SonoNet's aggregation, SonoNet's convolutions and a CIFAR stem are
    inferred from the tensors' names and shapes; other arguments are left out.
    """
    found: dict[str, Any] = {}

    def size(key: str, dim: int) -> int | None:
        return int(tensors[key].shape[dim]) if key in tensors else None

    if "sononet" in name:
        found["in_chans"] = size("conv1.conv1.0.weight", 1)
        last = ("classifier.weight", "classifier1.weight", "conv6_p.cb_unit.0.weight")
        found["num_classes"] = next((n for key in last if (n := size(key, 0))), None)
        convs = [
            sum(f"conv{b}.conv{i}.0.weight" in tensors for i in range(1, 9)) for b in range(1, 6)
        ]
        if min(convs) > 0 and convs != [3, 3, 3, 2, 2]:
            found["convs"] = convs
        if name.startswith("ag_"):
            joint, heads = size("classifier.weight", 1), size("classifier1.weight", 0)
            if heads is None:
                found["aggregation"] = "concat"
            elif joint is None:
                found["aggregation"] = "mean"
            else:
                found["aggregation"] = "ft" if joint == 3 * heads else "deep_sup"
    else:
        caffe = "conv1/weight" in tensors
        stem = "conv1/weight" if caffe else "conv1.weight"
        found["in_chans"] = size(stem, 1)
        classifier = tensors.get("classifier/weight" if caffe else "fc.weight")
        if classifier is not None and classifier.ndim >= 2:
            found["num_classes"] = int(classifier.shape[-2])
        if not caffe and size(stem, 2) == 3:
            found["stem"] = "cifar"
    return {key: value for key, value in found.items() if value is not None}


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing for a network, for its number of input channels.

    The configuration's mean and standard deviation are for the default number of channels; for
    other numbers their averages are used.
    """
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    channels = int(getattr(model, "in_chans", cfg["input_size"][0]))
    if channels != len(cfg["mean"]):
        for key in ("mean", "std"):
            cfg[key] = (float(np.mean(cfg[key])),) * channels
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    chosen = {key: cfg[key] for key in keys if key in cfg}
    return {**chosen, "input_size": (channels, *cfg["input_size"][1:])}


def authors_normalization(name: str) -> str:
    """How a network's authors standardize images: "fixed", or "image", each by its own statistics.

    SonoNet and AG-SonoNet subtract each image's mean and divide by its standard deviation, which
    timm's configuration can't express.
    """
    return "image" if name.startswith(("sononet", "ag_sononet")) else "fixed"
