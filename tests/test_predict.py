"""`regard predict`: every image is answered or named, and nothing that is there is lost."""

import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import regard
from regard.calibrating import remove_calibration
from regard.cli import run_command
from regard.commands import predict as module
from regard.commands.predictions_csv import PredictionsCsv
from regard.commands.written_rows import WrittenRows
from regard.data.content import file_hash
from regard.data.walk import images_below
from regard.errors import FileError, UsageError
from regard.evaluation import Predictions
from regard.evaluation.calibration import fit_calibration, read_calibration, write_calibration
from regard.predict import Classifier
from tests.helpers import ENVIRONMENT, rows_of, start

CLASSES = ["cat", "dog", "čáp ✓"]  # which many encodings lack


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """An untrained network as a folder, for what does not depend on its weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network") / "run"
    model = regard.create_model("ag_sononet8", num_classes=3)
    regard.save_model(
        model, folder, class_names=CLASSES,
        data_config={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,), "crop_pct": 1.0,
                     "crop_mode": "squash", "interpolation": "bilinear"},
    )  # fmt: skip
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(folder / "b.jpg")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


@pytest.fixture
def predict(network, capsys):
    """Runs the command; asserts its exit code and returns what it printed."""

    def call(*arguments: object, code: int = 0) -> str:
        assert run_command(["predict", str(network), *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if code == 2:
            assert err.startswith("regard: ")
        return err if code == 2 else out

    return call


# --------------------------------------------------------------------------- the answers
def test_every_image_is_answered_and_the_broken_one_is_named(network, pictures, capsys):
    images = [str(pictures / "b.jpg"), str(pictures)]
    assert run_command(["predict", str(network), *images, "--json", "--top", "2"]) == 1
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert out.isascii()
    assert [Path(a["path"]).name for a in answers] == ["b.jpg", "a.png", "b.jpg", "broken.png"]
    assert answers[0] == answers[2]
    assert "classes" not in answers[3]
    assert sum("broken.png" in line for line in err.splitlines()) == 1
    (again,) = regard.load(network).predict(pictures / "b.jpg", top=2)
    for answer, (name, probability) in zip(answers[0]["classes"], again.classes, strict=True):
        assert answer["class"] == name
        assert answer["probability"] == pytest.approx(probability, abs=1e-6)


def test_exit_codes(predict, pictures, tmp_path):
    predict(pictures / "a.png")
    assert "broken.png" in predict(pictures / "broken.png", code=2)
    (tmp_path / "empty").mkdir()
    assert "no image below" in predict(tmp_path / "empty", code=2)
    assert "no such file" in predict(tmp_path / "absent.png", code=2)
    assert "IMAGES" in predict(code=2)
    assert "--tpo" in predict(pictures, "--tpo", "3", code=2)
    assert "--top 0" in predict(pictures, "--top", "0", code=2)
    assert "only with --csv" in predict(pictures, "--resume", code=2)


def test_options_may_stand_anywhere(predict, pictures):
    a, b = pictures / "a.png", pictures / "b.jpg"
    expected = predict(a, b, "--top", "1")
    assert len(expected.splitlines()) == 2
    assert predict("--top", "1", a, b) == expected
    assert predict(a, "--top", "1", b) == expected


def test_a_pipe_is_not_waited_for(network, pictures, tmp_path, capsys):
    """Also where the run knows its images, and each one given is hashed."""
    run = tmp_path / "run"
    shutil.copytree(network, run)
    a = pictures / "a.png"
    (run / "splits.csv").write_text(
        f"path,label,split,group,content\n{a},cat,train,,{file_hash(a):016x}\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    assert run_command(["predict", str(run), str(tmp_path / "pipe.png"), str(a)]) == 1
    assert "pipe.png: is not a regular file" in capsys.readouterr().err


def test_a_path_that_can_not_be_looked_up_is_named_and_the_others_are_answered(
    network, pictures, capsys
):
    a, long = str(pictures / "a.png"), str(pictures / f"{'x' * 300}.png")
    assert run_command(["predict", str(network), a, long, a]) == 1
    out, err = capsys.readouterr()
    assert out.count("a.png: ") == 2
    assert f"regard: {long}: can't be read as an image (File name too long)" in err.splitlines()


def test_a_url_is_named_as_one(predict):
    assert "is a URL" in predict("https://example.org/a.png", code=2)


def test_an_image_from_standard_input(predict, pictures, monkeypatch):
    expected = predict(pictures / "a.png").partition(": ")[2]

    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    give((pictures / "a.png").read_bytes())
    assert predict("-") == f"-: {expected}"
    give(b"")
    assert "-: is empty" in predict("-", code=2)
    assert "one image" in predict("-", "-", code=2)


def test_a_folder_whose_weights_are_another_networks(network, pictures, tmp_path, capsys):
    config = json.loads((network / "config.json").read_text())
    config["model_args"]["features"] = 16
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes((network / "model.safetensors").read_bytes())
    assert run_command(["predict", str(other), str(pictures / "a.png")]) == 2
    assert "can't be loaded" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the file
def test_a_csv_has_a_row_for_each_image(predict, pictures, tmp_path):
    predict(pictures, "--csv", tmp_path / "answers.csv", "--top", "1", code=1)
    rows = rows_of(tmp_path / "answers.csv")
    assert list(rows[0]) == [
        "path", "class1", "probability1", *(f"p_{name}" for name in CLASSES), "error",
    ]  # fmt: skip
    shares = {name: float(rows[0][f"p_{name}"]) for name in CLASSES}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert shares[rows[0]["class1"]] == max(shares.values()) == float(rows[0]["probability1"])
    assert {rows[2][f"p_{name}"] for name in CLASSES} == {""}
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.jpg", "broken.png"]
    assert "truncated" in rows[2]["error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.csv", "pictures"]


def test_nothing_that_is_there_is_replaced_unasked(predict, pictures, tmp_path, network):
    a = pictures / "a.png"
    picture = a.read_bytes()
    assert "name of an image" in predict(a, "--csv", pictures / "b.jpg", code=2)
    hard = tmp_path / "hard.csv"
    os.link(a, hard)
    for more in ([], ["--overwrite"]):
        assert "is an input" in predict(a, "--csv", hard, *more, code=2)
    assert "is an input" in predict(a, "--csv", network / "config.json", "--overwrite", code=2)
    assert a.read_bytes() == picture
    notes = tmp_path / "notes.csv"
    notes.write_text("mine")
    assert "--overwrite" in predict(a, "--csv", notes, code=2)
    assert notes.read_text() == "mine"
    assert "is a folder" in predict(a, "--csv", tmp_path, code=2)
    assert "folder does not exist" in predict(a, "--csv", tmp_path / "no" / "x.csv", code=2)
    predict(a, "--csv", notes, "--overwrite")
    assert len(rows_of(notes)) == 1


def test_links_are_followed_and_pipes_are_written_to(predict, pictures, tmp_path, network):
    a = pictures / "a.png"
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    predict(a, "--csv", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    expected = (tmp_path / "target.csv").read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    predict(a, "--csv", pipe)
    reader.join(10)
    assert received == [expected]
    assert pipe.is_fifo()
    done = subprocess.run(
        [sys.executable, "-m", "regard", "predict", network, a, "--csv", "/dev/stdout"],
        env=ENVIRONMENT | {"LC_ALL": "C", "PYTHONUTF8": "0"}, capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected  # the same bytes where the locale knows ASCII alone


@pytest.mark.slow
def test_a_redirected_output_is_appended_to(pictures, tmp_path, network):
    (tmp_path / "log.txt").write_bytes(b"before\n")
    with (tmp_path / "log.txt").open("ab") as file:
        command = [sys.executable, "-m", "regard", "predict", network, pictures / "a.png"]
        done = subprocess.run(
            [*command, "--csv", "/dev/stdout"], stdout=file, stderr=subprocess.PIPE, timeout=100,
            env={**ENVIRONMENT, "PYTHONIOENCODING": "cp1252"},  # which has no check mark
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log.txt").read_bytes().splitlines()
    assert lines[:1] == [b"before"]
    assert lines[1].startswith(b"path,class1")
    assert "\u2713".encode() in lines[1]  # UTF-8, whatever the encoding of what is printed


def test_names_that_are_not_utf8_are_written(predict, pictures, tmp_path):
    odd = os.fsdecode(os.fsencode(pictures) + b"/\xe4.png")
    os.rename(pictures / "a.png", odd)
    predict(odd, "--csv", tmp_path / "x.csv")
    assert b"\xe4.png" in (tmp_path / "x.csv").read_bytes()
    predict(odd, "--csv", tmp_path / "x.csv", "--resume")
    predict(odd, "--json")


# ------------------------------------------------------------------------ stopping, going on
@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A folder of 1,200 images, the last of which is broken."""
    folder = tmp_path_factory.mktemp("many")
    pixels = np.random.default_rng(1).integers(0, 256, (300, 300), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0000.png")
    for k in range(1, 1200):
        os.link(folder / "0000.png", folder / f"{k:04d}.png")
    (folder / "9999.png").write_bytes(b"broken")
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_done_stays_and_resume_goes_on(network, many, tmp_path, number):
    out = tmp_path / "answers.csv"
    process = start("predict", network, many, "--csv", out, "--top", "1")
    end = time.monotonic() + 100
    while time.monotonic() < end and (not out.exists() or out.read_bytes().count(b"\n") < 40):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    done = out.read_bytes().count(b"\n") - 1
    assert 0 < done < 1201
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert f"after {done:,} images" in err
        assert "--resume" in err
    else:
        with out.open("ab") as file:
            file.write(b"half a ro")
    process = start("predict", network, many, "--csv", out, "--top", "1", "--resume")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    rows = rows_of(out)
    names = [*(f"{k:04d}.png" for k in range(1200)), "9999.png"]
    assert [Path(row["path"]).name for row in rows] == names
    assert len({row["probability1"] for row in rows}) == 2
    assert rows[-1]["error"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_stopped_command_tells_how_many_rows_are_in_its_file(
    network, pictures, tmp_path, monkeypatch, capsys, moment
):
    """The signal comes just before or just after the second row is written."""
    write, written = PredictionsCsv.write, []

    def signaled(self, p):
        written.append(p)
        if len(written) == 2 and moment == "before":
            signal.raise_signal(signal.SIGTERM)
        write(self, p)
        if len(written) == 2 and moment == "after":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(PredictionsCsv, "write", signaled)
    out = tmp_path / "x.csv"
    command = ["predict", str(network), str(pictures), "--csv", str(out)]
    assert run_command(command) == 128 + signal.SIGTERM
    assert "stopped after 2 images, all in" in capsys.readouterr().err
    assert len(rows_of(out)) == 2


def test_resume_refuses_rows_of_another_call(predict, network, pictures, tmp_path):
    a, b, out = pictures / "a.png", pictures / "b.jpg", tmp_path / "x.csv"
    assert "does not exist" in predict(a, "--csv", out, "--resume", code=2)
    predict(a, "--csv", out)
    whole = out.read_bytes()
    assert "image 1" in predict(b, "--csv", out, "--resume", code=2)
    assert "--top" in predict(a, "--csv", out, "--resume", "--top", "2", code=2)
    assert out.read_bytes() == whole
    rows = list(csv.reader(io.StringIO(whole.decode())))
    rows[1][2] = f"{1 - float(rows[1][2]):.6f}"
    with out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    assert "another network" in predict(a, b, "--csv", out, "--resume", code=2)
    out.write_bytes(whole)
    predict(a, b, "--csv", out, "--resume")
    assert [Path(row["path"]).name for row in rows_of(out)] == ["a.png", "b.jpg"]


@pytest.mark.parametrize(
    "content", [b"my notes\n", b"a,b\r\n1,2\r\n", b"half a line", bytes(range(256)) * 9]
)
def test_resume_changes_no_file_that_is_not_of_predictions(predict, pictures, tmp_path, content):
    out = tmp_path / "x.csv"
    out.write_bytes(content)
    assert str(out) in predict(pictures / "a.png", "--csv", out, "--resume", code=2)
    assert out.read_bytes() == content


@pytest.mark.parametrize("row", [b"", b"a.png,cat,no,number,0,0,", b"\0"])
def test_rows_that_are_damaged_are_named(predict, pictures, tmp_path, row):
    a, out = pictures / "a.png", tmp_path / "x.csv"
    predict(a, "--csv", out)
    header, _ = out.read_bytes().split(b"\r\n", 1)
    out.write_bytes(header + b"\r\n" + row.replace(b"a.png", str(a).encode()) + b"\r\n")
    before = out.read_bytes()
    assert str(out) in predict(a, "--csv", out, "--resume", code=2)
    assert out.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="there is no flock")
def test_a_file_is_written_by_one_process_at_once(predict, pictures, tmp_path):
    import fcntl

    a, out = pictures / "a.png", tmp_path / "x.csv"
    predict(a, "--csv", out)
    before = out.read_bytes()
    with out.open("a", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flag in ("--resume", "--overwrite"):
            assert "another process" in predict(a, "--csv", out, flag, code=2)
    assert out.read_bytes() == before
    predict(a, "--csv", out, "--overwrite")


def test_resume_where_classes_have_the_same_name(network, pictures, tmp_path):
    folder, out = tmp_path / "twice", tmp_path / "x.csv"
    shutil.copytree(network, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["label_names"] = ["crane"] * 3  # as two of ImageNet's
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    call = ["predict", str(folder), *map(str, (pictures / "a.png", pictures / "b.jpg"))]
    assert run_command([*call, "--csv", str(out)]) == 0
    assert run_command([*call, "--csv", str(out), "--resume"]) == 0


def test_what_resume_adds_is_what_one_call_writes(whole, scans, tmp_path, monkeypatch):
    few = sorted(map(str, scans.rglob("*.png")))[::3]
    out, call = tmp_path / "x.csv", ["predict", str(whole), *few, "--csv"]
    assert run_command([*call, str(out)]) == 0
    lines, sizes = out.read_bytes().splitlines(keepends=True), []
    own = Classifier.with_distances
    monkeypatch.setattr(
        Classifier, "with_distances", lambda self, x: (sizes.append(len(x)), own(self, x))[1]
    )
    for rows, batches in ((6, [32, 8]), (32, [8]), (39, [8])):  # bits depend on the batch
        out.write_bytes(b"".join(lines[: 1 + rows]))
        sizes.clear()
        assert run_command([*call, str(out), "--resume"]) == 0
        assert out.read_bytes().splitlines(keepends=True) == lines
        assert sizes[1:] == batches
        assert 1 < sizes[0] <= 12  # images of rows that are there, again


def calibrated(run, temperature, threshold=None) -> None:
    """Gives a run a temperature and a threshold of class 1."""
    rng = np.random.default_rng(0)
    toy = Predictions(rng.dirichlet([1, 1, 1], 60), rng.integers(0, 3, 60), ["0", "1", "2"])
    found = fit_calibration(toy, positive="1", rule="youden")
    limit = None if threshold is None else replace(found.threshold, value=threshold)
    write_calibration(run, replace(found, temperature=temperature, threshold=limit))


@pytest.mark.parametrize("several", [False, True])
def test_resume_refuses_rows_from_before_a_calibration(whole, scans, tmp_path, capsys, several):
    runs = [Path(shutil.copytree(whole, tmp_path / name)) for name in ("a", "b")[: 1 + several]]
    out = tmp_path / "x.csv"
    call = ["predict", *map(str, runs), str(scans), "--csv", str(out)]
    assert run_command(call) == 0
    whole_file = out.read_bytes()
    lines = whole_file.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:38]))
    before = out.read_bytes()
    for temperature in (1.01, 0.99, 1.5):
        calibrated(runs[-1], temperature)
        capsys.readouterr()
        assert run_command([*call, "--resume"]) == 2
        err = capsys.readouterr().err
        assert "calibration" in err
        assert err.splitlines()[-1].count(".png was ") == 1
        assert out.read_bytes() == before
    remove_calibration(runs[-1])
    assert run_command([*call, "--resume"]) == 0
    assert out.read_bytes() == whole_file


def test_resume_refuses_decisions_of_another_threshold(whole, scans, tmp_path, capsys):
    run, out = Path(shutil.copytree(whole, tmp_path / "a")), tmp_path / "x.csv"
    call = ["predict", str(run), str(scans), "--csv", str(out)]
    calibrated(run, 1.2, 0.4)
    assert run_command(call) == 0
    shares = sorted(float(row["p_1"]) for row in rows_of(out))
    rows, at = out.read_bytes(), float(np.searchsorted(shares, 0.4))
    calibrated(run, 1.2, (shares[int(at)] + shares[int(at) + 1]) / 2)  # one image is below now
    assert run_command([*call, "--resume"]) == 2
    assert "which is not 1 now" in capsys.readouterr().err
    calibrated(run, 1.2, (0.4 + shares[int(at)]) / 2)  # a threshold that decides alike
    assert run_command([*call, "--resume"]) == 0
    assert out.read_bytes() == rows


def test_cells_have_every_digit_of_a_probability_and_rows_of_six_decimals_are_resumed(
    whole, scans, tmp_path
):
    classifier, out = regard.load(whole), tmp_path / "x.csv"
    shares = torch.tensor([1.2345678e-8, 0.123456789, 0.9999999])
    with PredictionsCsv(out, 1, classifier, resume=False) as table:
        table.write(classifier.prediction("a.png", shares, None, 1))
    (row,) = rows_of(out)
    cells = [row[f"p_{name}"] for name in classifier.class_names]
    assert cells == ["1.23456783e-08", "0.123456791", "0.999999881"]
    assert np.array_equal(np.float32(cells), shares.numpy())
    assert row["probability1"] == "0.999999881"
    run = Path(shutil.copytree(whole, tmp_path / "a"))
    calibrated(run, 0.5, 0.4)
    call = ["predict", str(run), str(scans), "--csv", str(out)]
    assert run_command([*call, "--overwrite"]) == 0
    rows, written = rows_of(out), out.read_bytes()
    for row in rows[:-1]:
        for name in ("probability1", *(c for c in row if c.startswith("p_"))):
            row[name] = row[name] and f"{float(row[name]):.6f}"
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows[:-1])
    old = out.read_bytes().splitlines()
    assert run_command([*call, "--resume"]) == 0
    found = out.read_bytes().splitlines()
    assert found[: len(old)] == old
    assert found[-1] == written.splitlines()[-1]


def test_a_threshold_of_a_millionth_decides_rows_that_are_resumed(whole, tmp_path):
    classifier, out = regard.load(whole), tmp_path / "x.csv"
    calibrated(tmp_path, 1.0, 1e-6)
    classifier.familiarity, classifier.calibration = None, read_calibration(tmp_path)
    with PredictionsCsv(out, 1, classifier, resume=False) as table:
        table.write(
            found := classifier.prediction("a.png", torch.tensor([0.5, 9e-7, 0.5]), None, 1)
        )
    calibrated(tmp_path, 1.0, 8e-7)
    classifier.calibration = read_calibration(tmp_path)
    with PredictionsCsv(out, 1, classifier, resume=True) as table:
        written = WrittenRows(table)
        cells = list(rows_of(out)[0].values())
        with pytest.raises(UsageError, match="decided as not 1, which is 1 now"):
            written.add(1, cells)
    assert found.decision == "not 1"


def test_resume_takes_a_decision_within_the_rounding_of_its_threshold(whole, tmp_path):
    classifier, out = regard.load(whole), tmp_path / "x.csv"
    calibrated(tmp_path, 1.0, 0.50000006)
    classifier.familiarity, classifier.calibration = None, read_calibration(tmp_path)
    for share in (0.4999978, 0.49999749, 0.4999974):
        shares = torch.tensor([0.5 - share, share, 0.5])
        with PredictionsCsv(out, 1, classifier, resume=False) as table:
            table.write(found := classifier.prediction("a.png", shares, None, 1))
        with PredictionsCsv(out, 1, classifier, resume=True) as table:
            WrittenRows(table).add(1, table.cells(found))
        assert rows_of(out)[0]["decision"] == ("not 1" if share == 0.4999974 else "1")


def test_of_equal_probabilities_the_first_is_named_as_in_evaluation(whole):
    classifier, shares = regard.load(whole), torch.full((10,), 0.1)
    classifier.class_names = list("0123456789")
    found = classifier.prediction("a.png", shares, None, 3)
    assert [name for name, _ in found.classes] == ["0", "1", "2"]
    shares[[3, 7]] = 0.2
    found = classifier.prediction("a.png", shares, None, 20)
    assert [name for name, _ in found.classes] == list("3701245689")


def test_a_full_disk_is_told_without_rows_that_are_not_on_it(whole, tmp_path):
    classifier, out = regard.load(whole), tmp_path / "x.csv"
    found = classifier.prediction("a.png", torch.tensor([0.2, 0.5, 0.3]), None, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    table = PredictionsCsv(out, 1, classifier, resume=False)
    table.write(found)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(FileError) as caught:
            table.__exit__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"{out}: file too large; --resume goes on after its last whole row"


class Bf16:
    """An engine whose answers are those of bf16: two to three digits."""

    precision = "bf16"

    def __init__(self, of: Classifier) -> None:
        self.of = of

    def __call__(self, images):
        x = self.of.preprocess.normalize(images)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return self.of.model(x).float().softmax(dim=1)


def test_resume_in_bf16_tells_rounding_from_another_temperature(whole, scans, tmp_path):
    images, out = sorted(map(str, scans.rglob("*.png"))), tmp_path / "x.csv"

    def resumed(temperature: float, bf16: bool) -> None:
        classifier = regard.load(whole)
        classifier.familiarity = None
        if bf16:
            classifier.engine = Bf16(classifier)
        toy = Predictions(np.eye(3)[[0, 1, 2] * 4], np.array([0, 1, 2] * 4), ["0", "1", "2"])
        classifier.calibration = replace(fit_calibration(toy), temperature=temperature)
        with PredictionsCsv(out, 1, classifier, resume=out.exists()) as table:
            *_, left = table.skip_done(iter(images))
            for p in classifier.predict_each(list(left)[table.repeated :], 1):
                table.write(p)

    resumed(1.0, True)
    with pytest.raises(UsageError, match="or precision"):
        resumed(1.0, False)
    out.unlink()
    resumed(1.0, False)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:65]))
    resumed(1.0, True)
    assert len(rows_of(out)) == len(images)
    for temperature in (0.85, 1.15):
        with pytest.raises(UsageError, match="calibration"):
            resumed(temperature, True)


@pytest.mark.parametrize("name", ["wds:a.tar", "hf:a/b", "medmnist:x.npz", "digits", "cifar10"])
def test_labeled_data_is_for_evaluate(predict, name):
    assert f"evaluate RUN {name}" in predict(name, code=2)


def test_progress_goes_to_standard_error(network, pictures, monkeypatch, capsys):
    monkeypatch.setattr(module, "PROGRESS_EVERY", 0.0)
    images = [str(pictures / name) for name in ("a.png", "b.jpg")]
    assert run_command(["predict", str(network), *images, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "2 images in" in err
    assert len([json.loads(line) for line in out.splitlines()]) == 2


def test_shards_share_the_images_and_each_goes_on_where_it_stopped(whole, scans, tmp_path, capsys):
    answered = []
    for i in (1, 2, 3):
        file = tmp_path / f"{i}.csv"
        call = ["predict", str(whole), str(scans), "--shard", f"{i}/3", "--csv", str(file)]
        assert run_command(call) == 0
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:7]))  # as if it had been stopped
        assert run_command([*call, "--resume"]) == 0
        assert file.read_text().splitlines(keepends=True) == lines
        answered += [row["path"] for row in rows_of(file)]
    assert len(answered) == len(set(answered)) == 120
    few = sorted(map(str, (scans / "0").iterdir()))[:2]
    assert run_command(["predict", str(whole), *few, "--shard", "3/3"]) == 0
    capsys.readouterr()
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2", "٣/٤", f"1/{10**30}", f"1/{'9' * 5000}"):
        assert run_command(["predict", str(whole), *few, "--shard", wrong]) == 2
        assert wrong in capsys.readouterr().err


def test_names_that_are_no_images_are_refused_before_anything_is_read(whole, monkeypatch, capsys):
    for command in ("predict", "explain"):
        for images in ([""], ["a.png", ""], ["-", "-"]):  # "" would be the current folder
            assert run_command([command, str(whole), *images]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", None)  # as `<&-` in a shell
    for command in ("predict", "explain"):
        assert run_command([command, str(whole), "-"]) == 2
        assert "standard input is closed" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_folder_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # no suffix: its first bytes would be read
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    found: list[list[Path]] = []
    listing = threading.Thread(target=lambda: found.append(list(images_below([tmp_path]))))
    listing.daemon = True
    listing.start()
    listing.join(timeout=20)
    assert found == [[tmp_path / "a.png"]]
