"""Evaluation: the numbers against scikit-learn, the intervals by simulation, and the tables."""

import io
import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from scipy.stats import binomtest
from sklearn import metrics as sk

from regard.commands.tables import print_comparison, print_evaluation
from regard.evaluation import (
    Predictions,
    compare,
    compare_metrics,
    diagnose,
    evaluate,
)
from regard.evaluation.intervals import draws, mean_of_losses, share_of_groups, wilson_interval


def make(n=400, n_classes=8, *, seed=0, strength=2.0, groups=None, absent=()):
    """Predictions of a mediocre network; classes in `absent` have no image."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(n_classes) if c not in absent], size=n)
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), labels] += strength * rng.random(n)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(probabilities, labels, [f"c{i}" for i in range(n_classes)], groups)


def hard(true, predicted, n_classes, groups=None):
    """Predictions that are sure of `predicted`."""
    names = [f"c{i}" for i in range(n_classes)]
    return Predictions(np.eye(n_classes)[np.asarray(predicted)], np.asarray(true), names, groups)


def printed(*arguments, show=print_evaluation, width=120, **options):
    console = Console(file=io.StringIO(), width=width)
    show(*arguments, console, **options)
    return console.file.getvalue()


def ends(estimate):
    return estimate.low, estimate.high


# ---- numbers ----------------------------------------------------------------------------


def calibration_error(predictions):
    """Guo et al.'s equation 3, image by image."""
    bins = {}
    for row, label in zip(predictions.probabilities, predictions.labels, strict=True):
        confidence = max(row)
        for m in range(1, 16):
            if (m - 1) / 15 < confidence <= m / 15:
                bins.setdefault(m, []).append((row.argmax() == label, confidence))
    error = 0.0
    for images in bins.values():
        accuracy = sum(hit for hit, _ in images) / len(images)
        confidence = sum(c for _, c in images) / len(images)
        error += len(images) / len(predictions) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("absent", [(), (2, 5)])
def test_numbers_are_scikit_learns(absent):
    p = make(absent=absent)
    e = evaluate(p, resamples=10)
    y, predicted = p.labels, p.probabilities.argmax(axis=1)
    every, present = range(8), sorted(set(y.tolist()))
    averages = sk.precision_recall_fscore_support(y, predicted, average="macro", zero_division=0)
    keep = np.isin(predicted, present)  # scikit-learn warns of classes that labels lack
    recalls = sk.recall_score(y, predicted, labels=present, average=None)
    if not absent:
        assert keep.all()
        assert sk.balanced_accuracy_score(y, predicted) == pytest.approx(recalls.mean())
    expected = {
        "top1": sk.accuracy_score(y, predicted),
        "top5": sk.top_k_accuracy_score(y, p.probabilities, k=5, labels=every),
        "balanced_accuracy": recalls.mean(),
        "macro_f1": averages[2],
        "macro_precision": averages[0],
        "macro_recall": recalls.mean(),
        "ece": calibration_error(p),
        "nll": sk.log_loss(y, p.probabilities, labels=every),
    }
    assert {k: v.value for k, v in e.metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert (e.confusion.toarray() == sk.confusion_matrix(y, predicted, labels=every)).all()
    assert e.confusion.dtype.kind == "i"
    rows = sk.precision_recall_fscore_support(
        y, predicted, labels=every, average=None, zero_division=np.nan
    )
    for kind, name in enumerate(["precision", "recall", "f1"]):
        values = [getattr(row, name).value for row in e.per_class]
        np.testing.assert_allclose(values, rows[kind], rtol=1e-12)
    assert [row.count for row in e.per_class] == rows[3].tolist()
    assert (e.n, e.n_groups, e.classes) == (400, None, p.classes)


def test_bins_of_the_calibration_error_are_closed_above():
    probabilities = np.array([[0.8, 0.2], [0.83, 0.17]])  # 0.8 is the end of the twelfth bin
    p = Predictions(probabilities, [0, 1], ["right", "wrong"])
    ece = evaluate(p, resamples=2).metrics["ece"].value
    assert ece == pytest.approx(calibration_error(p)) == pytest.approx((0.2 + 0.83) / 2)


def test_top5_is_there_with_more_than_5_classes_only():
    assert "top5" not in evaluate(make(n_classes=5), resamples=2).metrics
    assert "top5" in evaluate(make(n_classes=6), resamples=2).metrics


def test_of_equal_probabilities_the_first_class_comes_first():
    uniform = np.full((8, 8), 1 / 8)
    e = evaluate(Predictions(uniform, np.arange(8), list("abcdefgh")), resamples=2)
    assert e.metrics["top1"].value == 1 / 8
    assert e.metrics["top5"].value == 5 / 8
    assert e.confusion[:, 0].sum() == 8


def test_top5_of_many_images_is_that_of_few(monkeypatch):
    monkeypatch.setattr("regard.evaluation.predictions._CHUNK", 50)  # 6 images at a time
    p = make()
    expected = sk.top_k_accuracy_score(p.labels, p.probabilities, k=5)
    assert evaluate(p, resamples=2).metrics["top5"].value == expected


def test_class_without_images_or_never_predicted():
    #     c0 is right, c1 never predicted, c2 has no image
    e = evaluate(hard([0, 0, 1, 1], [0, 0, 0, 2], 3), resamples=50)
    assert [row.count for row in e.per_class] == [2, 2, 0]
    assert math.isnan(e.per_class[2].recall.value)
    assert math.isnan(e.per_class[1].precision.value)
    assert (e.per_class[1].f1.value, e.per_class[2].f1.value) == (0.0, 0.0)
    assert e.metrics["balanced_accuracy"].value == 0.5  # of c0 and c1
    assert e.metrics["macro_precision"].value == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert e.metrics["macro_f1"].value == pytest.approx((0.8 + 0 + 0) / 3)


def test_probability_of_zero_costs_what_scikit_learn_says():
    p = hard([0, 1, 1], [0, 1, 0], 2)
    expected = sk.log_loss(p.labels, p.probabilities)
    assert evaluate(p, resamples=2).metrics["nll"].value == pytest.approx(expected)
    assert 12.0 < expected < 12.1
    stored = Predictions(p.probabilities.astype(np.float32), p.labels, p.classes)
    assert evaluate(stored, resamples=2).metrics["nll"].value == pytest.approx(expected)


# ---- intervals --------------------------------------------------------------------------


def test_shares_of_single_images_have_wilsons_interval():
    p = make()
    e = evaluate(p, resamples=5)
    confusion = e.confusion.toarray()
    hits = int(confusion.trace())
    assert ends(e.metrics["top1"]) == wilson_interval(hits, 400)
    row, n, called = e.per_class[3], int(confusion[3].sum()), int(confusion[:, 3].sum())
    assert ends(row.recall) == wilson_interval(int(confusion[3, 3]), n)
    assert ends(row.precision) == wilson_interval(int(confusion[3, 3]), called)
    low, high = wilson_interval(int(confusion[3, 3]), n + called - int(confusion[3, 3]))
    assert ends(row.f1) == pytest.approx((2 * low / (1 + low), 2 * high / (1 + high)))
    assert row.f1.low < row.f1.value < row.f1.high


def test_wider_confidence_is_wider_and_widens_everything():
    p = make(groups=np.arange(400) // 4)
    usual, wide = (evaluate(p, resamples=200, confidence=c) for c in (0.8, 0.99))
    for name, narrow in usual.metrics.items():
        assert wide.metrics[name].low < narrow.low or (name, narrow.low) == ("ece", 0.0)
        assert narrow.low < narrow.value < narrow.high
        assert narrow.high < wide.metrics[name].high


def test_bootstrap_interval_is_the_plain_one():
    """Resamples the images themselves and asks scikit-learn, another 600 times."""
    p, rng = make(n=200, n_classes=4), np.random.default_rng(5)
    predicted, nll = p.probabilities.argmax(axis=1), -np.log(p.probabilities[range(200), p.labels])
    values = []
    for _ in range(600):
        i = rng.integers(200, size=200)
        _, recall, f1, _ = sk.precision_recall_fscore_support(p.labels[i], predicted[i])
        values.append((recall.mean(), f1.mean(), nll[i].mean()))
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    e = evaluate(p, resamples=2000)
    for k, name in enumerate(["balanced_accuracy", "macro_f1", "nll"]):
        width = high[k] - low[k]
        assert ends(e.metrics[name]) == pytest.approx((low[k], high[k]), abs=0.12 * width)


def coverage(simulate, truth, name, resamples):
    """The share of 200 simulated evaluations whose interval holds the truth."""
    held = 0
    for seed in range(200):
        estimate = evaluate(simulate(np.random.default_rng(seed)), resamples=resamples, seed=seed)
        held += estimate.metrics[name].low <= truth <= estimate.metrics[name].high
    return held / 200


@pytest.mark.slow
@pytest.mark.parametrize(("name", "truth"), [("top1", 0.84), ("balanced_accuracy", 0.75)])
def test_intervals_of_single_images_cover(name, truth):
    def simulate(rng):
        true = (rng.random(300) < 0.2).astype(int)  # a fifth is of the harder class
        right = rng.random(300) < np.where(true == 1, 0.6, 0.9)
        return hard(true, np.where(right, true, 1 - true), 2)

    assert 0.90 <= coverage(simulate, truth, name, 2 if name == "top1" else 200) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("groups", [True, False])
def test_interval_of_groups_covers_where_that_of_images_would_not(groups):
    def simulate(rng):
        easy = rng.beta(4, 1, size=60)  # each patient's own accuracy, 0.8 in the mean
        patient = np.repeat(np.arange(60), 10)
        wrong = rng.random(600) > easy[patient]
        return hard(np.zeros(600, int), wrong.astype(int), 2, patient if groups else None)

    share = coverage(simulate, 0.8, "top1", 200 if groups else 2)
    assert 0.90 <= share <= 0.99 if groups else share < 0.85


@pytest.mark.slow
@pytest.mark.parametrize("too_sure", [0.0, 0.02, 0.1])
def test_calibration_interval_covers(too_sure):
    def simulate(rng):
        p = rng.uniform(0.6, 1.0, size=300)
        labels = (rng.random(300) > p - too_sure).astype(int)
        return Predictions(np.stack([p, 1 - p], axis=1), labels, ["a", "b"])

    assert coverage(simulate, too_sure, "ece", 100) >= 0.90
    estimates = [
        evaluate(simulate(np.random.default_rng(seed)), resamples=100).metrics["ece"]
        for seed in range(20)
    ]
    if too_sure == 0.0:  # the bias that the interval is to allow for
        assert np.mean([e.value for e in estimates]) > 0.03
    if too_sure == 0.1:  # and is not merely wide
        assert np.mean([e.high - e.low for e in estimates]) < 0.15
        assert np.mean([e.low for e in estimates]) > 0.02


@pytest.mark.parametrize(("patients", "like"), [(6, 1.0), (12, 1.0), (12, 8.0), (40, 1.0)])
def test_shares_of_few_patients_are_covered(patients, like):
    """An expanded percentile interval has 0.80 of 6, and 0.90 of 12 whose images are alike."""
    rng = np.random.default_rng(patients)
    held, widths = [], []
    for _ in range(1000):
        sizes = rng.integers(1, 12, patients)
        unit = np.repeat(np.arange(patients), sizes)
        own = rng.beta(0.8 * like, 0.2 * like, patients)  # each patient's share, 0.8 in the mean
        found = share_of_groups(rng.random(len(unit)) < own[unit], unit, 0.95)
        held.append(found.low <= 0.8 <= found.high)
        widths.append(found.high - found.low)
    assert 0.92 <= np.mean(held) <= 0.995
    assert np.mean(widths) < 3.0 / patients**0.5  # and not merely wide


def test_a_share_of_groups_by_hand():
    right = np.array([1, 1, 1, 1, 0, 1, 0, 1, 1, 1])
    unit = np.array(["a"] * 4 + ["b"] * 3 + ["c"] * 3)
    # off by group: 4 - 3.2, 1 - 2.4, 3 - 2.4; 0.16 / (1.5 * 2.96 / 100) images, t of 2 groups
    size, t = 0.16 / 0.0444, 4.302653
    center = (0.8 + t**2 / (2 * size)) / (1 + t**2 / size)
    half = t * (0.16 / size + t**2 / (4 * size**2)) ** 0.5 / (1 + t**2 / size)
    found = share_of_groups(right, unit, 0.95)
    assert found.value == pytest.approx(0.8)
    assert ends(found) == pytest.approx((center - half, center + half), abs=1e-6)
    # groups that are more alike than chance would have them count as images, not as more
    alike = share_of_groups(np.tile([1, 0], 30), np.repeat(np.arange(30), 2), 0.95)
    assert ends(alike) == pytest.approx(wilson_interval(30, 60, 0.95), abs=0.006)
    assert ends(share_of_groups(np.ones(10), unit, 0.95)) == pytest.approx(wilson_interval(3, 3))


def test_copies_in_a_group_add_nothing_to_what_is_known():
    """9 copies of each image: by images the interval is 3 times too narrow, by groups right."""
    p = make(n=300)
    of = np.repeat(np.arange(300), 9)
    names = np.array([f"patient {i}" for i in range(300)])[of]
    copies, labels = p.probabilities[of], p.labels[of]
    single = evaluate(p)
    by_image = evaluate(Predictions(copies, labels, p.classes))
    by_group = evaluate(Predictions(copies, labels, p.classes, names))
    assert by_group.n_groups == 300
    assert by_group.n == 2700
    for name in ("top1", "top5", "balanced_accuracy", "macro_f1", "nll"):
        width = {
            e: e.metrics[name].high - e.metrics[name].low for e in (single, by_image, by_group)
        }
        assert width[by_group] == pytest.approx(3 * width[by_image], rel=0.12)
        assert width[by_group] == pytest.approx(width[single], rel=0.12)
    for kind in ("recall", "precision", "f1"):
        a, b = (getattr(e.per_class[0], kind) for e in (by_group, single))
        assert a.value == pytest.approx(b.value)
        assert ends(a) == pytest.approx(ends(b), abs=0.05)


def test_all_right_is_not_certainty():
    true = np.repeat([0, 1], [90, 10])
    e = evaluate(hard(true, true, 2), resamples=20)
    assert ends(e.metrics["top1"]) == wilson_interval(100, 100)
    assert ends(e.per_class[1].recall) == wilson_interval(10, 10)
    # the recalls reach down by what Wilson's intervals of 90 and of 10 images do
    reach = (1 - wilson_interval(90, 90)[0], 1 - wilson_interval(10, 10)[0])
    low = 1 - (reach[0] ** 4 + reach[1] ** 4) ** 0.25 / 2
    assert ends(e.metrics["balanced_accuracy"]) == pytest.approx((low, 1.0))
    # of many small classes, what all images tell of the mean
    small = evaluate(hard(np.arange(10), np.arange(10), 10), resamples=20)
    assert ends(small.metrics["balanced_accuracy"]) == wilson_interval(10, 10)
    assert ends(small.metrics["macro_precision"]) == wilson_interval(10, 10)
    # worth 2² / (1/90 + 1/10) = 36 images
    assert ends(e.metrics["macro_f1"]) == wilson_interval(36, 36)
    grouped = evaluate(hard(true, true, 2, np.arange(100) // 5), resamples=20)
    assert ends(grouped.metrics["top1"]) == wilson_interval(20, 20)
    low = wilson_interval(2, 2)[0]  # of J; the class is in 2 groups
    assert ends(grouped.per_class[1].f1) == pytest.approx((2 * low / (1 + low), 1.0))
    none = evaluate(hard(true, 1 - true, 2), resamples=20)
    assert ends(none.metrics["top1"]) == wilson_interval(0, 100)
    assert ends(none.metrics["macro_f1"]) == wilson_interval(0, 36)


@pytest.mark.parametrize("size", [1, 4])
def test_a_balanced_accuracy_is_as_uncertain_as_its_recalls(size):
    """Of 12 groups 2 are ill and none is found: samples without them would have 100 %."""
    true, groups = np.repeat([1, 0], [2, 10]), np.arange(12)
    p = hard(np.repeat(true, size), np.zeros(12 * size, int), 2, np.repeat(groups, size))
    e = evaluate(p, resamples=300)
    # 0 of 2 groups reach up and 10 of 10 down
    expected = wilson_interval(10, 10)[0] / 2, 0.5 + wilson_interval(0, 2)[1] / 2
    expected = pytest.approx(expected, abs=1e-6)
    assert ends(e.metrics["balanced_accuracy"]) == ends(e.metrics["macro_recall"]) == expected
    assert e.metrics["macro_f1"].high <= 0.5
    assert e.metrics["macro_precision"].high <= 0.5
    same = compare_metrics(p, p, metrics=["balanced_accuracy"], resamples=50)[0]
    assert same.difference.value == 0


def test_a_balanced_accuracy_is_never_sure_where_one_class_is_always_predicted():
    """One group has images of both classes, and no sample of groups differs from 1/2."""
    true, groups = np.repeat([1, 0], [2, 10]), np.append(0, np.append(1, np.arange(1, 11)))
    e = evaluate(hard(true, np.zeros(12, int), 2, groups), resamples=300)
    expected = wilson_interval(10, 10)[0] / 2, 0.5 + wilson_interval(0, 2)[1] / 2
    expected = pytest.approx(expected, abs=1e-6)
    assert ends(e.metrics["balanced_accuracy"]) == ends(e.metrics["macro_recall"]) == expected


@pytest.mark.parametrize(
    ("images", "recalls", "widest"),
    [
        # a rare class decides, and is often found completely
        ([5, 300], [0.8, 0.9], 1.05),
        ([10, 300], [0.9, 0.99], 1.15),
        ([30, 300], [0.97, 0.9], 1.45),
        # many classes: as the sum of their variances has it
        ([20] * 10, [0.9] * 10, 1.15),
        ([5] * 40, [0.9] * 40, 1.15),
        ([5, 50, 200], [0.8, 0.95, 0.99], 1.15),
    ],
)
def test_balanced_accuracy_of_few_and_of_many_classes_is_covered(images, recalls, widest):
    """By the variances of the recalls alone, the rare classes' cases have 0.6 to 0.85."""
    classes, true = len(images), np.repeat(np.arange(len(images)), images)
    recall, held, widths = np.array(recalls), [], []
    for seed in range(200):
        right = np.random.default_rng(seed).random(len(true)) < recall[true]
        p = hard(true, np.where(right, true, (true + 1) % classes), classes)
        found = evaluate(p, resamples=2).metrics["balanced_accuracy"]
        held.append(found.low <= recall.mean() <= found.high)
        widths.append(found.high - found.low)
    assert np.mean(held) >= 0.94
    variance = (recall * (1 - recall) / images).sum() / classes**2
    assert np.mean(widths) <= widest * 2 * 1.96 * variance**0.5


def test_one_wrong_image_makes_no_share_surer():
    """Where all are right each group counts as one image, and that goes on without a jump."""
    for groups, images in ((60, 5), (5, 60)):
        unit, low = np.repeat(np.arange(groups), images), 0.0
        for wrong in (0, 1, 2, 3):
            right = np.arange(groups * images) >= wrong
            found = share_of_groups(right[::-1], unit, 0.95)
            assert found.low < low + 0.1 if wrong else found.low > 0
            low = found.low


@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False])
def test_intervals_of_balanced_accuracy_cover(apart):
    """Groups of one class each, and such as have images of all three."""

    def simulate(rng):
        groups = np.repeat(np.arange(24), 5)
        true = groups % 3 if apart else rng.integers(0, 3, 120)
        easy = rng.beta(3, 1, size=24)[groups]
        right = rng.random(120) < easy
        return hard(true, np.where(right, true, (true + 1) % 3), 3, groups)

    assert 0.91 <= coverage(simulate, 0.75, "balanced_accuracy", 200) <= 0.99


def test_one_group_has_no_interval():
    p = hard([0, 0, 1, 1], [0, 1, 1, 1], 2, ["x"] * 4)
    e = evaluate(p, resamples=20)
    assert e.n_groups == 1
    assert e.metrics["top1"].value == 0.75
    for estimate in (
        *(e.metrics[name] for name in ("top1", "macro_f1", "ece", "nll")),
        e.per_class[0].recall,
    ):
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)
    # a class that only one of two groups has
    e = evaluate(hard([0, 0, 1, 1], [0, 1, 1, 1], 2, list("xxyy")), resamples=20)
    assert math.isnan(e.per_class[0].recall.low)
    assert not math.isnan(e.per_class[1].precision.low)


def test_seed_decides():
    p = make(groups=np.arange(400) % 40)
    first, again, other = (evaluate(p, resamples=100, seed=s).to_dict() for s in (3, 3, 4))
    assert first == again
    assert first["metrics"]["nll"] != other["metrics"]["nll"]
    assert first["metrics"]["nll"]["value"] == other["metrics"]["nll"]["value"]


# ---- size and form ----------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_memory_stays_far_below_the_probabilities(grouped):
    p = make(20_000, 200, groups=np.arange(20_000) // 20 if grouped else None)
    tracemalloc.start()
    evaluate(p, resamples=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert p.probabilities.nbytes == 32_000_000
    assert peak < 16_000_000


def test_probabilities_are_not_copied_and_single_precision_gives_the_same_numbers():
    p = make()
    assert Predictions(p.probabilities, p.labels, p.classes).probabilities is p.probabilities
    single = p.probabilities.astype(np.float32)
    halved = Predictions(single, p.labels, p.classes)
    assert halved.probabilities is single
    same = Predictions(single.astype(np.float64), p.labels, p.classes)
    assert evaluate(halved, resamples=20).to_dict() == evaluate(same, resamples=20).to_dict()


def test_two_images_of_ten_thousand_classes_take_kilobytes():
    probabilities = np.full((2, 10_000), 5e-5, np.float32)
    probabilities[:, 7] = 0.5
    tracemalloc.start()
    e = evaluate(Predictions(probabilities, [7, 9999], [f"c{i}" for i in range(10_000)]))
    text = json.dumps(e.to_dict(), indent=1, allow_nan=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) < 300_000  # nearly all of it the names
    assert peak < 20e6
    assert e.to_dict()["confusion"] == [[7, 7, 1], [9999, 7, 1]]
    assert "c9999" in printed(e)


def test_one_image_has_no_interval():
    written = evaluate(hard([1], [1], 2), resamples=20).to_dict()
    text = json.dumps(written, allow_nan=False)
    assert written["metrics"]["top1"] == {"value": 1.0, "low": None, "high": None}
    for estimate in (*written["metrics"].values(), written["per_class"][0]["recall"]):
        assert (estimate["low"], estimate["high"]) == (None, None)
    assert "NaN" not in text
    assert "nan" not in printed(evaluate(hard([1], [1], 2), resamples=20))


def test_wilson_is_scipys():
    found = wilson_interval(7, 30, 0.9)
    assert found == tuple(binomtest(7, 30).proportion_ci(0.9, method="wilson"))


def test_json_round_trip():
    p = hard([0, 0, 1, 1], [0, 0, 0, 2], 4, list("xxyz"))
    e = evaluate(p, resamples=20)
    written = e.to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert [row["name"] for row in written["per_class"]] == ["c0", "c1", "c2"]
    assert written["per_class"][2]["recall"] == {"value": None, "low": None, "high": None}
    assert written["metrics"]["top1"]["value"] == 0.5
    assert written["confusion"] == [[0, 0, 2], [1, 0, 1], [1, 2, 1]]
    assert (written["n"], written["n_groups"], written["confidence"]) == (4, 3, 0.95)
    written = compare(p, p).to_dict()
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_torch_is_not_imported():
    code = "import sys, regard.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = np.array([[0.7, 0.3], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": GOOD[0]}, r"probabilities of shape \(2,\)"),
        ({"probabilities": GOOD[:0], "labels": np.array([], int)}, r"shape \(0, 2\)"),
        ({"probabilities": np.array([[0.7, 0.3], [np.nan, 0.8]])}, "image 1 are not finite"),
        ({"probabilities": np.array([[np.inf, -np.inf], [0, 1]])}, "image 0 are not finite"),
        ({"probabilities": np.array([[3.0, -2.0], [0, 1]])}, "a probability of -2"),
        ({"probabilities": np.array([[0.7, 0.3], [0.9, 0.8]])}, r"image 1 sum to 1\.7"),
        ({"labels": [0, 2]}, "label 2 of image 1: must be 0 to 1"),
        ({"labels": [-1, 0]}, "label -1 of image 0"),
        ({"labels": [0.0, 1.0]}, "labels of float64"),
        ({"labels": [0]}, r"labels of shape \(1,\)"),
        ({"classes": ["a"]}, "1 class for 2"),
        ({"classes": ["a", "a"]}, "'a' is named twice"),
        ({"groups": ["x"]}, r"groups of shape \(1,\)"),
        ({"groups": np.array(["x", None])}, "image 1 has no group"),
        ({"groups": [1.0, np.nan]}, "image 1 has no group"),
        ({"paths": ["x.png"]}, "1 path for 2 images"),
    ],
)
def test_wrong_predictions_are_refused_in_one_line(change, message):
    right = {"probabilities": GOOD, "labels": [0, 1], "classes": ["a", "b"]}
    assert len(Predictions(**right)) == 2
    with pytest.raises(ValueError, match=message) as refused:
        Predictions(**(right | change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{"resamples": 1}, {"confidence": 1.0}, {"confidence": 95}])
def test_wrong_settings_are_refused(options):
    value = str(next(iter(options.values())))
    for call in (evaluate, lambda p, **o: compare(p, p, **o)):
        with pytest.raises(ValueError, match=f"={value}: "):
            call(make(), **options)


# ---- comparison -------------------------------------------------------------------------


def pair(both, only_a, only_b, neither, groups=None):
    """Two networks, as many images of each kind; all of class 0, a wrong one is called 1."""
    a = np.repeat([0, 0, 1, 1], [both, only_a, only_b, neither])
    b = np.repeat([0, 1, 0, 1], [both, only_a, only_b, neither])
    return hard(np.zeros_like(a), a, 2, groups), hard(np.zeros_like(b), b, 2, groups)


def test_mcnemar_by_hand():
    c = compare(*pair(80, 9, 2, 9))
    # P(at least 9, or at most 2, heads of 11) = 2 (C(11,0) + C(11,1) + C(11,2)) / 2^11
    assert c.p_value == pytest.approx(2 * (1 + 11 + 55) / 2048)
    assert (c.n, c.n_groups, c.only_a, c.only_b) == (100, None, 9, 2)
    assert (c.top1_a, c.top1_b) == (0.89, 0.82)
    assert c.difference.value == pytest.approx(0.07)


def test_other_order_is_the_other_sign():
    a, b = pair(80, 9, 2, 9)
    c, d = compare(a, b), compare(b, a)
    assert d.difference.value == -c.difference.value
    assert ends(d.difference) == pytest.approx((-c.difference.high, -c.difference.low))
    assert (d.p_value, d.only_a, d.only_b) == (c.p_value, 2, 9)


def test_pairing_makes_the_interval_narrow():
    """As normal theory says of paired shares: var = (p10 + p01 - (p10 - p01)²) / n."""
    c = compare(*pair(700, 60, 20, 220), resamples=4000)
    half = 1.96 * math.sqrt((0.06 + 0.02 - 0.04**2) / 1000)
    assert ends(c.difference) == pytest.approx((0.04 - half, 0.04 + half), abs=0.002)
    assert half < 0.6 * 1.96 * math.sqrt((0.76 * 0.24 + 0.72 * 0.28) / 1000)  # two samples'


def test_copies_in_a_group_make_no_difference_surer():
    a, b = pair(60, 20, 8, 12)
    of = np.repeat(np.arange(100), 9)
    groups = of.astype(str)
    a9, b9 = (Predictions(p.probabilities[of], p.labels[of], p.classes, groups) for p in (a, b))
    single, grouped = compare(a, b, resamples=3000), compare(a9, b9, resamples=3000)
    images = compare(*(Predictions(p.probabilities, p.labels, p.classes) for p in (a9, b9)))
    assert grouped.n_groups == 100
    assert grouped.p_value == pytest.approx(single.p_value) == binomtest(20, 28).pvalue
    assert images.p_value < 1e-6 < 0.03 < grouped.p_value
    assert ends(grouped.difference) == pytest.approx(ends(single.difference), abs=0.02)
    width = grouped.difference.high - grouped.difference.low
    assert width == pytest.approx(3 * (images.difference.high - images.difference.low), rel=0.12)


def test_p_value_of_groups_is_that_over_all_signs():
    rng = np.random.default_rng(2)
    groups = np.sort(rng.integers(9, size=60))
    true = np.zeros(60, int)
    a = hard(true, (rng.random(60) < 0.2).astype(int), 2, groups)
    b = hard(true, (rng.random(60) < 0.5).astype(int), 2)  # groups of either will do
    difference = (a.probabilities[:, 0] - b.probabilities[:, 0]).astype(int)
    sums = Counter()
    for group, d in zip(groups.tolist(), difference.tolist(), strict=True):
        sums[group] += d
    totals = [
        sum(sign * d for sign, d in zip(signs, sums.values(), strict=True))
        for signs in itertools.product([-1, 1], repeat=len(sums))
    ]
    expected = np.mean([abs(t) >= abs(difference.sum()) for t in totals])
    assert 0.001 < expected < 0.5
    assert len(set(map(abs, sums.values()))) > 2
    assert compare(a, b).p_value == pytest.approx(expected)
    assert compare(b, a).p_value == pytest.approx(expected)


def test_no_difference_is_not_certainty():
    c = compare(*pair(40, 0, 0, 10))
    reach = wilson_interval(0, 50)[1]
    assert (c.p_value, c.difference.value) == (1.0, 0.0)
    assert ends(c.difference) == (-reach, reach)
    c = compare(*pair(40, 0, 0, 10, np.arange(50) // 10))
    assert (c.p_value, c.difference.high) == (1.0, wilson_interval(0, 5)[1])
    c = compare(*pair(0, 20, 0, 0))
    assert ends(c.difference) == pytest.approx((wilson_interval(20, 20)[0], 1.0))
    assert math.isnan(compare(*pair(3, 4, 1, 0, ["x"] * 8)).difference.low)


def test_interval_of_the_difference_covers():
    held = 0
    for seed in range(200):
        counts = np.random.default_rng(seed).multinomial(200, [0.6, 0.15, 0.05, 0.2])
        c = compare(*pair(*counts), resamples=200, seed=seed)
        held += c.difference.low <= 0.1 <= c.difference.high
    assert 0.90 <= held / 200 <= 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a", "c"]}, "classes differ: 'b' against 'c' at position 1"),
        ({"labels": [0, 0]}, "labels differ: 1 against 0 at position 1"),
        ({"paths": ["x", "z"]}, "images differ: 'y' against 'z' at position 1"),
        ({"groups": ["p", "r"]}, "groups differ: 'q' against 'r' at position 1"),
        ({"probabilities": GOOD[:1], "labels": [0], "groups": ["p"], "paths": ["x"]}, "2 images"),
    ],
)
def test_other_images_are_refused(change, message):
    one = {
        "probabilities": GOOD,
        "labels": [0, 1],
        "classes": ["a", "b"],
        "groups": ["p", "q"],
        "paths": ["x", "y"],
    }
    with pytest.raises(ValueError, match=message):
        compare(Predictions(**one), Predictions(**(one | change)))


# ---- tables -----------------------------------------------------------------------------


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_tables_say_the_numbers():
    true = [0] * 50 + [1] * 50
    p = hard(true, [0] * 45 + [1] * 5 + [1] * 50, 3)
    p = Predictions(p.probabilities, p.labels, ["[red]cat", "dog", "unseen"])
    text = printed(evaluate(p, resamples=50))
    low, high = wilson_interval(95, 100)
    assert f"95.00 %  {100 * low:.2f} – {100 * high:.2f} %" in text
    assert "100 images" in text
    assert "95 % interval" in text
    lines = rows(text)
    assert ["0", "[red]cat", "45", "5", "0"] in lines  # a name is not markup
    assert ["1", "dog", "0", "50", "0"] in lines
    assert lines[[line[:1] for line in lines].index(["class"]) + 1][:3] == [
        "[red]cat",
        "50",
        "90.00",
    ]
    assert ["unseen", "0", "–", "–", "–", "–"] in lines


def test_nearly_all_is_not_printed_as_all():
    true = np.zeros(100_000, int)
    predicted = true.copy()
    predicted[0] = 1
    text = printed(evaluate(hard(true, predicted, 2), resamples=2))
    assert "99.999 %" in text


def test_many_classes_are_told_by_the_worst():
    true = np.repeat(np.arange(30), 4)
    predicted = true.copy()
    predicted[:3] = 7  # 3 of class 0, 1 of class 29
    predicted[-1] = 5
    text = printed(evaluate(hard(true, predicted, 30), resamples=5))
    assert "The 20 classes of lowest recall, of 30" in text
    lines = rows(text)
    start = lines.index(["true", "predicted", "images", "of"])
    assert lines[start + 1 : start + 4] == [["c0", "c7", "3", "4"], ["c29", "c5", "1", "4"], []]
    assert [line[0] for line in lines if line[1:2] == ["4"]][:2] == ["c0", "c29"]


def test_matrix_wider_than_the_console_is_not_cut():
    e = evaluate(make(n_classes=12), resamples=5)
    confusion = e.confusion.toarray()
    matrix = ["0", "c0", *map(str, confusion[0])]
    assert matrix in rows(printed(e, width=120))
    text = printed(e, width=40)
    assert "The most frequent confusions" in text
    assert "Confusion:" not in text
    wrong = confusion - np.diag(np.diag(confusion))
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    assert [f"c{i}", f"c{j}", str(wrong[i, j]), str(confusion[i].sum())] in rows(text)
    right = np.arange(12)
    assert "No confusions" in printed(evaluate(hard(right, right, 12), resamples=5), width=40)


def test_printed_comparison():
    c = compare(*pair(80, 9, 2, 9))
    text = printed(c, show=print_comparison, a="[b]cbam", b="plain")
    low, high = (f"{100 * end:+.2f}" for end in ends(c.difference))
    assert f"[b]cbam minus plain: +7.00 points (95 % interval {low} to {high})" in text
    assert "p = 0.0654 (exact McNemar test)" in text
    assert ["[b]cbam", "89.00", "%", "9"] in rows(text)
    grouped = compare(*pair(80, 9, 2, 9, np.arange(100) // 50))
    assert "100 images of 2 groups" in printed(grouped, show=print_comparison)


def test_a_mean_of_losses_may_be_higher_than_its_samples_if_few_images_have_most_of_it():
    losses = np.array([0.01] * 95 + [0.9] * 5)
    drawn = np.array([w @ losses / 100 for w in draws(100, 400, 0)])
    value, error = float(losses.mean()), drawn.std(ddof=1) * math.sqrt(100 / 99)
    found = mean_of_losses(value, drawn, 0.95, 100)
    assert found.high == pytest.approx(value * math.exp(stats.t.ppf(0.975, 99) * error / value))
    assert found.high > np.quantile(drawn, 0.99)
    assert found.low <= value - stats.t.ppf(0.975, 99) * error
    assert mean_of_losses(value, drawn, 0.95, 100, 0.06).high == 0.06
    few = Predictions(np.array([[0.999, 0.001]] * 12), np.array([0] * 10 + [1] * 2), ["a", "b"])
    assert evaluate(few, resamples=100).metrics["nll"].low == 0.0
    brier = diagnose(few, resamples=100).metrics["brier"]
    assert brier.low == 0.0
    assert brier.high == 1.0  # two images of a class decide
