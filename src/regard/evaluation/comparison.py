"""The accuracy of two networks on the same images, with exact tests.

The interval of the difference is from the paired bootstrap over images or, with groups, whole
groups: at each end the wider of expanded percentiles and Student's t. If every image (or group)
has the same difference, resamples do not vary; the interval then reaches as far as Wilson's for
no success in as many images (groups). With one group low and high are NaN.

The p-value is two-sided. Without groups it is from McNemar's exact test: if the networks
are equal, an image that only one of them classifies correctly is as likely to be a's as b's. With
groups, the images of a group are not independent; then the difference of each group as a whole has
either sign with the same probability, and the p-value is exact over all signs. With one image
per group this equals McNemar's test.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation import display
from regard.evaluation.intervals import (
    NAN,
    Estimate,
    bootstrap_test,
    check_settings,
    draws,
    finite_or_none,
    reach_of_none,
)
from regard.evaluation.predictions import Floats, Ints, Predictions
from regard.files import plural


@dataclass(frozen=True)
class Comparison:
    """Top-1 accuracy of two networks, a and b, on the same n images.

    n_groups: number of groups; None if images are independent.
    top1_a, top1_b: accuracies, 0 to 1.
    difference: a's accuracy minus b's, with its interval; above 0 if a is better.
    only_a, only_b: images that only a, or only b, classifies correctly. The others say nothing
        about which is better.
    p_value: probability of a difference at least as large if both were equal; see `compare`.
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

    def _repr_html_(self) -> str:
        """The comparison as a table, for notebooks."""
        groups = "" if self.n_groups is None else f" in {plural(self.n_groups, 'group')}"
        value, interval = display.cell(self.difference)
        rows = [
            ("accuracy of a", f"{self.top1_a:.3f}", f"{self.only_a:,} right by a alone"),
            ("accuracy of b", f"{self.top1_b:.3f}", f"{self.only_b:,} right by b alone"),
            ("a - b", value, f"{100 * self.confidence:g} % interval {interval}"),
            ("p-value", f"{self.p_value:.3g}", ""),
        ]
        return display.table(f"{plural(self.n, 'image')}{groups}", ("", "", ""), rows)

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON, with None for NaN."""
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

    See the module's docstring for the interval and the test.

    Args:
        a, b: predictions; groups may be given with either or both.
        resamples, seed, confidence: as in `evaluate`.

    Raises:
        UsageError: images, classes or groups differ; resamples or confidence out of range.
    """
    check_settings(resamples, confidence)
    groups = common_groups(a, b)
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
        p_value=exact_test(difference, None if groups is None else unit),
        confidence=confidence,
    )


def common_groups(a: Predictions, b: Predictions) -> Any:
    """The groups of two networks' predictions for the same images, or None.

    Raises:
        UsageError: classes, images, labels or groups differ.
    """
    if a.classes != b.classes:
        raise UsageError(f"the classes differ: {_first(a.classes, b.classes)}")
    if len(a) != len(b):
        raise UsageError(
            f"{plural(len(a), 'image')} against {len(b):,}: the same images are needed"
        )
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
    """The first difference between two lists."""
    if len(a) != len(b):
        return f"{len(a)} against {len(b)}"
    i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"{a[i]!r} against {b[i]!r} at position {i}"


def _difference(
    sums: Floats, sizes: Ints, difference: Ints, resamples: int, seed: int, confidence: float
) -> Estimate:
    """The mean difference with its interval; sums and sizes are those of the units."""
    value, n_units = float(difference.mean()), len(sums)
    if n_units < 2:
        return Estimate(value, NAN, NAN)
    drawn = np.array([times @ sums / (times @ sizes) for times in draws(n_units, resamples, seed)])
    if np.ptp(drawn) < 1e-12:  # but for rounding
        reach = reach_of_none(n_units, confidence)
        interval = Estimate(value, value - reach, value + reach)
    else:
        interval, _ = bootstrap_test(value, drawn, confidence, n_units)
    return Estimate(value, max(interval.low, -1.0), min(interval.high, 1.0))


def exact_test(difference: Ints, unit: Ints | None) -> float:
    """The p-value of McNemar's exact test, or with groups that of the exact sign test.

    Args:
        difference: (N,) -1, 0 or 1 for each image.
        unit: (N,) whole numbers, its group; None: images are independent.
    """
    if unit is None:
        return _mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    return _signs(np.bincount(unit, difference).astype(np.int64))


def name_of_test(grouped: bool) -> str:
    """What `exact_test` is called."""
    return "exact sign test of groups" if grouped else "exact McNemar test"


def _mcnemar(only_a: int, only_b: int) -> float:
    from scipy.stats import binomtest  # takes half a second to import

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def _signs(differences: Ints) -> float:
    """Exact two-sided p-value of the sum of (groups,) differences under random signs."""
    from scipy.stats import binom

    sizes, counts = np.unique(abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # probability of each sum of the positive ones
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        step = np.zeros(size * count + 1)
        step[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, step)
    totals = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(float(chances[abs(totals) >= abs(differences.sum())].sum()), 1.0)
