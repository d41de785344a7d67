"""Exported files: they answer as the network does, say what they are, or are not there."""

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import regard
from regard.attention import record
from regard.data.sources import open_data
from regard.engines.conversion import Deployed, quiet
from regard.engines.formats import FORMATS, Onnx, OpenVino, Torch
from regard.engines.program import program, program_path
from regard.engines.standalone import _open_openvino
from regard.errors import ExportError, UsageError
from regard.export import _some, export, metadata
from tests.helpers import messages, run

pytestmark = pytest.mark.native

FILES = {"onnx": "net.onnx", "openvino": "net.xml", "torch": "net.pt2"}


@pytest.mark.parametrize("to", FILES)
def test_a_file_answers_as_the_network_and_shows_its_maps(whole, tmp_path, to):
    path = export(whole, to=to, out=tmp_path / FILES[to], maps=True)
    facts = FORMATS[to].metadata(path)
    assert facts["class_names"] == ["0", "1", "2"]
    assert facts["input_size"] == [1, 16, 16]
    assert facts["outputs"] == ["probabilities", "attention.gate3.map", "attention.gate4.map"]
    assert facts["precision"] == "fp32"
    classifier = regard.load(whole)
    answers = FORMATS[to].open(path)
    generator = torch.Generator().manual_seed(5)
    for count in (1, 2, 7):  # of any batch
        images = torch.rand(count, 1, 16, 16, generator=generator) * 255
        with record(classifier.model) as maps:
            expected = classifier.probabilities(images)
        found = answers(images)
        assert torch.allclose(found[0], expected, atol=1e-5)
        assert torch.allclose(found[0].sum(dim=1), torch.ones(count), atol=1e-5)
        for got, name in zip(found[1:], ("gate3.map", "gate4.map"), strict=True):
            assert torch.allclose(got, maps[name].spatial(), atol=1e-5)
    parts = {"openvino": ["net.bin", "net.xml"]}.get(to, [FILES[to]])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*parts, "net.py"])
    (tmp_path / "plain").write_text("")
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1  # as any file that this user writes


def test_a_file_in_bf16_answers_within_its_bound(whole, tmp_path):
    with messages() as said:
        path = export(whole, to="torch", out=tmp_path / "net.pt2", precision="bf16", maps=True)
    assert any("answers within" in line for line in said)
    assert Torch().metadata(path)["precision"] == "bf16"
    assert path.stat().st_size < 0.7 * export(
        whole, to="torch", out=tmp_path / "whole.pt2"
    ).stat().st_size  # fmt: skip
    images = torch.rand(5, 1, 16, 16) * 255
    found, *maps = Torch().open(path)(images)
    difference = (found - regard.load(whole).probabilities(images)).abs().max()
    assert found.dtype == torch.float32
    assert 0 < difference < 0.05
    assert {m.dtype for m in maps} == {torch.float32}
    for to, int8 in (("onnx", False), ("openvino", False), ("onnx", True)):
        with pytest.raises(UsageError, match="precision=bf16"):
            export(whole, to=to, out=tmp_path / FILES[to], precision="bf16", int8=int8)
    with pytest.raises(UsageError, match="precision='fp8'"):
        export(whole, to="torch", out=tmp_path / "x.pt2", precision="fp8")


def test_a_file_in_eight_bits_normalizes_each_image_in_fp32(whole, tmp_path):
    run, path = regard.load(whole), tmp_path / "net.xml"
    run.preprocess = replace(run.preprocess, normalization="image")
    deployed = Deployed(run.model, run.preprocess)
    OpenVino().write(path, deployed, metadata(run, deployed, "int8"))  # it says so, and is not
    rows, columns = torch.arange(16.0)[:, None], torch.arange(16.0)
    waves = [torch.sin(rows * k / 5) * torch.cos(columns * k / 4) / 2 for k in range(1, 9)]
    images = 200.3 + torch.stack(waves)[:, None]  # one gray level, as of a 16-bit file
    facts, by_program = _open_openvino(str(path))
    assert facts["precision"] == "int8"
    found = [OpenVino().open(path, "int8")(images)[0], torch.from_numpy(by_program(images.numpy()))]
    for answer in found:
        assert (answer - run.probabilities(images)).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_eight_bits_say_what_they_cost(whole, tmp_path, to, caplog):
    caplog.set_level("INFO", "regard")
    path = export(whole, to=to, out=tmp_path / FILES[to], int8=True, force=True)
    assert "INT8 on 24 validation images:" in caplog.text
    assert FORMATS[to].metadata(path)["precision"] == "int8"
    images = torch.rand(3, 1, 16, 16) * 255
    (answer,) = FORMATS[to].open(path)(images)
    assert torch.allclose(answer, regard.load(whole).probabilities(images), atol=0.2)


@pytest.mark.slow
def test_eight_bits_of_the_network_of_digits_answer_nearly_as_it_does(tmp_path):
    """In OpenVINO; to quantize for ONNX after it, in one process, ends that process."""
    to = "openvino"
    path = export("ag_sononet8.digits", to=to, out=tmp_path / FILES[to], data="digits", int8=True)
    classifier = regard.load("ag_sononet8.digits")
    images = _some(classifier, open_data("digits"), 1797)
    (answers,) = FORMATS[to].open(path, "int8")(images)
    assert (answers - classifier.probabilities(images)).abs().max() < 0.1


@pytest.mark.slow
def test_eight_bits_that_lose_too_much_are_not_kept(whole, tmp_path, monkeypatch):
    right = iter([np.ones(100), np.arange(100) >= 2] * 2)  # 2 points
    monkeypatch.setattr("regard.export._correct", lambda classifier, table: next(right))
    monkeypatch.setattr(Onnx, "quantize", lambda self, path, deployed, facts, images: None)
    monkeypatch.setattr(Onnx, "metadata", lambda self, path: Anything())
    out = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=r"98.00%, in fp32 100.00%, \+2.00 points lost"):
        export(whole, to="onnx", out=out, int8=True)
    assert list(tmp_path.iterdir()) == []
    assert export(whole, to="onnx", out=out, int8=True, force=True) == out


def test_a_library_that_logs_while_a_file_is_written_has_nothing_printed_twice(monkeypatch, capfd):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # as in a command, without pytest's own
    with quiet():
        logging.warning("of a library")  # adds a handler to the root where there is none
    assert root.handlers == []
    assert capfd.readouterr().err == ""


class Anything:
    def __ne__(self, other: object) -> bool:
        return False


def off_by_little(shares, *maps):
    return [shares * 0.999 + 0.001 / 3, *maps]  # the same class, 6e-4 off at most


WRONG = {
    "top-1 class": lambda shares, *maps: [shares.roll(1, dims=1), *maps],
    "probabilities": off_by_little,
    "the map gate4.map": lambda shares, a, b: [shares, a, b * 1.001],
    "the map gate3.map": lambda shares, a, b: [shares, a * float("nan"), b],
    "do not have the network's shapes": lambda shares, a, b: [shares, a],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_answers_otherwise_is_not_kept(whole, tmp_path, monkeypatch, what):
    opened = Torch.open

    def wrong(self, path, precision="fp32"):
        right = opened(self, path, precision)
        return lambda x: WRONG[what](*right(x))

    monkeypatch.setattr(Torch, "open", wrong)
    with pytest.raises(ExportError, match=f"{what}.*not kept"):
        export(whole, to="torch", out=tmp_path / "net.pt2", maps=True)
    assert list(tmp_path.iterdir()) == []


def test_wrong_calls_are_one_line(whole, tmp_path):
    out = tmp_path / "net.onnx"
    assert '"openvino"' in run("export", whole, "--to", "tflite", "--out", out, code=2)
    assert "ends in .xml" in run("export", whole, "--to", "openvino", "--out", out, code=2)
    assert "regard: --int8: only with --to onnx or --to openvino" in run(
        "export", whole, "--to", "torch", "--out", tmp_path / "a.pt2", "--int8", code=2
    )
    for name in ("net.onnx", "net.py"):
        mine = tmp_path / name
        mine.write_text("mine")
        assert "already exists" in run("export", whole, "--to", "onnx", "--out", out, code=2)
        assert [p.name for p in tmp_path.iterdir()] == [name]
        assert mine.read_text() == "mine"
        mine.unlink()
    for to, suffix in (("onnx", "onnx"), ("torch", "pt2")):
        with pytest.raises(UsageError, match=r"caf\\udce9.*not UTF-8"):
            export(whole, to=to, out=tmp_path / f"caf\udce9.{suffix}")
    assert [*tmp_path.iterdir()] == []
    os.mkfifo(out)
    assert "not a regular file" in run(
        "export", whole, "--to", "onnx", "--out", out, "--overwrite", code=2
    )


def test_a_link_is_followed_and_names_of_modules_are_not_taken(whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/torch.pt2").write_text("old")
    link = tmp_path / "net.pt2"
    link.symlink_to(tmp_path / "elsewhere/torch.pt2")
    with pytest.raises(UsageError, match="already exists"):
        export(whole, to="torch", out=link)
    export(whole, to="torch", out=link, overwrite=True)
    assert link.is_symlink()
    assert FORMATS["torch"].metadata(link)["class_names"] == ["0", "1", "2"]
    names = sorted(p.name for p in (tmp_path / "elsewhere").iterdir())
    assert names == ["torch.pt2", "torch_predict.py"]  # torch.py would hide torch


def test_the_command(whole, tmp_path):
    said = run("export", whole, "--to", "torch", "--out", tmp_path / "deep/net.pt2")
    assert "loaded again: 24 images alone and in batches, answers within" in said
    assert (tmp_path / "deep/net.pt2").stat().st_size > 100_000


def test_two_formats_of_one_name_have_two_programs(tmp_path):
    onnx, torch = tmp_path / "net.onnx", tmp_path / "net.pt2"
    assert program_path(torch) == tmp_path / "net.py"
    (tmp_path / "net.py").write_text(program(onnx), encoding="ascii")
    assert program_path(onnx) == tmp_path / "net.py"
    assert program_path(torch) == tmp_path / "net_pt2.py"
    (tmp_path / "net.py").write_text("MODEL = 'mine'", encoding="utf-8")
    assert program_path(torch) == tmp_path / "net.py"  # and refused, as it is there already
