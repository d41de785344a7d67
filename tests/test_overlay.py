"""The attention overlay: the right place, the right range, and nothing that is not there."""

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_image

from regard.explanations.overlay import color_bar, color_key, describe, overlay, resize_image
from regard.explanations.overlay import place as laid


def digit(index=0):
    return (load_digits().images[index] * 255 / 16).astype(np.uint8)


def spot(shape, y, x):
    attention = np.zeros(shape)
    attention[y, x] = 1.0
    return attention


def colorfulness(picture):
    """How far each pixel is from gray: what only attention can cause."""
    return np.ptp(picture.astype(int), axis=2)


def place(array):
    return tuple(int(i) for i in np.unravel_index(np.argmax(array), array.shape))


@pytest.mark.parametrize("cell", [(0, 0), (2, 9), (11, 4), (6, 6)])
def test_the_brightest_spot_lies_over_its_cell(cell):
    # 12 cells over 240 pixels: cell k covers pixels 20 k to 20 k + 19
    picture = overlay(np.full((240, 240), 90, np.uint8), spot((12, 12), *cell))
    row, column = place(colorfulness(picture))
    assert (row // 20, column // 20) == cell


def test_a_map_between_two_cells_is_bilinear():
    # one row of 2 cells, 0 and 1, over 4 pixels: centers at 0.25, 0.75, 1.25, 1.75 cells,
    # so weights 0, 0.25, 0.75, 1; gray 91 becomes 0.1 + 0.7 * 91 / 255 of white
    picture = overlay(np.full((1, 4), 91, np.uint8), np.array([[0.0, 1.0]]), smooth=True)
    gray = round(255 * (0.1 + 0.7 * 91 / 255))
    assert picture[0, 0].tolist() == [gray] * 3
    # the strongest: a quarter of the gray and three of viridis's last color (253, 231, 37)
    expected = [round(0.25 * gray + 0.75 * c) for c in (253, 231, 37)]
    assert np.abs(picture[0, 3].astype(int) - expected).max() <= 1
    ramp = colorfulness(picture)[0]
    assert ramp[0] == 0 < ramp[1] < ramp[2] < ramp[3]


@pytest.mark.parametrize("value", [0.0, 1 / 144, -3.0, 1e30])
def test_a_constant_map_highlights_nothing(value):
    flat = overlay(digit(), np.full((12, 12), value), outline=0.5)
    assert colorfulness(flat).max() == 0
    gray = digit().astype(float)
    assert np.abs(flat[..., 0] - 255 * (0.1 + 0.7 * gray / 255)).max() <= 0.5


def test_rounding_is_not_attention():
    attention = np.full((12, 12), 1 / 144)
    attention[3, 3] += 1e-10
    assert colorfulness(overlay(digit(), attention)).max() == 0
    attention[3, 3] += 1e-4
    assert colorfulness(overlay(digit(), attention, size=(96, 96))).max() > 50


def test_the_scale_and_the_offset_of_a_map_do_not_matter_but_limits_do():
    attention = np.random.default_rng(0).random((12, 12))
    picture = overlay(digit(), attention)
    np.testing.assert_array_equal(picture, overlay(digit(), attention * 64 - 32))
    wide = overlay(digit(), attention, limits=(0.0, 4.0))
    assert colorfulness(wide).max() < colorfulness(picture).max() / 2
    # under given limits a constant map has a color: it can be compared
    assert colorfulness(overlay(digit(), np.ones((3, 3)), limits=(0.0, 1.0))).min() > 100


@pytest.mark.parametrize("shape", [(48, 20), (20, 48, 3)])
def test_the_image_keeps_its_size_and_aspect(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert overlay(image, np.eye(7)).shape == (*shape[:2], 3)
    assert overlay(image, np.eye(7), size=(96, 33)).shape == (96, 33, 3)
    # the map's own aspect is not the image's: its left half is the picture's left half
    halves = overlay(np.zeros(shape, np.uint8), np.repeat([[0.0, 1.0]], 9, axis=0))
    columns = colorfulness(halves).mean(axis=0)
    assert columns[0] == 0
    assert columns[-1] > columns[shape[1] // 2] > 0


def test_a_map_of_few_cells_is_drawn_as_cells():
    def colors(cells):
        ramp = np.linspace(0, 1, cells * cells).reshape(cells, cells)
        picture = overlay(np.full((120, 120), 90, np.uint8), ramp)
        return len(np.unique(picture.reshape(-1, 3), axis=0))

    assert colors(2) == 4
    assert colors(4) == 16
    assert colors(5) > 25  # smooth between its cells


@pytest.mark.parametrize("shape", [(10, 1810), (1810, 10), (1, 5000)])
def test_a_strip_is_drawn_where_the_network_saw_a_pixel_of_it(shape):
    side = min(shape)
    box = (
        (shape[1] - side) / 2,
        (shape[0] - side) / 2,
        (shape[1] + side) / 2,
        (shape[0] + side) / 2,
    )
    size = (max(1, shape[0] // 50), max(1, shape[1] // 50))
    picture = overlay(np.zeros(shape, np.uint8), np.eye(7), size=size, box=box)
    assert (colorfulness(picture) > 0).sum() >= 1
    with pytest.raises(ValueError, match="holds no pixel"):
        overlay(np.zeros(shape, np.uint8), np.eye(7), box=(6000, 0, 6100, 1))


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (7, -3.3, 42, 57.9), (-9.6, 1, 70.7, 39)])
def test_a_map_that_reaches_beyond_the_image_lies_where_its_box_says(box):
    left, top, right, bottom = box
    values = np.add.outer(100.0 * (np.arange(12) + 0.5), np.arange(16) + 0.5)  # 100 row + column
    placed = laid(values, (40, 60), box=box, outside=np.nan)
    y, x = np.mgrid[:40, :60] + 0.5
    row, column = 12 * (y - top) / (bottom - top), 16 * (x - left) / (right - left)
    inner = (row > 0.5) & (row < 11.5) & (column > 0.5) & (column < 15.5)
    np.testing.assert_allclose(placed[inner], (100 * row + column)[inner], atol=1e-3)
    covered = (y > top) & (y < bottom) & (x > left) & (x < right)
    assert (~np.isnan(placed) == covered).all()


def test_a_strip_far_wider_than_its_input_needs_no_square_of_its_width():
    placed = laid(np.eye(14), (20, 60_000), box=(0, -29_990, 60_000, 30_010))
    assert placed.shape == (20, 60_000)
    assert placed[10, 30_000] == pytest.approx(0.5, abs=0.01)  # between two cells of the diagonal
    assert placed[:, 10_000].max() == 0


def test_a_box_within_one_pixel_marks_that_pixel():
    for low, high in ((4.6, 4.9), (4.1, 4.4), (9.6, 9.9), (0.1, 0.2)):
        placed = laid(np.ones((7, 7)), (10, 10), box=(low, 0, high, 10))
        assert np.flatnonzero(placed[0]).tolist() == [int(low)]


def test_the_image_is_seen_under_the_strongest_attention():
    image = np.array([[0, 255], [255, 0]], np.uint8)
    picture = overlay(image, np.ones((1, 1)), limits=(0.0, 1.0)).astype(int)
    # a quarter of the gray's 0.7 of 255
    assert np.abs(picture[0, 1] - picture[0, 0] - 0.25 * 0.7 * 255).max() <= 1


def test_a_color_photograph_lies_underneath_in_gray():
    photo = load_sample_image("flower.jpg")[:64, :80]
    plain = overlay(photo, np.zeros((4, 4)))
    assert np.ptp(photo.astype(int), axis=2).max() > 20
    assert colorfulness(plain).max() == 0
    luma = photo @ [0.299, 0.587, 0.114]
    assert np.abs(plain[..., 0] - (25.5 + 0.7 * luma)).max() < 1.5


def test_the_outline_goes_around_half_of_the_range():
    y, x = np.mgrid[:240, :240]
    disc = np.clip(1.0 - np.hypot(y - 119.5, x - 119.5) / 100.0, 0.0, 1.0)  # half at 50 pixels
    picture = overlay(np.zeros((240, 240), np.uint8), disc, outline=0.5)
    white = (picture == 255).all(axis=2)
    radius = np.hypot(y - 119.5, x - 119.5)[white]
    assert white.sum() > 2 * np.pi * 45
    assert radius.min() > 46
    assert radius.max() < 51
    assert not (overlay(np.zeros((240, 240), np.uint8), disc) == 255).all(axis=2).any()


def test_small_images_keep_their_pixels_and_large_ones_are_averaged():
    image = np.array([[0, 255], [128, 64]], np.uint8)
    np.testing.assert_array_equal(resize_image(image, (4, 6)), np.kron(image, np.ones((2, 3))))
    assert resize_image(np.array([[0, 100]], np.uint8), (1, 1)).item() == 50


def test_the_range_in_words():
    share = np.full((10, 100), 0.001)
    share[0, 0], share[0, 1] = 0.0031, 0.0002
    share[1] = 0.001 - (share.sum() - 1) / 100
    assert describe(share) == "attention 0.0002–0.0031; uniform would be 0.0010"
    assert describe(np.array([[0.12, 0.93], [0.2, 0.35]])) == "attention 0.12–0.93; mean 0.40"
    assert describe(np.full((12, 12), 1 / 144)) == "attention 0.0069 everywhere"
    # enough digits to tell the ends apart, however close they are
    assert describe([[0.5011, 0.5032, 0.5018]]) == "attention 0.5011–0.5032; mean 0.5020"
    assert describe([[0, 2.31e-4, 2e-5]]) == "attention 0.00000–0.00023; mean 0.00008"
    assert describe([[7e-6, 3.1e-5, 1.3e-5]]) == "attention 7e-06–3.1e-05; mean 1.7e-05"
    assert describe([[1e-12, 3e-12]]) == "attention 1e-12–3e-12; mean 2e-12"


def test_the_color_key_runs_from_nothing_to_most():
    key = color_key(50, 9)
    assert key.shape == (9, 50, 3)
    assert colorfulness(key)[:, 0].max() == 0
    assert colorfulness(key)[:, -1].min() > 100
    # read without color: over any gray but the brightest, more attention is brighter
    luma = key[0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luma) > 0).all()


def test_the_color_bar_shows_its_numbers():
    bar, other = color_bar(0.0002, 0.0031), color_bar(0.0002, 0.0041)
    assert bar.shape == (40, 240, 3)
    assert bar.dtype == np.uint8
    left, right = np.s_[26:, :120], np.s_[26:, 120:]
    assert (bar[left] < 100).sum() > 50  # ink
    np.testing.assert_array_equal(bar[left], other[left])
    assert (bar[right] != other[right]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((8, 8)), np.eye(2)), "image of float64: must be uint8"),
        ((np.zeros((8, 8, 4), np.uint8), np.eye(2)), r"image of shape \(8, 8, 4\)"),
        ((np.zeros((8, 8), np.uint8), np.zeros(4)), r"attention of shape \(4,\)"),
        ((np.zeros((8, 8), np.uint8), np.array([[0.0, np.nan]])), "1 values of 2 that are not"),
    ],
)
def test_what_is_not_an_image_or_a_map_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        overlay(*arguments)


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"limits=\(1\.0, 1\.0\)"):
        overlay(digit(), np.eye(3), limits=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"outline=1\.5"):
        overlay(digit(), np.eye(3), outline=1.5)
    with pytest.raises(ValueError, match=r"size=\(0, 8\)"):
        overlay(digit(), np.eye(3), size=(0, 8))
    with pytest.raises(ValueError, match=r"low=2, high=1"):
        color_bar(2, 1)
