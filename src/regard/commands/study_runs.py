"""Whether the runs in a study's folder are what a call would train, by each run's own folder.

A recipe's file, a study's file or a flag may have changed since a run was trained; its command
may be the same, or nowhere any more. Its folder has every value that it was trained with.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from regard.data.content import content_hashes
from regard.data.sources import NAMES, open_data
from regard.data.splits_file import Row, read_rows, read_splits
from regard.data.table import ImageTable
from regard.errors import UsageError
from regard.log import Heartbeat
from regard.runs import RunFolder
from regard.studies.facts import OF_THE_MACHINE, shown
from regard.studies.plan import PlannedRun
from regard.studies.runner import is_finished
from regard.training.config import Recipe, fields_of
from regard.training.plan import (
    SCALED,
    choose_model,
    choose_splits,
    plain_twin,
    scale_schedule,
    together,
)
from regard.training.recipe_files import load_recipe
from regard.training.start import full_name, network_of

_FROM_DATA = ("img_size", "stem")  # arguments that a run chooses by its images

_Difference = tuple[str, Any, Any]  # name, the run's value, the other value


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a call trains in one row.

    Attributes:
        network, arguments: of the row.
        base: the recipe without changes.
        changes: the row's and the call's, on top of the recipe.
        data, root, weights, splits: as for `regard.train`.
    """

    network: str
    base: Recipe
    data: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    root: str | None = None
    weights: str | None = None
    splits: str = "auto"


def check_runs(runs: Sequence[PlannedRun], asked: Mapping[str, Asked]) -> None:
    """Compares each run that was started with what is asked for now.

    The seed aside, which the folder's name has, and what only the machine asks for. The contents
    of the images, and whether they have groups, are compared if a run with the same data is left to
    train.

    Args:
        runs: planned; those without a folder are not looked at.
        asked: by row.

    Raises:
        UsageError: a run differs; the message names the run, and the first value that does.
    """
    left = {_source(asked[run.row]) for run in runs if not is_finished(run)}
    opened = cache(_Opened)
    for run in runs:
        try:
            if not RunFolder(run.folder).exists:
                continue
        except UsageError:  # damaged: training it says so, and the others go on
            continue
        for name, was, now in _differences(run, asked[run.row]):
            raise UsageError(
                f"{run.folder} was trained with {name}={shown(was)}, and this call asks for "
                f"{name}={shown(now)}: give --out another folder"
            )
        source, splits = _source(asked[run.row]), run.folder / "splits.csv"
        more = source in left  # nothing is read elsewhere if nothing is trained
        here = more or os.path.exists(_place(source[0]))
        if source[0] not in NAMES and splits.is_file() and here:
            _check_images(run, opened(*source), list(read_rows(splits)), more=more)


def _source(asked: Asked) -> tuple[str, str | None, str]:
    """What names the images of a row: data, root, splits."""
    return asked.data, asked.root, asked.splits


class _Opened:
    """Data that several runs share: what they have in common is read once."""

    def __init__(self, data: str, root: str | None, splits: str) -> None:
        self.table = open_data(data, root=root, splits=splits)
        self._contents: dict[str, int] = {}
        self._chosen: dict[Any, ImageTable] = {}

    def contents(self, keys: Iterable[str]) -> dict[str, int]:
        """The hash of at least each of these images that is here, by key."""
        wanted = set(keys).difference(self._contents)
        at = [i for i in range(len(self.table)) if self.table.key(i) in wanted] if wanted else []
        some = self.table.select(np.array(at, np.int64))
        hashes = content_hashes(some, Heartbeat("images compared with the runs'"))
        self._contents |= {some.key(i): content for i, content in enumerate(hashes.tolist())}
        return self._contents

    def chosen(self, recipe: Recipe) -> ImageTable:
        """The images that a run with this recipe trains and tests on, with their splits."""
        names = ("limit", "split_seed", "val", "test", "fold", "keep_together")
        values = tuple(getattr(recipe, name) for name in names)
        if values not in self._chosen:
            self._chosen[values] = choose_splits(self.table, recipe, lambda _: self._together)
        return self._chosen[values]

    @cached_property
    def _together(self) -> ImageTable:
        return together(self.table)  # once for all folds


def _check_images(run: PlannedRun, images: _Opened, rows: Sequence[Row], *, more: bool) -> None:
    """That the run's images still are those of the data, with the same labels, groups and splits.

    Args:
        run: was started.
        images: the data as it is now.
        rows: of the run's splits.csv.
        more: whether runs are left to train, which need the same contents and groups, too.

    Raises:
        UsageError: they are not.
    """
    table, recipe = images.table, load_recipe(run.folder / "recipe.toml")
    regrouped = (table.groups is None) != (not any(row.group for row in rows))
    if regrouped and more:
        now = "no groups" if table.groups is None else "groups"
        raise _changed(run, f"{table.name} has {now} now")
    # near-duplicates are found by looking at every image; folds are the same for the same images
    given = recipe.fold is None or bool((table.splits != "").any())
    resplit = bool(rows) and not regrouped and given and (more or not recipe.keep_together)
    if recipe.limit or resplit:
        try:
            table = images.chosen(recipe)  # others, if there are more images now
        except UsageError as error:
            raise _changed(run, str(error)) from error
    if regrouped:
        table = replace(table, groups=None)
    try:
        before = read_splits(table, run.folder / "splits.csv").splits
    except UsageError as error:
        if not _same_contents(rows, table):  # files may have been moved
            raise _changed(run, str(error)) from error
        return
    for i in np.flatnonzero(before != table.splits)[:1].tolist() if resplit else ():
        was, now = before[i] or "none", table.splits[i] or "none"
        raise _changed(run, f"the split of {table.key(i)} was {was} and is {now}")
    found = images.contents(row.key for row in rows) if more else {}
    for row in rows:
        if found.get(row.key) and row.content and row.content != found[row.key]:
            raise _changed(run, f"{row.key} has another content")


def _changed(run: PlannedRun, how: str) -> UsageError:
    return UsageError(
        f"{run.folder} was trained before the data changed ({how}): give --out another folder"
    )


def _same_contents(rows: Sequence[Row], table: ImageTable) -> bool:
    """Whether these are the same images with the same labels and groups, under other names."""
    if len(rows) != len(table) or not all(row.content for row in rows):
        return False
    labels = (table.classes[label] for label in table.labels)
    groups = [""] * len(table) if table.groups is None else map(str, table.groups)
    now = zip(content_hashes(table).tolist(), labels, groups, strict=True)
    return Counter(now) == Counter((row.content, row.label, row.group) for row in rows)


def _differences(run: PlannedRun, asked: Asked) -> Iterator[_Difference]:
    folder = RunFolder(run.folder)
    plan, stored = folder.read_plan(), load_recipe(run.folder / "recipe.toml")
    words = run.command
    fold = {"fold": words[words.index("--fold") + 1]} if "--fold" in words else {}
    random = not plan.get("pretrained") and plan.get("weights") is None
    wanted = asked.base.changed(**asked.changes, **fold).for_start(random)
    if not _same_data(plan, asked.data):
        yield "data", plan.get("location") or plan["data"], _place(asked.data)
    if asked.data in NAMES and plan.get("root") != asked.root:
        yield "root", plan.get("root"), asked.root
    if plan.get("reading", asked.splits) != asked.splits:
        yield "splits", plan["reading"], asked.splits
    yield from _of_the_network(plan, wanted, asked)
    yield from _of_the_start(plan, wanted, asked)
    planned: list[Recipe] = []
    for f in fields_of():
        was, now = getattr(stored, f.name), getattr(wanted, f.name)
        if f.name in ("seed", "pretrained", *OF_THE_MACHINE):
            continue
        if f.name == "channels" and now is not None:  # which in_chans gave to older runs
            was = plan["preprocess"]["input_size"][0]
        if f.name in SCALED and f.name not in asked.changes and (was or now):
            planned = planned or [_planned(folder, wanted, asked)]
            now = getattr(planned[0], f.name)
        if was != now:
            yield f.name, was, now


def _planned(folder: RunFolder, wanted: Recipe, asked: Asked) -> Recipe:
    """The recipe with its schedule in proportion to the run's length."""
    images = sum(row.split == "train" for row in read_rows(folder.path / "splits.csv"))
    processes = folder.read_plan().get("processes", 1)
    return scale_schedule(wanted, asked.base, asked.changes, images, processes)[0]


def _of_the_network(plan: Mapping[str, Any], wanted: Recipe, asked: Asked) -> Iterator[_Difference]:
    if plan.get("model") is None:
        return
    network, arguments = choose_model(
        asked.network, wanted, asked.arguments, network_of(asked.weights, asked.network)
    )
    if plan["model"] not in (network, plain_twin(network)):  # `choose_stem` makes it the twin
        yield "model", plan["model"], network
    for name in {**plan["model_args"], **arguments}:
        was, now = (_listed(a.get(name)) for a in (plan["model_args"], arguments))
        if was == now or (name in _FROM_DATA and now is None):
            continue
        yield name, was, now


def _of_the_start(plan: Mapping[str, Any], wanted: Recipe, asked: Asked) -> Iterator[_Difference]:
    was = "yes" if plan.get("pretrained") else "no"
    weights = plan.get("weights")
    asks_for_it = wanted.pretrained == "yes" and weights is None and asked.weights is None
    if was != wanted.pretrained and (wanted.pretrained == "no" or asks_for_it):  # auto: either
        yield "pretrained", was, wanted.pretrained
    if asked.weights is not None and weights != full_name(asked.weights):
        yield "weights", weights, asked.weights
    if asked.weights is None and weights is not None and wanted.pretrained == "no":
        yield "weights", weights, None


def _same_data(plan: Mapping[str, Any], data: str) -> bool:
    """Whether both are the same files, or have one name where the run's are not here any more."""
    location = plan.get("location")
    if data not in NAMES and location:
        for path in (data, data.partition(":")[2]):  # "medmnist:" and the like stand before it
            if os.path.exists(path := os.path.expanduser(path)) and os.path.exists(location):
                return os.path.samefile(path, location)
    return plan.get("data", data) == data


def _place(data: str) -> str:
    path = os.path.expanduser(data)
    return os.path.abspath(path) if data not in NAMES and os.path.exists(path) else data


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value
