"""`regard figures`: what is drawn is what was measured, and the files are fit for print."""

import itertools
import re
import threading

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from PIL import Image, ImageDraw
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

from regard.attention import StageMap
from regard.cli import run_command
from regard.evaluation import (
    Predictions,
    diagnose,
    diagnose_calibration,
    evaluate,
    evaluate_subgroups,
    with_temperature,
)
from regard.evaluation.intervals import draws
from regard.explanations.explanation import Explanation
from regard.explanations.figure import contact_sheet
from regard.explanations.print_style import (
    SMALL,
    for_print,
    line_style,
    printable,
    short_names,
    width_in_inches,
)
from regard.report.bands import GRID, precision_recall_of, roc_of
from regard.report.charts import confusion, learning
from regard.report.curves import precision_recall, roc
from regard.report.figures import file_name, positive_class
from regard.report.reliability import (
    calibration_chart,
    decision_chart,
    reliability_chart,
    where_above,
)
from regard.report.subgroups import subgroup_chart

NAMES = ["roc", "precision-recall", "reliability", "confusion", "learning-curves", "faithfulness"]


def two_classes(n=120, groups=None):
    rng = np.random.default_rng(3)
    labels = (rng.random(n) < 0.3).astype(int)
    score = np.clip(0.2 * labels + 0.8 * rng.random(n), 0, 1).round(2)  # with ties
    both = np.stack([1 - score, score], axis=1)
    return Predictions(both, labels, ["benign", "malignant"], groups)


def numbers_of(found):
    return diagnose_calibration(found, resamples=20)


def lines_of(axes):
    return {line.get_label(): line for line in axes.get_lines()}


# ---- files -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("print") / "my figures"
    command = ["figures", str(whole), "--out", str(out), "--images", "1", "--scored", "2",
               "--format", "pdf", "svg", "png", "tiff"]  # fmt: skip
    assert run_command(command) == 0
    return command, out


def test_every_figure_is_there_in_every_format(written):
    _, out = written
    kinds = ("pdf", "svg", "png", "tiff")
    assert {p.name for p in out.iterdir() if p.is_file()} == {
        *(f"{name}.{kind}" for name in NAMES for kind in kinds), "methods.md", "checklists.md",
    }  # fmt: skip
    pictures = list((out / "images").iterdir())
    assert len(pictures) == 4
    assert {p.suffix[1:] for p in pictures} == set(kinds)


def test_files_have_the_width_the_resolution_and_the_fonts_of_print(written):
    _, out = written
    for path in [*out.rglob("*.png"), *out.rglob("*.tiff")]:
        with Image.open(path) as image:
            assert abs(image.width - 85 / 25.4 * 300) <= 1
            assert float(image.info["dpi"][0]) == pytest.approx(300, abs=0.1)
    for path in out.rglob("*.pdf"):
        content = path.read_bytes()
        assert b"/FontFile2" in content  # TrueType: type 42
        assert b"/Type3" not in content
        box = re.search(rb"/MediaBox \[ 0 0 ([0-9.]+) ", content)
        assert float(box[1]) == pytest.approx(85 / 25.4 * 72, abs=0.1)
    assert ">sensitivity</text>" in (out / "roc.svg").read_text()  # text, not outlines


@pytest.mark.slow
def test_a_second_call_writes_the_same_bytes_and_replaces_nobodys_file(written, capsys):
    command, out = written
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert run_command(command) == 0
    assert {p: p.read_bytes() for p in before} == before
    (out / "roc.svg").write_text("<svg>mine</svg>")
    try:
        assert run_command(command) == 2
        assert "roc.svg" in capsys.readouterr().err
        assert (out / "roc.svg").read_text() == "<svg>mine</svg>"
    finally:
        (out / "roc.svg").write_bytes(before[out / "roc.svg"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--width", "wide"], "--width 'wide'"), (["--width", "5mm"], "50 and 400"),
        (["--dpi", "5"], "--dpi 5"), (["--images", "-1"], "--images -1"),
        (["--positive", "x"], "--positive 'x'"), (["--bands", "site=1"], "--bands 'site'"),
        (["--masks", "nowhere.csv"], "nowhere.csv"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_line_and_writes_nothing(flags, says, whole, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_command(["figures", str(whole), "--out", str(out), *flags]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1
    assert not out.exists()


def test_widths_have_units():
    assert width_in_inches("85mm") == pytest.approx(3.346, abs=1e-3)
    assert width_in_inches(" 8.5 cm ") == width_in_inches("85mm")
    assert width_in_inches("3.5in") == 3.5


def test_names_of_files_are_safe_and_differ():
    names = ["a b/ü x.png", "c/a b/ü x.png", "../é/1.png", "x" * 300 + ".png", "digits[3]", "…"]
    safe = [file_name(n) for n in names]
    assert len(set(safe)) == len(names)
    assert all(re.fullmatch(r"[\w.-]{1,90}", s) for s in safe)


# ---- what is drawn -----------------------------------------------------------------------
def test_curves_are_scikit_learns_and_lie_within_their_bands():
    found = two_classes()
    score, truth = found.probabilities[:, 1], found.labels == 1
    band = roc_of(found, "malignant")
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_allclose(np.stack([band.x, band.y]), np.stack([fpr, tpr]))
    inside = np.interp(GRID, band.x, band.y)
    assert ((band.low - 0.05 <= inside) & (inside <= band.high + 0.05)).all()
    assert 0.1 < (band.high - band.low).mean() < 0.4
    band = precision_recall_of(found, "malignant")
    precision, *_ = precision_recall_curve(truth, score)
    assert set(np.round(band.y, 9)) <= set(np.round(precision, 9))
    steps = (np.diff(band.x) * band.y[1:]).sum()
    assert steps == pytest.approx(average_precision_score(truth, score))
    assert band.x[-1] == 1.0


def test_the_band_of_few_patients_is_as_wide_as_the_samples():
    """For 3 ill patients of 60 the expanded percentiles lie beyond what 300 samples have."""
    labels = (np.arange(60) < 3).astype(int)
    score = 1 / (1 + np.exp(-(np.random.default_rng(2).normal(size=60) + labels)))
    few = Predictions(np.stack([1 - score, score], 1), labels, ["well", "ill"])
    band = roc_of(few, "ill", seed=0)
    drawn = []
    for times in draws(60, 300, 0):
        if times[:3].any():
            fpr, tpr, _ = roc_curve(labels, score, sample_weight=times, drop_intermediate=False)
            drawn.append([tpr[fpr <= x + 1e-9].max() for x in GRID])
    np.testing.assert_allclose(band.low, np.min(drawn, axis=0), atol=1e-3)
    np.testing.assert_allclose(band.high, np.max(drawn, axis=0), atol=1e-3)


def test_bands_of_groups_are_wider():
    plain, groups = two_classes(), [f"patient {i // 3}" for i in range(120)]
    same = np.repeat(np.arange(0, 120, 3), 3)  # three times the same image of each patient
    copies = Predictions(plain.probabilities[same], plain.labels[same], plain.classes)
    grouped = Predictions(plain.probabilities[same], plain.labels[same], plain.classes, groups)
    width = [np.ptp(np.stack([b.low, b.high]), axis=0).mean()
             for b in (roc_of(copies, "malignant"), roc_of(grouped, "malignant"))]  # fmt: skip
    assert width[1] > 1.3 * width[0]


def test_threads_that_draw_at_once_leave_each_other_the_settings():
    before, inside, other = dict(matplotlib.rcParams), threading.Event(), threading.Event()
    found = []

    def first():
        with for_print():
            inside.set()
            other.wait(0.2)

    def second():
        inside.wait(10)
        with for_print():
            other.set()
            one.join(0.2)  # where it was in its block as well, it leaves it now
            found.append(matplotlib.rcParams["text.parse_math"])

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    two.start()
    two.join(10)
    assert found == [False]
    assert dict(matplotlib.rcParams) == before


def test_the_legend_has_the_areas_of_evaluate_and_the_point_is_the_decision():
    found = two_classes()
    numbers = diagnose(found, positive="malignant")
    with for_print():
        (axes,) = roc(found, numbers, "malignant", 3.3).figure.axes
        (other,) = precision_recall(found, numbers, "malignant", 3.3).figure.axes
    label = axes.get_legend().get_texts()[0].get_text()
    area = numbers.per_class["malignant"]["roc_auc"]
    assert label == f"malignant: AUC {area.value:.2f} ({area.low:.2f}–{area.high:.2f})"
    line = lines_of(axes)[label]
    assert auc(*line.get_data()) == pytest.approx(area.value)
    point = next(x for x in axes.get_lines() if x.get_marker() == "o").get_data()
    one = numbers.one_class.metrics
    assert np.ravel(point).tolist() == [1 - one["specificity"].value, one["sensitivity"].value]
    assert any(isinstance(c, FillBetweenPolyCollection) for c in axes.collections)
    assert "AP" in other.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_the_name_of_the_decision_is_within_the_axes_and_hides_no_legend(p):
    """A network that calls no image positive, some, or every one."""
    labels = np.arange(40) % 4 // 3
    score = np.clip(p + 0.1 * np.linspace(-1, 1, 40) + 0.1 * labels, 0, 1)
    found = Predictions(np.stack([1 - score, score], axis=1), labels, ["benign", "malignant"])
    for threshold in (None, np.inf):
        numbers = diagnose(found, positive="malignant", threshold=threshold, resamples=20)
        with for_print():
            figure = roc(found, numbers, "malignant", 3.3).figure
            figure.draw_without_rendering()
        (axes,) = figure.axes
        (name,) = axes.texts
        box, inner = name.get_window_extent(), axes.get_window_extent()
        assert inner.x0 <= box.x0 < box.x1 <= inner.x1
        assert inner.y0 <= box.y0 < box.y1 <= inner.y1
        assert not box.overlaps(axes.get_legend().get_window_extent())


def test_lines_differ_in_color_and_neighbors_in_style_too():
    styles = [line_style(i) for i in range(12)]
    assert len({tuple(style.values()) for style in styles}) == 12
    assert all(a["linestyle"] != b["linestyle"] for a, b in itertools.pairwise(styles))


def test_a_mean_over_classes_says_how_many_the_test_images_have():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 30)
    labels = np.arange(30) % 3
    for names, words in (("abc", "Mean over classes: "), ("abcd", "Mean over the 3 tested cla")):
        said = p[:, : len(names)] / p[:, : len(names)].sum(axis=1, keepdims=True)
        found = Predictions(said, labels, list(names))
        with for_print():
            chart = roc(found, diagnose(found, resamples=20), None, 3.3)
        assert words in chart.caption


def test_many_classes_are_each_against_the_rest_and_the_worst_of_many_are_drawn():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(30), 400)
    names = [f"_class ${i}$" for i in range(30)]  # neither hidden nor a formula
    found = Predictions(p, rng.integers(0, 30, 400), names)
    with for_print():
        chart = roc(found, diagnose(found, resamples=20), None, 3.3)
        chart.figure.draw_without_rendering()
    (axes,) = chart.figure.axes
    assert axes.get_legend() is None
    (legend,) = chart.figure.legends
    texts = [t.get_text() for t in legend.get_texts()]
    assert len(texts) == 12
    assert "$" in texts[0]
    assert "12 of 30" in chart.caption
    # it hides no curve, and no axis is squeezed by it
    assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0
    assert axes.get_window_extent().height > 0.7 * 3.3 * chart.figure.dpi


def test_the_positive_class_is_the_rarer_of_two():
    found = two_classes()
    assert positive_class(found, None) == "malignant"
    flipped = Predictions(found.probabilities, 1 - found.labels, found.classes)
    assert positive_class(flipped, None) == "benign"
    assert positive_class(flipped, "malignant") == "malignant"
    three = Predictions(np.eye(3), np.arange(3), list("abc"))
    assert positive_class(three, None) is None


def test_calibration_of_a_class_is_its_share_in_bins_of_its_probability():
    found = two_classes(400)
    with for_print():
        axes = calibration_chart(found, found, "malignant", 3.3).figure.axes[0]
    x, y = axes.containers[0][0].get_data()
    p, is_it = found.probabilities[:, 1], found.labels == 1
    inside = (p > 5 / 15) & (p <= 6 / 15)
    k = int(np.argmin(np.abs(x - p[inside].mean())))
    assert (x[k], y[k]) == pytest.approx((p[inside].mean(), is_it[inside].mean()))
    assert len(x) == 15


def test_the_bins_drawn_are_those_of_the_calibration_error_beside_them():
    found = two_classes(400)
    ece = numbers_of(found)["ece"]
    with for_print():
        upper, lower = reliability_chart(found, found, (ece, ece), 3.3).figure.axes
    x, y = upper.containers[0][0].get_data()
    images = np.array([bar.get_height() for bar in lower.patches])
    assert (np.abs(x - y) * images).sum() / 400 == pytest.approx(ece.value)


def test_before_and_after_do_not_hide_each_other_nor_the_legend_them():
    found = two_classes(400)
    after = with_temperature(found, 0.3)
    errors = numbers_of(found)["ece"], numbers_of(after)["ece"]
    with for_print():
        chart = reliability_chart(found, after, errors, 3.3)
        decision = decision_chart(found, "malignant", 3.3).figure
    for figure in (chart.figure, decision):
        figure.draw_without_rendering()
        upper, (legend,) = figure.axes[0], figure.legends
        assert legend.get_window_extent().y0 >= upper.get_window_extent().y1
    upper, lower = chart.figure.axes
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in lower.patches)
    assert len(spans) > 6
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    for text, error in zip(chart.figure.legends[0].get_texts(), errors, strict=True):
        assert f"{error.value:.3f} ({error.low:.3f}–{error.high:.3f})" in text.get_text()
    points = [c[0] for c in upper.containers]
    left, right = (p.get_transform().transform((0.5, 0.5))[0] for p in points)
    assert right - left > 3  # pixels of 1/100 inch: whiskers do not cover each other


def test_names_of_parts_are_whole_and_ticks_of_panels_stay_apart():
    found = two_classes(300)
    sites = ["University Hospital of Zürich", "University Hospital of Basel", "Bern", "tiny"]
    column = [sites[3] if i < 4 else sites[i % 3] for i in range(300)]
    parts = evaluate_subgroups(found, "site", column, positive="malignant", resamples=50)
    with for_print():
        chart = subgroup_chart(parts, 85 / 25.4)
    chart.figure.draw_without_rendering()
    one, other = chart.figure.axes
    names = [t.get_text() for t in one.get_yticklabels()]
    assert {re.sub(r" \(\d+\)$", "", n.replace("\n", " ")) for n in names} == set(sites[:3])
    boxes = sorted((t.get_window_extent() for t in one.get_yticklabels()), key=lambda b: b.y0)
    assert all(a.y1 < b.y0 for a, b in itertools.pairwise(boxes))
    ends = [
        [t.get_window_extent() for t in axes.get_xticklabels()
         if axes.get_xlim()[0] <= t.get_position()[0] <= axes.get_xlim()[1]]
        for axes in (one, other)
    ]  # fmt: skip
    assert ends[1][0].x0 - ends[0][-1].x1 > 4
    assert "tiny (4)" in chart.caption
    titles = [axes.get_title(loc="left") for axes in chart.figure.axes]
    assert set(re.findall("Largest gap in (.+?):", chart.caption)) == set(titles)


def test_one_image_or_one_class_is_drawn_too():
    one = Predictions(np.array([[0.2, 0.8]]), np.array([1]), ["a", "b"])
    numbers = diagnose(one, positive="b")
    assert roc(one, numbers, "b", 3.3) is None
    ece = numbers_of(one)["ece"]
    reliability_chart(one, one, (ece, ece), 3.3).figure.draw_without_rendering()
    confusion(evaluate(one), 3.3).figure.draw_without_rendering()
    decision_chart(one, "b", 3.3).figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([], "nowhere"),
        ([(2, 69)], "from 2% to 69%"),
        ([(1, 15), (38, 38), (90, 99)], "from 1% to 15%, at 38% and from 90% to 99%"),
        ([(2, 3), (5, 5), (7, 8), (10, 12)], "at 8 of the 99 thresholds, between 2% and 12%"),
    ],
)
def test_where_a_decision_curve_is_above_leaves_gaps_out(spans, words):
    thresholds = np.arange(1, 100)
    above = np.zeros(99, bool)
    for low, high in spans:
        above |= (low <= thresholds) & (thresholds <= high)
    assert where_above(thresholds / 100, above) == words


def test_the_decision_curves_sentence_bridges_no_gap():
    # 60 of 100 are positive; the first 30 of them are told from all others, the rest is mixed
    score = np.repeat([0.9, 0.5, 0.45, 0.05], [30, 20, 30, 20])
    labels = np.repeat([1, 0, 1, 0], [30, 20, 30, 20])
    found = Predictions(np.stack([1 - score, score], 1), labels, ["a", "b"])
    with for_print():
        words = decision_chart(found, "b", 3.3).words
    share = labels.mean()
    t = np.arange(1, 100) / 100
    model = [(labels[score >= x].sum() - (1 - labels)[score >= x].sum() * x / (1 - x)) / 100
             for x in t]  # fmt: skip
    above = np.array(model) > np.maximum(share - (1 - share) * t / (1 - t), 0) + 1e-9
    assert 1 <= above[:45].sum() < 45
    assert not above[45:50].all()
    for x in t[above]:
        assert any(low <= x <= high for low, high in spans_of(words))
    for x in t[~above]:
        assert not any(low <= x <= high for low, high in spans_of(words))


def spans_of(words):
    """The ranges that a sentence names."""
    named = re.findall(r"from (\d+)% to (\d+)%|at (\d+)%", words)
    return [(int(a or c) / 100 - 1e-9, int(b or c) / 100 + 1e-9) for a, b, c in named]


def test_the_confusion_matrix_has_counts_and_shares():
    found = two_classes()
    matrix = evaluate(found).confusion.toarray()
    axes = confusion(evaluate(found), 3.3).figure.axes[0]
    for (i, j), count in np.ndenumerate(matrix):
        share = 100 * count / matrix[i].sum()
        text = next(t for t in axes.texts if t.get_position() == (j, i))
        assert text.get_text() == f"{share:.0f} %\n{count}"


def matrix_of(names, images, inches=3.3):
    """The confusion matrix of so many images of each class, all right."""
    labels = np.arange(len(names)).repeat(images)
    found = evaluate(Predictions(np.eye(len(names))[labels], labels, names), resamples=2)
    with for_print():
        chart = confusion(found, inches)
        chart.figure.draw_without_rendering()
    return chart


@pytest.mark.parametrize("count", [2, 8, 10, 12])
def test_the_numbers_of_a_confusion_matrix_fit_their_cells_whatever_the_names(count):
    chart = matrix_of([f"a long name of a class {i}" for i in range(count)], 120)
    axes = chart.figure.axes[0]
    cell = axes.get_window_extent().width / count
    assert len(axes.texts) == count
    for text in axes.texts:
        assert text.get_window_extent().width <= cell
        assert text.get_fontsize() > 3.6
        assert text.get_text() in ("100 %\n120", "120")
    assert ("percentages" in chart.caption) == ("%" in axes.texts[0].get_text())


@pytest.mark.parametrize(("count", "apart"), [(3, 1), (20, 2), (36, 3)])
def test_the_names_of_a_confusion_matrix_neither_overlap_nor_leave_the_figure_empty(count, apart):
    names = [f"class {i:02} of many letters" for i in range(count)]
    chart = matrix_of(names, 2)
    axes = chart.figure.axes[0]
    for ticks in (axes.get_yticklabels(), axes.get_xticklabels()):
        assert [t.get_text()[:8] for t in ticks] == [n[:8] for n in names[::apart]]
        assert {t.get_fontsize() for t in ticks} == {SMALL}
    rows = [t.get_window_extent() for t in axes.get_yticklabels()]
    assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(rows))
    if count > 12:
        columns = [t.get_window_extent() for t in axes.get_xticklabels()]
        assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(columns))
    assert (f"One class in {apart} is named" in chart.caption) == (apart > 1)
    assert chart.figure.get_size_inches()[1] - chart.figure.get_tightbbox().height < 0.1


@pytest.mark.parametrize("count", [6, 12, 36])
def test_long_names_leave_a_narrow_figure_to_the_matrix(count):
    chart = matrix_of([f"a long name of a class {i:02}" for i in range(count)], 3, 50 / 25.4)
    axes = chart.figure.axes[0].get_window_extent()
    assert axes.width > 0.3 * chart.figure.get_size_inches()[0] * chart.figure.dpi


def test_letters_that_no_font_has_are_told_once(caplog, monkeypatch):
    monkeypatch.setattr("regard.explanations.print_style._warned", set())
    with caplog.at_level("WARNING"):
        assert printable("\ue0001 caf\u00e9") == "\ufffd1 caf\u00e9"
        assert caplog.messages == []  # no letter
        for _ in range(2):
            assert printable("\U0001e900x") == "\ufffdx"  # of the Adlam script
        printable("\U0001e901")  # another name of the same script
    assert len(caplog.messages) == 1
    assert "no installed font has \U0001e900:" in caplog.messages[0]


def test_names_that_begin_alike_are_cut_in_the_middle():
    long = [f"the beginning is the same for all, number {i}" for i in range(2)]
    assert short_names([*long, "other", "_one that is only long"], 12) == [
        "the b…mber 0", "the b…mber 1", "other", " _one that i…",
    ]  # fmt: skip


@pytest.mark.parametrize("ends", [(0.0, 0.005), (0.1, 0.1), (0.42, 0.44), (0.1, 0.9), (0.98, 0.99)])
def test_the_ticks_of_accuracy_say_different_numbers(ends):
    rows = [{"epoch": e, "loss": 1.0, "accuracy": a} for e, a in zip((1.0, 2.0), ends, strict=True)]
    with for_print():
        figure = learning([{**row, "learning_rate": 0.1} for row in rows], None, 3.3).figure
        figure.draw_without_rendering()
    axes = next(a for a in figure.axes if a.get_title(loc="left") == "Accuracy")
    low, high = axes.get_ylim()
    for tick, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True):
        if low <= place <= high:
            assert float(tick.get_text().removesuffix(" %")) == pytest.approx(100 * place)


def test_the_one_evaluation_of_a_short_training_has_its_epoch_as_the_tick():
    row = {"epoch": 3.404, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    with for_print():
        figure = learning([row], None, 3.3).figure
    for axes in figure.axes[:3]:  # the fourth is empty
        assert [t.get_text() for t in axes.get_xticklabels()] == ["3.404"]


def test_learning_curves_mark_the_chosen_epoch_and_break_where_a_loss_is_not_finite():
    history = [
        {"epoch": n, "loss": 2 / n, "objective": 3 / n, "accuracy": 1 - 0.5 / n,
         "learning_rate": 0.1, "val_loss": 3 / n, "val_accuracy": 0.8}
        for n in range(1, 7)
    ]  # fmt: skip
    history[2]["loss"] = float("nan")
    with for_print():
        chart = learning(history, 5.0, 3.3)
    titles = [axes.get_title(loc="left") for axes in chart.figure.axes]
    assert titles == ["Loss", "Training objective", "Accuracy", "Learning rate"]
    for axes in chart.figure.axes:
        marks = [x for x in axes.get_lines() if list(x.get_xdata()) == [5.0, 5.0]]
        assert len(marks) == 1
    y = lines_of(chart.figure.axes[0])["training"].get_ydata()
    assert np.isnan(y).tolist() == [False, False, True, False, False, False]
    assert "validation from 3 to 0.5" in chart.words
    history[-1]["loss"] = float("inf")
    assert "training from 2 to not finite" in learning(history, 5.0, 3.3).words
    # where loss and validation loss are not one quantity, they do not share axes
    older = [{k: v for k, v in row.items() if k != "objective"} for row in history]
    with for_print():
        titles = [axes.get_title(loc="left") for axes in learning(older, 5.0, 3.3).figure.axes]
    assert titles[:2] == ["Training loss", "Validation loss"]
    assert learning([], None, 3.3) is None


# ---- explanations ------------------------------------------------------------------------
@pytest.mark.parametrize("width", [50, 85, 120])
@pytest.mark.parametrize("path", ["images/malignant_076.jpg", "WWWWWWWW/MMMMMMMMMMMMMMMMMMMM.PNG"])
def test_no_heading_leaves_the_figure(width, path):
    values = np.random.default_rng(0).random((7, 7)).astype(np.float32)
    name = "MASSIVELY WIDE NAME OF A CLASS"
    shown = Explanation(
        path=path, image=np.zeros((64, 64), np.uint8), box=(0, 0, 64, 64),
        classes=[(name, 0.932), ("malignant", 0.068)], target=(name, 0.932),
        maps=[StageMap("Grad-CAM", "gradcam", values, "at block5", "block5")], true="malignant",
    )  # fmt: skip
    figure = shown.figure(width=width / 25.4)
    figure.draw_without_rendering()
    right = figure.get_figwidth() * figure.dpi
    texts = [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]
    assert all(t.get_window_extent().x1 <= right for t in texts)
    assert path in "".join(t.get_text() for t in figure.texts)


@pytest.mark.parametrize("box", [(0, 0, 90, 120), (0, 15, 90, 105)])
def test_the_heading_says_what_the_dashed_frame_is_where_there_is_one(box):
    values = np.random.default_rng(0).random((7, 7)).astype(np.float32)
    shown = Explanation(
        path="a.png", image=np.zeros((120, 90), np.uint8), box=box, classes=[("benign", 1.0)],
        target=("benign", 1.0), maps=[StageMap("Grad-CAM", "gradcam", values, "at b5", "b5")],
    )  # fmt: skip
    figure = shown.figure()
    dashed = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    said = any("dashed: what the network saw" in t.get_text() for t in figure.texts)
    assert (len(dashed) == 1) == said == (box != (0, 0, 90, 120))


def test_a_sheet_keeps_the_probability_however_long_the_names(monkeypatch):
    values = np.random.default_rng(0).random((7, 7)).astype(np.float32)
    name = "a name of a class that is far too long for a sheet of small pictures " * 3
    shown = Explanation(
        path="a.png", image=np.zeros((64, 64), np.uint8), box=(0, 0, 64, 64),
        classes=[(name, 0.646)], target=(name, 0.646),
        maps=[StageMap("Grad-CAM", "gradcam", values, "at b5", "b5")],
    )  # fmt: skip
    written = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text",
        lambda self, at, text, fill, font: (
            written.append((text, font.getlength(text))), draw(self, at, text, fill, font)
        ),
    )  # fmt: skip
    sheet = contact_sheet([shown])
    heading, length = written[0]
    assert heading.endswith("… (64.6\u00a0%)")
    assert length <= sheet.width - 20


def test_an_explanation_fits_a_column_with_its_true_class_its_mask_and_named_scales():
    rng = np.random.default_rng(0)
    values = rng.random((7, 7)).astype(np.float32)
    maps = [StageMap("gate3", "spatial", values / values.sum(), "", "gate3"),
            StageMap("Grad-CAM", "gradcam", 12 * values, "at block5", "block5")]  # fmt: skip
    mask = np.zeros((120, 90), bool)
    mask[40:80, 30:60] = True
    shown = Explanation(
        path="a/" * 40 + "scan 7.png", image=np.zeros((120, 90), np.uint8), box=(0, 0, 90, 120),
        classes=[("benign", 0.8), ("malignant", 0.2)], target=("benign", 0.8), maps=maps,
        true="malignant", mask=mask,
    )  # fmt: skip
    figure = shown.figure(width=85 / 25.4)
    figure.draw_without_rendering()
    heading = " ".join(t.get_text() for t in figure.texts).replace("\u00a0", " ")
    assert "scan 7.png: benign (80.0 %)" in heading
    assert "true class malignant (wrong)" in heading
    right = figure.get_figwidth() * figure.dpi
    assert all(t.get_window_extent().x1 <= right for t in figure.texts)
    panels = [axes for axes in figure.axes if axes.collections]  # the outlines
    assert len(panels) == 3
    scales = [[t.get_text() for t in axes.texts] for axes in figure.axes]
    scales = [texts for texts in scales if len(texts) == 4]
    assert [texts[3] for texts in scales] == ["attention (sums to 1)", "Grad-CAM"]
    for low, middle, high, _ in scales:
        decimals = {len(n.split()[-1].partition(".")[2]) for n in (low, middle, high)}
        assert len(decimals) == 1
    for axes in figure.axes:
        boxes = sorted((t.get_window_extent() for t in axes.texts[:3]), key=lambda b: b.x0)
        if len(axes.texts) == 4:
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("corner", [(2, 3), (1001, 1994), (1490, 1990)])
def test_a_small_mask_in_a_large_image_is_outlined_where_it_is(corner):
    """The outline is drawn on every sixth pixel or so, and a mask may lie between them."""
    y, x = corner
    mask = np.zeros((1500, 2000), bool)
    mask[y : y + 6, x : x + 6] = True
    shown = Explanation(
        path="x.png", image=np.zeros((1500, 2000), np.uint8), box=(0, 0, 2000, 1500),
        classes=[("a", 1.0)], target=("a", 1.0), maps=[], mask=mask,
    )  # fmt: skip
    (panel,) = (axes for axes in shown.figure().axes if axes.collections)
    at = np.concatenate([p.vertices for p in panel.collections[0].get_paths()])
    image = panel.images[0].get_array()
    center = (at.min(axis=0) + at.max(axis=0) + 1) / 2 * 1500 / image.shape[0]
    np.testing.assert_allclose(center, (x + 3, y + 3), atol=2000 / 320)
    small = shown.reduced(160).mask
    assert small.shape == (120, 160)
    assert small[int((y + 3) * 0.08), int((x + 3) * 0.08)]
    assert small.sum() <= 4
