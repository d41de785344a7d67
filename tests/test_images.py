"""Every format to the last bit, upright, over white; every fault one line."""

import itertools
import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from regard.data import open_data
from regard.data.images import read_image, read_stored
from regard.data.survey import survey
from regard.errors import ImageError

PHOTO = load_sample_image("flower.jpg")  # (427, 640, 3)
SMALL = np.ascontiguousarray(PHOTO[100:140, 200:260])  # (40, 60, 3)
GRAY16 = np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 54 + 7  # to 64753, every low bit


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_keep_every_value(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = read_image(save(tmp_path / f"a.{suffix}", SMALL, **options))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, SMALL)
    if suffix != "webp":  # which has no grayscale
        gray = read_image(save(tmp_path / f"g.{suffix}", SMALL[..., 0]))
        assert np.array_equal(gray, SMALL[..., :1])


def test_jpeg_is_what_pil_decodes(tmp_path):
    path = save(tmp_path / "a.jpg", PHOTO, quality=90)
    assert np.array_equal(read_image(path), np.asarray(Image.open(path)))
    assert np.abs(read_image(path).astype(int) - PHOTO).mean() < 3


def test_the_content_tells_the_format_not_the_name(tmp_path):
    path = save(tmp_path / "a.jpg", SMALL, format="PNG")
    assert np.array_equal(read_image(path), SMALL)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_kept_to_the_last(tmp_path, suffix):
    pixels = read_image(save(tmp_path / f"a.{suffix}", GRAY16))
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[..., 0], GRAY16)
    assert np.array_equal(
        read_image(tmp_path / f"a.{suffix}", channels=3), np.repeat(GRAY16[..., None], 3, 2)
    )


def test_big_endian(tmp_path):
    rows = GRAY16.astype(">u2").tobytes()
    tags = [(256, 4, 40), (257, 4, 30), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, 30), (279, 4, len(rows))]
    ifd = struct.pack(">H", len(tags))
    for tag, kind, value in tags:
        ifd += struct.pack(">HHI", tag, kind, 1) + struct.pack(">I" if kind == 4 else ">Hxx", value)
    path = tmp_path / "be.tif"
    path.write_bytes(b"MM\0*" + struct.pack(">I", 8 + len(rows)) + rows + ifd + bytes(4))
    with Image.open(path) as image:
        assert image.mode == "I;16B"
    assert np.array_equal(read_image(path)[..., 0], GRAY16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", SMALL, exif=exif, **options)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape[:2] == ((40, 60) if orientation < 5 else (60, 40))
    assert np.array_equal(read_image(path), expected)


def test_exif_turns_sixteen_bits_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.png", GRAY16, exif=exif)
    assert np.array_equal(read_image(path)[..., 0], np.rot90(GRAY16, -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's, which says what we test
def test_broken_exif_does_not_lose_the_picture(tmp_path):
    path = save(tmp_path / "a.jpg", SMALL, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    assert read_image(path).shape == (40, 60, 3)


def over_white(color, alpha):
    return color * (alpha / 255) + 255 * (1 - alpha / 255)


def test_transparency_is_composed_over_white(tmp_path):
    alpha = np.linspace(0, 255, 40 * 60).reshape(40, 60, 1).astype(np.uint8)
    rgba = read_image(save(tmp_path / "a.png", np.concatenate([SMALL, alpha], 2)))
    assert np.abs(rgba - over_white(SMALL.astype(float), alpha)).max() <= 1
    gray = Image.fromarray(SMALL[..., 0])
    gray.putalpha(Image.fromarray(alpha[..., 0]))
    gray.save(tmp_path / "la.png")
    pixels = read_image(tmp_path / "la.png")
    assert pixels.shape == (40, 60, 1)
    assert np.abs(pixels - over_white(SMALL[..., :1].astype(float), alpha)).max() <= 1


def test_palettes(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "p.png")
    red, green, blue = [255, 0, 0], [0, 255, 0], [0, 0, 255]
    assert read_image(tmp_path / "p.png").tolist() == [[red, green, blue]]
    image.save(tmp_path / "one.png", transparency=1)
    assert read_image(tmp_path / "one.png").tolist() == [[red, [255] * 3, blue]]
    image.save(tmp_path / "each.png", transparency=bytes([255, 0, 128]))
    half = read_image(tmp_path / "each.png")[0, 2]
    assert np.abs(half - over_white(np.array(blue), 128)).max() <= 1


def test_a_transparent_color_of_rgb_and_gray(tmp_path):
    rgb = np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)
    save(tmp_path / "rgb.png", rgb, transparency=(1, 2, 3))
    assert read_image(tmp_path / "rgb.png").tolist() == [[[255] * 3, [9] * 3]]
    save(tmp_path / "l.png", rgb[..., 0], transparency=1)
    assert read_image(tmp_path / "l.png").tolist() == [[[255], [9]]]


def test_cmyk_and_one_bit(tmp_path):
    cmyk = Image.fromarray(SMALL).convert("CMYK")
    cmyk.save(tmp_path / "c.tif")
    assert np.array_equal(read_image(tmp_path / "c.tif"), np.asarray(cmyk.convert("RGB")))
    Image.fromarray(SMALL).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "c.jpg").astype(int) - SMALL).mean() < 8
    Image.fromarray(np.eye(9, 11) > 0).save(tmp_path / "1.png")
    assert np.array_equal(read_image(tmp_path / "1.png")[..., 0], (np.eye(9, 11) * 255))


def test_channels(tmp_path):
    path = save(tmp_path / "a.png", SMALL)
    luma = np.asarray(Image.fromarray(SMALL).convert("L"))
    assert np.array_equal(read_image(path, channels=1)[..., 0], luma)
    gray = read_image(save(tmp_path / "g.png", luma), channels=3)
    assert np.array_equal(gray, np.stack([luma] * 3, 2))
    with pytest.raises(ValueError, match="channels=2: choose 1 or 3"):
        read_image(path, channels=2)


@pytest.mark.parametrize("at_least", [1, 50, 106, 107, 213, 214, 427, 500])
def test_a_reduced_jpeg_is_large_enough_and_the_same_picture(tmp_path, at_least):
    path = save(tmp_path / "a.jpg", PHOTO, quality=95)
    pixels = read_image(path, at_least=at_least)
    assert min(pixels.shape[:2]) >= min(at_least, 427)
    scale = round(427 / pixels.shape[0])  # the decoder rounds sides up
    assert scale == next(s for s in (8, 4, 2, 1) if s == 1 or 427 // at_least >= s)
    small = np.asarray(Image.fromarray(PHOTO).resize(pixels.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(pixels.astype(int) - small).mean() < 4


def test_several_pages_give_the_first(tmp_path):
    first, second = Image.fromarray(SMALL), Image.fromarray(255 - SMALL)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    assert np.array_equal(read_image(tmp_path / "a.tif"), SMALL)


def faulty(folder, fault):
    path = folder / "bad.png"
    if fault == "truncated":
        whole = save(folder / "whole.jpg", PHOTO).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "cut PNG":
        whole = save(folder / "whole.png", PHOTO).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "text":
        path.write_text("this is no image\n")
    elif fault == "empty":
        path.touch()
    elif fault == "folder":
        path.mkdir()
    elif fault == "pipe":
        os.mkfifo(path)
    elif fault == "PDF":
        Image.fromarray(SMALL).save(path, format="PDF")
    elif fault == "link":
        path.symlink_to("nowhere.png")
    return path


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("truncated", "truncated"),
        ("cut PNG", "truncated"),
        ("text", "is not a PNG, JPEG, TIFF, .* or DICOM image"),
        ("empty", r"is empty \(0 bytes\)"),
        ("folder", "is a folder"),
        ("pipe", "is not a regular file"),
        ("PDF", "is not a PNG"),
        ("link", "no such file"),
        ("missing", "no such file"),
    ],
)
def test_faults_are_one_line_that_names_the_file(tmp_path, fault, told):
    path = faulty(tmp_path, fault)
    with pytest.raises(ImageError, match=told) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", SMALL)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="decompression bomb"):
        read_image(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = save(tmp_path / "a.png", SMALL)
    path.chmod(0)
    with pytest.raises(ImageError, match="no permission"):
        read_image(path)


WHOLE = {}


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_damage_is_an_image_or_an_image_error(tmp_path, data):
    kinds = ["png", "jpg", "bmp", "tif", "webp", "gif", "ppm", "jp2", "avif"]
    suffix = data.draw(st.sampled_from(kinds))
    if suffix not in WHOLE:
        WHOLE[suffix] = save(tmp_path / f"whole.{suffix}", SMALL[:8, :8]).read_bytes()
    damaged = bytearray(WHOLE[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        pixels = read_image(tmp_path / "x")
    except ImageError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert pixels.ndim == 3
        assert pixels.shape[2] in (1, 3)


# ---- DICOM


def dicom(path, stored, **tags):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    color = stored.ndim == 3 and stored.shape[2] == 3
    bits = stored.dtype.itemsize * 8
    dataset.Rows, dataset.Columns = stored.shape[:2] if color else stored.shape[-2:]
    dataset.SamplesPerPixel = 3 if color else 1
    dataset.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    if color:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_without_a_window_is_stretched(tmp_path):
    stored = np.array([[100, 200], [300, 500]], np.uint16)
    path = dicom(tmp_path / "no_suffix", stored, RescaleSlope=2, RescaleIntercept=-1024)
    pixels = read_image(path)
    assert pixels.dtype == np.float32
    assert pixels[..., 0].tolist() == [[0, 0.25], [0.5, 1]]
    inverted = dicom(tmp_path / "i.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    assert read_image(inverted)[..., 0].tolist() == [[1, 0.75], [0.5, 0]]


RESCALED = {"RescaleSlope": 2, "RescaleIntercept": -1000}


@pytest.mark.parametrize("rescale", [{}, RESCALED, {"RescaleSlope": -1, "RescaleIntercept": 9}])
@pytest.mark.parametrize(
    ("kind", "bits", "low"), [("u2", 16, 0), ("u2", 12, 0), ("u1", 8, 0), ("i2", 16, -(2**15)),
                              ("i2", 12, -(2**11))],
)  # fmt: skip
def test_dicom_of_both_monochromes_is_one_picture_in_a_data_set(tmp_path, kind, bits, low, rescale):
    rng = np.random.default_rng(bits)
    tags = {**rescale, "BitsStored": bits, "HighBit": bits - 1}
    means, seen = [], []
    for k in range(4):  # dark pictures: about half of the range is never used
        picture = (low + rng.integers(0, 2 ** (bits - 1 - k % 2), (8, 9))).astype(kind)
        seen.append(picture * float(tags.get("RescaleSlope", 1)) + tags.get("RescaleIntercept", 0))
        for kind_of in (1, 2):
            stored = picture if kind_of == 2 else (2 * low + 2**bits - 1 - picture).astype(kind)
            (tmp_path / str(kind_of)).mkdir(exist_ok=True)
            dicom(tmp_path / str(kind_of) / f"{k}.dcm", stored,
                  PhotometricInterpretation=f"MONOCHROME{kind_of}", **tags)  # fmt: skip
    found = survey(open_data(tmp_path)).value_range
    assert found == (np.min(seen), np.max(seen))
    for k in range(4):
        one, two = (read_image(tmp_path / n / f"{k}.dcm", value_range=found) for n in "12")
        assert np.abs(one - two).max() < 1e-6
        means.append(float(two.mean()))
    assert max(means) - min(means) > 0.1  # brightness between images stays


def test_dicom_of_both_monochromes_after_a_table_and_in_floats(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    item = pydicom.Dataset()
    item.add_new(0x00283002, "US", [4, 0, 8])
    item.add_new(0x00283006, "US", [10, 20, 40, 80])
    stored = np.array([[0, 1], [2, 3]], np.uint16)
    for name, values in (("MONOCHROME2", [10, 20, 40, 80]), ("MONOCHROME1", [245, 235, 215, 175])):
        path = dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=[item],
                     PhotometricInterpretation=name)  # fmt: skip
        assert read_stored(path).pixels.ravel().tolist() == values
    for name, values in (("MONOCHROME2", [0.25, -3]), ("MONOCHROME1", [0.75, 4])):
        dataset = pydicom.dcmread(path)
        for tag in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(dataset, tag)
        del dataset.ModalityLUTSequence
        dataset.BitsAllocated, dataset.Rows, dataset.Columns = 32, 1, 2
        dataset.PhotometricInterpretation = name
        dataset.FloatPixelData = np.array([0.25, -3], np.float32).tobytes()
        dataset.save_as(tmp_path / "f.dcm", enforce_file_format=True)
        assert read_stored(tmp_path / "f.dcm").pixels.ravel().tolist() == values
        dataset.WindowCenter, dataset.WindowWidth = 0, 1
        dataset.VOILUTFunction = "LINEAR_EXACT"
        dataset.save_as(tmp_path / "f.dcm", enforce_file_format=True)
        shown = [0.75, 0] if name == "MONOCHROME2" else [0.25, 1]
        assert read_image(tmp_path / "f.dcm").ravel().tolist() == shown


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_dicom_windows_of_both_monochromes_show_one_picture(tmp_path, function):
    picture = np.random.default_rng(0).integers(0, 4096, (8, 9)).astype(np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11, "WindowWidth": 900, "VOILUTFunction": function}
    mirrored = (4096 if function == "LINEAR" else 4095) - 1500  # LINEAR's center is at - 0.5
    two = dicom(tmp_path / "2.dcm", picture, WindowCenter=1500, **tags)
    one = dicom(tmp_path / "1.dcm", 4095 - picture, WindowCenter=mirrored,
                PhotometricInterpretation="MONOCHROME1", **tags)  # fmt: skip
    assert np.abs(read_image(one) - read_image(two)).max() < 1e-6


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_dicom_windows_follow_the_standard(tmp_path, function, kind):
    hounsfield = np.linspace(-1000, 1000, 30)
    stored = (hounsfield + 1024).astype(kind).reshape(5, 6)
    x = stored.astype(float) - 1024
    window = {"WindowCenter": [40, 500], "WindowWidth": [400, 9], "VOILUTFunction": function}
    path = dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, **window)
    if function == "LINEAR":  # PS3.3 C.11.2.1.2.1
        expected = np.clip((x - 39.5) / 399 + 0.5, 0, 1)
    elif function == "LINEAR_EXACT":
        expected = np.clip((x - 40) / 400 + 0.5, 0, 1)
    else:
        expected = 1 / (1 + np.exp(-4 * (x - 40) / 400))
    assert np.abs(read_image(path)[..., 0] - expected).max() < 1e-6


def test_dicom_voi_table(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    item = pydicom.Dataset()
    item.add_new(0x00283002, "US", [4, 0, 8])
    item.add_new(0x00283006, "US", [255, 51, 0, 102])
    stored = np.array([[0, 1], [2, 7]], np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=0,
                 VOILUTSequence=[item])  # fmt: skip
    assert np.abs(read_image(path)[..., 0] - [[1, 0.2], [0, 0.4]]).max() < 1e-6


@pytest.mark.parametrize(
    ("bits", "written"), [(8, "list"), (8, "words"), (8, "bytes"), (10, "words"), (16, "list")]
)
def test_a_dicom_voi_table_of_many_entries(tmp_path, bits, written):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    entries = np.sort(np.random.default_rng(0).integers(0, 2**bits, 4000))
    item = pydicom.Dataset()
    item.add_new(0x00283002, "US", [4000, 50, bits])
    content = entries.astype(np.uint8 if written == "bytes" else np.uint16)
    whole = content.tolist() if written == "list" else content.tobytes()
    item.add_new(0x00283006, "US" if written == "list" else "OW", whole)
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    path = dicom(tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11, VOILUTSequence=[item])
    expected = entries[np.clip(stored.astype(int) - 50, 0, 3999)] / (2**bits - 1)
    assert np.abs(read_image(path)[..., 0] - expected).max() < 1e-6


@pytest.mark.parametrize(("kind", "intercept"), [(np.int16, 0), (np.uint16, -1024)])
@pytest.mark.parametrize(("written", "first"), [("US", 2**16 - 500), ("SS", -500)])
def test_a_dicom_voi_table_may_begin_below_zero(tmp_path, kind, intercept, written, first):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    item = pydicom.Dataset()
    item.add_new(0x00283002, written, [1001, first, 8])
    entries = np.linspace(0, 255, 1001).astype(np.uint16)
    item.add_new(0x00283006, "OW", entries.tobytes())
    values = np.array([[-1000, -500, -100], [0, 400, 900]])
    path = dicom(tmp_path / "a.dcm", (values - intercept).astype(kind), RescaleSlope=1,
                 RescaleIntercept=intercept, VOILUTSequence=[item])  # fmt: skip
    expected = entries[np.clip(values + 500, 0, 1000)] / 255
    assert np.abs(read_image(path)[..., 0] - expected).max() < 1e-6


@pytest.mark.parametrize(("written", "first"), [("US", 2**16 - 100), ("SS", -100)])
@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_a_dicom_modality_table_may_begin_below_zero(tmp_path, kind, written, first):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    item = pydicom.Dataset()
    item.add_new(0x00283002, written, [201, first, 16])
    entries = np.linspace(0, 60000, 201).astype(np.uint16)
    item.add_new(0x00283006, "OW", entries.tobytes())
    stored = np.array([[-120, -100, -1], [0, 99, 127]], kind)
    path = dicom(tmp_path / "a.dcm", stored, ModalityLUTSequence=[item])
    expected = entries[np.clip(stored.astype(int) + 100, 0, 200)]
    assert read_stored(path).pixels[..., 0].tolist() == expected.tolist()


def test_a_dicom_table_that_is_cut_short_is_named(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    item = pydicom.Dataset()
    item.add_new(0x00283002, "US", [1000, 0, 16])
    item.add_new(0x00283006, "OW", bytes(600))
    path = dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint16), VOILUTSequence=[item])
    with pytest.raises(ImageError, match="300 of 1,000 entries"):
        read_image(path)


def test_dicom_color_and_frames(tmp_path):
    pixels = read_image(dicom(tmp_path / "c.dcm", SMALL))
    assert np.abs(pixels - SMALL / 255).max() < 1e-6
    luma = SMALL @ [0.299, 0.587, 0.114] / 255
    assert np.abs(read_image(tmp_path / "c.dcm", channels=1)[..., 0] - luma).max() < 1e-6
    frames = dicom(tmp_path / "m.dcm", np.zeros((3, 4, 4), np.uint8), NumberOfFrames=3)
    with pytest.raises(ImageError, match=r"m\.dcm: holds 3 frames"):
        read_image(frames)


def test_dicom_faults(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((40, 40), np.uint16))
    whole = path.read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-900])
    with pytest.raises(ImageError, match=r"cut\.dcm: "):
        read_image(tmp_path / "cut.dcm")
    (tmp_path / "bare.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(ImageError, match="is DICOM without an image"):
        read_image(tmp_path / "bare.dcm")


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    "name",
    ["Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated",
     "BitsStored", "PixelRepresentation", "PlanarConfiguration"],
)  # fmt: skip
def test_a_dicom_image_that_lacks_an_element_is_told_by_its_name(tmp_path, name, empty):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 5, 3), np.uint8))
    dataset = pytest.importorskip("pydicom").dcmread(path)
    delattr(dataset, name)
    if empty:
        setattr(dataset, name, None)
    dataset.save_as(path)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: is DICOM that lacks {name}: the image can't be decoded"


def test_the_eight_orientations_differ():
    from regard.data.images import _upright

    turned = [_upright(np.arange(4).reshape(2, 2, 1), o).ravel().tolist() for o in range(1, 9)]
    assert all(a != b for a, b in itertools.combinations(turned, 2))


def test_dicom_without_preamble(tmp_path):
    stored = np.arange(100, 220, dtype=np.uint16).reshape(10, 12)
    whole = dicom(tmp_path / "a.dcm", stored).read_bytes()
    expected = read_image(tmp_path / "a.dcm")
    (tmp_path / "meta").write_bytes(whole[132:])  # starts with the meta information
    assert np.array_equal(read_image(tmp_path / "meta"), expected)
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    for name, implicit in (("explicit", False), ("implicit", True)):
        bare = pydicom.Dataset({e.tag: e for e in dataset if e.tag.group != 2})
        bare.save_as(tmp_path / name, implicit_vr=implicit, little_endian=True)
        assert (tmp_path / name).read_bytes()[:2] == b"\x08\x00"
        assert np.array_equal(read_image(tmp_path / name), expected)


def test_dicom_padding_is_left_out_of_the_range(tmp_path):
    stored = np.array([[-2000, 100, 200], [300, 500, -2000]], np.int16)
    path = dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000)
    assert read_image(path)[..., 0].tolist() == [[0, 0, 0.25], [0.5, 1, 0]]
    both = dicom(tmp_path / "b.dcm", np.where(stored == 500, -1999, stored).astype(np.int16),
                 PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)  # fmt: skip
    assert read_image(both)[..., 0].tolist() == [[0, 0, 0.5], [1, 0, 0]]
    white = dicom(tmp_path / "w.dcm", stored, PixelPaddingValue=-2000,
                  PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert read_image(white)[..., 0].tolist() == [[0, 1, 0.75], [0.5, 0, 0]]
    # and a range of the whole data set is above that of one image
    ranged = read_image(path, value_range=(100.0, 900.0))
    assert ranged[..., 0].tolist() == [[0, 0, 0.125], [0.25, 0.5, 0]]


def test_values_that_are_not_finite_where_there_is_a_range(caplog):
    """NaN, as outside of a field of view, is the lower end; infinity is the end that it is at."""
    pixels = np.array([[np.nan, 150.0], [np.inf, -np.inf]], np.float32)
    shown = read_image(pixels, value_range=(100.0, 200.0))
    assert shown[..., 0].tolist() == [[0.0, 0.5], [1.0, 0.0]]
    assert "3 of 4 values are NaN or outside 100 to 200" in caplog.text
    for nothing in (np.full((2, 2), np.nan), np.array([[np.inf, np.nan]])):
        with pytest.raises(ImageError, match=f"all of its {nothing.size} values are NaN or inf"):
            read_image(nothing, value_range=(100.0, 200.0))


def test_a_dicom_padding_of_the_other_sign_is_the_same_bits(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    for kind, tag, value in (("i2", "US", 63536), ("u2", "SS", -2000)):
        stored = np.array([[-2000, 100], [300, 500]], np.int16).view(kind)
        dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", stored))
        dataset.add_new(0x00280120, tag, value)
        dataset.save_as(tmp_path / "a.dcm")
        assert read_image(tmp_path / "a.dcm")[..., 0].tolist() == [[0, 0], [0.5, 1]]


def test_a_dicom_padding_that_contradicts_the_bits_blanks_no_image(tmp_path):
    """From -100 to 100 in unsigned pixels; bit by bit that would be nearly all values."""
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", np.array([[50, 200], [300, 600]], "u2")))
    dataset.add_new(0x00280120, "SS", -100)
    dataset.add_new(0x00280121, "SS", 100)
    dataset.save_as(tmp_path / "a.dcm")
    assert read_image(tmp_path / "a.dcm")[..., 0].tolist() == [[0, 0], [0.25, 1]]


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_dicom_values_are_cut_out_of_their_words(tmp_path, kind):
    """In the upper twelve bits, or in the lower ones below an overlay (PS3.5 8.1.1)."""
    signed = kind == np.int16
    values = np.array([[0, 100, 2047], [1, 1000, -2048 if signed else 4095]])
    low, high = int(values.min()), int(values.max())
    bits = {"BitsStored": 12, "PixelRepresentation": int(signed), "RescaleSlope": 1,
            "RescaleIntercept": 0, "WindowCenter": (low + high) / 2, "WindowWidth": high - low,
            "VOILUTFunction": "LINEAR_EXACT"}  # fmt: skip
    plain = (values & 0xFFF).astype(np.uint16)
    overlay = plain | (np.array([[1, 0, 1], [0, 1, 0]]) << 12).astype(np.uint16)
    upper = (plain << 4) | 5
    extended = values.astype(kind)
    cases = {
        "extended": (extended, {"HighBit": 11}),
        "overlay": (overlay.view(kind), {"HighBit": 11, "OverlayBitPosition": 12}),
        "upper": (upper.view(kind), {"HighBit": 15}),
    }
    for name, (stored, tags) in cases.items():
        place = tags.pop("OverlayBitPosition", None)
        path = dicom(tmp_path / f"{name}.dcm", stored, **bits, **tags)
        if place is not None:
            pydicom = pytest.importorskip("pydicom")
            dataset = pydicom.dcmread(path)
            dataset.add_new((0x6000, 0x0102), "US", place)
            dataset.save_as(path)
        read = read_image(path)
        assert np.allclose(read[..., 0], (values - low) / (high - low)), name


@pytest.mark.parametrize(("declared", "largest"), [(16, 65535), (16, 255), (8, 255)])
def test_a_dicom_palette_of_eight_bits_is_not_dark_where_16_are_declared(
    tmp_path, declared, largest
):
    stored = np.array([[0, 1], [2, 3]], np.uint8)
    path = dicom(tmp_path / "p.dcm", stored, PhotometricInterpretation="PALETTE COLOR")
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(path)
    colors = np.array([[0, 1, 0, 0.2], [0, 0, 1, 0.4], [0, 0, 0, 1]])
    kind = "<u2" if declared == 16 else np.uint8
    for number, values in enumerate(colors):  # red, green, blue
        dataset.add_new((0x0028, 0x1101 + number), "US", [4, 0, declared])
        data = np.rint(values * largest).astype(kind).tobytes()
        dataset.add_new((0x0028, 0x1201 + number), "OW", data)
    dataset.save_as(path)
    assert np.allclose(read_image(path).reshape(4, 3), colors.T, atol=1e-4)


@pytest.mark.parametrize("empty", ["RescaleSlope", "RescaleIntercept", "VOILUTFunction"])
def test_an_empty_dicom_element_has_its_default(tmp_path, empty):
    stored = np.array([[100, 200], [300, 500]], np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -300, "WindowCenter": 300, "WindowWidth": 401}
    slope, intercept = 1 + (empty != "RescaleSlope"), -300 * (empty != "RescaleIntercept")
    x = stored.astype(float) * slope + intercept
    path = dicom(tmp_path / "a.dcm", stored, **{**tags, empty: None})
    expected = np.clip((x - 299.5) / 400 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    assert np.abs(read_image(path)[..., 0] - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("tags", "slope", "intercept"),
    [({"RescaleSlope": 2}, 2, 0), ({"RescaleIntercept": -300}, 1, -300)],
)
def test_one_of_a_dicom_slope_and_intercept_is_applied_alone(tmp_path, tags, slope, intercept):
    stored = np.array([[100, 200], [300, 500]], np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, WindowCenter=300, WindowWidth=401, **tags)
    expected = np.clip((stored * float(slope) + intercept - 299.5) / 400 + 0.5, 0, 1)
    assert np.abs(read_image(path)[..., 0] - expected).max() < 1e-6


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 300, "WindowWidth": 401}])
def test_a_dicom_slope_of_zero_is_no_black_image(tmp_path, window):
    stored = np.array([[100, 200], [300, 500]], np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, RescaleSlope=0, RescaleIntercept=0, **window)
    with pytest.raises(ImageError, match="rescale slope of 0"):
        read_image(path)


@pytest.mark.parametrize(
    ("width", "function"), [(0, "LINEAR"), (0, "LINEAR_EXACT"), (-5, "SIGMOID")]
)
def test_a_dicom_window_without_width_is_none(tmp_path, width, function):
    stored = np.array([[100, 200], [300, 500]], np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, WindowCenter=300, WindowWidth=width,
                 VOILUTFunction=function)  # fmt: skip
    assert read_image(path)[..., 0].tolist() == [[0, 0.25], [0.5, 1]]


def test_an_enhanced_dicom_of_one_frame_has_its_own_window(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    rescale, window, groups = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -1000
    window.WindowCenter, window.WindowWidth = 0, 1000
    groups.PixelValueTransformationSequence = [rescale]
    frame = pydicom.Dataset()
    frame.FrameVOILUTSequence = [window]
    stored = np.array([[0, 250], [500, 1000]], np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, NumberOfFrames=1, VOILUTFunction="LINEAR_EXACT",
                 SharedFunctionalGroupsSequence=[groups],
                 PerFrameFunctionalGroupsSequence=[frame])  # fmt: skip
    assert read_image(path)[..., 0].tolist() == [[0, 0], [0.5, 1]]


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLosslessProcess14",
                                  "JPEGLSLossless", "JPEG2000Lossless"])  # fmt: skip
def test_dicom_compressed_without_loss(tmp_path, monkeypatch, name):
    gdcm = pytest.importorskip("gdcm", reason="the extra 'dicom' is not installed")
    stored = (np.arange(40 * 60).reshape(40, 60) * 17 % 4096).astype(np.uint16)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(dicom(tmp_path / "a.dcm", stored)))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(tmp_path / "b.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert np.array_equal(read_image(tmp_path / "b.dcm"), read_image(tmp_path / "a.dcm"))
    if "2000" not in name:  # which Pillow decodes
        import pydicom

        monkeypatch.setattr("regard.data.dicom.missing", lambda extra, *m: list(m))
        monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(_no_decoder))
        with pytest.raises(ImageError, match=r"compressed as JPEG.* pip install 'regard\[dicom\]'"):
            read_image(tmp_path / "b.dcm")


def _no_decoder(_):
    raise RuntimeError("no plugin")


def test_a_dicom_photograph_is_rgb(tmp_path):
    """Baseline JPEG holds YBR; the picture is RGB."""
    pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    import io

    buffer = io.BytesIO()
    Image.fromarray(SMALL).save(buffer, "JPEG", quality=95)
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", SMALL))
    dataset.PhotometricInterpretation = "YBR_FULL_422"
    dataset.PixelData = pydicom.encaps.encapsulate([buffer.getvalue()])
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.save_as(tmp_path / "b.dcm")
    assert np.abs(read_image(tmp_path / "b.dcm") * 255 - SMALL).mean() < 6
