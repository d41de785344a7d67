"""`regard push`, and networks named hf-hub:, against a stand-in for the hub on loopback."""

import shutil

import huggingface_hub
import pytest
from PIL import Image

import regard
from regard.calibrating import calibrate, remove_calibration
from regard.cli import run_command
from regard.errors import FileError
from regard.models import hub
from regard.trained_on import known_images
from tests.hub import Hub, point_at, seconds_of
from tests.test_weights import script


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    running = Hub()
    point_at(running.url, tmp_path / "cache", monkeypatch)
    yield running
    if not running.stopped.is_set():
        running.close()


def test_a_run_is_pushed_when_it_is_said_and_loaded_by_name(
    whole, stand_in, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("HF_TOKEN", "good")
    call = ["push", str(whole), "someone/digits"]
    assert run_command(call) == 0
    assert "--yes" in capsys.readouterr().out
    assert stand_in.asked == []
    assert run_command([*call, "--yes"]) == 0, capsys.readouterr().err
    names = {name.removeprefix("someone/digits/") for name in stand_in.files}
    assert {"config.json", "model.safetensors", "README.md", "images.npz"} <= names
    assert not names & {"report.html", "splits.csv", "predictions.npz", "run.json"}
    ours = (whole / "model.safetensors").read_bytes()
    assert stand_in.files["someone/digits/model.safetensors"] == ours
    image = tmp_path / "x.png"
    Image.fromarray(script.test_image(1, 16, 16)).save(image)
    again = regard.load("hf-hub:someone/digits")
    assert again.predict(image) == regard.load(whole).predict(image)
    assert run_command(["predict", "hf-hub:someone/digits", str(image)]) == 0
    from regard.models.io import network_folder

    folder = network_folder("hf-hub:someone/digits")
    assert len(known_images(folder)) == len(known_images(whole))
    stand_in.close()
    caplog.clear()
    assert regard.load("hf-hub:someone/digits").class_names == again.class_names
    assert "local cache" in caplog.text
    (folder / "model.safetensors").unlink()  # as where a download was broken off
    with pytest.raises(FileError, match="can't be reached"):
        regard.load("hf-hub:someone/digits")


def test_what_the_run_has_no_more_is_deleted(whole, stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "good")
    run = shutil.copytree(whole, tmp_path / "run")
    calibrate(run)
    hub.push(hub.push_files(run, "someone/digits"), "someone/digits")
    stand_in.files["someone/digits/notes.md"] = b"somebody's own"
    assert regard.load("hf-hub:someone/digits").calibration is not None
    assert remove_calibration(run)
    hub.push(hub.push_files(run, "someone/digits"), "someone/digits")
    assert "someone/digits/calibration.json" not in stand_in.files
    assert "someone/digits/notes.md" in stand_in.files


@pytest.mark.parametrize("noticed", ["here", "by the HTTP library"])
def test_a_hub_that_takes_nothing_is_left_soon(
    noticed, whole, stand_in, tmp_path, monkeypatch, capsys
):
    """Whose time limit ends first is chance: both are SECONDS."""
    monkeypatch.setattr(hub, "SECONDS", 0.4)
    if noticed != "here":
        ask = huggingface_hub.get_hf_file_metadata
        monkeypatch.setattr(
            huggingface_hub, "get_hf_file_metadata", lambda url, timeout: ask(url, timeout=0.1)
        )
        monkeypatch.setattr(hub, "SECONDS", 5.0)
    stand_in.delay = 60
    call = ["push", str(whole), "someone/digits", "--yes"]
    took, code = seconds_of(lambda: run_command(call))
    assert (code, took < 10) == (1, True)
    assert "can't be reached" in capsys.readouterr().err
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no")
    assert run_command(["push", str(damaged), "someone/digits"]) == 2


def test_what_the_hub_refuses_is_one_line(whole, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "bad")
    for call, code, word in (
        (["push", str(whole), "someone/digits", "--yes"], 1, "token"),
        (["push", str(whole), "no name", "--yes"], 2, "OWNER/NAME"),
        (["push", str(tmp_path), "someone/digits", "--yes"], 2, "no finished run"),
        (["predict", "hf-hub:someone/else", "x.png"], 1, "someone/else"),
        (["predict", "hf-hub:else", "x.png"], 2, "OWNER/NAME"),
    ):
        assert run_command(call) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert word in lines[0]
