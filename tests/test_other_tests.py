"""`regard evaluate --size --ten-crop`: the test of a network at another size, of ten views."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import TenCrop as TorchvisionTenCrop
from torchvision.transforms.v2.functional import resize

import regard
from regard.cli import run_command
from regard.data.preprocess import Preprocess, TenCrop
from regard.errors import UsageError
from regard.models.io import save_model
from regard.runs import RunFolder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)


def noise(height, width):
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    )


@pytest.mark.parametrize("shape", [(90, 131), (131, 90), (64, 64), (40, 47)])
@pytest.mark.parametrize("size", [(56, 56), (48, 64)])
def test_ten_crops_are_torchvisions(shape, size):
    preprocess = Preprocess((3, *size), MEAN, STD, crop_pct=0.875, resize_first=True)
    image = noise(*shape)
    views = TenCrop.of(preprocess).fit(image)
    scale = max(size[0] / shape[0], size[1] / shape[1]) / 0.875
    if size[0] == size[1]:  # Resize(int) is of the shorter side
        resized = resize(image, [int(size[0] / 0.875)], antialias=True)
    else:
        resized = preprocess._resized(image)
        assert abs(resized.shape[-2] - shape[0] * scale) <= 2
        assert abs(resized.shape[-1] - shape[1] * scale) <= 2
    expected = torch.stack(TorchvisionTenCrop(size)(resized))
    assert views.shape == (10, 3, *size) == TenCrop.of(preprocess).shape
    assert (views.int() - expected.int()).abs().max() <= 1
    # the center, as the test of one crop has it
    assert (views[4].int() - preprocess.fit(image).int()).abs().max() <= 1


def test_a_long_strip_has_ten_views_without_being_enlarged_whole():
    preprocess = TenCrop((3, 32, 32), MEAN, STD, crop_pct=0.5)
    image = torch.zeros(3, 8, 4000, dtype=torch.uint8)
    image[..., 2000:] = 200
    views = preprocess.fit(image)
    assert views.shape == (10, 3, 32, 32)
    assert [int(v.float().mean().round()) for v in views[[0, 1, 2, 3]]] == [0, 200, 0, 200]
    assert torch.equal(views[5:], views[:5].flip(-1))


def test_another_size_keeps_the_rest_of_the_preprocessing():
    preprocess = Preprocess((1, 32, 32), (0.5,), (0.2,), crop_pct=0.8, value_range=(-5.0, 9.0))
    other = preprocess.at_size(40, 48)
    assert other.size == (40, 48)
    assert (other.crop_pct, other.mean, other.value_range) == (0.8, (0.5,), (-5.0, 9.0))
    # the part of the image that is seen stays the same
    assert preprocess.at_size(64, 64).box(100, 150) == preprocess.box(100, 150)
    with pytest.raises(UsageError, match="squash"):
        TenCrop((1, 32, 32), (0.5,), (0.2,), resize="squash")


@torch.no_grad()
def test_the_command_tests_at_that_size_and_keeps_the_runs_own_file(whole, tmp_path, capsys):
    before = (whole / "predictions.npz").read_bytes()
    file = tmp_path / "p.npz"
    call = ["evaluate", str(whole), "--size", "24", "32", "--ten-crop", "--predictions", str(file)]
    assert run_command([*call, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["size"], content["ten_crop"]) == ([24, 32], True)
    (tmp_path / "copy").symlink_to(whole)
    split, said = RunFolder(tmp_path).read_predictions("p.npz")
    own_split, own = RunFolder(whole).read_predictions()
    assert (split, said.paths, said.labels.tolist()) == (own_split, own.paths, own.labels.tolist())
    assert (whole / "predictions.npz").read_bytes() == before
    # by hand: the mean of the softmaxes of ten crops of the first image
    classifier = regard.load(whole)
    preprocess = TenCrop.of(classifier.preprocess.at_size(24, 32))
    image = torch.from_numpy(np.array(Image.open(said.paths[0]).convert("L")))[None]
    logits = classifier.model(preprocess.normalize(preprocess.fit(image)))
    np.testing.assert_allclose(said.probabilities[0], logits.softmax(1).mean(0), atol=1e-5)
    assert run_command(call) == 2  # the file is there
    assert "p.npz" in capsys.readouterr().err
    assert run_command(["evaluate", str(whole), "--size", "24"]) == 0
    assert "24x24" in capsys.readouterr().out


@torch.no_grad()
def test_the_center_that_is_tested_is_chosen_by_crop_pct(whole, tmp_path, capsys):
    file = tmp_path / "p.npz"
    call = ["evaluate", str(whole), "--crop-pct", "0.75", "--predictions", str(file)]
    assert run_command(call) == 0
    assert "keeps 0.75 of the shorter side" in capsys.readouterr().out
    said = RunFolder(tmp_path).read_predictions("p.npz")[1]
    classifier = regard.load(whole)
    image = torch.from_numpy(np.array(Image.open(said.paths[0]).convert("L")))[None]
    low, high = (round(side / 8) for side in (image.shape[1], 7 * image.shape[1]))
    center = image[:, low:high, low:high]  # of a square image
    logits = classifier.model(classifier.preprocess.normalize(classifier.preprocess.fit(center)))
    np.testing.assert_allclose(said.probabilities[0], logits.softmax(1)[0], atol=1e-5)
    assert run_command(["evaluate", str(whole), "--crop-pct", "0.75", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["crop_pct"] == 0.75


def test_images_that_are_not_cropped_have_no_crop_pct(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    text = file.read_text("utf-8")
    assert text.count('"center"') == 1
    file.write_text(text.replace('"center"', '"squash"'), "utf-8")
    assert regard.load(tmp_path / "run").preprocess.resize == "squash"
    assert run_command(["evaluate", str(tmp_path / "run"), "--crop-pct", "0.9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0.9" in line
    assert "squash" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--size", "8"], "16x16"),
        (["--crop-pct", "0"], "--crop-pct"),
        (["--size", "24", "24", "24"], "height and width"),
        (["--size", "2"], "--size"),
        (["--predictions", "p.csv"], ".npz"),
        (["--predictions", "nowhere/p.npz"], "folder"),
    ],
)
def test_what_can_not_be_is_refused_in_a_sentence(whole, capsys, arguments, word):
    assert run_command(["evaluate", str(whole), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


def test_a_network_of_one_size_refuses_others(tmp_path, scans, capsys):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
    save_model(model, tmp_path / "vit", class_names=["0", "1", "2"])
    call = ["evaluate", str(tmp_path / "vit"), str(scans)]
    assert run_command([*call, "--size", "48"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "vit_tiny_patch16_224" in line
    assert "48x48" in line
