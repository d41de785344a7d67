"""What a mask image marks, whatever its mode, its transparency and its orientation."""

import numpy as np
import pytest
from PIL import Image

from regard.data.images import opacity
from regard.explanations.inputs import Source
from regard.explanations.masks import open_masks

INSIDE = np.zeros((20, 30), bool)
INSIDE[2:8, 4:10] = True


def colored(color, outside=(0, 0, 0, 0)):
    pixels = np.empty((20, 30, 4), np.uint8)
    pixels[:], pixels[INSIDE] = outside, color
    return Image.fromarray(pixels)


def palette(color):
    image = Image.fromarray(INSIDE.astype(np.uint8))
    image.putpalette([0, 0, 0, *color] + [0] * 750)
    return image


GRAY = Image.fromarray(INSIDE.astype(np.uint8) * 255)
WIDE = Image.fromarray(INSIDE.astype(np.uint16) * 65535)
UPRIGHT = {8: Image.Transpose.ROTATE_270, 6: Image.Transpose.ROTATE_90}
IMAGES = {
    "gray": (GRAY, {}), "16 bits": (WIDE, {}),
    "16 bits, black is clear": (WIDE, {"transparency": 0}),
    "white on clear": (colored((255, 255, 255, 255)), {}),
    "red on clear": (colored((255, 0, 0, 255)), {}),
    "blue on clear white": (colored((0, 0, 255, 255), (255, 255, 255, 0)), {}),
    "half transparent red on clear": (colored((255, 0, 0, 100)), {}),
    "white on opaque black": (colored((255, 255, 255, 255), (0, 0, 0, 255)), {}),
    "gray and alpha": (colored((255, 255, 255, 255)).convert("LA"), {}),
    "palette": (palette((128, 0, 0)), {}),
    "palette, black is clear": (palette((128, 0, 0)), {"transparency": 0}),
}  # fmt: skip


def read(folder):
    Image.new("L", (30, 20)).save("photo.png")
    masks = open_masks(folder, [Source(folder.parent / "photo.png", "photo.png")])
    return masks.read("photo.png", (20, 30))


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_transparent_is_not_marked(name, tmp_path, monkeypatch):
    """Transparency is laid on white in images; in a mask white would be what is marked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    image, options = IMAGES[name]
    image.save("masks/photo.png", **options)
    np.testing.assert_array_equal(read(tmp_path / "masks"), INSIDE)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_mask_with_alpha_is_turned_upright(orientation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = colored((255, 0, 0, 255)).transpose(UPRIGHT[orientation])
    turned.save("masks/photo.png", exif=exif)
    np.testing.assert_array_equal(opacity("masks/photo.png"), 255 * INSIDE)
    np.testing.assert_array_equal(read(tmp_path / "masks"), INSIDE)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_image_of_several_labels_is_no_mask(dtype, tmp_path, monkeypatch):
    """Above half of the maximum lies label 2 alone, and label 1 in an image without a 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    labels = INSIDE.astype(dtype)
    Image.fromarray(labels).save("masks/photo.png")
    np.testing.assert_array_equal(read(tmp_path / "masks"), INSIDE)
    labels[3, 5] = 2
    Image.fromarray(labels).save("masks/photo.png")
    with pytest.raises(ValueError, match=r"photo\.png holds the labels 0, 1, 2: a mask has two"):
        read(tmp_path / "masks")
    shades = np.where(INSIDE, 200, 0).astype(dtype)
    shades[3, 5] = 120  # the soft edge of a drawn mask
    Image.fromarray(shades).save("masks/photo.png")
    np.testing.assert_array_equal(read(tmp_path / "masks"), INSIDE)


def test_a_mask_of_black_on_clear_marks_nothing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    colored((0, 0, 0, 255)).save("masks/photo.png")
    with pytest.raises(ValueError, match=r"photo\.png: .*marks nothing"):
        read(tmp_path / "masks")
