"""Differences over seeds and images: right by hand, and honest over a thousand studies."""

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_rel
from sklearn.metrics import balanced_accuracy_score, log_loss

from regard.errors import UsageError
from regard.evaluation import Predictions
from regard.evaluation.intervals import wilson_interval
from regard.evaluation.repeats import (
    _estimate,
    contributions,
    repeated_difference,
    repeated_value,
)
from regard.studies.results import sentence


def said(rng, n=60, classes=3, groups=None):
    p = rng.dirichlet(np.ones(classes), n)
    return Predictions(p, np.arange(n) % classes, list("abc"), groups=groups)


def test_contributions_have_the_metric_as_their_mean():
    one = said(np.random.default_rng(0))
    predicted = one.probabilities.argmax(axis=1)
    assert contributions(one, "accuracy").mean() == pytest.approx((predicted == one.labels).mean())
    assert contributions(one, "balanced accuracy").mean() == pytest.approx(
        balanced_accuracy_score(one.labels, predicted)
    )
    assert contributions(one, "log loss").mean() == pytest.approx(
        log_loss(one.labels, one.probabilities)
    )


def test_without_any_variance_of_images_it_is_the_paired_t_test_over_seeds():
    a = np.array([[0.9], [0.8], [0.85], [0.95]]) + np.zeros((4, 50))
    b = np.array([[0.7], [0.75], [0.8], [0.7]]) + np.zeros((4, 50))
    found = _estimate(a - b, np.zeros(50, int), "accuracy", 0.95)
    test = ttest_rel(a[:, 0], b[:, 0])
    assert found.p_value == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))


def test_one_training_of_each_claims_nothing():
    rng = np.random.default_rng(1)
    found = repeated_difference([said(rng)], [said(rng)])
    assert np.isnan(found.p_value)
    assert found.low < found.value < found.high
    assert found.to_dict()["p_value"] is None
    assert found.to_dict()["minimal_effect"] is None


def study(rng, seeds, folds, groups, size, training, spread, effect):
    """D[s, g] of one simulated study, and each unit's fold; equal networks for effect 0."""
    n, group = groups * size, np.repeat(np.arange(groups), size)
    fold = np.arange(groups) % folds
    base = rng.normal(1.2, 1.2, n) + rng.normal(0, spread, groups)[group]
    nets = []
    for shift in (effect, 0.0):
        own = rng.normal(0, 0.6, n) + rng.normal(0, spread, groups)[group]
        trained = rng.normal(0, training, (seeds, folds))[:, fold][:, group]
        nets.append(base + own + trained + rng.normal(0, 1, (seeds, n)) + shift > 0)
    d = nets[0].astype(float) - nets[1]
    return d.reshape(seeds, groups, size).mean(axis=2), fold


DESIGNS = {  # seeds, folds, groups, images of a group, deviation of trainings, of groups; effect
    "3 seeds": (3, 1, 200, 1, 0.15, 0.0, 1.5),
    "5 seeds, grouped": (5, 1, 60, 4, 0.2, 0.8, 1.0),
    "3 seeds, 5 folds": (3, 5, 200, 1, 0.2, 0.0, 0.6),
    "2 seeds, 5 folds, grouped": (2, 5, 60, 4, 0.3, 0.8, 1.0),
    "1 seed, 5 folds": (1, 5, 200, 1, 0.2, 0.0, 1.5),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_equal_networks_are_told_apart_in_at_most_5_percent_of_1000_studies(design):
    *sizes, _ = DESIGNS[design]
    rng = np.random.default_rng(7)
    made = [_estimate(*study(rng, *sizes, 0.0), "accuracy", 0.95) for _ in range(1000)]
    assert np.mean([one.p_value <= 0.05 for one in made]) <= 0.05


@pytest.mark.parametrize("design", ["3 seeds", "2 seeds, 5 folds, grouped", "1 seed, 5 folds"])
def test_a_difference_of_the_stated_minimal_effect_is_shown_in_80_percent(design):
    *sizes, _ = DESIGNS[design]

    def studies(effect, count, seed):
        rng = np.random.default_rng(seed)
        drawn = [study(rng, *sizes, effect) for _ in range(count)]
        return [_estimate(d, fold, "accuracy", 0.95) for d, fold in drawn]

    low, high = 0.0, 4.0
    for _ in range(8):  # the shift of logits whose difference is what such studies state
        effect = (low + high) / 2
        tried = studies(effect, 300, 8)
        reached = np.mean([t.value for t in tried])
        enough = reached > np.mean([t.minimal_effect for t in tried])
        low, high = (low, effect) if enough else (effect, high)
    shown = [one.p_value <= 0.05 for one in studies(high, 600, 9)]
    assert np.mean(shown) >= 0.8


def test_more_seeds_are_asked_for_only_where_they_would_help():
    rng = np.random.default_rng(3)
    unsettled = 0.02 + rng.normal(0, 0.03, (2, 1)) + rng.normal(0, 0.02, (2, 400))
    found = _estimate(unsettled, np.zeros(400, int), "accuracy", 0.95)
    assert found.p_value > 0.05
    assert found.seeds_needed() is None or found.seeds_needed() > 2
    noise = _estimate(
        rng.normal(0, 1, (3, 50)) + rng.normal(0, 1, 50), np.zeros(50, int), "a", 0.95
    )
    assert noise.seeds_needed() is None  # the images decide: seeds would not settle it


def answers(right, labels=None, groups=None):
    """Predictions of two classes that are right where `right` is."""
    right = np.asarray(right)
    labels = np.zeros(len(right), int) if labels is None else labels
    p = np.where((right == (labels == 0))[:, None], [0.9, 0.1], [0.1, 0.9])
    return Predictions(p, labels, ["a", "b"], groups=groups)


@pytest.mark.parametrize(("seeds", "folds"), [(1, 1), (3, 1), (1, 4), (2, 4)])
def test_where_nothing_varies_intervals_reach_as_far_as_wilsons(seeds, folds):
    fold = np.arange(40) % folds
    whole = [answers(np.ones(40, bool))] * seeds
    low, high = wilson_interval(40, 40)
    found = repeated_value(whole, folds=fold)
    assert (found.value, found.low, found.high) == pytest.approx((1, low, high))
    none = repeated_value([answers(np.zeros(40, bool))] * seeds, folds=fold)
    assert (none.low, none.high) == pytest.approx(wilson_interval(0, 40))
    some = [answers(np.arange(40) % 3 > 0)] * seeds
    d = repeated_difference(some, some, folds=fold)
    assert (d.value, d.low, d.high) == pytest.approx((0, low - 1, 1 - low))
    if d.claims:
        assert (d.p_value, d.minimal_effect) == pytest.approx((1.0, 1 - low))
        assert f"difference of {100 * (1 - low):.1f} points" in sentence("b", d, d.p_value)
    loss = repeated_difference(some, some, metric="log loss", folds=fold)
    assert loss.value == 0
    assert np.isnan([loss.low, loss.high, loss.minimal_effect]).all()  # it has no range


def test_groups_and_classes_of_unequal_sizes_have_their_own_reach():
    groups = np.repeat(np.arange(8), [1, 2, 3, 4, 6, 6, 8, 10])
    whole = [answers(np.ones(40, bool), groups=groups)] * 3
    found = repeated_value(whole)  # 8 groups, which differ in nothing but their sizes
    assert (found.low, found.high) == pytest.approx(wilson_interval(8, 8))
    labels = np.arange(44) // 40  # the recall of 4 images may be as low as their interval says
    found = repeated_value([answers(np.ones(44, bool), labels)] * 3, metric="balanced accuracy")
    reach = (1 - wilson_interval(40, 40)[0], 1 - wilson_interval(4, 4)[0])
    assert found.low == pytest.approx(1 - (reach[0] ** 4 + reach[1] ** 4) ** 0.25 / 2)


def test_with_one_seed_the_folds_variance_counts_the_images_that_trained():
    """Nadeau & Bengio 2003: 1/K + n2/n1, where a fifth of the other folds validated."""
    rng = np.random.default_rng(3)
    a, b = ([answers(rng.random(100) < share)] for share in (0.9, 0.5))
    fold = np.arange(100) % 5
    right = [np.where(p.labels == p.probabilities.argmax(1), 1.0, 0.0) for p in (a[0], b[0])]
    means = np.array([(right[0] - right[1])[fold == k].mean() for k in range(5)])
    for trained, ratio in ((None, 20 / 80), (64, 20 / 64)):
        d = repeated_difference(a, b, folds=fold, trained=trained)
        half = t.ppf(0.975, 4) * (means.var(ddof=1) * (1 / 5 + ratio)) ** 0.5
        assert (d.low, d.high) == pytest.approx((d.value - half, d.value + half))
        found = repeated_value(a, folds=fold, trained=trained)
        assert found.low < found.value < found.high


def test_a_share_of_some_seeds_is_not_rounded_to_whole_images():
    """14 of 15 answers to 5 images are no 5 of 5."""
    labels = np.repeat([0, 1], [200, 5])
    right = np.ones((3, 205), bool)
    right[0, 200] = False
    found = repeated_value([answers(r, labels) for r in right], metric="balanced accuracy")
    p, z = 14 / 15, norm.ppf(0.975) ** 2 / 5
    low = (p + z / 2 - (z * p * (1 - p) + z * z / 4) ** 0.5) / (1 + z)
    assert found.low < found.value - (p - low) / 2 * 0.99


def test_a_difference_of_balanced_accuracies_is_covered_also_with_a_rare_class():
    """500 images of one class and 5 of the other; most studies find all of these five."""
    labels = np.repeat([0, 1], [500, 5])
    recall = np.array([[0.95, 0.95], [0.93, 0.85]])
    inside, shown = 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        image = rng.normal(size=505)
        a, b = (
            [answers(0.9 * image + 0.44 * rng.normal(size=505) < norm.ppf(r[labels]), labels)
             for _ in range(3)]
            for r in recall
        )  # fmt: skip
        d = repeated_difference(a, b, metric="balanced accuracy")
        inside += d.low <= 0.06 <= d.high
        shown += d.minimal_effect < 0.2
        assert (d.p_value < 0.05) == (not d.low < 0 < d.high)
    assert inside >= 186
    assert shown == 0  # five images don't show what these have


def test_a_difference_that_no_networks_can_have_is_not_stated():
    rng = np.random.default_rng(0)
    a, b = ([answers(rng.random(40) < share) for share in shares] for shares in
            ((0.2, 0.9), (0.9, 0.3)))  # fmt: skip
    d = repeated_difference(a, b)
    assert (d.claims, d.minimal_effect) == (True, np.inf)
    assert d.to_dict()["minimal_effect"] is None
    said = sentence("b", d, d.p_value)
    assert "no difference could have been shown" in said
    assert "inf" not in said


def test_what_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="seeds"):
        repeated_difference([said(rng)], [])
    with pytest.raises(UsageError, match="metric"):
        repeated_difference([said(rng)], [said(rng)], metric="f2")
    with pytest.raises(UsageError, match="images"):
        repeated_difference([said(rng)], [said(rng, n=63)])


@pytest.mark.parametrize("design", [(3, 1), (3, 3)])
def test_the_interval_of_one_network_covers_its_accuracy_over_seeds_and_images(design):
    """The accuracy of the next training on the next images, in at least 93 % of 400 studies."""
    seeds, folds = design
    rng = np.random.default_rng(5)
    covered = []
    for _ in range(400):
        easy = rng.normal(1.0, 1.5, 150)
        fold = np.arange(150) % folds
        trained = rng.normal(0, 0.4, (seeds, folds))[:, fold]
        right = easy + trained + rng.normal(0, 1, (seeds, 150)) > 0
        said = [
            Predictions(
                np.where(r[:, None], [0.9, 0.1], [0.1, 0.9]), np.zeros(150, int), ["a", "b"]
            )
            for r in right
        ]
        found = repeated_value(said, folds=fold)
        assert found.value == pytest.approx(right.mean())
        covered.append(found.low <= TRUE_ACCURACY <= found.high)
    assert np.mean(covered) >= 0.93


# the share of N(1, 1.5² + 0.4² + 1²) above 0
TRUE_ACCURACY = float(norm.cdf(1 / np.sqrt(1.5**2 + 0.4**2 + 1)))
