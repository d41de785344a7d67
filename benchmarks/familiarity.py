"""Which score detects images unlike a run's training images, and how often.

    python benchmarks/familiarity.py RUN FOLDER... [--out benchmarks/familiarity.csv]

Compares the Mahalanobis distance of pooled features (what Regard stores), the energy of the logits
and the top-1 probability, each with its threshold at the 99 % quantile of the validation images:
the share of the run's test images beyond it (false alarms), and of white images, black ones, gray
ramps, uniform noise, and the images of each FOLDER.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch

import regard
from regard.data.table import ImageTable
from regard.data.walk import images_below
from regard.familiarity import measure_familiarity
from regard.files import spread
from regard.run_data import run_table

MOST = 300  # images of each kind


def made(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Artificial images, (n, C, H, W) in 0..255."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 255, shape[2]).expand(1, *shape)
    return {
        "white": torch.full((1, *shape), 255.0),
        "black": torch.zeros(1, *shape),
        "gray ramp": ramp,
        "noise": torch.rand(50, *shape, generator=generator) * 255,
    }


def pixels_of(classifier: regard.Classifier, paths: list[str]) -> torch.Tensor:
    """Decoded images, (n, C, H, W)."""
    chosen = [paths[i] for i in spread(len(paths), MOST)]
    return torch.stack([classifier.decode(path).float() for path in chosen])


def signs(classifier: regard.Classifier, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The three scores of each image; larger is less familiar."""
    found: dict[str, list] = {"distance": [], "energy": [], "top-1 probability": []}
    model, preprocess = classifier.model, classifier.preprocess
    for part in images.split(64):
        with torch.no_grad():
            logits = model(preprocess.normalize(part))
        found["distance"].append(classifier.familiarity.distances(classifier.features(part)))
        found["energy"].append(-logits.logsumexp(dim=1).numpy())
        found["top-1 probability"].append(-logits.softmax(dim=1).amax(dim=1).numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def images_of(classifier: regard.Classifier, table: ImageTable, split: str) -> torch.Tensor:
    """Decoded images of a split."""
    from regard.data.loading import Reader

    rows = np.flatnonzero(table.splits == split)
    rows = rows[spread(len(rows), MOST)]
    reader = Reader(table, classifier.preprocess)
    return torch.stack([classifier.preprocess.fit(reader.decode(i)).float() for i in rows])


def main() -> None:
    """Prints the table, and appends it to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    classifier = regard.load(arguments.run, calibrated=False)
    table = run_table(arguments.run, None, None)
    training, validation = (table.select(table.splits == s) for s in ("train", "val"))
    classifier.familiarity = measure_familiarity(classifier, training, validation, arguments.run)
    val = signs(classifier, images_of(classifier, table, "val"))
    kinds = {"its test images": images_of(classifier, table, "test")}
    kinds |= made(classifier.preprocess.input_size)
    for folder in arguments.folders:
        kinds[folder.name] = pixels_of(classifier, [str(p) for p in images_below([folder])])
    rows = []
    for name, images in kinds.items():
        found = signs(classifier, images)
        for sign, values in found.items():
            beyond = float((values > np.quantile(val[sign], 0.99)).mean())
            rows.append([arguments.run.name, name, len(images), sign, f"{beyond:.3f}"])
            print(*rows[-1], sep=",", flush=True)
    if arguments.out:
        with arguments.out.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
