"""The diagnostic part of `regard evaluate`: one class as a test, thresholds, calibration."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from regard.errors import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DiagnosticFlags:
    """What is measured besides the metrics of classification."""

    positive: Annotated[
        str | None,
        Parameter(
            help="A class, evaluated as a diagnostic test against the rest: sensitivity, "
            "specificity, predictive values, likelihood ratios, ROC AUC, calibration; net benefit "
            "in the JSON."
        ),
    ] = None
    at: Annotated[
        str | None,
        Parameter(
            help="Threshold on the probability of --positive, chosen on the validation images: "
            "sensitivity=0.95, specificity=0.9, youden, or cost=5:1 (a false negative costs 5 "
            "false positives). Default: the top-1 class decides."
        ),
    ] = None
    calibrate: Annotated[
        bool,
        Parameter(
            help="Scale the probabilities by the temperature that fits the validation images.",
            negative=(),
        ),
    ] = False
    ordered: Annotated[
        str | None,
        Parameter(help="All classes from lowest to highest, as a,b,c, for the quadratic kappa."),
    ] = None
    max_fpr: Annotated[
        float | None,
        Parameter(help="Largest false positive rate of a partial ROC AUC of --positive."),
    ] = None

    @property
    def order(self) -> list[str] | None:
        """The classes of --ordered."""
        return None if self.ordered is None else [c.strip() for c in self.ordered.split(",")]

    def check(self) -> None:
        """Checks what can be checked before anything is loaded.

        Raises:
            UsageError: a flag without --positive, or out of range.
        """
        from regard.evaluation.thresholds import check_rule

        for name, value in (("at", self.at), ("max-fpr", self.max_fpr)):
            if value is not None and self.positive is None:
                raise UsageError(f"--{name} {value}: name the class with --positive CLASS")
        if self.at is not None:
            try:
                check_rule(self.at)
            except UsageError as error:
                raise UsageError(str(error).replace("rule=", "--at ")) from error
        if self.max_fpr is not None and not 0 < self.max_fpr <= 1:
            raise UsageError(f"--max-fpr {self.max_fpr}: above 0, at most 1")

    def check_classes(self, classes: Sequence[str]) -> None:
        """Checks the named classes before the images are classified.

        Raises:
            UsageError: the network has no such class.
        """
        some = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
        if self.positive is not None and self.positive not in classes:
            raise UsageError(f"--positive {self.positive}: choose one of {some}")
        if self.order is not None and sorted(self.order) != sorted(classes):
            raise UsageError(f"--ordered {self.ordered}: name each class once: {some}")


@dataclass(frozen=True)
class Study:
    """The results of a diagnostic evaluation.

    predictions: calibrated, if that was asked for.
    diagnostics: see `regard.evaluation.diagnose`.
    content: for JSON.
    lines: for people, of the threshold and the temperature.
    """

    predictions: Any
    diagnostics: Any
    content: dict[str, Any]
    lines: list[str]


def study(predictions: Any, flags: DiagnosticFlags, validation: Callable[[], Any]) -> Study:
    """Measures predictions as the flags say; `validation` predicts the validation images."""
    from regard.evaluation import (
        choose_threshold,
        decision_curve,
        diagnose,
        fit_temperature,
        reliability,
        with_temperature,
    )

    content: dict[str, Any] = {"reliability": [vars(b) for b in reliability(predictions)]}
    lines, threshold = [], None
    chosen_on: Any = validation() if flags.calibrate or flags.at is not None else None
    if flags.calibrate:
        temperature = fit_temperature(chosen_on)
        chosen_on = with_temperature(chosen_on, temperature)
        predictions = with_temperature(predictions, temperature)
        content["temperature"] = temperature
        content["reliability_calibrated"] = [vars(b) for b in reliability(predictions)]
        lines.append(f"temperature {temperature:.4g}, fitted on {len(chosen_on)} validation images")
    if flags.at is not None and flags.positive is not None:
        threshold = choose_threshold(chosen_on, flags.positive, flags.at)
        content["threshold"] = threshold.to_dict()
        lines.append(
            f"threshold {threshold.value:.4g} ({flags.at}), chosen on {threshold.images} "
            f"validation images, with sensitivity {threshold.sensitivity:.4f} and specificity "
            f"{threshold.specificity:.4f} there"
        )
    found = diagnose(
        predictions, positive=flags.positive, ordered=flags.order, max_fpr=flags.max_fpr,
        threshold=None if threshold is None else threshold.value,
    )  # fmt: skip
    content |= found.to_dict()
    if flags.positive is not None:
        content["decision_curve"] = decision_curve(predictions, flags.positive).to_dict()
    return Study(predictions, found, content, lines)
