"""Two studies whose right answer is known, to see that `regard study` says what is true.

    python examples/known_answers.py [OUT] [--seeds N] [--epochs E]

Two sets of 48x48 gray images are made, with noise:

patch  Each image has one bright patch among fifteen dimmer ones, all with bars, at a contrast
       of its own. The direction of the bars in the bright patch is the class; those of the others
       are random. What decides is in 3 % of the image, so a network that weighs positions should
       do better.
mean   The class is the brightness of the whole image. All positions say the same, so weighing
       them should not help.

On each, AG-SonoNet-8 is compared with SonoNet-8, the same network without attention gates.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, PATCH = 48, 8
STUDY = """\
title = "Do attention gates help where {what} decides?"
recipe = "quick"

[[rows]]
name = "SonoNet-8"
network = "sononet8"

[[rows]]
name = "AG-SonoNet-8"
network = "ag_sononet8"
"""


def bars(direction: int) -> np.ndarray:
    """(PATCH, PATCH) of bars two pixels wide: 0 horizontal, 1 vertical."""
    lines = (np.arange(PATCH) // 2 % 2 == 0).astype(float)
    return np.tile(lines, (PATCH, 1)) if direction else np.tile(lines[:, None], (1, PATCH))


def patch_image(label: int, rng: np.random.Generator) -> np.ndarray:
    """One bright patch, whose bars are the class, among fifteen dimmer ones."""
    image = rng.normal(60, 25, (SIDE, SIDE))
    cells = rng.permutation((SIDE // PATCH) ** 2)[:16]
    contrast = rng.uniform(40, 160)  # of this image: no fixed brightness marks the bright patch
    for n, cell in enumerate(cells.tolist()):
        y, x = PATCH * np.array(divmod(cell, SIDE // PATCH))
        direction = label if n == 0 else int(rng.integers(2))
        image[y : y + PATCH, x : x + PATCH] += contrast * (1 if n == 0 else 0.6) * bars(direction)
    return image


def mean_image(label: int, rng: np.random.Generator) -> np.ndarray:
    """Noise that is a little brighter for class 1."""
    return rng.normal(120 + 1.5 * label, 25, (SIDE, SIDE))


def write(folder: Path, make, count: int, seed: int) -> None:
    """`count` images of each class below `folder`."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("a", "b")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.rint(make(label, rng)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:04d}.png")


def main() -> None:
    """Makes the images and runs both studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/known-answers"))
    parser.add_argument("--seeds", default="6")
    parser.add_argument("--epochs", default="10")
    parser.add_argument("--images", type=int, default=400, help="of each class")
    args = parser.parse_args()
    for name, make, what in (
        ("patch", patch_image, "a small patch"),
        ("mean", mean_image, "the mean"),
    ):
        data = args.out / "images" / name
        if not data.exists():
            write(data, make, args.images, seed=len(name))
        study = args.out / f"{name}.toml"
        study.write_text(STUDY.format(what=what), encoding="utf-8")
        words = [
            "study", str(study), str(data), "--out", str(args.out / name), "--seeds", args.seeds,
            "--epochs", args.epochs, "--size", str(SIDE), "--test", "0.4",
            "--random-crop", "none", "--rotate", "0", "--zoom", "1", "1", "--flip", "0",
            "--color-jitter", "0", "--faithfulness-images", "0",
            "--optimizer", "sgd",  # as it was measured
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "regard", *words], check=True)


if __name__ == "__main__":
    main()
