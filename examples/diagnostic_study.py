"""A diagnostic study from the folder to the figures, on data with faults that are known.

    python examples/diagnostic_study.py FOLDER [OUT] [--images 800] [--epochs 6] [--size 96]

FOLDER holds a folder of photographs for each class, such as Imagenette's train folder. From its
first two classes a set is made that looks like a hospital's: one class in four is the finding,
patients have two images each, a second site has darker images, patients have an age, the finding
is outlined in a mask (a central ellipse: nobody marked these), and COPIES of each kind of
near-duplicate are planted under other patients' names, two of them with the wrong label.

Then it runs the commands as people do (data, train, calibrate, evaluate, explain, report, figures,
errors), prints the time of each, and checks what must hold: the planted copies are found and none
of them divides training from test, the threshold comes from validation, every file is there.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

POSITIVE, NEGATIVE = "finding", "normal"
KINDS = ("scaled", "saved again", "cropped", "brightened", "other text", "mirrored")
COPIES = 5  # of each kind
SIDE = 160  # pixels of the shorter side, at least


# ---- the data ----------------------------------------------------------------------------
def copy_of(image: Image.Image, kind: str) -> bytes:
    """A near-duplicate of an image as a JPEG file."""
    width, height = image.size
    quality = 90
    if kind == "scaled":
        image = image.resize((round(0.7 * width), round(0.7 * height)))
    elif kind == "saved again":
        quality = 45
    elif kind == "cropped":
        image = image.crop((round(0.05 * width), round(0.04 * height), width, height))
    elif kind == "brightened":
        image = ImageEnhance.Brightness(image).enhance(1.3)
    elif kind == "other text":
        ImageDraw.Draw(image).text((8, 8), "L 24-07-1981", fill="white")
    else:
        image = ImageOps.mirror(image)
    return encoded(image, quality)


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    """The image as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def photographs(folder: Path, count: int) -> list[tuple[str, Image.Image]]:
    """(label, image): a quarter of the first class, the rest of the second."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    found = []
    for label, source, share in ((POSITIVE, classes[0], 0.25), (NEGATIVE, classes[1], 0.75)):
        for path in sorted(p for p in source.iterdir() if p.is_file())[: round(share * count)]:
            with Image.open(path) as image:
                image.draft("RGB", (2 * SIDE, 2 * SIDE))
                small = image.convert("RGB")
            small.thumbnail((2 * SIDE, 2 * SIDE))
            found.append((label, small))
    return found


def make_data(folder: Path, out: Path, count: int) -> dict[str, str]:
    """Writes images, masks and scans.csv; returns the original of each planted copy."""
    rng = np.random.default_rng(0)
    (out / "images").mkdir(parents=True)
    (out / "masks").mkdir()
    rows, planted = [], {}
    images = photographs(folder, count)
    for i, (label, image) in enumerate(images):
        patient = i // 2
        site = "second" if patient % 4 == 0 else "first"
        age = 25 + (37 * patient) % 60
        if site == "second":
            image = ImageEnhance.Brightness(image).enhance(0.7)
        name = f"{i:04d}.jpg"
        (out / "images" / name).write_bytes(encoded(image))
        rows.append([f"images/{name}", label, f"patient {patient}", site, age])
        if label == POSITIVE:
            write_mask(out / "masks" / f"{i:04d}.png", image.size)
    chosen = rng.choice(len(images), COPIES * len(KINDS), replace=False)
    for k, i in enumerate(chosen.tolist()):
        label, name = images[i][0], f"copy-{k:02d}.jpg"
        if k < 2:
            label = NEGATIVE if label == POSITIVE else POSITIVE
        with Image.open(out / rows[i][0]) as image:
            content = copy_of(image.convert("RGB"), KINDS[k % len(KINDS)])
        (out / "images" / name).write_bytes(content)
        rows.append([f"images/{name}", label, f"patient X{k}", "second", 25 + k])
        planted[name] = Path(rows[i][0]).name
    with (out / "scans.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "site", "age"])
        writer.writerows(rows)
    return planted


def write_mask(path: Path, size: tuple[int, int]) -> None:
    """A central ellipse."""
    mask = Image.new("L", size)
    width, height = size
    ImageDraw.Draw(mask).ellipse((0.2 * width, 0.2 * height, 0.8 * width, 0.8 * height), fill=255)
    mask.save(path)


# ---- the commands ------------------------------------------------------------------------
class Journey:
    """Runs commands and keeps their times."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def regard(self, name: str, *arguments: object) -> str:
        """The output of a command, which must succeed."""
        command = [sys.executable, "-m", "regard", name, *map(str, arguments)]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        self.times.append((name, time.perf_counter() - started))
        print(f"{self.times[-1][1]:7.1f} s  regard {name}", flush=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout


def check(condition: bool, text: str) -> None:
    """Ends the program where something does not hold."""
    if not condition:
        raise SystemExit(f"does not hold: {text}")
    print(f"           ✓ {text}", flush=True)


def check_data(content: dict[str, Any], planted: dict[str, str]) -> None:
    """The planted copies are among the near-duplicates, those of two labels first."""
    pairs = content["near_duplicates"]
    names = {frozenset(Path(p).name for p in pair["paths"]) for pair in pairs}
    found = sum(frozenset(pair) in names for pair in planted.items())
    check(found >= 0.95 * len(planted), f"{found} of {len(planted)} planted copies are found")
    check([p["reason"] for p in pairs[:2]] == ["labels"] * 2, "those of two labels come first")


def check_splits(run: Path, planted: dict[str, str]) -> None:
    """No copy is in another split than its original, no patient in two."""
    with (run / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    split = {Path(row["path"]).name: row["split"] for row in rows}
    leaks = [a for a, b in planted.items() if split[a] != split[b]]
    check(not leaks, "no planted copy is in another split than its original")
    by_group: dict[str, set[str]] = {}
    for row in rows:
        by_group.setdefault(row["group"], set()).add(row["split"])
    check(all(len(s) == 1 for s in by_group.values()), "no patient is in two splits")


def check_files(out: Path, run: Path) -> None:
    """What the commands promise is there."""
    figures = ("roc", "calibration", "decision-curve", "subgroups-site", "confusion")
    expected = [
        out / "check.html", out / "table1.md", out / "parts.csv", out / "methods.md",
        out / "labels.csv", run / "report.html", run / "calibration.json",
        out / "explained" / "scores.csv", *(out / "figures" / f"{f}.pdf" for f in figures),
    ]  # fmt: skip
    missing = [str(p) for p in expected if not p.is_file()]
    check(not missing, f"all {len(expected)} files are there{': lacks ' * bool(missing)}"
          f"{', '.join(missing)}")  # fmt: skip
    page = (run / "report.html").read_text(encoding="utf-8")
    check(all(f'id="{s}"' in page for s in ("calibration", "subgroups")), "the report has both")


def study(folder: Path, out: Path, options: argparse.Namespace) -> list[tuple[str, float]]:
    """The whole journey; returns the time of each command."""
    out.mkdir(parents=True)
    planted = make_data(folder, out / "data", options.images)
    data, run, journey = out / "data" / "scans.csv", out / "run", Journey()
    content = journey.regard(
        "data", data, "--json", "--html", out / "check.html", "--table1", out / "table1.md"
    )
    check_data(json.loads(content), planted)
    journey.regard(
        "train", data, "--out", run, "--model", options.model, "--size", options.size,
        "--epochs", options.epochs, "--keep-together", "--val", 0.2, "--faithfulness-images", 8,
        "--device", "cpu",
    )  # fmt: skip
    check_splits(run, planted)
    journey.regard("calibrate", run, "--positive", POSITIVE, "--at", "sensitivity=0.9")
    content = journey.regard(
        "evaluate", run, "--json", "--subgroups", "site", "age", "--bands", "age=40,60",
        "--subgroups-csv", out / "parts.csv",
    )  # fmt: skip
    found = json.loads(content)
    check(
        found["diagnostics"]["threshold"]["rule"] == "sensitivity=0.9"
        and "validation" in found["diagnostics"]["calibrated_on"],
        "the test is decided by the threshold of the validation images",
    )
    check([s["column"] for s in found["subgroups"]] == ["site", "age"], "subgroups have rows")
    marked = [p.with_suffix(".jpg").name for p in sorted((out / "data" / "masks").iterdir())]
    images = [out / "data" / "images" / name for name in marked[:8]]
    journey.regard(
        "explain", run, *images, "--masks", out / "data" / "masks", "--out", out / "explained"
    )
    journey.regard("report", run, "--methods", out / "methods.md")
    journey.regard("figures", run, "--out", out / "figures", "--images", 2, "--scored", 8)
    journey.regard("errors", run, "--csv", out / "labels.csv", "--json")
    check_files(out, run)
    return journey.times


def main() -> None:
    """Reads the command line, runs the study and prints its times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of class folders of photographs")
    parser.add_argument("out", type=Path, nargs="?", default=Path("diagnostic_study"))
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--model", default="cbam_resnet18")
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"{options.out} exists: choose another folder")
    times = study(options.folder, options.out, options)
    print(f"{sum(t for _, t in times):7.1f} s  in all; the report: {options.out}/run/report.html")


if __name__ == "__main__":
    main()
