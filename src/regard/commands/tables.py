"""Tables of metrics, for the command line."""

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regard.evaluation.comparison import Comparison, name_of_test
from regard.evaluation.diagnostics import Diagnostics
from regard.evaluation.intervals import Estimate
from regard.evaluation.metrics import Evaluation
from regard.files import plural, signed_range

NAMES = {
    "top1": "accuracy (top 1)",
    "top5": "accuracy (top 5)",
    "balanced_accuracy": "balanced accuracy (macro recall)",
    "macro_f1": "macro F1",
    "macro_precision": "macro precision",
    "ece": "calibration error (ECE)",
    "nll": "negative log-likelihood",
}
DIAGNOSTIC_NAMES = {
    "roc_auc": "ROC AUC",
    "roc_auc_macro": "ROC AUC, each class against the rest (macro)",
    "roc_auc_weighted": "ROC AUC, weighted by images",
    "roc_auc_hand_till": "ROC AUC, pairs of classes (Hand and Till)",
    "partial_roc_auc": "partial ROC AUC (standardized)",
    "average_precision": "average precision",
    "average_precision_macro": "average precision (macro)",
    "average_precision_weighted": "average precision, weighted by images",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "positive predictive value",
    "npv": "negative predictive value",
    "lr_positive": "positive likelihood ratio",
    "lr_negative": "negative likelihood ratio",
    "f1": "F1",
    "mcc": "Matthews correlation (MCC)",
    "kappa": "Cohen's kappa",
    "quadratic_kappa": "quadratic kappa",
    "brier": "Brier score",
    "calibration_slope": "calibration slope (ideal 1)",
    "calibration_intercept": "calibration intercept (ideal 0)",
}
_SHARES = ("sensitivity", "specificity", "ppv", "npv")  # printed in percent
_MOST = 20  # rows; of more classes, the worst and the most frequent confusions


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Prints the metrics, the classes and the confusions.

    With more than 20 classes, the 20 of lowest recall, and the 20 most frequent confusions in
    place of the confusion matrix; so also where the console is too narrow for the matrix.
    """
    console = console or Console()
    print_table(console, *_metrics(evaluation))
    print_table(console, *_classes(evaluation))
    if len(evaluation.classes) <= _MOST:
        title, matrix = _matrix(evaluation)
        unbounded = console.options.update(width=10_000)  # else it measures the console's width
        if console.measure(matrix, options=unbounded).maximum <= console.width:
            print_table(console, title, matrix)
            return
    print_table(console, *_confusions(evaluation))


def print_comparison(
    comparison: Comparison, console: Console | None = None, *, a: str = "a", b: str = "b"
) -> None:
    """Prints both accuracies, their difference and the p-value; a and b name the networks."""
    console = console or Console()
    table = plain_table("network")
    table.add_column("top 1", justify="right")
    table.add_column("only it is right", justify="right")
    table.add_row(Text(a), _percent(comparison.top1_a), str(comparison.only_a))
    table.add_row(Text(b), _percent(comparison.top1_b), str(comparison.only_b))
    print_table(
        console, f"Accuracy on the same {_images(comparison.n, comparison.n_groups)}", table
    )
    d = comparison.difference
    value, low, high = signed_range(100 * d.value, 100 * d.low, 100 * d.high, 2)
    low, high = ("–" if "nan" in end else end for end in (low, high))
    test = name_of_test(comparison.n_groups is not None)
    console.print(
        Text(
            f"{a} minus {b}: {value} points "
            f"({100 * comparison.confidence:g} % interval {low} to {high}), "
            f"p = {comparison.p_value:.3g} ({test})"
        )
    )


def print_diagnostics(diagnostics: Diagnostics, console: Console | None = None) -> None:
    """Prints the numbers of a diagnostic study: of all classes, and of the positive one."""
    console = console or Console()
    title = "Ranking, agreement and probabilities"
    print_table(console, title, _estimates(diagnostics.metrics, diagnostics.confidence))
    one = diagnostics.one_class
    if one is None:
        return
    counts = ", ".join(f"{n} {kind.upper()}" for kind, n in one.counts.items())
    title = f"{one.positive} against the rest: {one.decision()} ({counts})"
    print_table(console, title, _estimates(one.metrics, diagnostics.confidence))


def _estimates(metrics: dict[str, Estimate], confidence: float) -> Table:
    table = plain_table("metric")
    table.add_column("value", justify="right")
    table.add_column(f"{100 * confidence:g} % interval", justify="right")
    for name, title in DIAGNOSTIC_NAMES.items():
        if name in metrics:
            estimate, percent = metrics[name], name in _SHARES
            value = _percent(estimate.value) if percent else _number(estimate.value)
            table.add_row(title, value, _range(estimate, percent=percent))
    return table


def estimate_cells(estimate: Estimate | None) -> tuple[str, str]:
    """A share and its interval, in percent."""
    return ("", "") if estimate is None else (_percent(estimate.value), _range(estimate))


def _images(n: int, n_groups: int | None) -> str:
    images = plural(n, "image")
    return images if n_groups is None else f"{images} of {plural(n_groups, 'group')}"


def plain_table(first_column: str) -> Table:
    """An empty table without lines."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first_column)
    return table


def print_table(console: Console, title: str, table: Table) -> None:
    """A table below its title, which may be wider than it (rich would wrap its own titles)."""
    console.print(Text(title, style="bold"))
    if table.row_count:
        console.print(table)
    console.print()


def _percent(share: float) -> str:
    """0.978 -> "97.80 %"; never 0 or 100 for what only rounds to it; – for NaN."""
    if math.isnan(share):
        return "–"
    decimals = 2
    text = f"{100 * share:.{decimals}f}"
    while 0.0 < share < 1.0 and float(text) in (0.0, 100.0) and decimals < 9:
        decimals += 1
        text = f"{100 * share:.{decimals}f}"
    return f"{text} %"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.4f}"


def _range(estimate: Estimate, *, percent: bool = True) -> str:
    if not estimate.has_interval:
        return "–"
    low, high = (_percent(e) if percent else _number(e) for e in (estimate.low, estimate.high))
    return f"{low.removesuffix(' %')} – {high}"


def _metrics(evaluation: Evaluation) -> tuple[str, Table]:
    table = plain_table("metric")
    table.add_column("value", justify="right")
    table.add_column(f"{100 * evaluation.confidence:g} % interval", justify="right")
    for key, name in NAMES.items():
        if key in evaluation.metrics:
            estimate, percent = evaluation.metrics[key], key not in ("ece", "nll")
            value = _percent(estimate.value) if percent else _number(estimate.value)
            table.add_row(name, value, _range(estimate, percent=percent))
    return _images(evaluation.n, evaluation.n_groups), table


def _classes(evaluation: Evaluation) -> tuple[str, Table]:
    rows, title = list(evaluation.per_class), "Classes"
    if len(rows) > _MOST:
        present = [row for row in rows if row.count]
        rows = sorted(present, key=lambda row: row.recall.value)[:_MOST]
        title = f"The {len(rows)} classes of lowest recall, of {len(evaluation.classes)}"
    table = plain_table("class")
    for heading in ("images", "recall", "interval", "precision", "F1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = [_percent(row.recall.value), _range(row.recall)]
        shares += [_percent(row.precision.value), _percent(row.f1.value)]
        table.add_row(Text(row.name), str(row.count), *shares)
    return title, table


def _matrix(evaluation: Evaluation) -> tuple[str, Table]:
    """The confusion matrix; columns are numbered as the rows are."""
    table = plain_table("")
    for i in range(len(evaluation.classes)):
        table.add_column(str(i), justify="right", no_wrap=True)
    for i, (name, row) in enumerate(
        zip(evaluation.classes, evaluation.confusion.toarray(), strict=True)
    ):
        cells = [Text(str(n), style="bold" if i == j else "") for j, n in enumerate(row)]
        table.add_row(Text(f"{i} {name}"), *cells)
    return "Confusion: a row for each true class, a column for each predicted one", table


def _confusions(evaluation: Evaluation) -> tuple[str, Table]:
    """The most frequent mistakes."""
    table = plain_table("true")
    table.add_column("predicted")
    for heading in ("images", "of"):
        table.add_column(heading, justify="right", no_wrap=True)
    mistakes = evaluation.confusions(_MOST)
    for i, j, n in mistakes:
        names = Text(evaluation.classes[i]), Text(evaluation.classes[j])
        table.add_row(*names, str(n), str(evaluation.per_class[i].count))
    return "The most frequent confusions" if mistakes else "No confusions", table
