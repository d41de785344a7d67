"""`regard serve`: a real server, asked by real requests, and by a person in a real browser."""

import http.client
import io
import json
import shutil
import signal
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.helpers import run, start

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Server:
    """A `regard serve` process on a free port."""

    def __init__(self, network: Path, *arguments: object) -> None:
        self.process = start("serve", network, "--port", "0", *arguments)
        self.line = self.process.stdout.readline()
        assert self.line.startswith("http://127.0.0.1:"), self.process.communicate()
        self.url = self.line.split()[0]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])
        for _ in range(200):
            try:
                self.ask("GET", "/healthz")
                return
            except OSError:
                time.sleep(0.05)

    def ask(self, verb: str, path: str, body: bytes | None = None, **headers: str):
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(verb, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def json(self, verb: str, path: str, body: bytes | None = None):
        status, _, content = self.ask(verb, path, body)
        return status, json.loads(content)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def server(whole):
    found = Server(whole)
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="module")
def photo() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_answers_are_those_of_the_command(server, whole, scans):
    paths = sorted(scans.rglob("*.png"))[::17]
    told = [json.loads(s) for s in run("predict", whole, *paths, "--json").splitlines()]
    for path, expected in zip(paths, told, strict=True):
        status, answer = server.json("POST", "/api/predict", path.read_bytes())
        assert status == 200
        assert [c["class"] for c in answer["classes"]] == [c["class"] for c in expected["classes"]]
        shares = [[c["probability"] for c in a["classes"]] for a in (answer, expected)]
        np.testing.assert_allclose(*shares, rtol=1e-5, atol=1e-7)


def test_explaining_gives_every_map_and_the_class_asked_for(server, photo):
    status, found = server.json("POST", "/api/explain?target=2", photo)
    assert status == 200
    assert found["target"]["class"] == "2"
    assert [m["name"] for m in found["maps"]][:2] == ["gate3.map", "gate4.map"]
    assert found["maps"][2]["kind"] == "gradcam"
    assert all(m["picture"].startswith("data:image/") for m in found["maps"])
    status, headers, body = server.ask("POST", "/api/explain?form=png", photo)
    assert headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(body)) as picture:
        assert picture.width > 1000
    status, _, body = server.ask("POST", "/api/explain?form=npz", photo)
    with np.load(io.BytesIO(body)) as maps:
        assert "spatial/gate3.map" in maps
        assert "gradcam" in maps


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels: a few hundred kB that would be gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer, rows = zlib.compressobj(9), []
    for _ in range(side):
        rows.append(packer.compress(bytes(side + 1)))
    data = b"".join(rows) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_what_is_not_taken(server, photo):
    cases = [
        (bomb(9000), 413, "9000 x 9000 pixels"),
        (b"\x89PNG\r\n\x1a\n" + b"noise", 422, "no image that can be read"),
        (photo[:4000], 422, "the image: can't be read"),
        (b"", 400, "body of the request"),
        (b"x" * 21_000_000, 413, "too large"),
        (b"/etc/passwd", 422, "no image that can be read"),
    ]
    for body, status, message in cases:
        assert server.json("POST", "/api/predict", body)[0] == status
        found = server.json("POST", "/api/predict", body)[1]["detail"]
        assert message in found
        assert "Traceback" not in found
        assert "/tmp" not in found
    assert server.json("POST", "/api/explain?target=cat", photo)[0] == 422
    assert server.json("POST", "/api/predict?top=many", photo)[0] == 422
    assert server.json("GET", "/api/nothing")[0] == 404
    assert server.json("GET", "/../../etc/passwd")[0] == 404


def test_headers_and_host(server):
    status, headers, page = server.ask("GET", "/")
    assert status == 200
    policy = headers["content-security-policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert f'<script nonce="{nonce}">' in page.decode()
    assert "unsafe" not in policy
    for name, value in (
        ("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"),
        ("x-frame-options", "DENY"), ("cache-control", "no-store"),
    ):  # fmt: skip
        assert headers[name] == value
    assert server.ask("GET", "/")[1]["content-security-policy"] != policy
    assert server.ask("GET", "/healthz", Host="evil.example")[0] == 400
    assert b"POST /api/predict" in server.ask("GET", "/docs")[2]
    paths = server.json("GET", "/openapi.json")[1]["paths"]
    assert {"/api/predict", "/api/explain", "/api/model", "/healthz"} <= set(paths)
    assert server.json("GET", "/api/model")[1]["classes"] == ["0", "1", "2"]


def test_under_load_nothing_is_lost_and_memory_is_flat(server, scans):
    bodies = [p.read_bytes() for p in sorted(scans.rglob("*.png"))[:20]]
    expected = [server.json("POST", "/api/predict", b)[1]["classes"][0]["class"] for b in bodies]
    process = psutil.Process(server.process.pid)

    def ask(k: int) -> bool:
        status, headers, body = server.ask("POST", "/api/predict", bodies[k % 20])
        if status == 503:
            return headers["retry-after"] == "1"
        assert status == 200
        return json.loads(body)["classes"][0]["class"] == expected[k % 20]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(100)))
        before = process.memory_info().rss
        assert all(pool.map(ask, range(300)))
    assert process.memory_info().rss - before < 30e6


def test_more_than_it_can_do_is_told_to_come_again(whole, photo):
    server = Server(whole, "--requests", "1")
    try:
        answers = []
        with ThreadPoolExecutor(6) as pool:
            for status, headers, _ in pool.map(
                lambda _: server.ask("POST", "/api/explain", photo), range(12)
            ):
                answers.append(status)
                assert status != 503 or headers["retry-after"] == "1"
        assert set(answers) == {200, 503}
        assert server.json("POST", "/api/predict", photo)[0] == 200
    finally:
        assert server.stop() == 0


def test_sigterm_finishes_what_is_in_work(whole, photo):
    server = Server(whole)
    found = []
    thread = threading.Thread(
        target=lambda: found.append(server.ask("POST", "/api/explain?form=png", photo)[0])
    )
    thread.start()
    time.sleep(0.15)
    assert server.stop() == 0
    thread.join(timeout=30)
    assert found == [200]


def test_wrong_calls(whole, tmp_path, server):
    assert "holds no trained network" in run("serve", tmp_path, code=2)
    said = run("serve", whole, "--port", server.port, code=1)
    assert f"can't listen on 127.0.0.1:{server.port}" in said


# ------------------------------------------------------------------------------- browser
@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here: the page was not tried in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_a_persons_way_through_the_page(browser, server, photo, scans, tmp_path, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    elsewhere: list[str] = []
    page.on("request", lambda r: elsewhere.append(r.url) if server.url not in r.url else None)
    page.goto(server.url)
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
    assert page.locator(".share").all_inner_texts() == shares
    # the picture and the maps
    with page.expect_download() as download:
        page.click("#npz")
    download.value.save_as(tmp_path / "maps.npz")
    with np.load(tmp_path / "maps.npz") as maps:
        assert "gradcam" in maps
    # a file that is no image, then a photograph
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    page.set_input_files("#file", bad)
    page.wait_for_selector("#status.bad")
    assert "no image that can be read" in page.inner_text("#status")
    assert not page.is_visible("#result")
    (tmp_path / "photo.jpg").write_bytes(photo)
    page.set_input_files("#file", tmp_path / "photo.jpg")
    page.wait_for_selector("#result:visible")
    assert not page.locator("#status.bad").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert [u for u in elsewhere if not u.startswith(("data:", "blob:"))] == []
    assert problems == []
    page.close()
