"""How often tests claim a difference between two equal networks, by simulation.

    python benchmarks/false_differences.py [--repetitions 300] [--resamples 200]

Two equally good networks classify the same images: 60 or 300, independent, or grouped by patients
who are ill or not and whose images both networks find harder or easier. Each metric is compared by
`regard.evaluation.compare_metrics`. Writes benchmarks/false_differences.csv: for each
design and metric the share of tests with p <= 0.05 before the correction for several metrics, which
should be at most 0.05; with 300 repetitions it is accurate to about 2.5 points.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np

from regard.evaluation import Predictions, compare_metrics

RESULTS = Path(__file__).with_suffix(".csv")
DESIGNS = ((60, 1), (300, 1), (60, 5), (100, 10), (300, 15), (300, 5))  # images, per patient


def draw(n: int, group_size: int, seed: int) -> list[Predictions]:
    """Predictions of two networks for the same n images."""
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // group_size
    patients = patient[-1] + 1
    ill = (rng.random(patients) < 0.4)[patient]
    harder = 0.5 * rng.normal(size=patients)[patient] + 0.7 * rng.normal(size=n)
    both = []
    for _ in range(2):
        own = 0.6 * rng.normal(size=patients)[patient] + 0.7 * rng.normal(size=n)
        p = 1 / (1 + np.exp(-1.5 * (2.0 * ill - 1.0 + harder + own)))
        groups = patient.astype(str) if group_size > 1 else None
        probabilities = np.stack([1 - p, p], axis=1)
        both.append(Predictions(probabilities, ill.astype(np.int64), ["well", "ill"], groups))
    return both


def false_positives(
    n: int, group_size: int, repetitions: int, resamples: int
) -> dict[str, tuple[float, int]]:
    """The share of tests with p <= 0.05, and the number of tests, by metric."""
    significant: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for seed in range(repetitions):
        a, b = draw(n, group_size, 5000 + seed)
        if len(set(a.labels.tolist())) < 2:
            continue
        for c in compare_metrics(a, b, positive="ill", resamples=resamples, seed=seed):
            if not np.isnan(c.p_value):
                tests[c.metric] += 1
                significant[c.metric] += c.p_value <= 0.05
    return {name: (significant[name] / count, count) for name, count in tests.items()}


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args()
    rows = [["images", "per_patient", "metric", "false_positives", "tests"]]
    for n, group_size in DESIGNS:
        rates = false_positives(n, group_size, options.repetitions, options.resamples)
        for name, (share, count) in rates.items():
            rows.append([str(n), str(group_size), name, f"{share:.3f}", str(count)])
            print(*rows[-1], flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:  # not before all is measured
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
