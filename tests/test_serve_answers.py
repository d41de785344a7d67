"""What `regard serve` takes and answers, by the ways that people send images."""

import asyncio
import json
import signal
import socket
import struct
import time
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import tifffile
import torch
import uvicorn
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

import regard
from regard import load
from regard.data.preprocess import Preprocess
from regard.errors import FileError, ImageError, UsageError
from regard.serve.app import create_app
from regard.serve.server import _listen, _Server
from regard.serve.uploads import Limits, check
from regard.serve.worker import BatchingWorker, Upload
from tests.helpers import Server


def scan_without_preamble(path, *, meta: bool) -> None:
    """A DICOM file that begins with its meta information, or with its data set."""
    scan = Dataset()
    scan.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"  # in group 0008
    scan.PhotometricInterpretation, scan.SamplesPerPixel = "MONOCHROME2", 1
    scan.Rows, scan.Columns = 24, 32
    scan.BitsAllocated, scan.BitsStored, scan.HighBit = 16, 12, 11
    scan.PixelRepresentation, scan.WindowCenter, scan.WindowWidth = 0, 2048, 4096
    scan.PixelData = (np.arange(24 * 32) * 5 % 4096).astype("<u2").tobytes()
    if not meta:
        scan.save_as(path, implicit_vr=False, little_endian=True)
        return
    scan.file_meta = pydicom.dataset.FileMetaDataset()
    scan.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    scan.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    scan.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    scan.save_as(path, enforce_file_format=True)
    path.write_bytes(path.read_bytes()[132:])


def test_whatever_predict_reads_is_answered_alike(server, whole, tmp_path):
    shown = np.random.default_rng(0).random((24, 32, 3))
    tifffile.imwrite(tmp_path / "doubles.tif", shown[..., 0])
    tifffile.imwrite(tmp_path / "color.tif", shown.astype(np.float32), photometric="rgb")
    scan_without_preamble(tmp_path / "meta.dcm", meta=True)
    scan_without_preamble(tmp_path / "plain.dcm", meta=False)
    classifier = load(whole)
    for path in sorted(tmp_path.iterdir()):
        (said,) = classifier.predict(path)
        status, answer = server.json("POST", "/api/predict", path.read_bytes())
        assert status == 200, (path.name, answer)
        found = [(c["class"], c["probability"]) for c in answer["classes"]]
        assert found == said.classes, path.name
        assert server.json("POST", "/api/explain", path.read_bytes())[0] == 200


def asked(app, verb: str, path: str, query: bytes = b"", body: bytes = b""):
    """Status and content of an answer, without a server."""
    sent = []
    scope = {"type": "http", "method": verb, "path": path, "query_string": query,
             "headers": [(b"host", b"localhost")]}  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]))


def test_classes_named_by_bytes_that_are_no_utf8_are_answered_and_no_top_is_refused(photo):
    names = ["a\udcff", "Å, b"]  # of class folders b"a\xff" and "Å, b"
    model = regard.create_model("ag_sononet8", num_classes=2).eval()
    classifier = regard.Classifier(model, names, Preprocess((1, 32, 32), (0.5,), (0.25,)))
    (said,) = classifier.predict(photo)
    app = create_app(classifier)
    assert asked(app, "GET", "/api/model")[1]["classes"] == names
    for path in ("/api/predict", "/api/explain"):
        status, answer = asked(app, "POST", path, body=photo)
        assert status == 200, answer
        assert [c["class"] for c in answer["classes"]] == [name for name, _ in said.classes]
        assert asked(app, "POST", path, b"top=0", photo)[0] == 422  # as `predict --top 0`
    status, answer = asked(app, "POST", "/api/explain", b"target=c", photo)
    assert status == 422
    assert answer["detail"] == r"target='c': choose one of 'a\udcff', 'Å, b'"


def test_tiffs_for_the_other_reader_are_bounded_by_their_header(server, tmp_path):
    path = tmp_path / "doubles.tif"
    tifffile.imwrite(path, np.zeros((16, 16)), tile=(16, 16))
    plain = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        at = {name: file.pages[0].tags[name] for name in ("ImageWidth", "TileWidth", "TileLength")}
    for names, status in ((("ImageWidth",), 413), (("TileWidth", "TileLength"), 413), ((), 200)):
        changed = bytearray(plain)
        for name in names:
            kind = {3: "<H", 4: "<I"}[int(at[name].dtype)]
            struct.pack_into(kind, changed, at[name].valueoffset, 32_000)
        assert server.json("POST", "/api/predict", bytes(changed))[0] == status, names
    assert server.json("POST", "/api/predict", plain[:40])[0] == 422
    bands = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(path, np.zeros((10, 10, 16)), **bands)
    assert check(path.read_bytes(), Limits()) == 100 * 16  # 8 bytes each


def test_a_field_of_text_is_no_file_whatever_it_is_called(server, photo):
    kind = {"Content-Type": "multipart/form-data; boundary=XX"}
    expected = server.ask("POST", "/api/predict", photo)[2]
    file = b'--XX\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
    text = b'--XX\r\nContent-Disposition: form-data; name="filename"\r\n\r\na.jpg\r\n'
    left_empty = file % (b"", b"")
    for name in (b"a.jpg", 'Å;\\"<b>\u0085.jpg'.encode(), b'x"; name="y'):
        for other in (text, left_empty):
            body = other + file % (name, photo) + b"--XX--\r\n"
            status, _, answer = server.ask("POST", "/api/predict", body, **kind)
            assert (status, answer) == (200, expected), (name, other)
    for body, fault in (
        (text, "no file"),
        (left_empty, "no file"),
        (file % (b"a", b""), "0 bytes"),
        # headers whose parsing would take a minute, and names of encodings that there are not
        (file % (b"a" + b";" * 1_000_000, photo), "headers of over"),
        (file.replace(b"filename=", b"filename*=utf\0-8''") % (b"x", photo), "can't be read"),
        (file.replace(b"filename=", b"filename*=idna''") % (b"%ff", photo), "can't be read"),
    ):
        status, _, answer = server.ask("POST", "/api/predict", body + b"--XX--\r\n", **kind)
        assert status == 400
        assert fault in json.loads(answer)["detail"]


def test_both_routes_give_the_engines_answer(whole, photo):
    classifier = load(whole)
    shares = [0.2, 0.3, 0.5]
    classifier.engine = lambda images: torch.tensor([shares] * len(images))
    upload = Upload(photo, check(photo, Limits()))

    async def ask():
        worker = BatchingWorker(classifier)
        told = await worker.predict(upload, 3)
        explanation, _, _ = await worker.explain(upload, None)
        other, _, _ = await worker.explain(upload, classifier.class_names[0])
        worker.close()
        return told, explanation, other

    told, explanation, other = asyncio.run(ask())
    assert explanation.classes == told.classes
    assert explanation.target == (classifier.class_names[2], pytest.approx(0.5))
    assert other.target == (classifier.class_names[0], pytest.approx(0.2))


@pytest.mark.parametrize("engine", [False, True])
def test_an_answer_that_is_not_finite_is_an_error(whole, photo, engine):
    classifier = load(whole)
    if engine:
        classifier.engine = lambda images: torch.full((len(images), 3), torch.nan)
    else:
        list(classifier.model.parameters())[-1].data.fill_(torch.nan)
    upload = Upload(photo, check(photo, Limits()))

    async def ask():
        worker = BatchingWorker(classifier)
        found = await asyncio.gather(
            worker.predict(upload, 3), worker.explain(upload, None), return_exceptions=True
        )
        worker.close()
        return found

    for found in asyncio.run(ask()):
        assert isinstance(found, ImageError)
        assert "not finite" in str(found)


def test_no_host_is_refused_and_a_port_is_taken_at_once():
    with pytest.raises(UsageError, match="host=''"):  # would be every address
        _listen("", 0)
    first = _listen("127.0.0.1", 0)
    with first, pytest.raises(FileError, match="in use"):
        _listen("127.0.0.1", first.getsockname()[1])


def test_a_second_signal_hangs_up_whatever_the_version_of_python():
    """Since Python 3.12.1, asyncio would wait for the connections that are open."""
    server, asked = _Server(uvicorn.Config(app=None), lambda: None), []
    server.loop = SimpleNamespace(call_soon_threadsafe=asked.append)
    server.handle_exit(signal.SIGINT, None)
    assert asked == []
    server.handle_exit(signal.SIGINT, None)
    assert asked == [server._hang_up]


def test_a_second_signal_ends_it_at_once_without_a_traceback(whole, photo):
    server = Server(whole)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        head = f"POST /api/explain HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(photo)}"
        client.sendall(f"{head}\r\n\r\n".encode() + photo[:1000])  # and waits
        assert server.ask("GET", "/healthz")[0] == 200
        begun = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        _, errors = server.process.communicate(timeout=60)
    assert time.monotonic() - begun < 6  # not all of the time for requests in work
    assert server.process.returncode == 0
    assert errors == ""
