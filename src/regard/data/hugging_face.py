"""Data sets from the Hugging Face hub, and local ones that `datasets` reads, also Parquet files."""

import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regard.data.folders import split_cell, split_word, two_names, unlike_name
from regard.data.manifest import groups_line, may_be_groups
from regard.data.table import ImageTable, all_or_no_groups
from regard.errors import FileError, UsageError
from regard.extras import require
from regard.files import plural, reason, shortened

_IMAGES = ("image", "img")  # preferred column names if there are several
_LABELS = ("label", "labels")
_GROUP, _SPLIT = "group", "split"
PARQUET = ".parquet"
_ADVICE = "load it with `datasets` and give the folder that `save_to_disk` writes"
_WORDS = "ClassLabel, or of strings or integers called label"
_BYTES = ("binary", "large_binary")
_NUMBER = re.compile(r"-?[0-9]+")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,9}")


def open_hugging_face(name: str, source: str, cache: Path) -> ImageTable:
    """A data set of the hub, a local folder or Parquet file; its images are unpacked to the cache.

    For a data set with several configurations, `source` is NAME:CONFIG. Images come from the column
    of type Image (if there are several, the one named image or img), else from one of bytes; labels
    from the column of type ClassLabel (if there are several, the one named label or labels), else
    from strings or whole numbers in a column of that name; groups from one called group; and splits
    from one called split, if the data does not come in several. Images without a label (None, NaN,
    -1 or "") and rows without an image are left out with a warning, as are splits other than train,
    validation and test.

    Raises:
        UsageError: the extra is not installed, or the columns or splits are not usable; an image
            without a group, where others have one.
        FileError: it can't be loaded or unpacked.
    """
    require("hf", name)
    source, configuration = name_and_configuration(source)
    path = os.path.expanduser(source)
    if os.path.isfile(path) and not path.lower().endswith(PARQUET):
        raise UsageError(f"{name}: is a file; give a {PARQUET} file, or the folder that holds it")
    loaded = _load(name, path if os.path.exists(path) else source, configuration)
    rows = _labeled_rows(name, loaded, cache)
    if not rows.files:
        raise UsageError(f"{name}: has no image with a label")
    number = {label: i for i, label in enumerate(rows.classes)}
    location = os.path.abspath(path) if os.path.exists(path) else ""
    inside = bool(location) and rows.files[0].startswith(os.path.join(location, ""))
    lines = [f"{plural(n, 'image')} of {what}" for what, n in rows.left_out.items() if n]
    warnings = [f"left out: {shortened(lines, 6)}"] if lines else []
    warnings += rows.warnings
    groups = all_or_no_groups(name, rows.groups)
    if groups is None:
        told = (groups_line(c, found, len(rows.files)) for c, found in rows.further.items())
        warnings += [line for line in told if line]
    return ImageTable(
        name=name,
        classes=rows.classes,
        labels=np.array([number[label] for label in rows.labels], np.int64),
        splits=np.array(rows.splits, "U5"),
        groups=groups,
        files=rows.files,
        base=location if inside else str(cache / "hf"),
        location=location,
        warnings=tuple(warnings),
    )


def name_and_configuration(source: str) -> tuple[str, str | None]:
    """NAME and CONFIG of NAME:CONFIG, split at the last colon; NAME and None without one."""
    name, colon, configuration = source.rpartition(":")
    drive = len(name) == 1  # of a Windows path
    if not colon or not name or drive or os.path.exists(os.path.expanduser(source)):
        return source, None
    return name, configuration or None


def _load(name: str, source: str, configuration: str | None) -> Mapping[str, Any]:
    """The splits, by name."""
    import datasets

    one = os.path.isfile(os.path.join(source, "state.json"))  # one split, by `save_to_disk`
    several = os.path.isfile(os.path.join(source, "dataset_dict.json"))
    if configuration is not None and (one or several):
        raise UsageError(f"{name}: data of save_to_disk has no configuration {configuration!r}")
    try:
        if one:
            part = datasets.load_from_disk(source)
            return {str(part.split or "train"): part}
        if several:
            return dict(datasets.load_from_disk(source))
        if os.path.isfile(source):
            return dict(datasets.load_dataset("parquet", data_files=source))
        return dict(datasets.load_dataset(source, configuration))
    except Exception as error:  # the loader raises almost anything for broken files
        broken = isinstance(error, datasets.exceptions.DatasetGenerationError)
        cause = error.__cause__ if broken else None  # its own message is only "an error occurred"
        why = reason(cause or error).partition("Example of usage")[0].strip()
        advice = f"; add it: {name}:CONFIG" if why.startswith("Config name is missing") else ""
        raise FileError(f"{name}: can't be loaded ({why}){advice}") from error


@dataclass
class _Rows:
    """The rows of all splits that have an image and a label; a label is a class name."""

    files: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # "": none
    further: dict[str, set[str]] = field(default_factory=dict)  # values of what may be groups
    classes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


def _labeled_rows(name: str, loaded: Mapping[str, Any], cache: Path) -> _Rows:
    import datasets

    rows, splits = _Rows(), _splits(name, list(loaded))
    named = False
    for key, part in loaded.items():
        if key not in splits:
            rows.left_out[f"{key}, which is not a train, validation or test split"] = len(part)
            continue
        image = _image_column(name, part.features)
        classes, labels, label = _labels(f"{name}: {key}", name, part)
        rows.classes += [c for c in classes if c not in rows.classes]
        known = {i for i, label in enumerate(labels) if label is not None}
        split, alone = splits[key], len(loaded) == 1 and splits[key] in ("", "train")
        stated = _stated_splits(name, part, label, None if alone else split, rows.warnings)
        others = {i for i, its in stated.items() if its is None}
        rows.left_out["a split that is not train, validation or test"] += len(others & known)
        named |= any(isinstance(f, datasets.ClassLabel) for f in part.features.values())
        encoded = part.cast_column(image, datasets.Image(decode=False))
        files = _unpack(encoded, known - others, image, key, cache)
        rows.left_out[f"{key} without a label"] += len(part) - len(known)
        rows.left_out[f"{key} without an image"] += len(known - others) - len(files)
        rows.files += files.values()
        rows.labels += [str(labels[i]) for i in files]
        rows.splits += [stated.get(i) or ("" if stated else split) for i in files]
        grouped = _GROUP in part.features and label != _GROUP
        groups = _words(f"{name}: {key}", part, _GROUP) if grouped else {}
        rows.groups += [groups.get(i, "") for i in files]
        for column in filter(may_be_groups, part.features):
            if column != label and _is_word(part.features[column]):
                found = _words(name, part, column)
                rows.further.setdefault(column, set()).update(found[i] for i in files if i in found)
    if not named:
        rows.classes.sort(key=lambda c: (0, int(c), "") if _NUMBER.fullmatch(c) else (1, 0, c))
    return rows


def _stated_splits(
    name: str, part: Any, label: str, own: str | None, warnings: list[str]
) -> dict[int, str | None]:
    """{row: its split by the column called split, None for another word than those of splits}.

    Empty without such a column, and where it is not used, of which a line in `warnings` says why:
    the rows are in a split of their own, or no word of the column is one.

    Args:
        name: of the data.
        part: rows of `datasets`.
        label: the column of labels.
        own: the split of these rows where the data is divided already; None: not divided.
        warnings: lines for the user, to which one may be added.

    Raises:
        UsageError: two names stand for one split, as dev and eval, which may be different ones.
    """
    feature = part.features.get(_SPLIT)
    if label == _SPLIT or not (hasattr(feature, "names") or _is_word(feature)):
        return {}
    words = {i: word.lower() for i, word in _words(name, part, _SPLIT).items()}
    split_of = {word: split_cell(word) for word in sorted(set(words.values()))}
    line = None
    if own is not None:
        other_than_own = any(split != own for split in split_of.values())
        line = f"these images are {own} by the name of their split" if other_than_own else None
    elif not any(split_of.values()) and split_of:
        line = f"it holds {shortened(map(repr, split_of), 6)}"
    if line is not None:
        warnings.append(f"the column 'split' is not used: {line}")
    if line is not None or own is not None:
        return {}
    for word, split in split_of.items():
        if split and (other := unlike_name(word, split, split_of)):
            raise UsageError(f"{name}: {two_names(word, other, split)}")
    return {i: split_of[word] for i, word in words.items()}


def _words(where: str, part: Any, column: str) -> dict[int, str]:
    """{row: value} of a column as text, without rows that have none.

    Raises:
        UsageError: the column holds neither strings nor whole numbers nor classes.
    """
    feature, held = part.features[column], dict(enumerate(part[column]))
    held = {i: v for i, v in held.items() if v is not None and str(v).strip() and v == v}
    if (names := getattr(feature, "names", None)) is not None:
        return {i: str(names[v]).strip() for i, v in held.items() if v >= 0}
    if _is_float(feature):  # integers with gaps, by pandas
        if not all(float(v).is_integer() for v in held.values()):
            raise UsageError(f"{where}: the column {column!r} holds numbers that are not whole")
        held = {i: int(v) for i, v in held.items()}
    elif not _is_word(feature):
        raise UsageError(f"{where}: the column {column!r} holds neither strings nor integers")
    return {i: str(v).strip() for i, v in held.items()}


def _splits(name: str, keys: list[str]) -> dict[str, str]:
    """{name of a split: train, val or test}; '' for a single split with another name.

    Raises:
        UsageError: two names stand for the same split, or several splits have none of these names.
    """
    words = {key: word for key in keys if (word := split_word(key)) is not None}
    if len(keys) == 1:
        return words or {keys[0]: ""}
    if not words:
        raise UsageError(f"{name}: no train, validation or test split among {', '.join(keys)}")
    for word in words.values():
        same = [key for key, other in words.items() if other == word]
        if len(same) > 1:
            raise UsageError(f"{name}: {' and '.join(same)} are both a {word} split; {_ADVICE}")
    return words


def _image_column(name: str, features: Mapping[str, Any]) -> str:
    import datasets

    def holds_images(feature: Any) -> bool:
        # a parquet file written without `datasets` holds a struct
        struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        return struct or isinstance(feature, datasets.Image)

    def holds_files(feature: Any) -> bool:  # as pandas writes them
        return str(getattr(feature, "dtype", "")) in _BYTES

    if not any(map(holds_images, features.values())):
        usual = [column for column in _IMAGES if column in features] or list(features)
        if len(files := [column for column in usual if holds_files(features[column])]) == 1:
            return files[0]
    return _column(name, features, holds_images, "Image", _IMAGES)


def _labels(where: str, name: str, part: Any) -> tuple[list[str], list[str | None], str]:
    """The classes of a split, each row's class, None if it has no label, and the column.

    Raises:
        UsageError: no usable column, or a number without a name.
    """
    import datasets

    features = part.features

    def named(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel)

    if not any(map(named, features.values())):
        usual = {column: features[column] for column in _LABELS if column in features}
        column = _column(
            name, usual, lambda f: _is_word(f) or _is_float(f), _WORDS, _LABELS, features
        )
        held = list(part[column])
        if _is_float(features[column]):  # integers with gaps, by pandas
            known = _words(where, part, column)
            held = [int(known[i]) if i in known else None for i in range(len(held))]
        values = [None if v in (None, "", -1) else v for v in held]
        words = [None if v is None else str(v) for v in values]
        return list({word for word in words if word is not None}), words, column
    column = _column(name, features, named, "ClassLabel", _LABELS)
    classes = list(features[column].names)
    numbers = [-1 if v is None else int(v) for v in part[column]]
    if numbers and max(numbers) >= len(classes):
        only = plural(len(classes), "class")
        raise UsageError(f"{where}: has the label {max(numbers)}, but only {only}")
    return classes, [None if number < 0 else classes[number] for number in numbers], column


def _is_word(feature: Any) -> bool:
    """Whether a column holds strings or integers."""
    kind = str(getattr(feature, "dtype", ""))
    return kind in ("string", "large_string", "bool") or kind.lstrip("u").startswith("int")


def _is_float(feature: Any) -> bool:
    """Whether a column holds floats."""
    return str(getattr(feature, "dtype", "")).startswith("float")


def _column(
    name: str,
    features: Mapping[str, Any],
    fits: Callable[[Any], bool],
    kind: str,
    usual: Sequence[str],
    among: Mapping[str, Any] | None = None,
) -> str:
    """The column that fits; if there are several, the first one with a usual name."""
    columns = [column for column, feature in features.items() if fits(feature)]
    chosen = columns if len(columns) == 1 else [column for column in usual if column in columns]
    if chosen:
        return chosen[0]
    has = f"has {shortened(columns, 6)}, none called {usual[0]}" if columns else "has none"
    raise UsageError(
        f"{name}: needs one column of type {kind}, {has} (columns: "
        f"{', '.join(among or features)}); to change that, {_ADVICE}"
    )


def _unpack(part: Any, rows: set[int], image: str, key: str, cache: Path) -> dict[int, str]:
    """{row: file} of the rows that have an image; existing files are not written again.

    Raises:
        FileError: they can't be written.
    """
    folder, own = cache / "hf" / part._fingerprint, uuid.uuid4().hex
    files: dict[int, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(part.select_columns([image])):
            held = row[image] if i in rows else None
            path = "" if held is None else held["path"] or ""
            if held is None or (held["bytes"] is None and not path):
                continue
            if held["bytes"] is not None:
                ending = os.path.splitext(path)[1]
                ending = ending if _SUFFIX.fullmatch(ending) else ""
                path = str(folder / f"{key}-{i:08d}{ending}")
                if not os.path.exists(path):  # other processes may be writing the same files
                    Path(f"{path}.{own}").write_bytes(held["bytes"])
                    os.replace(f"{path}.{own}", path)
            files[i] = path
    except OSError as error:
        raise FileError(f"{folder} can't be written ({reason(error)})") from error
    return files
