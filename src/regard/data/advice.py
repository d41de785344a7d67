"""What the numbers of a data set suggest: input size, resizing, class weights, warnings."""

import os
import re
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.data.sources import ImageTable
from regard.files import plural, shortened

_PREFIX = re.compile(r"([A-Za-z]*[ _-]?\d+)[ _.(-]+[^.]*\w.*\.\w+$")  # P0012_1.png, case 7-b.jpg


def summary(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    """height and width: {min, median, max}; common: the 5 most frequent [height, width, images]."""
    if not sizes:
        return {"height": None, "width": None, "common": []}
    axes: dict[str, Any] = {}
    for axis, name in enumerate(("height", "width")):
        values = np.array([size[axis] for size in sizes])
        median = _median(values, np.array(list(sizes.values())))
        axes[name] = {"min": int(values.min()), "median": median, "max": int(values.max())}
    axes["common"] = [[h, w, n] for (h, w), n in sizes.most_common(5)]
    return axes


def _median(values: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
    """The lower median of values, each of which occurs `counts` times."""
    order = np.argsort(values)
    below = np.cumsum(counts[order])
    return int(values[order][np.searchsorted(below, (below[-1] + 1) // 2)])


def group_sizes(table: ImageTable) -> dict[str, Any] | None:
    """number, smallest, median and largest group, and the groups that are in several splits."""
    if table.groups is None:
        return None
    names, group, counts = np.unique(table.groups, return_inverse=True, return_counts=True)
    _, split = np.unique(table.splits, return_inverse=True)
    first = np.zeros(len(names), np.int64)
    first[group] = split
    divided = np.unique(group[first[group] != split])
    return {
        "number": len(names),
        "smallest": int(counts.min()),
        "median": int(np.median(counts)),
        "largest": int(counts.max()),
        "divided": names[divided].tolist(),
    }


def group_risk(table: ImageTable) -> str | None:
    """The risk where images seem to come from patients but the table has no groups, or None.

    They seem to if the files are DICOM, or if many file names begin with the same numbered prefix,
    as P0012_1.png and P0012_2.png do.
    """
    if table.groups is not None or table.files is None:
        return None
    names = [os.path.basename(path) for path in table.files]
    dicom = sum(name.lower().endswith((".dcm", ".dicom")) for name in names)
    if 2 * dicom > len(names):
        sign = "DICOM files: several may be of one patient"
    else:
        shared = _shared_prefix(names, table.labels)
        if shared is None:
            return None
        sign = f"file names that begin alike, such as {shared}: several may be of one patient"
    return (
        f"{sign}; with the same patient in training and test, scores would be too good: list the "
        "images in a CSV file with a column group"
    )


def _shared_prefix(names: list[str], labels: NDArray[np.int64]) -> str | None:
    """Two names that share a patient's prefix, if most images share theirs with a few others."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if match := _PREFIX.match(name):
            groups.setdefault(match[1].lower(), []).append(i)
    shared = [rows for rows in groups.values() if 2 <= len(rows) <= 200]
    classes = len(np.unique(labels))
    # one prefix per class, such as ImageNet's n02102040_782, is a class, not a patient
    if sum(map(len, shared)) * 2 < len(names) or len(shared) < max(5, 2 * classes):
        return None
    return f"{names[shared[0][0]]} and {names[shared[0][1]]}"


def warn_of_counts(counts: dict[str, dict[str, int]], groups: dict[str, Any] | None) -> list[str]:
    """Warnings about the numbers of images, classes and groups, one per line."""
    lines = []
    if groups and groups["divided"]:
        lines.append(f"{plural(len(groups['divided']), 'group')} in more than one split")
    for split, classes in counts.items():
        empty = [c for c, n in classes.items() if n == 0]
        if empty:
            lines.append(f"{split or 'the data'} has no images of {shortened(empty)}")
    train = _train_counts(counts)
    few = [c for c, n in train.items() if 0 < n < 20]
    if few:
        classes_ = "class" if len(few) == 1 else "classes"
        lines.append(f"{len(few)} {classes_} with fewer than 20 training images")
    some = [n for n in train.values() if n]
    if some and max(some) >= 10 * min(some):
        lines.append(
            f"unbalanced: {min(some)} to {max(some)} images per class; see the class weights"
        )
    return lines


def _train_counts(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    return counts.get("train") or counts.get("") or {}


def class_weights(counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """Images / (classes * images of the class), as scikit-learn's "balanced"."""
    train = {c: n for c, n in _train_counts(counts).items() if n}
    return {c: sum(train.values()) / (len(train) * n) for c, n in train.items()}


def input_size(sizes: Counter[tuple[int, int]]) -> int | None:
    """The input's side: small images keep their size, others get a multiple of 32 up to 224."""
    if not sizes:
        return None
    shorter = np.array([min(size) for size in sizes])
    side = _median(shorter, np.array(list(sizes.values())))
    return side if side <= 64 else min(224, round(side / 32) * 32)


def resize_mode(sizes: Counter[tuple[int, int]]) -> str:
    """How to make all images square."""
    if all(h == w == input_size(sizes) for h, w in sizes):
        return "none"
    long = sum(n for (h, w), n in sizes.items() if max(h, w) > 2 * min(h, w))
    return "pad" if 20 * long > sizes.total() else "crop"  # a crop would lose over half of these
