"""`regard convert`: every kind of file and network, and what is left behind when it fails."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import regard
from regard.cli import run_command
from regard.data.table import ImageTable
from regard.models.original_weights import arguments_of, authors_names
from regard.run_data import _named
from tests.golden import authors_networks, authors_outputs, fill

NETWORKS = authors_networks()


def tensors_of(name: str) -> dict[str, Tensor]:
    return {n: torch.from_numpy(fill(n, s)) for n, s in NETWORKS[name]["tensors"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("authors") / "ag.pth"
    torch.save(tensors_of("ag_sononet8_concat"), path)
    return path


def refused(capsys, *arguments: object, code: int = 2) -> str:
    assert run_command(["convert", *map(str, arguments)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("regard: ")
    return line


@pytest.mark.parametrize(
    ("name", "network", "suffix"),
    [
        ("ag_sononet8_deep_sup", "ag_sononet8", ".npz"),
        ("ag_sononet8_ft", "ag_sononet8", ".safetensors"),
        ("sononet8", "sononet8", ".pth"),
        ("cbam_resnet18", "cbam_resnet18", ".pth"),
    ],
)
@torch.no_grad()
def test_the_folder_answers_as_the_authors_network(tmp_path, capsys, name, network, suffix):
    tensors, source = tensors_of(name), tmp_path / f"theirs{suffix}"
    if suffix == ".npz":
        np.savez(source, **{key: value.numpy() for key, value in tensors.items()})
    elif suffix == ".safetensors":
        save_file(tensors, source)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}}, source)
    before = source.read_bytes()
    assert run_command(["convert", str(source), "--model", network, "--out", f"{tmp_path}/o"]) == 0
    assert f"{len(tensors)} tensors" in capsys.readouterr().out
    loaded = timm.create_model(f"local-dir:{tmp_path}/o", pretrained=True).eval()
    direct = regard.create_model(network, **dict(loaded._model_args)).eval()
    regard.load_authors_weights(direct, tensors)
    x = torch.from_numpy(fill("input", NETWORKS[name]["input"]))
    ours = loaded(x)
    assert torch.equal(ours, direct(x))
    theirs = authors_outputs()[f"{name}/0"]
    assert np.linalg.norm(ours.numpy() - theirs) / np.linalg.norm(theirs) < 1e-5
    assert source.read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_images_are_standardized_as_the_authors_do(tmp_path, capsys, checkpoint):
    """SonoNet's images each by their own values: contrast and brightness change no answer."""
    out = tmp_path / "o"
    assert (
        run_command(["convert", str(checkpoint), "--model", "ag_sononet8", "--out", str(out)]) == 0
    )
    assert "own mean and deviation" in capsys.readouterr().out
    image = np.random.default_rng(0).random((208, 272)) * 0.5
    arguments = arguments_of("ag_sononet8", tensors_of("ag_sononet8_concat"))
    classes = [str(c) for c in range(arguments["num_classes"])]
    table = ImageTable("a", classes, np.zeros(1, np.int64), np.full(1, ""))
    for network in (regard.load(out), _named("ag_sononet8", table, checkpoint)):
        assert network.preprocess.normalization == "image"
        first, second = network.predict([image, image * 0.5 + 0.3], top=3)
        assert [name for name, _ in first.classes] == [name for name, _ in second.classes]
        shares = [[p for _, p in answer.classes] for answer in (first, second)]
        assert shares[0] == pytest.approx(shares[1], abs=1e-4)


def test_a_checkpoint_of_other_classes_is_not_tested_with_a_random_classifier(checkpoint):
    table = ImageTable("a", ["x", "y"], np.zeros(1, np.int64), np.full(1, ""))
    with pytest.raises(ValueError, match=r"is of a network of 14 classes, but a has 2$"):
        _named("ag_sononet8", table, checkpoint)


def test_an_argument_that_the_weights_do_not_show_is_given_by_hand(tmp_path, checkpoint):
    out = tmp_path / "new" / "folder"  # made with its parents
    call = ["convert", str(checkpoint), "--model", "ag_sononet8", "--out", str(out)]
    assert run_command([*call, "--arg", "normalize=sigmoid"]) == 0
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert loaded._model_args["normalize"] == "sigmoid"
    assert run_command(call) == 2  # it is there already


def test_an_empty_folder_is_as_good_as_a_new_one(tmp_path, checkpoint):
    call = ["convert", str(checkpoint), "--model", "ag_sononet8", "--out", str(tmp_path / "o")]
    (tmp_path / "o").mkdir()
    assert run_command(call) == 0
    assert timm.create_model(f"local-dir:{tmp_path}/o", pretrained=True).num_classes == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arg", "aggregation"], "--arg aggregation: give NAME=VALUE"),
        (["--arg", "a b=1"], "--arg a b=1: give NAME=VALUE"),
        (["--arg", "bogus=1"], "bogus"),
        (["--arg", "num_classes=many"], "num_classes='many'"),
        (["--arg", "num_classes=3"], r"shape of classifier.weight: .*the network's is \(3, 160\)"),
        (["--model", "cbam_resnet18"], r"missing: .*layer1.* and \d+ more; extra: .* and \d+ more"),
        (["--model", "attention56_cifar"], "no definition of the CIFAR networks"),
        (["--model", "ag_sonont8"], "no network is called 'ag_sonont8'; did you mean ag_sononet8"),
        (["--model", "vit_tiny_patch16_224"], "no checkpoint layout for VisionTransformer"),
    ],
)
def test_a_wrong_call_writes_nothing(tmp_path, capsys, checkpoint, arguments, message):
    if "--model" not in arguments:
        arguments = ["--model", "ag_sononet8", *arguments]
    line = refused(capsys, checkpoint, "--out", tmp_path / "o", *arguments)
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_can_not_be(tmp_path, capsys, checkpoint):
    call = (checkpoint, "--model", "ag_sononet8", "--out")
    (tmp_path / "file").write_text("mine")
    assert "already exists" in refused(capsys, *call, tmp_path / "file")
    assert str(tmp_path / "file") in refused(capsys, *call, tmp_path / "file" / "o", code=1)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path, checkpoint):
    """A process that may write no more than 100 kB a file; the weights are 700 kB."""
    done = subprocess.run(
        [sys.executable, "-m", "regard", "convert", checkpoint, "--model", "ag_sononet8",
         "--out", tmp_path / "o"],
        capture_output=True, text=True, timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("regard: ")
    assert "weights can't be written" in line
    assert "too large" in line
    assert list(tmp_path.iterdir()) == []


NAMES = [f"plane {k} é" for k in range(14)]


@pytest.mark.parametrize(
    "text",
    ["\n".join(NAMES), "\ufeff" + "\r\n".join(NAMES) + "\r\n\n", json.dumps(NAMES, indent=1)],
)
def test_class_names_from_a_file(tmp_path, checkpoint, text):
    (tmp_path / "names").write_bytes(text.encode())
    call = ["convert", str(checkpoint), "--model", "ag_sononet8", "--out", str(tmp_path / "o")]
    assert run_command([*call, "--classes", str(tmp_path / "names")]) == 0
    assert regard.load(tmp_path / "o").class_names == NAMES


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a\nb", "14 classes"),
        ("\n".join([*NAMES[:13], NAMES[0]]).encode(), "plane 0"),
        ("\n\n".join(NAMES).encode(), "class 2"),
        (json.dumps([*NAMES[:13], 7]).encode(), "class 14 is 7"),
        (b"[1, 2", "JSON"),
        (b"caf\xe9\nb", "UTF-8"),
        (b"", "class 1"),
        (None, "names"),
    ],
)
def test_wrong_class_names_write_nothing(tmp_path, capsys, checkpoint, content, word):
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    line = refused(
        capsys, checkpoint, "--model", "ag_sononet8", "--out", tmp_path / "o",
        "--classes", tmp_path / "names",
    )  # fmt: skip
    assert word in line
    assert not (tmp_path / "o").exists()


def test_evaluating_a_checkpoint_sees_the_same_arguments_as_converting_it(tmp_path, capsys):
    """Classes, color, aggregation and convolutions: none is the name's own."""
    theirs = tmp_path / "theirs.pth"
    made = regard.create_model(
        "ag_sononet8", num_classes=3, in_chans=3, aggregation="ft", convs=(1, 2, 2, 1, 1)
    )
    names = authors_names(made)
    torch.save({names[k]: v for k, v in made.state_dict().items() if k in names}, theirs)
    for label in ("a", "b", "c"):
        (tmp_path / "data" / label).mkdir(parents=True)
        pixels = np.random.default_rng(ord(label)).integers(0, 256, (208, 272, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / label / "x.png")
    call = ["evaluate", "ag_sononet8", str(tmp_path / "data"), "--weights", str(theirs), "--json"]
    assert run_command(call) == 0
    direct = json.loads(capsys.readouterr().out)
    (tmp_path / "names").write_text("a\nb\nc\n")
    call = ["convert", str(theirs), "--model", "ag_sononet8", "--out", str(tmp_path / "o")]
    assert run_command([*call, "--classes", str(tmp_path / "names")]) == 0
    loaded = regard.load(tmp_path / "o").model
    assert loaded._model_args["aggregation"] == "ft"
    assert list(loaded._model_args["convs"]) == [1, 2, 2, 1, 1]
    capsys.readouterr()
    assert run_command(["evaluate", str(tmp_path / "o"), str(tmp_path / "data"), "--json"]) == 0
    converted = json.loads(capsys.readouterr().out)
    assert converted["metrics"] == direct["metrics"]
    # a plain ResNet of timm's, whose gray input and classes the checkpoint shows as well
    plain = timm.create_model("resnet18", num_classes=3, in_chans=1)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    call = ["evaluate", "resnet18", str(tmp_path / "data"), "--weights", f"{tmp_path}/plain.pth"]
    assert run_command(call) == 0
