"""What a network attends to in each image: its own maps by stage, and Grad-CAM.

>>> explanations = regard.explain("runs/demo", ["scan.png"])
>>> explanations[0].save_figure("scan.pdf")
>>> explanations[0].save_npz("scan.npz")
"""

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from regard.attention import (
    AttentionMaps,
    Reduce,
    StageMap,
    attention_kinds,
    check_reduce,
    evaluating,
    group_by_stage,
    module_maps,
    record,
)
from regard.data.images import ImageSource, name_of, rereadable
from regard.errors import ImageError, UsageError
from regard.explanations.averaging import average_explanations
from regard.explanations.figure import contact_sheet, explanation_figure
from regard.explanations.gradcam import check_targets, default_layer, gradcam
from regard.explanations.overlay import Box, Picture, overlay, shrink_mask
from regard.explanations.print_style import SOFTWARE, for_print, save
from regard.explanations.reading import read_to_explain
from regard.files import plural, write_atomically
from regard.predict import Classifier, as_several, load

METHODS = ("attention", "gradcam")
GRADCAM = "Grad-CAM"


@dataclass(eq=False, kw_only=True)
class Explanation:
    """One image, the network's prediction, and where it looked.

    Attributes:
        path: the image's file, or a name for it.
        image: (H, W, 3) or (H, W), uint8, the original.
        box: left, top, right, bottom of what the network saw, in the original's pixels.
        classes: all class names with their probabilities, sorted, top-1 first.
        target: the class that Grad-CAM explains, with its probability.
        maps: the maps to show, grouped by stage; Grad-CAM is the last.
        modules: the ungrouped maps, one per module; "channel" maps hold a weight per channel.
        raw: masks with all their channels, (C, h, w), by module, if requested.
        true: the true class, if known.
        mask: (H, W), what people marked in the image, if there is such a mask.
        members: for an ensemble, each network's own explanation, for the same target.
    """

    path: str
    image: Picture
    box: Box
    classes: list[tuple[str, float]]
    target: tuple[str, float]
    maps: list[StageMap]
    modules: list[StageMap] = field(default_factory=list)
    raw: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    true: str | None = None
    mask: NDArray[np.bool_] | None = None
    members: list["Explanation"] = field(default_factory=list)

    @property
    def predicted(self) -> str:
        """The top-1 class."""
        return self.classes[0][0]

    @property
    def probability(self) -> float:
        """The top-1 probability, 0 to 1."""
        return self.classes[0][1]

    def spatial(self) -> list[StageMap]:
        """The maps over positions: attention by stage, then Grad-CAM."""
        return [m for m in self.maps if m.kind != "channel"]

    def overlay(self, name: str) -> Picture:
        """The map with this name over the image, at the image's own size: (H, W, 3), uint8.

        Raises:
            UsageError: there is no such map.
        """
        for m in [*self.spatial(), *(m for m in self.modules if m.kind != "channel")]:
            if m.name == name:
                return overlay(self.image, m.values, box=self.box)
        raise UsageError(
            f"name={name!r}: choose one of {', '.join(m.name for m in self.spatial())}"
        )

    def reduced(self, side: int) -> "Explanation":
        """The same with an image of at most `side` pixels per side, and without module maps."""
        height, width = self.image.shape[:2]
        factor = min(1.0, side / max(height, width))
        image, mask = self.image, self.mask
        if factor < 1:
            size = max(1, round(width * factor)), max(1, round(height * factor))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
            if mask is not None:
                mask = shrink_mask(mask, size[::-1])
        across, down = image.shape[1] / width, image.shape[0] / height
        left, top, right, bottom = self.box
        box = (left * across, top * down, right * across, bottom * down)
        return replace(self, image=image, mask=mask, box=box, modules=[], raw={})

    def figure(self, *, width: float = 7.16) -> Figure:
        """A figure for a paper, `width` inches wide (two columns by default)."""
        return explanation_figure(self, width=width)

    def save_figure(self, path: str | Path, *, dpi: int = 200, width: float = 7.16) -> None:
        """Writes the figure; the suffix gives the format: .pdf, .svg, .png, .tiff.

        Raises:
            UsageError: the suffix is not a format, or `width` is too small.
            FileError: the file can't be written.
        """
        save(self.figure(width=width), Path(path), dpi=dpi)

    def save_npz(
        self,
        path: str | Path,
        *,
        about: dict[str, Any] | None = None,
        arrays: dict[str, Any] | None = None,
    ) -> None:
        """Writes the maps as numbers: "KIND/MODULE" for each module, "raw/MODULE", "gradcam".

        Also "box", and "about", a JSON string with path, classes, target, and how each map was
        reduced.

        Args:
            path: the .npz file.
            about: additional entries of "about".
            arrays: additional arrays.

        Raises:
            FileError: the file can't be written.
        """
        own: dict[str, Any] = {f"{m.kind}/{m.name}": m.values for m in self.modules}
        for m in self.maps:
            if m.kind == "gradcam":
                own["gradcam"] = m.values
        own |= {f"raw/{name}": values for name, values in self.raw.items()}
        content = {
            "software": SOFTWARE,
            "path": self.path,
            "classes": self.classes,
            "target": self.target,
            "reduction": {m.name: m.reduction for m in [*self.modules, *self.maps]},
            **(about or {}),
        }
        own |= {"box": np.array(self.box), "about": np.array(json.dumps(content))}
        save_arrays(Path(path), own | (arrays or {}))

    def _repr_png_(self) -> bytes:
        """Shows the figure in a notebook."""
        buffer = io.BytesIO()
        with for_print():
            self.figure().savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


class Explanations(list[Explanation]):
    """Explanations of several images; a notebook shows them as a contact sheet."""

    def _repr_html_(self) -> str:
        if not self:
            return "<p>No images.</p>"
        buffer = io.BytesIO()
        contact_sheet([e.reduced(360) for e in self[:60]]).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        words = f"Explanations of {plural(len(self), 'image')}"
        return f'<img alt="{words}" src="data:image/png;base64,{data}">'


def save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes an .npz file atomically.

    Raises:
        FileError: the file can't be written.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


# ---- explaining --------------------------------------------------------------------------
def explain(
    network: Classifier | str | Path,
    images: ImageSource | Iterable[ImageSource],
    *,
    target: str | None = None,
    methods: Sequence[str] = METHODS,
    reduce: Reduce = "mean",
    layer: str | None = None,
    keep_channels: bool = False,
) -> Explanations:
    """Predicts images and shows where the network looked.

    Examples:
        >>> regard.explain("runs/demo", "scan.png")[0].figure()

    Args:
        network: a classifier, or the folder of a run or of a timm `local-dir` network. For an
            ensemble, the maps are means over its networks, see `regard.explanations.averaging`.
        images: one image or several: a path, bytes, a file object, a PIL image, an array
            (H, W[, C]) or a tensor ([C, ]H, W).
        target: the class that Grad-CAM explains; default: the predicted class.
        methods: "attention", the network's own maps, "gradcam", or both.
        reduce: how to reduce a mask's channels to one map: "mean", "max" or a channel number.
        layer: the submodule for Grad-CAM; default: see `default_layer`.
        keep_channels: also keep every channel of the masks, in `Explanation.raw`.

    Returns:
        One explanation per image.

    Raises:
        ImageError: an image can't be read, or its prediction is not finite.
        UsageError: there is no such network, or an argument is not among its choices.
    """
    if isinstance(network, nn.Module):
        raise UsageError(
            "explain() takes a Classifier or the folder of a network; for a bare network use "
            "regard.explanations.explanation.explain_batch"
        )
    classifier = network if isinstance(network, Classifier) else load(network)
    options: dict[str, Any] = {
        "methods": methods, "reduce": reduce, "layer": layer, "keep_channels": keep_channels,
    }  # fmt: skip
    explanations = Explanations()
    for number, image in enumerate(as_several(images), start=1):
        name = name_of(image) or f"image {number}"
        if len(classifier.members) == 1 and not classifier.mirrors:
            explanations.append(_explained(classifier, image, name, target, options))
            continue
        again = rereadable(image)
        (said,) = classifier.predict([again], top=len(classifier.class_names))
        wanted = said.classes[0][0] if target is None else target
        each = [_explained(m, again, name, wanted, options) for m in classifier.members]
        explanations.append(average_explanations(each, said.classes))
    return explanations


def _explained(
    classifier: Classifier,
    image: ImageSource,
    name: str,
    target: str | None,
    options: dict[str, Any],
) -> Explanation:
    """The explanation by a single network."""
    x, picture, box = read_to_explain(classifier, image)
    (shown,) = explain_batch(
        classifier.model, x, [picture], [box], classes=classifier.class_names, target=target,
        paths=[name], temperature=classifier.temperature, **options,
    )  # fmt: skip
    return shown


def explain_batch(
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
    temperature: float = 1.0,
) -> Explanations:
    """`explain` for any classifier and inputs that are already preprocessed.

    Args:
        model: any classifier; its own attention is shown if it has any.
        x: (B, C, H, W), preprocessed, on the model's device.
        images: B originals, uint8, (H, W) or (H, W, 3), of any sizes.
        boxes: the part of each original that the network saw; default: all of it.
        classes: the class names, in the order of the outputs.
        target: a class number or name, or one number per image; default: the predicted class.
        methods: "attention", the network's own maps, "gradcam", or both.
        reduce: how to reduce a mask's channels to one map: "mean", "max" or a channel number.
        layer: the submodule for Grad-CAM.
        paths: the images' names.
        keep_channels: also keep every channel of the masks, in `Explanation.raw`.
        batch_size: images per batch.
        temperature: the logits are divided by it for the probabilities.

    Raises:
        UsageError: an argument is not among its choices, or numbers of items don't agree.
        ImageError: the prediction for an image is not finite.
    """
    check_reduce(reduce)
    boxes, paths = _checked(x, images, boxes, paths, methods)
    if isinstance(target, str):
        target = class_number(target, classes)
    explanations = Explanations()
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        each = target if target is None or isinstance(target, int) else target[part]
        of = (methods, reduce, layer, keep_channels, temperature)
        for i, answer in enumerate(_explain_batch(model, x[part], classes, each, *of), start):
            if not all(math.isfinite(p) for _, p in answer["classes"]):
                raise ImageError(f"{paths[i]}: its answer is not finite")
            explanations.append(
                Explanation(path=paths[i], image=np.asarray(images[i]), box=boxes[i], **answer)
            )
    return explanations


def class_number(name: str, classes: Sequence[str]) -> int:
    """The output index of a class.

    Raises:
        UsageError: there is no such class.
    """
    if name not in classes:
        some = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        raise UsageError(f"target={name!r}: choose one of {some}")
    return list(classes).index(name)


def _checked(
    x: Tensor,
    images: Sequence[Picture],
    boxes: Sequence[Box] | None,
    paths: Sequence[str] | None,
    methods: Sequence[str],
) -> tuple[Sequence[Box], Sequence[str]]:
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"methods: {method!r} is not one of {', '.join(METHODS)}")
    if not methods:
        raise UsageError(f"methods: give at least one of {', '.join(METHODS)}")
    if boxes is None:
        boxes = [(0, 0, image.shape[1], image.shape[0]) for image in images]
    if paths is None:
        paths = [f"image {i}" for i in range(len(x))]
    if not len(x) == len(images) == len(boxes) == len(paths):
        raise UsageError(
            f"{plural(len(x), 'image')} in x, but {plural(len(images), 'original')}, "
            f"{plural(len(boxes), 'box')} and {plural(len(paths), 'path')}"
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
    temperature: float,
) -> Iterator[dict[str, Any]]:
    """The attributes of an Explanation for each image, except path, image and box."""
    maps = AttentionMaps({})
    own = "attention" in methods and (attention_kinds(model) or len(methods) == 1)
    with torch.no_grad(), evaluating(model):
        if own:
            with record(model, this_thread=True) as maps:
                logits = model(x)
        else:
            logits = model(x)
    if logits.shape[1] != len(classes):
        raise UsageError(
            f"{plural(len(classes), 'class name')}, but the network has {logits.shape[1]}"
        )
    targets = check_targets(logits.argmax(dim=1) if target is None else target, logits)
    cams, name = None, ""
    if "gradcam" in methods:
        name = layer or default_layer(model, x)
        cams = gradcam(model, x, targets, layer=name).float().cpu().numpy()
    for i, p in enumerate((logits.float() / temperature).softmax(dim=1).cpu()):
        t = int(targets[i])
        modules = module_maps(maps, i, reduce=reduce)
        shown = group_by_stage(modules)
        if cams is not None:
            shown.append(StageMap(GRADCAM, "gradcam", cams[i], f"at {name}", name))
        mixed = [m for m in maps.values() if keep_channels and m.kind == "mixed"]
        order = p.argsort(descending=True, stable=True).tolist()
        yield {
            "classes": [(classes[k], float(p[k])) for k in order],
            "target": (classes[t], float(p[t])),
            "maps": shown,
            "modules": modules,
            "raw": {m.name: m.values[i].float().cpu().numpy() for m in mixed},
        }
