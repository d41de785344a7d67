"""How often intervals of ROC AUCs near 1, and of their differences, contain the true value.

    python benchmarks/area_coverage.py [--repetitions 1000]

Two networks score well and ill images with normal distributions. Prints, for each design, the share
of 95 % intervals that contain the true area of the second network (Wilson's for the area's variance
by DeLong, and Regard's) and the true difference (DeLong's, and Regard's), and how wide Regard's
interval of the difference is in proportion to DeLong's. With 1,000 repetitions the shares are
accurate to about 1.4 points.
"""

import argparse
import math

import numpy as np
from scipy.stats import norm

from regard.evaluation.areas import Kinds, area, areas_compared
from regard.evaluation.intervals import wilson, wilson_of_variance
from regard.evaluation.significance import delong

# well and ill images, distance of the two kinds for each network
DESIGNS = (
    ((500, 6), (4.2, 3.0)),
    ((300, 12), (4.2, 3.0)),
    ((100, 30), (4.2, 3.0)),
    ((50, 50), (1.5, 1.5)),
    ((300, 100), (3.0, 2.8)),
)


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
        ours = area(one, drawn[1], 0.95, few, kinds)
        error = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
        difference, half = float(values[0] - values[1]), 1.959964 * math.sqrt(max(error, 0.0))
        both = areas_compared((drawn[0], drawn[1]), (float(values[0]), one), few, kinds)(0.95)
        low, high = min(difference - half, both.low), max(difference + half, both.high)
        held += (
            plain.low <= true[1] <= plain.high,
            ours.low <= true[1] <= ours.high,
            abs(difference - (true[0] - true[1])) <= half,
            low <= true[0] - true[1] <= high,
        )
        widths += 2 * half, high - low
    return [*(held / repetitions).tolist(), float(widths[1] / widths[0])]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    repetitions = parser.parse_args().repetitions
    print("images     AUCs           Wilson  Regard  DeLong  Regard  width")
    for counts, means in DESIGNS:
        areas = " ".join(f"{norm.cdf(mean / math.sqrt(2)):.3f}" for mean in means)
        shares = "  ".join(f"{number:6.3f}" for number in measure(counts, means, repetitions))
        print(f"{counts[0]:3d} + {counts[1]:3d}  {areas}  {shares}", flush=True)


if __name__ == "__main__":
    main()
