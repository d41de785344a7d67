"""The weights that come with Regard: a folder each, in timm's `local-dir` layout, with its card.

Each folder holds config.json and model.safetensors (matrices in half precision), README.md (the
model card), evaluation.json, what the run was (run.json, recipe.toml, metrics.csv), images.npz:
the content hashes of the images that trained it, so that none of them is taken for a test, and
familiarity.safetensors, by which images unlike those are named. index.json lists the folders with
their checksums. All of it is written by scripts/ship_weights.py.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.errors import CheckpointError

FOLDER = Path(__file__).parent
INDEX = "index.json"
LARGEST = 12_000_000  # bytes of all folders together


@dataclass(frozen=True)
class Weights:
    """Weights that come with Regard.

    Attributes:
        name: architecture.tag, as timm names them.
        folder: where they are.
        sha256: checksum of each file that must be as it was written, by name.
        size: bytes of model.safetensors.
        data: the images that they were trained on, in words.
        images, accuracy, low, high: images tested, top-1 accuracy and its 95 % interval.
        answer: probabilities for `scripts/ship_weights.py`'s test image.
        start: whether trainings on other images may start from them unasked.
    """

    name: str
    folder: Path
    sha256: dict[str, str]
    size: int
    data: str
    images: int
    accuracy: float
    low: float
    high: float
    answer: tuple[float, ...]
    start: bool = False

    @property
    def architecture(self) -> str:
        """The network's name for create_model()."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """What tells these weights from others of the same network."""
        return self.name.partition(".")[2]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        content: dict[str, Any] = json.loads(
            (self.folder / "config.json").read_text(encoding="utf-8")
        )
        return content

    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's configuration of these weights, which says where they are."""
        cfg = dict(self.config["pretrained_cfg"])
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}
        return {
            **cfg, "file": str(self.folder / "model.safetensors"), "tag": self.tag,
            "architecture": self.architecture, "num_classes": self.config["num_classes"],
        }  # fmt: skip

    def verify(self) -> None:
        """Compares the files with their checksums.

        Raises:
            CheckpointError: one is missing or is not what was shipped.
        """
        for name, expected in self.sha256.items():
            path = self.folder / name
            if sha256_of(path) != expected:
                raise CheckpointError(
                    f"{path} is not the file that came with Regard (its checksum differs): "
                    "install Regard again"
                )


def sha256_of(path: Path) -> str:
    """The checksum of a file; empty where it can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def shipped() -> dict[str, Weights]:
    """All weights that come with Regard, by name."""
    try:
        index = json.loads((FOLDER / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {
        name: Weights(name=name, folder=FOLDER / name, **{**row, "answer": tuple(row["answer"])})
        for name, row in index.items()
    }


def find_shipped(name: str) -> Weights | None:
    """The weights of a name: architecture.tag, or the first of an architecture; None: none."""
    found = shipped()
    return found.get(name) or next((w for w in found.values() if w.architecture == name), None)
