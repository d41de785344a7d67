"""One image's results as a file: its maps, prediction, scores, and the settings they used.

A later call with the same network, image and settings reads the file instead of computing.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regard.attention import StageMap, group_by_stage, stage_of
from regard.explanations.explanation import GRADCAM, Explanation, save_arrays
from regard.explanations.faithfulness import ImageScore
from regard.files import NPZ_FAULTS
from regard.predict import Classifier


@dataclass(frozen=True)
class Record:
    """The results for one image.

    Attributes:
        explanation: its image may be a placeholder of the right size, see `read_record`.
        score: None if the maps were not scored.
        marked: what the figure outlines: corners of boxes, or the masks' file ids.
    """

    explanation: Explanation
    score: ImageScore | None
    marked: Sequence[Any] = ()


def network_id(classifier: Classifier) -> str:
    """A short hash of the weights, the classes, the preprocessing and the temperature."""
    digest = hashlib.blake2b(digest_size=12)
    for name, values in classifier.model.state_dict().items():
        digest.update(name.encode())
        digest.update(values.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    others = (classifier.class_names, classifier.preprocess, classifier.temperature)
    digest.update(repr(others).encode(errors="replace"))
    return digest.hexdigest()


def file_id(path: Path) -> str:
    """A short hash of a file's content.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=12)).hexdigest()


def write_record(
    path: Path, record: Record, settings: dict[str, Any], score_settings: dict[str, Any] | None
) -> None:
    """Writes the file atomically.

    Raises:
        FileError: it can't be written.
    """
    shown, score = record.explanation, record.score
    about: dict[str, Any] = {
        "settings": settings,
        "size": list(shown.image.shape[:2]),
        "score_settings": score_settings if score is not None else None,
        "marked": list(record.marked),
    }
    arrays: dict[str, Any] = {}
    if score is not None:
        about |= {"similarity": score.similarity, "without_detail": score.without_detail}
        arrays |= {f"curves/{name}": pair for name, pair in score.curves.items()}
    shown.save_npz(path, about=about, arrays=arrays)


def read_record(
    path: Path, settings: dict[str, Any], score_settings: dict[str, Any] | None
) -> Record | None:
    """The record of an earlier call; None if there is none with these settings.

    The image is a blank one of the original's size.
    """
    try:
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            if about["settings"] != settings:
                return None
            if score_settings is not None and about["score_settings"] != score_settings:
                return None
            arrays = {name: file[name] for name in file.files}
    except NPZ_FAULTS:
        return None
    shown = _explanation(about, arrays)
    score = None if score_settings is None else _score(about, arrays, shown)
    return Record(shown, score, about.get("marked", []))


def write_marked(path: Path, marked: Sequence[Any]) -> None:
    """Changes what a record's figure outlines, and leaves its numbers as they are.

    Raises:
        FileError: it can't be written.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(str(arrays["about"])) | {"marked": list(marked)}
    save_arrays(path, arrays | {"about": np.array(json.dumps(about))})


def _explanation(about: dict[str, Any], arrays: dict[str, Any]) -> Explanation:
    modules, raw = [], {}
    for key, values in arrays.items():
        kind, _, name = key.partition("/")
        if kind in ("spatial", "mixed", "channel"):
            modules.append(StageMap(name, kind, values, about["reduction"][name], stage_of(name)))
        elif kind == "raw":
            raw[name] = values
    maps = group_by_stage(modules)
    if "gradcam" in arrays:
        where = about["reduction"][GRADCAM]
        stage = where.removeprefix("at ")
        maps.append(StageMap(GRADCAM, "gradcam", arrays["gradcam"], where, stage))
    return Explanation(
        path=about["path"], image=np.broadcast_to(np.uint8(255), about["size"]),
        box=tuple(arrays["box"].tolist()), classes=[(c, p) for c, p in about["classes"]],
        target=tuple(about["target"]), maps=maps, modules=modules, raw=raw,
    )  # fmt: skip


def _score(about: dict[str, Any], arrays: dict[str, Any], shown: Explanation) -> ImageScore:
    curves = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith("curves/")}
    maps = {m.name: m.values for m in shown.spatial()}
    gates = {m.name: m.values for m in shown.modules if m.kind == "channel"}
    return ImageScore(curves, maps, about["similarity"], about["without_detail"], gates)
