"""`regard explain RUN IMAGE...`: pictures, raw maps, a contact sheet, and scores."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from regard.attention import attention_kinds, record
from regard.data.images import ImageError, read_image
from regard.explain.faithfulness import MapScore, Sanity, baseline_of, sanity, score
from regard.explain.figure import contact_sheet, curves_figure
from regard.explain.gradcam import evaluating, gradcam
from regard.explain.maps import METHODS, Explanation, Reduce, attention_stages, explain
from regard.explain.overlay import Picture
from regard.explain.pointing import point, read_masks
from regard.prediction import Classifier, images_below
from regard.training.state import write_whole

BATCH = 8
ON_A_SHEET = 60
SCORED = 256  # images; more than these are scored evenly spread


@dataclass
class Request:
    """What is asked for, beside the images."""

    out: Path
    methods: tuple[str, ...] = METHODS
    target: str | None = None
    reduce: Reduce = "mean"
    layer: str | None = None
    channels: bool = False
    score: bool = False
    masks: Path | None = None
    baseline: str = "blur"
    seed: int = 0
    steps: int = 20
    repeats: int = 3
    complain: Callable[[str], None] = print
    echo: Callable[[str], None] = print
    failed: int = 0
    names: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Seen:
    """One image: the original, and as the network takes it."""

    path: Path
    picture: Picture
    x: Tensor
    box: tuple[float, float, float, float]


def as_picture(pixels: Any) -> Picture:
    """A decoded image (H, W, C) of any depth as uint8, (H, W) or (H, W, 3)."""
    if pixels.dtype == np.uint8:
        return pixels[..., 0] if pixels.shape[2] == 1 else pixels
    scale = 255 / 65535 if pixels.dtype == np.uint16 else 255.0
    shown = np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8)
    return shown[..., 0] if shown.shape[2] == 1 else shown


def see(classifier: Classifier, path: Path) -> Seen:
    """Reads one image in full and prepares it.

    Raises:
        ImageError: it can't be read.
    """
    preprocess = classifier.preprocess
    pixels = read_image(path)
    x = preprocess.normalise(classifier.decode(path)[None])[0]  # as `regard predict` sees it
    return Seen(path, as_picture(pixels), x, preprocess.seen(*pixels.shape[:2]))


def explain_images(classifier: Classifier, paths: Sequence[Path], ask: Request) -> int:
    """Explains every image and writes what was found into `ask.out`.

    Returns:
        How many images were explained; `ask.failed` counts those that could not be read.

    Raises:
        ValueError: an unknown class, layer or reduction, or masks that don't fit.
        OSError: something can't be written.
    """
    if ask.target is not None and ask.target not in classifier.class_names:
        names = ", ".join(classifier.class_names[:20])
        raise ValueError(f"--target {ask.target}: choose one of {names}")
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
        write_whole(path, lambda beside: picture.save(beside, format="PNG"))
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


# -------------------------------------------------------------------------------- scores
def own_maps(model: nn.Module, x: Tensor, reduce: Reduce = "mean") -> dict[str, Tensor]:
    """The network's own maps over positions, by stage: (B, h, w) each; empty if it has none."""
    if not attention_kinds(model):
        return {}
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad(), evaluating(model), record(model) as maps:
        model(x)
    for i in range(len(x)):
        for m in attention_stages(maps, i, reduce=reduce):
            if m.kind != "channel":
                found.setdefault(m.name, []).append(torch.from_numpy(m.values))
    return {name: torch.stack(each) for name, each in found.items()}


def maps_to_score(model: nn.Module, x: Tensor, ask: Request, target: Tensor) -> dict[str, Tensor]:
    """The network's own maps, and Grad-CAM's for the classes `target` (B,), as asked for."""
    found = own_maps(model, x, ask.reduce) if "attention" in ask.methods else {}
    if "gradcam" in ask.methods:
        found["Grad-CAM"] = gradcam(model, x, target, layer=ask.layer).cpu()
    return found


def explained(classifier: Classifier, x: Tensor, ask: Request) -> Tensor:
    """The classes that are explained, (B,): the one asked for, or those predicted."""
    if ask.target is not None:
        return torch.full((len(x),), classifier.class_names.index(ask.target))
    with torch.no_grad(), evaluating(classifier.model):
        return torch.cat([classifier.model(part).argmax(dim=1) for part in x.split(16)])


def judge(
    classifier: Classifier, x: Tensor, ask: Request
) -> tuple[dict[str, MapScore], list[Sanity]]:
    """Deletion and insertion, and the sanity check, of a network's maps on images (B, C, H, W)."""
    model = classifier.model

    def predict(images: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(model):
            return model(images).float().softmax(dim=1)

    target = explained(classifier, x, ask)

    def maps_of(network: nn.Module) -> dict[str, Tensor]:  # of random weights too: the same classes
        pairs = zip(x.split(16), target.split(16), strict=True)
        parts = [maps_to_score(network, part, ask, t) for part, t in pairs]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    with torch.no_grad():
        left = float(predict(baseline_of(x, ask.baseline)).gather(1, target[:, None]).mean())
    if left > 0.5:
        ask.complain(
            f"--baseline {ask.baseline}: images without detail still have their class at "
            f"{left:.0%}, so deletion and insertion say little here; try the other baseline"
        )
    scores = score(
        predict, x, maps_of(model), target=target, baseline=ask.baseline, seed=ask.seed,
        steps=ask.steps, repeats=ask.repeats,
    )  # fmt: skip
    return scores, sanity(model, maps_of, seed=ask.seed)


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
    write_whole(ask.out / "scores.json", lambda beside: beside.write_text(text, "utf-8"))
    ask.echo(f"{ask.out / 'scores.json'}: the numbers")


def _numbers(s: MapScore) -> dict[str, Any]:
    parts = ("deletion", "insertion", "gain", "over_random", "over_centre")
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

    write_whole(ask.out / "scores.csv", write)


def _write_curves(scores: dict[str, MapScore], kept: list[Seen], ask: Request) -> None:
    """curves.npz, (2, images, steps + 1) by map, and curves.png, their means."""
    arrays: dict[str, Any] = {name: s.curves for name, s in scores.items()}

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez_compressed(file, paths=np.array([str(s.path) for s in kept]), **arrays)

    write_whole(ask.out / "curves.npz", write)
    fig = curves_figure(scores)
    write_whole(ask.out / "curves.png", lambda beside: fig.savefig(beside, format="png", dpi=200))


def _tell(scores: dict[str, MapScore], checks: list[Sanity], ask: Request) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("map", "deletion", "insertion", "gain", "gain over random", "over the middle"):
        table.add_column(heading, justify="left" if heading == "map" else "right")
    for name, s in scores.items():
        cells = [s.deletion, s.insertion, s.gain, s.over_random, s.over_centre]
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
