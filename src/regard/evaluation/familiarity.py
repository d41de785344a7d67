"""How far an image's features are from those of the images that trained a network.

The features are the input of the network's last layer, and simple statistics of the pixels
(`regard.features.appearance`), which detect blank images and noise that the network may not. For
each kind, the distance is the Mahalanobis distance to the nearest class mean, with one covariance
for all classes (Lee et al., NeurIPS 2018, arXiv 1807.03888), shrunk by Ledoit and Wolf's method.
The larger of the two counts, each relative to those of validation images.
benchmarks/familiarity.csv compares it with the energy (Liu et al., NeurIPS 2020) and the top-1
probability.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from regard.errors import UsageError
from regard.evaluation.predictions import units
from regard.files import plural, reason, write_atomically

FILE = "familiarity.safetensors"
FALSE_ALARMS = 0.01
LEAST = 20  # fewest validation images

Features = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of features: (K, D) class means, (D, D) whitening, and the scale of distances.

    The distance is the norm of a difference of features times the whitening matrix.
    """

    means: Features
    whitening: Features
    scale: float

    def distances(self, features: Features) -> NDArray[np.float64]:
        """(N, D) features -> (N,) distances, about 1 for the farthest validation images."""
        return _distances(features, self.means, self.whitening) / self.scale


@dataclass(frozen=True, eq=False)
class Familiarity:
    """A description of the training images, and the distance beyond which an image is unlike them.

    Attributes:
        kinds: of features, in the order of `Classifier.features`.
        threshold: an image at a larger distance is unlike the training images.
        false_alarms: the expected share of images like the validation images beyond it.
        images: numbers of training and validation images that were used.
        network: content hash of the weights.
        groups: number of groups (patients) of the validation images; false_alarms is the most that
            is expected of images of a new group. None: the images are independent.
    """

    kinds: tuple[Kind, ...]
    threshold: float
    false_alarms: float
    images: tuple[int, int]
    network: str = ""
    groups: int | None = None

    def distances(self, features: Sequence[Features]) -> NDArray[np.float64]:
        """(N, D) features of each kind -> (N,) distances."""
        pairs = zip(self.kinds, features, strict=True)
        return np.max([kind.distances(each) for kind, each in pairs], axis=0)

    def sentence(self) -> str:
        """The meaning of the flag, in one line."""
        groups = "" if self.groups is None else f" of {plural(self.groups, 'group')}"
        most = "" if self.groups is None else "at most "
        return (
            f"unlike_training: distance above {self.threshold:.4g}, false alarm rate "
            f"{most}{self.false_alarms:.2g} by {self.images[1]:,} validation images{groups}"
        )


def fit_familiarity(
    training: Sequence[Features],
    labels: NDArray[np.int64],
    validation: Sequence[Features],
    *,
    network: str = "",
    groups: Sequence[str] | NDArray[np.str_] | None = None,
) -> Familiarity:
    """Computes class means and covariances, and sets the threshold from the validation images.

    Args:
        training: (N, D) features of training images, for each kind.
        labels: (N,) their classes.
        validation: (M, D) features of images not used in training, for each kind.
        network: content hash of the weights.
        groups: (M,) of the validation images, if these are not independent.

    Raises:
        UsageError: fewer than LEAST images, or features that are not finite.
    """
    counts = len(training[0]), len(validation[0])
    if min(counts) < LEAST:
        raise UsageError(f"{plural(min(counts), 'image')}: at least {LEAST} are needed")
    if not all(np.isfinite(each).all() for each in (*training, *validation)):
        raise UsageError("the features are not finite")
    pairs = zip(training, validation, strict=True)
    kinds = tuple(_kind(each, labels, others) for each, others in pairs)
    both = zip(kinds, validation, strict=True)
    distances = np.max([kind.distances(each) for kind, each in both], axis=0)
    unit, n_units = units(groups, len(distances))
    threshold, false_alarms = _quantile(distances, unit)
    n_groups = None if groups is None else n_units
    return Familiarity(kinds, threshold, false_alarms, counts, network, n_groups)


def _kind(training: Features, labels: NDArray[np.int64], validation: Features) -> Kind:
    from sklearn.covariance import ledoit_wolf

    classes, index = np.unique(labels, return_inverse=True)
    values = training.astype(np.float64)
    means = np.stack([values[index == k].mean(axis=0) for k in range(len(classes))])
    covariance, _ = ledoit_wolf(values - means[index], assume_centered=True)
    lengths, vectors = np.linalg.eigh(covariance)
    lengths = np.maximum(lengths, max(lengths.max(), 1e-12) * 1e-6)  # constant features
    whitening = (vectors / np.sqrt(lengths)).astype(np.float32)
    means = means.astype(np.float32)
    distances = _distances(validation, means, whitening)
    scale, _ = _quantile(distances, np.arange(len(distances)))
    return Kind(means, whitening, max(scale, 1e-6))


def _quantile(distances: NDArray[np.float64], unit: NDArray[np.int64]) -> tuple[float, float]:
    """The distance that few validation images exceed, and the expected share of others that do.

    Among M + 1 exchangeable images, one is expected to exceed the largest of the other M. With
    images in groups, the groups are exchangeable, and each counts as much as another: the share
    is the most that is expected of a new group's images, which is reached if images of a group
    are all alike (Lee, Barber & Willett 2023, arXiv 2306.06342).
    """
    order = np.argsort(distances, kind="stable")
    sizes = np.bincount(unit)
    below = np.cumsum(1 / sizes[unit[order]])  # in groups, up to and with each image
    wanted = (len(sizes) + 1) * (1 - FALSE_ALARMS) - 1e-9
    place = min(int(np.searchsorted(below, wanted)), len(distances) - 1)
    return float(distances[order[place]]), 1 - float(below[place]) / (len(sizes) + 1)


def _distances(features: Features, means: Features, whitening: Features) -> NDArray[np.float64]:
    white, centers = features @ whitening, means @ whitening  # (N, D) and (K, D)
    nearest = np.full(len(white), np.inf)
    for center in centers:
        nearest = np.minimum(nearest, np.square(white - center, dtype=np.float64).sum(axis=1))
    return np.sqrt(nearest / white.shape[1])


def write_familiarity(folder: str | Path, familiarity: Familiarity) -> None:
    """Stores a familiarity in a run's folder, atomically.

    Raises:
        StateError: it can't be written.
    """
    f = familiarity
    tensors = {f"means.{i}": kind.means for i, kind in enumerate(f.kinds)}
    tensors |= {
        f"whitening.{i}": np.ascontiguousarray(kind.whitening) for i, kind in enumerate(f.kinds)
    }
    facts = {
        "scales": [kind.scale for kind in f.kinds],
        "threshold": f.threshold, "false_alarms": f.false_alarms, "images": list(f.images),
        "network": f.network, "groups": f.groups,
    }  # fmt: skip
    content = {"regard": json.dumps(facts)}
    write_atomically(Path(folder) / FILE, lambda beside: save_file(tensors, beside, content))


def read_familiarity(folder: str | Path) -> Familiarity | None:
    """The familiarity stored in a run's folder, or None.

    Raises:
        UsageError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {})["regard"])
            kinds = tuple(
                Kind(file.get_tensor(f"means.{i}"), file.get_tensor(f"whitening.{i}"), float(scale))
                for i, scale in enumerate(facts["scales"])
            )
        return Familiarity(
            kinds, float(facts["threshold"]), float(facts["false_alarms"]),
            (int(facts["images"][0]), int(facts["images"][1])), str(facts["network"]),
            facts.get("groups"),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise UsageError(
            f"{path} can't be read ({reason(error)}): calibrate the run again, or remove the file"
        ) from error
