"""The report page: its numbers, its safety, its size, and that it is written whole."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import regard
from regard.attention import StageMap
from regard.evaluation import Predictions, evaluate
from regard.explanations.explanation import Explanation
from regard.explanations.print_style import for_print
from regard.report import MAX_BYTES, Report, write_report
from regard.report.build import report_run
from regard.report.charts import confusion, learning
from tests.helpers import run

VOID = {"meta", "img", "br", "link", "input", "hr", "source"}
CONFUSION = np.array([[30, 2, 0], [0, 41, 1], [5, 0, 21]])  # 92 of 100


class Page(HTMLParser):
    """Elements, attributes and text of a page; refuses tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.words, self.rows = [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" in self.stack or "script" in self.stack:
            return
        self.words.append(data)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data.strip()

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def attention(y, x, size=12):
    rows, columns = np.mgrid[:size, :size]
    bump = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8.0)
    return (bump / bump.sum()).astype(np.float32)


def explained(image, true, predicted, p, maps):
    shown = [StageMap(name, "spatial", values, "", name) for name, values in maps]
    height, width = image.shape[:2]
    return Explanation(
        path="a.png", image=image, box=(0, 0, width, height), true=true,
        classes=[(predicted, p)], target=(predicted, p), maps=shown,
    )  # fmt: skip


def items():
    images = (load_digits().images[:4] * 255 / 16).astype(np.uint8)
    answers = [("zero", "zero", 0.9996), ("one", "two", 0.51), ("two", "two", 1.0)]
    maps = [("gate3", attention(4, 5)), ("gate4", np.full((6, 6), 1 / 36, np.float32))]
    return [explained(image, *answer, maps) for image, answer in zip(images, answers, strict=False)]


def evaluation(confusion, classes=("zero", "one", "two"), groups=None):
    """Of predictions with this confusion matrix."""
    true, predicted = np.nonzero(confusion)
    counts = confusion[true, predicted]
    labels, answers = np.repeat(true, counts), np.repeat(predicted, counts)
    probabilities = np.eye(len(classes))[answers]
    return evaluate(Predictions(probabilities, labels, list(classes), groups))


def epoch(number, **more):
    return {
        "epoch": number,
        "loss": 2.0 / number,
        "accuracy": 1 - 0.5 / number,
        "objective": 2.0 / number,
        "learning_rate": 0.1 / number,
        **more,
    }


def report(**changes):
    base = Report(
        title="Digits",
        model="ag_sononet8",
        summary={"data": "300 images of digits", "seed": "7"},
        evaluation=evaluation(CONFUSION),
        history=[epoch(n, val_loss=3.0 / n, val_accuracy=0.8) for n in range(1, 21)],
        explanations=items(),
        versions={"torch": "2.15.0"},
        command="regard train ag_sononet8 --data digits",
        notes=["No setting was chosen on the test images."],
    )
    return dataclasses.replace(base, **changes)


def figures():
    with for_print():
        return [learning(report().history, 5.0, 3.3), confusion(evaluation(CONFUSION), 3.3)]


def written(tmp_path, **changes):
    path = tmp_path / "report.html"
    write_report(report(**changes), path)
    return path.read_text(encoding="utf-8")


def test_the_page_says_the_numbers(tmp_path):
    text = Page(written(tmp_path)).text
    assert "92.0 % of the test images classified correctly: 92 of 100" in text
    assert "95 % interval 85.0–95.9 %" in text
    assert "ag_sononet8 was trained on 300 images of digits and distinguishes 3 classes" in text
    assert "always predicting “one”: 42.0 %" in text
    assert "two predicted as zero : 5 of 26" in text
    assert "No setting was chosen on the test images." in text
    assert "regard train ag_sononet8 --data digits" in text
    assert "torch 2.15.0" in text
    # mean recall: (30/32 + 41/42 + 21/26) / 3
    assert "is 90.7 % ." in text


def test_the_tables_hold_every_count(tmp_path):
    rows = [[cell.replace("\u00a0", " ") for cell in row] for row in Page(written(tmp_path)).rows]
    for name, counts in zip(["zero", "one", "two"], CONFUSION, strict=True):
        shares = np.rint(100 * counts / counts.sum()).astype(int)
        cells = [f"{n}{share} %" if n else "0" for n, share in zip(counts, shares, strict=True)]
        assert [name, *cells] in rows
    # recall 30/32 with its interval, precision 30/35
    assert ["zero", "32", "93.8 %", "79.9–98.3 %", "", "85.7 %"] in rows
    assert ["1", "2", "0.5", "2", "0.1", "3", "0.8"] in rows  # the first epoch


def test_each_figure_is_drawn_in_the_pages_colors_and_can_be_downloaded(tmp_path):
    html = written(tmp_path, charts=figures())
    page = Page(html)
    drawn = [a for a in page.all("svg") if "aria-label" in a]
    words = "Loss by epoch: training from 2 to 0.1; validation from 3 to 0.15"
    assert drawn[0]["aria-label"].startswith(words)
    assert "2 classes" in drawn[1]["aria-label"] or "3 classes" in drawn[1]["aria-label"]
    assert "var(--ink)" in html
    links = [a for a in page.all("a") if a.get("download")]
    assert [a["download"] for a in links] == ["learning-curves.svg", "confusion.svg"]
    for link in links:
        file = base64.b64decode(link["href"].partition("base64,")[2]).decode()
        assert file.startswith("<?xml")
        assert "var(--" not in file
        assert "</svg>" in file
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_page_stands_alone(tmp_path):
    html = written(tmp_path, charts=figures())
    page = Page(html)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "action", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/", "#")), (tag, name, value[:60])
    assert "@import" not in html
    assert all(where.startswith("#") for where in re.findall(r"url\(([^)]*)\)", html))
    # no script runs but those whose hash the policy names
    policy = next(a["content"] for a in page.all("meta") if "Policy" in a.get("http-equiv", ""))
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert policy.split("script-src ")[1].split() == [f"'sha256-{h}'" for h in hashes]
    assert "default-src 'none'" in policy
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for a in page.all("a") if "download" not in a} <= ids
    assert {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a} <= ids


def test_the_page_can_be_read_by_a_screen_reader(tmp_path):
    page = Page(written(tmp_path))
    assert page.all("html") == [{"lang": "en"}]
    assert all(a.get("alt") for a in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("scope") in ("col", "row", "colgroup") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == 3


def test_the_gallery_shows_wrong_ones_first_in_words_and_with_ranges(tmp_path):
    text = Page(written(tmp_path)).text
    wrong = text.index("Classified wrongly: 1 of 8")
    assert wrong < text.index("✗ wrong 51 % a.png true one → predicted two")
    assert wrong < text.index("Classified correctly: 2 of 92") < text.index("✓ right > 99.9 %")
    assert "✓ right 100 % a.png true two → predicted two" in text
    assert "gate4 0.028 everywhere" in text
    assert re.search(r"gate3 0\.0000–0\.0[0-9]{3}, uniform would be 0\.0069", text)


def test_the_pictures_are_the_image_and_its_overlays(tmp_path):
    sources = [
        a for a in Page(written(tmp_path)).all("img") if a["alt"].startswith(("Image", "The"))
    ]
    pictures = [Image.open(io.BytesIO(base64.b64decode(a["src"].split(",")[1]))) for a in sources]
    assert len(pictures) == 9
    # the wrong one comes first: its very pixels, then gate3 in color, then a flat gray one
    np.testing.assert_array_equal(np.asarray(pictures[0]), items()[1].image)
    assert sources[0]["class"] == "pixels"
    spread = [int(np.ptp(np.asarray(p).astype(int), axis=2).max()) for p in pictures[1:3]]
    assert pictures[1].size == (224, 224)
    assert spread[0] > 100
    assert spread[1] <= 2  # JPEG's rounding


def test_names_are_escaped(tmp_path):
    bad = '<b>x</b>"&'
    shown = [explained(items()[0].image, bad, bad, 0.5, [(bad, attention(1, 1))])]
    html = written(
        tmp_path,
        title=bad, model=bad, evaluation=evaluation(CONFUSION, (bad, "one", "two")),
        summary={bad: bad}, versions={bad: bad}, command=bad, notes=[bad], explanations=shown,
    )  # fmt: skip
    assert bad not in html
    assert "<b>x" not in html
    assert html.count("&lt;b&gt;x&lt;/b&gt;") > 10
    assert bad in Page(html).text


def test_a_large_gallery_is_cut_and_the_page_says_so(tmp_path):
    photos = load_sample_images().images
    maps = [(f"gate{g}", attention(g, g)) for g in range(10)]
    some = [
        explained(photos[i % 2], "zero", ("zero", "one")[i // 2 % 2], 0.5, maps) for i in range(40)
    ]
    html = written(tmp_path, explanations=some)
    assert 1_500_000 < len(html.encode()) < MAX_BYTES == 10_000_000
    cards = Page(html).all("figure")
    shown = sum(1 for a in cards if not a)  # figures without a class
    left_out = int(re.search(r"(\d+) more images are left out", html)[1])
    assert shown + left_out == 40
    assert shown >= 5


def test_ten_thousand_classes_are_a_list_that_can_be_searched_on_a_small_page(tmp_path):
    count = 10_000
    labels = np.repeat(np.arange(count), 2)
    answers = labels.copy()
    answers[6:8] = 150
    names = [f"class{i}" for i in range(count)]
    result = evaluation_of(labels, answers, names)
    html = written(tmp_path, evaluation=result)
    assert len(html.encode()) < 1_500_000
    page = Page(html)
    assert "classified correctly: 19,998 of 20,000" in page.text
    assert "matrix of 10,000 classes is too large to read" in page.text
    assert "class3 predicted as class150 : 2 of 2" in page.text
    assert max(len(row) for row in page.rows) < 10
    for name in (names[0], names[4711], names[-1]):
        assert re.search(rf"^{name} .*100\.0 %", html, re.MULTILINE)
    assert len(page.rows) < 200
    assert page.rows[-100][0] == "class3"  # the lowest recall comes first


def evaluation_of(labels, answers, names):
    """An evaluation without its probabilities, which would take 1.6 GB."""
    from scipy.sparse import csr_array

    from regard.evaluation import ClassResult, Estimate, Evaluation

    count = len(names)
    cells = csr_array((np.ones(len(labels), int), (labels, answers)), shape=(count, count))
    cells.sum_duplicates()
    hits, images = cells.diagonal(), np.bincount(labels, minlength=count)
    nothing = Estimate(np.nan, np.nan, np.nan)
    classes = [
        ClassResult(n, int(k), Estimate(h / k, 0.0, 1.0), nothing, nothing)
        for n, h, k in zip(names, hits, images, strict=True)
    ]
    share = float(hits.sum() / len(labels))
    metrics = {m: Estimate(share, share, share) for m in ("top1", "balanced_accuracy")}
    return Evaluation(len(labels), None, names, cells, metrics, classes)


def test_little_is_enough(tmp_path):
    text = Page(
        written(
            tmp_path,
            history=[], explanations=[], summary={}, versions={}, command="", notes=[],
            evaluation=evaluation(np.diag([2, 0, 1])),
        )
    ).text  # fmt: skip
    assert "100.0 % of the test images classified correctly: 3 of 3" in text
    assert "No mistakes" in text
    assert "Where it looks" not in text
    assert "Loss" not in text
    assert "one 0 – – –" in text  # a class without test images


def test_without_maps_nothing_is_said_of_attention(tmp_path):
    shown = [dataclasses.replace(item, maps=[]) for item in items()]
    text = Page(written(tmp_path, explanations=shown)).text
    assert "Example predictions Classified wrongly: 1 of 8" in text
    assert "The images above are a selection" in text
    for word in ("attention", "A map", "A reason", "Where it looks"):
        assert word not in text


def test_the_network_is_a_fact_once(tmp_path):
    facts = [Page(written(tmp_path, summary=s)).text for s in ({"seed": "7"}, {"Network": "X9"})]
    assert "network ag_sononet8 seed 7" in facts[0]
    assert "network ag_sononet8 Network" not in facts[1]
    assert "Network X9" in facts[1]


def test_almost_all_is_not_all(tmp_path):
    html = written(
        tmp_path, evaluation=evaluation(np.array([[9999, 1, 0], [0, 9999, 0], [0, 0, 1]]))
    )
    assert "99.995 % of the test images" in Page(html).text


def test_class_intervals_are_those_of_the_evaluation_by_group(tmp_path):
    labels = np.repeat([0, 1], 20)
    answers = np.where(np.arange(40) % 20 < 6, 1 - labels, labels)  # 14 of 20 right in each
    groups = np.array([f"patient {i // 5}" for i in range(40)])  # 4 each, all right or mostly wrong
    predictions = Predictions(np.eye(2)[answers], labels, ["benign", "malignant"], groups)
    result = evaluate(predictions)
    rows = [
        [c.replace("\u00a0", " ") for c in r]
        for r in Page(written(tmp_path, evaluation=result)).rows
    ]
    recall = result.per_class[0].recall
    assert ["benign", "20", "70.0 %", f"{100 * recall.low:.1f}–{100 * recall.high:.1f} %"] in [
        row[:4] for row in rows
    ]
    independent = evaluate(dataclasses.replace(predictions, groups=None)).per_class[0].recall
    assert recall.high - recall.low > 1.1 * (independent.high - independent.low)


def test_one_image_has_no_interval(tmp_path):
    text = Page(written(tmp_path, evaluation=evaluation(np.diag([1, 0, 0])))).text
    assert "nan" not in text.lower()


def test_the_split_has_its_name(tmp_path):
    text = Page(written(tmp_path, split="val", notes=[])).text
    assert "of the validation images" in text
    assert "test image" not in text
    with pytest.raises(ValueError, match="choose one of test, val, train"):
        written(tmp_path, split="all")


def test_wrong_histories_and_explanations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="history lacks 'loss'; it has epoch"):
        written(tmp_path, history=[{"epoch": 1.0}])
    with pytest.raises(ValueError, match="true class"):
        written(tmp_path, explanations=[dataclasses.replace(items()[0], true=None)])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match=r"report\.html can't be written"):
            write_report(report(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    write_report(report(), str(path))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_report_is_the_same_page(tmp_path):
    assert written(tmp_path) == written(tmp_path)


# ---- of a run ----------------------------------------------------------------------------
@pytest.mark.report
@pytest.mark.slow
def test_gallery_explain_and_scores_show_the_same_maps(tmp_path):
    """`attention92_cifar`, which has several masks in a stage: each shown under its own name."""
    out = tmp_path / "run"
    run(
        "train", "digits", "--model", "attention92_cifar", "--out", out, "--size", "8",
        "--steps", "1", "--batch-size", "4", "--faithfulness-images", "2",
    )  # fmt: skip
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    gallery = {
        re.search(r"the map (.*) over it", a["alt"])[1]
        for a in page.all("img")
        if "over it" in a["alt"]
    }
    scored = {row[0] for row in page.rows if len(row) == 4 and "(" in "".join(row)}
    (shown,) = regard.explain(out, (load_digits().images[0] * 15).astype(np.uint8))
    names = {m.name for m in shown.spatial()}
    assert {"layer2.1.mask", "layer2.2.mask", "Grad-CAM"} <= names
    assert gallery == names
    assert scored == names | {"random", "center blob"}
    assert "epoch" in page.text
    stored = json.loads((out / "faithfulness.json").read_text())
    assert stored["images"] == 2
    assert {n for n, m in stored["maps"].items() if m["kind"] == "attention"} == names - {
        "Grad-CAM"
    }
    assert set(stored["maps"]) == scored
    before = (out / "report.html").read_bytes()
    report_run(out)
    assert (out / "report.html").read_bytes() == before
    report_run(out, precision="bf16")
    narrow = json.loads((out / "faithfulness.json").read_text())
    assert set(narrow["maps"]) == scored
    assert narrow != stored
