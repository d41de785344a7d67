"""`regard serve`: a real server, asked by real requests."""

import asyncio
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from fastapi import FastAPI, Request
from PIL import Image

import regard
from regard import load
from regard.cli import run_command
from regard.predict import Prediction
from regard.serve.app import name_of
from regard.serve.safety import add_safety
from regard.serve.server import read_test_result
from regard.serve.uploads import Limits
from regard.serve.worker import BatchingWorker, Upload, _Waiting
from tests.helpers import Server, jpeg, run


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
    lines = run("predict", whole, *paths, "--json").splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]  # and a warning
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: server.json("POST", "/api/predict", p.read_bytes()), paths))
    for (status, answer), expected in zip(found, told, strict=True):
        assert status == 200
        assert shares(answer) == pytest.approx(shares(expected), abs=1e-6)


def test_what_waits_is_one_batch_and_a_client_that_goes_spoils_no_other(whole, scans):
    classifier, paths = load(whole), sorted(scans.rglob("*.png"))[:24]
    sizes: list[int] = []

    async def ask() -> list[_Waiting]:
        loop, worker = asyncio.get_running_loop(), BatchingWorker(classifier)
        waiting = [_Waiting(classifier.decode(p), loop.create_future()) for p in paths]
        waiting[0].answer.cancel()  # gone while it waited

        def goes(module, x, y) -> None:  # gone while the network is at work on it
            sizes.append(len(y))
            loop.call_soon_threadsafe(waiting[1].answer.cancel)

        hook = classifier.model.register_forward_hook(goes)
        worker.waiting = list(waiting)
        await worker._answer()
        hook.remove()
        worker.close()
        return waiting

    found = asyncio.run(ask())
    assert sizes == [15, 8]
    assert [w.answer.cancelled() for w in found] == [True] * 2 + [False] * 22
    for path, w in zip(paths[2:], found[2:], strict=True):
        alone = classifier.probabilities(classifier.decode(path)[None])[0]
        assert w.answer.result()[0].numpy() == pytest.approx(alone.numpy(), abs=1e-6)


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


def bomb(width: int, height: int) -> bytes:
    """A PNG of black pixels: a few hundred kB that would be gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer, rows = zlib.compressobj(9), []
    lines = min(height, 10_000)  # compressed some at a time
    for _ in range(height // lines):
        rows.append(packer.compress(bytes((width + 1) * lines)))
    data = b"".join(rows) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_what_is_not_taken(server, photo):
    bmp = b"BM" + struct.pack(
        "<IIIIiiHHIIiiII", 54, 0, 54, 40, 12000, 9000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "ICO")
    cases = [
        (bomb(9000, 9000), 413, "9000 x 9000 pixels"),
        (bomb(12_000_000, 1), 413, "12000000 x 1 pixels"),
        (bomb(1, 2000), 413, "1 x 2000 pixels"),
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


def test_a_malformed_host_is_refused_where_starlette_fails_on_it(monkeypatch):
    """Before 1.0 it raises when the URL is read; with it, so does this."""
    app = FastAPI()
    add_safety(app, Limits(), only_loopback=True)
    monkeypatch.setattr(Request, "url", property(lambda _: 1 / 0))
    scope = {"type": "http", "method": "GET", "path": "/healthz", "query_string": b"",
             "headers": [(b"host", b"[evil")]}  # fmt: skip
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400


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
    for host in (
        "localhost",
        "LOCALHOST:80",
        "localhost:1",
        "127.0.0.1:80",
        "[::1]:8000",
        "127.1.2.3",
    ):
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


@pytest.mark.slow
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
        (2, "--host '': a name or an address", [whole, "--host", ""]),
        (2, r"--host '\udcff': a name or an address", [whole, "--host", os.fsdecode(b"\xff")]),
        (2, "--requests 0: must be positive", [whole, "--requests", 0]),
        (2, "--megabytes -1.0: must be positive", [whole, "--megabytes", -1]),
        (2, "--megapixels nan: must be positive", [whole, "--megapixels", "nan"]),
        (2, "--seconds inf: must be positive", [whole, "--seconds", "inf"]),
    ):
        assert run_command(["serve", *map(str, call)]) == code
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_a_missing_package_is_named_before_anything_is_loaded(whole, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)  # as if not installed
    for slow in ("regard.predict", "regard.serve.server"):
        monkeypatch.setitem(sys.modules, slow, None)  # importing it would fail
    assert run_command(["serve", str(whole)]) == 2
    said = capsys.readouterr().err
    assert "fastapi" in said
    assert "pip install 'regard[serve]'" in said
    assert said.count("\n") == 1


def test_images_of_extreme_shapes_are_answered_in_bounded_memory(server):
    process = psutil.Process(server.process.pid)
    before, peak = process.memory_info().rss, 0
    for size in ((1, 1), (1, 1000), (1810, 10), (30_000, 30), (30, 30_000)):
        body = bomb(*size)
        for path in ("predict", "explain", "explain?form=png", "explain?form=npz"):
            begun = time.monotonic()
            status = server.ask("POST", f"/api/{path}", body)[0]
            assert status == 200, (size, path)
            assert time.monotonic() - begun < 20
            peak = max(peak, process.memory_info().rss)
    assert peak - before < 250e6


def test_large_images_are_decoded_one_at_a_time(whole, monkeypatch):
    classifier, now, most = load(whole), [0], [0]

    def decode(path):
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        now[0] -= 1
        return torch.zeros(classifier.preprocess.input_size)

    monkeypatch.setattr(classifier, "decode", decode)

    async def ask(pixels: int) -> int:
        worker = BatchingWorker(classifier)
        worker.readers = ThreadPoolExecutor(4)
        most[0] = 0
        await asyncio.gather(*(worker.predict(Upload(b"x", pixels), 1) for _ in range(6)))
        worker.close()
        return most[0]

    assert asyncio.run(ask(13_000_000)) == 1
    assert asyncio.run(ask(11_000_000)) > 1


def test_images_of_more_bits_count_twice(server):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5200, 5200), np.float32)).save(
        buffer, "TIFF", compression="tiff_deflate"
    )
    status, answer = server.json("POST", "/api/predict", buffer.getvalue())
    assert status == 413
    assert "5200 x 5200 pixels of more than 16 bits" in answer["detail"]


def test_head_gives_the_headers_of_get(server):
    for path in ("/", "/healthz", "/api/model", "/docs"):
        status, headers, body = server.ask("HEAD", path)
        assert (status, body) == (200, b"")
        expected = server.ask("GET", path)[1]
        assert headers["content-length"] == expected["content-length"]
        assert headers["x-content-type-options"] == "nosniff"
    assert server.ask("HEAD", "/api/predict")[0] == 405


def form(*files: tuple[str, bytes], field: bool = True) -> bytes:
    """A multipart body as curl -F makes it."""
    parts = [b'--XX\r\nContent-Disposition: form-data; name="note"\r\n\r\n3\r\n'] * field
    for name, content in files:
        head = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n'
        parts.append(b"--XX\r\n" + head.encode() + b"Content-Type: image/jpeg\r\n\r\n")
        parts[-1] += content + b"\r\n"
    return b"".join(parts) + b"--XX--\r\n"


def test_a_form_is_answered_as_its_file(server, photo):
    kind = {"Content-Type": 'multipart/form-data; boundary="XX"'}
    expected = server.ask("POST", "/api/predict", photo)[2]
    for body in (form(("a.jpg", photo)), form(("a.jpg", photo), field=False)):
        status, _, answer = server.ask("POST", "/api/predict", body, **kind)
        assert (status, answer) == (200, expected)
    for body, found in (
        (form(), "no file"), (form(("a", photo), ("b", photo)), "2 files"), (b"", "no file"),
    ):  # fmt: skip
        status, _, answer = server.ask("POST", "/api/predict", body, **kind)
        assert status == 400
        assert found in json.loads(answer)["detail"]
    assert server.ask("POST", "/api/predict", form(("a", b"")), **kind)[0] == 400


@pytest.mark.parametrize(
    ("path", "option"), [("explain", o) for o in ("top", "target", "form")] + [("predict", "top")]
)
def test_an_option_in_a_form_is_not_passed_over(server, photo, path, option):
    kind = {"Content-Type": 'multipart/form-data; boundary="XX"'}
    for name in (f'name="{option}"', f"name*=utf-8''{option}"):
        body = form(("a.jpg", photo)).replace(b'name="note"', name.encode())
        status, _, answer = server.ask("POST", f"/api/{path}", body, **kind)
        assert status == 400
        assert json.loads(answer)["detail"] == (
            f"{option} is not read from a form: put it into the address, as ?{option}=..."
        )
        left_empty = body.replace(b"\r\n\r\n3\r\n", b"\r\n\r\n\r\n")
        assert server.ask("POST", f"/api/{path}", left_empty, **kind)[0] == 200


@pytest.mark.parametrize(
    ("asked", "detail"),
    [
        ("explain?Target=1", "?Target=: no such option; choose target, form, top"),
        ("explain?class=1", "?class=: no such option; choose target, form, top"),
        ("explain?top=2&target=1&target=2", "?target= is given 2 times"),
        ("predict?target=1", "?target=: no such option; choose top"),
        ("predict?top=1&top=2", "?top= is given 2 times"),
        ("predict?threshold", "?threshold=: no such option; choose top"),
    ],
)
def test_an_option_that_nothing_reads_is_not_passed_over(server, photo, asked, detail):
    """`explain?class=1` showed where the network looked for another class."""
    assert server.json("POST", f"/api/{asked}", photo) == (422, {"detail": detail})


def test_it_says_that_it_is_no_diagnosis_and_how_well_it_did(server, whole, tmp_path, caplog):
    about = server.json("GET", "/api/model")[1]
    assert "not a diagnosis" in about["notice"]
    assert about["notice"] in server.ask("GET", "/")[2].decode()
    evaluation = json.loads((whole / "evaluation.json").read_text())
    classes = about["tested"].pop("classes")
    assert sum(c["images"] for c in classes) == about["tested"]["images"]
    assert all(0 <= c["recall"] <= 1 for c in classes)
    assert about["tested"] == {
        "split": "test", "images": 24, "accuracy": evaluation["metrics"]["top1"],
    }  # fmt: skip
    assert read_test_result(tmp_path) is None
    assert caplog.messages == []
    for damaged in ("{", "[]", "{}", '{"metrics": {"top1": null}}', '{"metrics": {"top1": []}}'):
        (tmp_path / "evaluation.json").write_text(damaged)
        caplog.clear()
        assert read_test_result(tmp_path) is None
        assert "evaluation.json" in caplog.text


def test_a_damaged_folder_is_one_line(whole, tmp_path, capsys):
    config = json.loads((whole / "config.json").read_text())
    for name, content, message in (
        ("model.safetensors", (whole / "model.safetensors").read_bytes()[:500], "can't be loaded"),
        ("config.json", b"[]", "JSON object"),
        ("config.json", b"\xff{", "can't be read"),
        ("config.json", b"{}", "architecture"),
        ("config.json", json.dumps(config | {"label_names": ["a"]}).encode(), "1 label_names"),
        ("config.json", json.dumps(config | {"label_names": {"0": 5}}).encode(), "label_names"),
        ("config.json", json.dumps(config | {"pretrained_cfg": 1}).encode(), "pretrained_cfg is 1"),
    ):
        shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
        assert run_command(["serve", str(tmp_path / "run"), "--port", "0"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert str(tmp_path / "run") in said
        assert said.count("\n") == 1
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    for content in ("{}", "[]", '{"status": "finished"}', "\0"):
        (tmp_path / "run/run.json").write_text(content)
        for command in ("evaluate", "report"):
            assert run_command([command, str(tmp_path / "run")]) == 2
            said = capsys.readouterr().err
            assert "run.json" in said
            assert said.count("\n") == 1


def test_a_client_that_leaves_is_no_error(server, photo):
    head = f"POST /api/explain HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}\r\n\r\n"
    for sent in (photo[:1000], photo):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(head.encode() + sent)
            time.sleep(0.05)
    assert server.json("POST", "/api/predict", photo)[0] == 200  # its log is checked at the end


@pytest.mark.slow
def test_sigterm_ends_it_though_an_upload_stalls(whole, photo):
    server = Server(whole)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        head = "POST /api/explain HTTP/1.1\r\nHost: localhost\r\n"
        client.sendall(f"{head}Content-Length: {len(photo)}\r\n\r\n".encode() + photo[:1000])
        assert server.ask("GET", "/healthz")[0] == 200
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 12
    assert server.errors == ""


def test_a_grafted_network_is_named_by_what_it_is(tmp_path):
    plain = regard.create_model("sononet8", num_classes=3, convs=(1, 1, 1, 1, 1))
    regard.save_model(regard.graft(plain, regard.SE), tmp_path)
    assert name_of(load(tmp_path)) == "sononet8 + SE"
