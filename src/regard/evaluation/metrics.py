"""Metrics of a network's predictions, each with its interval."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.evaluation.intervals import (
    NAN,
    Estimate,
    calibration,
    check_settings,
    draws,
    percentile,
    wilson,
)
from regard.evaluation.predictions import BINS, Floats, Ints, Outcomes, Predictions, outcomes

_MACRO = ("balanced_accuracy", "macro_f1", "macro_precision", "macro_recall")


@dataclass(frozen=True)
class ClassResult:
    """One class.

    count: of its images.
    recall: the share of its images that were called so; NaN where it has no image.
    precision: the share of images called so that are; NaN where none was called so.
    f1: their harmonic mean; NaN where it has no image and none was called so.
    """

    name: str
    count: int
    recall: Estimate
    precision: Estimate
    f1: Estimate


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a network does on n images; see `evaluate` for what each number means.

    n_groups: of groups that the images come in; None where each image stands by itself.
    confusion: (C, C) counts, a row for each true class, a column for each predicted one.
    metrics: by name.
    confidence: of the intervals, 0 to 1.
    """

    n: int
    n_groups: int | None
    classes: list[str]
    confusion: Ints
    metrics: dict[str, Estimate]
    per_class: list[ClassResult]
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, lists and names; None where a number is NaN."""
        return {
            "n": self.n,
            "n_groups": self.n_groups,
            "confidence": self.confidence,
            "classes": list(self.classes),
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "per_class": [
                {
                    "name": row.name,
                    "count": row.count,
                    "recall": row.recall.to_dict(),
                    "precision": row.precision.to_dict(),
                    "f1": row.f1.to_dict(),
                }
                for row in self.per_class
            ],
            "confusion": self.confusion.tolist(),
        }


def evaluate(
    predictions: Predictions, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> Evaluation:
    """Metrics of the predictions, with intervals.

    The metrics, all but `nll` between 0 and 1:

    - top1, top5: the share of images whose true class is the first, or among the first five;
      of equal probabilities the earlier class comes first. top5 only with more than 5 classes.
    - balanced_accuracy, macro_recall (the same number under its two names), macro_precision,
      macro_f1: means over the classes that have images, as scikit-learn's
      balanced_accuracy_score does; a class that was never predicted counts as precision 0.
    - ece: the expected calibration error, 15 bins of equal width of the top probability
      (Guo et al., ICML 2017, arXiv 1706.04599): the mean of |accuracy - confidence| over the
      bins, weighted by their images.
    - nll: the mean of -ln p of the true class, nats; a p of 0 counts as 2.2e-16.

    The intervals:

    - Without groups, top1, top5 and each class's recall, precision and F1 have Wilson's
      interval, which keeps its coverage near 0 and 1 and for few images (Brown, Cai & DasGupta,
      Statistical Science 2001). F1 = 2J / (1 + J), where J is the share of right ones among
      the images that are of the class or were called so; the interval is J's, so converted.
    - The others are percentiles of `resamples` bootstrap samples of the images. A class that a
      sample misses is left out of its means.
    - With groups all are percentiles of samples of whole groups (the cluster bootstrap). With
      fewer than some 20 groups these are too narrow.
    - ece is biased upward: its interval allows for that, and reaches 0 for a calibrated network
      (see `regard.evaluation.intervals.calibration`).
    - Where all or none are right no resample differs, though more images might. The interval
      is then Wilson's: each group counts as one image, and a mean over classes has as many
      images as its unequal weights are worth (Kish 1965: C² / Σ 1/n_c).
    - One group, or for a class one group that has it, tells nothing: low and high are NaN.

    Args:
        predictions: of at least one image.
        resamples: bootstrap samples, at least 2.
        seed: of the samples; the same gives the same intervals.
        confidence: of the intervals, between 0 and 1.

    Raises:
        UsageError: resamples or a confidence out of range.
    """
    check_settings(resamples, confidence)
    images, classes = outcomes(predictions), predictions.classes
    grouped = predictions.groups is not None
    found = _measure(images, np.ones(len(predictions)), len(classes))
    drawn = [
        # the classes' shares are large, and only groups need them
        _measure(images, times[images.unit], len(classes), keep_shares=grouped)
        for times in draws(images.n_units, resamples, seed)
    ]
    units = _units(images, len(classes))
    confusion = np.bincount(
        images.true * len(classes) + images.predicted, minlength=len(classes) ** 2
    ).reshape(len(classes), len(classes))
    drawn_shares = np.stack([sample.shares for sample in drawn], axis=-1) if grouped else None
    return Evaluation(
        n=len(predictions),
        n_groups=images.n_units if grouped else None,
        classes=list(classes),
        confusion=confusion,
        metrics=_metrics(found, drawn, images.n_units, units[0], grouped, confidence),
        per_class=_per_class(classes, confusion, found.shares, units, drawn_shares, confidence),
        confidence=confidence,
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """The metrics but for ece; (15,) the gaps whose sum of sizes it is; (3, C) the classes'
    recall, precision and J (see `evaluate`), or (3, 0) where they were not to be kept."""

    values: dict[str, float]
    gaps: Floats
    shares: Floats


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """part / whole, NaN for 0 / 0."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _measure(
    images: Outcomes, weights: Floats, n_classes: int, *, keep_shares: bool = True
) -> _Measured:
    """The metrics where each image counts `weights` times."""
    total = weights.sum()
    count = np.bincount(images.true, weights, n_classes)
    called = np.bincount(images.predicted, weights, n_classes)
    hits = np.bincount(images.true, weights * images.correct, n_classes)
    shares = np.stack([_ratio(hits, whole) for whole in (count, called, count + called - hits)])
    recall, precision, jaccard = shares[:, count > 0]
    values = {"top1": float(weights @ images.correct / total)}
    if n_classes > 5:
        values["top5"] = float(weights @ images.correct5 / total)
    values["balanced_accuracy"] = float(recall.mean())
    values["macro_f1"] = float(_f1(jaccard).mean())
    values["macro_precision"] = float(np.nan_to_num(precision, nan=0.0).mean())
    values["macro_recall"] = values["balanced_accuracy"]
    values["nll"] = float(weights @ images.nll / total)
    gaps = np.bincount(images.bin, weights * images.overconfidence, BINS) / total
    return _Measured(values, gaps, shares if keep_shares else np.empty((3, 0)))


def _f1(jaccard: Any) -> Any:
    return 2 * jaccard / (1 + jaccard)


def _units(images: Outcomes, n_classes: int) -> Ints:
    """(3, C) images, or groups, that are of the class, were called so, or either."""

    def of(*labels: Ints) -> Ints:
        pairs = np.concatenate([label * images.n_units + images.unit for label in labels])
        return np.bincount(np.unique(pairs) // images.n_units, minlength=n_classes)

    true, predicted = images.true, images.predicted
    return np.stack([of(true), of(predicted), of(true, predicted)])


def _metrics(
    found: _Measured,
    drawn: list[_Measured],
    n_units: int,
    class_units: Ints,
    grouped: bool,
    confidence: float,
) -> dict[str, Estimate]:
    """The metrics' intervals, each of the kind that `evaluate` says."""
    present = class_units[class_units > 0]
    worth = min(int(len(present) ** 2 / (1 / present).sum()), n_units)

    def metric(name: str, value: float) -> Estimate:
        extreme = value in (0.0, 1.0)
        if name in ("top1", "top5") and (extreme or not grouped):
            return wilson(value, n_units, confidence)
        if name in _MACRO and extreme:
            return wilson(value, worth, confidence)
        if n_units < 2:
            return Estimate(value, NAN, NAN)
        return percentile(value, np.array([sample.values[name] for sample in drawn]), confidence)

    metrics = {name: metric(name, value) for name, value in found.values.items()}
    ece = calibration(found.gaps, np.stack([sample.gaps for sample in drawn]), confidence)
    metrics["ece"] = ece if n_units > 1 else Estimate(ece.value, NAN, NAN)
    return metrics


def _per_class(
    classes: list[str],
    confusion: Ints,
    shares: Floats,
    units: Ints,
    drawn: Floats | None,
    confidence: float,
) -> list[ClassResult]:
    def estimate(kind: int, c: int) -> Estimate:
        value, n = float(shares[kind, c]), int(units[kind, c])
        if n == 0:
            return Estimate(NAN, NAN, NAN)
        if drawn is None or value in (0.0, 1.0):
            return wilson(value, n, confidence)
        return percentile(value, drawn[kind, c], confidence) if n > 1 else Estimate(value, NAN, NAN)

    results = []
    for c, name in enumerate(classes):
        recall, precision, jaccard = (estimate(kind, c) for kind in range(3))
        f1 = Estimate(*(_f1(number) for number in (jaccard.value, jaccard.low, jaccard.high)))
        results.append(ClassResult(name, int(confusion[c].sum()), recall, precision, f1))
    return results
