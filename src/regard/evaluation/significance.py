"""Tests and corrections that SciPy does not have: DeLong's test and Holm's correction."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regard.errors import UsageError
from regard.evaluation.predictions import Floats


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the given order; NaN stays NaN and does not count.

    Compare each with the level of the whole family of tests, such as 0.05.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = [int(i) for i in np.argsort(p, kind="stable") if not np.isnan(p[i])]
    adjusted, largest = p.copy(), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted.tolist()


def delong(positive: NDArray[np.bool_], *scores: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """ROC AUCs of several scores of the same images, and their covariance.

    DeLong, DeLong & Clarke-Pearson, Biometrics 1988, by midranks (Sun & Xu, IEEE Signal
    Processing Letters 2014).

    Args:
        positive: (N,) whether each image is positive.
        scores: (N,) each; one array per network.

    Returns:
        The areas, (K,), and their covariance matrix, (K, K).

    Raises:
        UsageError: fewer than 2 positive or 2 negative images.
    """
    from scipy.stats import rankdata

    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise UsageError(f"{m} positive and {n} negative images: 2 of each are needed")
    areas, of_positive, of_negative = [], [], []
    for score in scores:
        ranks = rankdata(score)
        # the share of negatives below each positive, and of positives above each negative
        above = (ranks[positive] - rankdata(score[positive])) / n  # (m,)
        below = 1 - (ranks[~positive] - rankdata(score[~positive])) / m  # (n,)
        areas.append(above.mean())
        of_positive.append(above)
        of_negative.append(below)
    covariance = np.atleast_2d(np.cov(of_positive)) / m + np.atleast_2d(np.cov(of_negative)) / n
    return np.array(areas), covariance
