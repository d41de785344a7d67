"""`regard explain`: the pictures, the numbers, and where a map lies on its image."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import regard
from regard.attention import StageMap, attention_stages, stage_of
from regard.data.preprocess import Preprocess, to_tensor
from regard.explanations.explanation import Explanation, explain
from tests.helpers import rows_of, run


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two photographs of 427x640, one of them upright, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    china, flower = load_sample_images().images
    Image.fromarray(china).save(folder / "china.jpg", quality=95)
    Image.fromarray(np.rot90(flower).copy()).save(folder / "flower.png")
    (folder / "broken.jpg").write_bytes((folder / "china.jpg").read_bytes()[:5000])
    return folder


def saved(folder: Path, name: str, size: int, **arguments) -> Path:
    torch.manual_seed(0)
    model = regard.create_model(name, num_classes=4, **arguments)
    channels = model.in_chans if hasattr(model, "in_chans") else 3
    preprocess = Preprocess((channels, size, size), (0.45,) * channels, (0.25,) * channels)
    names = ["pagoda", "flower", "cat", "$dog$"]
    return regard.save_model(model, folder, class_names=names, data_config=preprocess.data_config())


NETWORKS = {
    "cbam_resnet18": (["layer1", "layer2", "layer3", "layer4"], "channel/layer1.0.se.channel"),
    "attention56_cifar": (
        ["layer1.1.mask", "layer2.1.mask", "layer3.1.mask"], "mixed/layer2.1.mask",
    ),
    "ag_sononet8": (["gate3.map", "gate4.map"], "spatial/gate3.map"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_command_on_photographs(tmp_path, photos, name):
    network = saved(tmp_path / "net", name, 64)
    out = tmp_path / "out"
    said = run("explain", network, photos, "--out", out, code=1)
    stages, array = NETWORKS[name]
    assert "broken.jpg: can't be read" in said
    names = {p.name for p in out.iterdir()}
    assert names == {"china.png", "china.npz", "flower.png", "flower.npz", "contact-sheet.png"}
    assert f"maps: {', '.join(stages)}, Grad-CAM" in said
    with np.load(out / "china.npz") as numbers:
        assert array in numbers
        about = json.loads(str(numbers["about"]))
        assert about["classes"][0][0] in said
        assert sum(p for _, p in about["classes"]) == pytest.approx(1, abs=1e-5)
        # a square of the height, in the middle of 640: what the network saw
        np.testing.assert_allclose(numbers["box"], (106, 0, 533, 427), atol=1)
    for picture in ("china.png", "flower.png", "contact-sheet.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 250
            assert np.ptp(np.asarray(image.convert("L"))) > 200


def test_scores_masks_and_choices(tmp_path, photos):
    network = saved(tmp_path / "net", "attention56_cifar", 32)
    out = tmp_path / "out"
    (tmp_path / "boxes.csv").write_text(
        "path,x0,y0,x1,y1\nchina.jpg,100,0,400,427\nflower.png,0,0,200,200\n"
    )
    said = run(
        "explain", network, photos / "china.jpg", photos / "flower.png", "--out", out, "--score",
        "--masks", tmp_path / "boxes.csv", "--reduce", "max", "--target", "cat", "--channels",
    )  # fmt: skip
    found = json.loads((out / "scores.json").read_text())
    assert set(found["scores"]) == {
        "layer1.1.mask", "layer2.1.mask", "layer3.1.mask", "Grad-CAM", "random", "center blob",
    }  # fmt: skip
    for name in ("layer1.1.mask", "Grad-CAM"):
        assert found["scores"][name]["verdict"] in said
        assert 0 <= found["pointing"][name]["energy"] <= 1
    assert len(rows_of(out / "scores.csv")) == 12
    with np.load(out / "curves.npz") as curves:
        deletion, insertion = curves["Grad-CAM"]
        assert deletion.shape == insertion.shape == (2, 21)
        told = found["scores"]["Grad-CAM"]["deletion"]["value"]
        assert np.trapezoid(deletion, dx=1 / 20, axis=1).mean() == pytest.approx(told)
    with np.load(out / "china.npz") as numbers:
        about = json.loads(str(numbers["about"]))
        assert about["target"][0] == "cat"
        assert about["reduction"]["layer1.1.mask"] == "max of 64 channels"
        raw = numbers["raw/layer1.1.mask"]
        assert raw.shape == (64, 32, 32)
        np.testing.assert_array_equal(raw.max(axis=0), numbers["mixed/layer1.1.mask"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "dog"], "--target dog: choose one of pagoda, flower, cat, $dog$"),
        (["--method", "lime"], "'lime' is none of attention, gradcam"),
        (["--layer", "layer9"], "no such layer"),
        (["--reduce", "median"], "choose mean, max or a channel's number"),
        (["--reduce", "64"], "channels 0 to 63"),
    ],
)
def test_wrong_choices_are_told(tmp_path, photos, arguments, message, capsys, monkeypatch):
    from regard.cli import run_command

    monkeypatch.chdir(tmp_path)
    network = saved(tmp_path / "net", "attention56_cifar", 32)
    assert run_command(["explain", str(network), str(photos / "china.jpg"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_maps_lie_on_the_part_of_the_image_that_was_seen():
    """A bright dot far right of a wide image: the map of what is bright must be on the dot."""

    class Bright(torch.nn.Module):
        attention_kind = "spatial"

        def forward(self, x):
            return torch.nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 4)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.look = Bright()

        def forward(self, x):
            return torch.stack([self.look(x).mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    for shape, resize, dot in (
        ((40, 120), "crop", (20, 75)),
        ((40, 120), "pad", (20, 110)),
        ((120, 40), "squash", (100, 8)),
    ):
        image = np.full((*shape, 3), 30, np.uint8)
        image[dot[0] - 3 : dot[0] + 3, dot[1] - 3 : dot[1] + 3] = 250
        preprocess = Preprocess((3, 64, 64), (0.0,) * 3, (1.0,) * 3, resize=resize)
        x = preprocess(image)[None]
        (found,) = explain(
            Net(), x, [image], [preprocess.seen(*shape)], classes=["a", "b"], methods=["attention"]
        )
        laid = found.overlay("look").astype(int)
        color = laid[..., 1] - laid[..., 2]  # yellow and green against gray
        peak = np.unravel_index(color.argmax(), color.shape)
        assert laid.shape[:2] == shape
        assert abs(peak[0] - dot[0]) <= 5, resize
        assert abs(peak[1] - dot[1]) <= 5, resize


def test_stages_and_reductions():
    assert stage_of("layer1.0.se.spatial") == "layer1"
    assert stage_of("gate3.map") == "gate3"
    torch.manual_seed(0)
    model = regard.create_model("cbam_resnet18", num_classes=3).eval()
    with torch.no_grad(), regard.record(model) as maps:
        model(torch.randn(2, 3, 64, 64))
    stages = attention_stages(maps, 1)
    spatial = next(m for m in stages if m.stage == "layer2" and m.kind == "spatial")
    each = [maps[f"layer2.{i}.se.spatial"].values[1, 0].numpy() for i in (0, 1)]
    np.testing.assert_allclose(spatial.values, np.mean(each, axis=0), atol=1e-6)
    assert spatial.reduction == "mean of 2 blocks"
    model = regard.create_model("attention56_cifar").eval()
    with torch.no_grad(), regard.record(model) as masks:
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="choose mean, max or a channel's number"):
        attention_stages(masks, 0, reduce="median")


def test_what_is_shown_is_what_the_network_said():
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=3).eval()
    image = load_sample_images().images[0][..., 0].copy()
    preprocess = Preprocess((1, 64, 64), (0.5,), (0.25,))
    x = preprocess.normalize(preprocess.fit(to_tensor(image[..., None]))[None])
    (found,) = regard.explain(model, x, [image], classes=["a", "b", "c"], keep_channels=True)
    with torch.no_grad():
        p = model(x).softmax(dim=1)[0]
    assert dict(found.classes)["b"] == pytest.approx(float(p[1]), abs=1e-6)
    assert found.target[0] == "abc"[int(p.argmax())]
    assert found.figure().get_size_inches()[0] == pytest.approx(7.16)


@pytest.mark.parametrize("shape", [(427, 130), (427, 640), (120, 640), (8, 8)])
def test_the_picture_can_be_read_whatever_the_images_shape(shape):
    values = np.linspace(0.4463, 0.5241, 49, dtype=np.float32).reshape(7, 7)
    maps = [StageMap(n, "spatial", values, "", n) for n in ("gate3", "gate4")]
    found = Explanation(
        path="a.png", image=np.zeros(shape, np.uint8), box=(0, 0, shape[1], shape[0]),
        classes=[("0", 0.9996), ("6", 0.0003)], target=("0", 0.9996), maps=maps,
    )  # fmt: skip
    fig = found.figure()
    fig.draw_without_rendering()
    scales = [[t for t in axes.texts if "0." in t.get_text()] for axes in fig.axes]
    scales = [texts for texts in scales if texts]
    assert len(scales) == 2
    for texts in scales:
        boxes = sorted((t.get_window_extent() for t in texts), key=lambda b: b.x0)
        assert len(boxes) == 3
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    # "0 > 99.9 %" would read as a comparison
    assert [t.get_text() for t in fig.texts] == ["a.png: 0 (> 99.9 %)", "then 6 (< 0.1 %)"]
