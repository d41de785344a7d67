"""The page of `regard serve`, used by a person in a real browser."""

import numpy as np
import pytest
from PIL import Image

DROP = """([kind, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "given.jpg", {type: "image/jpeg"}));
  const event = kind === "drop"
    ? new DragEvent("drop", {dataTransfer: data, cancelable: true, bubbles: true})
    : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
  document.body.dispatchEvent(event);
}"""


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_a_persons_way_through_the_page(browser, server, photo, scans, tmp_path, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "422" not in m.text else None)
    page.on("requestfailed", lambda request: problems.append(request.url))
    elsewhere: list[str] = []
    page.on("request", lambda r: elsewhere.append(r.url) if server.url not in r.url else None)
    page.goto(server.url)
    assert "not a diagnosis" in page.inner_text(".notice")
    assert "24 test images" in page.wait_for_selector("#tested:visible").inner_text()
    assert "3 classes" in page.wait_for_selector("#about:has-text('classes')").inner_text()
    digit = next(scans.rglob("1/*.png"))
    page.set_input_files("#file", digit)
    page.wait_for_selector("#result:visible")
    assert page.locator("#classes button").count() == 3
    assert page.locator(".maps figure").count() == 3
    assert page.locator("figcaption b").nth(0).inner_text() == "gate3"
    shares = page.locator(".share").all_inner_texts()
    assert digit.name in page.inner_text("#status")
    # another class is explained
    second = page.locator("#classes button").nth(1)
    name = second.locator(".name").inner_text()
    second.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"figcaption b:text-is('Grad-CAM: {name}')")
    assert page.locator("#classes button[aria-pressed=true] .name").inner_text() == name
    assert page.evaluate("document.activeElement.textContent").startswith(name)
    assert f"explained: {name}" in page.inner_text("#status")
    assert page.locator(".share").all_inner_texts() == shares
    # the picture and the maps
    with page.expect_download() as download:
        page.click("#npz")
    download.value.save_as(tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as maps:
        assert "gradcam" in maps
    with page.expect_download() as download:
        page.click("#png")
    assert download.value.suggested_filename == f"{digit.stem}-attention.png"
    download.value.save_as(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000
    # a file that is no image, then a photograph
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    page.set_input_files("#file", bad)
    page.wait_for_selector("#status.bad")
    assert page.inner_text("#status").startswith("notes.png: no image that can be read")
    assert not page.is_visible("#result")
    (tmp_path / "photo.jpg").write_bytes(photo)
    page.set_input_files("#file", tmp_path / "photo.jpg")
    page.wait_for_selector("#result:visible")
    assert not page.locator("#status.bad").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert [u for u in elsewhere if not u.startswith(("data:", "blob:"))] == []
    assert problems == []
    page.close()


def test_dropped_and_pasted_images_are_taken(browser, server, photo):
    page = browser.new_page()
    for kind in ("drop", "paste"):
        page.goto(server.url)
        page.evaluate(DROP, [kind, list(photo)])
        page.wait_for_selector("#result:visible")
        assert page.inner_text("#status").startswith("given.jpg: ")
    page.close()


def contrast(page, selector: str) -> float:
    """WCAG 2.1's contrast of a text with what is behind it."""
    colors = page.evaluate(
        """selector => {
          let node = document.querySelector(selector);
          const text = getComputedStyle(node).color;
          const ground = () => getComputedStyle(node).backgroundColor;
          while (ground() === "rgba(0, 0, 0, 0)") node = node.parentElement;
          return [text, ground()].map(c => c.match(/[0-9]+/g).slice(0, 3).map(Number));
        }""",
        selector,
    )
    linear = np.array(colors) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_and_worked_by_keyboard(browser, server, scans, tmp_path, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.goto(server.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.set_input_files("#file", next(scans.rglob("2/*.png")))
    page.wait_for_selector("#result:visible")
    reached = set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || 'class'"
            )
        )
    assert {"class", "png", "npz"} <= reached
    for text in ("#status", ".muted", "#classes .name", "figcaption", "#png", "#drop label"):
        assert contrast(page, text) >= 4.5, text
    assert page.locator("img:not([alt])").count() == 0
    (tmp_path / "bad.jpg").write_bytes(b"x")
    page.set_input_files("#file", tmp_path / "bad.jpg")
    page.wait_for_selector("#status.bad")
    assert contrast(page, "#status") >= 4.5
    page.close()


def test_several_images_are_answered_in_turn_and_pictures_can_be_enlarged(
    browser, server, scans, tmp_path
):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#about:has-text('classes')")
    (tmp_path / "bad.png").write_text("no image")
    digits = [next(scans.rglob(f"{d}/*.png")) for d in (0, 1, 2)]
    page.set_input_files("#file", [*digits, tmp_path / "bad.png"])
    page.wait_for_selector("#files li:nth-child(4) button.bad")
    assert page.locator("#files button").count() == 4
    page.wait_for_selector("#result:visible")
    page.locator("#files button").nth(2).click()
    page.wait_for_selector("#result[aria-busy=false]")
    chosen = page.inner_text("#files button[aria-pressed=true]")
    best = page.locator("#classes .name").first.inner_text()
    assert chosen.startswith(f"{digits[2].name}: {best} ")
    # the run's own test beside the answer
    assert "of these answers" in page.locator("#classes .known").first.inner_text()
    page.locator(".maps .zoom").first.click()
    natural = page.evaluate("document.getElementById('enlarged').naturalWidth")
    page.select_option("#times", "2")
    assert page.evaluate("document.getElementById('enlarged').width") == 2 * natural
    page.click("#close")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert problems == []
    page.close()


def test_the_probability_in_the_list_stands_next_to_its_own_class(browser, server, photo, tmp_path):
    page = browser.new_page()
    said = {"classes": [{"class": "1", "probability": 0.7}], "decision": "2"}  # at a threshold
    page.route("**/api/predict*", lambda route: route.fulfill(json=said))
    page.goto(server.url)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(photo)
    page.set_input_files("#file", [tmp_path / "a.jpg", tmp_path / "b.jpg"])
    page.wait_for_selector("#files li:nth-child(2) button:has-text('70.0')")
    shown = page.locator("#files button").nth(1).inner_text()
    assert shown.index(": 1 70.0") < shown.index("decision: 2")
    page.route("**/api/predict*", lambda r: r.fulfill(status=503, json={"detail": "try again"}))
    page.set_input_files("#file", [tmp_path / "a.jpg", tmp_path / "b.jpg"])
    page.wait_for_selector("#files li:nth-child(2) button:has-text('try again')", timeout=10_000)
    page.close()
