"""What a run does: from arguments and data for a new run, from its folder to resume."""

import dataclasses
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.called import command_words
from regard.data.preprocess import Preprocess
from regard.data.sources import NAMES, ImageTable, open_data
from regard.data.splits_file import read_rows
from regard.errors import UsageError
from regard.files import plural
from regard.models._common import as_json
from regard.runs import RunFolder
from regard.training.config import Recipe
from regard.training.plan import (
    SCALED,
    choose_model,
    choose_preprocess,
    choose_splits,
    choose_stem,
    fit_schedule,
    plain_twin,
    scale_schedule,
)
from regard.training.recipe_files import load_recipe
from regard.training.start import (
    Start,
    choose_start,
    full_name,
    inserted_in,
    network_of,
    seen_before,
)

log: logging.Logger = logging.getLogger(__name__)

# recipe fields that may differ when a run is resumed, as they change no result
OPERATIONAL = ("workers", "save_minutes")


# the type of each argument of `regard.train` that is not the recipe's, and what it is in words
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "model": (str, "the name of a network; yours gets one by timm.models.register_model"),
    "recipe": ((str, os.PathLike, Recipe), "a recipe's name, a TOML file or a Recipe"),
    "out": ((str, os.PathLike), "a folder"),
    "weights": ((str, os.PathLike), "a run's folder or a checkpoint"),
    "root": ((str, os.PathLike), "a folder"),
    "model_args": (Mapping, "a dict of the network's arguments"),
    "trackers": ((list, tuple), "a list of names"),
}


def check_arguments(**given: Any) -> None:
    """Checks the types of arguments of `regard.train`; those that may be None are left out.

    Raises:
        UsageError: an argument has another type, or is an empty text.
    """
    for name, value in given.items():
        kinds, words = _ARGUMENTS[name]
        if not isinstance(value, kinds) or value == "":
            simple = value is None or isinstance(value, str | int | float)
            shown = repr(value) if simple else f"<{type(value).__name__}>"
            raise UsageError(f"{name}={shown}: give {words}")


@dataclass(frozen=True)
class Request:
    """The arguments of `regard.train`, as requested."""

    data: str
    model: str | None
    recipe: Recipe
    weights: str | None
    root: str | None
    splits: str  # as for `open_data`
    model_args: dict[str, Any]
    base: Recipe  # the recipe without the changes
    changes: dict[str, Any]
    has_recipe: bool  # whether a recipe was named, rather than used by default


@dataclass(frozen=True)
class Plan:
    """A run's plan: what was requested, and what was derived from the data.

    Attributes:
        data, root: where the images are.
        model, model_args: the network.
        weights, pretrained: the weights it starts from, as decided when the run was started.
        recipe: how it is trained; `accumulate` is for the current number of processes.
        classes: names, in the order of the outputs.
        preprocess: from an image to the network's input.
        processes: number of processes when the run was started.
        start: description of the weights that it starts from.
        rules: 0 for a run that was begun before these were changed, which goes on as it was: the
            random numbers of wrong labels, an epoch's last step where steps were fitted into
            memory, the averages of batch norms in short runs, and the id in Weights & Biases.
            1 for one whose class weights and samplers count the labels before some are changed.
    """

    data: str
    root: str | None
    model: str
    model_args: dict[str, Any]
    weights: str | None
    pretrained: bool
    recipe: Recipe
    classes: list[str]
    preprocess: Preprocess
    processes: int = 1
    start: str = "random weights"
    rules: int = 2

    @property
    def network(self) -> str:
        """The network's name, and the attention inserted into it."""
        inserted = self.recipe.graft
        return self.model if inserted == "none" else f"{self.model} + {inserted.upper()}"

    def header(self, splits: str = "auto") -> str:
        """The comment at the top of the run's recipe.toml: a description and the command.

        Args:
            splits: how the data was read, as for `open_data`.
        """
        of = f"{self.network} on {self.data}"
        first = f"The recipe of this run (run.json has what the machine decided): {of}"
        words = ["regard", "train", self.data, "--recipe", "THIS_FILE"]
        words += ["--weights", self.weights] if self.weights is not None else []
        words += ["--root", self.root] if self.root is not None else []
        words += ["--splits", splits] if splits != "auto" else []
        again = shlex.join(words)
        made = f"regard {shlex.join(called)}" if (called := command_words()) else again
        return f"{first}\n{made}\nThe same run again: {again}"


def new_plan(asked: Request, processes: int) -> tuple[Plan, ImageTable]:
    """The plan of a new run, and its images with their splits.

    Args:
        asked: the request.
        processes: number of processes that train.

    Raises:
        UsageError: the data can't be used, or there is no such network.
    """
    recipe = asked.recipe
    table = choose_splits(open_data(asked.data, root=asked.root, splits=asked.splits), recipe)
    trained = network_of(asked.weights, asked.model or recipe.model)
    name, arguments = choose_model(asked.model, recipe, asked.model_args, trained)
    if (asked.model or recipe.model) is None and recipe.graft == "none":
        recipe = recipe.changed(graft=inserted_in(asked.weights))
    decided: list[Start] = []

    def start_channels(height: int, channels: int) -> int:
        decided.append(
            choose_start(name, arguments, recipe, height, table, asked.weights, channels)
        )
        return decided[0].channels

    preprocess, arguments = choose_preprocess(name, arguments, recipe, table, start_channels)
    start = decided[0]
    if recipe.normalization == "model":
        preprocess = start.prepare(preprocess)
    log.info(f"starts from {start.words}")
    if line := seen_before(table, start, name):
        table = dataclasses.replace(table, warnings=(*table.warnings, line))
    name, arguments = choose_stem(
        name, arguments, preprocess.input_size[1],
        pretrained=start.pretrained or name == trained[0], weights=asked.weights,
    )  # fmt: skip
    recipe = recipe.changed(pretrained="yes" if start.pretrained else "no")
    recipe = recipe.for_start(start.random)
    images = int(np.count_nonzero(table.splits == "train"))
    # its own network, so that it trains the same one again; of another size, if one is given
    own = {k: v for k, v in arguments.items() if k != "img_size" or recipe.size is None}
    recipe = recipe.changed(model=name, model_args=own)
    recipe = fit_schedule(recipe, asked.base, asked.changes, images, processes)
    plan = Plan(
        asked.data, asked.root, name, arguments, start.weights, start.pretrained, recipe,
        table.classes, preprocess, processes, start.words,
    )  # fmt: skip
    return plan, table


def resumed_plan(folder: RunFolder, asked: Request, processes: int) -> Plan:
    """The plan stored in the folder, for the current number of processes.

    Raises:
        UsageError: the request differs from what the run was started with.
    """
    stored, recipe = folder.read_plan(), load_recipe(folder.path / "recipe.toml")
    given = dict(asked.changes)
    if asked.has_recipe:
        random = not stored["pretrained"] and stored["weights"] is None
        wanted = asked.recipe.for_start(random)
        if any(getattr(wanted, name) for name in SCALED):
            images = sum(row.split == "train" for row in read_rows(folder.path / "splits.csv"))
            then = stored.get("processes", processes)
            wanted, _ = scale_schedule(wanted, asked.base, asked.changes, images, then)
        given = {f.name: getattr(wanted, f.name) for f in dataclasses.fields(Recipe)}
    model = asked.model or stored["model"]
    if plain_twin(model) == stored["model"]:  # the network that choose_stem replaced it by
        model = stored["model"]
    start = stored["weights"] and full_name(stored["weights"])
    now: dict[str, tuple[Any, Any]] = {
        # a folder or file may have moved: its images are compared afterwards
        "data": (stored["data"], same_place(stored, asked.data)),
        "model": (stored["model"], model),
        "weights": (start, full_name(asked.weights) if asked.weights else start),
    }
    if given.pop("pretrained", "auto") == "yes":  # auto was resolved when the run was started
        now["pretrained"] = ("yes" if stored["pretrained"] else "no", "yes")
    now |= {
        name: (getattr(recipe, name), value)
        for name, value in given.items()
        if name not in ("model", "model_args", *OPERATIONAL)
    }
    own = stored["model_args"]
    now |= {name: (own.get(name), value) for name, value in asked.model_args.items()}
    for name, (was, is_now) in now.items():
        if as_json(was) != as_json(is_now):  # TOML reads tuples back as lists
            raise UsageError(
                f"{name}={is_now}: {folder.path} was started with {was}; leave it out to resume, "
                "or choose another folder for a new run"
            )
    recipe = recipe.changed(**{k: v for k, v in asked.changes.items() if k in OPERATIONAL})
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in stored["preprocess"].items()
    }
    return Plan(
        asked.data, stored["root"], stored["model"], stored["model_args"], stored["weights"],
        stored["pretrained"], recipe, stored["classes"], Preprocess(**values),
        stored.get("processes", processes), stored.get("start", "random weights"),
        stored.get("rules", 0),
    )  # fmt: skip


def same_place(stored: dict[str, Any], data: str) -> str:
    """The stored DATA if both may name the same files, whose images are compared; else DATA."""
    both = stored.get("location") and data not in NAMES
    return stored["data"] if both else data


def accumulation_now(accumulate: int, then: int, now: int) -> int:
    """Gradient accumulation steps for `now` processes to take the same steps as `then` processes.

    Raises:
        UsageError: no whole number achieves that.
    """
    parts = accumulate * then
    if parts % now:
        fitting = ", ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
        raise UsageError(
            f"the run was started with {plural(then, 'process')}, {plural(parts, 'batch')} in a "
            f"step, which {now} processes can't share equally: number of processes to resume it "
            f"with: {fitting}"
        )
    return parts // now
