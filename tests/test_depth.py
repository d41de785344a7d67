"""What is depth and what is color: every kind of number in a TIFF, PNG or DICOM, by one rule."""

import io
import json
import logging
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import regard
from regard.data import assign_splits, check_data, open_data
from regard.data.images import MAX_SIDE, read_image, read_stored
from regard.data.survey import survey
from regard.errors import ImageError
from tests.helpers import run

RAMP = np.linspace(0, 1, 20 * 30).reshape(20, 30)
RANGE = (-1000.0, 1000.0)


def tiff(path, array, *, photometric=1, signed=False):
    """An uncompressed TIFF of one channel, with the tags that PIL would not write."""
    rows = array.astype(array.dtype.newbyteorder("<")).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    height, width = array.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8 * array.dtype.itemsize), (259, 3, 1)]
    tags += [(262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, height)]
    tags += [(279, 4, len(rows)), (339, 3, kind)]
    ifd = struct.pack("<H", len(tags))
    for tag, size, value in tags:
        ifd += struct.pack("<HHII", tag, size, 1, value)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + ifd + bytes(4))
    return path


# ------------------------------------------------------------------------------ measurements
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u4", "f4", "f8"])
def test_every_kind_of_measurement_keeps_its_values(tmp_path, kind):
    if kind == "f8":
        pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    low, high = {"i1": (-128, 127), "u4": (0, 4e9)}.get(kind, (-900, 1e6 if kind != "i2" else 900))
    values = (low + RAMP * (high - low)).astype(kind)
    stored = read_stored(tiff(tmp_path / "a.tif", values))
    assert stored.is_measurement
    assert np.array_equal(stored.pixels[..., 0], values)
    pixels = read_image(tmp_path / "a.tif", value_range=(float(low), float(high)))
    assert pixels.dtype == np.float32
    assert np.abs(pixels[..., 0] - RAMP).max() < 0.005
    with pytest.raises(ImageError, match="without a known range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["u1", "u2", "i1", "i2", "i4", "u4", "f4", "f8", "i8", "u8", "f2"])
def test_a_picture_is_the_same_where_small_values_are_white(tmp_path, kind):
    """Integers as their bits inverted, floats from 0 to 1 as 1 - v; in a data set too."""
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    values = RAMP.copy() if kind[0] == "f" else np.rint(RAMP * 90)
    values = values.astype(kind)
    white = 1 - values if kind[0] == "f" else ~values
    for name, stored in (("black", values), ("white", white)):
        (tmp_path / name).mkdir()
        for byteorder in "<>":
            tifffile.imwrite(tmp_path / name / f"{ord(byteorder)}.tif", stored, byteorder=byteorder,
                             photometric=f"minis{name}")  # fmt: skip
    rounding = 0.001 if kind == "f2" else 1e-6
    found = survey(open_data(tmp_path)).value_range
    if kind not in ("u1", "u2"):
        assert found == pytest.approx((values.min(), values.max()), abs=rounding)
    expected = read_image(tmp_path / "black" / "60.tif", value_range=found)
    for path in tmp_path.glob("*/*.tif"):
        pixels = read_image(path, value_range=found)
        assert pixels.dtype == expected.dtype
        assert np.abs(pixels.astype(float) - expected).max() <= rounding
        if kind[0] == "f":  # as they are, without a range
            assert np.abs(read_image(path)[..., 0] - RAMP).max() <= rounding


def test_bits_and_opacity_where_small_values_are_white(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    pytest.importorskip("imagecodecs", reason="which packs 12 bits")
    values = np.rint(RAMP * 4095).astype(np.uint16)
    for name, stored in (("black", values), ("white", 4095 - values)):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, stored, photometric=f"minis{name}", bitspersample=12)
        assert np.array_equal(read_image(path)[..., 0], values)
    eight, opacity = (values // 16).astype(np.uint8), np.zeros(values.shape, np.uint8)
    opacity[:, :15] = 255
    for name, stored in (("black", eight), ("white", 255 - eight)):
        path = tmp_path / f"{name} and opacity.tif"
        tifffile.imwrite(path, np.stack([stored, opacity], axis=2), photometric=f"minis{name}",
                         extrasamples=["unassalpha"], planarconfig="contig")  # fmt: skip
        pixels = read_image(path)[..., 0]
        assert np.array_equal(pixels[:, :15], eight[:, :15])
        assert (pixels[:, 15:] == 255).all()


@pytest.mark.parametrize("endian", "<>")
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("kind", ["u2", "i1", "i2", "i4", "u4", "f2", "f4", "f8", "i8"])
def test_the_bytes_order_and_compression_change_no_value(kind, compression, endian):
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    values = (RAMP * 120 - (0 if kind[0] == "u" else 100)).astype(kind)
    for samples in (1, 3):
        if samples == 3 and kind == "u2":
            continue  # of which PIL keeps 8 bits
        content = io.BytesIO()
        several = np.repeat(values[..., None], 3, axis=2) if samples == 3 else values
        tifffile.imwrite(
            content, several, compression=compression, byteorder=endian,
            photometric="rgb" if samples == 3 else "minisblack",
        )  # fmt: skip
        pixels = read_stored(content.getvalue()).pixels
        assert np.array_equal(pixels, several.reshape(pixels.shape))


@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
def test_bands_one_after_the_other_are_those_of_each_pixel(kind, compression, photometric):
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    bands = (np.random.default_rng(0).random((3, 17, 21)) * 250).astype(kind)
    content = io.BytesIO()
    tifffile.imwrite(content, bands, compression=compression, photometric=photometric,
                     planarconfig="separate")  # fmt: skip
    pixels = read_stored(content.getvalue()).pixels
    if (
        kind == "u2" and compression and pixels.dtype == np.uint8
    ):  # of 16-bit color that it reads PIL keeps 8
        bands >>= 8
    assert np.array_equal(pixels, np.moveaxis(bands, 0, 2))


def test_sixteen_bits_where_small_values_are_white_are_inverted(tmp_path):
    values = (RAMP * 65535).astype(np.uint16)
    pixels = read_image(tiff(tmp_path / "a.tif", values, photometric=0))
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[..., 0], 65535 - values)
    eight = (RAMP * 255).astype(np.uint8)
    pixels = read_image(tiff(tmp_path / "b.tif", eight, photometric=0))
    assert np.array_equal(pixels[..., 0], 255 - eight)


def test_what_is_clipped_is_a_warning_with_a_count(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("regard.data.images._clipped_images", 0)
    values = np.array([[-1500, 0, 500], [2000, 3000, 0]], np.int16)
    with caplog.at_level(logging.WARNING, "regard"):
        pixels = read_image(tiff(tmp_path / "a.tif", values), value_range=RANGE)
    assert pixels[..., 0].tolist() == [[0, 0.5, 0.75], [1, 1, 0.5]]
    assert "a.tif: 3 of 6 values" in caplog.text
    caplog.clear()
    holes = np.where(RAMP < 0.5, np.nan, RAMP).astype(np.float32)
    pixels = read_image(tiff(tmp_path / "b.tif", holes), value_range=(0.5, 1.0))
    assert np.isfinite(pixels).all()
    assert not pixels[np.isnan(holes)].any()
    assert "300 of 600 values" in caplog.text


def png(width, height, depth, color, raw):
    """A PNG of these filtered rows."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_gray_and_alpha_of_sixteen_bits_stay_gray_of_sixteen_bits(tmp_path):
    gray = (RAMP * 65535).astype(np.uint16)
    alpha = (RAMP.T.reshape(20, 30) * 65535).astype(np.uint16)
    rows = np.stack([gray, alpha], axis=2).astype(">u2")
    content = png(30, 20, 16, 4, b"".join(b"\0" + row.tobytes() for row in rows))
    pixels = read_image(content)
    assert pixels.dtype == np.uint16
    assert pixels.shape == (20, 30, 1)
    expected = 65535 + (gray.astype(float) - 65535) * alpha / 65535
    assert np.abs(pixels[..., 0] - expected).max() <= 0.5
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(read_image(opened), pixels)
    assert np.array_equal(read_image(np.stack([gray, alpha], axis=2)), pixels)


def test_the_transparent_gray_of_sixteen_bits_is_white(tmp_path):
    values = np.array([[0, 1000], [30000, 65000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=30000)
    pixels = read_image(tmp_path / "a.png")
    assert pixels.dtype == np.uint16
    assert pixels[..., 0].tolist() == [[0, 1000], [65535, 65000]]


def test_palettes_that_are_gray_count_as_gray(tmp_path):
    image = Image.fromarray((RAMP * 255).astype(np.uint8)).convert("P")
    image.save(tmp_path / "gray.png")
    pixels = read_image(tmp_path / "gray.png")
    assert pixels.shape == (20, 30, 1)
    assert np.array_equal(pixels[..., 0], (RAMP * 255).astype(np.uint8))


def test_gray_in_three_channels_is_the_same_in_one():
    gray = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(read_image(np.repeat(gray, 3, axis=2), channels=1), gray)


@pytest.mark.parametrize("shape", [(20, 30, 5), (20, 30, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_tiffs_that_pil_cannot_read(tmp_path, monkeypatch, shape, kind):
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    values = (np.random.default_rng(0).random(shape) * 200).astype(kind)
    path = tmp_path / "a.tif"
    if kind == np.uint8 and shape[2] == 3:
        values = values.astype(np.float64)
    tifffile.imwrite(path, values, photometric="rgb", planarconfig="contig")
    assert np.array_equal(read_stored(path).pixels, values[..., :3])
    tifffile.imwrite(path, np.moveaxis(values, 2, 0), photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_stored(path).pixels, values[..., :3])
    monkeypatch.setattr("regard.data.tiff.missing", lambda *_: ["tifffile"])
    with pytest.raises(ImageError, match=r"is a TIFF .* pip install 'regard\[tiff\]'"):
        read_image(path)


# -------------------------------------------------------------------------- the whole data set
def scans(folder, classes: dict[str, tuple[float, float]], kind, count=12, name="{}.tif"):
    """Noise images of each class between two values."""
    rng = np.random.default_rng(0)
    for label, (low, high) in classes.items():
        (folder / label).mkdir(parents=True)
        for k in range(count):
            values = (low + (high - low) * rng.random((24, 24))).astype(kind)
            tiff(folder / label / name.format(k), values)
    return str(folder)


def test_the_range_is_that_of_the_training_images(tmp_path):
    data = scans(tmp_path / "ct", {"air": (-900, -700), "bone": (-500, -300)}, np.int16)
    table = assign_splits(open_data(data), val=0.2, test=0.2, seed=0)
    found = survey(table)
    train = [read_stored(table.path(i)).pixels for i in np.flatnonzero(table.splits == "train")]
    assert found.value_range == (np.min(train), np.max(train))
    assert found.channels == 1
    check = check_data(table)
    assert check.value_range == found.value_range
    assert check.depths == {"signed or 32 bit": 24}
    low, high = check.value_range
    scaled = (np.array(train, float) - low) / (high - low)
    assert check.mean == pytest.approx([scaled.mean()])
    assert check.std == pytest.approx([scaled.std()])


@pytest.mark.slow
def test_brightness_alone_can_be_learned_and_the_run_keeps_the_range(tmp_path):
    classes = {"air": (-900, -700), "bone": (-500, -300)}
    kind = np.int16
    data = scans(tmp_path / "ct", classes, kind, count=30)
    out = tmp_path / "run"
    told = run(
        "train", data, "--model", "ag_sononet8", "--size", "16", "--epochs", "6", "--out", out,
        "--batch-size", "8", "--faithfulness-images", "0", "--lr", "0.02",
    )  # fmt: skip
    low, high = json.loads((out / "config.json").read_text())["regard"]["value_range"]
    assert low == pytest.approx(-900, abs=2)
    assert high == pytest.approx(-300, abs=2)
    assert f"{low:.0f} to {high:.0f}" in told
    assert json.loads((out / "evaluation.json").read_text())["metrics"]["top1"]["value"] == 1.0
    net = regard.load(out)
    dark = tiff(tmp_path / "dark.tif", np.full((24, 24), -820, kind))
    light = tiff(tmp_path / "light.tif", np.full((24, 24), -380, kind))
    assert [p.classes[0][0] for p in net.predict([dark, light])] == ["air", "bone"]


def test_some_color_is_color(tmp_path):
    rng = np.random.default_rng(0)
    for label, colors in {"gray": [], "mixed": range(0, 12, 6)}.items():
        (tmp_path / label).mkdir()
        for k in range(12):
            pixels = np.repeat(rng.integers(0, 256, (16, 16, 1), dtype=np.uint8), 3, axis=2)
            if k in colors:
                pixels[..., 2] = 0
            Image.fromarray(pixels).save(tmp_path / label / f"{k}.png")
    assert survey(open_data(str(tmp_path))).channels == 3
    for path in (tmp_path / "mixed").iterdir():
        Image.open(path).convert("L").save(path)
    assert survey(open_data(str(tmp_path))).channels == 1


@pytest.mark.slow
def test_a_split_without_contrast_ends_the_run_before_it_starts(tmp_path):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(10):
            Image.new("L", (16, 16), 9).save(tmp_path / "data" / label / f"{k}.png")
    told = run("train", tmp_path / "data", "--out", tmp_path / "run", "--epochs", "1", code=2)
    assert "deviation 0" in told
    assert "train images" in told
    assert not (tmp_path / "run" / "recipe.toml").exists()


# ------------------------------------------------------------------------------ other formats
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jfif", {"format": "JPEG"}), ("gif", {}), ("ppm", {}), ("pgm", {}),
        ("jp2", {"irreversible": False}), ("avif", {"quality": 100}),
    ],
)  # fmt: skip
def test_formats_that_pillow_reads(tmp_path, suffix, options):
    image = Image.fromarray((RAMP * 255).astype(np.uint8))
    if suffix in ("ppm", "avif", "jfif"):
        image = image.convert("RGB")
    image.save(tmp_path / f"a.{suffix}", **options)
    pixels = read_image(tmp_path / f"a.{suffix}", channels=1)
    assert np.abs(pixels[..., 0] - RAMP * 255).max() <= 3


def test_a_moving_picture_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (9, 9), c) for c in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (read_image(tmp_path / "a.gif") == [255, 0, 0]).all()


def test_a_pgm_of_sixteen_bits(tmp_path):
    values = (RAMP * 65535).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 30 20 65535\n" + values.tobytes())
    assert np.array_equal(read_image(tmp_path / "a.pgm")[..., 0], values)


# -------------------------------------------------------------------------- what is too much
@pytest.mark.slow
def test_an_image_of_one_column_costs_no_more_than_its_pixels(tmp_path):
    """A PNG of 12,000,000 x 1 is refused by its header; one of 90,000 x 1 is shrunk in place."""
    with pytest.raises(ImageError, match=f"too large .* at most {MAX_SIDE}"):
        read_image(png(1, 12_000_000, 8, 0, bytes(1000)))
    code = """
import resource, sys, torch
from regard.data.preprocess import Preprocess
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for resize in ("squash", "pad", "crop"):
    for shape in ((3, 90_000, 1), (3, 1, 90_000), (3, 3_000_000, 1), (1, 10, 1810), (1, 5000, 2)):
        image = 127 + torch.randint(0, 2, shape, dtype=torch.uint8)
        fitted = Preprocess((shape[0], 224, 224), (0.5,) * shape[0], (0.2,) * shape[0], resize)
        out = fitted.fit(image)
        assert abs(float(out.float().mean()) - 127.5) <= 0.5
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250_000  # kB; 3,000,000 rows of 224 values alone are 2 GB


def test_libtiffs_own_lines_stay_out_of_the_log(tmp_path):
    image = Image.fromarray((RAMP * 255).astype(np.uint8))
    image.save(tmp_path / "a.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (tmp_path / "b.tif").write_bytes(content)
    (tmp_path / "c.tif").write_bytes(content[: len(content) // 2])
    code = """
import sys
from regard.data.images import read_image
from regard.errors import ImageError
for path in sys.argv[1:]:
    try:
        read_image(path)
    except ImageError:
        print("refused")
"""
    paths = [tmp_path / "b.tif", tmp_path / "c.tif"]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.stderr == ""
    assert "refused" in done.stdout
