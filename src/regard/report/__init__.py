"""One self-contained HTML page about a training run: the result, where the network looked,
its mistakes, and how to run it again.

`write_report` fills `page.html` beside this file. The page asks nothing of the network, needs
no scripts, follows the reader's light or dark mode, and can be printed.
"""

import base64
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from regard.errors import UsageError
from regard.evaluation.intervals import wilson_interval
from regard.explanations.overlay import color_key, describe, overlay, resize_image

MAX_BYTES = 5_000_000  # of the page
_PICTURE_BYTES = 3_800_000  # of it for the gallery
_MAX_CELLS_A_SIDE = 30  # a larger confusion matrix is told as its most frequent mistakes
_MAX_MISTAKES = 30
_OUTLINE = 0.5  # of the attention's range


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """One image, what the network said, and where it looked.

    image: (H, W) or (H, W, 3), uint8.
    true, predicted: names of classes.
    probability: the network's own, of the predicted class, 0 to 1.
    maps: one (name, map) a gate, as ("gate3", (h, w) floats); may be empty.
    """

    image: NDArray[np.uint8]
    true: str
    predicted: str
    probability: float
    maps: list[tuple[str, NDArray[Any]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Belief:
    """How far the attention can be believed, measured on some of the test images.

    images: how many.
    rows: for each map, and the controls, its name and the words of its deletion, insertion and
        gain over random maps.
    sentences: what follows, in words.
    """

    images: int
    rows: list[tuple[str, str, str, str]]
    sentences: list[str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page tells.

    title: the page's heading.
    model: the network's name.
    summary: facts by name, as "parameters", "data", "split sizes", "training time", "seed";
        "data" is also said in the first sentence.
    classes: C names, in the order of the confusion matrix.
    history: an epoch each: epoch, loss, accuracy (of training, 0 to 1), learning_rate, and
        where there is a validation set val_loss and val_accuracy.
    accuracy: of the test images, 0 to 1.
    interval: its 95 % interval, as of wilson_interval.
    n_test: test images.
    confusion: (C, C) counts of them, a row for each true class.
    gallery: images to show; wrong ones are put first.
    versions: of the packages that were used.
    command: what runs it again, for a shell.
    notes: further sentences on what the run does and does not say.
    belief: how far the attention can be believed, if that was measured.
    """

    title: str
    model: str
    summary: dict[str, str]
    classes: list[str]
    history: list[dict[str, float]]
    accuracy: float
    interval: tuple[float, float]
    n_test: int
    confusion: NDArray[Any]
    gallery: list[GalleryItem] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    notes: list[str] = field(default_factory=list)
    belief: Belief | None = None


# ---- words and numbers ------------------------------------------------------------------


def _percent(share: float, decimals: int = 1) -> str:
    """0.978 -> "97.8 %", a no-break space within; never 0 or 100 for what only rounds to it."""
    text = f"{100 * share:.{decimals}f}"
    while 0.0 < share < 1.0 and float(text) in (0.0, 100.0) and decimals < 9:
        decimals += 1
        text = f"{100 * share:.{decimals}f}"
    return f"{text}\u00a0%"


def _probability(p: float) -> str:
    if p > 0.999:
        return "100\u00a0%" if p == 1.0 else ">\u00a099.9\u00a0%"
    return _percent(p, 0 if p < 0.99 else 1)


def _range(low: float, high: float) -> str:
    """ "95.7–98.9 %"."""
    return f"{_percent(low)[:-2]}–{_percent(high)}"


# ---- pictures ---------------------------------------------------------------------------


def _data_uri(picture: NDArray[np.uint8], kind: str) -> str:
    buffer = io.BytesIO()
    options = {"quality": 88, "subsampling": 0} if kind == "jpeg" else {}
    Image.fromarray(picture).save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown_size(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width of an overlay: a small image's whole multiple up to 224, or 288."""
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = max(224 // longer, 1) if longer <= 224 else min(288 / longer, 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _item(item: GalleryItem) -> dict[str, Any]:
    size = _shown_size(item.image)
    small = max(item.image.shape[:2]) <= 64  # its very pixels, which the browser enlarges
    original = item.image if small else resize_image(item.image, size)
    maps = [
        {
            "name": name,
            "range": describe(attention),
            "src": _data_uri(overlay(item.image, attention, size=size, outline=_OUTLINE), "jpeg"),
        }
        for name, attention in item.maps
    ]
    return {
        "true": item.true,
        "predicted": item.predicted,
        "right": item.true == item.predicted,
        "probability": _probability(item.probability),
        "size": size,
        "shape": item.image.shape[:2],
        "small": small,
        "src": _data_uri(original, "png" if small else "jpeg"),
        "maps": maps,
    }


def _gallery(items: Sequence[GalleryItem]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The wrong and the right ones, in turn for as long as the page's size allows."""
    wrong = [i for i in items if i.true != i.predicted]
    right = [i for i in items if i.true == i.predicted]
    shown: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    size = 0
    for item in itertools.chain.from_iterable(itertools.zip_longest(wrong, right)):
        if item is None:
            continue
        card = _item(item)
        size += len(card["src"]) + sum(len(m["src"]) for m in card["maps"])
        if size > _PICTURE_BYTES:
            break
        shown[card["right"]].append(card)
    return shown[False], shown[True]


# ---- curves -----------------------------------------------------------------------------

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 352.0, 10.0, 178.0  # of the curves, in a 360 x 216 drawing


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    ticks = MaxNLocator(nbins=5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(t) for t in ticks]


def _axis(values: Iterable[float], *, from_zero: bool = True) -> tuple[float, float]:
    """Lowest and highest; from 0 where the lowest is less than half of the highest."""
    finite = list(values)
    low, high = min(finite), max(finite)
    if from_zero and 0 < low < high / 2:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _runs(points: Iterable[tuple[float, float] | None]) -> Iterator[list[tuple[float, float]]]:
    for some, run in itertools.groupby(points, key=lambda p: p is not None):
        if some:
            yield [p for p in run if p is not None]


def _said(y: float, percent: bool) -> str:
    if not math.isfinite(y):
        return "not finite"
    return _percent(y) if percent else f"{y:.3g}"


def _chart(
    history: list[dict[str, float]], title: str, keys: dict[str, str], *, percent: bool = False
) -> dict[str, Any] | None:
    """Drawing of a quantity by epoch; keys are history's, by the line's name."""
    lines = {
        name: [(row["epoch"], row[key]) for row in history if key in row]
        for name, key in keys.items()
    }
    lines = {n: v for n, v in lines.items() if any(math.isfinite(y) for _, y in v)}
    if not lines:
        return None
    x_low, x_high = _axis((row["epoch"] for row in history), from_zero=False)
    y_ticks = _ticks(*_axis(y for v in lines.values() for _, y in v if math.isfinite(y)))
    if percent:
        y_ticks = [t for t in y_ticks if -1e-9 <= t <= 1 + 1e-9] or [0.0, 1.0]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at_x(x: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (x - x_low) / (x_high - x_low)

    def at_y(y: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (y - y_low) / (y_high - y_low)

    drawn = []
    for name, values in lines.items():
        runs = list(_runs((at_x(x), at_y(y)) if math.isfinite(y) else None for x, y in values))
        first, last = (_said(values[i][1], percent) for i in (0, -1))
        drawn.append(
            {
                "name": name,
                "runs": [" ".join(f"{x:.1f},{y:.1f}" for x, y in run) for run in runs],
                "dots": [p for run in runs for p in run if len(values) <= 15 or len(run) == 1],
                "last": last,
                "words": f"{name} from {first} to {last}",
            }
        )
    return {
        "title": title,
        "lines": drawn,
        "x": [(at_x(t), f"{t:g}") for t in _ticks(x_low, x_high, True) if x_low <= t <= x_high],
        "y": [(at_y(t), f"{100 * t:g}\u00a0%" if percent else f"{t:g}") for t in y_ticks],
    }


def _charts(history: list[dict[str, float]]) -> list[dict[str, Any]]:
    both = {"training": "loss", "validation": "val_loss"}
    accuracies = {"training": "accuracy", "validation": "val_accuracy"}
    charts = [
        _chart(history, "Loss", both),
        _chart(history, "Accuracy", accuracies, percent=True),
        _chart(history, "Learning rate", {"learning rate": "learning_rate"}),
    ]
    return [chart for chart in charts if chart]


# ---- tables -----------------------------------------------------------------------------


def _per_class(classes: list[str], confusion: NDArray[np.int64]) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(classes):
        n, predicted, hits = (
            int(v) for v in (confusion[i].sum(), confusion[:, i].sum(), confusion[i, i])
        )
        low, high = wilson_interval(hits, n) if n else (0.0, 1.0)
        rows.append(
            {
                "name": name,
                "n": n,
                "hits": hits,
                "predicted": predicted,
                "recall": hits / n if n else None,
                "low": low,
                "high": high,
                "precision": hits / predicted if predicted else None,
            }
        )
    return rows


def _mistakes(classes: list[str], confusion: NDArray[np.int64], most: int) -> list[dict[str, Any]]:
    """The most frequent (true, predicted) pairs that are wrong."""
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [tuple(int(v) for v in np.unravel_index(k, wrong.shape)) for k in order]
    return [
        {
            "true": classes[i],
            "predicted": classes[j],
            "n": int(wrong[i, j]),
            "of": int(confusion[i].sum()),
        }
        for i, j in pairs
        if wrong[i, j] > 0
    ]


# ---- the page ---------------------------------------------------------------------------


def _checked_confusion(report: Report) -> NDArray[np.int64]:
    """The counts, if they fit the classes and the other numbers."""
    confusion = np.asarray(report.confusion)
    c = len(report.classes)
    if confusion.shape != (c, c) or c == 0:
        raise UsageError(f"confusion of shape {confusion.shape}: ({c}, {c}), as there are classes")
    if not np.issubdtype(confusion.dtype, np.integer) or (confusion < 0).any():
        raise UsageError("confusion: whole numbers of 0 or more are needed")
    total, hits = int(confusion.sum()), int(np.trace(confusion))
    if total != report.n_test or total == 0:
        raise UsageError(f"confusion counts {total} images, n_test says {report.n_test}")
    if not abs(report.accuracy - hits / total) < 0.5 / total:
        raise UsageError(f"accuracy={report.accuracy}, but confusion says {hits} of {total}")
    low, high = report.interval
    if not 0.0 <= low <= report.accuracy + 1e-6 <= high + 2e-6 <= 1.0 + 3e-6:
        raise UsageError(f"interval={report.interval} does not hold accuracy={report.accuracy}")
    return confusion.astype(np.int64)


def _check(report: Report) -> None:
    for row in report.history:
        for key in ("epoch", "loss", "accuracy", "learning_rate"):
            if key not in row:
                raise UsageError(f"history lacks {key!r}; it has {', '.join(row) or 'nothing'}")
    for item in report.gallery:
        if not 0.0 <= item.probability <= 1.0:
            raise UsageError(f"probability={item.probability} in the gallery: 0 to 1")


def _render(report: Report) -> str:
    confusion = _checked_confusion(report)
    _check(report)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent)
    environment.globals.update(percent_range=_range)
    template = environment.from_string(
        resources.files("regard.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    wrong, right = _gallery(report.gallery)
    per_class = _per_class(report.classes, confusion)
    recalls = [row["recall"] for row in per_class if row["recall"] is not None]
    commonest = int(confusion.sum(axis=1).argmax())
    whole = len(report.classes) <= _MAX_CELLS_A_SIDE
    return template.render(
        report=report,
        data=next((v for k, v in report.summary.items() if k.lower() == "data"), None),
        hits=int(np.trace(confusion)),
        baseline=float(confusion[commonest].sum() / report.n_test),
        commonest=report.classes[commonest],
        wrong=wrong,
        right=right,
        left_out=len(report.gallery) - len(wrong) - len(right),
        key=_data_uri(color_key(160, 24), "png"),
        charts=_charts(report.history),
        history_keys=list(dict.fromkeys(key for row in report.history for key in row)),
        rows=confusion.tolist() if whole else [],
        per_class=per_class,
        mean_recall=sum(recalls) / len(recalls),
        mistakes=_mistakes(report.classes, confusion, 6 if whole else _MAX_MISTAKES),
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the page to `path`: one file, under 5 MB, complete or not at all.

    Pictures are left out of a gallery that would make the page too large, and the page says
    how many. The page is written beside `path` and then renamed.

    Raises:
        UsageError: numbers that contradict each other or are out of range, images or maps of
            another kind (see `regard.explanations.overlay`), or a page over 5 MB.
        OSError: the file cannot be written.
    """
    target = Path(path)
    page = _render(report).encode()
    if len(page) > MAX_BYTES:
        raise UsageError(f"the page would have {len(page)} bytes, over {MAX_BYTES}")
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(page)
        os.replace(beside, target)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
