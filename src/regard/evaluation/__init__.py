"""Evaluation of a network with confidence intervals, and paired comparisons of networks.

>>> predictions = Predictions(probabilities, labels, classes, groups=patients)
>>> evaluate(predictions).metrics["top1"]
>>> diagnose(predictions, positive="malignant").one_class.metrics["sensitivity"]
>>> compare(predictions, others).p_value

`predictions.py` holds and checks predictions. `metrics.py` has the classification metrics,
`diagnostics.py` those of a diagnostic study, computed by `statistics.py`; `thresholds.py` chooses
decision thresholds; `recalibration.py` measures and improves calibration, and `calibration.py`
stores both for a run; `subgroups.py` evaluates parts of the images. `comparison.py` and
`paired.py` compare two networks on the same images, with the tests of `significance.py`;
`intervals.py` has the confidence intervals. NumPy and SciPy only; torch is not imported.
"""

from regard.evaluation.calibration import (
    Calibration,
    fit_calibration,
    read_calibration,
    write_calibration,
)
from regard.evaluation.comparison import Comparison, compare
from regard.evaluation.diagnostics import (
    Diagnostics,
    OneClass,
    diagnose,
    diagnose_calibration,
    diagnose_class,
)
from regard.evaluation.ensembles import Averaged, average
from regard.evaluation.intervals import Estimate
from regard.evaluation.metrics import ClassResult, Evaluation, evaluate
from regard.evaluation.paired import MetricComparison, adjust, compare_metrics
from regard.evaluation.predictions import Predictions
from regard.evaluation.recalibration import fit_temperature, reliability, with_temperature
from regard.evaluation.subgroups import (
    Subgroups,
    evaluate_subgroups,
    subgroup_columns,
    subgroups_csv,
)
from regard.evaluation.thresholds import (
    DecisionCurve,
    Threshold,
    choose_threshold,
    decision_curve,
)

__all__ = [
    "Averaged",
    "Calibration",
    "ClassResult",
    "Comparison",
    "DecisionCurve",
    "Diagnostics",
    "Estimate",
    "Evaluation",
    "MetricComparison",
    "OneClass",
    "Predictions",
    "Subgroups",
    "Threshold",
    "adjust",
    "average",
    "choose_threshold",
    "compare",
    "compare_metrics",
    "decision_curve",
    "diagnose",
    "diagnose_calibration",
    "diagnose_class",
    "evaluate",
    "evaluate_subgroups",
    "fit_calibration",
    "fit_temperature",
    "read_calibration",
    "reliability",
    "subgroup_columns",
    "subgroups_csv",
    "with_temperature",
    "write_calibration",
]
