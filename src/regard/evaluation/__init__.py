"""How well a network does, with confidence intervals, and paired comparisons of networks.

>>> predictions = Predictions(probabilities, labels, classes, groups=patients)
>>> evaluate(predictions).metrics["top1"]
>>> diagnose(predictions, positive="malignant").one_class.metrics["sensitivity"]
>>> compare(predictions, others).p_value

`predictions.py` holds and checks predictions. `metrics.py` has the metrics of classification,
`diagnostics.py` those of a diagnostic study, made of `statistics.py`; `thresholds.py` chooses
decision thresholds, `recalibration.py` measures and improves calibration, `comparison.py` compares
two networks on the same images, and `intervals.py` has the confidence intervals. NumPy and SciPy
only; torch is not imported.
"""

from regard.evaluation.comparison import Comparison, compare
from regard.evaluation.diagnostics import Diagnostics, OneClass, diagnose
from regard.evaluation.intervals import Estimate
from regard.evaluation.metrics import ClassResult, Evaluation, evaluate
from regard.evaluation.predictions import Predictions
from regard.evaluation.recalibration import fit_temperature, reliability, with_temperature
from regard.evaluation.thresholds import (
    DecisionCurve,
    Threshold,
    choose_threshold,
    decision_curve,
)

__all__ = [
    "ClassResult",
    "Comparison",
    "DecisionCurve",
    "Diagnostics",
    "Estimate",
    "Evaluation",
    "OneClass",
    "Predictions",
    "Threshold",
    "choose_threshold",
    "compare",
    "decision_curve",
    "diagnose",
    "evaluate",
    "fit_temperature",
    "reliability",
    "with_temperature",
]
