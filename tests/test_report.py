"""The report page: its numbers, its safety, its size, and that it is written whole."""

import base64
import dataclasses
import io
import itertools
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits, load_sample_images

from regard.report import MAX_BYTES, GalleryItem, Report, wilson_interval, write_report

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
        if "style" in self.stack:
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
    return bump / bump.sum()


def items():
    images = (load_digits().images[:4] * 255 / 16).astype(np.uint8)
    answers = [("zero", "zero", 0.9996), ("one", "two", 0.51), ("two", "two", 1.0)]
    return [
        GalleryItem(
            image=image,
            true=true,
            predicted=predicted,
            probability=p,
            maps=[("gate3", attention(4, 5)), ("gate4", np.full((6, 6), 1 / 36))],
        )
        for image, (true, predicted, p) in zip(images, answers, strict=False)
    ]


def epoch(number, **more):
    return {
        "epoch": number,
        "loss": 2.0 / number,
        "accuracy": 1 - 0.5 / number,
        "learning_rate": 0.1 / number,
        **more,
    }


def report(**changes):
    base = Report(
        title="Digits",
        model="ag_sononet8",
        summary={"data": "300 images of digits", "seed": "7"},
        classes=["zero", "one", "two"],
        history=[epoch(n, val_loss=3.0 / n, val_accuracy=0.8) for n in range(1, 21)],
        accuracy=0.92,
        interval=wilson_interval(92, 100),
        n_test=100,
        confusion=CONFUSION,
        gallery=items(),
        versions={"torch": "2.15.0"},
        command="regard train ag_sononet8 --data digits",
        notes=["No setting was chosen on the test images."],
    )
    return dataclasses.replace(base, **changes)


def written(tmp_path, **changes):
    path = tmp_path / "report.html"
    write_report(report(**changes), path)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (1, 3), (92, 100), (10, 10), (971, 1004)])
def test_wilson_interval_is_scipys(correct, total):
    for confidence in (0.95, 0.99):
        theirs = binomtest(correct, total).proportion_ci(confidence, method="wilson")
        ours = wilson_interval(correct, total, confidence)
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_interval_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="11 correct of 10"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="confidence=95"):
        wilson_interval(1, 2, 95)


def test_the_page_says_the_numbers(tmp_path):
    text = Page(written(tmp_path)).text
    assert "92.0 % of the test images named correctly: 92 of 100" in text
    assert "95 % interval 85.0–95.9 %" in text
    assert "The network ag_sononet8 was trained on 300 images of digits, to tell 3 classes" in text
    assert "always answering “one”: 42.0 %" in text
    assert "two taken for zero : 5 of 26" in text
    assert "No setting was chosen on the test images." in text
    assert "regard train ag_sononet8 --data digits" in text
    assert "torch 2.15.0" in text
    # mean recall: (30/32 + 41/42 + 21/26) / 3
    assert "is 90.7 % ." in text


def test_the_tables_hold_every_count(tmp_path):
    rows = [[cell.replace("\u00a0", " ") for cell in row] for row in Page(written(tmp_path)).rows]
    for name, counts in zip(["zero", "one", "two"], CONFUSION, strict=True):
        assert [name, *map(str, counts)] in rows
    # recall 30/32 with its interval, precision 30/35
    assert ["zero", "32", "93.8 %", "79.9–98.3 %", "", "85.7 %"] in rows
    assert ["1", "2", "0.5", "0.1", "3", "0.8"] in rows  # the first epoch


def test_the_curves_end_where_the_history_does(tmp_path):
    html = written(tmp_path)
    labels = [a["aria-label"] for a in Page(html).all("svg") if "aria-label" in a]
    assert labels[0] == "Loss by epoch: training from 2 to 0.1; validation from 3 to 0.15"
    lines = re.findall(r'<polyline class="line" points="([^"]*)"', html)
    assert [len(line.split()) for line in lines] == [20] * 5
    # loss 2 / epoch on an axis from 0 to 3: left end at 178 - 168 * 2 / 3 = 66
    assert lines[0].split()[0] == "46.0,66.0"


def test_an_epoch_that_is_not_finite_breaks_the_line(tmp_path):
    history = [epoch(n) for n in range(1, 6)]
    history[2]["loss"] = float("nan")
    history[4]["loss"] = float("inf")
    html = written(tmp_path, history=history)
    lines = re.findall(r'<polyline class="line" points="([^"]*)"', html)
    assert [len(line.split()) for line in lines] == [2, 1, 5, 5]
    assert "training not finite" in Page(html).text


def test_the_page_stands_alone(tmp_path):
    html = written(tmp_path)
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "action", "xlink:href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:image/", "#")), (tag, name, value[:60])
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "url(" not in html
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for a in page.all("a")} <= ids
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
    wrong = text.index("Named wrongly: 1 of 8")
    assert wrong < text.index("✗ wrong 51 % true one → predicted two")
    assert wrong < text.index("Named correctly: 2 of 92") < text.index("✓ right > 99.9 %")
    assert "✓ right 100 % true two → predicted two" in text
    assert "gate4 0.028 everywhere" in text
    assert re.search(r"gate3 0\.000–0\.040, uniform would be 0\.0069", text)


def test_the_pictures_are_the_image_and_its_overlays(tmp_path):
    sources = [a for a in Page(written(tmp_path)).all("img") if a["alt"].startswith(("T", "The"))]
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
    gallery = [dataclasses.replace(items()[0], true=bad, maps=[(bad, attention(1, 1))])]
    html = written(
        tmp_path,
        title=bad, model=bad, classes=[bad, "one", "two"], summary={bad: bad}, versions={bad: bad},
        command=bad, notes=[bad], gallery=gallery,
    )  # fmt: skip
    assert bad not in html
    assert "<b>x" not in html
    assert html.count("&lt;b&gt;x&lt;/b&gt;") > 10
    assert bad in Page(html).text


def test_a_large_gallery_is_cut_and_the_page_says_so(tmp_path):
    photos = load_sample_images().images
    some = [
        GalleryItem(
            image=photos[i % 2],
            true="zero",
            predicted=("zero", "one")[i // 2 % 2],
            probability=0.5,
            maps=[(f"gate{g}", attention(g, g)) for g in range(10)],
        )
        for i in range(40)
    ]
    html = written(tmp_path, gallery=some)
    assert 3_000_000 < len(html.encode()) < MAX_BYTES == 5_000_000
    cards = Page(html).all("figure")
    shown = sum(1 for a in cards if not a)
    left_out = int(re.search(r"(\d+) more images are left out", html)[1])
    assert shown + left_out == 40
    assert shown >= 10


def test_many_classes_are_told_as_their_most_frequent_mistakes(tmp_path):
    confusion = np.diag(np.full(200, 5))
    confusion[3, 150] = 4
    changes = {
        "classes": [f"class{i}" for i in range(200)],
        "confusion": confusion,
        "n_test": 1004,
        "accuracy": 1000 / 1004,
        "interval": wilson_interval(1000, 1004),
    }
    page = Page(written(tmp_path, **changes))
    assert "the whole table is too large to read" in page.text
    assert "class3 taken for class150 : 4 of 9" in page.text
    assert "99.6 % of the test images" in page.text
    assert max(len(row) for row in page.rows) == 6


def test_little_is_enough(tmp_path):
    text = Page(
        written(
            tmp_path,
            history=[], gallery=[], summary={}, versions={}, command="", notes=[],
            confusion=np.diag([2, 0, 1]), n_test=3, accuracy=1.0, interval=wilson_interval(3, 3),
        )
    ).text  # fmt: skip
    assert "100.0 % of the test images named correctly: 3 of 3" in text
    assert "No test image was named wrongly." in text
    assert "Where it looks" not in text
    assert "Training" not in text
    assert "one 0 – – –" in text  # a class without test images


def test_without_maps_nothing_is_said_of_attention(tmp_path):
    gallery = [dataclasses.replace(item, maps=[]) for item in items()]
    text = Page(written(tmp_path, gallery=gallery)).text
    assert "Some answers Named wrongly: 1 of 8" in text
    assert "A sample. The images above are a selection" in text
    for word in ("attention", "A map", "A reason", "Where it looks"):
        assert word not in text


def test_the_network_is_a_fact_once(tmp_path):
    facts = [Page(written(tmp_path, summary=s)).text for s in ({"seed": "7"}, {"Network": "X9"})]
    assert "network ag_sononet8 seed 7" in facts[0]
    assert "network ag_sononet8 Network" not in facts[1]
    assert "Network X9" in facts[1]


def test_almost_all_is_not_all(tmp_path):
    changes = {"confusion": np.array([[9999, 1, 0], [0, 9999, 0], [0, 0, 1]]), "n_test": 20000}
    share = 19999 / 20000
    html = written(tmp_path, **changes, accuracy=share, interval=wilson_interval(19999, 20000))
    assert "99.995 % of the test images" in Page(html).text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 0.93}, "accuracy=0.93, but confusion says 92 of 100"),
        ({"n_test": 99}, "confusion counts 100 images, n_test says 99"),
        ({"confusion": CONFUSION[:2]}, r"confusion of shape \(2, 3\): \(3, 3\)"),
        ({"confusion": CONFUSION / 1.0}, "whole numbers"),
        ({"interval": (0.93, 0.95)}, "does not hold accuracy=0.92"),
        ({"interval": (85.0, 95.9)}, "does not hold accuracy=0.92"),
        ({"history": [{"epoch": 1.0}]}, "history lacks 'loss'; it has epoch"),
    ],
)
def test_numbers_that_disagree_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="disk full"):
            write_report(report(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    write_report(report(), str(path))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_report_is_the_same_page(tmp_path):
    assert written(tmp_path) == written(tmp_path)
