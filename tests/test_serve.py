"""`regard serve`: a real server, asked by real requests."""

import asyncio
import http.client
import io
import json
import signal
import socket
import struct
import sys
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

from regard import load
from regard.cli import run_command
from regard.predict import Prediction
from regard.serve.engine import Engine, _Waiting
from tests.helpers import run, start


class Server:
    """A `regard serve` process on a free port."""

    def __init__(self, network: Path, *arguments: object) -> None:
        self.process = start("serve", network, "--port", "0", *arguments)
        self.line = self.process.stdout.readline()
        assert self.line.startswith("http://127.0.0.1:"), self.process.communicate()
        self.url = self.line.split()[0]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

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
        self.process.communicate(timeout=60)  # and closes its pipes
        return self.process.returncode


@pytest.fixture(scope="module")
def server(whole):
    found = Server(whole)
    yield found
    assert found.stop() == 0


@pytest.fixture(scope="module")
def photo() -> bytes:
    return jpeg((640, 427))


def jpeg(size: tuple[int, int]) -> bytes:
    """A photograph, enlarged."""
    buffer = io.BytesIO()
    Image.fromarray(load_sample_images().images[0]).resize(size).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def shares(answer) -> dict[str, float]:
    return {c["class"]: c["probability"] for c in answer["classes"]}


def classes_of(predictions: list[Prediction]) -> list[dict]:
    return [{"class": name, "probability": p} for name, p in predictions[0].classes]


def test_one_answer_is_that_of_the_command_to_the_last_bit(server, whole, tmp_path):
    # large enough for JPEG to be decoded at a part of its size, and 16-bit
    (tmp_path / "large.jpg").write_bytes(jpeg((2400, 1600)))
    deep = (np.arange(90 * 120) * 6 % 65536).astype(np.uint16).reshape(90, 120)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    told = json.loads(run("predict", whole, tmp_path / "large.jpg", "--json"))
    for name, said in (
        ("large.jpg", told["classes"]),
        ("deep.png", classes_of(load(whole).predict(tmp_path / "deep.png"))),
    ):
        path, expected = tmp_path / name, {"classes": said}
        status, answer = server.json("POST", "/api/predict", path.read_bytes())
        assert status == 200
        assert answer["classes"] == expected["classes"], path
        status, answer = server.json("POST", "/api/explain", path.read_bytes())
        assert shares(answer) == pytest.approx(shares(expected), abs=1e-6)


def test_answers_at_the_same_moment_are_those_of_the_command(server, whole, scans):
    paths = sorted(scans.rglob("*.png"))[::5]
    told = [json.loads(s) for s in run("predict", whole, *paths, "--json").splitlines()]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: server.json("POST", "/api/predict", p.read_bytes()), paths))
    for (status, answer), expected in zip(found, told, strict=True):
        assert status == 200
        assert shares(answer) == pytest.approx(shares(expected), abs=1e-6)


def test_what_waits_is_one_batch_and_a_client_that_goes_spoils_no_other(whole, scans):
    classifier, paths = load(whole), sorted(scans.rglob("*.png"))[:24]
    sizes: list[int] = []

    async def ask() -> list[_Waiting]:
        loop, engine = asyncio.get_running_loop(), Engine(classifier)
        waiting = [_Waiting(classifier.decode(p), loop.create_future()) for p in paths]
        waiting[0].answer.cancel()  # gone while it waited

        def goes(module, x, y) -> None:  # gone while the network is at work on it
            sizes.append(len(y))
            loop.call_soon_threadsafe(waiting[1].answer.cancel)

        hook = classifier.model.register_forward_hook(goes)
        engine.waiting = list(waiting)
        await engine._answer()
        hook.remove()
        engine.close()
        return waiting

    found = asyncio.run(ask())
    assert sizes == [15, 8]
    assert [w.answer.cancelled() for w in found] == [True] * 2 + [False] * 22
    for path, w in zip(paths[2:], found[2:], strict=True):
        alone = classifier.probabilities(classifier.decode(path)[None])[0]
        assert w.answer.result().numpy() == pytest.approx(alone.numpy(), abs=1e-6)


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
    bmp = b"BM" + struct.pack(
        "<IIIIiiHHIIiiII", 54, 0, 54, 40, 12000, 9000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "GIF")
    cases = [
        (bomb(9000), 413, "9000 x 9000 pixels"),
        (bmp, 413, "12000 x 9000 pixels"),
        (buffer.getvalue(), 422, "no image that can be read"),
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


def dicom(tmp_path, *, rows: int = 24, syntax: str | None = None) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = syntax or pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    scan = pydicom.Dataset()
    scan.file_meta = meta
    scan.SOPClassUID, scan.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    scan.Rows, scan.Columns, scan.SamplesPerPixel = rows, 24, 1
    scan.PhotometricInterpretation, scan.PixelRepresentation = "MONOCHROME2", 0
    scan.BitsAllocated = scan.BitsStored = 16
    scan.HighBit = 15
    scan.PixelData = (np.arange(24 * 24) % 500).astype("<u2").tobytes()
    scan.save_as(tmp_path / "scan.dcm", enforce_file_format=True)
    return (tmp_path / "scan.dcm").read_bytes()


def test_dicom_is_taken_as_by_the_command_and_bounded_too(server, whole, tmp_path):
    status, answer = server.json("POST", "/api/predict", dicom(tmp_path))
    assert status == 200
    assert answer["classes"] == classes_of(load(whole).predict(tmp_path / "scan.dcm"))
    assert server.json("POST", "/api/explain", dicom(tmp_path))[0] == 200
    for body, status, message in (
        (dicom(tmp_path, syntax="1.2.840.10008.1.2.1.99"), 422, "deflated"),
        (dicom(tmp_path)[:300], 422, "no image that can be read"),
        (dicom(tmp_path)[:-200], 422, "the image: can't be read"),
    ):
        found = server.json("POST", "/api/predict", body)
        assert found[0] == status
        assert message in found[1]["detail"]
    large = dicom(tmp_path, rows=60000).replace(
        b"\x28\x00\x11\x00US\x02\x00\x18\x00", b"\x28\x00\x11\x00US\x02\x00\xff\xff"
    )
    assert server.json("POST", "/api/predict", large)[0] == 413


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
    for host in ("localhost", "localhost:1", "127.0.0.1:80", "[::1]:8000", "127.1.2.3"):
        assert server.ask("GET", "/healthz", Host=host)[0] == 200, host
    for host in (
        "evil.example",
        "127.0.0.1.evil.example:80",
        "localhost.evil.example",
        "[evil",
        "",
    ):
        status, headers, body = server.ask("GET", "/healthz", Host=host)
        assert status == 400, host
        assert "localhost" in json.loads(body)["detail"]
        assert headers["x-content-type-options"] == "nosniff"
    cross = {"Sec-Fetch-Site": "cross-site"}
    assert server.ask("POST", "/api/predict", b"x", **cross)[0] == 403
    assert server.ask("GET", "/", **cross)[0] == 200  # a link to the page
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
        before, begun = process.memory_info().rss, time.monotonic()
        assert all(pool.map(ask, range(300)))
        assert time.monotonic() - begun < 20
    assert process.memory_info().rss - before < 30e6


def test_large_photographs_at_once_are_all_explained_in_bounded_memory(server):
    body, process = jpeg((4000, 3000)), psutil.Process(server.process.pid)
    before, peak, done = process.memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: server.json("POST", "/api/explain", body), range(6)))
    done.set()
    watcher.join()
    assert [status for status, _ in found] == [200] * 6
    assert found[0][1]["box"] == [500.0, 0.0, 3500.0, 3000.0]  # of the upload, not of what is shown
    assert found[0][1]["maps"] == found[5][1]["maps"]
    # one is 36 MB, and is 170 MB for a moment; six that were decoded together were 1200 MB
    assert 0 < peak[0] - before < 450e6


def test_a_client_that_stalls_is_hung_up_on(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as stalled:
        stalled.sendall(b"GET /healthz HTTP/1.1\r\nHost: local")
        begun = time.monotonic()
        assert stalled.recv(100) == b""
        assert 8 < time.monotonic() - begun < 25


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
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        head = "POST /api/explain?form=png HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Length: {len(photo)}\r\n\r\n"
        client.sendall(head.encode() + photo[:1000])
        assert server.ask("GET", "/healthz")[0] == 200  # by now the headers are taken
        server.process.send_signal(signal.SIGTERM)
        for _ in range(400):
            try:
                server.ask("GET", "/healthz")
            except OSError:
                break
            time.sleep(0.02)
        else:
            pytest.fail("it still takes requests after SIGTERM")
        assert server.process.poll() is None
        client.sendall(photo[1000:])
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 200
        with Image.open(io.BytesIO(answer.read())) as picture:
            assert picture.format == "PNG"
    out, err = server.process.communicate(timeout=30)
    assert (server.process.returncode, out, err) == (0, "", "")


def test_a_signal_as_soon_as_it_listens_ends_it(whole):
    server = Server(whole)
    server.process.send_signal(signal.SIGINT)
    out, err = server.process.communicate(timeout=30)
    assert (server.process.returncode, out, err) == (0, "", "")


def test_wrong_calls(whole, tmp_path, server, capsys):
    for code, message, call in (
        (2, "holds no trained network", [tmp_path]),
        (1, f"can't listen on 127.0.0.1:{server.port}", [whole, "--port", server.port]),
        (2, "--port 70000: choose", [whole, "--port", 70000]),
        (2, "--requests 0: more than 0, and finite", [whole, "--requests", 0]),
        (2, "--megabytes -1.0: more than 0, and finite", [whole, "--megabytes", -1]),
        (2, "--megapixels nan: more than 0, and finite", [whole, "--megapixels", "nan"]),
        (2, "--seconds inf: more than 0, and finite", [whole, "--seconds", "inf"]),
    ):
        assert run_command(["serve", *map(str, call)]) == code
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_without_the_extra_one_line_says_what_to_install(whole, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith("regard.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)  # as where it is not installed
    assert run_command(["serve", str(whole)]) == 2
    said = capsys.readouterr().err
    assert said == "regard: the page needs fastapi: pip install 'regard[serve]' brings it\n"
