"""Intervals of areas, and of their differences, where few images of a kind decide."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import norm, t

from regard.evaluation import Predictions, compare_metrics, diagnose
from regard.evaluation.areas import (
    ClassAreas,
    Kinds,
    area,
    areas_compared,
    difference_of_areas,
    newcombe,
)
from regard.evaluation.intervals import (
    Estimate,
    draws,
    mean_of_shares,
    wilson_interval,
    wilson_of_variance,
)
from regard.evaluation.significance import delong
from regard.evaluation.statistics import RankStatistics, resampled
from tests.test_evaluation import ends


def scores(counts, means, seed, spread=1.0):
    """Scores of networks for well and ill images, correlated by what makes an image hard."""
    rng = np.random.default_rng(seed)
    ill = np.repeat([False, True], counts)
    shared = rng.normal(size=len(ill))
    scale = np.where(ill, spread, 1.0)
    each = [
        mean * ill + scale * (0.6**0.5 * shared + 0.4**0.5 * rng.normal(size=len(ill)))
        for mean in means
    ]
    return ill, each


def of_each(values, drawn, n_units, kinds):
    """Each area's interval, by confidence."""
    return tuple(
        partial(area, float(v), d, n_units=n_units, kinds=kinds)
        for v, d in zip(values, drawn, strict=True)
    )


def networks(counts, means, seed, groups=None):
    ill, each = scores(counts, means, seed)
    p = [1 / (1 + np.exp(1.5 - s)) for s in each]
    return [
        Predictions(np.stack([1 - q, q], 1), ill.astype(int), ["well", "ill"], groups) for q in p
    ]


def test_newcombes_interval_is_where_the_estimate_is_z_errors_away():
    for value, m, n in ((0.9, 20, 35), (0.983, 6, 500), (1.0, 8, 60), (0.3, 10, 10)):
        for end in newcombe(value, m, n, 0.9):
            if end == value:
                assert value == 1.0
                continue
            # Hanley & McNeil's variance with both sizes replaced by their mean
            q1, q2, half = end / (2 - end), 2 * end**2 / (1 + end), (m + n) / 2 - 1
            variance = (end * (1 - end) + half * (q1 - end**2 + q2 - end**2)) / (m * n)
            assert abs(value - end) == pytest.approx(norm.ppf(0.95) * variance**0.5, rel=1e-5)
    low, high = newcombe(0.8, 30, 50, 0.95)
    assert newcombe(0.2, 30, 50, 0.95) == pytest.approx((1 - high, 1 - low))
    assert newcombe(1.0, 30, 50, 0.95)[1] == 1.0
    assert newcombe(1.0, 6, 300, 0.95)[0] == pytest.approx(
        newcombe(0.999999, 6, 300, 0.95)[0], 1e-4
    )
    assert newcombe(0.0, 30, 50, 0.95)[0] == 0.0


def test_intervals_shrink_to_the_estimate():
    """So that the p-value, the confidence at which an interval touches 0, can be near 1."""
    for value in (1.0, 0.97, 0.5, 0.0):
        low, high = newcombe(value, 20, 35, 1e-6)
        assert low == pytest.approx(value, abs=1e-6)
        assert high == pytest.approx(value, abs=1e-6)
        lows, highs = zip(
            *(newcombe(value, 20, 35, c) for c in (1e-9, 0.1, 0.9, 0.999)), strict=True
        )
        assert list(lows) == sorted(lows, reverse=True)
        assert list(highs) == sorted(highs)


@pytest.mark.parametrize("name", ["positive/roc_auc", "positive/average_precision"])
def test_the_p_value_of_areas_is_where_the_interval_touches_zero(name):
    a, b = networks([80, 8], (3.0, 2.4), 4)
    options = {"positive": "ill", "metrics": [name], "resamples": 100}
    (c,) = compare_metrics(a, b, **options)
    assert c.test == "intervals of both areas"
    assert 0.05 < c.p_value < 0.9
    (there,) = compare_metrics(a, b, **options, confidence=1 - c.p_value)
    nearest = min(abs(there.difference.low), abs(there.difference.high))
    assert nearest == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize(
    ("counts", "means", "spread"),
    [
        # by Wilson's interval for the variance of samples 0.83, 0.85 and 0.90; differences by
        # DeLong's 0.60, 0.71 and 0.84 (benchmarks/area_coverage.py)
        ([500, 6], (4.2, 3.0), 1),
        ([300, 12], (4.2, 3.0), 1),
        ([100, 30], (4.2, 3.0), 1),
        ([50, 50], (1.5, 1.5), 1),
        ([100, 30], (3.0, 2.5), 2),
    ],
)
def test_an_area_and_a_difference_are_covered_also_where_few_images_decide(counts, means, spread):
    true = [norm.cdf(mean / math.sqrt(1 + spread**2)) for mean in means]
    kinds = Kinds(tuple(counts), tuple(counts))
    one, both, times = 0, 0, 250
    for seed in range(times):
        ill, each = scores(counts, means, seed, spread)
        values, covariance = delong(ill, *each)
        rng = np.random.default_rng(seed)
        drawn = rng.multivariate_normal(values, covariance, 300).T
        e = area(float(values[1]), drawn[1], 0.95, min(counts), kinds)
        one += e.low <= true[1] <= e.high
        d = areas_compared((drawn[0], drawn[1]), of_each(values, drawn, min(counts), kinds))(0.95)
        both += d.low <= true[0] - true[1] <= d.high
    assert one / times > 0.93
    assert both / times > 0.93


def test_an_area_of_many_images_has_the_interval_of_its_variance():
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.85, 0.0216, 1000)
    found = area(0.85, drawn, 0.95, 150, Kinds((150, 150), (150, 150)))
    alone = wilson_of_variance(0.85, drawn.var(ddof=1) * 150 / 149, 150, 0.95)
    assert found.high - found.low < 1.1 * (alone.high - alone.low)
    assert area(0.85, drawn, 0.95, 150) == alone


def test_groups_count_as_much_as_their_variance_and_their_wrong_pairs_tell():
    unit = np.repeat(np.arange(20), 10)
    positive = unit < 8
    kinds = Kinds.of(positive, unit)
    assert kinds == Kinds((80, 120), (8, 12))
    whole, single = Kinds((80, 120), (80, 120)), Kinds((8, 12), (8, 12))
    q1, q2, half = 0.8 / 1.2, 2 * 0.64 / 1.8, 9  # as independent images, one of each group
    variance = (0.16 + half * (q1 + q2 - 2 * 0.64)) / 96
    assert kinds.effective(0.8, variance) == pytest.approx((8, 12))
    assert kinds.effective(0.8, 5 * variance) == pytest.approx((8, 12))  # no fewer
    assert kinds.effective(0.8, variance / 4) == pytest.approx((32, 48))
    assert kinds.effective(0.8, variance / 100) == pytest.approx((80, 120))  # no more
    m, n = kinds.effective(0.99, 1e-9)  # 0.8 of the 80 are ranked wrongly
    assert (m, n) == pytest.approx((8 * 1.8, 12 * 1.8))
    assert whole.effective(0.8, 1e-9) == (80, 120)
    assert single.effective(0.8, 1e-9) == (8, 12)


def three_classes(seed, distances, counts=(150, 150, 6)):
    """Two networks on the same images; a third class of few."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)
    shared, found = rng.normal(size=(len(labels), 3)), []
    for distance in distances:
        scores = distance * np.eye(3)[labels] + 0.6**0.5 * shared
        p = np.exp(scores + 0.4**0.5 * rng.normal(size=shared.shape))
        found.append(Predictions(p / p.sum(axis=1, keepdims=True), labels, ["a", "b", "rare"]))
    return found


@pytest.mark.parametrize("name", ["roc_auc_macro", "roc_auc_hand_till", "average_precision_macro"])
def test_means_over_classes_are_covered_where_one_class_has_few_images(name):
    """By the variance of samples 0.60 to 0.87, and differences 0.62 to 0.77."""
    counts, many = (150, 150, 6), 8000
    weights = np.repeat(np.array(counts) / sum(counts), many)
    large = three_classes(99, (4.0, 3.0), (many,) * 3)
    true = [RankStatistics(each)(weights)[name] for each in large]
    one, both, times = 0, 0, 40
    for seed in range(times):
        ranked = [RankStatistics(each) for each in three_classes(seed, (4.0, 3.0))]
        samples = np.stack(list(draws(sum(counts), 60, seed)))
        values, drawn = [r(np.ones(sum(counts))) for r in ranked], [r(samples) for r in ranked]
        areas = ClassAreas(ranked[0], np.arange(sum(counts)))
        each = [partial(areas.interval, name, v, d) for v, d in zip(values, drawn, strict=True)]
        e = each[1](0.95)
        one += e.low <= true[1] <= e.high
        d = areas_compared((drawn[0][name], drawn[1][name]), tuple(each))(0.95)
        both += d.low <= true[0] - true[1] <= d.high
    assert one / times > 0.93
    assert both / times > 0.93


def test_a_mean_over_classes_by_hand():
    parts = [(Estimate(0.9, 0.8, 0.97), 0.0009), (Estimate(1.0, 0.7, 1.0), 0.0)]
    found = mean_of_shares(parts, 401, 0.95, weights=np.array([3.0, 1.0]), variance_of_mean=0.0006)
    q2 = t.ppf(0.975, 400) ** 2
    lacking = [9 / 16 * (0.1**2 - q2 * 0.0009), 1 / 16 * 0.3**2]
    assert found.value == pytest.approx(0.925)
    assert found.low == pytest.approx(0.925 - math.sqrt(q2 * 0.0006 + math.hypot(*lacking)))
    lacking = 9 / 16 * (0.07**2 - q2 * 0.0009)
    assert found.high == pytest.approx(0.925 + math.sqrt(q2 * 0.0006 + lacking))


def test_the_mean_of_many_sure_areas_is_not_surer_than_a_class_of_few_images():
    """With a class of six images, all ranked first, an area of 1 in one is not 0.9999 to 1."""
    a, b = three_classes(3, (6.0, 6.0))
    found = diagnose(a, resamples=60)
    rare = found.per_class["rare"]["roc_auc"]
    assert rare.value > 0.999
    for name in ("roc_auc_macro", "roc_auc_hand_till", "average_precision_macro"):
        assert found.metrics[name].low < 1 - (1 - rare.low) / 4
        (c,) = compare_metrics(a, b, metrics=[name], resamples=60)
        assert c.test == "intervals of both areas"
        assert c.p_value > 0.3
        assert c.difference.low < 0 < c.difference.high
    assert "roc_auc_of_pairs" not in str(found.to_dict())
    weighted = found.metrics["roc_auc_weighted"]
    assert weighted.high - weighted.low < 0.03  # 6 of 306 images


def test_samples_are_ranked_together():
    """One by one, those of 100 classes take minutes."""
    ranked, weights = RankStatistics(three_classes(0, (2.0, 2.0))[0]), []
    unit, call = np.arange(306), RankStatistics.__call__
    one_by_one = [ranked(times) for times in draws(306, 50, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RankStatistics, "__call__", lambda s, w: weights.append(w.shape) or call(s, w)
        )
        found = resampled(ranked, unit, 306, 50, 1)
    assert weights == [(50, 306)]
    for name, values in found.items():
        assert values.tolist() == pytest.approx([each[name] for each in one_by_one])


def test_a_difference_of_areas_by_hand():
    a, b = Estimate(0.9, 0.8, 0.96), Estimate(0.85, 0.7, 0.93)
    d = difference_of_areas(a, b, 0.5)
    assert d.value == pytest.approx(0.05)
    assert d.low == pytest.approx(0.05 - math.sqrt(0.1**2 + 0.08**2 - 0.1 * 0.08))
    assert d.high == pytest.approx(0.05 + math.sqrt(0.06**2 + 0.15**2 - 0.06 * 0.15))


def test_a_network_that_ranks_a_few_ill_images_first_is_not_known_to_be_better():
    """Nothing is claimed, and differences of 0.05 are not said to be detectable."""
    claims = 0
    for seed in range(20):
        a, b = networks([300, 8], (4.0, 4.0), seed)
        (c,) = compare_metrics(a, b, positive="ill", metrics=["positive/roc_auc"], resamples=60)
        assert c.difference.low <= 0 <= c.difference.high
        assert c.test == "intervals of both areas"
        claims += c.p_value <= 0.05
        assert c.detectable > 0.05
    assert claims == 0


def test_a_large_difference_is_shown_also_near_one_and_of_means_and_groups():
    a, b = networks([200, 30], (4.5, 0.6), 0)
    groups = np.arange(230) // 2
    pairs = [(a, b), tuple(Predictions(p.probabilities, p.labels, p.classes, groups.astype(str))
                           for p in (a, b))]  # fmt: skip
    for pair in pairs:
        (c,) = compare_metrics(*pair, positive="ill", metrics=["positive/roc_auc"], resamples=100)
        assert c.shown == "better"
        assert c.p_value < 0.01
        assert c.difference.low > 0.05
    for name in ("roc_auc_macro", "roc_auc_hand_till", "average_precision_macro"):
        pair = three_classes(0, (5.0, 0.5), (60, 60, 40))
        (c,) = compare_metrics(*pair, metrics=[name], resamples=100)
        assert c.shown == "better"
        assert c.p_value < 0.01


def test_delongs_test_stays_where_enough_images_are_ranked_wrongly():
    a, b = networks([150, 150], (2.0, 1.2), 0)
    (c,) = compare_metrics(a, b, positive="ill", metrics=["positive/roc_auc"], resamples=60)
    areas, cov = delong(a.labels == 1, a.probabilities[:, 1], b.probabilities[:, 1])
    error = math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert c.test == "DeLong test"
    assert c.p_value == pytest.approx(2 * norm.sf((areas[0] - areas[1]) / error))


def test_names_of_one_area_have_one_interval():
    (a,) = networks([120, 10], (2.5,), 3)
    found = diagnose(a, positive="ill", resamples=100)
    one = found.one_class.metrics["roc_auc"]
    assert found.metrics["roc_auc_macro"].low == pytest.approx(one.low)
    assert found.per_class["ill"]["roc_auc"].high == pytest.approx(one.high)
    low, high = newcombe(one.value, 10, 120, 0.95)
    assert one.low <= low + 1e-9
    assert one.high >= high - 1e-9
    groups = np.array([f"{i:03}" for i in range(130)])  # groups of one image
    (b,) = networks([120, 10], (2.5,), 3, groups)
    assert ends(diagnose(b, positive="ill", resamples=100).one_class.metrics["roc_auc"]) == (
        pytest.approx(ends(one))
    )


@pytest.mark.parametrize("counts", [[120, 10], [500, 6], [12, 10]])
def test_a_perfect_area_is_no_surer_than_one_just_below(counts):
    """Images that a network does not see are on the wrong side of half of the others."""
    (a,) = networks(counts, (30.0,), 3)
    found = diagnose(a, positive="ill", resamples=50).one_class.metrics
    m, n = counts[1], counts[0]
    half = (1 + wilson_interval(m, m)[0]) / 2
    low, high = newcombe(1.0, m, n, 0.95)
    assert ends(found["roc_auc"]) == pytest.approx((min(half, low), 1.0))
    assert high == 1.0
    assert found["roc_auc"].low <= newcombe(1 - 1e-9, m, n, 0.95)[0] + 1e-6
    assert ends(found["average_precision"]) == pytest.approx(wilson_interval(m, m))
    upside_down = Predictions(a.probabilities[:, ::-1], a.labels, a.classes)
    reverse = diagnose(upside_down, positive="ill", resamples=50).one_class.metrics["roc_auc"]
    assert (reverse.low, reverse.high) == pytest.approx((0.0, 1 - found["roc_auc"].low))


def test_a_perfect_area_covers_images_that_the_network_does_not_see():
    """A share of the ill is scored like the well; the other ill images are all ranked first."""
    for counts, unseen in (((300, 6), 0.3), ((300, 12), 0.15), ((200, 30), 0.06)):
        true, held, times = 1 - unseen / 2, 0, 300
        for seed in range(times):
            rng = np.random.default_rng(seed)
            ill = np.repeat([False, True], counts)
            seen = ill & (rng.random(len(ill)) >= unseen)
            values, covariance = delong(ill, rng.normal(size=len(ill)) + 20 * seen, ill * 1.0)
            drawn = rng.normal(float(values[0]), max(covariance[0, 0], 0) ** 0.5, 200)
            e = area(float(values[0]), drawn, 0.95, counts[1], Kinds(counts[::-1], counts[::-1]))
            held += e.low <= true <= e.high
        assert held / times > 0.95, counts
