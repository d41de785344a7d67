"""Writes explanations into a folder: a picture and raw maps an image, a sheet, and scores."""

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from regard.data.sources import images_below
from regard.errors import ImageError, UsageError
from regard.explanations.explanation import Explanation, Seen, explain, see
from regard.explanations.faithfulness import (
    SCORED,
    MapScore,
    Request,
    Sanity,
    explained,
    judge,
    maps_to_score,
)
from regard.explanations.figure import contact_sheet, curves_figure
from regard.explanations.pointing import point, read_masks
from regard.files import write_atomically
from regard.predict import Classifier

log = logging.getLogger(__name__)


BATCH = 8
ON_A_SHEET = 60


def explain_images(classifier: Classifier, paths: Sequence[Path], ask: Request) -> int:
    """Explains every image and writes what was found into `ask.out`.

    Returns:
        How many images were explained; `ask.failed` counts those that could not be read.

    Raises:
        UsageError: an unknown class, layer or reduction, or masks that don't fit.
        OSError: something can't be written.
    """
    if ask.target is not None and ask.target not in classifier.class_names:
        names = ", ".join(classifier.class_names[:20])
        raise UsageError(f"--target {ask.target}: choose one of {names}")
    ask.out.mkdir(parents=True, exist_ok=True)
    sheet: list[Explanation] = []
    kept: list[Seen] = []
    count = 0
    readable = _readable(classifier, paths, ask)
    while batch := list(islice(readable, BATCH)):
        for found in _explained(classifier, batch, ask):
            _write(found, ask)
            count += 1
            if len(sheet) < ON_A_SHEET:
                sheet.append(_lighter(found))
        if ask.score or ask.masks is not None:
            kept += batch
    if count > 1:
        path = ask.out / "contact-sheet.png"
        picture = contact_sheet(sheet)
        write_atomically(path, lambda beside: picture.save(beside, format="PNG"))
        ask.echo(f"{path}: {'the first ' * (count > len(sheet))}{len(sheet)} images on one sheet")
    if kept:
        _judge(classifier, kept, ask)
    return count


def _readable(classifier: Classifier, paths: Sequence[Path], ask: Request) -> Iterator[Seen]:
    for path in images_below(paths):
        try:
            yield see(classifier, path)
        except ImageError as error:
            ask.complain(str(error))
            ask.failed += 1


def _explained(classifier: Classifier, batch: list[Seen], ask: Request) -> list[Explanation]:
    return explain(
        classifier.model, torch.stack([s.x for s in batch]), [s.picture for s in batch],
        [s.box for s in batch], classes=classifier.class_names, target=ask.target,
        methods=ask.methods, reduce=ask.reduce, layer=ask.layer,
        paths=[s.path.name for s in batch], keep_channels=ask.channels,
    )  # fmt: skip


def _lighter(found: Explanation) -> Explanation:
    """With an image of contact-sheet size, so that a sheet of photographs fits in memory."""
    height, width = found.image.shape[:2]
    factor = 360 / max(height, width)
    if factor >= 1:
        return found
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = np.asarray(Image.fromarray(found.image).resize(size, Image.Resampling.BOX))
    left, top, right, bottom = (v * factor for v in found.box)
    return Explanation(
        path=found.path, image=small, box=(left, top, right, bottom), classes=found.classes,
        target=found.target, maps=found.maps,
    )  # fmt: skip


def _write(found: Explanation, ask: Request) -> None:
    """The picture and the numbers of one image; names that are there twice get a number."""
    stem, n = Path(found.path).stem, 1
    while (name := stem if n == 1 else f"{stem}-{n}") in ask.names:
        n += 1
    ask.names.add(name)
    found.save_figure(ask.out / f"{name}.png")
    found.save_npz(ask.out / f"{name}.npz")
    (best, p), maps = found.classes[0], [m.name for m in found.spatial()]
    ask.echo(f"{ask.out / name}.png: {best} {p:.1%}; maps: {', '.join(maps)}")


def _judge(classifier: Classifier, kept: list[Seen], ask: Request) -> None:
    if len(kept) > SCORED:
        kept = [kept[i] for i in np.linspace(0, len(kept) - 1, SCORED).astype(int)]
        ask.echo(f"scores: on {SCORED} of the images, evenly spread")
    x = torch.stack([s.x for s in kept])
    content: dict[str, Any] = {"images": len(kept), "baseline": ask.baseline, "seed": ask.seed}
    if ask.score:
        scores, checks = judge(classifier, x, ask)
        content["scores"] = {name: _numbers(s) for name, s in scores.items()}
        content["sanity"] = {
            s.name: {"unchanged": s.unchanged, "similarity": s.similarity.tolist()} for s in checks
        }
        _write_areas(scores, kept, ask)
        _write_curves(scores, kept, ask)
        _tell(scores, checks, ask)
    if ask.masks is not None:
        content["pointing"] = _point(classifier, kept, x, ask)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(ask.out / "scores.json", lambda beside: beside.write_text(text, "utf-8"))
    ask.echo(f"{ask.out / 'scores.json'}: the numbers")


def _numbers(s: MapScore) -> dict[str, Any]:
    parts = ("deletion", "insertion", "gain", "over_random", "over_center")
    found = {p: None if (e := getattr(s, p)) is None else e.to_dict() for p in parts}
    return {**found, "verdict": s.verdict()}


def _write_areas(scores: dict[str, MapScore], kept: list[Seen], ask: Request) -> None:
    """scores.csv: the areas of each image."""

    def write(beside: Path) -> None:
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "map", "deletion", "insertion"])
            for name, s in scores.items():
                for seen, (deletion, insertion) in zip(kept, s.each, strict=True):
                    writer.writerow([seen.path, name, f"{deletion:.6f}", f"{insertion:.6f}"])

    write_atomically(ask.out / "scores.csv", write)


def _write_curves(scores: dict[str, MapScore], kept: list[Seen], ask: Request) -> None:
    """curves.npz, (2, images, steps + 1) by map, and curves.png, their means."""
    arrays: dict[str, Any] = {name: s.curves for name, s in scores.items()}

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez_compressed(file, paths=np.array([str(s.path) for s in kept]), **arrays)

    write_atomically(ask.out / "curves.npz", write)
    fig = curves_figure(scores)
    write_atomically(
        ask.out / "curves.png", lambda beside: fig.savefig(beside, format="png", dpi=200)
    )


def _tell(scores: dict[str, MapScore], checks: list[Sanity], ask: Request) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("map", "deletion", "insertion", "gain", "gain over random", "over the middle"):
        table.add_column(heading, justify="left" if heading == "map" else "right")
    for name, s in scores.items():
        cells = [s.deletion, s.insertion, s.gain, s.over_random, s.over_center]
        table.add_row(name, *("" if e is None else _interval(e) for e in cells))
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    ask.echo("Low deletion and high insertion are good; in brackets 95 % intervals over images.")
    for line in [*(s.verdict() for s in scores.values() if s.over_random), *(
        s.verdict() for s in checks
    )]:  # fmt: skip
        ask.echo(line)


def _interval(e: Any) -> str:
    return f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})"


def _point(
    classifier: Classifier, kept: list[Seen], x: Tensor, ask: Request
) -> dict[str, dict[str, float]]:
    assert ask.masks is not None
    masks = read_masks(ask.masks, [str(s.path) for s in kept], [s.picture.shape[:2] for s in kept])
    found, target = {}, explained(classifier, x, ask)
    for name, maps in maps_to_score(classifier.model, x, ask, target).items():
        each = [
            point(values.numpy(), mask, box=s.box)
            for values, mask, s in zip(maps, masks, kept, strict=True)
        ]
        hits, energy = np.mean([p.hit for p in each]), np.mean([p.energy for p in each])
        chance = np.mean([p.chance for p in each])
        found[name] = {"hits": float(hits), "energy": float(energy), "chance": float(chance)}
        ask.echo(
            f"{name}: its highest place is marked in {hits:.0%} of {len(each)} images, and "
            f"{energy:.0%} of it lies in the marks, which are {chance:.0%} of the images"
        )
    return found
