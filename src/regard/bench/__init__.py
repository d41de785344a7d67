"""How fast the networks predict and train here, each engine beside the authors' way and its twin.

`contestants.py` says what competes and makes it ready, `timing.py` takes the time turn by turn,
`alone.py` measures memory in processes of their own, `results.py` compares and prints, and
`run.py` is `regard bench`.
"""

from regard.bench.alone import measure_alone
from regard.bench.contestants import AUTHORS, COMPILE, DEFAULT_MODELS, Contestant, prepare
from regard.bench.results import Result, append_csv, as_rows, compare, pooled, print_results, slug
from regard.bench.run import Report, plan, run_bench
from regard.bench.timing import take_turns

__all__ = [
    "AUTHORS",
    "COMPILE",
    "DEFAULT_MODELS",
    "Contestant",
    "Report",
    "Result",
    "append_csv",
    "as_rows",
    "compare",
    "measure_alone",
    "plan",
    "pooled",
    "prepare",
    "print_results",
    "run_bench",
    "slug",
    "take_turns",
]
