"""How well a network does, and how sure that is: metrics with intervals, and paired comparisons.

>>> predictions = Predictions(probabilities, labels, classes, groups=patients)
>>> print_evaluation(evaluate(predictions))
>>> compare(predictions, of_another_network).p_value

`predictions.py` holds what a network said, `metrics.py` the metrics, `intervals.py` what their
intervals are made of, `comparison.py` two networks on the same images, `tables.py` the tables
of the command line. All is NumPy on arrays; torch is not imported.
"""

from regard.evaluation.comparison import Comparison, compare
from regard.evaluation.intervals import Estimate
from regard.evaluation.metrics import ClassResult, Evaluation, evaluate
from regard.evaluation.predictions import Predictions

__all__ = [
    "ClassResult",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Predictions",
    "compare",
    "evaluate",
]
