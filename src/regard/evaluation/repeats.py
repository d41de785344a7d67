"""Comparison of networks trained several times, over images and seeds together.

Two trainings of one network differ, and other test images would give another difference: both
are chance, and an interval that accounts for only one of them is too narrow. Each image's (or
group's) contribution to the difference of seed s is modeled as

    D[s, g] = effect + training[s] + image[g] + rest[s, g]

a two-way random-effects layout (Searle, Casella, McCulloch, *Variance Components*, 1992), with
training[s] drawn anew in every fold if there are folds. The variance of the mean is
V = V_seeds + V_images - V_rest, each estimated from its mean square, with Satterthwaite's (1946)
degrees of freedom. With one seed the variance of training can't be estimated: with folds the
corrected resampled t-test of Nadeau and Bengio (*Machine Learning* 52, 2003) is used instead;
with neither there is an interval over images, but no claim about the networks.

If nothing varies, such as for two networks with equal predictions in every seed, the interval of a
share reaches as far as Wilson's for none of as many images (or groups).

Folds share training images, and no estimator of that covariance is unbiased (Bengio and
Grandvalet, JMLR 5, 2004); a mean over folds is therefore never treated as independent draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.errors import UsageError
from regard.evaluation.intervals import (
    NAN,
    Estimate,
    detectable_factor,
    finite_or_none,
    quantile,
    reach_of_none,
)
from regard.evaluation.metrics import mean_over_classes
from regard.evaluation.paired_shares import PairedShare, mean_of_differences
from regard.evaluation.predictions import Floats, Ints, Predictions, outcomes

METRICS = ("accuracy", "balanced accuracy", "log loss")
LOWER_IS_BETTER = ("log loss",)
_TRUST = 0.5  # fraction used of Satterthwaite's degrees of freedom beyond those of the seeds


@dataclass(frozen=True, kw_only=True)
class RepeatedDifference:
    """How much better network a is than network b, over all seeds and images.

    Attributes:
        metric: one of METRICS.
        value: the mean difference, a minus b.
        low, high: the interval; NaN if there is none.
        p_value: two-sided; NaN if nothing can be claimed (one training of each).
        each: the difference for each seed.
        n_units: images, or groups of images.
        seeds, folds: each network was trained seeds x folds times.
        df: degrees of freedom of the interval.
        seed_variance: variance of the difference due to training, for the same images.
        image_variance: variance of the mean due to the choice of images.
        reach: half-width of the interval if nothing varies; NaN for log losses.
        confidence: of the interval.
    """

    metric: str
    value: float
    low: float
    high: float
    p_value: float
    each: tuple[float, ...]
    n_units: int
    seeds: int
    folds: int
    df: float
    seed_variance: float
    image_variance: float
    reach: float = NAN
    confidence: float = 0.95

    @property
    def standard_error(self) -> float:
        """Standard error of the mean difference, from seeds and images together."""
        return math.sqrt(self.seed_variance / self.seeds + self.image_variance)

    @property
    def minimal_effect(self) -> float:
        """The true difference that a study like this one detects with a power of 80 %.

        Infinite if no possible difference would be detected; NaN if it is not known.
        """
        if not self.claims:
            return NAN
        error = self.standard_error
        if _is_none(error**2):
            return self.reach
        found = detectable_factor(round(self.df, 1), self.confidence) * error
        return found if found <= _most(self.metric) else math.inf

    @property
    def claims(self) -> bool:
        """Whether this design can claim anything: several trainings of each network."""
        return self.seeds > 1 or self.folds > 1

    def seeds_needed(self, most: int = 100) -> int | None:
        """Seeds needed to show a difference of this size; None: more than `most`, or more images.

        Assumes that mean and variances stay the same.
        """
        if self.image_variance > 0 and abs(self.value) <= 2 * math.sqrt(self.image_variance):
            return None
        for seeds in range(max(2, self.seeds), most + 1):
            df = self.folds * (seeds - 1)
            half = _t((1 + self.confidence) / 2, df) * math.sqrt(
                self.seed_variance / seeds + self.image_variance
            )
            if abs(self.value) > half:
                return seeds
        return None

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON, with None for NaN."""
        return {
            "metric": self.metric,
            "difference": {k: finite_or_none(getattr(self, k)) for k in ("value", "low", "high")},
            "p_value": finite_or_none(self.p_value),
            "each": list(self.each),
            "units": self.n_units,
            "seeds": self.seeds,
            "folds": self.folds,
            "minimal_effect": finite_or_none(self.minimal_effect),
            "seeds_needed": self.seeds_needed() if self.claims else None,
        }


def repeated_difference(
    a: Sequence[Predictions],
    b: Sequence[Predictions],
    *,
    metric: str = "accuracy",
    folds: Ints | None = None,
    trained: float | None = None,
    confidence: float = 0.95,
) -> RepeatedDifference:
    """Compares two networks that were trained with the same seeds on the same splits.

    Args:
        a, b: predictions for each seed, all on the same images in the same order; with folds,
            each seed's predictions for all folds together.
        metric: one of METRICS.
        folds: (N,) the fold in which each image was tested; None: one split.
        trained: mean number of images that trained the network of a fold, which is smaller if
            some of the others validated it; default: all images of the other folds.
        confidence: of the interval.

    Raises:
        UsageError: an unknown metric, or seeds or images that differ.
    """
    _check_metric(metric)
    if len(a) != len(b) or not a:
        raise UsageError(f"{len(a)} seeds against {len(b)}: the same seeds are needed")
    _check_images([*a, *b])
    pairs = zip(a, b, strict=True)
    parts = np.stack([contributions(p, metric) - contributions(q, metric) for p, q in pairs])
    d, fold = _by_unit(parts, a[0], folds)
    weight, share = _weight(a[0], metric), trained and trained / len(a[0])
    least = _variance_of_recalls(a, b, folds) if metric == "balanced accuracy" else 0.0
    return _estimate(d, fold, metric, confidence, weight, share, least)


def _variance_of_recalls(
    a: Sequence[Predictions], b: Sequence[Predictions], folds: Ints | None
) -> float:
    """The variance of a difference of balanced accuracies due to images: `mean_of_differences`.

    In samples, a class of few images that both networks find completely does not vary.
    """
    labels = a[0].labels
    fold = np.zeros(len(labels), dtype=np.int64) if folds is None else np.asarray(folds)
    unit, n_units = _units(a[0], fold)
    if n_units < 2:
        return 0.0
    right, other = (np.mean([outcomes(p).correct for p in each], axis=0) for each in (a, b))
    kinds, grouped = [labels == c for c in np.unique(labels)], a[0].groups is not None
    shares = [PairedShare.of((right - other)[k], unit[k], grouped=grouped) for k in kinds]
    found = mean_of_differences(shares, n_units, 0.95)
    return float(((found.high - found.low) / 2 / quantile(0.95, n_units - 1)) ** 2)


def repeated_value(
    seeds: Sequence[Predictions],
    *,
    metric: str = "accuracy",
    folds: Ints | None = None,
    trained: float | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """The mean of a metric over seeds, with its interval over seeds and images together.

    With one seed (and no folds) the interval is over images alone.

    Args:
        seeds: predictions for each seed, as for `repeated_difference`.
        metric, folds, trained, confidence: as for `repeated_difference`.

    Raises:
        UsageError: an unknown metric, no seed, or images that differ.
    """
    _check_metric(metric)
    if not seeds:
        raise UsageError("no seed: at least one is needed")
    _check_images(seeds)
    parts = np.stack([contributions(p, metric) for p in seeds])
    first = seeds[0]
    d, fold = _by_unit(parts, first, folds)
    weight = _weight(first, metric)
    found = _estimate(d, fold, metric, confidence, weight, trained and trained / len(first))
    low, high = max(found.low, 0.0), found.high
    if metric == "balanced accuracy" and found.n_units > 1:  # a rare class may not vary at all
        of_images = _mean_recall(seeds, folds, confidence)
        low, high = min(low, of_images.low), max(high, of_images.high)
    return Estimate(found.value, low, high)


def _mean_recall(seeds: Sequence[Predictions], folds: Ints | None, confidence: float) -> Estimate:
    """Balanced accuracy with its interval over images, of which each is right in some seeds."""
    labels = seeds[0].labels
    fold = np.zeros(len(labels), dtype=np.int64) if folds is None else np.asarray(folds)
    unit, n_units = _units(seeds[0], fold)
    right = np.mean([outcomes(p).correct for p in seeds], axis=0)
    of_class = [(right[labels == c], unit[labels == c]) for c in np.unique(labels)]
    return mean_over_classes(of_class, seeds[0].groups is not None, n_units, confidence)


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise UsageError(f"metric={metric!r}: choose one of {', '.join(METRICS)}")


def _check_images(predictions: Sequence[Predictions]) -> None:
    first = predictions[0]
    for p in predictions:
        if not np.array_equal(p.labels, first.labels) or p.paths != first.paths:
            raise UsageError("the images of the seeds differ: the same test images are needed")


def _by_unit(parts: Floats, like: Predictions, folds: Ints | None) -> tuple[Floats, Ints]:
    """(S, N) -> (S, G) each unit's contribution, whose mean is that of the images; and its fold.

    The mean over images is the ratio of the units' sums to their sizes: a unit's contribution is
    the mean plus its influence, so that units that differ only in size have the same contribution.
    """
    fold = np.zeros(len(like), dtype=np.int64) if folds is None else np.asarray(folds)
    unit, n_units = _units(like, fold)
    per_unit = np.zeros((len(parts), n_units))
    for s, row in enumerate(parts):
        mean = row.mean()
        per_unit[s] = mean + np.bincount(unit, row - mean, n_units) * n_units / len(fold)
    fold_of_unit = np.zeros(n_units, dtype=np.int64)
    fold_of_unit[unit] = np.unique(fold, return_inverse=True)[1]
    return per_unit, fold_of_unit


def _units(predictions: Predictions, fold: Ints) -> tuple[Ints, int]:
    """(N,) the unit of each image, and their number; a group in two folds counts twice."""
    if predictions.groups is None:
        return np.arange(len(fold)), len(fold)
    names = [f"{k}/{g}" for k, g in zip(fold.tolist(), predictions.groups.tolist(), strict=True)]
    found, unit = np.unique(names, return_inverse=True)
    return unit, len(found)


def contributions(predictions: Predictions, metric: str) -> Floats:
    """(N,) values whose mean is the metric, each the contribution of an image.

    To first order: an image's value is the metric plus the image's influence on it.
    """
    each = outcomes(predictions)
    if metric == "log loss":
        return each.nll
    if metric == "accuracy":
        return each.correct
    counts = np.bincount(each.true, minlength=len(predictions.classes))
    present = int((counts > 0).sum())
    recall = np.bincount(each.true, each.correct, len(counts)) / np.maximum(counts, 1)
    balanced = recall.sum() / present
    share = len(each.true) / (present * counts[each.true])
    return balanced + (each.correct - recall[each.true]) * share


def _weight(like: Predictions, metric: str) -> float:
    """The effective fraction of the images: 1, or less for a mean of recalls of unequal size."""
    if metric != "balanced accuracy":
        return 1.0
    counts = np.bincount(like.labels)
    counts = counts[counts > 0]
    return float(len(counts) ** 2 / (1 / counts).sum() / len(like))


def _most(metric: str) -> float:
    return 1.0 if metric != "log loss" else math.inf  # shares differ by at most 1


def _is_none(variance: float) -> bool:
    return variance < 1e-20  # rounding


def _estimate(
    d: Floats,
    fold: Ints,
    metric: str,
    confidence: float,
    weight: float = 1.0,
    trained: float | None = None,
    least: float = 0.0,
) -> RepeatedDifference:
    """The result from D[s, g], (S, G), and each unit's fold, (G,).

    weight: from `_weight`.
    least: of the variance due to images.
    trained: images that trained the network of a fold, as a share of those that all folds tested.
    """
    seeds, units = d.shape
    folds = int(fold.max()) + 1
    value, each = float(d.mean()), d.mean(axis=1)
    images = max(float(d.mean(axis=0).var(ddof=1)) / units, least) if units > 1 else NAN
    if seeds > 1:
        seed_part, rest, df_seed = _parts(d, fold)
        image_part = max(images - rest / seeds, least)
        total = seed_part / seeds + image_part
        terms = (seed_part / seeds) ** 2 / df_seed + image_part**2 / max(units - 1, 1)
        df = total**2 / terms if terms > 0 else math.inf
        # with few seeds Satterthwaite's df are too many: 6 % false claims at 3 seeds, by simulation
        df = min(df, df_seed + _TRUST * max(df - df_seed, 0.0))
    elif folds > 1:
        means = np.array([d[0, fold == k].mean() for k in range(folds)])
        # Nadeau and Bengio: 1/K + test images / training images
        ratio = 1 / (folds * trained) if trained else 1 / (folds - 1)
        total = float(means.var(ddof=1)) * (1 / folds + ratio)
        total = max(total, images)
        seed_part, image_part, df = max(total - images, 0.0), images, folds - 1
    else:
        seed_part, image_part, total, df = 0.0, images, images, units - 1
    half = _t((1 + confidence) / 2, df) * math.sqrt(total) if df > 0 else NAN
    most = _most(metric)
    reach = reach_of_none(weight * units, confidence) if math.isfinite(most) else NAN
    if _is_none(total):
        half = reach
    elif least and _is_none(float(np.square(d - value).sum())):
        half = max(half, reach)
    claims = seeds > 1 or folds > 1
    return RepeatedDifference(
        metric=metric, value=value, low=max(value - half, -most), high=min(value + half, most),
        p_value=_p(value, total, df, units) if claims else NAN, each=tuple(map(float, each)),
        n_units=units, seeds=seeds, folds=folds, df=df, seed_variance=seed_part,
        image_variance=image_part, reach=reach, confidence=confidence,
    )  # fmt: skip


def _parts(d: Floats, fold: Ints) -> tuple[float, float, float]:
    """Variance between seeds' means, the part of it due to the rest, and its degrees of freedom.

    Computed within each fold, as every fold of every seed is trained separately.
    """
    seeds, units = d.shape
    variances, rests = [], []
    for k in range(int(fold.max()) + 1):
        part = d[:, fold == k]
        weight = (part.shape[1] / units) ** 2
        means = part.mean(axis=1, keepdims=True)
        variances.append(weight * float(means.var(ddof=1)))
        residual = part - means - part.mean(axis=0, keepdims=True) + part.mean()
        freedom = max((seeds - 1) * (part.shape[1] - 1), 1)
        rests.append(weight * float((residual**2).sum()) / freedom / part.shape[1])
    found = np.array(variances)
    total, squares = float(found.sum()), float((found**2).sum())
    df = (seeds - 1) * (total**2 / squares if squares > 0 else len(found))
    # seeds that agree by chance must not push the variance below that of the rest
    return max(total, float(np.sum(rests))), float(np.sum(rests)), df


def _t(share: float, df: float) -> float:
    from scipy.stats import norm, t  # takes half a second to import

    return float(norm.ppf(share) if math.isinf(df) else t.ppf(share, df))


def _p(value: float, variance: float, df: float, units: int) -> float:
    from scipy.stats import t

    if _is_none(variance):  # all units equal: the exact sign test
        return 1.0 if value == 0 else min(1.0, 2 * 0.5**units)
    return float(2 * t.sf(abs(value) / math.sqrt(variance), df))
