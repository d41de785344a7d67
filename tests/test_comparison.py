"""Paired comparisons in any metric: tests, corrections, and what could have been shown."""

import json
import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import norm, ttest_1samp
from sklearn import metrics as sk

from regard.evaluation import Predictions, adjust, compare, compare_metrics, decision_curve
from regard.evaluation.intervals import bootstrap_test, draws, percentile, wilson_interval
from regard.evaluation.paired import _by_bootstrap, _shares, _units_behind
from regard.evaluation.paired_shares import PairedShare, mean_of_differences
from regard.evaluation.significance import delong, holm
from tests.test_diagnostics import binary
from tests.test_evaluation import ends, hard, make, pair


def noisy(p, amount, seed):
    """The predictions of a worse network."""
    noise = np.random.default_rng(seed).normal(size=p.probabilities.shape) * amount
    q = p.probabilities * np.exp(noise)
    return Predictions(q / q.sum(axis=1, keepdims=True), p.labels, p.classes, p.groups)


def by_name(comparisons):
    return {c.metric: c for c in comparisons}


def test_holm_by_hand():
    # statsmodels.stats.multitest.multipletests([0.01, 0.04, 0.03, 0.005], method="holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    first, nothing = holm([0.02, math.nan])
    assert first == 0.02
    assert math.isnan(nothing)
    assert holm([]) == []


def test_delong_is_its_definition():
    rng = np.random.default_rng(1)
    y = rng.random(60) < 0.4
    scores = [np.round(rng.normal(size=60) + shift * y, 1) for shift in (1.0, 0.6)]
    areas, covariance = delong(y, *scores)
    parts = []
    for k, s in enumerate(scores):
        wins = (s[y][:, None] > s[~y]) + 0.5 * (s[y][:, None] == s[~y])  # (positive, negative)
        assert areas[k] == pytest.approx(sk.roc_auc_score(y, s)) == pytest.approx(wins.mean())
        parts.append((wins.mean(axis=1), wins.mean(axis=0)))
    expected = np.cov([p[0] for p in parts]) / y.sum() + np.cov([p[1] for p in parts]) / (~y).sum()
    assert covariance == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="1 positive"):
        delong(np.array([True, False, False]), np.arange(3.0))


def test_differences_are_those_of_the_metrics_and_accuracy_is_mcnemars():
    a, b = make(300, 6, strength=3.0), noisy(make(300, 6, strength=3.0), 1.0, 1)
    found = by_name(compare_metrics(a, b, ordered=a.classes, resamples=100))
    assert "balanced_accuracy" in found
    assert "macro_recall" not in found  # the same number, which would count twice in Holm's
    said = [p.probabilities.argmax(axis=1) for p in (a, b)]
    expected = [sk.matthews_corrcoef(a.labels, s) for s in said]
    assert (found["mcc"].a, found["mcc"].b) == pytest.approx(tuple(expected))
    assert found["mcc"].difference.value == pytest.approx(expected[0] - expected[1])
    exact = compare(a, b, resamples=100)
    assert found["top1"].p_value == exact.p_value
    assert found["top1"].difference == exact.difference
    assert {"nll", "ece", "roc_auc_macro", "quadratic_kappa", "top5"} <= found.keys()
    assert found["mcc"].shown == "better"
    assert found["nll"].difference.value < 0
    assert found["nll"].shown == "better"  # lower is better
    assert by_name(compare_metrics(b, a, resamples=100))["nll"].shown == "worse"
    assert all(c.adjusted >= c.p_value for c in found.values())
    json.dumps([c.to_dict() for c in found.values()], allow_nan=False)


def test_auc_of_a_class_is_compared_by_delong_and_by_groups_by_bootstrap():
    a = binary(300)
    b = noisy(a, 1.5, 1)
    c = by_name(compare_metrics(a, b, positive="sick", metrics=["positive/roc_auc"]))
    c = c["positive/roc_auc"]
    areas, cov = delong(a.labels == 1, a.probabilities[:, 1], b.probabilities[:, 1])
    error = math.sqrt(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    assert c.test == "DeLong test"
    assert c.p_value == pytest.approx(2 * norm.sf((areas[0] - areas[1]) / error))
    assert c.detectable == pytest.approx((1.959964 + 0.841621) * error, rel=1e-5)
    groups = np.arange(300).astype(str)  # groups of one: the bootstrap agrees
    grouped = Predictions(a.probabilities, a.labels, a.classes, groups)
    d = compare_metrics(grouped, b, positive="sick", metrics=["positive/roc_auc"])[0]
    assert d.test == "paired bootstrap"
    assert ends(d.difference) == pytest.approx(ends(c.difference), abs=0.02)
    assert d.detectable == pytest.approx(c.detectable, rel=0.15)


def test_what_is_shown_and_what_could_have_been_are_said():
    a, b = pair(80, 30, 8, 2)
    c = compare_metrics(a, b, metrics=["top1"], resamples=100)[0]
    assert c.shown == "better"
    assert c.sentence("cbam", "plain").startswith("cbam is shown to be better than plain in top1")
    assert compare_metrics(b, a, metrics=["top1"], resamples=100)[0].shown == "worse"
    a, b = pair(80, 9, 7, 4)
    c = compare_metrics(a, b, metrics=["top1"], resamples=2000)[0]
    assert c.shown == "not shown"
    # standard error of the paired difference, by normal theory
    error = math.sqrt((0.09 + 0.07 - 0.02**2) / 100)
    assert c.detectable == pytest.approx(2.8016 * error, rel=0.1)
    assert f"{c.detectable:.4f} or more" in c.sentence()
    assert "p = 0.804, exact McNemar test);" in c.sentence()  # binomtest(9, 16)
    both = compare_metrics(a, b, metrics=["top1", "kappa"], resamples=100)
    assert both[0].adjusted > 1.2 * both[0].p_value
    told = f"exact McNemar test; {both[0].adjusted:.3g} after Holm's correction);"
    assert f"p = 0.804, {told}" in both[0].sentence()
    same = compare_metrics(a, a, resamples=50)
    assert all(c.shown == "not shown" for c in same)
    assert all("nan" not in c.sentence() for c in same)


def test_groups_widen_and_several_networks_are_corrected():
    a = make(400, 3, strength=2.0)
    b = noisy(a, 0.8, 1)
    of = np.repeat(np.arange(400), 4)
    many = [Predictions(p.probabilities[of], p.labels[of], p.classes) for p in (a, b)]
    names = of.astype(str)
    grouped = [Predictions(p.probabilities, p.labels, p.classes, names) for p in many]
    by_image, by_group = (
        compare_metrics(*ps, metrics=["kappa"], resamples=400)[0] for ps in (many, grouped)
    )
    width = [c.difference.high - c.difference.low for c in (by_image, by_group)]
    assert width[1] == pytest.approx(2 * width[0], rel=0.15)
    family = [compare_metrics(a, noisy(a, x, 2), metrics=["kappa"])[0] for x in (0.1, 0.5, 0.6)]
    adjusted = [c.adjusted for c in adjust(family)]
    assert adjusted == pytest.approx(holm([c.p_value for c in family]))
    assert max(adjusted) <= 1


@pytest.mark.slow
def test_equal_networks_are_rarely_shown_to_differ():
    wrong = 0
    for seed in range(60):
        p = make(150, 3, seed=seed)
        a, b = noisy(p, 0.7, 1000 + seed), noisy(p, 0.7, 2000 + seed)
        c = compare_metrics(a, b, metrics=["kappa"], resamples=150, seed=seed)[0]
        wrong += c.shown != "not shown"
    assert wrong <= 8  # 5 % of 60 are 3


@pytest.mark.parametrize("units", [4, 8, 40])
def test_few_groups_claim_no_more_than_their_level_and_have_the_stated_power(units):
    """Means of groups, normal, of networks that are equal and that differ by what is stated."""
    rng = np.random.default_rng(0)
    stated = 0.0
    for effect, low, high in ((0.0, 0.03, 0.07), (None, 0.74, 0.86)):
        effect = stated if effect is None else effect
        made = []
        for _ in range(500):
            each = rng.normal(effect, 1.0, units)
            times = rng.multinomial(units, np.full(units, 1 / units), 400)
            args = ("nll", (6 * units, units, units), each.mean(), 0.0, times @ each / units, 0.95)
            made.append(_by_bootstrap(*args))
        out = [not one.difference.low <= 0 <= one.difference.high for one in made]
        assert out == [one.p_value <= 0.05 for one in made]
        assert low <= np.mean(out) <= high
        stated = np.mean([one.detectable for one in made])


def test_p_values_agree_with_intervals_and_of_means_with_the_t_test_of_groups():
    groups = np.repeat(np.arange(8), 6)
    labels = np.tile([0, 1], 24)
    by_bootstrap, by_t = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        nets = []
        for shift in (1.0, 1.6):
            logit = (2 * labels - 1) * (shift + rng.normal(0, 0.8, 8)[groups])
            p = 1 / (1 + np.exp(-logit - rng.normal(0, 1, 48)))
            nets.append(Predictions(np.stack([1 - p, p], 1), labels, ["a", "b"], groups=groups))
        names = ["balanced_accuracy", "nll", "mcc"]
        found = by_name(compare_metrics(*nets, metrics=names, resamples=200, seed=seed))
        for c in found.values():
            assert (c.p_value <= 0.05) == (not c.difference.low <= 0 <= c.difference.high)
        losses = [-np.log(p.probabilities[np.arange(48), labels]).reshape(8, 6) for p in nets]
        by_bootstrap.append(found["nll"].p_value)
        by_t.append(ttest_1samp((losses[0] - losses[1]).mean(axis=1), 0).pvalue)
    assert np.mean(by_bootstrap) == pytest.approx(np.mean(by_t), abs=0.02)


def test_what_could_have_been_shown_counts_groups():
    groups = np.arange(60) // 20
    right = np.arange(60) % 5 > 0
    same = [Predictions(np.where(right[:, None], [0.9, 0.1], [0.1, 0.9]), np.zeros(60, int),
                        ["a", "b"], groups=groups)] * 2  # fmt: skip
    reach = wilson_interval(0, 3)[1]
    for c in compare_metrics(*same, metrics=["top1", "macro_f1", "nll"], resamples=50):
        if c.metric == "nll":
            assert np.isnan(c.detectable)  # a share's reach is none of a loss
        else:
            assert (c.detectable, c.difference.high) == pytest.approx((reach, reach))
    # two groups alike, and one where the networks differ: three can't show that
    other = right.copy()
    other[:20] = ~other[:20]
    b = Predictions(np.where(other[:, None], [0.9, 0.1], [0.1, 0.9]), np.zeros(60, int), ["a", "b"])
    c = compare_metrics(same[0], b, metrics=["top1"], resamples=200)[0]
    assert c.detectable == np.inf
    assert c.to_dict()["detectable"] is None
    assert "no difference could have been shown" in c.sentence()
    # each group has one image more: the samples are all alike, and yet three groups are few
    one = right.copy()
    one[::20] = True
    b = Predictions(np.where(one[:, None], [0.9, 0.1], [0.1, 0.9]), np.zeros(60, int), ["a", "b"])
    d = compare(b, same[0]).difference
    assert ends(d) == pytest.approx((0.05 - reach, 0.05 + reach))


def test_wrong_metrics_are_refused():
    p = make(20, 3)
    with pytest.raises(ValueError, match=r"metric=auc: choose top1, .*, roc_auc_macro"):
        compare_metrics(p, p, metrics=["auc"], resamples=10)
    with pytest.raises(ValueError, match="metric=positive/roc_auc: needs positive"):
        compare_metrics(p, p, metrics=["positive/roc_auc"], resamples=10)


def test_a_difference_of_a_class_is_as_uncertain_as_its_few_patients():
    """Of 60 patients: with one ill nothing is claimed, and six don't show what 30 do."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 60))
    found = {}
    for ill in (1, 6, 30):
        labels = (np.arange(60) < ill).astype(int)
        both = []
        for k in range(2):
            score = 1 / (1 + np.exp(-(noise[k] + (2.0 - 1.2 * k) * (2 * labels - 1))))
            both.append(Predictions(np.stack([1 - score, score], 1), labels, ["well", "ill"]))
        found[ill] = by_name(compare_metrics(*both, positive="ill", resamples=300))
    for name in ("positive/sensitivity", "positive/average_precision", "balanced_accuracy"):
        alone, few, many = (found[ill][name] for ill in (1, 6, 30))
        assert alone.test == "none"
        assert math.isnan(alone.p_value)
        assert few.detectable > 1.3 * many.detectable
        assert "nan" not in alone.sentence()
    for name in ("positive/specificity", "nll"):
        assert math.isfinite(found[1][name].p_value)


def test_bands_and_tests_allow_for_the_rarer_kind():
    """Of 60 patients 3 are ill: what resamples vary is widened for 3 units, not for 60."""
    labels = (np.arange(60) < 3).astype(int)
    rng = np.random.default_rng(2)
    score = 1 / (1 + np.exp(-(rng.normal(size=60) + labels)))
    p = Predictions(np.stack([1 - score, score], 1), labels, ["well", "ill"])
    drawn = rng.normal(0.0, 0.05, 400)
    args = (0.0, 0.0, drawn, 0.95)
    few, many = (_by_bootstrap("brier", (60, 60, rarer), *args) for rarer in (3, 60))
    assert few.detectable == pytest.approx(many.detectable * (3 / 2 * 59 / 60) ** 0.5)
    assert few.difference.high > 1.15 * many.difference.high
    counts = {name: _units_behind(name, p, np.arange(60), "ill") for name in (
        "top1", "nll", "kappa", "balanced_accuracy", "positive/f1", "positive/sensitivity",
        "positive/specificity",
    )}  # fmt: skip
    assert list(counts.values()) == [60, 60, 3, 3, 3, 3, 57]
    # for 3 units the band is as wide as the samples
    band = decision_curve(p, "ill", thresholds=[0.05], resamples=400, seed=0)
    benefit = []
    called = p.probabilities[:, 1] >= 0.05
    for times in draws(60, 400, 0):
        tp, fp = times @ (called & (labels == 1)), times @ (called & (labels == 0))
        benefit.append((tp - 0.05 / 0.95 * fp) / 60)
    assert band.high[0] == pytest.approx(max(benefit), abs=1e-3)
    assert band.low[0] == pytest.approx(min(benefit), abs=1e-3)


def test_p_values_agree_with_intervals_that_allow_for_the_rarer_kind():
    rng = np.random.default_rng(3)
    for value in np.linspace(0.08, 0.2, 40):
        drawn = value + rng.normal(0.0, 0.05, 2000)
        found = _by_bootstrap("brier", (60, 60, 3), value, 0.0, drawn, 0.95)
        assert (found.difference.low > 0) == (found.p_value <= 0.05)


def test_a_difference_is_as_uncertain_as_percentiles_and_students_t_say():
    """Of skewed samples each end is the wider of the two, and p the larger."""
    rng = np.random.default_rng(4)
    larger = set()
    for value in (0.15, -0.15, 0.01):
        for side in (1, -1):
            drawn = value + side * (rng.gamma(1.0, 0.1, 1000) - 0.1)
            d, p = bootstrap_test(value, drawn, 0.95, 12, 5)
            scale = math.sqrt(5 / 4)
            error = drawn.std(ddof=1) * scale
            half = stats.t.ppf(0.975, 11) * error
            share = stats.norm.cdf(stats.t.ppf(0.975, 11) * scale)
            low, high = np.quantile(drawn, [1 - share, share])
            assert ends(d) == pytest.approx((min(low, value - half), max(high, value + half)))
            by_t = 2 * stats.t.sf(abs(value) / error, 11)
            assert p >= by_t * (1 - 1e-9)
            assert (p <= 0.05) == (not d.low <= 0 <= d.high)
            larger.add("t" if p == pytest.approx(by_t) else "percentiles")
    assert larger == {"t", "percentiles"}


def test_equal_networks_in_few_patients_rarely_differ_in_their_losses():
    """12 patients of 5 images; percentiles alone claim more differences."""
    significant, by_percentiles, studies = 0, 0, 500
    for seed in range(studies):
        rng = np.random.default_rng([7, seed])
        patient = np.repeat(np.arange(12), 5)
        labels = (rng.random(12) < 0.4).astype(int)[patient]
        both = []
        for _ in range(2):
            logit = 2 * labels - 1 + 0.6 * rng.normal(size=12)[patient] + rng.normal(size=60)
            p = 1 / (1 + np.exp(-1.5 * logit))
            both.append(Predictions(np.stack([1 - p, p], 1), labels, ["well", "ill"], patient))
        losses = [-np.log(p.probabilities[np.arange(60), labels]) for p in both]
        each = (losses[0] - losses[1]).reshape(12, 5).mean(axis=1)
        drawn = rng.multinomial(12, np.full(12, 1 / 12), 200) @ each / 12
        c = _by_bootstrap("nll", (60, 12, 12), each.mean(), 0.0, drawn, 0.95)
        significant += c.p_value <= 0.05
        alone = percentile(each.mean(), drawn, 0.95, 12)
        by_percentiles += not alone.low <= 0 <= alone.high
    assert 0.02 * studies < significant < 0.065 * studies
    assert significant < 0.9 * by_percentiles


def two_networks(counts, recalls, rho, seed, size=1):
    """Networks that share a part of what makes an image hard; `size` images per group."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    unit = np.concatenate([1000 * c + np.arange(n) // size for c, n in enumerate(counts)])
    _, group = np.unique(unit, return_inverse=True)
    hard_images = rng.normal(size=len(labels)) if size == 1 else rng.normal(size=len(labels))[group]
    both = []
    for recall in recalls:
        own = rng.normal(size=len(labels))
        z = math.sqrt(rho) * hard_images + math.sqrt(1 - rho) * own
        right = z < norm.ppf(np.asarray(recall)[labels])
        called = np.where(right, labels, (labels + 1) % len(counts))
        names = None if size == 1 else unit.astype(str)
        both.append(hard(labels, called, len(counts), names))
    return both


@pytest.mark.parametrize(
    ("counts", "recalls", "size"),
    [
        # both networks often find all images of the rare class
        ([500, 5], ([0.99, 0.95], [0.99, 0.8]), 1),
        ([292, 8], ([0.95, 0.9], [0.95, 0.8]), 1),
        ([50, 50], ([0.9, 0.8], [0.8, 0.8]), 1),
        ([5] * 10, ([0.9] * 10, [0.8] * 10), 1),
        ([3, 5, 8, 20, 50, 100], ([0.95] * 6, [0.9] * 6), 1),
        ([200, 20], ([0.95, 0.9], [0.95, 0.8]), 5),
    ],
)
def test_the_difference_of_balanced_accuracies_is_covered_also_with_a_rare_class(
    counts, recalls, size
):
    """By the bootstrap it is in 0.65 and 0.79 of the first two designs."""
    true, times = np.mean(np.subtract(*recalls)), 300
    inside, widths = 0, []
    for seed in range(times):
        a, b = two_networks(counts, recalls, 0.6, seed, size)
        shares = _shares("balanced_accuracy", a, b, None, (None, None))
        parts = [PairedShare.of(*share, grouped=size > 1) for share in shares]
        e = mean_of_differences(parts, sum(counts) // size, 0.95)
        inside += e.low - 1e-9 <= true <= e.high + 1e-9
        widths.append(e.high - e.low)
    assert inside / times > 0.93
    assert np.mean(widths) < 0.75


def test_a_rare_class_that_both_networks_find_is_no_proof_that_they_are_equal():
    a, b = two_networks([500, 5], ([0.99, 1.0], [0.9, 1.0]), 0.6, 0)
    (c,) = compare_metrics(a, b, metrics=["balanced_accuracy"], resamples=100)
    assert c.difference.value == pytest.approx(
        compare(a, b).difference.value * 505 / 500 / 2  # half of the frequent class's
    )
    # Bonett and Price's interval of the rare class, 0 of 5, is 0 +- 1.96 sqrt(2/7/7)
    reach = norm.ppf(0.975) * math.sqrt(2 / 7 / 7) / 2
    assert c.difference.low < c.difference.value - reach
    assert c.p_value > 0.05
    assert c.detectable > reach


def test_the_p_value_of_balanced_accuracy_is_where_its_interval_touches_0():
    for counts, size in (([40, 60], 1), ([30, 30], 5)):
        a, b = two_networks(counts, ([0.95, 0.9], [0.75, 0.8]), 0.5, 1, size)
        (c,) = compare_metrics(a, b, metrics=["balanced_accuracy"], resamples=100)
        assert 1e-6 < c.p_value < 0.9
        how = {"metrics": ["balanced_accuracy"], "resamples": 100}
        (touching,) = compare_metrics(a, b, confidence=1 - c.p_value, **how)
        assert touching.difference.low == pytest.approx(0.0, abs=1e-6)


def test_sensitivities_are_compared_by_mcnemar_on_the_ill_and_specificities_on_the_well():
    a, b = two_networks([60, 40], ([0.9, 0.95], [0.85, 0.7]), 0.5, 3)
    found = by_name(compare_metrics(a, b, positive="c1", resamples=100))
    for name, kind in (("sensitivity", a.labels == 1), ("specificity", a.labels == 0)):
        right_a, right_b = ((p.probabilities.argmax(1) == p.labels)[kind] for p in (a, b))
        only = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
        c = found[f"positive/{name}"]
        assert c.p_value == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
        assert c.test == "exact McNemar test"
        assert c.difference.value == pytest.approx(right_a.mean() - right_b.mean())
        n = kind.sum() + 2
        p, q = (only[0] + 1) / n, (only[1] + 1) / n
        half = norm.ppf(0.975) * math.sqrt((p + q - (p - q) ** 2) / n)
        assert ends(c.difference) == pytest.approx((p - q - half, p - q + half))
    # with thresholds the decisions are others
    (c,) = compare_metrics(a, a, positive="c1", metrics=["positive/sensitivity"],
                           thresholds=(0.0, None), resamples=100)  # fmt: skip
    assert c.a == 1.0
    assert c.difference.value == pytest.approx(1 - c.b)
    assert c.p_value == pytest.approx(0.5 ** (round((1 - c.b) * 40) - 1))


def test_groups_of_several_classes_are_as_uncertain_as_the_bootstrap_says():
    labels, patient = np.arange(120) // 60, np.arange(120) % 12
    groups = np.array([f"{i:02}" for i in patient])
    # a is right for 11 patients, b for 7, in both classes alike: the recalls are not independent
    a, b = (hard(labels, np.where(patient < n, labels, 1 - labels), 2, groups) for n in (11, 7))
    (c,) = compare_metrics(a, b, metrics=["balanced_accuracy"], resamples=200)
    shares = _shares("balanced_accuracy", a, b, None, (None, None))
    alone = mean_of_differences([PairedShare.of(*s, grouped=True) for s in shares], 12, 0.95)
    drawn = []
    for times in draws(12, 200, 0):
        weights = times[(np.arange(120) % 12)]
        recalls = [
            [np.average(p.probabilities.argmax(1)[p.labels == k] == k,
                        weights=weights[p.labels == k]) for k in (0, 1)]
            for p in (a, b)
        ]  # fmt: skip
        drawn.append(np.mean(recalls[0]) - np.mean(recalls[1]))
    sampled, p = bootstrap_test(c.difference.value, np.array(drawn), 0.95, 12)
    assert sampled.low < alone.low
    assert c.difference.low == pytest.approx(min(alone.low, sampled.low), abs=1e-9)
    assert c.difference.high == pytest.approx(max(alone.high, sampled.high), abs=1e-9)
    assert c.p_value >= p - 1e-12


def test_what_is_the_same_under_two_names_is_corrected_for_once():
    a, b = binary(80), noisy(binary(80), 1.0, 1)
    every = compare_metrics(a, b, positive="sick", resamples=20)
    values = [(c.metric, round(c.a, 9), round(c.b, 9)) for c in every]
    numbers = [v[1:] for v in values if v[0] not in ("top1", "balanced_accuracy")]
    assert len(set(numbers)) == len(numbers)
    named = compare_metrics(a, b, positive="sick", resamples=20,
                            metrics=["mcc", "brier", "roc_auc_macro", "macro_recall"])  # fmt: skip
    found = by_name(every)
    for name in ("mcc", "brier"):
        same = found[f"positive/{name}"]
        assert by_name(named)[name].difference.value == pytest.approx(same.difference.value)
    other = compare_metrics(a, b, positive="sick", resamples=20, thresholds=(0.3, None))
    assert "mcc" in by_name(other)  # positive/mcc is of the threshold
