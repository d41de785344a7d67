"""Numbers of the report as text."""

import math

from regard.evaluation import Diagnostics, Estimate


def percent(share: float, decimals: int = 1) -> str:
    """0.978 -> "97.8 %", with a no-break space; never 0 or 100 if it only rounds to them."""
    text = f"{100 * share:.{decimals}f}"
    while 0.0 < share < 1.0 and float(text) in (0.0, 100.0) and decimals < 9:
        decimals += 1
        text = f"{100 * share:.{decimals}f}"
    return f"{text}\u00a0%"


def probability(p: float) -> str:
    """0.93 -> "93 %", with more digits near 1."""
    if p > 0.999:
        return "100\u00a0%" if p == 1.0 else ">\u00a099.9\u00a0%"
    return percent(p, 0 if p < 0.99 else 1)


def percent_range(estimate: Estimate) -> str:
    """ "95.7–98.9 %"; "–" if there is no interval."""
    if math.isnan(estimate.low):
        return "–"
    return f"{percent(estimate.low)[:-2]}–{percent(estimate.high)}"


def number_range(estimate: Estimate) -> str:
    """ "0.912–0.951", "−0.31 to 0.05"; "–" if there is no interval."""
    if not estimate.has_interval:
        return "–"
    low, high = (signed(v) for v in (estimate.low, estimate.high))
    return f"{low} to {high}" if estimate.low < 0 else f"{low}–{high}"


def signed(value: float) -> str:
    """Three decimals, with a minus sign if negative; "∞" if infinite."""
    if math.isinf(value):
        return "∞" if value > 0 else "\N{MINUS SIGN}∞"
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


SPLITS = {"test": "test", "val": "validation", "train": "training"}
NAMES = {
    "roc_auc_macro": "ROC AUC, each class against the rest (macro)",
    "roc_auc_weighted": "ROC AUC, weighted by images",
    "roc_auc_hand_till": "ROC AUC, pairs of classes (Hand and Till)",
    "average_precision_macro": "average precision (macro)",
    "average_precision_weighted": "average precision, weighted by images",
    "mcc": "Matthews correlation (MCC)", "kappa": "Cohen’s kappa", "brier": "Brier score",
    "roc_auc": "ROC AUC", "average_precision": "average precision",
    "ppv": "positive predictive value", "npv": "negative predictive value",
    "lr_positive": "positive likelihood ratio", "lr_negative": "negative likelihood ratio",
    "f1": "F1", "calibration_slope": "calibration slope (ideal 1)",
    "calibration_intercept": "calibration intercept (ideal 0)",
    "ece": "calibration error (ECE)", "nll": "negative log-likelihood (nats)",
    "brier_positive": "Brier score", "top1": "accuracy", "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity", "specificity": "specificity",
}  # fmt: skip


def diagnostic_rows(found: Diagnostics | None) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The metrics of a diagnostic study by table: title, and (name, value, interval) for each."""
    if found is None:
        return []
    tables = [("All classes", found.metrics)]
    if (one := found.one_class) is not None:
        tables.insert(0, (f"{one.positive} against the rest: {one.decision()}", one.metrics))
    return [(title, [_row(name, e) for name, e in each.items()]) for title, each in tables]


def _row(name: str, estimate: Estimate) -> tuple[str, str, str]:
    name = NAMES.get(name, name.replace("_", " "))
    if math.isnan(estimate.value):
        return name, "–", "–"
    return name, signed(estimate.value), number_range(estimate)
