"""Temperature and threshold, fitted on validation images.

They are stored in a run's `calibration.json`, which predict, evaluate, serve and export read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regard.errors import UsageError
from regard.evaluation.metrics import evaluate
from regard.evaluation.predictions import Predictions, units_of
from regard.evaluation.recalibration import (
    ReliabilityBin,
    fit_temperature,
    reliability,
    with_temperature,
)
from regard.evaluation.statistics import reaches
from regard.evaluation.thresholds import Threshold, choose_threshold
from regard.files import reason, write_text

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A temperature and a threshold, and what they were fitted on.

    Attributes:
        temperature: the logits are divided by it; 1 changes nothing.
        threshold: on the scaled probability of one class, or None: the top-1 class decides.
        source: description of the images, such as "validation images of the run".
        images, groups: their numbers; groups is None if images are independent.
        before, after: "nll" and "ece" of these images without and with the temperature.
        reliability, reliability_calibrated: the bins of their reliability diagrams.
        network: content hash of the weights; '' if not known.
        tta: the test-time augmentation of the predictions: "flips", or None; the calibration is
            valid only for this one.
    """

    temperature: float
    threshold: Threshold | None
    source: str
    images: int
    groups: int | None
    before: dict[str, float]
    after: dict[str, float]
    reliability: list[ReliabilityBin]
    reliability_calibrated: list[ReliabilityBin]
    network: str = ""
    tta: str | None = None

    def apply(self, predictions: Predictions) -> Predictions:
        """The predictions with this temperature applied."""
        if self.temperature == 1.0:
            return predictions
        return with_temperature(predictions, self.temperature)

    def decide(self, probabilities: Mapping[str, float]) -> str | None:
        """The positive class if its probability reaches the threshold, else its complement.

        Args:
            probabilities: scaled probabilities of all classes, by class.

        Returns:
            A class name, or "not NAME" with more than two classes; None without a threshold.
        """
        if self.threshold is None:
            return None
        name = self.threshold.positive
        if reaches(probabilities[name], self.threshold.value):
            return name
        others = [other for other in probabilities if other != name]
        return others[0] if len(others) == 1 else f"not {name}"

    def sentence(self) -> str:
        """A one-line description."""
        parts = [] if self.temperature == 1.0 else [f"temperature {self.temperature:.4g}"]
        if self.threshold is not None:
            parts.append(self.threshold.sentence())
        how = "" if self.tta is None else f", with test-time {self.tta}"
        return f"{' and '.join(parts)}, from {self.images:,} {self.source}{how}"

    def lines(self) -> list[str]:
        """What it changed on the images that it was fitted on, a line each."""
        found = []
        if self.temperature != 1.0:
            found.append(
                f"temperature {self.temperature:.4g}: negative log-likelihood "
                f"{self.before['nll']:.4f} to {self.after['nll']:.4f} nats, calibration error "
                f"(ECE) {self.before['ece']:.4f} to {self.after['ece']:.4f}"
            )
        if (t := self.threshold) is not None:
            found.append(
                f"{t.sentence()}: sensitivity {t.sensitivity:.4f}, specificity "
                f"{t.specificity:.4f} there"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        threshold = None if self.threshold is None else self.threshold.to_dict()
        return {**asdict(self), "threshold": threshold}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Calibration":
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: the content is malformed.
        """
        content = dict(content)
        if not (math.isfinite(content["temperature"]) and content["temperature"] > 0):
            raise ValueError("temperature")
        if (threshold := content["threshold"]) is not None:
            value = math.inf if threshold["value"] is None else float(threshold["value"])
            content["threshold"] = Threshold(**{**threshold, "value": value})
        for name in ("reliability", "reliability_calibrated"):
            content[name] = [
                ReliabilityBin(**{**b, "interval": tuple(b["interval"])}) for b in content[name]
            ]
        return cls(**content)


def fit_calibration(
    validation: Predictions,
    *,
    positive: str | None = None,
    rule: str | None = None,
    temperature: bool = True,
    source: str = "validation images",
    network: str = "",
    tta: str | None = None,
) -> Calibration:
    """Fits the temperature, then chooses the threshold on the scaled probabilities.

    Args:
        validation: unscaled predictions of images used neither to train nor to test the network.
        positive: the class of the threshold, together with `rule`.
        rule: as for `choose_threshold`.
        temperature: whether to fit one.
        source: description of the images.
        network: content hash of the weights.
        tta: the test-time augmentation of the predictions, "flips" or None.

    Raises:
        UsageError: too few images, no such class or rule, or nothing to fit.
    """
    if (positive is None) != (rule is None):
        raise UsageError("positive and rule: a threshold needs both")
    if not temperature and rule is None:
        raise UsageError("neither a temperature nor a threshold was asked for")
    fitted = fit_temperature(validation) if temperature else 1.0
    scaled = with_temperature(validation, fitted) if temperature else validation
    threshold = None
    if positive is not None and rule is not None:
        threshold = choose_threshold(scaled, positive, rule)
    grouped = validation.groups is not None
    return Calibration(
        temperature=fitted, threshold=threshold, source=source, images=len(validation),
        groups=units_of(validation)[1] if grouped else None,
        before=_fit(validation), after=_fit(scaled),
        reliability=reliability(validation), reliability_calibrated=reliability(scaled),
        network=network, tta=tta,
    )  # fmt: skip


def _fit(predictions: Predictions) -> dict[str, float]:
    metrics = evaluate(predictions, resamples=2).metrics
    return {name: metrics[name].value for name in ("nll", "ece")}


def read_calibration(folder: str | Path) -> Calibration | None:
    """The calibration stored in a run's folder, or None.

    Raises:
        UsageError: the file is damaged.
    """
    path = Path(folder) / FILE
    try:
        return Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} can't be read ({reason(error)}): calibrate the run again, or remove the file"
        ) from error


def write_calibration(folder: str | Path, calibration: Calibration) -> Path:
    """Stores a calibration in a run's folder, atomically.

    Raises:
        StateError: it can't be written; an earlier one is unchanged.
    """
    path = Path(folder) / FILE
    write_text(path, json.dumps(calibration.to_dict(), indent=1) + "\n")
    return path
