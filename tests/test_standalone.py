"""The program beside an exported file answers as `regard predict`, without Regard or PyTorch."""

import io
import json
import struct
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import regard
from regard.data.images import read_image
from regard.data.preprocess import Preprocess
from regard.data.walk import JUNK, Skipped, list_images
from regard.engines import standalone
from regard.errors import ImageError
from regard.export import export
from tests.test_engines import lively

pytestmark = pytest.mark.native

CASES = {
    "net.onnx": Preprocess((3, 48, 64), (0.5,) * 3, (0.25,) * 3, "crop", 0.875),
    "net.xml": Preprocess(
        (1, 64, 48), (0.5,), (0.25,), "pad", 1.0, normalization="image", value_range=(-900, 300)
    ),
    "net.pt2": Preprocess((3, 48, 48), (0.4,) * 3, (0.3,) * 3, "squash", 1.0),
}
FORMATS = {"net.onnx": "onnx", "net.xml": "openvino", "net.pt2": "torch"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Real photographs in many shapes, depths and formats, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        photo = Image.fromarray(pixels)
        for k, (width, height) in enumerate(
            [(640, 427), (427, 427), (640, 60), (50, 427), (33, 47), (64, 48), (300, 400)]
        ):
            part = photo.crop((0, 0, width, height))
            part.save(folder / f"{name}-{k}.jpg", quality=92)
            part.resize((width * 2 // 3, height * 3 // 2)).save(folder / f"{name}-{k}.png")
        small = photo.resize((160, 107))
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            small.save(folder / f"{name}-exif-{orientation}.jpg", exif=exif)
        _odd_formats(folder, name, small)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    return folder


def _odd_formats(folder: Path, name: str, small: Image.Image) -> None:
    gray = small.convert("L")
    ramp = Image.linear_gradient("L").resize(small.size)
    for mode, image in (("RGBA", small.copy()), ("LA", gray.copy())):
        image.putalpha(ramp)
        image.save(folder / f"{name}-{mode}.png")
    small.quantize(17).save(folder / f"{name}-palette.png")
    gray.quantize(9).save(folder / f"{name}-gray-palette.gif")
    small.convert("CMYK").save(folder / f"{name}-cmyk.jpg")
    gray.save(folder / f"{name}-gray.webp", lossless=True)
    gray.convert("1").save(folder / f"{name}-one-bit.bmp")
    deep = (np.asarray(gray, np.uint16) * 200 + 77).astype(np.uint16)
    Image.fromarray(deep).save(folder / f"{name}-16.png")
    Image.fromarray(deep).save(folder / f"{name}-white-16.tif", tiffinfo={262: 0})
    alpha = np.asarray(ramp, np.uint16) * 257
    (folder / f"{name}-16-alpha.png").write_bytes(png_16(np.stack([deep, alpha], axis=2)))
    Image.fromarray(np.asarray(gray, np.float32) / 255 * 0.7 + 0.01).save(folder / f"{name}-f.tif")
    part = np.asarray(gray, np.float32) / 255 * 0.6 + 0.2
    Image.fromarray(part).save(folder / f"{name}-white-f.tif", tiffinfo={262: 0})
    Image.fromarray(np.asarray(gray, np.int32) * 4 - 850).save(folder / f"{name}-i.tif")


def png_16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit gray and alpha, which PIL can't write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """The installed packages without Regard and PyTorch, for a process that has no others."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("torch", "regard", "timm", "_", "accelerate")):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "i4", "f4"])
def test_the_program_reads_or_refuses_tiffs_as_predict_reads_them(kind, compression, separate):
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    bands = (np.random.default_rng(0).random((3, 9, 7)) * 200).astype(kind)
    for photometric in ("rgb", "minisblack") if separate else ("minisblack",):
        content = io.BytesIO()
        tifffile.imwrite(
            content, bands if separate else bands[0], byteorder=">", compression=compression,
            photometric=photometric, planarconfig="separate" if separate else None,
        )  # fmt: skip
        try:
            pixels = standalone._decode(content.getvalue(), [0, 200])
        except (standalone.ImageError, Image.UnidentifiedImageError):
            assert separate
            assert (kind, photometric) != ("u1", "rgb")  # which Pillow reads right
        else:
            expected = read_image(content.getvalue(), value_range=(0, 200))
            assert np.allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("value_range", [(-1000, 2000), (5, 5)])
@pytest.mark.parametrize("part", [(slice(5, 15), slice(5, 15)), slice(None)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_program_reads_or_refuses_what_is_not_finite_as_predict_does(value, part, value_range):
    pixels = np.linspace(-1000, 2000, 40 * 48).reshape(40, 48).astype(np.float32)
    pixels[part] = value
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "TIFF")
    if part == slice(None):
        refusal = "^all of its 1920 values are NaN or infinite$"
        with pytest.raises(ImageError, match=refusal):
            read_image(content.getvalue(), value_range=value_range)
        with pytest.raises(standalone.ImageError, match=refusal):
            standalone._decode(content.getvalue(), list(value_range))
        return
    expected = read_image(content.getvalue(), value_range=value_range)
    read = standalone._decode(content.getvalue(), list(value_range))
    np.testing.assert_array_equal(read, expected)
    assert read[8, 8, 0] == (value == np.inf and value_range == (-1000, 2000))


def test_the_program_lays_gray_with_multiplied_alpha_on_white():
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    gray = np.array([[0, 60], [120, 90]], np.uint8)
    alpha = np.array([[255, 255], [128, 180]], np.uint8)
    content = io.BytesIO()
    tifffile.imwrite(
        content, np.dstack([gray, alpha]), photometric="minisblack", planarconfig="contig",
        extrasamples=["assocalpha"],
    )  # fmt: skip
    pixels = standalone._decode(content.getvalue(), None)
    assert np.abs(pixels[..., 0] - (gray + 255.0 - alpha)).max() <= 1
    assert np.array_equal(pixels, read_image(content.getvalue()))


def test_an_answer_that_is_not_finite_is_an_error_and_no_nan_in_the_json(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (4, 4), 9).save(tmp_path / f"{name}.png")
    program = object.__new__(standalone.Network)
    program.facts = {
        "input_size": [1, 4, 4], "resize": "squash", "crop_pct": 1.0, "class_names": ["x", "y"],
    }  # fmt: skip
    program.run = lambda images: np.array([[np.nan, np.nan], [0.25, 0.75]])
    paths = [str(tmp_path / f"{name}.png") for name in ("a", "b")]
    first, second = program.predict(paths, top=1)
    assert first == {"path": paths[0], "error": f"{paths[0]}: its answer is not finite"}
    assert second["classes"] == [{"class": "y", "probability": 0.75}]


def network(folder: Path, preprocess: Preprocess) -> Path:
    """An untrained network whose answers depend on the image."""
    model = lively("ag_sononet8", 3, preprocess.input_size[0])
    with torch.no_grad():  # else all probabilities would be nearly the same
        for head in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            head.weight *= 8
    regard.save_model(
        model, folder, class_names=["a", "b", "\u00e9t\udce9"],
        data_config=preprocess.data_config(), extra={"regard": preprocess.regard_config()},
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_program_answers_as_predict_does(name, photos, packages, scans, tmp_path):
    data = tmp_path / "data"
    for k, label in enumerate(("a", "b", "\u00e9t\udce9")):
        (data / label).mkdir(parents=True)
        (data / label / "0.png").write_bytes((photos / f"china-{k}.png").read_bytes())
    run = network(tmp_path / "net", CASES[name])
    export(run, to=FORMATS[name], out=tmp_path / "out" / name, data=str(data))
    files = sorted(map(str, photos.iterdir()))
    expected = list(regard.load(run).predict_each(files, top=3))
    blocked = "import sys; sys.path.append(sys.argv.pop(1)); import runpy, importlib.util as u; "
    if name != "net.pt2":
        blocked += "assert u.find_spec('torch') is None; "
    else:
        packages = Path(sysconfig.get_path("purelib"))
    blocked += (
        "assert 'regard' not in sys.modules; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", blocked, packages, tmp_path / "out/net.py", "--top",
         "3", *files],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # two files are no images
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == files
    spread = []
    for row, answer in zip(rows, expected, strict=True):
        assert ("error" in row) == (answer.error is not None), (row, answer.error)
        if answer.error is None:
            found = {c["class"]: c["probability"] for c in row["classes"]}
            assert found == pytest.approx(dict(answer.classes), abs=1e-4), row["path"]
            spread.append(found["a"])
    assert sum("error" in row for row in rows) < 10
    assert np.std(spread) > 0.02  # the answers do depend on the images


def test_a_folder_is_listed_as_predict_lists_it(tmp_path):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    names = ("a.png", "sub/b.PNG", "._a.png", ".thumbnails/a.png", "__MACOSX/a.png", "@eaDir/a.jpg")
    for path in (*(folder / name for name in names), elsewhere / "c.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub/again").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    expected = list_images(str(folder), Skipped())
    assert [path.removeprefix(str(folder)) for path in expected] == [
        "/a.png", "/gone.png", "/linked/c.jpg", "/sub/b.PNG",
    ]  # fmt: skip
    assert list(standalone._files([str(folder)])) == expected
    assert set(standalone.JUNK) == JUNK


def test_a_folder_is_searched_and_wrong_calls_are_refused(tmp_path, photos):
    from regard.engines import standalone

    Image.open(photos / "china-0.jpg").save(tmp_path / "a.JPG", "JPEG")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.png").write_bytes((photos / "china-0.png").read_bytes())
    (tmp_path / "notes.txt").write_text("")
    found = list(standalone._files([str(tmp_path), "x.png"]))
    assert found == [str(tmp_path / "a.JPG"), str(tmp_path / "sub/b.png"), "x.png"]
    script = Path(standalone.__file__)
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.onnx").write_bytes(b"")  # not looked into, as there is nothing to predict
    for arguments, word in (
        (["x.png", "--top", "0"], "at least 1"),
        (["x.png", "--top", "1_0"], "argument --top: '1_0' is not a number"),
        (["x.png", "--top", "many"], "argument --top: 'many' is not a number"),
        (["x.png"], "no such file"),
        ([tmp_path / "empty", "--model", tmp_path / "net.onnx"], "no image below"),
    ):
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert word in done.stderr
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "PNG")
    facts = {"input_size": [1, 4, 4], "resize": "squash", "crop_pct": 1.0}
    with pytest.raises(standalone.ImageError, match="DICOM"):
        standalone._decode(b"\0" * 128 + b"DICM", None)
    (tmp_path / "c.png").write_bytes(buffer.getvalue())
    assert standalone.read_input(str(tmp_path / "c.png"), facts).shape == (1, 4, 4)
