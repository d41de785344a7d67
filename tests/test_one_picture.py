"""One picture, one answer: by its path, bytes, file, PIL image, array and tensor, to the bit."""

import io
import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

import regard
from regard.data.images import read_image
from regard.data.preprocess import Preprocess
from regard.ensemble import Ensemble
from regard.errors import ImageError
from regard.predict import Classifier

PHOTO = load_sample_image("flower.jpg")  # (427, 640, 3)
SMALL = np.ascontiguousarray(PHOTO[100:140, 200:260])  # (40, 60, 3)
_FILE = io.BytesIO()
Image.fromarray(SMALL).save(_FILE, "JPEG")
JPEG = _FILE.getvalue()
GRAY16 = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27 + 3


class Linear(torch.nn.Module):
    """Shows every change of its input: random weights of all pixels."""

    def __init__(self, size):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(math.prod(size), 5)

    def forward(self, x):
        return self.layer(x.flatten(1))


def classifier(channels=3, value_range=None, side=32) -> Classifier:
    preprocess = Preprocess(
        (channels, side, side), (0.4,) * channels, (0.2,) * channels, value_range=value_range
    )
    return Classifier(Linear(preprocess.input_size), list("abcde"), preprocess)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def alpha(gray: bool) -> Image.Image:
    image = Image.fromarray(SMALL[..., 0] if gray else SMALL)
    image.putalpha(Image.fromarray(np.linspace(0, 255, 2400).reshape(40, 60).astype(np.uint8)))
    return image


def palette() -> Image.Image:
    return Image.fromarray(SMALL).convert("P", palette=Image.Palette.ADAPTIVE)


PICTURES = {
    "photo.jpg": lambda p: Image.fromarray(PHOTO).save(p, quality=90),
    "turned.jpg": lambda p: Image.fromarray(SMALL).save(p, exif=exif(6)),
    "turned.tif": lambda p: Image.fromarray(SMALL).save(p, exif=exif(8)),
    "alpha.png": lambda p: alpha(False).save(p),
    "gray-alpha.png": lambda p: alpha(True).save(p),
    "deep.png": lambda p: Image.fromarray(GRAY16).save(p),
    "deep.tif": lambda p: Image.fromarray(GRAY16).save(p),
    "unit.tif": lambda p: Image.fromarray((GRAY16 / 65535).astype(np.float32)).save(p),
    "cmyk.jpg": lambda p: Image.fromarray(SMALL).convert("CMYK").save(p),
    "palette.gif": lambda p: palette().save(p),
    "clear.png": lambda p: palette().save(p, transparency=bytes(range(0, 250, 2))),
    "bits.png": lambda p: Image.fromarray(SMALL[..., 0] > 99).save(p),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", PICTURES)
def test_every_way_in_gives_the_same_answer_to_the_bit(tmp_path, name, channels):
    path = tmp_path / name
    PICTURES[name](path)
    content = path.read_bytes()
    with Image.open(path) as opened:  # as people pass it: not yet decoded
        lazily = classifier(channels).decode(opened)
        opened.load()
        loaded = opened.copy()
    array = read_image(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    ways = {
        "str": str(path), "bytes": content, "bytearray": bytearray(content),
        "BytesIO": io.BytesIO(content), "PIL": loaded, "array": array, "tensor": tensor,
    }  # fmt: skip
    expected = classifier(channels).decode(path)
    assert torch.equal(lazily, expected)
    for way, image in ways.items():
        assert torch.equal(classifier(channels).decode(image), expected), way
    with path.open("rb") as file:
        assert torch.equal(classifier(channels).decode(file), expected)
    (answer,) = classifier(channels).predict(path)
    (other,) = classifier(channels).predict(tensor)
    assert answer.classes == other.classes


def test_a_network_reads_what_a_viewer_shows(tmp_path):
    """Alpha on white, upright, and 16 bits scaled, for PIL images as for files."""
    net = classifier()
    white = Image.new("RGBA", (60, 40), "white")
    laid = np.asarray(Image.alpha_composite(white, alpha(False)).convert("RGB"))
    assert torch.equal(net.decode(alpha(False)), net.decode(laid))
    PICTURES["turned.jpg"](tmp_path / "t.jpg")
    with Image.open(tmp_path / "t.jpg") as opened:
        upright = ImageOps.exif_transpose(opened)
        assert torch.equal(net.decode(opened.convert("RGB")), net.decode(np.asarray(upright)))
    eight = net.decode((GRAY16 // 257).astype(np.uint8)).float()
    assert (net.decode(Image.fromarray(GRAY16)) - eight).abs().max() < 2


def test_arrays_and_tensors_that_are_clear_are_taken():
    net = classifier()
    expected = net.decode(SMALL)
    tensor = torch.from_numpy(SMALL).permute(2, 0, 1)
    assert [p.classes for p in net.predict(tensor)] == [p.classes for p in net.predict(SMALL)]
    batch = torch.stack([tensor, tensor.flip(2)])
    assert [p.classes for p in net.predict(batch)] == [
        p.classes for p in net.predict([SMALL, SMALL[:, ::-1]])
    ]
    assert len(net.predict(np.stack([SMALL] * 3))) == 3
    unit = SMALL / 255
    for floats in (
        unit, unit.astype(np.float32), torch.from_numpy(unit).permute(2, 0, 1),
        torch.from_numpy(unit).permute(2, 0, 1).requires_grad_(),
    ):  # fmt: skip
        assert torch.equal(net.decode(floats), expected)
    assert (net.decode(unit * 0.999) - expected).abs().max() < 1.3
    half = torch.from_numpy(unit).permute(2, 0, 1).bfloat16()
    assert (net.decode(half) - expected).abs().max() < 2
    yes = np.zeros((9, 9), bool)
    yes[:, 4:] = True
    assert torch.equal(net.decode(yes), net.decode(yes.astype(np.uint8) * 255))
    big = GRAY16.astype(">u2")
    assert torch.equal(net.decode(big), net.decode(GRAY16))
    multiplied = alpha(True).convert("La")
    assert (net.decode(multiplied).float() - net.decode(alpha(True)).float()).abs().max() <= 3
    rgba = np.asarray(alpha(False))
    assert torch.equal(net.decode(rgba), net.decode(alpha(False)))


def test_an_ensemble_reads_what_each_of_its_networks_reads(tmp_path):
    """The frame that a PIL image is at, and a file from where it is, even if it can't go back."""
    both = Ensemble([classifier(), classifier(side=24)], ["a", "b"])
    frames = [Image.fromarray(SMALL), Image.fromarray(SMALL[::-1].copy())]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "late.jpg").write_bytes(b"header" + JPEG)

    def answer(net, image) -> tuple[float, ...]:
        return net.predict([image])[0].probabilities

    def check(open_again) -> None:
        each = np.mean([answer(m, open_again()) for m in both.members], axis=0)
        assert answer(both, open_again()) == pytest.approx(each, abs=1e-6)

    def second() -> Image.Image:
        image = Image.open(io.BytesIO((tmp_path / "two.gif").read_bytes()))
        image.seek(1)
        return image

    def late() -> io.BytesIO:
        file = io.BytesIO((tmp_path / "late.jpg").read_bytes())
        file.seek(len(b"header"))
        return file

    check(second)
    check(late)
    opened = second()
    answer(both, opened)
    assert opened.tell() == 1
    read, write = os.pipe()
    with os.fdopen(write, "wb") as file:
        file.write(JPEG)
    with os.fdopen(read, "rb") as pipe:
        assert answer(both, pipe) == answer(both, JPEG)
    with open(tmp_path / "late.jpg", encoding="latin-1") as text:
        assert "opened as text" in str(next(iter(both.predict_each([text]))).error)


REFUSED = {
    "bytes as floats": SMALL.astype(np.float32),
    "whole numbers": SMALL.astype(np.int64),
    "negative": -(SMALL / 255),
    "NaN": np.full((9, 9), np.nan, np.float32),
    "infinite": torch.full((1, 9, 9), torch.inf),
    "channels first": np.moveaxis(SMALL, 2, 0),
    "channels last": torch.from_numpy(SMALL),
    "five channels": np.zeros((9, 9, 5), np.uint8),
    "one axis": np.zeros(9, np.uint8),
    "empty": np.zeros((0, 9, 3), np.uint8),
    "complex": np.zeros((9, 9), complex),
    "objects": np.full((9, 9), None),
    "a number": 7,
    "None": None,
    "text in bytes": b"no image",
    "no bytes": b"",
    "open as text": io.StringIO("text"),
    "a URL": "https://example.org/cat.png",
    "a URL as a path": Path("https://example.org/cat.png"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_unclear_is_refused_in_one_line(what):
    with pytest.raises(ImageError) as caught:
        classifier().predict([REFUSED[what]])
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(REFUSED[what], np.ndarray | torch.Tensor):
        assert "uint8" in message or "NaN" in message or "(3, H, W)" in message
    if "URL" in what:
        assert "is a URL" in message


def test_predict_each_goes_on_at_anything(tmp_path):
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    Image.fromarray(SMALL).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "cut.png") as bad:
        images = [SMALL, bad, None, tmp_path / "half.png", tmp_path, tmp_path / "absent.png", SMALL]
        found = list(classifier().predict_each(images))
    assert [p.error is None for p in found] == [True, *[False] * 5, True]
    assert found[0].classes == found[-1].classes
    assert found[2].error.startswith("image 3: ")
    assert "is a folder" in found[4].error
    assert "no such file" in found[5].error
    with pytest.raises(ImageError, match="image 3: "):
        classifier().predict([SMALL, SMALL, None])


def test_an_answer_that_is_no_number_is_an_error():
    net = classifier()
    net.model.layer.weight.data[2, 3] = math.nan
    (found,) = net.predict_each([SMALL])
    assert found.classes == []
    assert "not finite" in found.error
    assert "NaN" not in json.dumps(vars(found), allow_nan=False)


def test_the_range_of_values_of_a_run_is_that_of_its_predictions(tmp_path):
    """Measurements are scaled by the range in the run's folder, whatever door they come in by."""
    torch.manual_seed(0)
    model = regard.create_model("ag_sononet8", num_classes=3)
    preprocess = Preprocess((1, 32, 32), (0.4,), (0.2,), "squash", value_range=(-1000.0, 1000.0))
    regard.save_model(
        model, tmp_path / "run", data_config=preprocess.data_config(),
        extra={"regard": preprocess.regard_config()},
    )  # fmt: skip
    net = regard.load(tmp_path / "run")
    assert net.preprocess == preprocess
    values = (GRAY16.astype(np.int32) - 800)[:20, :30].astype(np.int16)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    expected = net.decode(values)
    assert expected.max() > expected.min() > 0
    for same in (tmp_path / "float.tif", values.astype(np.float64), torch.from_numpy(values)):
        assert torch.equal(net.decode(same), expected)


def answer(c: regard.Classifier, image) -> list:
    """All that a classifier says and shows of an image."""
    (said,), shown = c.predict(image), c.explain(image)
    maps = [m.values.tolist() for m in [*shown.modules, *shown.maps]]
    return [said.probabilities, said.distance, shown.classes, maps]


def test_the_answer_is_the_same_whatever_torch_is_set_to():
    image = load_sample_image("china.jpg")
    name = "ag_sononet8.digits"
    classifier = regard.load(name)
    wanted = answer(classifier, image)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert answer(classifier, image) == wanted
            assert answer(regard.load(name), image) == wanted
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert answer(classifier, image) == wanted
        loaded = regard.load(name)
    assert answer(loaded, image) == wanted


@pytest.mark.parametrize("name", ["ag_sononet8.digits", "cbam_resnet18.imagenette"])
def test_other_threads_images_stay_out_of_an_answer(name):
    classifier = regard.load(name)
    image, other = (load_sample_image(n) for n in ("china.jpg", "flower.jpg"))
    wanted, own = answer(classifier, image), threading.get_ident()

    def meanwhile(*_):
        if threading.get_ident() == own:
            thread = threading.Thread(target=classifier.predict, args=(other,))
            thread.start()
            thread.join()

    classifier.model.register_forward_hook(meanwhile)
    assert answer(classifier, image) == wanted
