"""Golden data: what the authors' own networks answer, and what ours answered before.

authors_tensors.json.gz  for ten networks, every tensor's name in the authors' own layout,
                         its shape, and the input's
authors_logits.npz       the outputs of the authors' own networks on weights and inputs
                         made by `fill`, computed in float64, kept in float32; and the
                         residual attention networks' soft masks, averaged over channels
variants.json            outputs of every network and ablation of Regard's, in float64,
                         written by scripts/make_golden.py
"""

import functools
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import regard

FOLDER = Path(__file__).parent
VARIANTS = FOLDER / "variants.json"

# one value of each argument at a time; the defaults are the networks themselves
_ABLATIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "attention56_cifar": {
        "attention": ("naive",),
        "mask_activation": ("channel", "spatial"),
        "mask": ("local",),
        "p": (2,),
        "t": (1,),
        "r": (2,),
        "unit": ("resnext",),
        "in_chans": (1,),
    },
    "cbam_resnet18": {
        "channel_pool": ("avg", "max"),
        "spatial_pool": ("conv",),
        "kernel_size": (3,),
        "order": ("spatial_channel", "parallel", "channel", "spatial"),
        "reduction": (4,),
        "stem": ("cifar",),
        "in_chans": (1,),
    },
    "sononet8": {"convs": ((2, 2, 3, 3, 3),)},
    "ag_sononet8": {
        "aggregation": ("concat", "deep_sup", "ft"),
        "normalize": ("softmax", "sigmoid", "mean", "range"),
        "in_chans": (3,),
    },
}


def fill(name: str, shape: tuple[int, ...] | list[int]) -> np.ndarray:
    """The array for the tensor `name` of `shape`: float32, the same on every machine."""
    rng = np.random.RandomState(zlib.crc32(name.encode()) % 2**32)
    last = name.replace("/", ".").split(".")[-1]
    if name == "input":
        values = rng.standard_normal(shape)
    elif last in ("running_var", "var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif last in ("running_mean", "mean", "bias"):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def authors_networks() -> dict[str, Any]:
    """By name: `input` shape, number of `outputs`, and `tensors` as [name, shape] pairs."""
    return json.loads(gzip.decompress((FOLDER / "authors_tensors.json.gz").read_bytes()))


def authors_outputs() -> Any:
    """NAME/0, NAME/1, ...: an array an output; NAME/map/LAYER: a soft mask."""
    return np.load(FOLDER / "authors_logits.npz")


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """By label: a network's name and arguments; every network, then every ablation.

    Twins stand side by side, as they share most of their tensors (see `_filled`).
    """
    names = sorted(regard.list_models(), key=lambda n: re.sub("^(cbam|se|plain)_", "", n))
    labeled: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in names}
    for name, arguments in _ABLATIONS.items():
        for argument, values in arguments.items():
            for value in values:
                labeled[f"{name}({argument}={value})"] = (name, {argument: value})
    return labeled


@functools.lru_cache(maxsize=1000)
def _filled(name: str, shape: tuple[int, ...]) -> Tensor:
    counter = name.endswith("num_batches_tracked")
    return torch.tensor(0) if counter else torch.from_numpy(fill(name, shape))


def filled_model(name: str, **arguments: Any) -> Any:
    """A network in evaluation mode, in float64, whose every tensor is made by `fill`."""
    with torch.device("meta"):
        model = regard.create_model(name, **arguments)
    tensors = {n: _filled(n, tuple(t.shape)) for n, t in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    return model.double().eval()


@torch.no_grad()
def variant_outputs(name: str, arguments: dict[str, Any]) -> np.ndarray:
    """The logits of 4 classes for one image, (1, 4); with heads, (1 + heads, 4).

    The image is 48x64 pixels, and 24x32 for the networks for CIFAR. The first row is the
    prediction; the others are what training sees, with evaluation's running statistics.
    """
    model = filled_model(name, num_classes=4, **arguments)
    size = (24, 32) if name.endswith("_cifar") or arguments.get("stem") == "cifar" else (48, 64)
    x = torch.from_numpy(fill("input", (1, model.in_chans, *size))).double()
    rows = [model(x)]
    if name.startswith("ag_"):
        for module in model.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        heads = model(x)
        rows += list(heads.unbind(dim=1)) if heads.ndim == 3 else []
    return torch.cat(rows).numpy()


def golden_variants() -> dict[str, np.ndarray]:
    """What scripts/make_golden.py wrote: by label, rows as of `variant_outputs`."""
    return {k: np.array(v) for k, v in json.loads(VARIANTS.read_text("utf-8")).items()}


def relative_error(ours: np.ndarray, wanted: np.ndarray) -> float:
    """The norm of the difference over the norm of `wanted`; infinite if shapes differ."""
    if ours.shape != wanted.shape:
        return float("inf")
    return float(np.linalg.norm(ours - wanted) / np.linalg.norm(wanted))
