"""What a network attends to on each image: its own maps by stage, and Grad-CAM beside them.

>>> found = explain(model, x, images, classes=names)
>>> found[0].figure().savefig("cat.pdf")
>>> found[0].save_npz("cat.npz")
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.attention import (
    Reduce,
    StageMap,
    _gathered,
    attention_kinds,
    attention_stages,
    evaluating,
    record,
)
from regard.data.images import read_image
from regard.errors import UsageError
from regard.explanations.gradcam import check_targets, default_layer, gradcam
from regard.explanations.overlay import Box, Picture, overlay
from regard.predict import Classifier

METHODS = ("attention", "gradcam")


@dataclass(eq=False, kw_only=True)
class Explanation:
    """One image, what the network said, and where it looked.

    Attributes:
        path: of the image, or a name for it.
        image: (H, W, 3) or (H, W), uint8, the original.
        box: left, top, right, bottom of what the network saw, in the original's pixels.
        classes: all names with probabilities, the likeliest first.
        target: the class that Grad-CAM explains, with its probability.
        maps: to show, gathered by stage.
        modules: the same, one a module; "channel" ones hold a weight for each channel.
        raw: masks with all their channels, (C, h, w), by module, if they were kept.
    """

    path: str
    image: Picture
    box: Box
    classes: list[tuple[str, float]]
    target: tuple[str, float]
    maps: list[StageMap]
    modules: list[StageMap] = field(default_factory=list)
    raw: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def spatial(self) -> list[StageMap]:
        """The maps over positions: attention by stage, then Grad-CAM."""
        return [m for m in self.maps if m.kind != "channel"]

    def overlay(self, name: str) -> Picture:
        """The map of this name over the image, in the image's own size: (H, W, 3), uint8.

        Raises:
            UsageError: there is no such map.
        """
        for m in [*self.spatial(), *(m for m in self.modules if m.kind != "channel")]:
            if m.name == name:
                return overlay(self.image, m.values, box=self.box)
        raise UsageError(f"name={name!r}: maps are {', '.join(m.name for m in self.spatial())}")

    def figure(self, *, width: float = 7.16) -> Figure:
        """The picture for a paper, `width` inches wide (two columns by default)."""
        from regard.explanations.figure import explanation_figure

        return explanation_figure(self, width=width)

    def save_figure(self, path: str | Path, *, dpi: int = 200) -> None:
        """Writes the picture; the suffix is the format: .png, .pdf, .svg.

        Raises:
            UsageError: a suffix that is no format.
            OSError: it can't be written.
        """
        path = Path(path)
        fig = self.figure()
        kind = path.suffix.lower().removeprefix(".")
        formats = fig.canvas.get_supported_filetypes()
        if kind not in formats:
            raise UsageError(f"{path}: the suffix must be one of {', '.join(sorted(formats))}")
        beside = path.with_name(f".{path.name}.part")
        try:
            fig.savefig(beside, format=kind, dpi=dpi)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def save_npz(self, path: str | Path) -> None:
        """Writes the numbers: "KIND/MODULE" for each module's map, "raw/MODULE", "gradcam".

        Also "box", and "about", a JSON text with path, classes, target, and how each map
        was reduced.

        Raises:
            OSError: it can't be written.
        """
        arrays: dict[str, Any] = {f"{m.kind}/{m.name}": m.values for m in self.modules}
        for m in self.maps:
            if m.kind == "gradcam":
                arrays["gradcam"] = m.values
        arrays |= {f"raw/{name}": values for name, values in self.raw.items()}
        about = {
            "path": self.path,
            "classes": self.classes,
            "target": self.target,
            "reduction": {m.name: m.reduction for m in [*self.modules, *self.maps]},
        }
        arrays |= {"box": np.array(self.box), "about": np.array(json.dumps(about))}
        path = Path(path)
        beside = path.with_name(f".{path.name}.part")
        try:
            with open(beside, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def _repr_png_(self) -> bytes:
        """Shows the picture in a notebook."""
        import io

        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


def explain(
    model: nn.Module,
    x: Tensor,
    images: Sequence[Picture],
    boxes: Sequence[Box] | None = None,
    *,
    classes: Sequence[str],
    target: int | str | Sequence[int] | Tensor | None = None,
    methods: Sequence[str] = METHODS,
    reduce: Reduce = "mean",
    layer: str | None = None,
    paths: Sequence[str] | None = None,
    keep_channels: bool = False,
    batch_size: int = 16,
) -> list[Explanation]:
    """Predicts images and finds where the network looked; for notebooks and the command line.

    Args:
        model: any classifier; its own attention is shown if it has any.
        x: (B, C, H, W), the images as the network takes them, on its device.
        images: B originals, uint8, (H, W) or (H, W, 3), of any sizes.
        boxes: what part of each original the network saw; all of it by default.
        classes: the classes' names.
        target: the class to explain, by number or name, or one number for each image; what
            the network predicts by default.
        methods: of "attention" and "gradcam".
        reduce: a mask's channels to one map: "mean", "max" or a channel's number.
        layer: of Grad-CAM, a submodule's name.
        paths: the images' names.
        keep_channels: keep every channel of the masks too, in `Explanation.raw`.
        batch_size: images at once.

    Returns:
        One explanation for each image.

    Raises:
        UsageError: an argument is not among its choices or counts don't agree.
    """
    boxes, paths = _checked(x, images, boxes, paths, methods)
    if isinstance(target, str):
        if target not in classes:
            raise UsageError(f"target={target!r}: choose one of {', '.join(classes)}")
        target = list(classes).index(target)
    found: list[Explanation] = []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        each = target if target is None or isinstance(target, int) else target[part]
        for i, (said, maps, modules, raw) in enumerate(
            _explain_batch(model, x[part], classes, each, methods, reduce, layer, keep_channels),
            start,
        ):
            found.append(
                Explanation(
                    path=paths[i], image=np.asarray(images[i]), box=boxes[i], classes=said[0],
                    target=said[1], maps=maps, modules=modules, raw=raw,
                )
            )  # fmt: skip
    return found


def _checked(
    x: Tensor,
    images: Sequence[Picture],
    boxes: Sequence[Box] | None,
    paths: Sequence[str] | None,
    methods: Sequence[str],
) -> tuple[Sequence[Box], Sequence[str]]:
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"methods: {method!r} is none of {', '.join(METHODS)}")
    if not methods:
        raise UsageError(f"methods: give at least one of {', '.join(METHODS)}")
    if boxes is None:
        boxes = [(0, 0, image.shape[1], image.shape[0]) for image in images]
    if paths is None:
        paths = [f"image {i}" for i in range(len(x))]
    if not len(x) == len(images) == len(boxes) == len(paths):
        raise UsageError(
            f"{len(x)} images in x, but {len(images)} originals, {len(boxes)} boxes and "
            f"{len(paths)} paths"
        )
    return boxes, paths


def _explain_batch(
    model: nn.Module,
    x: Tensor,
    classes: Sequence[str],
    target: Any,
    methods: Sequence[str],
    reduce: Reduce,
    layer: str | None,
    keep_channels: bool,
) -> list[Any]:
    """For each image: (classes, target), maps, modules, raw."""
    maps: Any = {}
    own = "attention" in methods and (attention_kinds(model) or len(methods) == 1)
    with torch.no_grad(), evaluating(model):
        if own:
            with record(model) as maps:
                logits = model(x)
        else:
            logits = model(x)
    if logits.shape[1] != len(classes):
        raise UsageError(f"{len(classes)} classes are named, the network has {logits.shape[1]}")
    targets = check_targets(logits.argmax(dim=1) if target is None else target, logits)
    cams = name = None
    if "gradcam" in methods:
        name = layer or default_layer(model, x)
        cams = gradcam(model, x, targets, layer=name).float().cpu().numpy()
    probabilities = logits.float().softmax(dim=1).cpu()
    found = []
    for i, p in enumerate(probabilities):
        order = p.argsort(descending=True, stable=True).tolist()
        t = int(targets[i])
        said = [(classes[k], float(p[k])) for k in order], (classes[t], float(p[t]))
        each = attention_stages(maps, i, reduce=reduce, gather=False) if own else []
        shown = _gathered(each)
        if cams is not None:
            shown.append(StageMap("Grad-CAM", "gradcam", cams[i], f"at {name}", str(name)))
        mixed = [m for m in maps.values() if keep_channels and m.kind == "mixed"]
        raw = {m.name: m.values[i].float().cpu().numpy() for m in mixed}
        found.append((said, shown, each, raw))
    return found


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
    pixels = read_image(path, value_range=preprocess.value_range)
    x = preprocess.normalize(classifier.decode(path)[None])[0]  # as `regard predict` sees it
    return Seen(path, as_picture(pixels), x, preprocess.seen(*pixels.shape[:2]))
