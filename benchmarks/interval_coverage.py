"""How often the confidence intervals contain the true value, by simulation.

    python benchmarks/interval_coverage.py [--repetitions 300] [--resamples 200]

A test of two classes is drawn repeatedly: 60 or 300 images, independent, or in groups of 5 that
share their class and an effect on the network's output; 40 % of them are ill, in the last design
3 %. The true value of each metric is computed from 400,000 images. Writes
benchmarks/interval_coverage.csv: a row for each design and metric, with the share of 95 %
intervals that contain the true value; with 300 repetitions it is accurate to about 2.5 points.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from regard.evaluation import Predictions, diagnose, evaluate

RESULTS = Path(__file__).with_name("interval_coverage.csv")
# images, images per group, share of ill ones
DESIGNS = ((60, 1, 0.4), (300, 1, 0.4), (60, 5, 0.4), (300, 5, 0.4), (300, 1, 0.03))
MEASURED = ("top1", "balanced_accuracy", "macro_f1", "macro_precision", "nll", "ece")


def draw(n: int, group_size: int, seed: int, share: float = 0.4) -> Predictions:
    """Predictions of a mediocre, overconfident network for n images."""
    rng = np.random.default_rng(seed)
    group = np.arange(n) // group_size
    sick = (rng.random(group[-1] + 1) < share)[group]
    effect = rng.normal(size=group[-1] + 1)[group]
    logit = 2.0 * sick - 1.0 + 0.8 * effect + rng.normal(size=n)
    p = 1 / (1 + np.exp(-1.5 * logit))
    probabilities = np.stack([1 - p, p], axis=1)
    groups = group.astype(str) if group_size > 1 else None
    return Predictions(probabilities, sick.astype(np.int64), ["well", "sick"], groups)


def measure(predictions: Predictions, resamples: int, seed: int) -> dict[str, tuple[float, ...]]:
    """(value, low, high) of each metric."""
    metrics = dict(evaluate(predictions, resamples=resamples, seed=seed).metrics)
    study = diagnose(predictions, positive="sick", resamples=resamples, seed=seed)
    assert study.one_class is not None
    estimates = {name: metrics[name] for name in MEASURED}
    estimates |= {"kappa": study.metrics["kappa"], **study.one_class.metrics}
    return {name: (e.value, e.low, e.high) for name, e in estimates.items()}


def truth(share: float = 0.4) -> dict[str, float]:
    """The metrics of 400,000 images."""
    return {name: v[0] for name, v in measure(draw(400_000, 1, 1, share), 2, 0).items()}


def coverage(
    true: dict[str, float],
    n: int,
    group_size: int,
    repetitions: int,
    resamples: int,
    share: float = 0.4,
) -> dict[str, tuple[float, int]]:
    """The share of intervals that contain the true value, and the number of intervals."""
    held: dict[str, list[bool]] = {name: [] for name in true}
    for seed in range(repetitions):
        found = measure(draw(n, group_size, 1000 + seed, share), resamples, seed)
        for name in true:
            _, low, high = found[name]
            if not (np.isnan(low) or np.isnan(high)):
                held[name].append(bool(low <= true[name] <= high))
    return {name: (float(np.mean(h)) if h else np.nan, len(h)) for name, h in held.items()}


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args()
    rows = [["images", "group_size", "ill", "metric", "true", "coverage", "intervals"]]
    for n, group_size, ill in DESIGNS:
        true = truth(ill)
        found = coverage(true, n, group_size, options.repetitions, options.resamples, ill)
        for name, (share, count) in found.items():
            design = [str(n), str(group_size), str(ill), name]
            rows.append([*design, f"{true[name]:.4f}", f"{share:.3f}", str(count)])
            print(*rows[-1], flush=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:  # not before all is measured
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
