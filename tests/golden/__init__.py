"""Golden data: what the authors' own networks answer, and what ours answered before.

authors_tensors.json.gz  for ten networks, every tensor's name in the authors' own layout,
                         its shape, and the input's
authors_logits.npz       the outputs of the authors' own networks on weights and inputs
                         made by `fill`, computed in float64, kept in float32; and the
                         residual attention networks' soft masks, averaged over channels
variants.json            outputs of every network and ablation of Regard's, in float64,
                         written by scripts/make_golden.py
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent


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
