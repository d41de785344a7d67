"""How many planted copies the check for near-duplicates finds, and how many of its pairs are wrong.

    python benchmarks/near_duplicates.py NAME FOLDER [--images N] [--copies 200] [--sheet FILE.png]

FOLDER holds images at any depth, such as CIFAR-10 or Imagenette as class folders; N of them, evenly
spread (default: all), are compared together with copies of six kinds, made by `copy_of` from
images drawn at random and saved to a temporary folder. Writes the rows of NAME in
benchmarks/near_duplicates.csv: for each kind

    recall     the share of copies that are paired with the image that they were made from
    precision  the share of the copies' pairs that join a copy to that image, or to an image that
               is itself paired with it or with another of its copies

and, in the row "natural", the number of pairs between images of FOLDER, for a person to look at:
--sheet draws them, the least similar first.
"""

import argparse
import csv
import datetime
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from regard.data.images import IMAGE_SUFFIXES
from regard.data.near_duplicates import NearDuplicate, find_near_duplicates, read_thumbnails
from regard.data.table import ImageTable

RESULTS = Path(__file__).with_name("near_duplicates.csv")
KINDS = ("scaled", "saved again", "cropped", "brightened", "other text", "mirrored")
COLUMNS = (
    "data", "images", "kind", "copies", "recall", "pairs", "precision", "seconds", "date",
)  # fmt: skip


def copy_of(image: Image.Image, kind: str, rng: np.random.Generator) -> bytes:
    """A copy as a file: JPEG where it is saved again, else PNG."""
    width, height = image.size
    options = {"format": "PNG"}
    if kind == "scaled":
        factors = (
            (0.65, 0.75, 0.85, 1.5, 2.0) if min(width, height) <= 64 else (0.5, 0.6, 0.75, 1.7)
        )
        factor = rng.choice(factors)
        size = (round(width * factor), round(height * factor))
        image = image.resize(size, Image.Resampling.BICUBIC)
    elif kind == "saved again":
        options = {"format": "JPEG", "quality": int(rng.integers(25, 76))}
    elif kind == "cropped":  # up to a tenth of each side
        left, top, right, bottom = np.maximum(
            rng.uniform(0, 0.1, 4), rng.permutation(4) // 3 * 0.04
        )
        image = image.crop((
            round(left * width), round(top * height), width - round(right * width),
            height - round(bottom * height),
        ))  # fmt: skip
    elif kind == "brightened":
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(1.15, 1.6))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.2))
    elif kind == "other text":
        _write_lines(image, rng)
    elif kind == "mirrored":
        image = ImageOps.mirror(image)
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _write_lines(image: Image.Image, rng: np.random.Generator) -> None:
    """A line of text at the top or at the bottom; of larger images two."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    for _ in range(1 if min(width, height) <= 64 else 2):
        font = ImageFont.load_default(max(6, round(height * rng.uniform(0.05, 0.09))))
        text = "".join(rng.choice(list("ABCDEFGHKLMNPRSTUVXYZ0123456789 "), rng.integers(5, 11)))
        at = (rng.uniform(0, 0.4) * width, rng.choice([0.02, 0.85]) * height)
        level = int(rng.choice([255, 230, 0, 20]))
        draw.text(at, text, fill=level if image.mode == "L" else (level,) * 3, font=font)


def plant(files: list[Path], copies: int, folder: Path) -> list[tuple[int, str, Path]]:
    """(index of the image, kind, file) for each copy."""
    rng = np.random.default_rng(0)
    planted = []
    for kind in KINDS:
        for i in sorted(rng.choice(len(files), min(copies, len(files)), replace=False).tolist()):
            with Image.open(files[i]) as image:
                content = copy_of(image.convert("RGB"), kind, rng)
            path = folder / f"{kind}-{i}.img"
            path.write_bytes(content)
            planted.append((i, kind, path))
    return planted


def table_of(paths: list[Path]) -> ImageTable:
    """Images of one class, without splits."""
    count = len(paths)
    return ImageTable(
        name="planted", classes=["a", "b"], labels=np.zeros(count, np.int64),
        splits=np.full(count, ""), files=[str(p) for p in paths],
    )  # fmt: skip


def score(
    n: int, planted: list[tuple[int, str, Path]], pairs: list[NearDuplicate]
) -> dict[str, tuple[int, float, int, float]]:
    """{kind: (copies, recall, pairs, precision)}; images are rows 0 to n - 1, then the copies."""
    source = list(range(n)) + [i for i, _, _ in planted]
    natural = {(source[p.first], source[p.second]) for p in pairs if p.second < n}
    related = natural | {(j, i) for i, j in natural}
    scores = {}
    for kind in KINDS:
        rows = {n + k for k, (_, name, _) in enumerate(planted) if name == kind}
        of_kind = [p for p in pairs if p.first in rows or p.second in rows]
        found = {r for p in of_kind for r in (p.first, p.second)
                 if r in rows and source[r] in (p.first, p.second)}  # fmt: skip
        right = [
            (a := source[p.first]) == (b := source[p.second]) or (a, b) in related for p in of_kind
        ]
        scores[kind] = (
            len(rows), len(found) / max(len(rows), 1), len(right), sum(right) / max(len(right), 1)
        )  # fmt: skip
    return scores


def draw_pairs(files: list[Path], pairs: list[NearDuplicate], path: Path) -> None:
    """A contact sheet of up to 120 pairs, the least similar first."""
    shown = sorted(pairs, key=lambda p: p.similarity)[:120]
    side, columns = 96, 8
    rows = max(1, -(-len(shown) // columns))
    sheet = Image.new("RGB", (columns * (2 * side + 12), rows * (side + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, pair in enumerate(shown):
        x, y = k % columns * (2 * side + 12), k // columns * (side + 16)
        for at, i in enumerate((pair.first, pair.second)):
            with Image.open(files[i]) as image:
                sheet.paste(image.convert("RGB").resize((side, side)), (x + at * side, y))
        text = f"{pair.similarity:.3f}{' mirrored' * pair.mirrored}"
        draw.text((x, y + side), text, fill="black")
    sheet.save(path)


def main() -> None:
    """Measures one data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    files = sorted(p for p in asked.folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if asked.images:
        files = [files[i] for i in np.linspace(0, len(files) - 1, asked.images).astype(int)]
    with tempfile.TemporaryDirectory() as folder:
        planted = plant(files, asked.copies, Path(folder))
        table = table_of([*files, *(path for _, _, path in planted)])
        started = time.process_time()
        pairs = find_near_duplicates(table, read_thumbnails(table))
        seconds = round(time.process_time() - started)
    natural = [p for p in pairs if p.second < len(files)]
    if asked.sheet:
        draw_pairs(files, natural, asked.sheet)
    today = datetime.date.today().isoformat()
    rows = [
        [
            asked.name,
            len(files),
            kind,
            n,
            f"{recall:.3f}",
            count,
            f"{precision:.3f}",
            seconds,
            today,
        ]
        for kind, (n, recall, count, precision) in score(len(files), planted, pairs).items()
    ]
    rows.append([asked.name, len(files), "natural", "", "", len(natural), "", seconds, today])
    write(rows, asked.name)


def write(rows: list[list[object]], name: str) -> None:
    """Replaces a data set's rows in the file of results."""
    old: list[list[str]] = []
    if RESULTS.is_file():
        with RESULTS.open(newline="") as file:
            old = [row for row in csv.reader(file) if row[0] not in (name, COLUMNS[0])]
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([*old, *rows])


if __name__ == "__main__":
    main()
