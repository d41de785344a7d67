"""`Report` and its page."""

import base64
import hashlib
import io
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from regard.errors import UsageError
from regard.evaluation import ClassResult, Diagnostics, Evaluation
from regard.explanations.explanation import Explanation
from regard.explanations.faithfulness import Faithfulness, interval
from regard.explanations.figure import size_of
from regard.explanations.overlay import (
    VIRIDIS_FROM,
    color_key,
    describe,
    has_few_cells,
    overlay,
    resize_image,
)
from regard.explanations.print_style import INK, LINE, MAIN, MUTED, SECOND, SOFTWARE, for_print
from regard.files import plural, write_atomically
from regard.report.browse import Browser
from regard.report.charts import History
from regard.report.curves import Chart
from regard.report.sections import CALIBRATION, Section
from regard.report.subgroups import SUBGROUPS
from regard.report.words import SPLITS, diagnostic_rows, percent, percent_range, probability

MAX_BYTES = 10_000_000  # limit of the page
_PICTURE_BYTES = 2_000_000  # limit of the cards' pictures
_MAX_CELLS_A_SIDE = 30  # a larger confusion matrix is replaced by its most frequent mistakes
_MAX_MISTAKES = 30
_MAX_CLASS_ROWS = 100  # with more classes, those of lowest recall are drawn, and all are listed
_OUTLINE = 0.5  # level of the outline, relative to the attention's range


@dataclass(frozen=True)
class Methods:
    """What a paper must report, as far as it is stored in a run; see `regard.report.methods`.

    Attributes:
        text: the methods paragraph.
        checklists: by name: its source, and (item, topic, answer or None) for each item.
    """

    text: str
    checklists: dict[str, tuple[str, list[tuple[str, str, str | None]]]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of the page.

    Attributes:
        title: the page's heading.
        model: the network's name.
        summary: facts by name, such as "Images" or "Training"; "data" also appears in the first
            sentence.
        evaluation: the result; every metric on the page is from it.
        split: the split that was evaluated: test, val or train.
        explanations: images to show, with their true classes; wrong ones come first.
        history: one row per evaluation during training: epoch, loss, accuracy (of training, 0
            to 1), learning_rate, and with a validation split val_loss and val_accuracy.
        charts: the figures to show; each can be downloaded as SVG.
        diagnostics: the metrics of a diagnostic study, if they were measured.
        calibration, subgroups: sections with tables; their figures are among `charts`.
        browser: all images, to be browsed.
        methods: a paragraph for a paper, and checklists.
        chosen: how the epoch of the weights was chosen, as text.
        versions: of the packages that were used.
        command: the shell command that runs it again.
        notes: further sentences on what the run does and does not show.
        faithfulness: how far the maps can be trusted, if that was measured.
    """

    title: str
    model: str
    summary: dict[str, str]
    evaluation: Evaluation
    split: str = "test"
    explanations: Sequence[Explanation] = ()
    history: History = field(default_factory=list)
    charts: Sequence[Chart] = ()
    diagnostics: Diagnostics | None = None
    calibration: Section | None = None
    subgroups: Section | None = None
    browser: Browser | None = None
    methods: Methods | None = None
    chosen: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    notes: list[str] = field(default_factory=list)
    faithfulness: Faithfulness | None = None


# ---- pictures ---------------------------------------------------------------------------
def _data_uri(picture: NDArray[np.uint8], kind: str) -> str:
    buffer = io.BytesIO()
    options = {"quality": 88, "subsampling": 0} if kind == "jpeg" else {}
    Image.fromarray(picture).save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _shown_size(image: NDArray[np.uint8]) -> tuple[int, int]:
    """Height and width of an overlay: small images enlarged up to 224, others at most 288."""
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = max(224 // longer, 1) if longer <= 224 else min(288 / longer, 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _card(shown: Explanation) -> dict[str, Any]:
    image, size = shown.image, _shown_size(shown.image)
    small = max(image.shape[:2]) <= 64  # its exact pixels, which the browser enlarges

    def picture(values: NDArray[Any]) -> NDArray[np.uint8]:
        outline = None if has_few_cells(values) else _OUTLINE
        return overlay(image, values, size=size, outline=outline, box=shown.box)

    maps = [
        {
            "name": m.name,
            "range": describe(m.values),
            "size": size_of(m) if has_few_cells(m.values) else "",
            "src": _data_uri(picture(m.values), "jpeg"),
        }
        for m in shown.spatial()
    ]
    return {
        "name": Path(shown.path).name,
        "path": shown.path,
        "true": shown.true,
        "predicted": shown.predicted,
        "right": shown.true == shown.predicted,
        "probability": probability(min(1.0, shown.probability)),
        "size": size,
        "shape": image.shape[:2],
        "small": small,
        "src": _data_uri(image if small else resize_image(image, size), "png" if small else "jpeg"),
        "maps": maps,
    }


def _gallery(all_of: Sequence[Explanation]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cards of wrong and right predictions, alternating, as far as the page's size allows."""
    wrong = [e for e in all_of if e.true != e.predicted]
    right = [e for e in all_of if e.true == e.predicted]
    cards: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    size = 0
    for each in itertools.chain.from_iterable(itertools.zip_longest(wrong, right)):
        if each is None:
            continue
        card = _card(each)
        size += len(card["src"]) + sum(len(m["src"]) for m in card["maps"])
        if size > _PICTURE_BYTES:
            break
        cards[card["right"]].append(card)
    return cards[False], cards[True]


# ---- figures ----------------------------------------------------------------------------
_COLORS = {INK: "--ink", MUTED: "--muted", LINE: "--line", MAIN: "--good", SECOND: "--bad"}


def _svg(chart: Chart) -> tuple[str, str]:
    """A figure as an SVG element that follows the page's colors, and as a file to download."""
    buffer = io.BytesIO()
    with for_print():
        chart.figure.savefig(buffer, format="svg", metadata={"Creator": SOFTWARE, "Date": None})
    content = buffer.getvalue().decode()
    file = base64.b64encode(content.encode()).decode()
    element = content[content.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    head, _, body = element.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # the white background would be a white box on a dark page
    body = re.sub(r'<g id="patch_1">.*?</g>', "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(id="|href="#|url\(#)', rf"\1{chart.name}-", body)
    for color, name in _COLORS.items():
        body = body.replace(color, f"var({name})")
    return f'<svg {box[0]} role="img" aria-label="{escape(chart.words)}">{body}', file


def _charts(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The figures of each section."""
    drawn: dict[str, list[dict[str, Any]]] = {"figures": [], "calibration": [], "subgroups": []}
    for chart in report.charts:
        element, file = _svg(chart)
        section = "figures"
        if report.calibration is not None and chart.name in CALIBRATION:
            section = "calibration"
        elif report.subgroups is not None and chart.name.startswith(SUBGROUPS):
            section = "subgroups"
        drawn[section].append({
            "name": chart.name, "title": chart.title, "caption": chart.caption,
            "svg": Markup(element), "file": file,
        })  # fmt: skip
    return drawn


# ---- tables -----------------------------------------------------------------------------
def _matrix(evaluation: Evaluation) -> list[list[int]]:
    """The confusion matrix as rows; empty if it is too large to read."""
    if len(evaluation.classes) > _MAX_CELLS_A_SIDE:
        return []
    return evaluation.confusion.toarray().tolist()


def _mistakes(evaluation: Evaluation, most: int) -> list[dict[str, Any]]:
    classes = evaluation.per_class
    return [
        {"true": classes[i].name, "predicted": classes[j].name, "n": n, "of": classes[i].count}
        for i, j, n in evaluation.confusions(most)
    ]


def _class_tables(classes: list[ClassResult]) -> tuple[list[ClassResult], str]:
    """The classes to draw, and if there are many, all of them as one text of aligned columns."""
    if len(classes) <= _MAX_CLASS_ROWS:
        return classes, ""
    present = sorted((c for c in classes if c.count), key=lambda c: c.recall.value)
    width = min(max(len(c.name) for c in classes), 40)
    lines = [f"{'class':{width}}  images   recall  precision"]
    for c in classes:
        shares = [
            "–" if math.isnan(e.value) else f"{100 * e.value:.1f} %"
            for e in (c.recall, c.precision)
        ]
        lines.append(f"{c.name:{width}}  {c.count:6d}  {shares[0]:>7}  {shares[1]:>9}")
    return present[:_MAX_CLASS_ROWS], "\n".join(lines)


# ---- the page ---------------------------------------------------------------------------
def _check(report: Report) -> None:
    if report.split not in SPLITS:
        raise UsageError(f"split={report.split!r}: choose one of {', '.join(SPLITS)}")
    for row in report.history:
        for key in ("epoch", "loss", "accuracy", "learning_rate"):
            if key not in row:
                raise UsageError(f"history lacks {key!r}; it has {', '.join(row) or 'nothing'}")
    for each in report.explanations:
        if each.true is None:
            raise UsageError(f"{each.path}: an explanation in a report needs its true class")


def _faithfulness(found: Faithfulness | None) -> dict[str, Any] | None:
    if found is None:
        return None
    rows = [
        (s.name, *(interval(e, 2) for e in (s.deletion, s.insertion, s.over_random)))
        for s in found.scores.values()
    ]
    return {
        "images": plural(found.images, "image"),
        "rows": rows,
        "sentences": found.sentences(),
        "intervals": found.over,
    }


def _resource(name: str) -> str:
    return resources.files("regard.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's hash source for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _viridis() -> str:
    """65 colors from no attention to the strongest, as in the overlay."""
    colors = matplotlib.colormaps["viridis"](np.linspace(VIRIDIS_FROM, 1.0, 65))
    return " ".join("".join(f"{round(255 * c):02x}" for c in color[:3]) for color in colors)


def _code(sentence: str) -> Markup:
    """A sentence with the text between backticks as <code>."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def _render(report: Report) -> str:
    _check(report)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent, percent_range=percent_range, code=_code, thousands="{:,}".format
    )
    environment.tests.update(nan=math.isnan)
    evaluation = report.evaluation
    wrong, right = _gallery(report.explanations)
    drawn, listed = _class_tables(evaluation.per_class)
    matrix = _matrix(evaluation)
    browser = report.browser
    scripts = [_resource(name) for name in ("scroll.js", *(["browse.js"] if browser else []))]
    places = {row[0]: k for k, row in enumerate(browser.listed)} if browser else {}
    return environment.from_string(_resource("page.html")).render(
        report=report,
        data=next((v for k, v in report.summary.items() if k.lower() == "data"), None),
        images=f"{SPLITS[report.split]} image{'s' * (evaluation.n != 1)}",
        n=evaluation.n,
        classes=evaluation.classes,
        top1=evaluation.metrics["top1"],
        hits=evaluation.n - sum(n for _, _, n in evaluation.confusions()),
        groups=evaluation.n_groups,
        commonest=max(evaluation.per_class, key=lambda c: c.count),
        wrong=wrong,
        right=right,
        left_out=len(report.explanations) - len(wrong) - len(right),
        key=_data_uri(color_key(160, 24), "png"),
        charts=_charts(report),
        history_keys=list(dict.fromkeys(key for row in report.history for key in row)),
        rows=matrix,
        drawn=drawn,
        listed=listed,
        mean_recall=evaluation.metrics["balanced_accuracy"].value,
        mistakes=_mistakes(evaluation, 6 if matrix else _MAX_MISTAKES),
        belief=_faithfulness(report.faithfulness),
        numbers=diagnostic_rows(report.diagnostics),
        places=places,
        viridis=_viridis(),
        browse=None if browser is None else Markup(browser.to_json()),
        scripts=[Markup(script) for script in scripts],
        policy=" ".join(map(_hash, scripts)),
    )


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the page to `path`: one file, under 10 MB, atomically.

    If a gallery would make the page too large, images are left out, and the page says how
    many.

    Raises:
        UsageError: an unknown split, a history or explanations that lack something, images or
            maps that can't be drawn (see `regard.explanations.overlay`), or a page over 10 MB.
        FileError: the file can't be written.
    """
    page = _render(report).encode(errors="replace")
    if len(page) > MAX_BYTES:
        raise UsageError(f"the page would have {len(page)} bytes, over {MAX_BYTES}")
    write_atomically(Path(path), lambda part: part.write_bytes(page))
