"""What the network sees of an image: the right part, as timm cuts it, every bit of it kept."""

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torchvision.transforms.v2.functional import normalize

from regard.data.images import read_image
from regard.data.preprocess import RESIZES, Preprocess, normalize_each, to_tensor
from regard.engines import standalone
from regard.engines.backends import _normalize_each
from regard.errors import UsageError

PHOTOS = load_sample_images().images  # two of (427, 640, 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES = [(1, 1), (1, 300), (300, 1), (7, 5), (97, 61), (61, 197), (500, 20)]


def plain(height: int, width: int, channels: int = 1, **options) -> Preprocess:
    """That leaves values as they are, 0 to 255."""
    unit = (0.0,) * channels, (1 / 255,) * channels
    return Preprocess((channels, height, width), *unit, **options)


# ---------------------------------------------------------------------------- the geometry
@given(
    image=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    crop_pct=st.floats(0.1, 1),
    resize=st.sampled_from(RESIZES),
)
def test_the_box_is_a_centered_part_of_the_image(image, size, crop_pct, resize):
    height, width = image
    box = plain(*size, resize=resize, crop_pct=crop_pct).box(height, width)
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs(left - (width - right)) <= 1
    assert abs(top - (height - bottom)) <= 1
    rows, columns = bottom - top, right - left
    half = 0.5 + 1e-9  # a side that ends on half a pixel may be rounded either way
    if resize == "squash":
        assert abs(rows - crop_pct * height) <= half or rows == 1
        assert abs(columns - crop_pct * width) <= half or columns == 1
    elif resize == "crop":  # the input's aspect, to half a pixel of either side
        unit = crop_pct * min(height / size[0], width / size[1])
        assert abs(rows - unit * size[0]) <= half or rows == 1
        assert abs(columns - unit * size[1]) <= half or columns == 1
    elif crop_pct == 1:
        assert (rows, columns) == (height, width)


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (97, 61)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
@pytest.mark.parametrize("options", [
    {"resize": "crop"}, {"resize": "crop", "resize_first": True}, {"resize": "squash"},
    {"resize": "pad"},
])  # fmt: skip
def test_what_is_seen_is_where_the_inputs_pixels_come_from(shape, size, crop_pct, options):
    """In an image whose values are coordinates, the input's values say where they come from."""
    preprocess = plain(*size, crop_pct=crop_pct, **options)
    y, x = np.meshgrid(*(np.arange(n) + 0.5 for n in shape), indexing="ij")
    left, top, right, bottom = preprocess.seen(*shape)
    for axis, values, low, high in ((0, y, top, bottom), (1, x, left, right)):
        (fitted,) = preprocess.fit(torch.from_numpy(values[None].astype(np.float32)))
        found = fitted.movedim(axis, 0)[:, size[1 - axis] // 2].numpy()
        cell = (high - low) / size[axis]
        wanted = low + cell * (np.arange(size[axis]) + 0.5)
        # apart from the borders, where the filter is cut, and the margins
        inner = (wanted > 1.5 * cell + 2) & (wanted < shape[axis] - 1.5 * cell - 2)
        inner[[0, 1, 2, -3, -2, -1]] = False
        assert inner.sum() > 10
        np.testing.assert_allclose(found[inner], wanted[inner], atol=0.26)


def test_a_known_crop():
    assert plain(224, 224).box(480, 640) == (80, 0, 560, 480)
    assert plain(224, 224, crop_pct=0.875).box(480, 640) == (110, 30, 530, 450)
    assert plain(208, 272).box(480, 480) == (0, 56, 480, 423)
    for resize in ("squash", "pad"):
        assert plain(224, 224, resize=resize).box(480, 641) == (0, 0, 641, 480)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_tall_and_tiny_images_fit(resize, shape):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    for size in ((32, 32), (21, 40)):
        fitted = plain(*size, channels=3, resize=resize).fit(to_tensor(values))
        assert fitted.dtype == torch.uint8
        assert fitted.shape == (3, *size)
        assert values.min() <= fitted.min() <= fitted.max() <= values.max()
        # an even picture stays even, margins and all
        even = plain(*size, channels=3, resize=resize).fit(torch.full((3, *shape), 77).byte())
        assert (even == 77).all()


def test_floats_as_thin_as_one_column_are_resized_as_bytes_are():
    image = to_tensor(load_sample_images().images[0][:230, 100:102])
    fitting = Preprocess((3, 128, 75), (0.5,) * 3, (0.25,) * 3, "pad")
    assert (fitting.fit(image.float()) - fitting.fit(image).float()).abs().max() <= 1


def test_pad_keeps_the_whole_image_between_margins_of_its_mean():
    image = torch.zeros(1, 10, 20)
    image[..., 10:] = 200
    padded = plain(20, 20, resize="pad").fit(image)[0]
    assert (padded[:5] == 100).all()
    assert (padded[15:] == 100).all()
    assert torch.equal(padded[5:15], image[0])
    tall = plain(20, 20, resize="pad").fit(image.transpose(1, 2))[0]
    assert torch.equal(tall, padded.T)


def test_crop_and_squash_see_what_they_should():
    columns = torch.arange(40.0).expand(1, 20, 40) * 6  # each column says where it is
    crop = plain(20, 20, resize="crop").fit(columns)[0, 0]
    assert torch.equal(crop, columns[0, 0, 10:30])
    squash = plain(20, 20, resize="squash").fit(columns)[0, 0]
    torch.testing.assert_close(squash[1:-1], torch.arange(1.5, 37, 2)[: len(squash) - 2] * 6 + 6)


# --------------------------------------------------------------------------------- timm's
def difference(photo: Image.Image, ours: Preprocess, timms: Preprocess) -> float:
    """The mean difference to timm's transform, in deviations; of "pad" inside the margins."""
    theirs = create_transform(**timms.data_config())(photo)
    found = (ours(np.asarray(photo)) - theirs).abs()
    if ours.resize == "pad" and timms.crop_pct == 1:
        height, width = ours.size
        inner = min(height, round(width * photo.height / photo.width)) // 2 - 1
        found = found[:, height // 2 - inner : height // 2 + inner]
    return float(found.mean())


@pytest.mark.parametrize("size", [(96, 96), (80, 112)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("resize", RESIZES)
def test_timm_cuts_the_same(resize, crop_pct, size):
    """timm cuts whole pixels of the resized image, and we of the image: a pixel's difference."""
    if resize == "pad" and crop_pct < 1:
        crop_pct = 0.5  # no margins: timm has the mean of the configuration there
    ours = Preprocess((3, *size), MEAN, STD, resize, crop_pct)
    for photo in map(Image.fromarray, PHOTOS):
        assert difference(photo, ours, ours) < 0.15  # of a deviation
        smooth = photo.filter(ImageFilter.GaussianBlur(6))
        assert difference(smooth, ours, ours) < 0.068
        off = replace(ours, crop_pct=0.95 * crop_pct)  # and a crop that is 5 % off would show
        assert difference(smooth, off, ours) > 0.07


@pytest.mark.parametrize("resize", RESIZES)
def test_timm_reads_the_configuration_back(resize):
    ours = Preprocess((1, 40, 50), (0.4,), (0.2,), resize, 0.9, "image")
    assert Preprocess.from_config(ours.data_config(), "image") == ours
    written = json.loads(json.dumps(ours.data_config()))  # tuples become lists
    assert Preprocess.from_config(written, "image") == ours


def test_a_configuration_of_timms_with_gaps():
    found = Preprocess.from_config(
        {"input_size": (3, 64, 64), "mean": MEAN, "std": STD, "crop_mode": None, "crop_pct": None}
    )
    assert found == Preprocess((3, 64, 64), MEAN, STD, "crop", 1.0, "fixed")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("input_size", [32, 32]), ("input_size", [1, 0, 9]), ("input_size", None), ("mean", "x"),
        ("mean", [0.5, 0.5]), ("std", [0.0]), ("std", [float("nan")]), ("crop_mode", "weird"),
        ("crop_pct", "x"), ("normalization", "each"), ("value_range", [1]),
        ("value_range", "ab"), ("value_range", [3, 1]),
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_one_line(entry, value):
    config = plain(9, 9).data_config()
    more = {"normalization": "fixed", "value_range": [0, 1]}
    (more if entry in more else config)[entry] = value
    with pytest.raises(UsageError, match=entry) as caught:
        Preprocess.from_config(config, **more)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ the values
def test_eight_sixteen_bits_and_floats_agree():
    eight = PHOTOS[0]
    sixteen, floats = eight.astype(np.uint16) * 257, eight.astype(np.float32) / 255
    ours = Preprocess((3, 100, 100), MEAN, STD)
    exact, deep, real = (ours(a) for a in (eight, sixteen, floats))
    torch.testing.assert_close(deep, real, atol=1e-4, rtol=0)
    # resized bytes are rounded: half a level, and what PIL's arithmetic of integers adds
    assert (deep - exact).abs().max() < 1.01 / 255 / min(STD)
    assert (deep - exact).abs().mean() < 0.3 / 255 / min(STD)


def test_every_level_of_sixteen_bits_survives():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    for normalization in ("fixed", "image"):
        ours = Preprocess((1, 256, 256), (0.5,), (0.25,), normalization=normalization)
        seen = ours(levels).flatten()
        assert (seen.diff() > 0).all()
    assert float(plain(256, 256)(levels).max()) == pytest.approx(255, abs=1e-4)


def test_the_fixed_standard_is_torchvisions():
    ours = Preprocess((3, 427, 640), MEAN, STD)
    expected = normalize(to_tensor(PHOTOS[1]).float() / 255, list(MEAN), list(STD))
    torch.testing.assert_close(ours(PHOTOS[1]), expected, atol=1e-5, rtol=1e-5)


def test_each_image_by_its_own_standard():
    ours = Preprocess((3, 64, 64), MEAN, STD, normalization="image")
    batch = torch.stack([ours.fit(to_tensor(photo)) for photo in PHOTOS])
    seen = ours.normalize(batch)
    for image in seen:
        assert abs(float(image.mean())) < 1e-5
        assert float(image.std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert torch.equal(ours.normalize(batch[:1])[0], seen[0])  # whatever the batch
    for value in (0, 7, 255):
        even = ours.normalize(torch.full((2, 3, 64, 64), value).byte())
        assert (even == 0).all()
    # one step of sixteen bits is contrast, not nothing
    faint = np.full((64, 64, 1), 30000, np.uint16)
    faint[::2] += 1
    gray = Preprocess((1, 64, 64), (0.5,), (0.5,), normalization="image")
    assert float(gray(faint).std(unbiased=False)) == pytest.approx(1, abs=0.05)


def test_arrays_are_not_changed_and_may_be_read_only():
    for array in (PHOTOS[0].copy(), PHOTOS[0].astype(np.uint16), PHOTOS[0].astype(np.float32)):
        before = array.copy()
        array.flags.writeable = False
        tensor = to_tensor(array)
        tensor.zero_()
        assert np.array_equal(array, before)


@pytest.mark.parametrize("crop_pct", [0.5, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (20, 40)])
def test_a_photo_decoded_smaller_looks_the_same(tmp_path, crop_pct, size):
    """JPEGs are decoded at a part of their size, down to `at_least`: nothing may be lost."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(PHOTOS[0]).save(path, quality=95)
    ours = plain(*size, channels=3, crop_pct=crop_pct)
    small = read_image(path, at_least=ours.at_least)
    assert small.shape[0] < PHOTOS[0].shape[0] / 2  # it was
    difference = ours(small) - ours(read_image(path))
    assert difference.abs().mean() < 4  # of 255
    assert min(small.shape[:2]) >= ours.at_least


@pytest.mark.parametrize("shape", [(300, 400), (512, 333), (224, 224), (97, 260), (256, 256)])
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (64, 48)])
def test_resizing_first_is_torchvisions_resize_and_center_crop(shape, size):
    from torchvision.transforms import v2

    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8)
    ours = Preprocess((3, *size), (0.5,) * 3, (0.2,) * 3, "crop", 0.875, resize_first=True)
    if size[0] == size[1]:
        theirs = v2.Compose(
            [v2.Resize(int(size[0] / 0.875), antialias=True), v2.CenterCrop(size)]
        )  # as in CBAM's train_imagenet.py: Resize(256), CenterCrop(224)
        assert torch.equal(ours.fit(image), theirs(image))
    fitted = ours.fit(image)
    assert fitted.shape == (3, *size)
    facts = {"input_size": [3, *size], "resize": "crop", "crop_pct": 0.875, "resize_first": True}
    exported = standalone.fit(image.permute(1, 2, 0).numpy(), facts)  # beside an exported file
    np.testing.assert_allclose(exported, fitted.permute(1, 2, 0).numpy(), atol=1)
    plain = dataclasses.replace(ours, resize_first=False).fit(image)
    assert (fitted.float() - plain.float()).abs().mean() < 30  # noise, moved by part of a pixel
    again = Preprocess.from_config(ours.data_config(), **ours.regard_config())
    assert again == ours


def test_resizing_first_is_left_out_where_it_would_need_much_memory():
    ours = Preprocess((1, 64, 64), (0.5,), (0.2,), "crop", 0.875, resize_first=True)
    strip = torch.zeros(1, 1, 2_000_000, dtype=torch.uint8)  # resized whole: 9 GB
    assert ours.fit(strip).shape == (1, 64, 64)


def test_numpy_normalizes_each_image_as_torch_does():
    """Ordinary images, pale ones, and one of a single gray level."""
    images = torch.rand(4, 3, 9, 8, generator=torch.Generator().manual_seed(0)) * 255
    images[1] = 128 + images[1] / 255
    images[2] = 1 + images[2] / 2**18  # below the least deviation
    images[3] = 7.0
    found = torch.from_numpy(_normalize_each(images.numpy()))
    torch.testing.assert_close(found, normalize_each(images), rtol=1e-3, atol=1e-3)
