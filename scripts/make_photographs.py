"""Makes docs/images/photographs.png: attention of the shipped weights in two photographs.

    python scripts/make_photographs.py

The photographs are the two in scikit-learn (CC BY 2.0: china.jpg by danielbuechele, flower.jpg by
vultilion, on Flickr), both shown whatever the prediction. Each map has its own scale, from
its lowest value to its highest.
"""

from importlib import resources
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from make_picture import GAP, INK, MUTED, PAGE, SIDE
from regard import explain, load
from regard.explanations.overlay import Picture, color_key, overlay
from regard.files import write_atomically
from regard.predict import Classifier

WEIGHTS = "cbam_resnet18.imagenette"
NAMES = ("china.jpg", "flower.jpg")
OUT = Path(__file__).resolve().parent.parent / "docs/images/photographs.png"


def center(photograph: Image.Image) -> NDArray[np.uint8]:
    """The square that is the network's input, at the picture's size."""
    side = min(photograph.size)
    left, top = ((length - side) // 2 for length in photograph.size)
    square = photograph.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def row(photograph: Image.Image, classifier: Classifier) -> tuple[str, list[tuple[str, Picture]]]:
    """The prediction, and the photograph with its maps."""
    (said,) = classifier.predict(photograph, top=1)
    (explanation,) = explain(classifier, photograph, methods=["attention", "gradcam"])
    shown, size = center(photograph), (SIDE, SIDE)
    name, share = said.classes[0]
    unlike = ", unlike the training images" if said.unlike_training else ""
    maps = [
        (m.name.replace("layer", "stage "), overlay(shown, m.values, size=size, outline=0.5))
        for m in explanation.spatial()
    ]
    return f"{name} {100 * share:.0f} %{unlike}", [("photograph", shown), *maps]


def sheet(rows: list[tuple[str, list[tuple[str, Picture]]]]) -> Image.Image:
    """A row per photograph, with its prediction above; a line at the bottom explains the colors."""
    names = [name for name, _ in rows[0][1]]
    head, foot, each = 44, 52, SIDE + 52
    size = (GAP + len(names) * (SIDE + GAP), head + len(rows) * each + foot)
    picture = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(picture)
    faces = {w: font_manager.findfont(f"DejaVu Sans:{w}") for w in ("regular", "bold")}
    large, font = (ImageFont.truetype(faces[w], n) for w, n in (("bold", 24), ("regular", 22)))
    for k, name in enumerate(names):
        draw.text((GAP + k * (SIDE + GAP), 32), name, MUTED, font, anchor="ls")
    for n, (answer, shown) in enumerate(rows):
        y = head + n * each
        draw.text((GAP, y + 30), answer, INK, large, anchor="ls")
        for k, (_, panel) in enumerate(shown):
            picture.paste(Image.fromarray(panel), (GAP + k * (SIDE + GAP), y + 44))
    middle = size[1] - foot // 2
    picture.paste(Image.fromarray(color_key(160, 24)), (GAP, middle - 12))
    words = "attention or Grad-CAM, from least to most; the white line is half way"
    draw.text((GAP + 176, middle), words, MUTED, font, anchor="lm")
    return picture


def main() -> None:
    """Writes the picture."""
    classifier = load(WEIGHTS)
    folder = resources.files("sklearn.datasets.images")
    rows = []
    for name in NAMES:
        with resources.as_file(folder.joinpath(name)) as path, Image.open(path) as photograph:
            rows.append(row(photograph.convert("RGB"), classifier))
    picture = sheet(rows)
    small = picture.quantize(256, dither=Image.Dither.NONE)
    write_atomically(OUT, lambda part: small.save(part, "PNG", optimize=True))
    print(f"{OUT}: {picture.width}x{picture.height}, {OUT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
