"""The diagnostic part of `regard evaluate`: one class as a test, thresholds, calibration."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from regard.errors import UsageError
from regard.files import plural

if TYPE_CHECKING:
    from regard.evaluation import Calibration

log: logging.Logger = logging.getLogger(__name__)


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
            "false positives). Default: the threshold that `regard calibrate` stored, else the "
            "top-1 class decides."
        ),
    ] = None
    calibrate: Annotated[
        bool | None,
        Parameter(
            help="Scale the probabilities by the temperature that fits the validation images; "
            "--no-calibrate ignores what `regard calibrate` stored. Default: what it stored."
        ),
    ] = None
    ordered: Annotated[
        str | None,
        Parameter(help="All classes from lowest to highest, as a,b,c, for the quadratic kappa."),
    ] = None
    max_fpr: Annotated[
        float | None,
        Parameter(help="Largest false positive rate of a partial ROC AUC of --positive."),
    ] = None

    def order(self, classes: Sequence[str]) -> list[str] | None:
        """The classes of --ordered, whose names may have commas themselves."""
        if self.ordered is None:
            return None
        pieces = self.ordered.split(",")
        return _divided(pieces, set(classes)) or [piece.strip() for piece in pieces]

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
        order = self.order(classes)
        if order is not None and sorted(order) != sorted(classes):
            raise UsageError(f"--ordered {self.ordered}: name each class once: {some}")


def _divided(pieces: list[str], names: set[str]) -> list[str] | None:
    """Pieces between commas joined so that they name each class once; None: they do not."""
    if not pieces:
        return None if names else []
    for count in range(1, len(pieces) + 1):
        name = ",".join(pieces[:count]).strip()
        rest = _divided(pieces[count:], names - {name}) if name in names else None
        if rest is not None:
            return [name, *rest]
    return None


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


def study(
    predictions: Any,
    flags: DiagnosticFlags,
    validation: Callable[[], Any],
    stored: "Calibration | None" = None,
) -> Study:
    """Measures predictions as the flags say.

    Args:
        predictions: unscaled.
        flags: they go before what is stored.
        validation: predicts the validation images, unscaled.
        stored: the run's calibration.
    """
    from regard.evaluation import decision_curve, diagnose, reliability

    content: dict[str, Any] = {"reliability": [vars(b) for b in reliability(predictions)]}
    used, lines = _calibration(flags, validation, stored)
    threshold = None if used is None else used.threshold
    positive = flags.positive or (threshold.positive if threshold else None)
    if used is not None and used.temperature != 1.0:
        predictions = used.apply(predictions)
        content["temperature"] = used.temperature
        content["reliability_calibrated"] = [vars(b) for b in reliability(predictions)]
    if used is not None:
        content["calibrated_on"] = f"{used.images} {used.source}"
    if threshold is not None:
        content["threshold"] = threshold.to_dict()
    found = diagnose(
        predictions, positive=positive, ordered=flags.order(predictions.classes),
        max_fpr=flags.max_fpr, threshold=None if threshold is None else threshold.value,
    )  # fmt: skip
    content |= found.to_dict()
    if len(kinds := set(predictions.labels.tolist())) == 1:
        of = predictions.classes[kinds.pop()]
        images = plural(len(predictions), "image")
        log.warning(f"{images}, all of {of}: ROC AUC is not defined")
    if positive is not None:
        content["decision_curve"] = decision_curve(predictions, positive).to_dict()
    return Study(predictions, found, content, lines)


def _calibration(
    flags: DiagnosticFlags, validation: Callable[[], Any], stored: "Calibration | None"
) -> tuple["Calibration | None", list[str]]:
    """The calibration to use, made on the spot where a flag asks for it, and what to say of it."""
    from regard.evaluation import choose_threshold, fit_calibration

    used = stored if flags.calibrate is None else None
    if used is not None and flags.positive not in (
        None,
        used.threshold and used.threshold.positive,
    ):
        used = replace(used, threshold=None)  # it is of another class
    if flags.calibrate or (flags.at is not None and used is None):
        used = fit_calibration(
            validation(), positive=flags.positive if flags.at else None, rule=flags.at,
            temperature=bool(flags.calibrate),
        )  # fmt: skip
    elif used is not None and flags.at is not None and flags.positive is not None:
        chosen = choose_threshold(used.apply(validation()), flags.positive, flags.at)
        used = replace(used, threshold=chosen)
    if used is None:
        return None, []
    lines = []
    if used.temperature != 1.0:
        lines.append(f"temperature {used.temperature:.4g}, fitted on {used.images:,} {used.source}")
    if (t := used.threshold) is not None:
        lines.append(
            f"{t.sentence()}, chosen on {plural(t.images, 'validation image')}, with sensitivity "
            f"{t.sensitivity:.4f} and specificity {t.specificity:.4f} there"
        )
    return used, lines
