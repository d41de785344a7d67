"""Writes explanations into a folder: a figure and raw maps per image, a sheet, and scores.

Only one image is in memory at a time. Each image's numbers are written last and record the
settings used, so that a second call continues where the first was stopped.
"""

import contextlib
import csv
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from regard.attention import Reduce, check_reduce
from regard.data.images import read_image, read_stored
from regard.errors import ImageError, UsageError
from regard.explanations.curves_figure import curves_figure
from regard.explanations.deletion import BASELINES
from regard.explanations.explanation import (
    METHODS,
    Explanation,
    class_number,
    explain_batch,
    save_arrays,
)
from regard.explanations.faithfulness import Faithfulness, ImageScore, Scorer, numbers, summarize
from regard.explanations.figure import contact_sheet
from regard.explanations.inputs import (
    CURVES,
    NUMBERS,
    PICTURE,
    SCORES_HEADER,
    SHEET,
    Source,
    refuse_to_replace,
)
from regard.explanations.masks import Masks, open_masks
from regard.explanations.overlay import Picture
from regard.explanations.pointing import Mask, Pointing, PointingScore, cells, point
from regard.explanations.print_style import SOFTWARE, save
from regard.explanations.reading import as_picture, read_to_explain
from regard.explanations.records import (
    Record,
    file_id,
    network_id,
    read_record,
    write_marked,
    write_record,
)
from regard.files import plural, spread, write_atomically
from regard.predict import Classifier

log: logging.Logger = logging.getLogger(__name__)

SCORED = 256  # of more images, this many are scored, evenly spread
ON_A_SHEET = 60


@dataclass(frozen=True, kw_only=True)
class Options:
    """How images are explained.

    Attributes:
        target, methods, reduce, layer, keep_channels: as for `explain`.
        score: measure deletion, insertion and the sanity checks.
        baseline, seed, steps, repeats: as for `Scorer`.
        masks: what people marked, see `open_masks`.
        overwrite: also replace files that Regard did not write.
        precision: the precision that the network was loaded for.
    """

    target: str | None = None
    methods: Sequence[str] = METHODS
    reduce: Reduce = "mean"
    layer: str | None = None
    keep_channels: bool = False
    score: bool = False
    baseline: str = "blur"
    seed: int = 0
    steps: int = 20
    repeats: int = 3
    masks: Path | None = None
    overwrite: bool = False
    precision: str = "fp32"

    def settings(self, network: str, image: str, log_odds: bool = False) -> dict[str, Any]:
        """The settings that an image's maps depend on, for JSON."""
        return {
            "software": SOFTWARE, "network": network, "image": image, "target": self.target,
            "methods": list(self.methods), "reduce": self.reduce, "layer": self.layer,
            "channels": self.keep_channels,
            **({} if self.precision == "fp32" else {"precision": self.precision}),
            **({"gradcam": "log-odds"} if log_odds else {}),  # of the class's logit otherwise
        }  # fmt: skip

    def score_settings(self, temperature: float) -> dict[str, Any]:
        """The further settings that an image's scores depend on."""
        return {
            "baseline": self.baseline, "seed": self.seed, "steps": self.steps,
            "repeats": self.repeats,
            **({} if temperature == 1.0 else {"temperature": temperature}),
        }  # fmt: skip


@dataclass
class Outcome:
    """The result of `Writer.run`.

    Attributes:
        explained: number of images; `reused` of them are from an earlier call.
        unreadable: images that can't be read.
        skipped_masks: why images were left out of the pointing game.
        faithfulness: the scores, if requested.
        pointing: by map, if there are masks.
        pointing_by_class: by the class that the maps explain, then by map.
    """

    explained: int = 0
    reused: int = 0
    unreadable: int = 0
    skipped_masks: dict[str, str] = field(default_factory=dict)
    faithfulness: Faithfulness | None = None
    pointing: dict[str, PointingScore] = field(default_factory=dict)
    pointing_by_class: dict[str, dict[str, PointingScore]] = field(default_factory=dict)


class Writer:
    """Explains images and writes the results into a folder.

    Raises:
        UsageError: an option is not among its choices, masks don't fit, or a file is in the way;
            raised before anything is written.
    """

    def __init__(
        self, classifier: Classifier, sources: Sequence[Source], out: Path, options: Options
    ) -> None:
        check_reduce(options.reduce)
        if options.target is not None:
            class_number(options.target, classifier.class_names)
        if options.baseline not in BASELINES:
            raise UsageError(f"baseline={options.baseline!r}: choose {' or '.join(BASELINES)}")
        self.classifier: Classifier = classifier
        self.sources: Sequence[Source] = sources
        self.out: Path = out
        self.options: Options = options
        refuse_to_replace(self._outputs(), [s.path for s in sources], overwrite=options.overwrite)
        self.masks: Masks = Masks() if options.masks is None else open_masks(options.masks, sources)
        self.outcome: Outcome = Outcome(skipped_masks=dict(self.masks.problems))
        self.network: str = network_id(classifier)
        self.sheet: list[Explanation] = []
        self.scores: dict[str, ImageScore] = {}
        self.points: dict[str, dict[str, Pointing]] = {}  # by map, then by image
        self.targets: dict[str, str] = {}
        self.scorer: Scorer | None = self._scorer() if options.score else None

    def _outputs(self) -> list[Path]:
        names = [f"{s.name}{kind}" for s in self.sources for kind in (PICTURE, NUMBERS)]
        if len(self.sources) > 1:
            names.append(SHEET)
        if self.options.score:
            names += [CURVES, "curves.npz"]
        if self.options.score or self.options.masks is not None:
            names += ["scores.json", "scores.csv"]
        return [self.out / name for name in names]

    def _scorer(self) -> Scorer:
        o = self.options
        return Scorer(
            self.classifier.model, methods=o.methods, reduce=o.reduce, layer=o.layer,
            baseline=o.baseline, seed=o.seed, steps=o.steps, repeats=o.repeats,
            temperature=self.classifier.temperature,
        )  # fmt: skip

    def _score_settings(self) -> dict[str, Any]:
        return self.options.score_settings(self.classifier.temperature)

    def run(self) -> Outcome:
        """Explains and writes everything.

        Raises:
            UsageError: an unknown layer or method, or a channel that a mask does not have.
            FileError: something can't be written.
        """
        scored = set(spread(len(self.sources), SCORED).tolist()) if self.options.score else set()
        if self.options.score and len(self.sources) > SCORED:
            log.info("scores: on %d of the images, evenly spread", SCORED)
        try:
            for i, source in enumerate(self.sources):
                self._one(source, i in scored)
        except KeyboardInterrupt:
            done, total = self.outcome.explained, plural(len(self.sources), "image")
            log.warning("%d of %s explained; run the same command again to continue", done, total)
            raise
        self._finish()
        return self.outcome

    # ---- one image -----------------------------------------------------------------------
    def _one(self, source: Source, scored: bool) -> None:
        picture, file = self.out / f"{source.name}{PICTURE}", self.out / f"{source.name}{NUMBERS}"
        score_settings = self._score_settings() if scored else None
        try:
            if not source.path.is_file():
                read_stored(source.path)  # raises with the reason; hashing would block on a pipe
            log_odds = getattr(self.classifier.model, "answers_log_probabilities", False)
            settings = self.options.settings(self.network, file_id(source.path), log_odds)
            marks = self._marks(source.name)
            record = read_record(file, settings, score_settings) if picture.is_file() else None
            if record is None:
                record = self._computed(source, scored)
                picture.parent.mkdir(parents=True, exist_ok=True)
                record.explanation.save_figure(picture)
                write_record(file, replace(record, marked=marks), settings, score_settings)
            elif list(record.marked) != marks:
                image = self._picture(source)
                shown = replace(record.explanation, image=image)
                shown = replace(shown, mask=self._mask(source.name, image.shape[:2]))
                shown.save_figure(picture)
                write_marked(file, marks)
                record = replace(record, explanation=shown)
            else:
                self.outcome.reused += 1
                if len(self.sheet) < ON_A_SHEET:
                    image = self._picture(source)
                    record = replace(record, explanation=replace(record.explanation, image=image))
        except (ImageError, OSError) as error:
            if not isinstance(error, ImageError) and source.path.is_file():
                raise
            reason = error if isinstance(error, ImageError) else f"{source.path}: no such file"
            log.warning("%s", reason)
            self.outcome.unreadable += 1
            return
        self._collect(source, record, picture)

    def _picture(self, source: Source) -> Picture:
        value_range = self.classifier.preprocess.value_range
        return as_picture(read_image(source.path, value_range=value_range))

    def _computed(self, source: Source, scored: bool) -> Record:
        classifier, o = self.classifier, self.options
        x, image, box = read_to_explain(classifier, source.path)
        (shown,) = explain_batch(
            classifier.model, x, [image], [box], classes=classifier.class_names, target=o.target,
            methods=o.methods, reduce=o.reduce, layer=o.layer, paths=[source.name],
            keep_channels=o.keep_channels, temperature=classifier.temperature,
        )  # fmt: skip
        shown = replace(shown, mask=self._mask(source.name, image.shape[:2]))
        if not scored or self.scorer is None:
            return Record(shown, None)
        target = class_number(shown.target[0], classifier.class_names)
        return Record(shown, self.scorer.score(x, target))

    def _marks(self, name: str) -> list[Any]:
        """What the figure outlines, as `Record.marked`; empty for an image without a mask."""
        if name in self.masks.problems:
            return []
        boxes: list[Any] = [list(corners) for corners in self.masks.boxes.get(name, [])]
        return boxes or [file_id(path) for path in self.masks.files.get(name, [])]

    def _mask(self, name: str, size: tuple[int, ...]) -> Mask | None:
        """What people marked in an image; None if nothing is. `_collect` says what is wrong."""
        if not self._marks(name):
            return None
        with contextlib.suppress(UsageError, ImageError):
            return self.masks.read(name, (size[0], size[1]))
        return None

    def _collect(self, source: Source, record: Record, picture: Path) -> None:
        shown = record.explanation
        names = ", ".join(m.name for m in shown.spatial())
        log.info(
            "%s: %s %.1f%%; maps: %s", picture, shown.predicted, 100 * shown.probability, names
        )
        self.outcome.explained += 1
        self.targets[source.name] = shown.target[0]
        if len(self.sheet) < ON_A_SHEET:
            self.sheet.append(shown.reduced(360))
        if record.score is not None:
            self.scores[source.name] = record.score
        if self.options.masks is None or source.name in self.masks.problems:
            return
        try:
            height, width = shown.image.shape[:2]
            mask = self.masks.read(source.name, (height, width))
            found = {m.name: point(m.values, mask, box=shown.box) for m in shown.spatial()}
        except (UsageError, ImageError) as error:
            self.outcome.skipped_masks[source.name] = str(error)
            return
        for name, pointing in found.items():
            self.points.setdefault(name, {})[source.name] = pointing

    # ---- all images ----------------------------------------------------------------------
    def _finish(self) -> None:
        outcome, options = self.outcome, self.options
        if outcome.reused:
            log.info("%s unchanged since an earlier call", plural(outcome.reused, "image"))
        if len(self.sheet) > 1:
            self._write_sheet()
        if not self.scores and options.masks is None:
            return
        content: dict[str, Any] = {"software": SOFTWARE, "images": outcome.explained}
        if self.scores:
            found = summarize(
                list(self.scores.values()), baseline=options.baseline, seed=options.seed,
                groups=self._groups(self.scores), temperature=self.classifier.temperature,
            )  # fmt: skip
            outcome.faithfulness = found
            content |= self._score_settings() | {"temperature": found.temperature}
            content |= {"scored": found.images, "groups": found.groups}
            content |= {"scores": numbers(found.scores)}
            content |= {"sanity": _checks(found), "warnings": found.warnings}
            content |= {"channel_gates": {g.name: g.to_dict() for g in found.gates}}
            self._write_curves(found)
        self._write_scores(outcome.faithfulness)
        outcome.pointing = {name: self._pointing(each) for name, each in self.points.items()}
        for label in dict.fromkeys(self.targets.values()):
            of = {
                name: {p: v for p, v in each.items() if self.targets[p] == label}
                for name, each in self.points.items()
            }
            if any(of.values()):
                outcome.pointing_by_class[label] = {n: self._pointing(v) for n, v in of.items()}
        if options.masks is not None:
            content["pointing"] = {name: s.to_dict() for name, s in outcome.pointing.items()}
            content["pointing_by_class"] = {
                label: {name: s.to_dict() for name, s in each.items()}
                for label, each in outcome.pointing_by_class.items()
            }
            content["skipped_masks"] = outcome.skipped_masks
        text = json.dumps(content, indent=2) + "\n"
        path = self.out / "scores.json"
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
        log.info("%s: the numbers", path)

    def _write_sheet(self) -> None:
        from PIL.PngImagePlugin import PngInfo

        mark = PngInfo()
        mark.add_text("Software", SOFTWARE)
        sheet, path = contact_sheet(self.sheet), self.out / SHEET
        write_atomically(path, lambda part: sheet.save(part, format="PNG", pnginfo=mark))
        first = "the first " * (self.outcome.explained > len(self.sheet))
        log.info("%s: %s%d images on one sheet", path, first, len(self.sheet))

    def _pointing(self, each: dict[str, Pointing]) -> PointingScore:
        return PointingScore.of(list(each.values()), self.options.seed, self._groups(each))

    def _groups(self, paths: Iterable[str]) -> list[str] | None:
        """The groups from the file of masks; an image without one is its own group."""
        named = self.masks.groups
        return [f"={named[p]}" if p in named else p for p in paths] if named else None

    def _write_scores(self, found: Faithfulness | None) -> None:
        """scores.csv: the areas and the pointing of each image and map."""
        areas: dict[tuple[str, str], list[str]] = {}
        for name, score in found.scores.items() if found is not None else ():
            for path, each in zip(self.scores, score.each, strict=True):
                areas[path, name] = [f"{a:.6f}" for a in each]
        keys = dict.fromkeys([*areas, *((p, n) for n, each in self.points.items() for p in each)])

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                writer = csv.writer(file)
                writer.writerow(SCORES_HEADER)
                for path, name in keys:
                    pointing = self.points.get(name, {}).get(path)
                    scored = areas.get((path, name), ["", ""])
                    writer.writerow([path, self.targets[path], name, *scored, *cells(pointing)])

        write_atomically(self.out / "scores.csv", write)

    def _write_curves(self, found: Faithfulness) -> None:
        """curves.npz, (2, images, steps + 1) by map, and their means as a figure."""
        about = json.dumps({"software": SOFTWARE})
        arrays: dict[str, Any] = {name: s.curves for name, s in found.scores.items()}
        paths = np.array(list(self.scores))
        save_arrays(self.out / "curves.npz", {"paths": paths, "about": np.array(about)} | arrays)
        save(curves_figure(found.scores), self.out / CURVES, dpi=200)


def _checks(found: Faithfulness) -> dict[str, Any]:
    return {
        c.name: {
            "unchanged": c.unchanged,
            "similarity": c.similarity.tolist(),
            "between_images": c.between,
            "cells": list(c.shape),
            "passed": c.passed,
            "verdict": c.verdict(),
        }
        for c in found.checks
    }
