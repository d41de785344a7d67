"""The weights that a run starts from, decided once, when it is started.

With `pretrained="auto"`: timm's weights of the plain network, from the local cache or the hub;
else weights that come with Regard, where they fit; else random ones.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm

from regard.data.content import content_hashes
from regard.data.preprocess import Preprocess
from regard.data.table import ImageTable
from regard.errors import FileError, UsageError
from regard.files import plural
from regard.models._common import FREE_ARGUMENTS, GATE_ARGUMENTS, as_json
from regard.models.create import plain_source
from regard.models.hub import fetch_weights, has_weights
from regard.models.io import find_folder, network_in, read_config
from regard.models.original_weights import arguments_of, authors_normalization, read_tensors
from regard.run_data import known_start
from regard.trained_on import known_images
from regard.training.config import Recipe
from regard.training.plan import CIFAR_STEM_UP_TO, choose_stem
from regard.weights import Weights, find_shipped, shipped

log: logging.Logger = logging.getLogger(__name__)

_NEUTRAL = ("drop_rate", "drop_path_rate", "zero_init_last", "img_size", "global_pool", "in_chans")


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from.

    Attributes:
        pretrained: whether the network is made with pretrained weights.
        weights: a run's folder, an authors' checkpoint or shipped weights, or None.
        words: a description for people.
        channels: input channels of these weights; 0: there are none, or it is not known.
        normalization, mean, std: as these weights were trained with, for recipe.normalization
            "model"; None if not known, or if timm knows them.
    """

    pretrained: bool
    weights: str | None
    words: str
    channels: int = 0
    normalization: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def random(self) -> bool:
        """Whether no weights are loaded at all."""
        return not self.pretrained and self.weights is None

    def prepare(self, preprocess: Preprocess) -> Preprocess:
        """The preprocessing of the weights' training, if it has as many channels."""
        if self.normalization == "image":  # by each image's own mean and standard deviation
            return replace(preprocess, normalization="image")
        channels, mean, std = preprocess.input_size[0], self.mean, self.std
        if len(mean) == 1:  # gray weights: the values are repeated
            mean, std = mean * channels, std * channels
        if self.normalization is None or not len(mean) == len(std) == channels:
            return preprocess
        return replace(preprocess, normalization=self.normalization, mean=mean, std=std)


def choose_start(
    name: str,
    arguments: Mapping[str, Any],
    recipe: Recipe,
    height: int,
    table: ImageTable,
    weights: str | None = None,
    channels: int = 1,
) -> Start:
    """The weights that a new run starts from; with "auto" they are searched for.

    Args:
        name, arguments: the network.
        recipe: its `pretrained` is yes, no or auto.
        height: of the images, in pixels.
        table: the run's images, with their splits.
        weights: a run's folder or an authors' checkpoint to start from, or None.
        channels: of the images.

    Raises:
        UsageError: with "yes" there are no pretrained weights.
        FileError: with "yes" they can't be downloaded.
    """
    words = _pretrained(name) if recipe.pretrained == "yes" else ""
    if weights is not None:
        named = full_name(weights)
        whose = "Regard's own weights" if named in shipped() else "the weights of"
        start = Start(bool(words), named, f"{whose} {named}", channels=3 if words else 0)
        return _with_scale(start, named, name)
    if words:
        start = Start(True, None, words, channels=3)
        brought = None if plain_source(name) is not None else find_shipped(name)
        return start if brought is None else _with_scale(start, brought.name, name)
    if recipe.pretrained == "no":
        return Start(False, None, "random weights")
    reasons = []
    if (base := plain_source(name)) is not None:
        why = _unfit(name, arguments, height)
        if why is None:
            try:
                origin = fetch_weights(base)
                tag = timm.models.get_pretrained_cfg(base).tag
                return Start(True, None, f"timm's weights {base}.{tag}, from {origin}", channels=3)
            except FileError as error:
                why = str(error)
        reasons.append(f"timm's weights of {base}: {why}")
    for each in (w for w in shipped().values() if w.architecture == name and w.start):
        _, own = choose_stem(name, arguments, height, pretrained=False, weights=None)
        if (why := _unfit_shipped(each, own, height, table, channels, recipe.channels)) is None:
            start = Start(False, each.name, f"Regard's own weights {each.name}")
            return _with_scale(start, each.name, name)
        reasons.append(f"{each.name}: {why}")
    return Start(False, None, f"random weights ({'; '.join(reasons) or 'there are none to take'})")


def _with_scale(start: Start, weights: str, name: str) -> Start:
    """The start with its weights' normalization; `name` is the run's network."""
    config = _config_of(weights)
    if config is None:
        told = _authors_arguments(weights, name)
        scale = authors_normalization(name) if told else None
        return replace(start, channels=told.get("in_chans", 0), normalization=scale)
    cfg = config.get("pretrained_cfg", {})
    own = config.get("regard", {}).get("normalization", "fixed")
    mean, std = (tuple(cfg.get(name) or ()) for name in ("mean", "std"))
    start = replace(start, channels=_channels_of(config))
    return replace(start, normalization=own, mean=mean, std=std) if mean and std else start


def _channels_of(config: Mapping[str, Any]) -> int:
    """The input channels in the config.json of a folder's network; 0: not given."""
    size = config.get("pretrained_cfg", {}).get("input_size") or (0,)
    return int(config.get("model_args", {}).get("in_chans") or size[0])


def full_name(weights: str) -> str:
    """The weights' name in any later version: with the tag for those that come with Regard."""
    found = None if os.path.exists(weights) else find_shipped(weights)
    return weights if found is None else found.name


def _pretrained(name: str) -> str:
    """A description of a network's pretrained weights, which are then in the local cache.

    Raises:
        UsageError: there are none.
        FileError: they can't be downloaded.
    """
    if (base := plain_source(name)) is None:
        if (own := find_shipped(name)) is None:
            raise UsageError(f"pretrained=yes: there are no pretrained weights of {name}")
        return f"Regard's own weights {own.name}"
    words = f"timm's weights {base}.{timm.models.get_pretrained_cfg(base).tag}"
    if not has_weights(base):  # timm has them elsewhere, or in another form
        return words
    try:
        return f"{words}, from {fetch_weights(base)}"
    except FileError as error:
        raise FileError(f"pretrained=yes: {words} can't be had: {error}") from error


def network_of(weights: str | None, asked: str | None) -> tuple[str | None, dict[str, Any]]:
    """The name and arguments of the network that weights belong to.

    Args:
        weights: a run's folder, shipped weights or an authors' checkpoint; None: there are none.
        asked: the requested network; an authors' checkpoint does not name its own.
    """
    config = None if weights is None else _config_of(weights)
    if config is not None:
        name, own, _ = network_in(config)
    else:
        own = {} if weights is None or asked is None else _authors_arguments(weights, asked)
        name = asked if own else None
    return name, {k: v for k, v in own.items() if k not in FREE_ARGUMENTS}


def inserted_in(weights: str | None) -> str:
    """The attention inserted into the network of these weights, in `--graft`'s form."""
    config = None if weights is None else _config_of(weights)
    return "none" if config is None else network_in(config)[2]


def _config_of(weights: str) -> dict[str, Any] | None:
    """The config.json of weights; None: an authors' checkpoint, or no such file."""
    folder = find_folder(weights)
    path = None if folder is None else folder / "config.json"
    return read_config(path) if path is not None and path.is_file() else None


def _authors_arguments(path: str, name: str) -> dict[str, Any]:
    """The arguments of network `name` read from an authors' checkpoint; {} without such a file.

    Raises:
        CheckpointError: the file is not a checkpoint.
    """
    return arguments_of(name, read_tensors(path)) if Path(path).is_file() else {}


def _unfit(name: str, arguments: Mapping[str, Any], height: int) -> str | None:
    """Why timm's weights are not used, or None."""
    if height <= CIFAR_STEM_UP_TO:
        return f"they are for images larger than {CIFAR_STEM_UP_TO} pixels"
    neutral = {*_NEUTRAL, *GATE_ARGUMENTS}
    changed = [
        k for k, v in arguments.items() if k not in neutral and (k, v) != ("stem", "imagenet")
    ]
    return f"they do not fit {', '.join(changed)}" if changed else None


def seen_before(table: ImageTable, start: Start, name: str) -> str | None:
    """A warning if test images trained or validated the weights that a run starts from, or None.

    Args:
        table: images with their splits; without a test split, the validation images are checked.
        start: the run's start.
        name: the network.
    """
    brought = start.pretrained and plain_source(name) is None  # Regard's own
    weights = start.weights or (full_name(name) if brought else None)
    folder = None if weights is None else find_folder(weights)
    known = None if folder is None else known_images(folder)
    split = next((s for s in ("test", "val") if (table.splits == s).any()), None)
    if folder is None or known is None or split is None:
        return None
    table = table.select(table.splits == split)
    hashes = content_hashes(table)
    shared = known.overlap(hashes, table.groups)
    used = ("train", "val") if split == "test" else ("train",)
    seen = np.isin(shared.images, used) | shared.related(*used)
    if (earlier := known_start(folder)) is not None:
        seen |= np.isin(earlier.splits_of(hashes), used)
    count = int(seen.sum())
    if not count:
        return None
    return (
        f"{count:,} of {plural(len(table), f'{split} image')}, or others of their groups, trained "
        f"or validated {weights}, which this run starts from: its {split} scores are too good"
    )


def _unfit_shipped(
    found: Weights,
    arguments: Mapping[str, Any],
    height: int,
    table: ImageTable,
    channels: int,
    asked_channels: int | None,
) -> str | None:
    """Why shipped weights are not used, or None."""
    trained = {
        k: v for k, v in found.config.get("model_args", {}).items() if k not in FREE_ARGUMENTS
    }
    asked = {k: v for k, v in arguments.items() if k not in FREE_ARGUMENTS}
    if {k: as_json(v) for k, v in trained.items()} != {k: as_json(v) for k, v in asked.items()}:
        return "they are for other arguments"
    size = found.pretrained_cfg()["input_size"][1]
    if not size / 2 <= height <= 2 * size:
        return f"they are for images of {size} pixels"
    theirs = _channels_of(found.config)
    if theirs < channels if asked_channels is None else theirs != asked_channels:
        return f"they are for images of {plural(theirs, 'channel')}"
    known = known_images(found.folder)
    if known is not None and (known.splits_of(content_hashes(table)) != "").any():
        return "they were trained or tested with images of this data"
    return None
