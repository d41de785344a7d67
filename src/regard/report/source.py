"""A run's network, images and predictions, from which its report and figures are made."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.attention import attention_kinds
from regard.data.loading import Reader
from regard.data.splits_file import rows_of
from regard.data.table import ImageTable
from regard.errors import ImageError, UsageError
from regard.evaluation import Calibration, Evaluation, Predictions, evaluate, with_temperature
from regard.evaluation.calibration import FILE
from regard.explanations.explanation import METHODS, Explanation, explain_batch
from regard.explanations.faithfulness import Faithfulness, Scorer, summarize
from regard.explanations.gradcam import default_layer, gradcam
from regard.explanations.inputs import Source
from regard.explanations.masks import Masks, open_masks
from regard.explanations.pointing import Mask
from regard.explanations.reading import as_picture
from regard.files import spread
from regard.predict import FLIPS_ALONE, Classifier, load, stored_calibration
from regard.runs import RunFolder
from regard.trained_on import own_table

log: logging.Logger = logging.getLogger(__name__)

MOST_WRONG, LEAST_SURE, MOST_CLASSES = 12, 6, 12


def choose(predictions: Predictions, count: int | None = None) -> list[int]:
    """The images to show, by the rule stated in the report's notes.

    The wrong ones of highest probability (at most 12), the 6 right ones of lowest probability,
    and the first right one of each of the first 12 classes.

    Args:
        predictions: of all images.
        count: if given, further wrong ones, then further uncertain ones are added, up to so many.
    """
    predicted = predictions.probabilities.argmax(axis=1)
    top = predictions.probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != predictions.labels)
    right = np.flatnonzero(predicted == predictions.labels)
    wrong = wrong[np.argsort(-top[wrong], kind="stable")]
    unsure = right[np.argsort(top[right], kind="stable")]
    classes = range(min(len(predictions.classes), MOST_CLASSES))
    first = [right[predictions.labels[right] == c][:1] for c in classes]
    rule = np.concatenate([wrong[:MOST_WRONG], unsure[:LEAST_SURE], *first])
    chosen = list(dict.fromkeys(rule.tolist()))
    if count is None:
        return chosen
    more = np.concatenate([rule, wrong[MOST_WRONG:], unsure[LEAST_SURE:]])
    return list(dict.fromkeys(more.tolist()))[:count]


def ranked(predictions: Predictions, i: int) -> list[tuple[str, float]]:
    """The 5 most probable classes of an image in the evaluation, with their probabilities."""
    p = predictions.probabilities[i]
    order = np.argsort(-p, kind="stable")[:5].tolist()
    return [(predictions.classes[k], float(p[k])) for k in order]


@dataclass(frozen=True)
class _Found:
    """The evaluated images that can be read now: the table's row for each prediction."""

    table: ImageTable
    reader: Reader
    rows: dict[int, int]


class RunSource:
    """The network and the images of a finished run; without images if its data has moved.

    Raises:
        UsageError: the folder holds no finished run, or the masks don't fit its images.
    """

    def __init__(
        self, folder: Path, masks: Path | None = None, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        self.run: RunFolder = RunFolder(folder)
        self.run.require_finished()
        self.plan: dict[str, Any] = self.run.read_plan()
        self.facts: dict[str, Any] = self.run.read_facts()
        self.recipe: dict[str, Any] = self.run.read_recipe()
        self.split: str
        self.predictions: Predictions
        self.split, self.predictions = self.run.read_predictions()
        # uncalibrated, as it was evaluated
        self.classifier: Classifier = load(folder, device, calibrated=False, precision=precision)
        stored = stored_calibration(folder, self.predictions.classes)
        if stored is not None and stored.tta is not None:  # the predictions are without it
            log.warning("%s %s", folder / FILE, FLIPS_ALONE)
            stored = None
        self.calibration: Calibration | None = stored
        self.problem: str = ""
        self.found: _Found | None = self._open()
        self.masks: Masks = Masks() if masks is None else self._open_masks(masks)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The result, as it was evaluated at the end of the training."""
        return evaluate(self.predictions, seed=self.recipe["seed"])

    @cached_property
    def command(self) -> str:
        """The command of the run."""
        return self.run.read_command()

    @cached_property
    def calibrated(self) -> Predictions:
        """The predictions at the temperature stored in the run, or 1."""
        if self._temperature == 1:
            return self.predictions
        return with_temperature(self.predictions, self._temperature)

    @property
    def _temperature(self) -> float:
        return 1.0 if self.calibration is None else self.calibration.temperature

    @cached_property
    def methods(self) -> Sequence[str]:
        """The explanation methods that work on this network."""
        return usable_methods(self.classifier)

    def _open(self) -> _Found | None:
        try:
            table = own_table(self.run.path, self.plan)
        except (ValueError, OSError) as error:  # the metrics remain valid
            self.problem = str(error)
            return None
        table = table.select(table.splits == self.split)
        paths = self.predictions.paths
        if paths is None:
            return None
        places = {name: i for i in range(len(table)) for name in (table.path(i), table.key(i))}
        lines = rows_of(paths, self.run.path / "splits.csv")  # the data may have moved since
        names = paths if lines is None else [row.key for row in lines]
        same = len(table) == len(paths)
        rows = {i: places.get(name, i if same else -1) for i, name in enumerate(names)}
        rows = {i: row for i, row in rows.items() if row >= 0}
        return _Found(table, Reader(table, self.classifier.preprocess), rows)

    def _open_masks(self, masks: Path) -> Masks:
        if self.found is None or self.found.table.files is None:
            why = self.problem or "its images are no files"
            raise UsageError(f"masks={masks}: {self.run.path} has no image files ({why})")
        files = self.found.table.files
        return open_masks(masks, [Source(Path(path), path) for path in files])

    @property
    def can_read(self) -> bool:
        """Whether there are images to read."""
        return self.found is not None and bool(self.found.rows)

    # ---- single images -------------------------------------------------------------------
    def name(self, i: int) -> str:
        """The name of an evaluated image: its path below the folder of the data."""
        if self.found is not None and i in self.found.rows:
            return self.found.table.key(self.found.rows[i])
        return (self.predictions.paths or [f"image {k}" for k in range(len(self.predictions))])[i]

    def pixels(self, i: int) -> Any:
        """An evaluated image as decoded, (H, W, C).

        Raises:
            ImageError: it can't be read.
        """
        if self.found is None or i not in self.found.rows:
            raise ImageError(f"{self.name(i)}: not where it was")
        row, value_range = self.found.rows[i], self.classifier.preprocess.value_range
        return self.found.table.read(row, value_range=value_range)

    def explained(self, i: int) -> Explanation:
        """An evaluated image explained as by `regard explain`, with its true class and its mask.

        Raises:
            ImageError: it can't be read, or the network's output is not finite.
        """
        pixels = self.pixels(i)
        assert self.found is not None
        picture, box = as_picture(pixels), self.classifier.preprocess.seen(*pixels.shape[:2])
        name = self.name(i)
        if self.methods:
            (shown,) = explain_batch(
                self.classifier.model, self._input(self.found.rows[i]), [picture], [box],
                classes=self.classifier.class_names, methods=self.methods, paths=[name],
                target=int(self.predictions.probabilities[i].argmax()),
                temperature=self._temperature,
            )  # fmt: skip
        else:
            shown = Explanation(
                path=name, image=picture, box=box, classes=[], target=("", 0.0), maps=[]
            )
        true = self.predictions.classes[self.predictions.labels[i]]
        mask = self._mask(i, (pixels.shape[0], pixels.shape[1]))
        # the classes as evaluated, at the temperature of `predict`
        return replace(shown, true=true, classes=ranked(self.calibrated, i), mask=mask)

    def _mask(self, i: int, size: tuple[int, int]) -> Mask | None:
        assert self.found is not None
        name = self.found.table.path(self.found.rows[i])
        if name not in self.masks.boxes and name not in self.masks.files:
            return None
        try:
            return self.masks.read(name, size)
        except (UsageError, ImageError) as error:
            log.warning("%s: no mask is drawn (%s)", name, error)
            return None

    def _input(self, row: int) -> Tensor:
        assert self.found is not None
        preprocess = self.classifier.preprocess
        device = next(self.classifier.model.parameters()).device
        return preprocess.normalize(preprocess.fit(self.found.reader.decode(row))[None].to(device))

    def explain_all(self, chosen: Sequence[int]) -> Iterator[tuple[int, Explanation]]:
        """Explanations of those images that can still be read."""
        if not self.can_read:
            return
        for i in chosen:
            try:
                yield i, self.explained(i)
            except ImageError as error:
                log.warning("%s", error)

    def faithfulness(self, count: int) -> Faithfulness | None:
        """Scores on `count` images, evenly spread; None without images or maps."""
        if self.found is None or count == 0 or not self.methods or not self.can_read:
            return None
        seed = self.recipe["seed"]
        temperature = self._temperature
        scorer = Scorer(
            self.classifier.model, methods=self.methods, seed=seed, steps=10, repeats=1,
            temperature=temperature,
        )  # fmt: skip
        each, read = [], []
        for row in spread(len(self.found.table), count).tolist():
            try:
                each.append(scorer.score(self._input(row)))
            except ImageError:
                continue
            read.append(row)
        groups = self.found.table.groups
        named = None if groups is None else groups[read].tolist()
        if not each:
            return None
        return summarize(each, seed=seed, groups=named, temperature=temperature)


def usable_methods(classifier: Classifier) -> Sequence[str]:
    """The methods that work on this network: not every network has a layer for Grad-CAM."""
    methods = ["attention"] if attention_kinds(classifier.model) else []
    x = torch.zeros(1, *classifier.preprocess.input_size)
    x = x.to(next(classifier.model.parameters()).device)
    try:
        gradcam(classifier.model, x, layer=default_layer(classifier.model, x))
    except UsageError:
        return methods
    return [m for m in METHODS if m in (*methods, "gradcam")]
