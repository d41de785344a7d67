"""`regard explain`: the pictures, the numbers, and where a map lies on its image."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import regard
from regard.attention import StageMap, attention_stages, stage_of
from regard.data.preprocess import Preprocess, to_tensor
from regard.errors import UsageError
from regard.evaluation.calibration import Calibration, write_calibration
from regard.explanations.explanation import Explanation, explain_batch
from regard.predict import load, use_precision
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_command_on_photographs(tmp_path, photos, name):
    network = saved(tmp_path / "net", name, 64)
    out = tmp_path / "out"
    said = run("explain", network, photos, "--out", out, code=1)
    stages, array = NETWORKS[name]
    assert "broken.jpg: can't be read" in said
    names = {p.name for p in out.iterdir()}
    results = {
        f"{n}.explained.{kind}" for n in ("china.jpg", "flower.png") for kind in ("png", "npz")
    }
    assert names == results | {"contact-sheet.explained.png"}
    assert f"maps: {', '.join(stages)}, Grad-CAM" in said
    with np.load(out / "china.jpg.explained.npz") as numbers:
        assert array in numbers
        about = json.loads(str(numbers["about"]))
        assert about["classes"][0][0] in said
        assert sum(p for _, p in about["classes"]) == pytest.approx(1, abs=1e-5)
        # a square of the height, in the middle of 640: what the network saw
        np.testing.assert_allclose(numbers["box"], (106, 0, 533, 427), atol=1)
    for picture in (n for n in names if n.endswith(".png")):
        with Image.open(out / picture) as image:
            assert min(image.size) > 250
            assert np.ptp(np.asarray(image.convert("L"))) > 200


@pytest.mark.slow
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
        assert 0 <= found["pointing"][name]["energy"]["value"] <= 1
    rows = rows_of(out / "scores.csv")
    assert len(rows) == 12
    assert {row["class"] for row in rows} == {"cat"}
    for row in rows:
        marked = row["map"] in found["pointing"]
        assert (row["iou"] != "") == marked
        if marked:
            assert 0 <= float(row["iou"]) <= float(row["dice"]) <= 1
            assert 0 <= int(row["x0"]) < int(row["x1"]) <= 640
    for name, score in found["pointing"].items():
        mean = np.mean([float(row["iou"]) for row in rows if row["map"] == name])
        assert score["iou"]["value"] == pytest.approx(mean, abs=1e-5)
        assert found["pointing_by_class"]["cat"][name] == score
    with np.load(out / "curves.npz") as curves:
        deletion, insertion = curves["Grad-CAM"]
        assert deletion.shape == insertion.shape == (2, 21)
        told = found["scores"]["Grad-CAM"]["deletion"]["value"]
        assert np.trapezoid(deletion, dx=1 / 20, axis=1).mean() == pytest.approx(told)
    with np.load(out / "china.jpg.explained.npz") as numbers:
        about = json.loads(str(numbers["about"]))
        assert about["target"][0] == "cat"
        assert about["reduction"]["layer1.1.mask"] == "max of 64 channels"
        raw = numbers["raw/layer1.1.mask"]
        assert raw.shape == (64, 32, 32)
        np.testing.assert_array_equal(raw.max(axis=0), numbers["mixed/layer1.1.mask"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "dog"], "'dog': choose one of pagoda, flower, cat, $dog$"),
        (["--method", "lime"], "lime"),
        (["--baseline", "black"], "black"),
        (["--layer", "layer9"], "no such layer"),
        (["--reduce", "median"], "--reduce median: choose mean, max or a channel number"),
        (["--scor"], "unknown option --scor"),
        (["https://example.org/a.png"], "https://example.org/a.png is a URL"),
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
        (found,) = explain_batch(
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
    with pytest.raises(ValueError, match="choose mean, max or a channel number"):
        attention_stages(masks, 0, reduce="median")


def test_a_channel_that_no_map_has_is_refused():
    model = regard.create_model("cbam_resnet18").eval()
    with torch.no_grad(), regard.record(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    assert len(attention_stages(maps, 0, reduce=0)) == 8
    with pytest.raises(UsageError, match="reduce=1: the maps of this network have one channel"):
        attention_stages(maps, 0, reduce=1)


def test_what_is_shown_is_what_the_network_said():
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=3).eval()
    image = load_sample_images().images[0][..., 0].copy()
    preprocess = Preprocess((1, 64, 64), (0.5,), (0.25,))
    x = preprocess.normalize(preprocess.fit(to_tensor(image[..., None]))[None])
    classifier = regard.Classifier(model, ["a", "b", "c"], preprocess)
    (found,) = regard.explain(classifier, image, keep_channels=True)
    with torch.no_grad():
        p = model(x).softmax(dim=1)[0]
    assert dict(found.classes)["b"] == pytest.approx(float(p[1]), abs=1e-6)
    assert found.target[0] == "abc"[int(p.argmax())]
    assert found.figure().get_size_inches()[0] == pytest.approx(7.16)


@pytest.mark.parametrize("shape", [(427, 130), (427, 640), (120, 640), (8, 8), (10, 1810)])
def test_the_picture_can_be_read_whatever_the_images_shape(shape):
    values = np.linspace(0.4463, 0.5241, 49, dtype=np.float32).reshape(7, 7)
    maps = [StageMap(n, "spatial", values, "", n) for n in ("gate3", "gate4")]
    found = Explanation(
        path="a.png", image=np.zeros(shape, np.uint8), box=(0, 0, shape[1], shape[0]),
        classes=[("0", 0.9996), ("6", 0.0003)], target=("0", 0.9996), maps=maps,
    )  # fmt: skip
    fig = found.figure()
    fig.draw_without_rendering()
    assert all(0 < a.get_window_extent().height < 2000 for a in fig.axes)
    scales = [[t for t in axes.texts if "0." in t.get_text()] for axes in fig.axes]
    scales = [texts for texts in scales if texts]
    assert len(scales) == 2
    for texts in scales:
        boxes = sorted((t.get_window_extent() for t in texts), key=lambda b: b.x0)
        assert len(boxes) == 3
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    # "0 > 99.9 %" would read as a comparison
    lines = [t.get_text().replace("\u00a0", " ") for t in fig.texts]
    assert lines == ["a.png: 0 (> 99.9 %)", "then 6 (< 0.1 %)"]


@pytest.mark.parametrize("name", ["sononet8", "resnet18"])
def test_the_panels_of_a_grafted_network_say_whole_where_their_gates_are(name):
    model = regard.graft(regard.create_model(name, num_classes=3), regard.CBAM).eval()
    preprocess = Preprocess((1 if name == "sononet8" else 3, 64, 64), (0.5,), (0.25,))
    classifier = regard.Classifier(model, ["a", "b", "c"], preprocess)
    (found,) = regard.explain(classifier, load_sample_images().images[0])
    titles = {text.get_text() for axes in found.figure().axes for text in axes.texts}
    blocks = {f"block{k}.{n}.2" for k, n in enumerate((2, 3, 3, 2, 2), start=1)}
    stages = {f"layer{k}" for k in range(1, 5)}
    assert (blocks if name == "sononet8" else stages) <= titles
    assert not any("\u2026" in text for text in titles)


def test_one_line_of_python_explains_files_arrays_and_pil_images(tmp_path, photos):
    network = saved(tmp_path / "net", "ag_sononet8", 64)
    china, flower = photos / "china.jpg", photos / "flower.png"
    found = regard.explain(network, [china, flower])
    (alone,) = regard.explain(regard.load(network), np.asarray(Image.open(flower)))
    assert [e.path for e in found] == [str(china), str(flower)]
    assert alone.classes == found[1].classes
    np.testing.assert_array_equal(alone.maps[0].values, found[1].maps[0].values)
    for i, m in enumerate(found[0].maps):
        assert m.values.shape == found[1].maps[i].values.shape
    assert found[0]._repr_png_().startswith(b"\x89PNG")
    assert "data:image/png;base64," in found._repr_html_()
    with pytest.raises(ValueError, match="choose mean, max or a channel number"):
        regard.explain(network, china, reduce="median")
    with pytest.raises(ValueError, match="explain_batch"):
        regard.explain(regard.create_model("ag_sononet8"), china)


# ---- files -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A network that explains quickly."""
    return saved(tmp_path_factory.mktemp("small") / "net", "ag_sononet8", 16)


@pytest.fixture
def scene(tmp_path, monkeypatch) -> Path:
    """Images whose names invite mistakes, in the current folder."""
    rng = np.random.default_rng(0)
    for name in ("a/x.png", "b/x.png", "x.png", "x.bmp", "contact-sheet.png", "m/a/x.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24), np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: object) -> int:
    from regard.cli import run_command

    return run_command(["explain", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_each_image_has_a_figure_of_its_own_and_no_input_is_replaced(small, scene, capsys):
    before = contents(scene)
    images = ["a/x.png", "b/x.png", "x.png", "x.bmp", "contact-sheet.png"]
    # options in the middle
    assert command(small, *images[:2], "--out", ".", *images[2:]) == 0
    after = contents(scene)
    assert {name: after[name] for name in before} == before
    for name in images:
        with np.load(f"{name}.explained.npz") as numbers:
            assert json.loads(str(numbers["about"]))["path"] == name
    new = set(after) - set(before)
    assert len(new) == 11  # a figure and numbers each, and the sheet
    # results are no images: the folder holds as many as before, and a second call adds nothing
    capsys.readouterr()
    assert command(small, ".", "--out", ".") == 0
    assert set(contents(scene)) - set(after) == {
        "m/a/x.png.explained.png", "m/a/x.png.explained.npz",
    }  # fmt: skip
    assert "5 images unchanged" in capsys.readouterr().out


def test_a_file_that_is_not_ours_is_replaced_only_when_asked(small, scene, capsys):
    Path("x.png.explained.npz").write_text("mine", encoding="utf-8")
    before = contents(scene)
    assert command(small, "x.png", "a/x.png", "--out", ".") == 2
    assert "x.png.explained.npz" in capsys.readouterr().err
    assert contents(scene) == before  # refused before the work
    assert command(small, "x.png", "--out", ".", "--overwrite") == 0
    assert Path("x.png.explained.npz").read_bytes() != b"mine"
    shutil.copy("b/x.png", "x.png.explained.png")  # given as an image too
    before = contents(scene)
    more = ["--out", ".", "--overwrite"]
    assert command(small, "x.png", "x.png.explained.png", *more) == 2
    assert contents(scene) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_no_image_and_blocks_nothing(small, scene, capsys):
    os.mkfifo("pipe.png")
    os.symlink("missing.png", "link.png")
    assert command(small, "x.png", "pipe.png", "link.png", "--out", "o") == 1
    said = capsys.readouterr().err
    assert "pipe.png: is not a regular file" in said
    assert "link.png: no such file" in said


def test_scores_begin_at_the_probability_of_the_heading(small, scene, tmp_path, capsys):
    how = ["a/x.png", "b/x.png", "--method", "attention", "--score", "--out", "out"]
    network = shutil.copytree(small, tmp_path / "net")
    found = []
    for temperature in (1.0, 0.25, 0.5):
        write_calibration(network, Calibration(temperature, None, "val", 2, None, {}, {}, [], []))
        # scores at another temperature, also of a release that did not know it, are not used
        assert command(network, *how) == 0
        assert "unchanged" not in capsys.readouterr().out
        scores = json.loads(Path("out/scores.json").read_text(encoding="utf-8"))
        assert scores["temperature"] == temperature
        with np.load("out/curves.npz") as curves, np.load("out/a/x.png.explained.npz") as numbers:
            heading = json.loads(str(numbers["about"]))["classes"][0][1]
            assert curves["gate3.map"][0, 0, 0] == pytest.approx(heading, rel=1e-5)
        found.append(heading)
    assert found[1] > found[2] > found[0] + 0.01


@pytest.mark.slow
def test_a_second_call_goes_on_where_the_first_was_stopped(small, scene, capsys):
    images = ["a/x.png", "b/x.png", "x.bmp"]
    assert command(small, *images, "--out", "all", "--score") == 0
    capsys.readouterr()
    assert command(small, *images, "--out", "all", "--score") == 0
    assert "3 images unchanged" in capsys.readouterr().out
    whole = json.loads(Path("all/scores.json").read_text(encoding="utf-8"))
    Path("all/b/x.png.explained.npz").unlink()
    assert command(small, *images, "--out", "all", "--score") == 0
    assert "2 images unchanged" in capsys.readouterr().out
    assert (
        json.loads(Path("all/scores.json").read_text(encoding="utf-8")) == whole
    )  # to the last digit
    # other settings are other work
    assert command(small, *images, "--out", "all", "--score", "--seed", "1") == 0
    assert "unchanged" not in capsys.readouterr().out


def test_in_bf16_maps_and_answers_are_near_those_in_fp32_and_computed_anew(small, scene, capsys):
    found = {}
    for precision in ("fp32", "bf16"):
        capsys.readouterr()
        flags = ["--precision", precision, "--channels", "--score", "--out", "out"]
        assert command(small, "x.png", *flags) == 0
        assert "unchanged" not in capsys.readouterr().out
        with np.load("out/x.png.explained.npz") as numbers:
            found[precision] = {k: numbers[k] for k in numbers if numbers[k].dtype == np.float32}
            shares = json.loads(str(numbers["about"]))["classes"]
            found[precision]["answer"] = np.array([p for _, p in sorted(shares)])
    whole, narrow = found["fp32"], found["bf16"]
    assert list(whole) == list(narrow)
    maps = [name for name in whole if name.startswith("spatial/")]
    assert len(maps) == 2
    for name in (*maps, "answer"):
        assert 0 < np.abs(whole[name] - narrow[name]).max() < 0.05
    assert narrow["gradcam"].dtype == np.float32


def test_a_copy_computes_in_the_precision_of_its_network_and_goes_back(small):
    import copy

    model = load(small, precision="bf16").model
    kinds = []
    for each in (model, copy.deepcopy(model)):
        hook = next(m for m in each.modules() if isinstance(m, torch.nn.Conv2d))
        hook.register_forward_hook(lambda _, inputs, out: kinds.append(out.dtype))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    x = torch.rand(2, *load(small).preprocess.input_size)
    assert model(x).dtype == torch.float32
    assert kinds == [torch.bfloat16]
    assert not torch.equal(other(x), model(x))  # its own weights, not the network's
    use_precision(model, "fp32")
    model(x)
    assert kinds[-1] == torch.float32
    with pytest.raises(UsageError, match="precision='fp16'"):
        use_precision(model, "fp16")


def test_scores_of_one_image_have_no_interval(small, scene, capsys):
    assert command(small, "x.png", "--score") == 0
    assert "nan" not in capsys.readouterr().out
    found = json.loads(Path("explained/scores.json").read_text(encoding="utf-8"))
    assert found["scores"]["gate3.map"]["deletion"]["low"] is None
    assert found["sanity"]["gate3.map"]["between_images"] is None
    assert found["sanity"]["gate3.map"]["cells"] == [4, 4]


def test_standard_input_is_an_image(small, scene, monkeypatch):
    with open("x.png", "rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file, encoding="utf-8"))
        assert command(small, "-", "--out", "o") == 0
    with np.load("o/stdin.explained.npz") as numbers:
        assert json.loads(str(numbers["about"]))["path"] == "stdin"


# ---- masks -------------------------------------------------------------------------------
def mark(path: str, box: tuple[int, int, int, int] | None, size=(24, 20)) -> None:
    image = Image.new("L", size)
    if box is not None:
        image.paste(255, box)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def chances(folder: str) -> dict[str, float]:
    return json.loads(Path(folder, "scores.json").read_text(encoding="utf-8"))["pointing"]


def test_images_without_a_mask_are_told_in_one_line(small, scene, caplog):
    mark("k/a/x.png", (0, 0, 12, 20))
    shutil.copytree("b", "c")
    with caplog.at_level("WARNING"):
        assert command(small, "a", "b", "c", "--masks", "k", "--method", "attention") == 1
    (line,) = (m for m in caplog.messages if "not compared" in m)
    assert line == "b/x.png, c/x.png: not compared with a mask (k has no mask for it)"


def test_masks_are_matched_by_relative_paths(small, scene, capsys):
    mark("k/a/x.png", (0, 0, 12, 20))
    mark("k/b/x_mask.png", (0, 0, 6, 10))
    mark("k/b/x_mask_1.png", (6, 0, 12, 10))
    assert command(small, "a", "b", "--masks", "k", "--method", "attention") == 0
    found = chances("explained")["gate3.map"]
    assert found["images"] == 2
    scores = rows_of(Path("explained/scores.csv"))  # a row for each image and map
    assert sorted((row["path"], row["map"]) for row in scores) == [
        (path, f"{gate}.map") for path in ("a/x.png", "b/x.png") for gate in ("gate3", "gate4")
    ]
    assert found["chance"] == pytest.approx((0.5 + 0.25) / 2)
    # one mask for two images: which of them is meant?
    mark("j/x.png", (0, 0, 6, 10))
    before = contents(scene)
    assert command(small, "a", "b", "--masks", "j", "--out", "new") == 2
    assert "could be a/x.png, b/x.png" in capsys.readouterr().err
    assert contents(scene) == before
    assert command(small, "a", "--masks", "j", "--out", "new", "--method", "attention") == 0
    assert chances("new")["gate3.map"]["chance"] == pytest.approx(40 / 400)  # of the crop


def test_what_people_marked_is_outlined_and_drawn_anew_when_it_changes(
    small, scene, capsys, monkeypatch
):
    def drawn(*flags):
        capsys.readouterr()
        assert command(small, "a", "--method", "attention", *flags) == 0
        again = "unchanged" in capsys.readouterr().out
        return Path("explained/x.png.explained.png").read_bytes(), again

    mark("k/a/x.png", (0, 0, 12, 20))
    plain, _ = drawn()
    monkeypatch.setattr("regard.explanations.writing.explain_batch", None)  # maps are not anew
    marked, again = drawn("--masks", "k")
    assert (marked != plain, again) == (True, False)
    assert drawn("--masks", "k") == (marked, True)
    mark("k/a/x.png", (12, 0, 24, 20))
    other, again = drawn("--masks", "k")
    assert (other != marked, again) == (True, False)
    Path("boxes.csv").write_text("path,x0,y0,x1,y1\na/x.png,12,0,24,20\n", encoding="utf-8")
    assert drawn("--masks", "boxes.csv") == (other, False)
    assert drawn() == (plain, False)


NO_BOXES = [
    (None, "no box"), ("10,2,5,8", "larger than"), ("2,8,9,3", "larger than"),
    ("0.1,0.2,0.5,0.8", "fractions"), ("30,2,40,8", "nothing inside"),
    ("-9,2,-1,8", "outside the image"), ("1,2,inf,8", "not finite"),
    ("2.1,2,2.2,9", "no pixel"), ("0,0,2,20", "outside what the network saw"),
]  # fmt: skip


def test_boxes_that_mark_nothing_are_named_skipped_and_counted(small, scene, capsys):
    rows = ["path,x0,y0,x1,y1", "a/x.png,0,0,12,10"]
    reasons = {}
    for n, (row, reason) in enumerate(NO_BOXES):
        shutil.copytree("b", f"b{n}")
        rows += [f"b{n}/x.png,{row}"] * (row is not None)
        reasons[f"b{n}/x.png"] = reason
    Path("boxes.csv").write_text("\n".join(rows), encoding="utf-8")
    folders = [f"b{n}" for n in range(len(NO_BOXES))]
    assert command(small, "a", *folders, "--masks", "boxes.csv", "--method", "attention") == 1
    *_, count = said = capsys.readouterr().err.splitlines()
    assert f"{len(NO_BOXES)} images" in count
    found = json.loads(Path("explained/scores.json").read_text(encoding="utf-8"))
    assert sorted(found["skipped_masks"]) == list(reasons)
    for name, reason in reasons.items():
        assert [reason in line for line in said if name in line] == [True]
        assert reason in found["skipped_masks"][name]
    assert found["pointing"]["gate3.map"]["images"] == 1
    assert found["pointing"]["gate3.map"]["chance"] == pytest.approx(0.25)
    rows = rows_of(Path("explained/scores.csv"))
    assert {(row["path"], row["in_view"]) for row in rows} == {("a/x.png", "0.833333")}


def test_the_reasons_are_written_where_no_mask_can_be_used(small, scene):
    Path("boxes.csv").write_text("path,x0,y0,x1,y1\na/x.png,0,0,2,20\n", encoding="utf-8")
    assert command(small, "a", "--masks", "boxes.csv", "--method", "attention") == 1
    found = json.loads(Path("explained/scores.json").read_text(encoding="utf-8"))
    assert found["images"] == 1
    assert found["pointing"] == {}
    assert "outside what the network saw" in found["skipped_masks"]["x.png"]


def test_mask_images_that_mark_nothing_are_named_skipped_and_counted(small, scene, capsys):
    mark("k/a/x.png", (0, 0, 12, 20))
    mark("k/b/x.png", None)
    mark("k/c.png", (0, 0, 5, 5))
    Path("c.png").write_bytes(Path("x.png").read_bytes())
    Path("k/c.png").write_bytes(b"\x89PNG no more")
    mark("k/x.png", (0, 0, 5, 5), size=(5, 5))
    images = ["a/x.png", "b/x.png", "c.png", "x.png"]
    assert command(small, *images, "--masks", "k", "--method", "attention") == 1
    found = json.loads(Path("explained/scores.json").read_text(encoding="utf-8"))
    reasons = found["skipped_masks"]
    assert set(reasons) == {"b/x.png", "c.png", "x.png"}
    assert "marks nothing" in reasons["b/x.png"]
    assert "k/c.png" in reasons["c.png"]
    assert "5x5" in reasons["x.png"]
    assert found["pointing"]["gate3.map"]["images"] == 1
    assert "3 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,x0,y0\n", "lacks the columns x1, y1"), ("path;x0;y0;x1;y1\n", "lacks the columns"),
        ("path,x0,y0,x1,y1\na/x.png,1,2,3,four\n", "line 2"),
        ("path,x0,y0,x1,y1\n,1,2,3,4\n", "line 2"),
        ("path,x0,y0,x1,y1\nelse.png,1,2,3,4\n", "no image has a usable one"),
        ("path,x0,y0,x1,y1,group\na/x.png,1,2,3,4,p\nb/x.png,1,2,3,4, \n", "line 3: group"),
        ("path,x0,y0,x1,y1,group\na/x.png,1,2,3,4,p\na/x.png,1,2,3,4,q\n", "line 3: a/x.png"),
        ('path,x0,y0,x1,y1\na/x.png,1,2,3,4\n"a/y.png,1,2,3,4\n', "line 3: is not CSV"),
        (b"\xff\xfe\x00p", "not a CSV file"), (None, "no such file or folder"),
    ],
)  # fmt: skip
def test_a_table_of_boxes_that_can_not_be_used_is_an_error_before_the_work(
    small, scene, text, message, capsys
):
    if text is not None:
        Path("boxes.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert command(small, "a", "--masks", "boxes.csv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("explained").exists()


@pytest.mark.parametrize(("shape", "resize", "frame"), [
    ((40, 120), "crop", (40, 80, 0, 40)), ((120, 40), "crop", (0, 40, 40, 80)),
    ((40, 120), "pad", None), ((40, 120), "squash", None), ((40, 40), "crop", None),
])  # fmt: skip
def test_the_frame_is_around_what_was_seen_and_only_of_a_part(shape, resize, frame):
    preprocess = Preprocess((3, 64, 64), (0.0,) * 3, (1.0,) * 3, resize=resize)
    shown = Explanation(
        path="a.png", image=np.zeros(shape, np.uint8), box=preprocess.seen(*shape),
        classes=[("0", 1.0)], target=("0", 1.0), maps=[],
    )  # fmt: skip
    axes = shown.figure().axes[0]
    if frame is None:
        assert not axes.lines
        return
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    for line in axes.lines:
        x = (line.get_xdata() - x0) / (x1 - x0) * shape[1]
        y = (line.get_ydata() - y0) / (y1 - y0) * shape[0]
        assert (min(x), max(x), min(y), max(y)) == pytest.approx(frame)
        assert not line.get_clip_on()


def test_an_image_without_a_finite_answer_is_named_and_the_others_are_explained(
    small, scene, monkeypatch, capsys
):
    from regard.models.sononet import AGSonoNet

    forward = AGSonoNet.forward

    def forward_of(model, x):
        return forward(model, x) + torch.where(x.mean() > 1, torch.nan, 0.0)

    monkeypatch.setattr(AGSonoNet, "forward", forward_of)
    Image.new("L", (24, 20), 255).save("a/white.png")
    Image.new("L", (24, 20), 0).save("a/x.png")
    with pytest.raises(ValueError, match=r"white\.png: its answer is not finite"):
        regard.explain(small, "a/white.png")
    assert command(small, "a") == 1
    said = capsys.readouterr()
    assert "white.png: its answer is not finite" in said.err
    assert Path("explained/x.png.explained.npz").is_file()
    assert not Path("explained/white.png.explained.npz").exists()
