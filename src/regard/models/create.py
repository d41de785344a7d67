"""Making a network by name: arguments, input size, starting weights."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from regard.errors import FileError, UsageError
from regard.models import create_model
from regard.models.cbam import twins
from regard.models.io import load_model
from regard.models.original_weights import load_authors_weights


def make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """create_model(), with errors for a person.

    Raises:
        UsageError: the network is unknown (the nearest names are told), or an argument is
            not one of its arguments or has a value that it does not take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`regard models` lists them"
        raise UsageError(f"no network is called {name!r}; {hint}")
    try:
        return create_model(name, **arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = str(error).rpartition("__init__() ")[2]
        raise UsageError(f"{name} with {given}: {reason}") from error


def classifier_modules(model: nn.Module) -> list[str]:
    """The names of a network's classifiers: timm's one or, of distilled networks, two."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else ()  # type: ignore[operator]
    parts = found if isinstance(found, tuple | list) else (found,)
    names = [n for n, module in model.named_modules() if any(module is part for part in parts)]
    # AG-SonoNet's joint and separate classifiers are both heads
    return [*names, "heads", "classifier"]


def _outline(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network without weights, which costs no time; the errors are those of `make`."""
    with torch.device("meta"):
        return make(name, {**(arguments or {}), "num_classes": 2})


def make_model(
    name: str,
    arguments: Mapping[str, Any],
    classes: int,
    input_size: tuple[int, int, int],
    pretrained: bool,
    weights: str | None,
) -> nn.Module:
    """The network, from its initialization, timm's pretrained weights, or a run's.

    Raises:
        UsageError: an argument is wrong, the images are too small, or the weights don't fit.
        OSError: pretrained weights can't be reached.
    """
    asked = {**arguments, "num_classes": classes, "in_chans": input_size[0]}
    takes_plain = timm.is_model(name) and _has_plain(name)
    if pretrained:
        asked["pretrained_plain" if takes_plain else "pretrained"] = True
    try:
        model = make(name, asked)
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(f"--pretrained: weights of {name} can't be loaded ({reason})") from error
    _check_size(model, name, input_size)
    if weights is not None:
        load_weights(model, Path(weights))
    return model


def _check_size(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Refuses images that the network can't take, by one of zeros, before anything is written."""
    least = getattr(model, "min_size", 1)
    if min(input_size[1:]) < least:
        raise UsageError(f"{name} needs images of at least {least}x{least}: give --size {least}")
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        height, width = input_size[1:]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        told = f"{name} can't take images of {height}x{width} ({reason}): give another --size"
        raise UsageError(told) from error
    finally:
        model.train(training)


def _has_plain(name: str) -> bool:
    try:
        return twins(name).get("plain") != name and "se" in twins(name)
    except ValueError:
        return False


def load_weights(model: nn.Module, source: Path) -> None:
    """Starts from a run's folder, whatever classifier it had, or from an authors' checkpoint.

    Tensors of the classifier that do not fit are left as they were initialized.

    Raises:
        UsageError: the source can't be read, or more than the classifier does not fit.
    """

    if not source.is_dir():
        load_authors_weights(model, source)
        return
    trained, _ = load_model(source)
    found = trained.state_dict()
    own = model.state_dict()
    fitting = {k: v for k, v in found.items() if k in own and v.shape == own[k].shape}
    heads = tuple(f"{m}." for m in (*classifier_modules(model), *classifier_modules(trained)))
    strange = {k: "it has no" for k in found if k not in own}
    strange |= {k: "it lacks" if k not in found else "another shape of" for k in own}
    told = [f"{strange[k]} {k}" for k in strange if k not in fitting and not k.startswith(heads)]
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        raise UsageError(f"--weights {source} does not fit: {', '.join(told[:5])}{more}")
    model.load_state_dict(fitting, strict=False)
