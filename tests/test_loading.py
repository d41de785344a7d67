"""The images of a run: the same ones for the same seed and place, however they come."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import chisquare, kstest
from sklearn.datasets import load_sample_images

from regard.data.augment import WIDTH, augment, draws, mixed
from regard.data.loading import Held, Order, Reader, Streamed, decode_all
from regard.data.preprocess import Preprocess
from regard.data.sources import open_data
from regard.recipes import Recipe

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


def batches(table, way: str, recipe: Recipe, spans, workers: int = 0):
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.25,) * 3)
    reader, order = Reader(table, preprocess, recipe), Order(len(table), 3)
    if way == "held":
        images, bad = decode_all(reader)
        assert bad == []
        source = Held(reader, order, 3, images)
    else:
        source = Streamed(reader, order, 3, workers)
    found = list(source.batches(spans))
    return [(b.indices, augment(b.images, b.draws, recipe, preprocess), b.draws) for b in found]


@pytest.mark.parametrize("crop", CROPS)
def test_memory_and_workers_give_the_same_images(table, crop):
    recipe = Recipe(random_crop=crop, rotate=10, zoom=(0.9, 1.1), colour=0.2, erase=0.5)
    spans = [(0, 8), (8, 8), (16, 8)]  # over the end of an epoch of 21
    held = batches(table, "held", recipe, spans)
    for workers in (0, 2):
        streamed = batches(table, "streamed", recipe, spans, workers)
        for a, b in zip(held, streamed, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
    # and cut into other batches, from the middle on
    others = batches(table, "streamed", recipe, [(8, 3), (11, 5)])
    again = torch.cat([x for _, x, _ in others])
    assert torch.equal(again, held[1][1])
    assert held[1][1].std() > 0.1


def test_the_order_is_a_permutation_each_epoch_and_starts_anywhere():
    order = Order(50, 0)
    epochs = [order.at(50 * e, 50) for e in range(3)]
    assert all(sorted(e.tolist()) == list(range(50)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(Order(50, 0).at(30, 50), np.r_[epochs[0][30:], epochs[1][:30]])
    assert not np.array_equal(Order(50, 1).at(0, 50), epochs[0])


def test_weights_are_those_of_the_draws():
    labels = np.repeat([0, 1, 2], [800, 150, 50])
    weights = 1 / np.bincount(labels)[labels]
    drawn = labels[Order(1000, 5, weights).at(0, 6000)]
    counts = np.bincount(drawn)
    assert chisquare(counts).pvalue > 0.01
    assert counts.max() / counts.min() < 1.1


def test_draws_belong_to_the_place_not_to_the_call():
    whole = draws(7, 0, 100)
    assert torch.equal(whole, torch.cat([draws(7, 0, 37), draws(7, 37, 63)]))
    assert torch.equal(whole[99], draws(7, 99, 1)[0])
    assert whole.shape == (100, WIDTH)
    assert not torch.equal(whole, draws(8, 0, 100))
    assert kstest(draws(1, 10**12, 2000).flatten().numpy(), "uniform").pvalue > 0.01


def test_what_each_augmentation_does():
    preprocess = Preprocess((1, 16, 24), (0.0,), (1 / 255,))  # normalising changes nothing
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

    off = Recipe(flip=0.0)
    assert torch.equal(augment(image, u, off, preprocess), image)
    assert place(Recipe(flip=1.0)) == ((4, 17), 200.0)
    shift = Recipe(flip=0.0, random_crop="shift", crop_shift=0.125)  # 2 rows, 3 columns
    assert place(shift, TOP=0.0, LEFT=0.0) == ((6, 9), 200.0)
    assert place(shift, TOP=0.99, LEFT=0.99) == ((2, 3), 200.0)
    # a quarter turn about the middle of a wide image keeps distances: no shear
    turned, _ = place(Recipe(flip=0.0, rotate=90.0), ANGLE=1.0)
    assert (abs(turned[0] - 7.5), abs(turned[1] - 11.5)) == (5.5, 3.5)
    bright, _ = place(Recipe(flip=0.0, colour=0.5), BRIGHTNESS=1.0), None
    assert bright[1] > 200
    noise = torch.rand(400, 1, 32, 32) + 1
    erased = augment(
        noise, draws(0, 0, 400), Recipe(flip=0.0, erase=1.0),
        Preprocess((1, 32, 32), (0.0,), (1 / 255,)),
    )  # fmt: skip
    share = (erased == 0).float().mean(dim=(1, 2, 3))
    assert 0.005 < share.min() < 0.05
    assert 0.25 < share.max() < 0.36


def test_mixup_mixes_images_as_it_mixes_targets():
    x = torch.rand(6, 1, 4, 4)
    target = torch.eye(6)
    mixed_x, mixed_target = mixed(x, target, draws(0, 0, 6), 0.4)
    torch.testing.assert_close(mixed_target.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(mixed_x, torch.einsum("ij,jchw->ichw", mixed_target, x))
    assert 0.001 < float(mixed_target.diagonal().min()) < 0.5


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
    flat = Preprocess((1, 8, 8), (0.5,), (0.5,), standardise="image")
    assert flat(np.full((8, 8, 1), 9, np.uint8)).abs().max() == 0
