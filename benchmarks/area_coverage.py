"""How often intervals of areas near 1, and of their differences, contain the true value.

    python benchmarks/area_coverage.py [--repetitions 1000]

First, ROC AUCs of two classes. Two networks score well and ill images with normal distributions.
Prints, for each design, the share of 95 % intervals that contain the true area of the second
network (Wilson's for the area's variance by DeLong, and Regard's) and the true difference
(DeLong's, and Regard's), and how wide Regard's interval of the difference is in proportion to
DeLong's. With 1,000 repetitions the shares are accurate to about 1.4 points.

Second, means over classes, which take a fifth of the repetitions (accurate to about 3 points):
softmax of normal scores, of which that of an image's class has another mean. The same columns, for
Wilson's interval for the variance in 200 bootstrap samples, and for the bootstrap's interval of a
difference.
"""

import argparse
import math
from functools import partial

import numpy as np
from scipy.stats import norm

from regard.evaluation import Predictions
from regard.evaluation.areas import ClassAreas, Kinds, area, areas_compared
from regard.evaluation.intervals import (
    Estimate,
    draws,
    unbounded,
    wilson,
    wilson_of_variance,
)
from regard.evaluation.significance import delong
from regard.evaluation.statistics import RankStatistics

# well and ill images, distance of the two kinds for each network
DESIGNS = (
    ((500, 6), (4.2, 3.0)),
    ((300, 12), (4.2, 3.0)),
    ((100, 30), (4.2, 3.0)),
    ((50, 50), (1.5, 1.5)),
    ((300, 100), (3.0, 2.8)),
)
# images of each class, distance of a class's own score for each network
CLASSES = (
    ((300, 6), (4.0, 3.0)),
    ((300, 300, 6), (4.0, 3.0)),
    ((200, 10, 5), (4.0, 3.5)),
    ((30, 30, 30), (3.5, 3.0)),
    ((100, 50, 30, 20, 10, 8, 6, 5, 5, 5), (4.0, 4.0)),
    ((50,) * 10, (4.0, 4.0)),
    ((100,) * 5, (2.0, 1.5)),
)
MEANS = ("roc_auc_macro", "roc_auc_hand_till", "average_precision_macro")


def measure(counts: tuple[int, int], means: tuple[float, float], repetitions: int) -> list[float]:
    """Shares for the area and for the difference, each without and with, and the ratio."""
    true = [float(norm.cdf(mean / math.sqrt(2))) for mean in means]
    ill, kinds = np.repeat([False, True], counts), Kinds(counts, counts)
    held, widths = np.zeros(4), np.zeros(2)
    for seed in range(repetitions):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=len(ill))
        own = (0.6**0.5 * shared + 0.4**0.5 * rng.normal(size=len(ill)) for _ in means)
        values, covariance = delong(ill, *(m * ill + z for m, z in zip(means, own, strict=True)))
        drawn = rng.multivariate_normal(values, covariance, 300).T
        one, variance, few = float(values[1]), float(covariance[1, 1]), min(counts)
        if variance < 1e-15:
            plain = wilson(round(one, 12), few, 0.95)
        else:
            plain = wilson_of_variance(one, variance, few, 0.95)
        first, second = (
            partial(area, float(v), d, n_units=few, kinds=kinds)
            for v, d in zip(values, drawn, strict=True)
        )
        ours = second(confidence=0.95)
        error = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        difference, half = float(values[0] - values[1]), 1.959964 * math.sqrt(max(error, 0.0))
        both = areas_compared((drawn[0], drawn[1]), (first, second))(0.95)
        low, high = min(difference - half, both.low), max(difference + half, both.high)
        held += (
            plain.low <= true[1] <= plain.high,
            ours.low <= true[1] <= ours.high,
            abs(difference - (true[0] - true[1])) <= half,
            low <= true[0] - true[1] <= high,
        )
        widths += 2 * half, high - low
    return [*(held / repetitions).tolist(), float(widths[1] / widths[0])]


def networks(
    counts: tuple[int, ...], distances: tuple[float, float], seed: int
) -> list[RankStatistics]:
    """Two networks on the same images, which are as hard for both."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    own, names = np.eye(len(counts))[labels], [str(c) for c in range(len(counts))]
    shared = rng.normal(size=own.shape)
    found = []
    for distance in distances:
        scores = distance * own + 0.6**0.5 * shared + 0.4**0.5 * rng.normal(size=own.shape)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        found.append(RankStatistics(Predictions(p, labels, names)))
    return found


def measure_means(
    counts: tuple[int, ...], distances: tuple[float, float], repetitions: int
) -> dict[str, list[float]]:
    """For each mean the columns of `measure`."""
    many, n = max(4000, 40_000 // len(counts)), sum(counts)
    in_proportion = np.repeat(np.array(counts) / n, many)
    true = [each(in_proportion) for each in networks((many,) * len(counts), distances, 99)]
    names = [name for name in MEANS if name in true[0]]
    held, widths = {name: np.zeros(4) for name in names}, {name: np.zeros(2) for name in names}
    for seed in range(repetitions):
        both = networks(counts, distances, seed)
        areas = ClassAreas(both[0], np.arange(n))
        samples = np.stack(list(draws(n, 200, seed)))
        values, drawn = [each(np.ones(n)) for each in both], [each(samples) for each in both]
        for name in names:
            (a, b), (d_a, d_b) = (v[name] for v in values), (d[name] for d in drawn)
            ours = areas.interval(name, values[1], drawn[1], 0.95)
            intervals = [
                partial(areas.interval, name, v, d) for v, d in zip(values, drawn, strict=True)
            ]
            plain = unbounded(a - b, d_a - d_b, 0.95, n)
            widened = areas_compared((d_a, d_b), (intervals[0], intervals[1]))(0.95)
            together = Estimate(a - b, min(plain.low, widened.low), max(plain.high, widened.high))
            truth = true[0][name] - true[1][name]
            held[name] += (
                holds(area(b, d_b, 0.95, n), true[1][name]),
                holds(ours, true[1][name]),
                holds(plain, truth),
                holds(together, truth),
            )
            widths[name] += plain.high - plain.low, together.high - together.low
    return {
        name: [*(held[name] / repetitions).tolist(), float(widths[name][1] / widths[name][0])]
        for name in names
    }


def holds(interval: Estimate, true: float) -> bool:
    """Whether an interval contains the true value."""
    return interval.low <= true <= interval.high


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    repetitions = parser.parse_args().repetitions
    print("images     AUCs           Wilson  Regard  DeLong  Regard  width")
    for counts, means in DESIGNS:
        areas = " ".join(f"{norm.cdf(mean / math.sqrt(2)):.3f}" for mean in means)
        shares = "  ".join(f"{number:6.3f}" for number in measure(counts, means, repetitions))
        print(f"{counts[0]:3d} + {counts[1]:3d}  {areas}  {shares}", flush=True)
    print("\nmean over classes        Wilson  Regard  samples  Regard  width")
    for classes, distances in CLASSES:
        print(f"{' + '.join(map(str, classes))} images")
        found = measure_means(classes, distances, max(repetitions // 5, 1))
        for name, numbers in found.items():
            shares = "  ".join(f"{number:6.3f}" for number in numbers)
            print(f"  {name:23}{shares}", flush=True)


if __name__ == "__main__":
    main()
