"""Two networks on the same images."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation.intervals import (
    NAN,
    Estimate,
    check_settings,
    draws,
    finite_or_none,
    percentile,
    wilson,
)
from regard.evaluation.predictions import Floats, Ints, Predictions


@dataclass(frozen=True)
class Comparison:
    """Top-1 accuracy of two networks, a and b, on the same n images.

    n_groups: of groups that the images come in; None where each image stands by itself.
    top1_a, top1_b: shares, 0 to 1.
    difference: a's less b's, with its interval; above 0 where a is better.
    only_a, only_b: images that only a, or only b, gets right; all others say nothing of which
        is better.
    p_value: of equal networks giving a difference at least as large; see `compare`.
    confidence: of the interval, 0 to 1.
    """

    n: int
    n_groups: int | None
    top1_a: float
    top1_b: float
    difference: Estimate
    only_a: int
    only_b: int
    p_value: float
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None where a number is NaN."""
        return {
            "n": self.n,
            "n_groups": self.n_groups,
            "confidence": self.confidence,
            "top1_a": self.top1_a,
            "top1_b": self.top1_b,
            "difference": self.difference.to_dict(),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "p_value": finite_or_none(self.p_value),
        }


def compare(
    a: Predictions,
    b: Predictions,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Compares two networks on the same images, in the same order.

    The interval of the difference is the percentile bootstrap's, of images or, with groups, of
    whole groups; each resample has both networks on the same images. Where every image has the
    same difference no resample differs, and the interval reaches as far as Wilson's of none
    among as many images (groups). With one group low and high are NaN.

    The p-value, two-sided, is McNemar's exact one: of the images that only one network gets
    right, each is as likely a's as b's if the networks are equal. With groups the images of a
    group are not independent; then each group's difference as a whole is as likely of either
    sign, and the p-value is exact over all signs. Groups of one image each give McNemar's.

    Args:
        a, b: predictions; groups may be given with either or both.
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: images, classes or groups differ; resamples or confidence out of range.
    """
    check_settings(resamples, confidence)
    groups = _common_groups(a, b)
    right_a, right_b = (p.probabilities.argmax(axis=1) == p.labels for p in (a, b))
    difference = right_a.astype(np.int64) - right_b  # (N,) -1, 0 or 1
    n = len(difference)
    unit, n_units = np.arange(n), n
    if groups is not None:
        names, unit = np.unique(groups, return_inverse=True)
        n_units = len(names)
    # whole numbers, exact in float64
    sums = np.bincount(unit, difference, n_units).astype(np.float64)
    sizes = np.bincount(unit, minlength=n_units)
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    return Comparison(
        n=n,
        n_groups=None if groups is None else n_units,
        top1_a=float(right_a.mean()),
        top1_b=float(right_b.mean()),
        difference=_difference(sums, sizes, difference, resamples, seed, confidence),
        only_a=only_a,
        only_b=only_b,
        p_value=_mcnemar(only_a, only_b) if groups is None else _signs(sums.astype(np.int64)),
        confidence=confidence,
    )


def _common_groups(a: Predictions, b: Predictions) -> Any:
    """The groups of both, once it is sure that the images are the same."""
    if a.classes != b.classes:
        raise UsageError(f"the classes differ: {_first(a.classes, b.classes)}")
    if len(a) != len(b):
        raise UsageError(f"{len(a)} images against {len(b)}: the same ones are needed")
    if a.paths is not None and b.paths is not None and list(a.paths) != list(b.paths):
        raise UsageError(f"the images differ: {_first(a.paths, b.paths)}")
    if not np.array_equal(a.labels, b.labels):
        raise UsageError(f"the labels differ: {_first(a.labels.tolist(), b.labels.tolist())}")
    if a.groups is None or b.groups is None:
        return b.groups if a.groups is None else a.groups
    if not np.array_equal(a.groups, b.groups):
        raise UsageError(f"the groups differ: {_first(a.groups.tolist(), b.groups.tolist())}")
    return a.groups


def _first(a: list[Any], b: list[Any]) -> str:
    """Where two lists differ, in words."""
    if len(a) != len(b):
        return f"{len(a)} against {len(b)}"
    i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"{a[i]!r} against {b[i]!r} at place {i}"


def _difference(
    sums: Floats, sizes: Ints, difference: Ints, resamples: int, seed: int, confidence: float
) -> Estimate:
    """The mean difference, with its interval; sums and sizes are of the units."""
    value, n_units = float(difference.mean()), len(sums)
    if difference.min() == difference.max():
        reach = wilson(0.0, n_units, confidence).high
        return Estimate(value, max(value - reach, -1.0), min(value + reach, 1.0))
    if n_units < 2:
        return Estimate(value, NAN, NAN)
    drawn = [times @ sums / (times @ sizes) for times in draws(n_units, resamples, seed)]
    return percentile(value, np.array(drawn), confidence)


def _mcnemar(only_a: int, only_b: int) -> float:
    # takes half a second to import
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _signs(differences: Ints) -> float:
    """Exact two-sided p-value of Σ differences, (groups,), if each has either sign alike."""
    from scipy.stats import binom

    sizes, counts = np.unique(abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # of each Σ of the positive ones, 0 to Σ |differences|
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        step = np.zeros(size * count + 1)
        step[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, step)
    totals = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(float(chances[abs(totals) >= abs(differences.sum())].sum()), 1.0)
