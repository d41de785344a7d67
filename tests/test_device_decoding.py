"""JPEG files decoded by the device: the same images, and what it can't decode is Pillow's."""

import logging
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_images
from torch._subclasses.fake_tensor import FakeTensorMode

import regard
from regard.data import device_decoding, preprocess
from regard.data.augment import Augmentation
from regard.data.device_decoding import DecodingLoader, check_device_decoding, is_plain_jpeg
from regard.data.loading import Batch, Reader, SampleOrder, StreamingLoader
from regard.data.preprocess import Preprocess, resample
from regard.data.sources import open_data
from regard.errors import UsageError
from regard.training.feed import Mover
from regard.training.trial import first_batches

try:
    import torchcodec.decoders
except (ImportError, OSError, RuntimeError):  # its wheel for CUDA beside a torch for CPUs
    pytest.skip("torchcodec does not load with this torch", allow_module_level=True)

CPU = torch.device("cpu")
ORIENTATION = 0x0112  # EXIF 2.3


def photo(width: int = 150, height: int = 90, seed: int = 0) -> Image.Image:
    top, left = np.random.default_rng(seed).integers(0, 200, 2)
    pixels = load_sample_images().images[seed % 2]
    return Image.fromarray(pixels[top : top + height, left : left + width])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of photographs, stored in all the ways that folders hold."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for c in "ab":
        (root / c).mkdir(parents=True)
        for k in range(1, 9):  # each EXIF orientation
            exif = Image.Exif()
            exif[ORIENTATION] = k
            photo(seed=k).save(root / c / f"turned{k}.jpg", exif=exif)
        photo(seed=20).save(root / c / "small.jpg", quality=60, subsampling=2)
        photo(seed=21).save(root / c / "progressive.jpg", progressive=True)
        photo(seed=22).convert("L").save(root / c / "gray.jpg")
        photo(seed=23).convert("CMYK").save(root / c / "print.jpg")
        photo(seed=24).save(root / c / "rgb.jpg", keep_rgb=True)
        photo(seed=25).save(root / c / "other.png")
        values = np.arange(50 * 60, dtype=np.uint16).reshape(50, 60) * 20
        Image.fromarray(values).save(root / c / "deep.png")
    return root


def loaders(folder: Path, *, channels: int = 3, crop: str = "resized", workers: int = 0):
    table = open_data(str(folder))
    mean = (0.5,) * channels
    preprocess = Preprocess((channels, 32, 32), mean, mean)
    augmentation = Augmentation(random_crop=crop, crop_scale=(0.35, 1.0), full_decode=True)
    reader = Reader(table, preprocess, augmentation)
    order = SampleOrder(len(table), 3)
    return (
        StreamingLoader(reader, order, 3, 0),
        DecodingLoader(reader, order, 3, workers),
    )


def spans(loader, batches: int = 3):
    size = len(loader.reader.table) // batches
    return [(k * size, size) for k in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("crop", ["resized", "none"])
def test_a_device_decodes_the_images_that_pillow_does(folder, crop, channels, workers):
    by_pillow, by_device = loaders(folder, channels=channels, crop=crop, workers=workers)
    theirs = list(by_pillow.batches(spans(by_pillow)))
    ours = [batch.decoded(CPU) for batch in by_device.batches(spans(by_device))]
    assert sum(len(batch.indices) for batch in ours) == 30
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.random_numbers, other.random_numbers)
        assert one.images.dtype == other.images.dtype
        assert torch.equal(one.images, other.images)
        assert one.unreadable == other.unreadable == []


def test_only_files_that_it_shows_as_pillow_does_are_given_to_the_device(folder):
    _, loader = loaders(folder)
    given = {}
    for batch in loader.batches(spans(loader)):
        for k, row in enumerate(batch.indices.tolist()):
            name = Path(loader.reader.table.path(row)).stem
            given[name] = k in batch.files
    plain = [*(f"turned{k}" for k in range(1, 9)), "small", "progressive", "gray"]
    others = ["print", "rgb", "other", "deep"]
    assert given == dict.fromkeys(plain, True) | dict.fromkeys(others, False)


def test_headers_are_read_once(folder, monkeypatch):
    _, loader = loaders(folder)
    list(loader.batches(spans(loader)))
    monkeypatch.setattr(device_decoding, "is_plain_jpeg", lambda content: 1 / 0)
    assert sum(len(batch.files) for batch in loader.batches(spans(loader))) == 22


@pytest.fixture
def broken(tmp_path) -> Path:
    root = tmp_path / "photos"
    for c in "ab":
        (root / c).mkdir(parents=True)
        for k in range(4):
            photo(seed=k).save(root / c / f"{k}.jpg")
    good = (root / "a/0.jpg").read_bytes()
    (root / "a/short.jpg").write_bytes(good[:-400])
    (root / "a/padded.jpg").write_bytes(good + bytes(7))
    (root / "b/empty.jpg").write_bytes(b"")
    (root / "b/text.jpg").write_text("no image", encoding="utf-8")
    tables = good.index(b"\xff\xc4")  # Huffman's, without which nothing can be decoded
    (root / "b/tables.jpg").write_bytes(good[:tables] + b"\xff\xc4\x00\x03\x00" + good[-40:])
    return root


def test_broken_files_are_told_as_pillow_tells_them(broken):
    by_pillow, by_device = loaders(broken)
    (theirs,), (ours,) = (list(x.batches([(0, 13)])) for x in (by_pillow, by_device))
    found = ours.decoded(CPU)
    assert sorted(found.unreadable) == sorted(theirs.unreadable)
    told = {Path(by_pillow.reader.table.path(row)).name for row, _ in found.unreadable}
    assert told == {"short.jpg", "empty.jpg", "text.jpg", "tables.jpg"}
    assert torch.equal(found.indices, theirs.indices)
    assert torch.equal(found.images, theirs.images)


def test_files_that_are_cut_short_are_not_given_to_the_device(broken):
    """nvJPEG may show them, with gray below; Pillow refuses them."""
    _, loader = loaders(broken)
    (batch,) = loader.batches([(0, 13)])
    given = {Path(loader.reader.table.path(int(batch.indices[k]))).name for k in batch.files}
    assert "short.jpg" not in given
    assert "padded.jpg" in given


def test_files_that_vanish_are_told(broken):
    _, loader = loaders(broken)
    list(loader.batches([(0, 13)]))
    (broken / "a/1.jpg").unlink()
    (batch,) = loader.batches([(0, 13)])
    assert any("1.jpg: no such file" in why for _, why in batch.decoded(CPU).unreadable)


def test_one_file_that_a_device_refuses_costs_no_other(broken, monkeypatch):
    """nvJPEG gives nothing of a list in which one file is broken."""
    decode, calls = torchcodec.decoders.decode_jpeg, []

    def refuses(source, **how):
        calls.append(source)
        files = source if isinstance(source, list) else [source]
        if any(len(file) == len((broken / "b/2.jpg").read_bytes()) for file in files):
            raise RuntimeError("nvjpegDecodeBatched failed: 5")
        return decode(source, **how)

    by_pillow, loader = loaders(broken)
    (batch,) = loader.batches([(0, 13)])
    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", refuses)
    found = batch.decoded(CPU)
    (theirs,) = by_pillow.batches([(0, 13)])
    assert len(calls) == 1 + len(batch.files)
    assert torch.equal(found.images, theirs.images)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # torch's, torchcodec's
def test_memory_that_ran_out_is_no_broken_file(broken, monkeypatch, kind):
    def fails(source, **how):
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB")

    _, loader = loaders(broken)
    (batch,) = loader.batches([(0, 13)])
    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", fails)
    with pytest.raises(kind, match="CUDA out of memory"):
        batch.decoded(CPU)


def test_a_device_holds_a_part_of_a_batch_whole(broken, monkeypatch):
    decode, sizes = torchcodec.decoders.decode_jpeg, []

    def counted(source, **how):
        sizes.append(len(source) if isinstance(source, list) else 1)
        return decode(source, **how)

    by_pillow, loader = loaders(broken)
    (batch,), (theirs,) = (list(x.batches([(0, 13)])) for x in (loader, by_pillow))
    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", counted)
    monkeypatch.setattr(device_decoding, "TOGETHER", 4)
    assert torch.equal(batch.decoded(CPU).images, theirs.images)
    assert max(sizes) == 4


def test_trial_steps_are_timed_without_the_decoding(folder):
    _, loader = loaders(folder)
    trainer = SimpleNamespace(
        spans=lambda step: spans(loader), step=0, steps=SimpleNamespace(parts=lambda step: 2),
        source=loader, device=CPU,
    )  # fmt: skip
    assert [type(batch) for batch in first_batches(trainer)] == [Batch, Batch]


def test_a_batch_without_a_readable_image_is_empty(tmp_path):
    for c in "ab":
        (tmp_path / c).mkdir()
        (tmp_path / c / "x.jpg").write_bytes(b"\xff\xd8\xff nothing")
    _, loader = loaders(tmp_path)
    (batch,) = loader.batches([(0, 2)])
    found = batch.decoded(CPU)
    assert found.images.shape == (0, 3, 32, 32)
    assert len(found.unreadable) == 2


@pytest.mark.parametrize("value", [0, 9, 300])
def test_orientations_that_are_none_leave_an_image_as_it_is(tmp_path, value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    photo().save(tmp_path / "a.jpg", exif=exif)
    _same(tmp_path / "a.jpg")


def test_an_orientation_that_xmp_tells(tmp_path):
    """torchcodec reads EXIF alone."""
    tag = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    photo().save(tmp_path / "a.jpg", xmp=tag)
    _same(tmp_path / "a.jpg")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "plain"), [("H", True), ("I", False)])
def test_an_orientation_in_more_than_16_bits(tmp_path, order, kind, plain):
    """torchcodec takes the first two bytes, whatever the type."""
    first = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    code = {"H": 3, "I": 4}[kind]
    entry = struct.pack(f"{order}HHHI{kind}", 1, ORIENTATION, code, 1, 6)
    exif = b"Exif\0\0" + first + entry.ljust(14, b"\0") + bytes(4)
    more = {"xmp": b"<x:xmpmeta/>"} if plain else {}  # is no reason for Pillow by itself
    photo().save(tmp_path / "a.jpg", exif=exif, **more)
    assert is_plain_jpeg((tmp_path / "a.jpg").read_bytes()) is plain
    _same(tmp_path / "a.jpg")


def test_an_orientation_after_fill_bytes(tmp_path):
    """On a GPU torchcodec looks for EXIF by itself, and no further than those."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo().save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    assert is_plain_jpeg(content)
    at = content.index(b"\xff\xe1")  # the segment of EXIF
    assert not is_plain_jpeg(content[:at] + b"\xff" + content[at:])


def _same(path: Path) -> None:
    for c in "xy":
        (path.parent / "data" / c).mkdir(parents=True)
        shutil.copy(path, path.parent / "data" / c / "a.jpg")
    by_pillow, by_device = loaders(path.parent / "data", crop="none")
    (one,), (other,) = (list(x.batches([(0, 2)])) for x in (by_pillow, by_device))
    assert torch.equal(one.images, other.decoded(CPU).images)


def test_a_color_profile_is_no_reason_for_pillow(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo().save(tmp_path / "x.jpg", icc_profile=profile)
    assert is_plain_jpeg((tmp_path / "x.jpg").read_bytes())


def test_a_run_is_the_same_to_the_last_bit(folder, tmp_path):
    """On a CPU, whose decoder is Pillow's."""
    how = {
        "model": "cbam_resnet18", "model_args": {"channels": [4, 4, 8, 8]}, "size": 32, "epochs": 2,
        "batch_size": 8, "random_crop": "resized", "full_decode": True, "memory": "no",
        "workers": 1, "val": 0.2, "test": 0.2, "mixup": 0.2, "faithfulness_images": 0,
        "device": "cpu", "trackers": (),
    }  # fmt: skip
    runs = [
        regard.train(folder, out=tmp_path / decode, decode=decode, **how)
        for decode in ("cpu", "device")
    ]
    one, other = ((run / "metrics.csv").read_text(encoding="utf-8") for run in runs)
    assert len(one.splitlines()) == 3
    assert [row.split(",")[:6] for row in one.splitlines()] == [
        row.split(",")[:6] for row in other.splitlines()
    ]
    one, other = ((run / "model.safetensors").read_bytes() for run in runs)
    assert one == other


def test_images_held_in_memory_need_no_decoder(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="regard")
    regard.train(
        folder, out=tmp_path / "run", decode="device", model="cbam_resnet18", size=32, steps=1,
        batch_size=4, model_args={"channels": [4, 4, 8, 8]}, device="cpu", trackers=(),
        faithfulness_images=0,
    )  # fmt: skip
    assert "decode=device has no effect: the training images are held in memory" in caplog.text


def test_devices_that_decode_nothing_are_refused(monkeypatch):
    check_device_decoding(CPU)
    with pytest.raises(UsageError, match=r"^decode=device: .* mps does not"):
        check_device_decoding(torch.device("mps"))

    def fails(source, **how):  # where each batch would be Pillow's, in one thread
        raise RuntimeError("Failed to initialize nvjpeg with hardware backend: 6")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", fails)
    with pytest.raises(UsageError, match=r"can't decode on cuda:0 .*hardware backend: 6\): "):
        check_device_decoding(torch.device("cuda", 0))


def test_a_torchcodec_that_does_not_load_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # importing it fails
    with pytest.raises(UsageError, match=r"^decode=device: torchcodec can't decode on cpu"):
        check_device_decoding(CPU)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("regard.extras.is_installed", lambda name: name != "torchcodec")
    with pytest.raises(UsageError, match=r"^decode=device needs torchcodec: pip install"):
        check_device_decoding(CPU)


def test_what_is_on_the_device_is_not_copied_again():
    tensor = torch.empty(2, device="meta")
    assert Mover(torch.device("cuda", 0))(tensor) is tensor


def test_devices_resize_bytes_to_bytes():
    image = torch.empty(3, 40, 50, dtype=torch.uint8, device="meta")
    assert resample(image, (0, 0, 50, 40), (16, 16)).dtype == torch.uint8


@pytest.mark.parametrize(("height", "width", "where"), [(1600, 800, "cuda"), (1601, 800, "cpu")])
def test_what_a_gpu_can_not_shrink_is_shrunk_by_the_cpu(monkeypatch, height, width, where):
    """A photograph of 6,000 x 4,000 pixels to 32: "Too much shared memory required"."""
    interpolate, seen = torch.nn.functional.interpolate, []

    def watched(x, **how):
        seen.append(x.device.type)
        return interpolate(x, **how)

    monkeypatch.setattr(preprocess.F, "interpolate", watched)
    with FakeTensorMode():
        image = torch.empty(3, height, width, dtype=torch.uint8, device="cuda:0")
        small = resample(image, (0, 0, width, height), (32, 32))
    assert (small.device.type, small.dtype, seen) == ("cuda", torch.uint8, [where])
