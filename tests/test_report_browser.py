"""The gallery of report.html in a browser: filters, pages, and maps drawn as by `overlay`."""

import base64
import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import regard
from regard.attention import StageMap
from regard.data.images import read_image
from regard.errors import UsageError
from regard.explanations.overlay import overlay
from regard.report import MAX_BYTES
from regard.report.browse import Browser, _map, _rounded, browser_of
from regard.report.build import report_run
from regard.report.source import RunSource, choose


@pytest.fixture(scope="module")
def marked(whole, scans, tmp_path_factory):
    """The run once more, with a box around the upper half of every image."""
    folder = tmp_path_factory.mktemp("marked") / "a run"
    shutil.copytree(whole, folder)
    boxes = folder.parent / "boxes.csv"
    with boxes.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "x0", "y0", "x1", "y1"])
        writer.writerows([str(p), 0, 0, 24, 12] for p in sorted(scans.rglob("*.png")))
    report_run(folder, masks=boxes, explained=30)
    return folder


def data_of(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


@pytest.mark.parametrize(("p", "stored"), [(0.0, 0), (1.0, 1), (0.99998, 0.9999), (2e-6, 0.0001),
                                          (0.25, 0.25)])  # fmt: skip
def test_what_only_rounds_to_0_or_1_is_stored_as_neither(p, stored):
    assert _rounded(p) == stored


def test_a_map_that_is_stored_smaller_has_the_colors_of_its_stated_range():
    values = np.zeros((128, 128), np.float32)
    values[::2, ::2] = 1.0  # 0.25 in each of the 2 x 2 cells that become one
    values[:2, :2] = 1.0
    values[2:4, :2] = 0.0
    stored = _map(StageMap("gate", "spatial", values, "", "gate"))
    assert (stored["size"], stored["cells"]) == ([64, 64], "128×128")
    assert stored["range"].startswith("attention 0.00–1.00")
    levels = np.frombuffer(base64.b64decode(stored["values"]), np.uint8).reshape(64, 64)
    assert (levels[0, 0], levels[1, 0], levels[2, 2]) == (255, 0, 64)
    even = _map(StageMap("gate", "spatial", np.tile([[0, 1], [1, 0]], (64, 64)), "", "gate"))
    assert set(base64.b64decode(even["values"])) == {128}  # not 0, nothing: it is 0.5 everywhere


def test_every_test_image_is_listed_with_its_name_answer_and_thumbnail(marked):
    data = data_of(marked)
    _, said = RunSource(marked).run.read_predictions()
    assert data["images"] == len(said) == len(data["listed"]) == 24
    assert len({name for name, *_ in data["listed"]}) == 24
    by_name = {name: row for name, *row in data["listed"]}
    for path, label, p in zip(said.paths, said.labels, said.probabilities, strict=True):
        name = next(n for n in by_name if path.endswith(n))
        true, top, thumb = by_name[name]
        assert true == label
        assert top[0][0] == p.argmax()
        assert top[0][1] == pytest.approx(p.max(), abs=1e-4)
        kind, _, code = data["thumbs"][thumb].partition(";base64,")
        assert kind == "png"  # of so small an image its very pixels
        np.testing.assert_array_equal(
            np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))), read_image(path)[..., 0]
        )
    assert len(data["details"]) == 24
    assert (marked / "report.html").stat().st_size < MAX_BYTES


@pytest.mark.parametrize("size", [(1400, 900), (390, 844)])
def test_a_readers_way_through_all_images(browser, marked, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto((marked / "report.html").as_uri())
    tiles = page.locator("#tiles button")
    assert tiles.count() == 24
    data = data_of(marked)
    wrong = sum(top[0][0] != true for _, true, top, _ in data["listed"])
    page.select_option("#f-verdict", "wrong")
    assert tiles.count() == wrong
    page.select_option("#f-verdict", "")
    page.select_option("#f-order", "sure")
    page.select_option("#f-true", "1")
    ones = sorted((top[0][1] for _, true, top, _ in data["listed"] if true == 1), reverse=True)
    assert tiles.count() == len(ones)
    assert f"{100 * ones[0]:.1f}" in tiles.first.inner_text() or ones[0] >= 0.9995
    page.fill("#f-name", "no such name")
    assert tiles.count() == 0
    assert "No image" in page.inner_text("#count")
    page.click("#f-clear")
    assert tiles.count() == 24
    tiles.first.click()
    assert page.locator("#v-layers button").count() == 4  # the image, two gates, Grad-CAM
    first = page.inner_text("#v-name")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#v-name") != first
    page.click("#v-close")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("[data-open]").first.click()  # a card opens the same image
    assert page.locator("#viewer").is_visible()
    assert problems == []
    page.close()


def test_long_names_of_classes_leave_the_page_as_wide_as_a_phone(browser, marked, tmp_path):
    html = (marked / "report.html").read_text(encoding="utf-8")
    data = data_of(marked)
    data["classes"][1] = "a name of a class that is much longer than a phone is wide" * 2
    changed = re.sub(
        r'(id="data">).*?(</script>)', lambda m: m[1] + json.dumps(data) + m[2], html, flags=re.S
    )
    (tmp_path / "report.html").write_text(changed, encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("#f-true option").nth(2).inner_text() == data["classes"][1]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


def test_a_table_of_subgroups_is_not_wider_than_the_paper(browser, marked):
    heads = ["sex", "images", "groups", "accuracy", *["95 % interval", "sensitivity"] * 4]
    rows = "".join(f"<th>{head}</th>" for head in heads), "<td>91.0–100.0 %</td>" * len(heads)
    page = browser.new_page(viewport={"width": 688, "height": 900})  # A4 within its margins
    page.goto((marked / "report.html").as_uri())
    page.emulate_media(media="print")
    before = page.evaluate("document.documentElement.scrollWidth")
    page.evaluate(
        "html => { [...document.querySelectorAll('.scroll')].find(each => each.offsetParent)"
        ".innerHTML = html; }",
        f"<table class='plain'><thead><tr>{rows[0]}</tr></thead>"
        f"<tbody><tr>{rows[1]}</tr></tbody></table>",
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= max(before, 700)
    page.close()


def test_the_page_draws_a_map_as_the_overlay_does_and_the_mask(browser, marked):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto((marked / "report.html").as_uri())
    data = data_of(marked)
    page.locator("#tiles button").first.click()
    page.uncheck("#v-mask")
    page.locator("#v-layers button").nth(1).click()
    page.wait_for_timeout(200)
    drawn = _canvas(page)
    name = data["listed"][0][0]
    _, said = RunSource(marked).run.read_predictions()
    path = next(p for p in said.paths if p.endswith(name))
    (shown,) = regard.explain(marked, path)
    m = shown.spatial()[0]
    expected = overlay(shown.image, m.values, size=drawn.shape[:2], box=shown.box)
    assert np.abs(drawn.astype(int) - expected).mean() < 3
    assert np.ptp(expected.astype(int), axis=2).max() > 60
    page.check("#v-mask")
    page.wait_for_timeout(200)
    changed = (np.abs(_canvas(page).astype(int) - drawn).max(axis=2) > 5).any(axis=1)
    rows = np.flatnonzero(changed)
    assert abs(rows.max() - drawn.shape[0] / 2) <= drawn.shape[0] / 20  # the box ends in the middle
    page.close()


def _canvas(page):
    uri = page.evaluate("document.getElementById('v-canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def test_thousands_of_images_stay_within_the_page(whole, monkeypatch):
    """Every image has a row; thumbnails shrink, then the last have none."""
    source = RunSource(whole)
    sizes = []
    for budget in (40_000, 9_000, 3_000):
        monkeypatch.setattr("regard.report.browse.THUMB_BYTES", budget)
        found = browser_of(source)
        assert len(found.listed) == 24
        assert sum(map(len, found.thumbs)) <= budget
        sizes.append(len(found.thumbs))
    assert sizes[0] == 24
    assert 0 < sizes[2] < 24
    monkeypatch.setattr("regard.report.browse.LIST_BYTES", 600)
    few = browser_of(source)
    assert 2 < len(few.listed) < 24
    assert list(few.places) == choose(source.predictions, 24)[: len(few.listed)]


def test_names_can_neither_end_the_data_nor_hide_in_it():
    bad = "</script><script>alert(1)</script>\u2028.png"
    text = Browser(1, [bad], [[bad, 0, [[0, 1.0]], -1]]).to_json()
    assert "<" not in text
    assert json.loads(text)["classes"] == [bad.replace("\u2028", "")]


def test_data_that_has_moved_leaves_the_numbers(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    run = json.loads((folder / "run.json").read_text())
    run["plan"] |= {"data": str(tmp_path / "gone"), "location": str(tmp_path / "gone")}
    (folder / "run.json").write_text(json.dumps(run))
    report_run(folder)
    data = data_of(folder)
    assert len(data["listed"]) == 24
    assert data["thumbs"] == []
    with pytest.raises(UsageError, match="no image files"):
        report_run(folder, masks=tmp_path)
