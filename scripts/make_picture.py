"""Makes docs/images/digits.png from a demo's run, as the README shows it.

    regard demo && python scripts/make_picture.py runs/demo

Which images: the two held-out ones that the network was least sure of, the surest wrong one if
there is one, and the first right one of the classes 0, 1, 2 ... until there are eight.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from regard import load
from regard.data.preprocess import to_tensor
from regard.data.sources import open_data
from regard.explain.overlay import overlay, resize_image
from regard.report.of_run import choose, maps_of
from regard.training.folder import RunFolder

SIDE, GAP, TEXT, LEFT = 144, 10, 26, 74
COUNT = 8
OUT = Path(__file__).resolve().parent.parent / "docs/images/digits.png"


def chosen(said) -> list[int]:
    """Rows of the predictions, by the rule above."""
    wrong = said.probabilities.argmax(axis=1) != said.labels
    listed = choose(said)
    surest_wrong = [i for i in listed if wrong[i]][:1]
    right = [i for i in listed if not wrong[i]]
    sure = said.probabilities.max(axis=1)
    unsure = sorted(right, key=lambda i: sure[i])[:2]
    first = [int(np.flatnonzero(~wrong & (said.labels == c))[0]) for c in range(10)]
    return list(dict.fromkeys([*surest_wrong, *unsure, *first]))[:COUNT]


def main() -> None:
    """Writes the picture."""
    run = RunFolder(Path(sys.argv[1]))
    classifier, (_, said) = load(run.path), run.read_predictions()
    table = open_data("digits")
    rows = {table.path(i): i for i in range(len(table))}
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 16)
    small = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)
    width = LEFT + COUNT * (SIDE + GAP)
    height = TEXT + 3 * (SIDE + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, words in enumerate(("image", "gate 3", "gate 4")):
        draw.text((8, TEXT + k * (SIDE + GAP) + SIDE // 2 - 8), words, "black", font)
    for column, i in enumerate(chosen(said)):
        pixels = table.read(rows[said.paths[i]])
        with torch.no_grad():
            maps = maps_of(classifier, classifier.preprocess.fit(to_tensor(pixels)))
        scan = pixels[..., 0]
        panels = [resize_image(scan, (SIDE, SIDE))]
        panels += [overlay(scan, values, size=(SIDE, SIDE), outline=0.5) for _, values in maps]
        x = LEFT + column * (SIDE + GAP)
        predicted = int(said.probabilities[i].argmax())
        right = predicted == said.labels[i]
        share = said.probabilities[i].max()
        shown = "> 99.9 %" if share > 0.999 else f"{share:.1%}".replace("%", " %")
        told = f"{predicted}  {shown}" if right else f"{predicted}, is {said.labels[i]}  {shown}"
        draw.text((x, 4), told, "black" if right else "#b3400f", small)
        for k, panel in enumerate(panels):
            array = panel if panel.ndim == 3 else np.repeat(panel[..., None], 3, axis=2)
            sheet.paste(Image.fromarray(array), (x, TEXT + k * (SIDE + GAP)))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(OUT, optimize=True)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
