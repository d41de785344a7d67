"""Classification metrics, each with a confidence interval.

The metrics of `evaluate`, all between 0 and 1 except `nll`:

- top1, top5: top-1 and top-5 accuracy; ties go to the first class. top5 only with more than
  5 classes.
- balanced_accuracy, macro_recall (the same number under its two names): means over the classes
  that have images, as in scikit-learn's balanced_accuracy_score.
- macro_precision, macro_f1: means over the classes that have images or were predicted, as in
  scikit-learn's f1_score; a class that was never predicted has precision 0.
- ece: expected calibration error, 15 bins of equal width of the top probability (Guo et al.,
  ICML 2017, arXiv 1706.04599).
- nll: mean negative log-likelihood, nats; a probability of 0 counts as 2.2e-16.

Their intervals:

- Without groups, top1, top5 and each class's recall, precision and F1 have Wilson's interval,
  which has good coverage near 0 and 1 and for few images (Brown, Cai & DasGupta, Statistical
  Science 2001). F1 = 2J / (1 + J), where J is the Jaccard index; the interval is J's,
  transformed.
- balanced_accuracy and macro_recall are means of recalls of different images; their interval is
  made of the recalls' own (`regard.evaluation.intervals.mean_of_shares`), so that a class with
  few images, all of them right, is not taken for certain. Where images of one group differ in
  class, and for macro_precision, it is at each end the wider of this and of the samples below.
- The others are expanded percentiles of `resamples` bootstrap samples of the images; for nll, at
  each end the wider of these and Student's t, above also of its logarithm
  (`regard.evaluation.intervals.mean_of_losses`). A class without images in a sample keeps its
  values from all images.
- With groups the shares above have Wilson's interval for images in groups
  (`regard.evaluation.intervals.share_of_groups`), and the others are from samples of whole groups
  (cluster bootstrap). docs/evaluation.md has the coverage of all intervals.
- ece is biased upward: its interval corrects for that, and reaches 0 for a calibrated network
  (see `regard.evaluation.intervals.calibration_interval`).
- If all or no images are correct, resamples do not vary. The interval is then Wilson's,
  where each group counts as one image, and macro F1 has the effective sample size of its
  unequal weights (Kish 1965: C² / Σ 1/n_c).
- One image (with groups: one group) has no interval: low and high are NaN. The same holds
  for a class with one image or group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from regard.evaluation import display
from regard.evaluation.intervals import (
    NAN,
    Estimate,
    calibration_interval,
    check_settings,
    draws,
    mean_of_losses,
    mean_of_shares,
    percentile,
    share_of_groups,
    wilson,
)
from regard.evaluation.predictions import BINS, Floats, Ints, Outcomes, Predictions, outcomes
from regard.evaluation.statistics import ratio
from regard.files import plural

_OF_RECALLS = ("balanced_accuracy", "macro_recall")
_OF_SHARES = {"balanced_accuracy": 0, "macro_recall": 0, "macro_precision": 1}  # in `_shares`
MACRO = ("balanced_accuracy", "macro_f1", "macro_precision", "macro_recall")  # over the classes


@dataclass(frozen=True)
class ClassResult:
    """The metrics of one class.

    count: number of its images.
    recall: share of its images that were predicted as this class; NaN if it has no image.
    precision: share of the images predicted as this class that belong to it; NaN if there are none.
    f1: harmonic mean of both; NaN if it has no image and was never predicted.
    """

    name: str
    count: int
    recall: Estimate
    precision: Estimate
    f1: Estimate

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        shares = {k: getattr(self, k).to_dict() for k in ("recall", "precision", "f1")}
        return {"name": self.name, "count": self.count, **shares}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of a network on n images; see the module's docstring for the definitions.

    n_groups: number of groups; None if images are independent.
    confusion: (C, C) sparse counts (scipy.sparse.csr_array), rows: true class, columns: predicted
        class. Only nonzero cells are stored: at most one per image.
    metrics: by name.
    per_class: one for each class, in the order of `classes`.
    confidence: of the intervals, 0 to 1.
    """

    n: int
    n_groups: int | None
    classes: list[str]
    confusion: csr_array
    metrics: dict[str, Estimate]
    per_class: list[ClassResult]
    confidence: float = 0.95

    def confusions(self, most: int | None = None) -> list[tuple[int, int, int]]:
        """The mistakes as (true class, predicted class, images), most frequent first."""
        cells = [(i, j, n) for i, j, n in self.cells() if i != j]
        return sorted(cells, key=lambda cell: -cell[2])[:most]

    def _repr_html_(self) -> str:
        """The metrics and the classes as tables, for notebooks; with many classes the worst 20."""
        groups = "" if self.n_groups is None else f" in {plural(self.n_groups, 'group')}"
        percent = f"{100 * self.confidence:g} % interval"
        metrics = [(name.replace("_", " "), *display.cell(e)) for name, e in self.metrics.items()]
        present = sorted((c for c in self.per_class if c.count), key=lambda c: c.recall.value)
        shown = present[:20] if len(present) > 20 else [c for c in self.per_class if c.count]
        classes = [
            (c.name, f"{c.count:,}", *display.cell(c.recall), display.cell(c.precision)[0])
            for c in shown
        ]
        of = f", the {len(shown)} of {len(present)} with the lowest recall"
        return display.table(
            f"{plural(self.n, 'image')}{groups}", ("metric", "value", percent), metrics
        ) + display.table(
            f"Classes{of if len(shown) < len(present) else ''}",
            ("class", "images", "recall", percent, "precision"), classes,
        )  # fmt: skip

    def cells(self) -> list[tuple[int, int, int]]:
        """The nonzero cells of the confusion matrix: (true, predicted, images)."""
        matrix = self.confusion.tocoo()
        return list(
            zip(matrix.row.tolist(), matrix.col.tolist(), matrix.data.tolist(), strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON: numbers, lists and strings, with None for NaN; O(images + classes).

        "per_class" lists the classes that have images or were predicted. "confusion" lists
        [true class, predicted class, images], indices into "classes", without zeros.
        """
        return {
            "n": self.n,
            "n_groups": self.n_groups,
            "confidence": self.confidence,
            "classes": list(self.classes),
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "per_class": [row.to_dict() for row in self.per_class if not np.isnan(row.f1.value)],
            "confusion": [list(cell) for cell in self.cells()],
        }


def evaluate(
    predictions: Predictions, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Evaluation:
    """Metrics of the predictions, with confidence intervals.

    See the module's docstring for the metrics and their intervals.

    Args:
        predictions: of at least one image.
        resamples: bootstrap samples, at least 2.
        seed: seed of the bootstrap.
        confidence: between 0 and 1.

    Raises:
        UsageError: resamples or confidence out of range.
    """
    check_settings(resamples, confidence)
    grouped = predictions.groups is not None
    present, images = _present_only(outcomes(predictions))
    n_classes, more_than_5 = len(present), len(predictions.classes) > 5
    measured = _measure(images, np.ones(len(predictions)), more_than_5, n_classes)
    drawn = _Resamples()
    for times in draws(images.n_units, resamples, seed):
        weights = times[images.unit]
        drawn.add(_measure(images, weights, more_than_5, n_classes, measured.shares))
    shares = _shares(images, n_classes)
    shape = (len(predictions.classes),) * 2
    ones = np.ones(len(predictions), dtype=np.int64)
    return Evaluation(
        n=len(predictions),
        n_groups=images.n_units if grouped else None,
        classes=list(predictions.classes),
        confusion=csr_array((ones, (present[images.true], present[images.predicted])), shape),
        metrics=_metrics(images, measured, drawn, shares, grouped, confidence),
        per_class=_per_class(predictions, present, shares, confidence),
        confidence=confidence,
    )


def _present_only(images: Outcomes) -> tuple[Ints, Outcomes]:
    """The classes that have images or were predicted, and the outcomes as indices into them."""
    both = np.concatenate([images.true, images.predicted])
    present, index = np.unique(both, return_inverse=True)
    n = len(images.true)
    return present, replace(images, true=index[:n], predicted=index[n:])


@dataclass(frozen=True, eq=False)
class _Measured:
    """The metrics except ece; its (15,) signed gaps; (3, C) recall, precision and Jaccard index."""

    values: dict[str, float]
    gaps: Floats
    shares: Floats


class ClassificationStatistics:
    """The values of `evaluate`'s metrics as a function of image weights."""

    def __init__(self, predictions: Predictions) -> None:
        self.images: Outcomes
        present, self.images = _present_only(outcomes(predictions))
        self.how: tuple[bool, int] = len(predictions.classes) > 5, len(present)
        ones = np.ones(len(predictions))
        self.shares: Floats = _measure(self.images, ones, *self.how).shares

    def __call__(self, weights: Floats) -> dict[str, float]:
        measured = _measure(self.images, weights, *self.how, self.shares)
        return {**measured.values, "ece": float(abs(measured.gaps).sum())}


class _Resamples:
    """Results collected from the bootstrap samples."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.gaps: list[Floats] = []

    def add(self, sample: _Measured) -> None:
        for name, value in sample.values.items():
            self.values.setdefault(name, []).append(value)
        self.gaps.append(sample.gaps)


def _measure(
    images: Outcomes, weights: Floats, top5: bool, n_classes: int, whole: Floats | None = None
) -> _Measured:
    """The metrics of the images, each counted `weights` times.

    whole: the `shares` of all images, used for classes that a sample lacks.
    """
    total = weights.sum()
    count = np.bincount(images.true, weights, n_classes)
    called = np.bincount(images.predicted, weights, n_classes)
    hits = np.bincount(images.true, weights * images.correct, n_classes)
    shares = np.stack([ratio(hits, of) for of in (count, called, count + called - hits)])
    if whole is not None:
        shares = np.where(count > 0, shares, whole)
    present, seen = ~np.isnan(shares[0]), ~np.isnan(shares[2])
    recall, (precision, jaccard) = shares[0, present], shares[1:, seen]
    values = {"top1": float(weights @ images.correct / total)}
    if top5:
        values["top5"] = float(weights @ images.correct5 / total)
    values["balanced_accuracy"] = float(recall.mean())
    values["macro_f1"] = float(_f1(jaccard).mean())
    values["macro_precision"] = float(np.nan_to_num(precision, nan=0.0).mean())
    values["macro_recall"] = values["balanced_accuracy"]
    values["nll"] = float(weights @ images.nll / total)
    gaps = np.bincount(images.bin, weights * images.overconfidence, BINS) / total
    return _Measured(values, gaps, shares)


def _f1(jaccard: Any) -> Any:
    return 2 * jaccard / (1 + jaccard)


_Shares = list[tuple[Floats, Ints]]
"""For each class: which of some images are right, and each image's unit."""


def _shares(images: Outcomes, n_classes: int) -> tuple[_Shares, _Shares, _Shares]:
    """Correct images among those of each class, those predicted as it, and either of the two."""

    def of(label: Ints, unit: Ints, right: Floats) -> _Shares:
        order = np.argsort(label, kind="stable")
        ends = np.searchsorted(label[order], np.arange(1, n_classes))
        parts = np.split(right[order], ends), np.split(unit[order], ends)
        return list(zip(*parts, strict=True))

    true, predicted, unit, correct = images.true, images.predicted, images.unit, images.correct
    wrong = correct == 0
    either = (
        np.concatenate(pair)
        for pair in ((true, predicted[wrong]), (unit, unit[wrong]), (correct, correct[wrong]))
    )
    return of(true, unit, correct), of(predicted, unit, correct), of(*either)


def _metrics(
    images: Outcomes,
    measured: _Measured,
    drawn: _Resamples,
    shares: tuple[_Shares, _Shares, _Shares],
    grouped: bool,
    confidence: float,
) -> dict[str, Estimate]:
    """The metrics with the intervals that the module describes."""
    n_units = images.n_units
    apart = sum(len(np.unique(unit)) for _, unit in shares[0]) == n_units
    present = np.array([len(np.unique(unit)) for _, unit in shares[0] if len(unit)])
    effective = min(int(len(present) ** 2 / (1 / present).sum()), n_units)

    def metric(name: str, value: float) -> Estimate:
        if n_units < 2:
            return Estimate(value, NAN, NAN)
        if name in ("top1", "top5"):
            right = images.correct if name == "top1" else images.correct5
            return _share(right, images.unit, grouped, confidence)
        samples = np.array(drawn.values[name])
        if name in _OF_SHARES:
            of_class = shares[_OF_SHARES[name]]
            of_recalls = name in _OF_RECALLS
            found = mean_over_classes(
                of_class, grouped, n_units, confidence,
                empty_are_zero=not of_recalls,  # a class that was never predicted
            )  # fmt: skip
            if value in (0.0, 1.0):  # one class's images tell of the others' too
                of_samples = wilson(value, effective, confidence)
            elif apart and of_recalls:
                return found
            else:
                of_samples = percentile(value, samples, confidence, n_units)
            # what images of several classes in one group have in common is in the samples alone
            low, high = min(found.low, of_samples.low), max(found.high, of_samples.high)
            return Estimate(value, low, high)
        if name in MACRO and value in (0.0, 1.0):
            return wilson(value, effective, confidence)
        if name == "nll":
            return mean_of_losses(value, samples, confidence, n_units)
        return percentile(value, samples, confidence, n_units)

    metrics = {name: metric(name, value) for name, value in measured.values.items()}
    ece = calibration_interval(measured.gaps, np.stack(drawn.gaps), confidence)
    metrics["ece"] = ece if n_units > 1 else Estimate(ece.value, NAN, NAN)
    return metrics


def _share(right: Floats, unit: Ints, grouped: bool, confidence: float) -> Estimate:
    """A share with Wilson's interval; NaN if there are no images."""
    if not len(right):
        return Estimate(NAN, NAN, NAN)
    if grouped:
        return share_of_groups(right, unit, confidence)
    return wilson(float(right.mean()), len(right), confidence)


def mean_over_classes(
    of_class: Sequence[tuple[Floats, Ints]],
    grouped: bool,
    n_units: int,
    confidence: float,
    *,
    empty_are_zero: bool = False,
) -> Estimate:
    """The mean of the classes' shares as if they were independent: `mean_of_shares`.

    Args:
        of_class: for each class, how far each of its images is right (0 to 1), and its unit.
        grouped: whether units are groups of images.
        n_units: of all images, at least 2.
        confidence: between 0 and 1.
        empty_are_zero: a class without images counts as 0 instead of being left out.
    """
    parts = []
    for right, unit in of_class:
        if not len(right):
            if empty_are_zero:
                parts.append((Estimate(0.0, 0.0, 0.0), 0.0))
            continue
        whole = np.unique(unit, return_inverse=True)[1] if grouped else np.arange(len(unit))
        k, share = int(whole.max()) + 1, _share(right, unit, grouped, confidence)
        spread = np.square(np.bincount(whole, right - share.value)).sum() / len(right) ** 2
        parts.append((share, float(spread) * k / (k - 1) if k > 1 else NAN))
    return mean_of_shares(parts, n_units, confidence)


def _per_class(
    predictions: Predictions,
    present: Ints,
    shares: tuple[_Shares, _Shares, _Shares],
    confidence: float,
) -> list[ClassResult]:
    grouped, nothing = predictions.groups is not None, Estimate(NAN, NAN, NAN)
    sizes = np.bincount(predictions.labels, minlength=len(predictions.classes)).tolist()
    results = [ClassResult(name, 0, nothing, nothing, nothing) for name in predictions.classes]
    for c, *kinds in zip(present.tolist(), *shares, strict=True):
        recall, precision, jaccard = (_share(*kind, grouped, confidence) for kind in kinds)
        f1 = Estimate(*(_f1(number) for number in (jaccard.value, jaccard.low, jaccard.high)))
        results[c] = ClassResult(predictions.classes[c], sizes[c], recall, precision, f1)
    return results
