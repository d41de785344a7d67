"""The images of a run: the same ones for the same seed and place, however they come."""

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.stats import chisquare, kstest
from sklearn.datasets import load_sample_images

from regard.data.augment import WIDTH, Augmentation, augment, random_numbers
from regard.data.loading import (
    InMemoryLoader,
    Reader,
    SampleOrder,
    StreamingLoader,
    decode_all,
    fits_in_memory,
)
from regard.data.preprocess import Preprocess
from regard.data.sources import ImageTable, open_data
from regard.training.build import build_loader
from regard.training.config import Recipe
from regard.training.splits import load_split, measured

CROPS = ("none", "shift", "resized")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Crops of photographs as JPEG and PNG, of different sizes, and one 16-bit PNG."""
    folder = tmp_path_factory.mktemp("data") / "data"
    rng = np.random.default_rng(0)
    for c, photo in enumerate(load_sample_images().images):
        (folder / f"class{c}").mkdir(parents=True)
        for k in range(10):
            top, left = rng.integers(0, 200, 2)
            height, width = rng.integers(60, 200, 2)
            crop = Image.fromarray(photo[top : top + height, left : left + width])
            crop.save(folder / f"class{c}/{k}.{'jpg' if k % 2 else 'png'}")
    values = rng.integers(0, 65536, (50, 60)).astype(np.uint16)
    Image.fromarray(values).save(folder / "class0/deep.png")
    return open_data(str(folder))


def batches(table, way: str, recipe: Augmentation, spans, workers: int = 0):
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    reader, order = Reader(table, preprocess, recipe), SampleOrder(len(table), 3)
    if way == "held":
        images, bad = decode_all(reader)
        assert bad == []
        source = InMemoryLoader(reader, order, 3, images, threads=workers)
    else:
        source = StreamingLoader(reader, order, 3, workers)
    found = list(source.batches(spans))
    return [
        (b.indices, augment(b.images, b.random_numbers, recipe, preprocess), b.random_numbers)
        for b in found
    ]


@pytest.mark.parametrize("crop", CROPS)
def test_memory_and_workers_give_the_same_images(table, crop):
    recipe = Augmentation(
        random_crop=crop, rotate=10, zoom=(0.9, 1.1), color_jitter=0.2, random_erasing=0.5
    )
    spans = [(0, 8), (8, 8), (16, 8)]  # over the end of an epoch of 21
    held = batches(table, "held", recipe, spans)
    others = [batches(table, "streamed", recipe, spans, workers) for workers in (0, 1, 2)]
    others.append(batches(table, "held", recipe, spans, 3))
    for other in others:
        for a, b in zip(held, other, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
    # and cut into other batches, from the middle on
    others = batches(table, "streamed", recipe, [(8, 3), (11, 5)])
    again = torch.cat([x for _, x, _ in others])
    assert torch.equal(again, held[1][1])
    assert held[1][1].std() > 0.1


def test_the_order_is_a_permutation_each_epoch_and_starts_anywhere():
    order = SampleOrder(50, 0)
    epochs = [order.at(50 * e, 50) for e in range(3)]
    assert all(sorted(e.tolist()) == list(range(50)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(
        SampleOrder(50, 0).at(30, 50), np.r_[epochs[0][30:], epochs[1][:30]]
    )
    assert not np.array_equal(SampleOrder(50, 1).at(0, 50), epochs[0])


def test_weights_are_those_of_the_draws():
    labels = np.repeat([0, 1, 2], [800, 150, 50])
    weights = 1 / np.bincount(labels)[labels]
    drawn = labels[SampleOrder(1000, 5, weights).at(0, 6000)]
    counts = np.bincount(drawn)
    assert chisquare(counts).pvalue > 0.01
    assert counts.max() / counts.min() < 1.1


def test_random_numbers_belong_to_the_position_not_to_the_call():
    whole = random_numbers(7, 0, 100)
    assert torch.equal(whole, torch.cat([random_numbers(7, 0, 37), random_numbers(7, 37, 63)]))
    assert torch.equal(whole[99], random_numbers(7, 99, 1)[0])
    assert whole.shape == (100, WIDTH)
    assert not torch.equal(whole, random_numbers(8, 0, 100))
    assert kstest(random_numbers(1, 10**12, 2000).flatten().numpy(), "uniform").pvalue > 0.01


def test_what_each_augmentation_does():
    preprocess = Preprocess((1, 16, 24), (0.0,), (1 / 255,))  # normalizing changes nothing
    image = torch.zeros(1, 1, 16, 24)
    image[0, 0, 4, 6] = 200.0
    u = torch.full((1, WIDTH), 0.5)

    def place(recipe, **chosen):
        from regard.data import augment as module

        v = u.clone()
        for name, value in chosen.items():
            v[0, getattr(module, name)] = value
        x = augment(image, v, recipe, preprocess)[0, 0]
        return tuple(int(i) for i in np.unravel_index(int(x.argmax()), x.shape)), float(x.max())

    off = Augmentation(flip=0.0)
    assert torch.equal(augment(image, u, off, preprocess), image)
    assert place(Augmentation(flip=1.0)) == ((4, 17), 200.0)
    shift = Augmentation(flip=0.0, random_crop="shift", crop_shift=0.125)  # 2 rows, 3 columns
    assert place(shift, TOP=0.0, LEFT=0.0) == ((6, 9), 200.0)
    assert place(shift, TOP=0.99, LEFT=0.99) == ((2, 3), 200.0)
    # a quarter turn about the middle of a wide image keeps distances: no shear
    turned, _ = place(Augmentation(flip=0.0, rotate=90.0), ANGLE=1.0)
    assert (abs(turned[0] - 7.5), abs(turned[1] - 11.5)) == (5.5, 3.5)
    bright, _ = place(Augmentation(flip=0.0, color_jitter=0.5), BRIGHTNESS=1.0), None
    assert bright[1] > 200
    noise = torch.rand(400, 1, 32, 32) + 1
    erased = augment(
        noise, random_numbers(0, 0, 400), Augmentation(flip=0.0, random_erasing=1.0),
        Preprocess((1, 32, 32), (0.0,), (1 / 255,)),
    )  # fmt: skip
    share = (erased == 0).float().mean(dim=(1, 2, 3))
    assert 0.005 < share.min() < 0.05
    assert 0.25 < share.max() < 0.36


def test_preprocessing_is_timms_within_a_fraction_of_a_pixel():
    """On smooth images: timm cuts whole pixels of the resized image, here of the image itself."""
    from timm.data import create_transform

    def difference(photo: Image.Image, crop_pct: float) -> torch.Tensor:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        ours, as_timm = (
            Preprocess((3, 112, 112), mean, std, crop_pct=c) for c in (crop_pct, 0.875)
        )
        theirs = create_transform(**as_timm.data_config())
        return (ours(np.asarray(photo)) - theirs(photo)).abs()

    for photo in load_sample_images().images:
        smooth = Image.fromarray(photo).filter(ImageFilter.GaussianBlur(8))
        same = difference(smooth, 0.875)
        assert same.mean() < 0.04  # of a deviation
        assert difference(smooth, 0.9).mean() > 1.5 * same.mean()  # a cut by 3 % larger shows


def test_sixteen_bits_stay_sixteen_bits(table):
    deep = next(i for i in range(len(table)) if table.path(i).endswith("deep.png"))
    preprocess = Preprocess((1, 50, 60), (0.0,), (1.0,), resize="squash")
    values = Reader(table, preprocess).decode(deep)
    assert values.dtype == torch.float32
    assert len(values.unique()) > 2500  # of 3,000 pixels; 256 if they were cut to 8 bits
    flat = Preprocess((1, 8, 8), (0.5,), (0.5,), normalization="image")
    assert flat(np.full((8, 8, 1), 9, np.uint8)).abs().max() == 0


# ------------------------------------------------------------------------------- the order
@given(
    count=st.integers(1, 30), start=st.integers(0, 200), length=st.integers(1, 90),
    weighted=st.booleans(),
)  # fmt: skip
def test_the_order_is_the_same_from_any_place(count, start, length, weighted):
    weights = np.arange(1.0, count + 1) if weighted else None
    whole = SampleOrder(count, 9, weights).at(0, start + length)
    assert np.array_equal(SampleOrder(count, 9, weights).at(start, length), whole[start:])
    walked = SampleOrder(count, 9, weights)  # as training walks, batch by batch
    parts = [walked.at(k, min(7, start + length - k)) for k in range(0, start + length, 7)]
    assert np.array_equal(np.concatenate(parts), whole)
    if not weighted:
        for k in range(0, len(whole) - count + 1, count):
            assert sorted(whole[k : k + count]) == list(range(count))


def test_no_two_epochs_are_alike():
    epochs = {tuple(SampleOrder(12, 0).at(12 * e, 12)) for e in range(20)}
    assert len(epochs) == 20


def test_images_without_weight_are_never_drawn():
    drawn = SampleOrder(4, 0, np.array([0.0, 1.0, 3.0, 0.0])).at(0, 4000)
    assert set(drawn) == {1, 2}
    assert chisquare(np.bincount(drawn)[1:3], [1000, 3000]).pvalue > 0.01


# ------------------------------------------------------------------- what can't be read
@pytest.fixture
def damaged(tmp_path):
    """Twelve even images, 0 to 11, of which 3 is no image, 7 is cut off, and 10 is gone."""
    for k in range(12):
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 9, (40, 40))
        Image.fromarray((noise + 20 * k).astype(np.uint8)).save(
            tmp_path / f"class{k % 2}/{k:02d}.png"
        )
    table = open_data(str(tmp_path))
    by_name = sorted(range(12), key=lambda i: table.path(i)[-6:])
    files = [table.path(i) for i in by_name]
    (tmp_path / "class1/03.png").write_bytes(b"no image")
    (tmp_path / "class1/07.png").write_bytes((tmp_path / "class1/07.png").read_bytes()[:500])
    (tmp_path / "class0/10.png").unlink()
    return table.select(by_name), files


UNIT = Preprocess((1, 40, 40), (0.0,), (1 / 255,))
BAD = {3, 7, 10}


def test_beside_openvino_threads_read_the_same_images(table, monkeypatch):
    """Processes that are forked beside it crash this one at the next end of a child."""
    recipe = Augmentation(random_crop="resized")
    spans = [(0, 4), (4, 4), (8, 3)]
    expected = batches(table, "streamed", recipe, spans, 2)
    monkeypatch.setitem(sys.modules, "openvino", object())
    monkeypatch.setattr("regard.data.workers.DataLoader", None)  # nothing is forked
    found = batches(table, "streamed", recipe, spans, 2)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_leaves_out_what_cannot_be_read(damaged, workers):
    table, files = damaged
    source = StreamingLoader(Reader(table, UNIT, Augmentation()), None, 5, workers)
    found = list(source.batches([(0, 5), (5, 5), (10, 1), (11, 1)]))
    assert [b.indices.tolist() for b in found] == [[0, 1, 2, 4], [5, 6, 8, 9], [], [11]]
    assert [len(b.images) for b in found] == [4, 4, 0, 1]
    assert found[2].images.shape == (0, 1, 40, 40)
    for b in found:
        level = b.images.float().mean(dim=(1, 2, 3))
        assert ((level - 20 * b.indices - 4).abs() < 0.5).all()
        for row, u in zip(b.indices.tolist(), b.random_numbers, strict=True):
            assert torch.equal(
                u, random_numbers(5, row, 1)[0]
            )  # its own, whoever is missing before it
    told = [u for b in found for u in b.unreadable]
    assert [row for row, _ in told] == sorted(BAD)
    for row, reason in told:
        assert files[row] in reason
        assert "\n" not in reason


@pytest.mark.parametrize("memory", ["yes", "no"])
@pytest.mark.parametrize("crop", CROPS)
def test_a_part_has_its_readable_images_alone(damaged, memory, crop):
    table, files = damaged
    recipe = Recipe(memory=memory, random_crop=crop)
    part = load_split(Reader(table, UNIT, recipe.augmentation), recipe, "train", show=False)
    assert [path for path, _ in part.left_out] == [files[row] for row in sorted(BAD)]
    kept = [row for row in range(12) if row not in BAD]
    assert [part.table.path(i) for i in range(9)] == [files[row] for row in kept]
    assert np.array_equal(part.table.labels, table.labels[kept])
    if memory == "no":
        assert part.images is None
        return
    levels = [float(image.float().mean()) for image in part.images]
    assert levels == pytest.approx([20 * row + 4 for row in kept], abs=0.5)


def test_one_deep_image_makes_all_of_them_floats(table):
    reader = Reader(table, Preprocess((1, 20, 20), (0.0,), (1 / 255,)))
    images, _ = decode_all(reader)
    assert images.dtype == torch.float32
    for row in range(len(table)):
        assert torch.equal(images[row], reader.preprocess.fit(reader.decode(row)).float())
    eight = [i for i in range(len(table)) if not table.path(i).endswith("deep.png")]
    assert decode_all(Reader(table.select(eight), reader.preprocess))[0].dtype == torch.uint8


def test_evaluation_takes_rows_in_order(table):
    reader = Reader(table, UNIT)
    spans = [(0, 4), (8, 4)]
    held = list(InMemoryLoader(reader, None, 0, decode_all(reader)[0]).batches(spans))
    streamed = list(StreamingLoader(reader, None, 0, 2).batches(spans))
    for a, b in zip(held, streamed, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.images.float(), b.images.float())
    assert [b.indices.tolist() for b in held] == [[0, 1, 2, 3], [8, 9, 10, 11]]


# --------------------------------------------------------------------------------- memory
def many(count: int, path: str) -> ImageTable:
    """So many times the same file; tables know names alone, so it costs nothing."""
    return ImageTable(
        "many",
        ["a", "b"],
        np.zeros(count, np.int64),
        np.full(count, "", "U5"),
        files=[path] * count,
    )


@pytest.mark.parametrize(
    ("bits", "crop", "fits", "too_many"),
    [
        # 2 GiB of 3 x 224 x 224 bytes, or of four bytes each for more than 8 bits
        (8, "none", 14_200, 14_300),
        (16, "shift", 3_550, 3_600),
        # half a GiB of 3 x 100 x 160, in the images' own size
        (8, "resized", 11_100, 11_300),
        (16, "resized", 2_780, 2_810),
    ],
)
def test_images_are_held_where_they_fit(tmp_path, bits, crop, fits, too_many):
    path = str(tmp_path / "a.png")
    Image.fromarray(np.zeros((100, 160), np.uint8 if bits == 8 else np.uint16)).save(path)
    preprocess, recipe = (
        Preprocess((3, 224, 224), (0.5,) * 3, (0.2,) * 3),
        Augmentation(random_crop=crop),
    )
    assert fits_in_memory(Reader(many(fits, path), preprocess, recipe))
    assert not fits_in_memory(Reader(many(too_many, path), preprocess, recipe))


def test_tests_are_held_in_the_inputs_size_whatever_the_training_cut(tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    preprocess = Preprocess((3, 224, 224), (0.5,) * 3, (0.2,) * 3)
    small = Augmentation(random_crop="resized")
    assert fits_in_memory(Reader(many(20_000, path), preprocess, small))
    assert not fits_in_memory(Reader(many(20_000, path), preprocess, None))
    recipe = Recipe(random_crop="resized", memory="auto")
    part = load_split(Reader(many(3, path), preprocess), recipe, "val", show=False)
    assert part.images.shape == (3, 3, 224, 224)


def test_what_cannot_be_read_is_not_held(tmp_path):
    assert not fits_in_memory(Reader(many(3, str(tmp_path / "none.png")), UNIT, Augmentation()))


# ------------------------------------------------------------------------------- measuring
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("memory", ["yes", "no"])
def test_mean_and_deviation_are_the_images(table, memory, crop):
    preprocess = Preprocess((3, 32, 48), (0.0,) * 3, (1.0,) * 3, resize="squash")
    recipe = Recipe(memory=memory, random_crop=crop)
    part = load_split(Reader(table, preprocess, recipe.augmentation), recipe, "train", show=False)
    found = measured(part, preprocess)
    # a training image in memory may be decoded smaller; where it is not, in full
    at_least = preprocess.at_least if part.images is not None and crop != "resized" else None
    images = np.stack(
        [preprocess(table.read(i, channels=3, at_least=at_least)) for i in range(len(table))]
    )
    assert found.mean == pytest.approx(images.mean(axis=(0, 2, 3)), abs=2e-4)
    assert found.std == pytest.approx(images.std(axis=(0, 2, 3)), abs=2e-4)


def test_measuring_many_goes_piece_by_piece_and_even_images_are_no_division_by_zero():
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (300, 8, 8)).astype(np.uint8)
    table = ImageTable("a", ["a", "b"], np.zeros(300, np.int64), np.full(300, ""), arrays=arrays)
    preprocess = Preprocess((1, 8, 8), (0.0,), (1.0,))
    part = load_split(Reader(table, preprocess), Recipe(), "train", show=False)
    found = measured(part, preprocess)
    assert found.mean == pytest.approx([arrays.mean() / 255], abs=1e-6)
    assert found.std == pytest.approx([arrays.std() / 255], abs=1e-6)
    part.images.fill_(200)
    even = measured(part, preprocess)
    assert even.std == (0.001,)
    assert even.normalize(part.images).isfinite().all()


def test_held_images_are_cut_by_threads_ahead_for_a_device_alone(table):
    """Three batches are cut at once, which one thread after the other never does."""
    reader = Reader(table, Preprocess((3, 32, 32), (0.5,) * 3, (0.25,) * 3),
                    Augmentation(random_crop="resized"))  # fmt: skip
    images, _ = decode_all(reader)
    together = threading.Barrier(3, timeout=20)

    class Waiting(InMemoryLoader):
        def _batch(self, span):
            together.wait()  # until three threads are here
            return super()._batch(span)

    loader = Waiting(reader, None, 0, images, threads=3)
    assert len(list(loader.batches([(0, 4), (4, 4), (8, 4)]))) == 3
    recipe = Recipe(random_crop="resized", workers=5)
    plan = SimpleNamespace(recipe=recipe, classes=table.classes, rules=2)
    part = SimpleNamespace(reader=reader, table=table, images=images, missing={})
    for device, threads in (("cpu", 0), ("cuda", 5)):
        assert build_loader(plan, "train", part, torch.device(device)).threads == threads


@pytest.mark.parametrize(
    ("scale", "full", "expected"),
    [
        ((0.35, 1.0), False, 240),
        ((0.15, 1.0), False, 480),
        ((0.04, 1.0), False, 960),
        ((0.35, 1.0), True, 960),
    ],
)
def test_jpegs_are_decoded_large_enough_for_the_smallest_crop(tmp_path, scale, full, expected):
    """128 / sqrt(0.35) = 216.4, 128 / sqrt(0.15) = 330.5 and 128 / sqrt(0.04) = 640 are needed."""
    path = tmp_path / "photograph.jpg"
    Image.fromarray(np.zeros((960, 1280, 3), np.uint8)).save(path)
    table = ImageTable("one", ["a"], np.zeros(1, np.int64), np.array(["train"]), files=[str(path)])
    preprocess = Preprocess((3, 128, 128), (0.5,) * 3, (0.25,) * 3)
    crops = Augmentation(random_crop="resized", crop_scale=scale, full_decode=full)
    assert Reader(table, preprocess, crops).decode(0).shape[1] == expected
    whole = Augmentation(random_crop="shift", full_decode=full)
    assert Reader(table, preprocess, whole).decode(0).shape[1] == (960 if full else 240)
    assert Reader(table, preprocess).decode(0).shape[1] == 960  # in evaluation
