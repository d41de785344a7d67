"""Loads a run's folder and classifies images with it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from timm.models import load_model_config_from_path
from torch import Tensor, nn

from regard.models import create_model


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, the likeliest first, with their probabilities."""

    path: str
    classes: list[tuple[str, float]]


class Classifier:
    """A trained network with its classes' names and its preprocessing, read from its folder.

    Raises:
        ValueError: the folder holds no network.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no trained network (no config.json)")
        try:
            self.model: nn.Module = create_model(f"local-dir:{folder}", pretrained=True).eval()
            config, _, _ = load_model_config_from_path(folder)
        except (RuntimeError, FileNotFoundError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder}: its network can't be loaded ({error})") from error
        names = config.get("label_names")
        count = self.model.num_classes
        self.class_names = list(names) if names else [str(i) for i in range(count)]
        data_config = resolve_data_config(model=self.model)
        self.mode = "L" if data_config["input_size"][0] == 1 else "RGB"
        self.transform = create_transform(**data_config)

    def read(self, path: str | Path) -> Tensor:
        """One image as the network takes it, (C, H, W).

        Raises:
            ValueError: the file is missing or is no image that can be read.
        """
        try:
            with Image.open(path) as image:
                return self.transform(ImageOps.exif_transpose(image).convert(self.mode))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file") from error
        except UnidentifiedImageError as error:
            raise ValueError(f"{path}: is no image that can be read") from error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: can't be read as an image ({error})") from error

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.model(images).softmax(dim=1)

    def predict(self, path: str | Path, top: int = 5) -> Prediction:
        """The likeliest classes of the image in one file.

        Raises:
            ValueError: the file can't be read.
        """
        best = self.probabilities(self.read(path)[None])[0].topk(min(top, len(self.class_names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Prediction(str(path), [(self.class_names[i], p) for i, p in pairs])


def print_predictions(
    folder: Path,
    paths: Sequence[Path],
    *,
    top: int,
    as_json: bool,
    complain: Callable[[str], None],
) -> int:
    """Prints a line for each image; returns how many could not be read.

    Raises:
        ValueError: the folder holds no network.
    """
    classifier = Classifier(folder)
    failed = 0
    for path in paths:
        try:
            prediction = classifier.predict(path, top)
        except ValueError as error:
            complain(str(error))
            failed += 1
            continue
        if as_json:
            classes = [{"class": name, "probability": p} for name, p in prediction.classes]
            print(json.dumps({"path": prediction.path, "classes": classes}))
        else:
            told = "  ".join(f"{name} {p:.1%}" for name, p in prediction.classes)
            print(f"{prediction.path}: {told}")
    return failed
