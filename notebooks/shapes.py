"""The notebooks' images: a small shape somewhere on a photograph. Its kind is the class.

Where the right place to look is known, a map can be checked. The photographs are the two that
scikit-learn ships (CC BY).
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

SIDE = 48
PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]
KINDS = ("circle", "square", "triangle")


def shape_image(
    kind: str, rng: np.random.Generator, mark: str | None = None
) -> tuple[Image.Image, Image.Image]:
    """(image, mask of the shape); with `mark` a square of this color in the upper left corner."""
    photo = PHOTOS[rng.integers(2)]
    crop = int(rng.integers(100, 300))
    x, y = (int(rng.integers(n - crop)) for n in photo.size)
    image = photo.crop((x, y, x + crop, y + crop)).resize((SIDE, SIDE))
    mask = Image.new("L", (SIDE, SIDE))
    size = int(rng.integers(12, 16))
    left, top = (int(rng.integers(2, SIDE - size - 2)) for _ in range(2))
    box = (left, top, left + size, top + size)
    color = tuple(int(c) for c in rng.permutation([255, int(rng.integers(256)), 0]))
    for canvas, fill in ((image, color), (mask, 255)):
        draw = ImageDraw.Draw(canvas)
        if kind == "circle":
            draw.ellipse(box, fill=fill)
        elif kind == "square":
            draw.rectangle(box, fill=fill)
        else:
            bottom = top + size
            points = [(left, bottom), (left + size, bottom), (left + size // 2, top)]
            draw.polygon(points, fill=fill)
    if mark is not None:
        ImageDraw.Draw(image).rectangle((0, 0, 11, 11), fill=mark)
    return image, mask


def write_shapes(folder: Path, count: int, *, seed: int = 0, marked: bool = False) -> Path:
    """`count` images of each kind below FOLDER/KIND, and their masks below FOLDER-masks.

    marked: each image has a mark in its corner whose color gives its kind away.
    """
    rng = np.random.default_rng(seed)
    for kind, color in zip(KINDS, ("red", "lime", "blue"), strict=True):
        masks = folder.with_name(f"{folder.name}-masks") / kind
        for place in (folder / kind, masks):
            place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = shape_image(kind, rng, color if marked else None)
            image.save(folder / kind / f"{i:03d}.png")
            mask.save(masks / f"{i:03d}.png")
    return folder
