"""Creates a network by name: arguments, input size, initial weights."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from regard.attention import attention_kinds
from regard.errors import FileError, RegardError, UsageError, is_out_of_memory
from regard.files import plural, reason, shortened
from regard.models import create_model, list_models
from regard.models._common import FREE_ARGUMENTS
from regard.models.arguments import arguments as known_arguments
from regard.models.cbam import CBAM, SE
from regard.models.graft import graft as insert
from regard.models.hub import cached_weights
from regard.models.initialization import preserved_rng_state
from regard.models.io import (
    arguments_now,
    check_loadable,
    find_folder,
    load_model,
    network_in,
    network_words,
)
from regard.models.original_weights import arguments_of, load_authors_weights, read_tensors
from regard.models.zoo import twins_of

log: logging.Logger = logging.getLogger(__name__)


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """create_model() with readable errors.

    Raises:
        UsageError: the network is unknown (the message names the nearest ones), or an argument
            does not exist or has an invalid value.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`regard models` lists them"
        raise UsageError(f"no network is called {name!r}; {hint}")
    _check_rates(arguments)
    try:
        return create_model(name, **arguments)
    except Exception as error:  # each network refuses an argument in its own way
        if isinstance(error, RegardError) or is_out_of_memory(error):
            raise
        loads = any(k.startswith("pretrained") and v for k, v in arguments.items())
        asked = set(arguments) - {"num_classes", "in_chans"} or arguments.get("in_chans", 1) < 1
        if not isinstance(error, TypeError) and (loads or not asked):  # the weights, or our fault
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        fault = _of_other_types(name, arguments) if isinstance(error, TypeError) else ""
        fault = fault or reason(error).rpartition("__init__() ")[2]
        raise UsageError(f"{name} with {given}: {fault}") from error


def _of_other_types(name: str, given: Mapping[str, Any]) -> str:
    """What the given arguments have to be, for Python's "'<' not supported"; "" if not known."""
    kinds = {each.name: each.choices for each in known_arguments(name)}
    asked = given.keys() - {"num_classes", "in_chans"}
    if not asked <= kinds.keys():  # perhaps there is no such argument
        return ""
    expected = [f"{k}: {kinds[k]}" for k in given if isinstance(kinds.get(k), str)]
    return f"give {'; '.join(expected)}" if expected else ""


def _check_rates(arguments: Mapping[str, Any]) -> None:
    """Refuses rates that a network would only refuse with an image, or not at all.

    Raises:
        UsageError: a rate of dropout is not a number from 0 to 1.
    """
    for name in ("drop_rate", "drop_path_rate", "drop_block_rate"):
        rate = arguments.get(name, 0.0)
        if rate is None and name != "drop_rate":
            continue
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not number or not 0 <= rate <= 1:
            raise UsageError(f"{name}={rate!r}: give a number from 0 to 1")


def classifier_modules(model: nn.Module) -> list[str]:
    """The names of a network's classifiers: timm's, two for distilled networks."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    parts = found if isinstance(found, tuple | list) else (found,)
    names = [n for n, module in model.named_modules() if any(module is part for part in parts)]
    # AG-SonoNet's joint and separate classifiers are both heads
    return [*names, "heads", "classifier"]


def _outline(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network without weights, which takes no time; raises the same errors as `make`."""
    with torch.device("meta"):
        return make(name, {**(arguments or {}), "num_classes": 2})


def make_model(
    name: str,
    arguments: Mapping[str, Any],
    classes: int,
    input_size: tuple[int, int, int],
    pretrained: bool,
    weights: str | None,
    class_names: Sequence[str] | None = None,
    graft: str = "none",
) -> nn.Module:
    """The network with its own initialization, timm's pretrained weights, or a run's.

    Args:
        name: name of the network.
        arguments: arguments of the network.
        classes: number of classes.
        input_size: (C, H, W).
        pretrained: start from timm's pretrained weights, of the plain network if there is one.
        weights: a run's folder, shipped weights or an authors' checkpoint to start from.
        class_names: names of the classes, for a folder with other classes.
        graft: "se" or "cbam": the attention to insert into the network with these weights.

    Raises:
        UsageError: an argument is wrong, the images are too small, the weights don't fit, or no
            attention can be inserted.
        OSError: pretrained weights can't be reached.
    """
    asked = {**arguments, "num_classes": classes, "in_chans": input_size[0]}
    takes_plain = timm.is_model(name) and _has_plain(name)
    if pretrained:
        asked["pretrained_plain" if takes_plain else "pretrained"] = True
        if not takes_plain and (file := cached_weights(name)) is not None:
            asked["pretrained_cfg_overlay"] = {"file": str(file)}  # the hub need not be asked
    try:
        model = make(name, asked)
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise
        raise FileError(
            f"pretrained weights of {name} can't be loaded ({reason(error)})"
        ) from error
    _check_storable(model, name)
    check_size(model, name, input_size)
    source = None if weights is None else find_folder(weights) or Path(weights)
    gated = graft != "none" and source is not None and source.is_dir() and _has_gates(source)
    if gated:  # weights of a network into which attention was inserted earlier
        model = _grafted(model, graft)
    if source is not None:
        load_weights(model, source, class_names)
    return model if gated or graft == "none" else _grafted(model, graft)


def _check_storable(model: nn.Module, name: str) -> None:
    """Refuses a network that could be trained, but not be loaded from its folder afterwards.

    Raises:
        UsageError: a function that a user registered makes it without timm's description, or an
            argument is an object that no file holds.
    """
    needed = ("pretrained_cfg", "num_classes", "num_features")
    if lacks := [each for each in needed if getattr(model, each, None) is None]:
        raise UsageError(
            f"{name} could not be stored: it has no {', '.join(lacks)} (timm's "
            "build_model_with_cfg sets pretrained_cfg; the network itself the others)"
        )
    check_loadable(model)


def _has_gates(folder: Path) -> bool:
    return bool(attention_kinds(load_model(folder)[0]))


def _grafted(model: nn.Module, attention: str) -> nn.Module:
    """The network with "se" or "cbam" inserted; later random draws are not affected.

    Raises:
        UsageError: it can't be inserted, or the network could not be saved after its training.
    """
    with preserved_rng_state():
        grafted: nn.Module = insert(model, SE if attention == "se" else CBAM)
        check_loadable(grafted)
    return grafted


def check_size(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Tries an image of zeros before anything is written.

    Raises:
        UsageError: the network can't take images of this size.
    """
    least = getattr(model, "min_size", 1)
    if min(input_size[1:]) < least:
        raise UsageError(
            f"{name} needs images of at least {least}x{least}: choose size {least} or more"
        )
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        height, width = input_size[1:]
        told = (
            f"{name} can't take images of {height}x{width} ({reason(error)}): choose another size"
        )
        raise UsageError(told) from error
    finally:
        model.train(training)


def plain_source(name: str) -> str | None:
    """timm's network whose pretrained weights `name` starts from; None if there is none.

    >>> plain_source("cbam_resnet50"), plain_source("resnet18"), plain_source("attention56")
    ('resnet50', 'resnet18', None)
    """
    if not timm.is_model(name):
        return None
    if _has_plain(name):
        return twins_of(name)["plain"].removeprefix("plain_")
    ours = name.partition(".")[0] in list_models()
    return name if timm.is_model_pretrained(name) and not ours else None


def _has_plain(name: str) -> bool:
    """Whether a network of Regard's can start from timm's weights for its plain twin."""
    family = twins_of(name)
    base = family.get("plain", "").removeprefix("plain_")
    return "cbam" in family and name in family.values() and timm.is_model_pretrained(base)


def load_weights(model: nn.Module, source: Path, classes: Sequence[str] | None = None) -> None:
    """Starts from a run's folder, with any classes, or from an authors' checkpoint.

    Args:
        model: receives the weights.
        source: the folder or the checkpoint.
        classes: names of the model's classes. If the folder has other classes, the classifier's
            rows are copied by name; rows of new classes, and tensors of the classifier that do not
            fit, stay as initialized. This is logged. A checkpoint has no class names: its
            classifier is used if the shapes match.

    Raises:
        UsageError: the source can't be read, or more than the classifier does not fit.
    """
    trained, config = load_model(source) if source.is_dir() else _load_authors(model, source)
    found, own = trained.state_dict(), model.state_dict()
    heads = tuple(f"{m}." for m in (*classifier_modules(model), *classifier_modules(trained)))
    before = config.get("label_names")
    if classes is not None and before and list(classes) != list(before):
        names = [k for k in found if k in own and k.startswith(heads)]
        joint = getattr(model, "aggregation", "") == "ft"  # its inputs are the heads' classes
        by_name = {
            k: _rows_by_name(own[k], found[k], classes, before, joint and k == "classifier.weight")
            for k in names
        }
        found |= {k: v for k, v in by_name.items() if v is not None}
        shared = [c for c in classes if c in before]
        log.info(
            f"{source} has other classes: the classifier starts from its weights for "
            f"{len(shared)} of {len(classes)} classes"
            + (f" ({', '.join(shared[:5])}{', ...' * (len(shared) > 5)})" if shared else "")
        )
    fitting = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
    strange = {k: "the network has no" for k in found if k not in own}
    strange |= {k: "it lacks" if k not in found else "another shape of" for k in own}
    wrong = [f"{strange[k]} {k}" for k in strange if k not in fitting and not k.startswith(heads)]
    if wrong:
        raise UsageError(f"{source} does not fit: {_described(config)} {shortened(wrong, 3)}")
    model.load_state_dict(fitting, strict=False)
    if "label_names" not in config and (new := [k for k in own if k not in fitting]):
        log.info(f"{source} has a different classifier: {shortened(new, 3)} start at random")


def _load_authors(model: nn.Module, source: Path) -> tuple[nn.Module, dict[str, Any]]:
    """An authors' checkpoint as its network, and the content of a config.json for it."""
    tensors = read_tensors(source)
    cfg: Any = model.pretrained_cfg
    name = cfg["architecture"]
    arguments = {**arguments_now(model), **arguments_of(name, tensors)}
    with preserved_rng_state():
        trained = make(name, arguments)
    load_authors_weights(trained, tensors)
    return trained, {"architecture": name, "model_args": arguments}


def _described(config: Mapping[str, Any]) -> str:
    """A folder's network in words: its name, its channels and its other arguments."""
    arguments = network_in(config)[1]
    own = {k: v for k, v in arguments.items() if k not in FREE_ARGUMENTS}
    channels = arguments.get("in_chans")
    words = f"it is {network_words(config)}"
    words += "" if channels is None else f" for images of {plural(channels, 'channel')}"
    given = ", ".join(f"{key}={value!r}" for key, value in own.items())
    return words + (f" with {given};" if given else ";")


def _rows_by_name(
    own: torch.Tensor,
    found: torch.Tensor,
    classes: Sequence[str],
    before: Sequence[str],
    joint: bool = False,
) -> torch.Tensor | None:
    """A tensor of the classifier, with the rows of the shared classes copied.

    Args:
        own, found: (classes, ...) of this network, and of the loaded one.
        classes, before: names of their rows.
        joint: whether the columns are classes too, as (classes, heads * classes).

    Returns:
        The tensor, or None if the tensors have no row per class.
    """
    if own.ndim == 0 or (len(own), len(found)) != (len(classes), len(before)):
        return None
    pairs = [(new, list(before).index(c)) for new, c in enumerate(classes) if c in before]
    to, of = [new for new, _ in pairs], [old for _, old in pairs]
    result = own.clone()
    if joint:
        mine = result.view(len(classes), -1, len(classes))  # (classes, heads, classes)
        theirs = found.view(len(before), -1, len(before))
        for new, old in pairs:
            mine[new][:, to] = theirs[old][:, of]
    elif own.shape[1:] == found.shape[1:]:
        result[to] = found[of]
    else:
        return None
    return result
