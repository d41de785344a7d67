"""Each augmentation on images with known answers, and all of them over many draws."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binomtest, ks_2samp, kstest
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop

from regard.data import augment as module
from regard.data.augment import (
    WIDTH,
    Augmentation,
    augment,
    blend,
    mixup_shares,
    random_numbers,
    random_region,
    random_resized,
)
from regard.data.preprocess import Preprocess, resample

OFF = Augmentation(flip=0.0)
LARGEST = 1 - 2**-24  # that random_numbers() gives
UNIFORM = st.floats(0, LARGEST, width=32)


def plain(height: int, width: int, channels: int = 1) -> Preprocess:
    """Normalizing changes nothing."""
    return Preprocess((channels, height, width), (0.0,) * channels, (1 / 255,) * channels)


def chosen(count: int = 1, **values: float) -> Tensor:
    """Draws that are 0.5, which is the middle of everything, but for these."""
    u = torch.full((count, WIDTH), 0.5)
    for name, value in values.items():
        u[:, getattr(module, name)] = value
    return u


def augmented(images: Tensor, recipe: Augmentation, u: Tensor) -> Tensor:
    return augment(images, u, recipe, plain(*images.shape[2:], images.shape[1]))


def blob(height: int, width: int, y: float, x: float, sigma: float = 2.0) -> Tensor:
    """(1, 1, H, W): a Gaussian at a place told from the middle, downwards and to the right."""
    rows = torch.arange(height)[:, None] - (height - 1) / 2 - y
    columns = torch.arange(width)[None] - (width - 1) / 2 - x
    return 200 * torch.exp(-(rows**2 + columns**2) / (2 * sigma**2))[None, None]


def moments(image: Tensor) -> tuple[float, float, float, float, float]:
    """Of (1, 1, H, W): center y, x from the middle, variances and covariance."""
    weights = (image[0, 0] / image.sum()).double()
    height, width = weights.shape
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None] - (width - 1) / 2
    cy, cx = float((weights * y).sum()), float((weights * x).sum())
    y, x = y - cy, x - cx
    return cy, cx, *(float((weights * v).sum()) for v in (y * y, x * x, y * x))


# -------------------------------------------------------------------------------- the draws
@given(st.integers(0, 2**31), st.integers(0, 2**40), st.lists(st.integers(1, 9), min_size=2))
def test_draws_do_not_depend_on_the_calls(seed, start, counts):
    whole = random_numbers(seed, start, sum(counts))
    at = start
    for count in counts:
        assert torch.equal(random_numbers(seed, at, count), whole[at - start : at - start + count])
        at += count


def test_every_number_is_uniform_and_its_own():
    u = random_numbers(11, 0, 4000).numpy()
    assert u.dtype == np.float32
    assert 0 <= u.min() <= u.max() < 1
    # the least of 24 p-values of a true generator is under 0.0004 once in a hundred times
    assert min(kstest(column, "uniform").pvalue for column in u.T) > 0.0004
    together = np.abs(np.corrcoef(u.T) - np.eye(WIDTH))
    assert together.max() < 4.5 / math.sqrt(len(u))
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 4 / math.sqrt(len(u))
    others = random_numbers(12, 0, 4000).numpy()
    assert not (others == u).all(axis=1).any()
    assert abs(np.corrcoef(others.ravel(), u.ravel())[0, 1]) < 4 / math.sqrt(u.size)


# ------------------------------------------------------------------------------ off is off
@pytest.mark.parametrize("normalization", ["fixed", "image"])
def test_off_is_off_to_the_bit(normalization):
    photos = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    preprocess = Preprocess((3, 427, 640), (0.4,) * 3, (0.2,) * 3, normalization=normalization)
    for images in (photos, photos.float() + 0.25):
        found = augment(images, random_numbers(0, 0, 2), OFF, preprocess)
        assert torch.equal(found, preprocess.normalize(images))
    # and drawn so that nothing happens, all of it at once changes next to nothing
    everything = Augmentation(
        random_crop="shift",
        flip=0.4,
        rotate=90,
        zoom=(0.5, 2.0),
        axis_scale=(0.5, 1.5),
        shift=0.3,
        color_jitter=0.9,
        lighting=0.5,
        random_erasing=0.4,
    )
    found = augment(photos, chosen(2), everything, preprocess)
    torch.testing.assert_close(found, preprocess.normalize(photos), atol=2e-3, rtol=0)


def test_the_images_given_are_not_changed():
    images = torch.rand(4, 3, 12, 12) * 255
    before = images.clone()
    recipe = Augmentation(
        random_crop="shift", rotate=9, color_jitter=0.5, random_erasing=1.0, flip=1.0
    )
    augment(images, random_numbers(0, 0, 4), recipe, plain(12, 12, 3))
    assert torch.equal(images, before)


# -------------------------------------------------------------------------------- geometry
def test_a_flip_is_a_mirror_for_those_drawn():
    images = torch.rand(2000, 3, 2, 5)
    u = random_numbers(3, 0, 2000)
    found = augmented(images, Augmentation(flip=0.3), u)
    flipped = u[:, module.FLIP] < 0.3
    assert torch.equal(found[flipped], images.flip(3)[flipped])
    assert torch.equal(found[~flipped], images[~flipped])
    assert binomtest(int(flipped.sum()), 2000, 0.3).pvalue > 0.01


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), UNIFORM, UNIFORM,
)  # fmt: skip
def test_a_random_shift_is_a_cut_of_the_image_in_a_black_frame(height, width, share, top, left):
    image = torch.rand(1, 2, height, width) + 1
    recipe = Augmentation(flip=0.0, random_crop="shift", crop_shift=share)
    found = augmented(image, recipe, chosen(TOP=top, LEFT=left))
    pads = round(height * share), round(width * share)
    frame = F.pad(image, (pads[1], pads[1], pads[0], pads[0]))
    y, x = (
        int(np.float32(u) * np.float32(2 * pad + 1)) for u, pad in ((top, pads[0]), (left, pads[1]))
    )
    assert torch.equal(found, frame[:, :, y : y + height, x : x + width])


def test_random_shifts_are_balanced():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8, 8] = 1.0
    recipe = Augmentation(flip=0.0, random_crop="shift", crop_shift=0.125)
    found = augmented(image.expand(5000, -1, -1, -1), recipe, random_numbers(0, 0, 5000)).sum(
        dim=0
    )[0]
    assert found[6:11, 6:11].sum() == 5000  # two pixels either way, all 25 places
    assert (found[6:11, 6:11] - 200).abs().max() < 4 * math.sqrt(200)


@pytest.mark.parametrize("u", [0.0, 1.0])
def test_a_quarter_turn(u):
    image = torch.rand(1, 2, 17, 17) * 255
    found = augmented(image, Augmentation(flip=0.0, rotate=90), chosen(ANGLE=u))
    turned = torch.rot90(image, 1 if u else -1, (2, 3))
    torch.testing.assert_close(found, turned, atol=0.01, rtol=0)


@pytest.mark.parametrize("degrees", [-70, -30, 10, 45, 90])
@pytest.mark.parametrize(("height", "width"), [(41, 41), (41, 81), (90, 40)])
def test_rotation_keeps_shapes_and_distances(degrees, height, width):
    """A round blob stays round, and stays as far from the middle, in a picture of any aspect."""
    recipe = Augmentation(flip=0.0, rotate=90)
    found = augmented(blob(height, width, 4, 9), recipe, chosen(ANGLE=0.5 + degrees / 180))
    y, x, yy, xx, yx = moments(found)
    angle = math.radians(degrees)  # the same way for all, told from the picture
    expected = (
        4 * math.cos(angle) - 9 * math.sin(angle),
        4 * math.sin(angle) + 9 * math.cos(angle),
    )
    assert (y, x) == pytest.approx(expected, abs=0.05)
    assert (yy, xx, yx) == pytest.approx((4, 4, 0), abs=0.3)


@pytest.mark.parametrize(("u", "zoom"), [(0.0, 0.5), (0.5, 1.0), (1.0, 2.0)])
def test_zoom_enlarges(u, zoom):
    recipe = Augmentation(flip=0.0, zoom=(0.5, 2.0))
    y, x, yy, xx, yx = moments(augmented(blob(61, 101, 4, -8, 3), recipe, chosen(ZOOM=u)))
    assert (y, x) == pytest.approx((4 * zoom, -8 * zoom), abs=0.05)
    assert (yy, xx, yx) == pytest.approx((9 * zoom**2, 9 * zoom**2, 0), abs=0.3 * zoom**2)


def test_axis_scale_is_the_grids_scale_of_each_axis():
    """A grid 1.5 times as wide shows a blob at 2/3 of its distance and width."""
    recipe = Augmentation(flip=0.0, axis_scale=(0.5, 1.5))
    found = augmented(blob(81, 101, 6, -9, 3), recipe, chosen(SCALE_X=1.0, SCALE_Y=0.25))
    y, x, yy, xx, yx = moments(found)
    assert (y, x) == pytest.approx((6 / 0.75, -9 / 1.5), abs=0.05)
    assert (yy, xx, yx) == pytest.approx((9 / 0.75**2, 9 / 1.5**2, 0), abs=0.3)


def test_a_shift_by_whole_pixels_moves_them():
    image = torch.rand(1, 3, 20, 40) * 255
    recipe = Augmentation(flip=0.0, shift=0.1)  # 2 rows, 4 columns
    for u, rows, columns in ((1.0, 2, 4), (0.0, -2, -4), (0.75, 1, 2)):
        found = augmented(image, recipe, chosen(SHIFT_X=u, SHIFT_Y=u))
        # the border goes on outside
        padded = F.pad(image, (4, 4, 2, 2), mode="replicate")
        expected = padded[:, :, 2 + rows : 22 + rows, 4 + columns : 44 + columns]
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    down = augmented(image, recipe, chosen(SHIFT_Y=1.0))
    torch.testing.assert_close(down[:, :, :-2], image[:, :, 2:], atol=0.01, rtol=0)


def test_turns_zooms_and_shifts_favor_no_side():
    recipe = Augmentation(rotate=30, zoom=(0.8, 1.25), shift=0.1)
    images = blob(33, 33, 0, 0).expand(4000, -1, -1, -1)
    found = augmented(images, recipe, random_numbers(5, 0, 4000)).mean(dim=0, keepdim=True)
    y, x, yy, xx, yx = moments(found)
    assert abs(y) < 0.12  # shifts of up to 3.3 pixels: 4 deviations of their mean
    assert abs(x) < 0.12
    assert yy == pytest.approx(xx, abs=0.5)
    assert abs(yx) < 0.3
    wide = blob(33, 33, 0, 8).expand(4000, -1, -1, -1)
    turned = augmented(wide, Augmentation(flip=0.0, rotate=30), random_numbers(5, 0, 4000))
    assert abs(moments(turned.mean(dim=0, keepdim=True))[0]) < 0.2


# ---------------------------------------------------------------------------------- values
def test_colors():
    image = torch.rand(1, 3, 9, 9) * 60 + 90
    recipe = Augmentation(flip=0.0, color_jitter=0.4)
    brighter = augmented(image, recipe, chosen(BRIGHTNESS=0.75))
    torch.testing.assert_close(brighter, image * 1.2, atol=1e-2, rtol=0)
    paler = augmented(image, recipe, chosen(CONTRAST=0.0))
    torch.testing.assert_close(paler.mean(), image.mean(), atol=1e-2, rtol=0)
    torch.testing.assert_close(paler.std(), image.std() * 0.6, atol=1e-2, rtol=0)
    gray = augmented(image, Augmentation(flip=0.0, color_jitter=1.0), chosen(SATURATION=0.0))
    luma = 0.299 * image[:, 0] + 0.587 * image[:, 1] + 0.114 * image[:, 2]
    torch.testing.assert_close(gray, luma[:, None].expand_as(image), atol=1e-2, rtol=0)
    # nothing leaves the range of an image, and grayscale has no colors to change
    wild = augmented(
        image.expand(500, -1, -1, -1), Augmentation(color_jitter=1.0), random_numbers(0, 0, 500)
    )
    assert 0 <= wild.min() < 1
    assert 254 < wild.max() <= 255.01
    single = image[:, :1]
    assert torch.equal(augmented(single, recipe, chosen()), augmented(single, recipe, chosen(
        SATURATION=0.0
    )))  # fmt: skip


@pytest.mark.parametrize(("size", "count"), [((64, 64), 1500), ((208, 272), 300)])
def test_erasing(size, count):
    u = random_numbers(1, 0, count)
    images = torch.ones(count, 1, *size)
    found = augmented(images, Augmentation(flip=0.0, random_erasing=0.4), u)[:, 0]
    gone = found == 0
    share = gone.float().mean(dim=(1, 2))
    erased = share > 0
    assert torch.equal(erased, u[:, module.ERASE] < 0.4)
    assert binomtest(int(erased.sum()), count, 0.4).pvalue > 0.01
    assert share[erased].min() > 0.017  # 2 % to 33 %, to whole pixels
    assert share[erased].max() < 0.345
    assert 0.15 < share[erased].mean() < 0.2
    # one rectangle: rows that are touched times columns that are touched
    rows, columns = gone.any(dim=2).sum(dim=1), gone.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, gone.sum(dim=(1, 2)))
    assert 0.22 < (rows / columns)[erased].min() < 0.4
    if count < 1000:
        return
    # no side is favored
    often = gone.double().mean(dim=0)
    assert (often - often.flip(0)).abs().max() < 0.05
    assert (often - often.flip(1)).abs().max() < 0.05


def test_erasing_sets_the_mean():
    preprocess = Preprocess((2, 32, 32), (0.3, 0.6), (0.1, 0.2))
    u = chosen(ERASE=0.0)
    found = augment(
        torch.full((1, 2, 32, 32), 200.0), u, Augmentation(flip=0.0, random_erasing=0.5), preprocess
    )
    raw = found * torch.tensor([0.1, 0.2]).view(1, 2, 1, 1) + torch.tensor([0.3, 0.6]).view(
        1, 2, 1, 1
    )
    gone = found[0, 0] == 0
    assert 0.1 < gone.float().mean() < 0.25
    torch.testing.assert_close(raw[0, 1][gone], torch.full((int(gone.sum()),), 0.6))
    torch.testing.assert_close(raw[0, 1][~gone], torch.full((int((~gone).sum()),), 200 / 255))


def test_lighting_is_alexnets():
    """What is added has the covariance of ImageNet's RGB, scaled by the deviation."""
    images = torch.full((20_000, 3, 1, 1), 100.0)
    u = random_numbers(6, 0, 20_000)
    added = augmented(images, Augmentation(flip=0.0, lighting=0.1), u).flatten(1) - 100
    vectors = np.array(module._EIGENVECTORS)
    assert np.abs(vectors.T @ vectors - np.eye(3)).max() < 1e-3
    expected = vectors @ np.diag((25.5 * np.array(module._EIGENVALUES)) ** 2) @ vectors.T
    assert np.cov(added.numpy().T) == pytest.approx(expected, rel=0.03, abs=0.3)
    assert added.mean(dim=0).abs().max() < 0.15
    assert augmented(images[:1], Augmentation(lighting=9.0), chosen(LIGHT=0.0)).isfinite().all()
    gray = torch.full((2, 1, 4, 4), 100.0)  # has no hue to change
    assert torch.equal(augmented(gray, Augmentation(lighting=0.5), u[:2]), gray)


# --------------------------------------------------------------------------- random resized
@given(
    image=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    area=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    u=st.tuples(UNIFORM, UNIFORM, UNIFORM, UNIFORM),
)
def test_a_random_region_lies_within_the_image(image, size, area, u):
    recipe = Augmentation(random_crop="resized", crop_scale=(min(area), max(area)))
    drawn = chosen(LEFT=u[2], TOP=u[3])[0]
    drawn[module.AREA : module.AREA + module.TRIES] = u[0]
    drawn[module.ASPECT : module.ASPECT + module.TRIES] = u[1]
    values = torch.rand(1, *image) * 200 + 20  # what lies outside would be 0, or nothing
    found = random_resized(values, drawn, recipe, size)
    assert found.shape == (1, *size)
    assert values.min() - 1e-3 <= found.min()
    assert found.max() <= values.max() + 1e-3


def test_the_whole_area_in_the_middle_is_the_whole_image():
    values = torch.rand(3, 40, 50)
    recipe = Augmentation(random_crop="resized", crop_scale=(1.0, 1.0))
    whole = random_resized(values, chosen()[0], recipe, (20, 25))
    assert torch.equal(whole, resample(values, (0, 0, 50, 40), (20, 25)))


@pytest.mark.parametrize("shape", [(400, 300), (427, 640), (90, 1000), (33, 20)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.4, 0.9)])
def test_random_regions_have_torchvisions_statistics(shape, scale):
    """Height, width and position of 4,000 regions against as many of torchvision's."""
    ours = np.array(
        [random_region(*shape, u, scale) for u in random_numbers(2, 0, 4000)], dtype=float
    )
    torch.manual_seed(0)
    crop, image = RandomResizedCrop(8, scale), torch.empty(1, *shape)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = np.array(
        [[d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]] for d in drawn]
    )
    assert ours.min() >= 0
    assert ours[:, 2].max() <= shape[1]
    assert ours[:, 3].max() <= shape[0]
    for edge in range(4):
        assert ks_2samp(ours[:, edge], theirs[:, edge]).pvalue > 0.001
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (ours, theirs)]
    assert ks_2samp(*areas).pvalue > 0.001
    assert areas[0].mean() == pytest.approx(areas[1].mean(), rel=0.04)


def test_a_region_that_never_fits_is_the_centered_one():
    """All of an image 10 times as wide as high: 133 of its 1,000 columns, in the middle."""
    u = chosen()[0]
    assert random_region(100, 1000, u, (1.0, 1.0)) == (433, 0, 566, 100)
    assert random_region(1000, 100, u, (1.0, 1.0)) == (0, 433, 100, 566)
    assert random_region(1, 4000, u, (1.0, 1.0)) == (1999, 0, 2000, 1)


# ---------------------------------------------------------------------------------- mixup
def mixup(x, target, u, alpha):
    """As a training step does it: images and targets by the same shares."""
    shares = mixup_shares(u, alpha)
    return blend(x, shares), blend(target, shares)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
def test_mixup_follows_its_distribution(alpha):
    u = random_numbers(4, 0, 3000)
    x = torch.rand(3000, 1, 2, 2)
    labels = torch.arange(3000) % 2  # each image's neighbor is of the other class
    mixed_x, target = mixup(x, F.one_hot(labels, 2).float(), u, alpha)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(3000))
    own = target[torch.arange(3000), labels]
    assert kstest(own.double().numpy().clip(1e-9, 1 - 1e-9), beta(alpha, alpha).cdf).pvalue > 0.01
    shares = own.view(-1, 1, 1, 1)
    neighbors = x[torch.arange(3000) ^ 1]
    torch.testing.assert_close(mixed_x, x * shares + neighbors * (1 - shares))
    for batch in (2, 50):  # in any batch of an even size
        parts = [
            blend(x[k : k + batch], mixup_shares(u[k : k + batch], alpha))
            for k in range(0, 100, batch)
        ]
        assert torch.equal(torch.cat(parts), mixed_x[:100])


def test_mixup_mixes_images_as_it_mixes_targets():
    x = torch.rand(6, 1, 4, 4)
    mixed_x, target = mixup(x, torch.eye(6), random_numbers(0, 0, 6), 0.4)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(6))
    torch.testing.assert_close(mixed_x, torch.einsum("ij,jchw->ichw", target, x))
    assert 0.001 < float(target.diagonal().min()) < 0.5


def test_mixup_of_the_ends_is_finite():
    for u in (0.0, LARGEST):
        x, target = mixup(torch.rand(3, 1, 2, 2), torch.eye(3), chosen(3, MIX=u), 0.01)
        assert x.isfinite().all()
        assert torch.equal(target.sum(dim=1), torch.ones(3))
