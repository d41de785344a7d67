"""The numbers of a diagnostic study against scikit-learn, scipy and values known by hand."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression

from regard.cli import run_command
from regard.commands.diagnostics import DiagnosticFlags
from regard.commands.subgroups import print_subgroups
from regard.evaluation import (
    Predictions,
    choose_threshold,
    compare_metrics,
    decision_curve,
    diagnose,
    evaluate,
    evaluate_subgroups,
    fit_temperature,
    reliability,
    subgroup_columns,
    subgroups_csv,
    with_temperature,
)
from regard.evaluation.areas import area, newcombe
from regard.evaluation.intervals import draws, wilson_interval
from regard.evaluation.recalibration import calibration_line
from regard.evaluation.statistics import OneClassStatistics, RankStatistics, reaches
from regard.runs import RunFolder
from tests.helpers import rows_of
from tests.test_evaluation import ends, hard, make


def weighted(p, seed=1):
    """Whole weights of the images, some 0, and the images repeated so often."""
    weights = np.random.default_rng(seed).integers(0, 4, size=len(p)).astype(float)
    rows = np.repeat(np.arange(len(p)), weights.astype(int))
    return weights, p.labels[rows], p.probabilities[rows]


def rounded(n=300, n_classes=4, decimals=1, **options):
    """Predictions with many ties."""
    p = make(n, n_classes, **options)
    q = np.round(p.probabilities, decimals) + 0.01
    return Predictions(q / q.sum(axis=1, keepdims=True), p.labels, p.classes, p.groups)


S20, S10 = (wilson_interval(n, n)[0] for n in (20, 10))  # lower ends of all right


@pytest.mark.parametrize("p", [make(300, 4), rounded()], ids=["distinct", "ties"])
def test_areas_are_scikit_learns_with_and_without_weights(p):
    for weights, y, q in ((np.ones(300), p.labels, p.probabilities), weighted(p)):
        values = RankStatistics(p)(weights)
        onehot = np.eye(4)[y]
        for average in ("macro", "weighted"):
            expected = sk.roc_auc_score(y, q, multi_class="ovr", average=average)
            assert values[f"roc_auc_{average}"] == pytest.approx(expected, abs=1e-12)
            expected = sk.average_precision_score(onehot, q, average=average)
            assert values[f"average_precision_{average}"] == pytest.approx(expected, abs=1e-12)
        expected = sk.roc_auc_score(y, q, multi_class="ovo", average="macro")
        assert values["roc_auc_hand_till"] == pytest.approx(expected, abs=1e-12)
        for c in range(4):
            expected = sk.roc_auc_score(y == c, q[:, c])
            assert values[f"roc_auc/c{c}"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("p", [make(300, 3), rounded(n_classes=3)], ids=["distinct", "ties"])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_one_class_against_the_rest_is_scikit_learns(p, threshold):
    statistic = OneClassStatistics(p, "c1", threshold, max_fpr=0.3)
    for weights, y, q in ((np.ones(300), p.labels, p.probabilities), weighted(p)):
        true, score = y == 1, q[:, 1]
        called = q.argmax(axis=1) == 1 if threshold is None else score >= threshold
        ratios = sk.class_likelihood_ratios(true, called)
        expected = {
            "roc_auc": sk.roc_auc_score(true, score),
            "average_precision": sk.average_precision_score(true, score),
            "sensitivity": sk.recall_score(true, called),
            "specificity": sk.recall_score(~true, ~called),
            "ppv": sk.precision_score(true, called),
            "npv": sk.precision_score(~true, ~called),
            "lr_positive": ratios[0],
            "lr_negative": ratios[1],
            "f1": sk.f1_score(true, called),
            "mcc": sk.matthews_corrcoef(true, called),
            "brier": sk.brier_score_loss(true, score),
            "partial_roc_auc": sk.roc_auc_score(true, score, max_fpr=0.3),
        }
        assert statistic(weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_agreement_is_scikit_learns(n_classes):
    p = make(300, n_classes)
    y, predicted = p.labels, p.probabilities.argmax(axis=1)
    ordered = p.classes[::-1]
    d = diagnose(p, ordered=ordered, resamples=20).metrics
    expected = {
        "mcc": sk.matthews_corrcoef(y, predicted),
        "kappa": sk.cohen_kappa_score(y, predicted),
        # scikit-learn has it for several classes since 1.7
        "brier": sk.brier_score_loss(y == 1, p.probabilities[:, 1])
        if n_classes == 2
        else ((p.probabilities - np.eye(n_classes)[y]) ** 2).sum(1).mean(),
        "quadratic_kappa": sk.cohen_kappa_score(y, predicted, weights="quadratic"),
    }
    assert {k: d[k].value for k in expected} == pytest.approx(expected, abs=1e-12)
    if n_classes == 4:  # the order matters
        ordered = ["c0", "c2", "c1", "c3"]
        rank = np.array([0, 2, 1, 3])
        other = sk.cohen_kappa_score(rank[y], rank[predicted], weights="quadratic")
        found = diagnose(p, ordered=ordered, resamples=2).metrics["quadratic_kappa"].value
        assert found == pytest.approx(other, abs=1e-12) != expected["quadratic_kappa"]


def binary(n=400, *, seed=0, slope=1.0, shift=0.0, groups=None):
    """Calibrated probabilities of "sick", distorted by a slope and a shift of their logit."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(-0.5, 1.5, size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    p = 1 / (1 + np.exp(-(slope * logit + shift)))
    return Predictions(np.stack([1 - p, p], axis=1), labels, ["well", "sick"], groups)


def test_calibration_slope_is_scikit_learns_and_finds_a_distortion():
    p = binary(2000, slope=2.0, shift=1.0)
    metrics = diagnose(p, positive="sick", resamples=100).one_class.metrics
    logit = np.log(p.probabilities[:, 1] / p.probabilities[:, 0])
    fitted = LogisticRegression(C=np.inf, tol=1e-10).fit(logit[:, None], p.labels)
    slope, intercept = metrics["calibration_slope"], metrics["calibration_intercept"]
    assert slope.value == pytest.approx(fitted.coef_[0, 0], abs=1e-5)
    assert slope.low < 0.5 < slope.high < 0.7
    # with the slope fixed at 1 the mean probability becomes the share
    moved = 1 / (1 + np.exp(-(logit + intercept.value)))
    assert moved.mean() == pytest.approx(p.labels.mean(), abs=1e-9)
    assert intercept.high < 0
    good = diagnose(binary(2000), positive="sick", resamples=100).one_class.metrics
    assert good["calibration_slope"].low < 1 < good["calibration_slope"].high
    assert good["calibration_intercept"].low < 0 < good["calibration_intercept"].high
    apart = diagnose(hard([0, 0, 1, 1], [0, 0, 1, 1], 2), positive="c1", resamples=20)
    assert math.isnan(apart.one_class.metrics["calibration_slope"].value)


@pytest.mark.parametrize(("mean", "deviation"), [(2.0, 0.3), (-2.5, 0.3), (2.0, 0.0), (0.0, 9.0)])
def test_calibration_in_the_large_is_where_the_mean_is_the_share(mean, deviation):
    """Far from the start a step of Newton's method goes beyond the maximum."""
    logit = np.random.default_rng(0).normal(mean, deviation, 200)
    p = 1 / (1 + np.exp(-logit))
    labels = (np.arange(200) % 5 < 2).astype(int)
    found = calibration_line(Predictions(np.stack([1 - p, p], 1), labels, ["well", "ill"]), "ill")
    root = optimize.brentq(lambda a: (1 / (1 + np.exp(-(logit + a)))).mean() - 0.4, -30, 30)
    assert found["calibration_intercept"].value == pytest.approx(root, abs=1e-5)
    assert math.isnan(found["calibration_slope"].value) == (deviation == 0)


@pytest.mark.parametrize("size", [1, 4])
def test_calibration_errors_are_those_of_a_jackknife(size):
    """Leaving each image or group out in turn, with scikit-learn's regression."""
    groups = np.arange(240) // size
    effect = np.random.default_rng(3).normal(0.0, 0.7 * (size > 1), 240)[groups]
    p = binary(240, seed=5, groups=groups if size > 1 else None)
    logit = np.log(p.probabilities[:, 1] / p.probabilities[:, 0]) + effect
    q = 1 / (1 + np.exp(-logit))
    p = Predictions(np.stack([1 - q, q], 1), p.labels, p.classes, p.groups)
    slope = calibration_line(p, "sick")["calibration_slope"]
    left = []
    for g in range(240 // size):
        kept = groups != g
        fit = LogisticRegression(C=np.inf, tol=1e-8).fit(logit[kept, None], p.labels[kept])
        left.append(fit.coef_[0, 0])
    n = len(left)
    error = math.sqrt((n - 1) / n * np.square(left - np.mean(left)).sum())
    rarer = min(len(np.unique(groups[p.labels == c])) for c in (0, 1))
    half = stats.t.ppf(0.975, rarer - 1) * error
    assert slope.high - slope.value == pytest.approx(half, rel=0.05)
    assert slope.value - slope.low == pytest.approx(half, rel=0.05)


def test_calibration_slopes_of_few_patients_have_intervals_that_hold_the_true_one():
    """12 patients of 5 images each; percentiles of a bootstrap held it in 83 % of such tests."""
    held, tests = 0, 300
    for seed in range(tests):
        rng = np.random.default_rng([11, seed])
        patient = np.repeat(np.arange(12), 5)
        ill = (rng.random(12) < 0.4)[patient]
        if ill.all() or not ill.any():
            tests -= 1
            continue
        # the logit is normal with deviation 1 and mean +-1, so that twice it is the log odds
        logit = 2 * ill - 1 + rng.normal(0, 0.6, 12)[patient] + rng.normal(0, 0.8, 60)
        p = 1 / (1 + np.exp(-(2 * logit)))
        predictions = Predictions(
            np.stack([1 - p, p], 1), ill.astype(int), ["well", "sick"], patient.astype(str)
        )
        slope = calibration_line(predictions, "sick")["calibration_slope"]
        held += slope.low <= 1 <= slope.high
    assert 0.93 <= held / tests <= 0.995


def test_intervals_and_counts_of_one_class():
    p = binary(200)
    one = diagnose(p, positive="sick", resamples=200).one_class
    called = p.probabilities[:, 1] > 0.5
    tn, fp, fn, tp = sk.confusion_matrix(p.labels, called).ravel().tolist()
    assert one.counts == {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
    from scipy.stats import binomtest

    for name, hits, n in (
        ("sensitivity", tp, tp + fn), ("specificity", tn, tn + fp), ("ppv", tp, tp + fp),
        ("npv", tn, tn + fn),
    ):  # fmt: skip
        expected = binomtest(hits, n).proportion_ci(method="wilson")
        assert ends(one.metrics[name]) == pytest.approx(tuple(expected))
    for name, estimate in one.metrics.items():
        assert estimate.low < estimate.value < estimate.high, name
    pairs = np.arange(200) // 4
    grouped = diagnose(binary(200, groups=pairs), positive="sick", resamples=200).one_class
    assert ends(grouped.metrics["sensitivity"]) != ends(one.metrics["sensitivity"])


@pytest.mark.parametrize(
    ("tp", "fn", "tn", "fp", "name", "value", "low", "high"),
    [
        (20, 0, 10, 10, "lr_negative", 0, 0, (1 - S20) / 0.5),
        (0, 20, 10, 10, "lr_positive", 0, 0, (1 - S20) / 0.5),
        (10, 10, 20, 0, "lr_positive", np.inf, 0.5 / (1 - S20), np.inf),
        (10, 10, 0, 20, "lr_negative", np.inf, 0.5 / (1 - S20), np.inf),
        # both at their ends: both are uncertain
        (20, 0, 10, 0, "lr_negative", 0, 0, (1 - S20) / S10),
        (20, 0, 10, 0, "lr_positive", np.inf, S20 / (1 - S10), np.inf),
        (20, 0, 0, 10, "lr_positive", 1, S20, 1 / S10),
        (0, 20, 10, 0, "lr_negative", 1, S20, 1 / S10),
    ],
)
def test_ratios_whose_resamples_are_all_alike(tp, fn, tn, fp, name, value, low, high):
    labels = np.repeat([1, 0], [tp + fn, tn + fp])
    said = np.repeat([1, 0, 0, 1], [tp, fn, tn, fp])
    found = diagnose(hard(labels, said, 2), positive="c1", resamples=50).one_class.metrics[name]
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high))


@pytest.mark.parametrize(("right", "n"), [(True, 12), (False, 12), (False, 40)])
def test_an_mcc_of_one_or_minus_one_is_no_certainty(right, n):
    """Of 12 images a few bootstrap samples are of one class, whose MCC is 0 by convention."""
    true = np.arange(n) % 2
    d = diagnose(hard(true, true if right else 1 - true, 2), positive="c1")
    least = 2 * wilson_interval(n // 2, n // 2)[0] - 1
    for mcc in (d.metrics["mcc"], d.one_class.metrics["mcc"]):
        expected = (1.0, least, 1.0) if right else (-1.0, -1.0, -least)
        assert (mcc.value, mcc.low, mcc.high) == pytest.approx(expected)


def test_what_cannot_be_measured_is_none_in_json():
    perfect = hard([0] * 20 + [1] * 10, [0] * 20 + [1] * 10, 2)
    d = diagnose(perfect, positive="c1", resamples=50)
    written = json.loads(json.dumps(d.to_dict(), allow_nan=False))
    area = written["one_class"]["metrics"]["roc_auc"]
    assert (area["value"], area["high"]) == (1.0, 1.0)
    # all right is no certainty
    half, low = (1 + wilson_interval(10, 10)[0]) / 2, newcombe(1.0, 10, 20, 0.95)[0]
    assert area["low"] == pytest.approx(min(half, low))
    assert written["one_class"]["metrics"]["lr_positive"]["value"] is None  # infinite
    assert d.metrics["mcc"].low < 0.9
    for p in (hard([1], [1], 2), hard([1, 1], [0, 1], 2, ["x", "x"])):
        d = diagnose(p, positive="c1", resamples=20)
        json.dumps(d.to_dict(), allow_nan=False)
        for estimate in (*d.metrics.values(), *d.one_class.metrics.values()):
            assert not estimate.has_interval
    never = diagnose(hard([0, 0, 1], [0, 0, 0], 2), positive="c1", resamples=20).one_class.metrics
    assert math.isnan(never["ppv"].value)
    assert never["sensitivity"].value == 0.0


def test_rank_metrics_of_many_classes_take_bounded_time():
    p = make(2000, 300)
    d = diagnose(p, resamples=1000).metrics
    assert "roc_auc_hand_till" not in d
    areas = [sk.roc_auc_score(p.labels == c, p.probabilities[:, c]) for c in np.unique(p.labels)]
    assert d["roc_auc_macro"].value == pytest.approx(np.mean(areas))
    assert not d["roc_auc_macro"].has_interval
    assert d["kappa"].has_interval
    area, kappa = compare_metrics(p, p, metrics=["roc_auc_macro", "kappa"], resamples=700)
    assert area.a == d["roc_auc_macro"].value
    assert math.isnan(area.p_value)
    assert "(not compared: it would take minutes)" in area.sentence()
    assert kappa.p_value == 1.0


def test_a_brier_score_of_three_classes_is_up_to_two_also_if_one_has_no_images():
    p = Predictions(np.tile([0.02, 0.03, 0.95], (30, 1)), np.arange(30) % 2, ["a", "b", "c"])
    brier = diagnose(p, resamples=50).metrics["brier"]
    assert brier.value == pytest.approx(0.95**2 + (0.98**2 + 0.02**2 + 0.97**2 + 0.03**2) / 2)
    assert brier.low < brier.value < brier.high <= 2


def test_wrong_arguments_are_refused():
    p = make(20, 3)
    for options, message in (
        ({"positive": "cat"}, "positive='cat': choose one of c0, c1, c2"),
        ({"ordered": ["c0", "c1"]}, "ordered=c0,c1"),
        ({"positive": "c0", "max_fpr": 0}, "max_fpr=0"),
        ({"resamples": 1}, "resamples=1"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnose(p, **options)


# ---- thresholds -------------------------------------------------------------------------


def at(p, threshold):
    called = p.probabilities[:, 1] >= threshold
    return called[p.labels == 1].mean(), 1 - called[p.labels == 0].mean()


def test_thresholds_are_the_best_of_all():
    p = binary(150)
    every = [*np.unique(p.probabilities[:, 1]), math.inf]
    points = {t: at(p, t) for t in every}
    t = choose_threshold(p, "sick", "sensitivity=0.95")
    assert (t.sensitivity, t.specificity) == pytest.approx(at(p, t.value))
    assert t.value == max(x for x, (sens, _) in points.items() if sens >= 0.95)
    t = choose_threshold(p, "sick", "specificity=0.9")
    assert t.value == min(x for x, (_, spec) in points.items() if spec >= 0.9)
    t = choose_threshold(p, "sick", "youden")
    assert sum(at(p, t.value)) == pytest.approx(max(map(sum, points.values())))
    t = choose_threshold(p, "sick", "cost=5:1")
    n = p.labels.sum()

    def cost(x):
        return 5 * n * (1 - points[x][0]) + (150 - n) * (1 - points[x][1])

    assert cost(t.value) == pytest.approx(min(map(cost, every)))
    assert json.loads(json.dumps(t.to_dict(), allow_nan=False))["rule"] == "cost=5:1"


def test_a_target_that_is_met_exactly_is_met_and_none_may_be_called():
    p = Predictions(
        np.array([[1 - x, x] for x in (0.9, 0.8, 0.7, 0.6, 0.95, 0.1)]), [1, 1, 1, 1, 0, 0],
        ["a", "b"],
    )  # fmt: skip
    assert choose_threshold(p, "b", "sensitivity=0.75").value == pytest.approx(0.7)
    none = choose_threshold(p, "b", "specificity=1")
    assert (none.value, none.sensitivity, none.specificity) == (math.inf, 0.0, 1.0)
    assert none.to_dict()["value"] is None
    assert "inf " not in none.sentence()
    one, top = (diagnose(p, positive="b", threshold=t).one_class for t in (none.value, None))
    assert (one.counts["tp"], one.counts["fp"]) == (0, 0)
    written, other = (json.loads(json.dumps(o.to_dict(), allow_nan=False)) for o in (one, top))
    assert written["threshold"] is other["threshold"] is None  # JSON has no infinity
    assert "infinite" in written["decision"]
    assert "top-1" in other["decision"]


@pytest.mark.parametrize("rule", ["specificity=0.9", "sensitivity=0.9", "youden", "cost=1:5"])
def test_a_threshold_does_what_it_was_chosen_for_on_a_network_that_is_too_sure(rule):
    """Probabilities near 1 are a few neighboring numbers, which a threshold does not separate."""
    rng = np.random.default_rng(0)
    true = np.repeat([1, 0], 200)
    logits = np.where(true == 1, rng.normal(18, 2, 400), rng.normal(13, 3, 400))
    p = (1 / (1 + np.exp(-logits))).astype(np.float32)
    predictions = Predictions(np.stack([1 - p, p], axis=1), true, ["no", "yes"])
    chosen = choose_threshold(predictions, "yes", rule)
    called = reaches(p.astype(float), chosen.value)
    assert chosen.sensitivity == called[true == 1].mean()
    assert chosen.specificity == 1 - called[true == 0].mean()
    name, _, least = rule.partition("=")
    if name in ("specificity", "sensitivity"):
        assert getattr(chosen, name) >= float(least)


def test_a_threshold_is_reported_on_other_images():
    t = choose_threshold(binary(300, seed=1), "sick", "sensitivity=0.9")
    test = binary(300, seed=2)
    one = diagnose(test, positive="sick", threshold=t.value, resamples=20).one_class
    sensitivity, specificity = at(test, t.value)
    assert one.metrics["sensitivity"].value == pytest.approx(sensitivity)
    assert one.metrics["specificity"].value == pytest.approx(specificity)
    assert one.threshold == t.value


@pytest.mark.parametrize(
    "rule",
    [
        "f1",
        "sensitivity",
        "sensitivity=2",
        "sensitivity=nan",
        "cost=5",
        "cost=0:1",
        "cost=a:b",
        "cost=1_0:1",
    ],
)
def test_wrong_rules_are_refused(rule):
    with pytest.raises(ValueError, match=f"rule='{rule}'"):
        choose_threshold(binary(50), "sick", rule)


def test_images_of_one_kind_choose_no_threshold():
    with pytest.raises(ValueError, match="no image of 'c1'"):
        choose_threshold(hard([0, 0], [0, 1], 2), "c1", "youden")


def test_net_benefit_by_hand():
    p = binary(200)
    curve = decision_curve(p, "sick", thresholds=[0.2, 0.5, 0.9], resamples=50)
    for k, t in enumerate((0.2, 0.5, 0.9)):
        called = p.probabilities[:, 1] >= t
        tp, fp = (called & (p.labels == 1)).sum(), (called & (p.labels == 0)).sum()
        assert curve.model[k] == pytest.approx(tp / 200 - fp / 200 * t / (1 - t))
        share = p.labels.mean()
        assert curve.treat_all[k] == pytest.approx(share - (1 - share) * t / (1 - t))
    assert (curve.low <= curve.model).all()
    assert (curve.low < curve.high).all()
    json.dumps(curve.to_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="thresholds"):
        decision_curve(p, "sick", thresholds=[0.0])


def test_bands_of_few_groups_are_of_expanded_percentiles():
    groups = np.arange(120) // 20
    p = binary(120, groups=groups)
    curve = decision_curve(p, "sick", thresholds=[0.3], resamples=300)
    called, sick = p.probabilities[:, 1] >= 0.3, p.labels == 1
    each = np.where(called, np.where(sick, 1.0, -0.3 / 0.7), 0.0).reshape(6, 20).mean(axis=1)
    drawn = np.array([times @ each / 6 for times in draws(6, 300, 0)])
    tail = stats.norm.sf(stats.t.ppf(0.975, 5) * np.sqrt(6 / 5))  # Hesterberg's (2015)
    ends_of = np.quantile(drawn, [tail, 1 - tail])
    assert (curve.low[0], curve.high[0]) == pytest.approx(tuple(ends_of))


# ---- subgroups --------------------------------------------------------------------------


def test_a_part_without_a_class_has_no_gap_of_balanced_accuracy():
    labels = np.array([0, 1] * 30 + [0] * 30)
    right = np.r_[np.tile([1, 0, 0, 1], 15), np.tile([1, 1, 0], 10)].astype(bool)
    called = np.where(right, labels, 1 - labels)
    p = Predictions(np.eye(2)[called] * 0.8 + 0.1, labels, ["benign", "malignant"])
    s = evaluate_subgroups(p, "site", ["A"] * 30 + ["B"] * 30 + ["C"] * 30, resamples=20)
    assert s.parts["C"].metrics["balanced_accuracy"].value == pytest.approx(2 / 3)  # of one class
    assert s.gap("top1") == ("C", "A", pytest.approx(2 / 3 - 0.5))
    assert "C" not in s.gap("balanced_accuracy")[:2]


def test_the_tables_of_parts_fit_the_console(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    sites = ["Universitätsklinikum"] * 100 + ["Rome"] * 100
    found = evaluate_subgroups(make(200, 3), "site", sites, resamples=20, positive="c1")
    print_subgroups([found], None)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    tables = [line for line in lines if line.strip().startswith("Universitätsklinikum")]
    shown = [name for name in lines if "interval" in name]
    assert len(tables) == len(shown) > 1
    for name, metric in (("accuracy", "top1"), ("sensitivity", "sensitivity")):
        at = next(i for i, line in enumerate(shown) if name in line.split())
        value = found.parts["Universitätsklinikum"].metrics[metric].value
        assert f"{100 * value:.2f}" in tables[at] or f"{value:.3f}" in tables[at]


def test_each_part_is_evaluated_by_itself():
    p = make(200, 3, groups=np.arange(200) // 2)
    sites = np.where(np.arange(200) < 150, "a", "b").astype(object)
    sites[:10] = None
    s = evaluate_subgroups(p, "site", sites, resamples=20, positive="c1", threshold=0.3)
    assert [(name, part.n, part.n_groups) for name, part in s.parts.items()] == [
        ("a", 140, 70), ("b", 50, 25), ("(missing)", 10, 5),
    ]  # fmt: skip
    assert [name for name, part in s.parts.items() if part.too_small] == ["(missing)"]
    rows = np.arange(150, 200)
    alone = Predictions(p.probabilities[rows], p.labels[rows], p.classes, p.groups[rows])
    assert s.parts["b"].evaluation.to_dict() == evaluate(alone, resamples=20).to_dict()
    one = diagnose(alone, positive="c1", threshold=0.3, resamples=20).one_class
    assert s.parts["b"].metrics["sensitivity"] == one.metrics["sensitivity"]
    high, low, gap = s.gap()
    top1 = {n: part.metrics["top1"].value for n, part in s.parts.items() if not part.too_small}
    assert (top1[high], top1[low]) == (max(top1.values()), min(top1.values()))
    assert gap == pytest.approx(max(top1.values()) - min(top1.values()))
    assert {"top1", "macro_f1", "sensitivity", "roc_auc"} <= s.gaps().keys()
    assert evaluate_subgroups(p, "site", sites, resamples=20, at_least=26).gap() is None
    rows = list(csv.DictReader(io.StringIO(subgroups_csv([s]))))
    assert [r["images"] for r in rows if r["metric"] == "too small"] == ["10"]
    assert {r["value"] for r in rows if (r["part"], r["metric"]) == ("b", "top1")} == {
        f"{top1['b']:.6g}"
    }
    json.dumps(s.to_dict(), allow_nan=False)


def test_bands_of_numbers():
    p = make(6, 2)
    ages = [39.9, "40", 59, 60, math.nan, ""]
    for missing in ("", "NaN", "NA", " n/a "):  # as tools write it
        ages[-1] = missing
        s = evaluate_subgroups(p, "age", ages, bands=[40, 60], resamples=5)
        assert s.parts["(missing)"].n == 2
    counts = {name: part.n for name, part in s.parts.items()}
    assert counts == {"40 to <60": 2, "(missing)": 2, "<40": 1, ">=60": 1}
    assert list(counts) == ["<40", "40 to <60", ">=60", "(missing)"]
    for values, bands, message in (
        (ages, [60, 40], "increasing"), (["old"] * 6, [40], "'old' is not a number"),
        (ages[:3], None, "3 values for 6"), (None, None, "no further column 'age'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate_subgroups(p, "age", values, bands=bands)


@pytest.mark.parametrize(
    ("bands", "names"),
    [
        ([20240104, 20240110, 20240120],
         ["<20240104", "20240104 to <20240110", "20240110 to <20240120", ">=20240120"]),
        ([1.0000001, 1.0000002], ["<1.0000001", "1.0000001 to <1.0000002", ">=1.0000002"]),
        ([1e17, 2e17], ["<1e+17", "1e+17 to <2e+17", ">=2e+17"]),
        ([0.1, 1000000.0], ["<0.1", "0.1 to <1e+06", ">=1e+06"]),
    ],
)  # fmt: skip
def test_each_band_has_a_name_of_its_own(bands, names):
    values = [bands[0] - max(1, bands[0] / 8), *bands] * 2
    s = evaluate_subgroups(make(len(values), 2), "x", values, bands=bands, at_least=50)
    assert [(name, part.n) for name, part in s.parts.items()] == [(name, 2) for name in names]


def test_limits_that_are_one_number_are_refused():
    with pytest.raises(ValueError, match="increasing"):
        evaluate_subgroups(make(2, 2), "x", [1, 2], bands=[2**53, 2**53 + 1])


@pytest.mark.parametrize(
    ("numbers", "limits", "sizes"),
    [
        (np.repeat(np.arange(2011, 2025), 100), [2015, 2020], {400, 500}),
        (1000 + np.arange(15) * 4 / 15, [1001.3, 1002.5], {5}),
        (np.arange(30) / 1e9 + 5, [5.00000001, 5.00000002], {10}),
        (np.r_[np.zeros(50), np.arange(1, 21)], [1, 11], {50, 10}),  # half of them are equal
        (np.r_[np.arange(20), np.full(50, 99)], [10, 60], {50, 10}),
        (np.r_[np.arange(20), np.full(40, 50), np.arange(60, 80)], [50, 60], {20, 40}),
        (np.array([f"{7:0{n}d}" for n in range(1, 16)] + ["9"] * 5, object), [9], {15, 5}),
    ],
)
def test_numbers_are_divided_into_three_bands_as_equal_as_can_be(numbers, limits, sizes):
    p = dataclasses.replace(make(len(numbers), 2), columns={"x": numbers})
    (found,) = subgroup_columns(p).values()
    s = evaluate_subgroups(p, "x", bands=found, at_least=10**6)
    assert {part.n for part in s.parts.values()} == sizes, found
    assert len(s.parts) == len(limits) + 1
    assert found == pytest.approx(limits, rel=1e-12)


def test_numbers_that_are_all_equal_make_no_bands():
    numbers = np.array([f"{7:0{n}d}" for n in range(1, 20)], object)
    assert subgroup_columns(dataclasses.replace(make(19, 2), columns={"x": numbers})) == {}


def test_sensible_columns_are_evaluated_unasked(tmp_path):
    p = make(90, 3)
    columns = {
        "site": np.array(["a", "b", "c"] * 30, object), "age": np.arange(90).astype(str),
        "note": np.array([f"text {i}" for i in range(90)], object), "one": np.full(90, "same"),
    }  # fmt: skip
    columns["age"] = np.append(columns["age"][:-1], "NA")
    columns["one"][3] = "nan"
    p = dataclasses.replace(p, columns=columns)
    chosen = subgroup_columns(p)
    assert chosen.keys() == {"site", "age"}
    assert chosen["site"] is None
    assert chosen["age"] == [29, 59]  # of 0 to 88
    assert p.select(p.labels == 1).columns["age"].tolist() == columns["age"][p.labels == 1].tolist()
    run = RunFolder(tmp_path)
    run.write_evaluation("test", evaluate(p, resamples=2), dataclasses.replace(p, paths=["x"] * 90))
    written = json.loads((tmp_path / "evaluation.json").read_text())["subgroups"]
    assert [(s["column"], len(s["parts"])) for s in written] == [("site", 3), ("age", 4)]


# ---- the command ------------------------------------------------------------------------


@pytest.fixture
def table(scans, tmp_path) -> Path:
    """The scans as a CSV with sites (in capitals) and ages."""
    path = tmp_path / "scans.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "Site", "age", "comment"])
        for i, image in enumerate(sorted(scans.rglob("*.png"))):
            site = "Bern, Insel" if i % 4 else "Zürich"
            writer.writerow([image, image.parent.name, site, 30 + i % 50, f"no {i}"])
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bands", "site=1,2"], "site: 'Zürich' is not a number"),
        (["--bands", "sex=1,2"], "--bands sex: no further column"),
        (["--subgroups", "sex"], "--subgroups sex: no further column"),
    ],
)
def test_columns_are_checked_before_anything_is_written(
    flags, message, whole, table, tmp_path, capsys
):
    out = tmp_path / "said.npz"
    call = ["evaluate", str(whole), str(table), *flags, "--predictions", str(out)]
    assert run_command(call) == 2
    printed, err = capsys.readouterr()
    assert printed == ""
    assert message in err
    assert not out.exists()


@pytest.mark.slow
def test_subgroups_of_a_table_have_rows_of_their_own(whole, table, tmp_path, capsys):
    flags = ["--subgroups", "site", "age", "--bands", "age=40,60", "--positive", "1"]
    out = tmp_path / "parts.csv"
    call = ["evaluate", str(whole), str(table), *flags, "--smallest", "8"]
    assert run_command([*call, "--json", "--subgroups-csv", str(out)]) == 0
    site, age = json.loads(capsys.readouterr().out)["subgroups"]
    assert (site["column"], age["column"]) == ("site", "age")
    assert site["parts"].keys() == {"Bern, Insel", "Zürich"}
    assert sum(part["n"] for part in site["parts"].values()) == 24
    assert age["parts"].keys() == {"<40", "40 to <60", ">=60"}
    small = [name for name, part in site["parts"].items() if part["n"] < 8]
    assert [n for n, part in site["parts"].items() if part["too_small"]] == small
    assert "sensitivity" in site["parts"]["Bern, Insel"]["metrics"]
    assert "Bern, Insel" in {row["part"] for row in rows_of(out)}
    assert run_command(call) == 0
    printed = capsys.readouterr().out
    assert "By site" in printed
    assert "By age" in printed
    assert all(f"{name}" in printed for name in small)
    for wrong, message in (
        (["--subgroups", "sex"], "choose of site, age, comment"),
        (["--bands", "site=1,2"], "is not a number"), (["--bands", "age=2,1"], "increasing"),
        (["--bands", "age"], "COLUMN=A,B,C"), (["--subgroups-csv", "x.csv"], "--subgroups"),
        (["--subgroups", "site", "--subgroups-csv", "no/x.csv"], "folder that exists"),
    ):  # fmt: skip
        assert run_command(["evaluate", str(whole), str(table), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_subgroups_say_which_metrics_a_threshold_decides(capsys):
    rng = np.random.default_rng(0)
    p = rng.dirichlet((1, 1), 40)
    labels = (rng.random(40) < p[:, 1]).astype(int)
    found = Predictions(p, labels, ["well", "ill"], columns={"site": np.repeat(["A", "B"], 20)})
    one = {t: diagnose(found, positive="ill", threshold=t, resamples=20).one_class
           for t in (None, 0.3)}  # fmt: skip
    parts = [evaluate_subgroups(found, "site", positive="ill", threshold=0.3, resamples=20)]
    print_subgroups(parts, one[0.3])
    assert "specificity: ill, positive from a probability of 0.3 on; accuracy" in " ".join(
        capsys.readouterr().out.split()
    )
    print_subgroups(parts, one[None])
    assert "most probable" not in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_chooses_on_validation_and_reports_on_the_test(whole, capsys):
    from regard.run_data import predictions_of

    flags = ["--positive", "1", "--at", "sensitivity=0.9", "--calibrate", "--ordered", "0,1,2"]
    assert run_command(["evaluate", str(whole), *flags, "--max-fpr", "0.2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["split"] == "test"
    study = content["diagnostics"]
    (_, val, _), (_, test, _) = (predictions_of(whole, split=s) for s in ("val", "test"))
    t = fit_temperature(val)
    assert study["temperature"] == pytest.approx(t, rel=1e-4)
    threshold = choose_threshold(with_temperature(val, t), "1", "sensitivity=0.9")
    assert study["threshold"]["value"] == pytest.approx(threshold.value, rel=1e-4)
    assert study["threshold"]["images"] == 24
    cooled = with_temperature(test, t)
    assert content["metrics"]["nll"]["value"] == pytest.approx(
        evaluate(cooled, resamples=2).metrics["nll"].value, rel=1e-4
    )
    one = diagnose(cooled, positive="1", threshold=threshold.value, resamples=2).one_class
    assert study["one_class"]["counts"] == one.counts
    assert {"partial_roc_auc", "calibration_slope"} <= study["one_class"]["metrics"].keys()
    assert "quadratic_kappa" in study["metrics"]
    assert len(study["decision_curve"]["thresholds"]) == 99
    assert run_command(["evaluate", str(whole), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"{threshold.value:.4g}" in printed
    assert "quadratic kappa" in printed


@pytest.mark.parametrize(
    ("ordered", "expected"),
    [
        ("none,mild, severe", ["none", "mild, severe"]),
        ("mild, severe, none", ["mild, severe", "none"]),
        ("none,mild", ["none", "mild"]),
        ("none,none", ["none", "none"]),
        ("none,,mild, severe", ["none", "", "mild", "severe"]),
    ],
)
def test_classes_in_order_may_have_commas(ordered, expected):
    assert DiagnosticFlags(ordered=ordered).order(["none", "mild, severe"]) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--at", "youden"], "--positive CLASS"),
        (["--at", "best", "--positive", "1"], "--at 'best'"),
        (["--positive", "x"], "--positive x: choose one of 0, 1, 2"),
        (["--ordered", "0,1"], "--ordered 0,1"),
        (["--max-fpr", "0", "--positive", "1"], "--max-fpr 0"),
    ],
)
def test_wrong_flags_are_one_line(whole, capsys, flags, message):
    assert run_command(["evaluate", str(whole), *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_images_of_one_class_have_no_area_and_that_is_said(whole, scans, tmp_path, capsys):
    (tmp_path / "ones").mkdir()
    (tmp_path / "ones" / "1").symlink_to(scans / "1")
    call = ["evaluate", str(whole), str(tmp_path / "ones"), "--split", "all", "--positive", "1"]
    assert run_command([*call, "--json"]) == 0
    out, err = capsys.readouterr()
    one = json.loads(out)["diagnostics"]["one_class"]["metrics"]
    assert one["roc_auc"]["value"] is one["specificity"]["value"] is None
    assert one["sensitivity"]["value"] is not None
    assert "40 images, all of 1: ROC AUC" in err


# ---- temperature ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_temperature_is_found_and_undone(dtype):
    logits = np.random.default_rng(0).normal(size=(4000, 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([np.random.default_rng(i).choice(5, p=row) for i, row in enumerate(p)])
    sure = np.exp(3 * logits) / np.exp(3 * logits).sum(axis=1, keepdims=True)
    said = Predictions(sure.astype(dtype), labels, list("abcde"))
    t = fit_temperature(said)
    assert t == pytest.approx(3, rel=0.06)
    cooler = with_temperature(said, 3.0)
    assert cooler.probabilities == pytest.approx(p, abs=1e-5)
    assert cooler.probabilities.dtype == dtype
    assert (cooler.probabilities.argmax(axis=1) == said.probabilities.argmax(axis=1)).all()
    gap = [sum(b.images * abs(b.confidence - b.accuracy) for b in reliability(x)) / 4000
           for x in (said, with_temperature(said, t))]  # fmt: skip
    assert gap[1] < 0.03 < 0.1 < gap[0]
    assert sum(b.images for b in reliability(said)) == 4000


def test_wrong_temperatures_are_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        with_temperature(binary(10), 0)
    with pytest.raises(ValueError, match="2 or more"):
        fit_temperature(hard([0], [0], 2))


def test_bars_of_a_reliability_diagram_count_patients():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1.0, 40)
    labels = (rng.random(40) > p).astype(int)
    probabilities, groups = np.stack([p, 1 - p], axis=1), [f"p{k:02}" for k in range(40)]
    once = reliability(Predictions(probabilities, labels, ["a", "b"], groups), bins=4)
    nine = Predictions(np.repeat(probabilities, 9, 0), np.repeat(labels, 9), ["a", "b"])
    copies = reliability(dataclasses.replace(nine, groups=np.repeat(groups, 9)), bins=4)
    for a, b, images in zip(once, copies, reliability(nine, bins=4), strict=True):
        assert b.interval == pytest.approx(a.interval, abs=0.02)
        assert images.interval[1] - images.interval[0] < 0.6 * (b.interval[1] - b.interval[0])
    one = reliability(Predictions(probabilities[:3], labels[:3], ["a", "b"], ["p"] * 3), bins=1)
    assert one[0].interval == (0.0, 1.0)


# ---- coverage ---------------------------------------------------------------------------


def test_an_area_is_as_uncertain_as_the_rarer_of_two_kinds():
    """Of 60 patients 4 are sick: percentiles for 60 hold the true area in 0.83 of trials."""
    held, widths = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        sick = np.arange(60) < 4
        score = 1 / (1 + np.exp(-(rng.normal(size=60) + 1.5 * sick)))
        p = Predictions(np.stack([1 - score, score], axis=1), sick.astype(int), ["well", "sick"])
        found = diagnose(p, resamples=100, seed=seed)
        area = found.per_class["sick"]["roc_auc"]
        assert found.metrics["roc_auc_macro"] == found.per_class["well"]["roc_auc"]
        held.append(area.low <= 0.8556 <= area.high)
        widths.append(area.high - area.low)
    assert np.mean(held) >= 0.93
    assert np.mean(widths) < 0.6


def test_an_area_by_hand():
    drawn = np.array([0.7, 0.8, 0.9, math.nan])
    # a variance of 0.01, of 4 units one is missing; t of 3 degrees of freedom
    z = 3.182446**2 * 0.01 * 4 / 3 / 0.16
    half = (z * 0.16 + z * z / 4) ** 0.5 / (1 + z)
    found = area(0.8, drawn, 0.95, 4)
    center = (0.8 + z / 2) / (1 + z)
    assert (found.low, found.high) == pytest.approx((center - half, center + half), abs=1e-6)


def test_two_classes_have_one_interval_for_one_number():
    labels = (np.arange(60) < 6).astype(int)
    score = 1 / (1 + np.exp(-(np.random.default_rng(1).normal(size=60) + 3 * labels - 2)))
    p = Predictions(np.stack([1 - score, score], axis=1), labels, ["well", "sick"])
    found = diagnose(p, positive="sick", resamples=200)
    for name, other in (("mcc", "mcc"), ("roc_auc", "roc_auc_macro")):
        a, b = found.one_class.metrics[name], found.metrics[other]
        assert (a.low, a.value, a.high) == pytest.approx((b.low, b.value, b.high))
    same = {c.metric: c for c in compare_metrics(
        p, with_temperature(p, 2.0), positive="sick", ordered=["well", "sick"], resamples=100
    )}  # fmt: skip
    a, b = same["kappa"].difference, same["quadratic_kappa"].difference
    assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_a_class_of_one_image_takes_no_interval_from_the_others():
    labels = np.repeat([0, 1, 2], [30, 30, 1])
    p = Predictions(np.eye(3)[labels] * 0.7 + 0.1, labels, ["a", "b", "rare"])
    areas = diagnose(p, resamples=50).per_class
    for name in ("a", "b"):
        found = areas[name]["roc_auc"]
        assert (found.value, found.high) == (1.0, 1.0)
        assert 0.8 < found.low < 0.95
    assert not areas["rare"]["roc_auc"].has_interval


@pytest.mark.parametrize("grouped", [False, True])
def test_one_sick_image_or_patient_has_no_interval_for_an_area(grouped):
    labels = np.repeat([1, 0, 0, 0, 0, 0], 3 if grouped else 1)
    score = np.random.default_rng(0).random(len(labels))
    groups = [f"p{k // 3}" for k in range(len(labels))] if grouped else None
    p = Predictions(np.stack([1 - score, score], axis=1), labels, ["well", "sick"], groups)
    one = diagnose(p, positive="sick", resamples=50).one_class.metrics
    for name in ("roc_auc", "average_precision", "sensitivity", "brier"):
        assert math.isfinite(one[name].value)
        assert not one[name].has_interval
    assert one["specificity"].has_interval


@pytest.mark.parametrize("group_size", [1, 5])
def test_intervals_cover(group_size, monkeypatch):
    """A short form of benchmarks/interval_coverage.py, which measures all metrics."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import interval_coverage as simulation

    true = {"roc_auc": 0.8653, "sensitivity": 0.7821, "kappa": 0.5546, "brier": 0.1505}
    held = simulation.coverage(true, 120, group_size, 40, 50)
    for name, (share, count) in held.items():
        assert count == 40
        assert share >= 0.82, name  # 0.95 minus almost four standard errors
    # with groups, intervals of single images are too narrow
    if group_size > 1:
        grouped, single = (
            simulation.measure(p, 100, 0)["roc_auc"]
            for p in (
                simulation.draw(120, 5, 1),
                dataclasses.replace(simulation.draw(120, 5, 1), groups=None),
            )
        )
        assert grouped[2] - grouped[1] > 1.2 * (single[2] - single[1])
