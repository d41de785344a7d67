"""What a network attends to on each image: its own maps by stage, and Grad-CAM beside them.

>>> found = explain(model, x, images, classes=names)
>>> found[0].figure().savefig("cat.pdf")
>>> found[0].save_npz("cat.npz")
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from regard.attention import AttentionMap, AttentionMaps, attention_kinds, record
from regard.explain.gradcam import check_targets, default_layer, evaluating, gradcam
from regard.explain.overlay import Box, Picture, overlay

Reduce = Literal["mean", "max"] | int
METHODS = ("attention", "gradcam")


@dataclass(frozen=True, eq=False)
class StageMap:
    """One map of one image.

    Attributes:
        name: the submodule, as "layer1.1.mask", or the stage whose blocks were averaged.
        kind: "spatial", "mixed", "gradcam", each (h, w); or "channel", (C,).
        values: float32.
        reduction: in words, how values became one map, as "mean of 256 channels"; or "".
        stage: the part of the network that it belongs to, as "layer1" or "gate3".
    """

    name: str
    kind: str
    values: NDArray[np.float32]
    reduction: str
    stage: str


def stage_of(name: str) -> str:
    """The stage of a submodule: what stands before its block's number, or its parent.

    >>> stage_of("layer1.0.se.spatial"), stage_of("blocks.3.0.se"), stage_of("gate3.map")
    ('layer1', 'blocks.3', 'gate3')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal() and i > 0]
    return ".".join(parts[: numbers[-1]] if numbers else parts[:-1]) or name


def _reduced(found: AttentionMap, index: int, reduce: Reduce) -> StageMap:
    """One module's map of image `index`, over its channels as `reduce` says."""
    values = found.values[index].float()  # (C, H, W), (C, 1, 1) or (1, H, W)
    count, words = len(values), ""
    if found.kind == "channel":
        values = values.flatten()
    elif count == 1:
        values = values[0]
    elif reduce == "mean":
        values, words = values.mean(dim=0), f"mean of {count} channels"
    elif reduce == "max":
        values, words = values.amax(dim=0), f"max of {count} channels"
    elif isinstance(reduce, int) and 0 <= reduce < count:
        values, words = values[reduce], f"channel {reduce} of {count}"
    elif isinstance(reduce, int):
        raise ValueError(f"reduce={reduce}: {found.name} has channels 0 to {count - 1}")
    else:
        raise ValueError(f"reduce={reduce!r}: choose mean, max or a channel's number")
    array = values.cpu().numpy().copy()
    return StageMap(found.name, found.kind, array, words, stage_of(found.name))


def attention_stages(
    maps: AttentionMaps, index: int, *, reduce: Reduce = "mean", gather: bool = True
) -> list[StageMap]:
    """The recorded maps of one image of the batch, in the network's order.

    Args:
        maps: of `regard.record`.
        index: of the image in the batch.
        reduce: how the channels of a "mixed" mask become one map: "mean", "max" or the number
            of one channel.
        gather: the blocks of one stage that have a map of the same kind and size, as CBAM's,
            are averaged to one. "mixed" masks stay one a module.

    Raises:
        ValueError: another reduction, or a channel that a mask does not have.
    """
    each = [_reduced(found, index, reduce) for found in maps.values()]
    return _gathered(each) if gather else each


def _gathered(each: Iterable[StageMap]) -> list[StageMap]:
    groups: dict[Any, list[StageMap]] = {}
    for m in each:
        alone = m.name if m.kind == "mixed" else ""
        groups.setdefault((m.stage, m.kind, m.values.shape, alone), []).append(m)
    found = []
    for (stage, kind, _, _), members in groups.items():
        if len(members) == 1:
            found += members
            continue
        values = np.mean([m.values for m in members], axis=0)
        found.append(StageMap(stage, kind, values, f"mean of {len(members)} blocks", stage))
    return found


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
            ValueError: there is no such map.
        """
        for m in [*self.spatial(), *(m for m in self.modules if m.kind != "channel")]:
            if m.name == name:
                return overlay(self.image, m.values, box=self.box)
        raise ValueError(f"name={name!r}: maps are {', '.join(m.name for m in self.spatial())}")

    def figure(self, *, width: float = 7.16) -> Figure:
        """The picture for a paper, `width` inches wide (two columns by default)."""
        from regard.explain.figure import explanation_figure

        return explanation_figure(self, width=width)

    def save_figure(self, path: str | Path, *, dpi: int = 200) -> None:
        """Writes the picture; the suffix is the format: .png, .pdf, .svg.

        Raises:
            ValueError: a suffix that is no format.
            OSError: it can't be written.
        """
        path = Path(path)
        fig = self.figure()
        kind = path.suffix.lower().removeprefix(".")
        formats = fig.canvas.get_supported_filetypes()
        if kind not in formats:
            raise ValueError(f"{path}: the suffix must be one of {', '.join(sorted(formats))}")
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
        ValueError: an argument is not among its choices or counts don't agree.
    """
    boxes, paths = _checked(x, images, boxes, paths, methods)
    if isinstance(target, str):
        if target not in classes:
            raise ValueError(f"target={target!r}: choose one of {', '.join(classes)}")
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
            raise ValueError(f"methods: {method!r} is none of {', '.join(METHODS)}")
    if not methods:
        raise ValueError(f"methods: give at least one of {', '.join(METHODS)}")
    if boxes is None:
        boxes = [(0, 0, image.shape[1], image.shape[0]) for image in images]
    if paths is None:
        paths = [f"image {i}" for i in range(len(x))]
    if not len(x) == len(images) == len(boxes) == len(paths):
        raise ValueError(
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
        raise ValueError(f"{len(classes)} classes are named, the network has {logits.shape[1]}")
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
