"""Adds the weights of a finished run to the package: src/regard/weights/NAME.

    python scripts/ship_weights.py RUN NAME [--data DATA] [--machine TEXT]

NAME is the network's name and a tag, such as ag_sononet8.digits. What a run does not know about its
images (origin, license, what the weights must not be used for) is read from
scripts/weights.toml, from the table NAME or else from that of its tag.

Matrices are stored in half precision, vectors (norms, biases, running statistics) in single.
The accuracy on the card is that of the stored weights on the images on which the run was tested,
in fp32.
"""

import argparse
import json
import re
import shutil
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from regard import weights
from regard.errors import FileError, UsageError
from regard.evaluation import Evaluation, evaluate, read_calibration, write_calibration
from regard.evaluation.calibration import FILE as CALIBRATION
from regard.evaluation.familiarity import FILE as FAMILIARITY
from regard.evaluation.familiarity import read_familiarity, write_familiarity
from regard.familiarity import measure_familiarity
from regard.files import plural, write_text
from regard.machine import describe, describe_machine
from regard.predict import load, network_hash, stored_calibration
from regard.run_data import predictions_of, run_table
from regard.runs import RunFolder
from regard.trained_on import KNOWN, KnownImages

FACTS = Path(__file__).with_name("weights.toml")
NEEDED = ("data", "origin", "license", "not_for")
CHECKED = ("config.json", "model.safetensors", FAMILIARITY, CALIBRATION)
SPLITS = {"test": "test", "val": "validation", "train": "training"}


def test_image(channels: int, height: int, width: int) -> NDArray[np.uint8]:
    """An image (H, W) or (H, W, 3) made of two waves, the same on every machine."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * (3 + c) + y * (5 - c) + (x * y) // 16 + 40 * c) % 256 for c in range(channels)]
    image = np.stack(planes, axis=2).astype(np.uint8)
    return image[..., 0] if channels == 1 else image


def answer(folder: Path) -> list[float]:
    """The probabilities of the network in a folder for `test_image`, in the order of classes."""
    classifier = load(folder)
    image = test_image(*classifier.preprocess.input_size)
    shares = dict(classifier.predict([image], top=len(classifier.class_names))[0].classes)
    return [round(shares[name], 6) for name in classifier.class_names]


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with their matrices and kernels in half precision.

    Raises:
        UsageError: a value is too large for half precision.
    """
    halved = {
        k: t.half() if t.is_floating_point() and t.ndim > 1 else t for k, t in tensors.items()
    }
    for name, tensor in halved.items():
        if not tensor.float().isfinite().all():
            raise UsageError(f"{name} does not fit half precision")
    return {k: t.contiguous() for k, t in halved.items()}


def facts_of(name: str, path: Path = FACTS) -> dict[str, Any]:
    """The entries in weights.toml for the weights of this name.

    Raises:
        UsageError: it lacks the table or an entry.
    """
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    found = tables.get(name) or tables.get(name.partition(".")[2])
    if found is None:
        raise UsageError(f"{path} has neither a table {name!r} nor one of its tag")
    if lacking := [key for key in NEEDED if not found.get(key)]:
        raise UsageError(f"{path}, {name}: lacks {', '.join(lacking)}")
    return found


def without_paths(value: Any, data: str) -> Any:
    """A value of run.json or a text with this machine's folders reduced to their last part."""
    if isinstance(value, dict):
        return {k: without_paths(v, data) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(v, data) for v in value]
    if not isinstance(value, str):
        return value
    value = value.replace(data, f"./{Path(data).name}") if "/" in data else value
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)*([\w.+-]+)", r"\1", value)


def this_machine() -> str:
    """Name of the processor and the system."""
    first = describe(describe_machine(torch.device("cpu"))).partition(";")[0]
    return re.sub(r", \d+ threads?", "", first)


def write_run(run: RunFolder, folder: Path) -> None:
    """Copies the run's records: run.json, recipe.toml and metrics.csv."""
    content = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    data = content["plan"]["data"]
    content = without_paths(content, data)
    content["plan"] |= {"root": None, "location": ""}
    for name in ("left_out", "warnings"):  # they contain file names
        content["measured"].pop(name, None)
    write_text(folder / "run.json", json.dumps(content, indent=1) + "\n")
    recipe = (run.path / "recipe.toml").read_text(encoding="utf-8")
    write_text(folder / "recipe.toml", without_paths(recipe, data))
    shutil.copy(run.path / "metrics.csv", folder / "metrics.csv")


def write_network(run: RunFolder, folder: Path, data: str | None) -> Evaluation:
    """Writes weights, configuration and evaluation, and returns the latter."""
    facts, seed = run.read_facts(), run.read_recipe()["seed"]
    tensors = half(load_file(run.path / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    shutil.copy(run.path / "config.json", folder / "config.json")
    # tested as the run's own network, with its data and its splits
    for name in ("run.json", "splits.csv"):
        shutil.copy(run.path / name, folder / name)
    split, said, unreadable = predictions_of(folder, data, split=facts["tested_on"])
    write_extras(run, folder, data)
    (folder / "splits.csv").unlink()
    if unreadable or len(said.labels) != facts["counts"][facts["tested_on"]]:
        raise FileError(f"{len(said.labels)} images tested, not those of the run: {unreadable[:3]}")
    found = evaluate(said, seed=seed)
    RunFolder(folder).write_evaluation(split, found, said)
    (folder / "predictions.npz").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.setdefault("regard", {})["top1"] = found.metrics["top1"].value
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return found


def write_extras(run: RunFolder, folder: Path, data: str | None = None) -> None:
    """Writes what flags images unlike the training images, and the run's temperature, if any.

    Both belong to the stored weights; a temperature that was fitted for other weights than the
    run's is left out. For a run without validation images, the test images set the
    distance beyond which an image is unlike the training images; no weights depend on them.
    """
    table = run_table(folder, data, None)
    other = next(s for s in ("val", "test") if (table.splits == s).any())
    parts = [table.select(table.splits == split) for split in ("train", other)]
    classifier = load(folder, calibrated=False)
    write_familiarity(folder, measure_familiarity(classifier, *parts, folder))
    (folder / FAMILIARITY).chmod(0o644)
    if (stored := stored_calibration(run.path, classifier.class_names)) is not None:
        source = without_paths(stored.source, run.read_plan()["data"])
        write_calibration(folder, replace(stored, network=network_hash(folder), source=source))


def familiarity_row(folder: Path, counts: dict[str, int]) -> tuple[str, str]:
    """The card's row on images unlike the training images."""
    found = read_familiarity(folder)
    assert found is not None
    split = "validation" if counts.get("val") else "test"
    return (
        "unlike the training images",
        f"are images at a distance above {found.threshold:.4g}, and about "
        f"{found.false_alarms:.1%} of usual images (set by the {found.images[1]:,} {split} images)",
    )


def calibration_rows(folder: Path) -> list[tuple[str, str]]:
    """The card's row on the temperature and the threshold, if there are any."""
    found = read_calibration(folder)
    return [] if found is None else [("calibration", found.sentence())]


def card(name: str, folder: Path, found: Evaluation, facts: dict[str, Any], machine: str) -> str:
    """The model card, in Markdown with the hub's metadata in front."""
    run = RunFolder(folder)
    plan, measured, recipe = run.read_plan(), run.read_facts(), run.read_recipe()
    command = (folder / "recipe.toml").read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
    top1, split = found.metrics["top1"], SPLITS[measured["tested_on"]]
    counts = ", ".join(f"{n:,} {SPLITS[s]}" for s, n in measured["counts"].items())
    versions = ", ".join(f"{k} {v}" for k, v in measured["versions"].items())
    c, h, w = plan["preprocess"]["input_size"]
    precision = "bf16" if measured["bf16"] else "fp32"
    chosen = measured["selected"]
    how = (
        "chosen on these images"
        if "validation" in chosen["by"] and split == "validation"
        else ("no image of them was used to train or to choose the weights")
    )
    rows = [
        ("images", f"{facts['data']} ({counts})"),
        ("their origin", facts["origin"]),
        ("their license", facts["license"]),
        ("classes", ", ".join(plan["classes"])),
        ("input", f"{c} x {h} x {w} (channels, height, width)"),
        ("parameters", f"{measured['parameters']:,}"),
        ("started from", plan.get("start") or "random weights"),
        ("command", f"`{command}` (recipe.toml has every value)"),
        ("seed", str(recipe["seed"])),
        ("length", f"{measured['epochs']:.3g} epochs, {measured['seconds'] / 3600:.2g} hours"),
        ("machine", f"{machine}, {plural(measured['threads'], 'thread')}, {precision}"),
        ("versions", versions + (f", commit {facts['commit']}" if facts.get("commit") else "")),
        ("weights of", f"epoch {chosen['epoch']:.4g} ({chosen['by']})"),
        ("accuracy", f"**{top1.value:.2%}** (95 % interval {top1.low:.2%} to {top1.high:.2%}) on "
         f"{found.n:,} {split} images, in fp32; {how}"),
        familiarity_row(folder, measured["counts"]),
        *calibration_rows(folder),
        ("SHA-256", f"`{weights.sha256_of(folder / 'model.safetensors')}` (model.safetensors)"),
    ]  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    note = f"\n{facts['note']}\n" if facts.get("note") else ""
    return f"""---
library_name: timm
pipeline_tag: image-classification
license: mit
tags: [image-classification, regard, timm]
---

# {name}

Weights that come with Regard, in half precision (vectors in single):
`regard.create_model("{name}", pretrained=True)`, `regard predict {name} IMAGE`.

| | |
|---|---|
{table}
{note}
## Not to be used for

{facts["not_for"]}

The weights are offered under Regard's license (MIT); the images have their own.
"""


def update_index(root: Path, name: str, found: Evaluation, facts: dict[str, Any]) -> None:
    """Writes the row of these weights into index.json."""
    path, folder, top1 = root / weights.INDEX, root / name, found.metrics["top1"]
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    index[name] = {
        "sha256": {
            f: weights.sha256_of(folder / f) for f in CHECKED if (folder / f).is_file()
        },
        "size": (folder / "model.safetensors").stat().st_size,
        "data": facts["data"], "images": found.n,
        "accuracy": top1.value, "low": top1.low, "high": top1.high,
        "answer": answer(folder), "start": bool(facts.get("start")),
    }  # fmt: skip
    write_text(path, json.dumps(index, indent=1) + "\n")


def ship(
    run_folder: Path, name: str, *, data: str | None = None, machine: str = "",
    root: Path = weights.FOLDER, facts_file: Path = FACTS,
) -> Path:  # fmt: skip
    """Writes the folder of these weights, replacing an earlier one, and returns it.

    Raises:
        UsageError: the run is not finished or is of another network, or facts are missing.
        FileError: its test images are missing, or all weights together would be too large.
    """
    run, facts = RunFolder(run_folder), facts_of(name, facts_file)
    if not run.finished:
        raise UsageError(f"{run_folder} holds no finished run")
    config = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    if name.partition(".")[0] != config["architecture"] or not name.partition(".")[2]:
        raise UsageError(f"{name}: {config['architecture']}.TAG is expected")
    machine = machine or this_machine()
    with tempfile.TemporaryDirectory(dir=root, prefix=".writing-") as scratch:
        folder = Path(scratch, name)
        folder.mkdir()
        found = write_network(run, folder, data)
        write_run(run, folder)
        KnownImages(run.path / "splits.csv").write(folder / KNOWN)
        write_text(folder / "README.md", card(name, folder, found, facts, machine))
        others = [p for p in root.rglob("*") if p.is_file() and p.suffix != ".py"]
        others = [p for p in others if scratch not in str(p) and root / name not in p.parents]
        total = sum(p.stat().st_size for p in [*others, *folder.iterdir()])
        if total > weights.LARGEST:
            raise FileError(f"{total:,} bytes of weights in all: at most {weights.LARGEST:,}")
        shutil.rmtree(root / name, ignore_errors=True)
        folder.rename(root / name)
    update_index(root, name, found, facts)
    top1 = found.metrics["top1"]
    print(f"{root / name}: {top1.value:.2%} ({top1.low:.2%} to {top1.high:.2%}); {total:,} in all")
    return root / name


def main() -> None:
    """Parses the command line and adds the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="architecture.tag")
    parser.add_argument("--data", help="where the run's images are now")
    parser.add_argument("--machine", default="", help="what it was trained on (default: this)")
    asked = parser.parse_args()
    ship(asked.run, asked.name, data=asked.data, machine=asked.machine)


if __name__ == "__main__":
    main()
