"""Makes docs/images/digits.png from a demo run, as shown in the README.

    regard demo && python scripts/make_picture.py runs/demo

The images follow a rule: the wrong test image of highest probability, if there is one; the two
right ones of lowest probability; then the first right one of the classes 0, 1, 2 and so on, until
there are eight. Each map has its own scale, from its lowest value to its highest.
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from regard import explain, load
from regard.data.sources import open_data
from regard.evaluation import Predictions
from regard.explanations.overlay import Picture, color_key, overlay, resize_image
from regard.files import write_atomically
from regard.predict import Classifier
from regard.runs import RunFolder

OUT = Path(__file__).resolve().parent.parent / "docs/images/digits.png"
COUNT = 8
# in pixels of the picture, which is shown at half its size
SIDE, GAP, HEAD, LEFT, FOOT = 176, 12, 76, 108, 56
PAGE, INK, MUTED, WRONG = "#14191d", "#eef1f2", "#a3adb4", "#ffa463"  # on white and on dark


def chosen(said: Predictions) -> list[int]:
    """Rows of the predictions, by the rule in the module docstring."""
    sure = said.probabilities.max(axis=1)
    right = said.probabilities.argmax(axis=1) == said.labels
    surest_wrong = np.flatnonzero(~right)[np.argsort(-sure[~right], kind="stable")][:1]
    least_sure = np.flatnonzero(right)[np.argsort(sure[right], kind="stable")][:2]
    first = [np.flatnonzero(right & (said.labels == c))[:1] for c in range(len(said.classes))]
    return list(dict.fromkeys(np.concatenate([surest_wrong, least_sure, *first]).tolist()))[:COUNT]


def panels(scan: NDArray[np.uint8], classifier: Classifier) -> list[tuple[str, Picture]]:
    """The scan (H, W), and each gate's attention over it, with their names."""
    (explanation,) = explain(classifier, scan, methods=["attention"])
    shown = [("scan", np.repeat(resize_image(scan, (SIDE, SIDE))[..., None], 3, axis=2))]
    return shown + [
        (m.name, overlay(scan, m.values, size=(SIDE, SIDE), outline=0.5))
        for m in explanation.spatial()
    ]


def heading(said: Predictions, i: int) -> tuple[str, str, str]:
    """Two lines on the prediction for image i, and their color."""
    p = said.probabilities[i]
    name, truth = said.classes[int(p.argmax())], said.classes[said.labels[i]]
    share = "> 99.9 %" if p.max() > 0.999 else f"{p.max():.1%}".replace("%", " %")
    return (f"{name}", share, INK) if name == truth else (f"{name}, is {truth}", share, WRONG)


def sheet(columns: list[tuple[tuple[str, str, str], list[tuple[str, Picture]]]]) -> Image.Image:
    """The columns side by side, and a line at the bottom that explains the colors."""
    rows = [name for name, _ in columns[0][1]]
    size = (LEFT + len(columns) * (SIDE + GAP), HEAD + len(rows) * (SIDE + GAP) + FOOT)
    picture = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(picture)
    faces = {w: font_manager.findfont(f"DejaVu Sans:{w}") for w in ("regular", "bold")}
    large, font = (ImageFont.truetype(faces[w], n) for w, n in (("bold", 27), ("regular", 24)))
    for k, name in enumerate(rows):
        words = name.removesuffix(".map").replace("gate", "gate ")
        draw.text((12, HEAD + k * (SIDE + GAP) + SIDE // 2), words, MUTED, font, anchor="lm")
    for column, ((first, second, color), shown) in enumerate(columns):
        x = LEFT + column * (SIDE + GAP)
        draw.text((x, 32), first, color, large, anchor="ls")
        draw.text((x, 64), second, MUTED, font, anchor="ls")
        for k, (_, panel) in enumerate(shown):
            picture.paste(Image.fromarray(panel), (x, HEAD + k * (SIDE + GAP)))
    middle = size[1] - FOOT // 2 - 2
    picture.paste(Image.fromarray(color_key(160, 24)), (LEFT, middle - 12))
    words = "attention, from least to most; the white line is half way"
    draw.text((LEFT + 176, middle), words, MUTED, font, anchor="lm")
    return picture


def main() -> int:
    """Writes the picture."""
    if len(sys.argv) != 2:
        print("give a demo's run: python scripts/make_picture.py runs/demo", file=sys.stderr)
        return 2
    run = RunFolder(Path(sys.argv[1]))
    classifier, (_, said) = load(run.path), run.read_predictions()
    table = open_data("digits")
    rows = {table.path(i): i for i in range(len(table))}
    assert said.paths is not None
    picture = sheet(
        [
            (heading(said, i), panels(table.read(rows[said.paths[i]])[..., 0], classifier))
            for i in chosen(said)
        ]
    )
    OUT.parent.mkdir(parents=True, exist_ok=True)
    small = picture.quantize(256, dither=Image.Dither.NONE)
    write_atomically(OUT, lambda part: small.save(part, "PNG", optimize=True))
    print(f"{OUT}: {picture.width}x{picture.height}, {OUT.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
