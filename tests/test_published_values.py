"""Numbers that papers and other programs publish for fixed data.

The patients are those of pROC's data set aSAH (113 with aneurysmal subarachnoid hemorrhage; Turck
et al., Intensive Care Medicine 2010): here only the order of their values of each marker, which is
all that a ROC curve depends on. The numbers of ROC curves are those of pROC 1.19's own tests (R).
"""

import math

import numpy as np
import pytest
from scipy.stats import norm

from regard.evaluation import Predictions, compare, compare_metrics, diagnose, diagnose_class
from regard.evaluation.intervals import wilson_interval
from regard.evaluation.significance import delong
from tests.test_evaluation import ends, hard, pair

# WFNS grade, rank of S100B, rank of NDKA of each patient; equal values have one rank
GOOD = """
1.2.42 1.2.59 1.2.67 1.2.80 1.3.20 1.3.106 1.4.19 1.4.53 1.5.10 1.5.13 1.5.21 1.5.54 1.6.3
1.6.16 1.6.43 1.6.57 1.7.12 1.7.22 1.7.75 1.7.104 1.8.23 1.8.85 1.8.95 1.8.102 1.9.18
1.9.31 1.11.1 1.11.108 1.12.27 1.12.63 1.12.84 1.13.92 1.14.65 1.16.76 1.17.62 1.37.68
1.39.15 2.2.79 2.5.47 2.6.30 2.6.86 2.7.34 2.7.58 2.8.9 2.8.83 2.8.96 2.9.11 2.9.60
2.11.64 2.12.91 2.13.26 2.13.39 2.13.94 2.14.45 2.15.56 2.17.29 2.32.74 3.3.35 3.5.51
3.27.81 4.14.36 4.15.71 4.24.30 4.26.46 4.28.4 4.30.44 4.34.101 4.36.40 5.20.37 5.35.33
5.36.8 5.39.14"""
POOR = """
1.5.100 1.6.107 2.5.87 2.5.97 2.7.70 2.7.98 2.8.33 2.8.61 2.9.88 2.12.99 2.21.25 2.25.48
2.31.38 2.42.52 3.11.82 4.11.6 4.14.66 4.19.93 4.22.76 4.23.89 4.37.90 4.44.24 4.49.17
5.1.55 5.10.78 5.18.7 5.26.73 5.27.105 5.29.72 5.33.5 5.33.77 5.38.49 5.40.2 5.41.32
5.43.63 5.44.28 5.45.50 5.46.41 5.47.103 5.48.69 5.50.109"""


def markers() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(poor outcome, score) of each marker's patients, who are the same in the same order."""
    patients = [*GOOD.split(), *POOR.split()]
    ranks = np.array([patient.split(".") for patient in patients], float).T
    poor = np.repeat([False, True], [72, 41])
    return {name: (poor, rank) for name, rank in zip(("wfns", "s100b", "ndka"), ranks, strict=True)}


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
    ("one", "other", "p_value", "low", "high"),
    [
        ("wfns", "s100b", 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
        ("wfns", "ndka", 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
        ("ndka", "s100b", 0.164295175223054, -0.2876917446341914, 0.0488706064228094),
    ],
)
def test_the_comparison_of_two_markers_is_procs_paired_test(one, other, p_value, low, high):
    a, b = (predictions(*markers()[name]) for name in (one, other))
    (c,) = compare_metrics(a, b, metrics=["positive/roc_auc"], positive="poor", resamples=2)
    assert c.test == "DeLong test"
    assert c.p_value == pytest.approx(p_value, rel=1e-9)
    assert ends(c.difference) == pytest.approx((low, high), abs=1e-9)


def test_hand_and_tills_area_is_that_of_the_r_package_of_this_name():
    """HandTill2001 1.0's own test: glass of six kinds (ht01.multipleclass), classified by a tree.

    A row is a leaf: images of each class. The tree's probabilities are their shares.
    """
    leaves = np.array([
        [0, 0, 0, 1, 0, 24], [0, 2, 0, 0, 9, 1], [0, 4, 0, 12, 0, 0], [0, 7, 0, 0, 0, 1],
        [0, 10, 0, 0, 0, 0], [6, 40, 4, 0, 0, 2], [3, 4, 7, 0, 0, 0], [20, 2, 6, 0, 0, 0],
        [41, 7, 0, 0, 0, 1],
    ])  # fmt: skip
    leaf, kind = (np.repeat(index.ravel(), leaves.ravel()) for index in np.indices(leaves.shape))
    shares = leaves / leaves.sum(axis=1, keepdims=True)
    found = Predictions(shares[leaf], kind, ["WinF", "WinNF", "Veh", "Con", "Tabl", "Head"])
    area = diagnose(found, resamples=2).metrics["roc_auc_hand_till"]
    assert area.value == pytest.approx(0.947211779448622, abs=1e-12)


def test_mcnemars_test_of_the_approval_ratings_is_rs():
    """exact2x2::mcnemar.exact of the table in ?mcnemar.test, and the interval in Agresti's book."""
    c = compare(*pair(794, 150, 86, 570))
    assert c.p_value == pytest.approx(3.716e-05, rel=2e-4)
    assert c.difference.value == pytest.approx(0.04)
    assert ends(c.difference) == pytest.approx((0.02, 0.06), abs=0.005)  # as printed


def test_kappas_are_those_of_r_and_sas():
    # irr::kappa2(anxiety[, 2:3], "squared") and without weights; it leaves out grade 5, unused
    raters = ("36462424332333221334", "21443216111233113322")
    true, called = ([*map("12346".index, grades)] for grades in raters)
    kappas = diagnose(hard(true, called, 5), ordered=[f"c{i}" for i in range(5)], resamples=2)
    assert kappas.metrics["kappa"].value == pytest.approx(-0.006289308, abs=5e-10)
    assert kappas.metrics["quadratic_kappa"].value == pytest.approx(0.2520325, abs=5e-8)
    # a printout of SAS's PROC FREQ, by which statsmodels is tested
    table = np.array([[0, 4, 1], [0, 8, 0], [0, 1, 5]])
    true, called = (np.repeat(index.ravel(), table.ravel()) for index in np.indices(table.shape))
    found = diagnose(hard(true, called, 3), resamples=2).metrics["kappa"].value
    assert found == pytest.approx(0.4842, abs=5e-5)


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
