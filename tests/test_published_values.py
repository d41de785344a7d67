"""Numbers that papers and other programs publish for fixed data.

The patients are those of pROC's data set aSAH (113 with aneurysmal subarachnoid hemorrhage; Turck
et al., Intensive Care Medicine 2010): here only the order of their outcomes by a marker, which is
all that a ROC curve depends on. The numbers are those of pROC 1.19's own tests (R).
"""

import math

import numpy as np
import pytest
from scipy.stats import norm

from regard.evaluation import Predictions, diagnose_class
from regard.evaluation.intervals import wilson_interval
from regard.evaluation.significance import delong

# outcomes in ascending order of NDKA: N good, P poor; in brackets, equal values
NDKA = (
    "N P N N P P P N N N N N N N N N P N N N N N N P P N N P N [NN] N P [PN] N N N N P N N P "
    "N N N N N N P P P N P N N P N N N N N P N [PN] N N P N N P P N P P N N [PN] P P N N N P "
    "N N N N P P P P N N P N N N P P P P N N P N P N P N P"
)
WFNS = {"N": (37, 20, 3, 8, 4), "P": (2, 12, 1, 8, 18)}  # patients of each grade, 1 to 5


def markers() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(poor outcome, score) of each marker's patients."""
    ties = [group.strip("[]") for group in NDKA.split()]
    ndka = [(outcome == "P", rank) for rank, group in enumerate(ties) for outcome in group]
    wfns = [
        (o == "P", k) for o, counts in WFNS.items() for k, n in enumerate(counts) for _ in range(n)
    ]
    return {
        name: (np.array([p for p, _ in each]), np.array([s for _, s in each], float))
        for name, each in (("ndka", ndka), ("wfns", wfns))
    }


def predictions(positive: np.ndarray, score: np.ndarray) -> Predictions:
    p = (score + 1) / (score.max() + 2)
    return Predictions(np.stack([1 - p, p], axis=1), positive.astype(int), ["good", "poor"])


@pytest.mark.parametrize(
    ("marker", "area", "corrected"),
    [
        ("ndka", 0.611957994579946, 0.530024247610897),
        ("wfns", 0.823678861788618, 0.649693339038653),
    ],
)
def test_areas_and_partial_areas_are_procs(marker, area, corrected):
    positive, score = markers()[marker]
    assert (positive.sum(), (~positive).sum()) == (41, 72)
    found = diagnose_class(predictions(positive, score), "poor", max_fpr=0.1, resamples=2).metrics
    assert found["roc_auc"].value == pytest.approx(area, abs=1e-12)
    assert found["partial_roc_auc"].value == pytest.approx(corrected, abs=1e-12)


def test_delongs_intervals_and_test_are_procs():
    (area,), variance = delong(*markers()["ndka"])
    half = norm.ppf(0.975) * math.sqrt(variance.item())
    assert (area - half, area + half) == pytest.approx((0.501244999271703, 0.722670989888189))
    (other,), of_other = delong(*markers()["wfns"])
    # the test of two markers as if measured in different patients
    statistic = (other - area) / math.sqrt(variance.item() + of_other.item())
    assert statistic == pytest.approx(3.10125096778969)


@pytest.mark.parametrize(
    ("hits", "images", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)  # fmt: skip
def test_wilsons_intervals_are_newcombes(hits, images, low, high):
    """Newcombe, Statistics in Medicine 1998, table I, method 3."""
    assert wilson_interval(hits, images, 0.95) == pytest.approx((low, high), abs=5e-5)
