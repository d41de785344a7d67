"""Numbers of the report in words."""

import math

from regard.evaluation import Estimate


def percent(share: float, decimals: int = 1) -> str:
    """0.978 -> "97.8 %", a no-break space within; never 0 or 100 for what only rounds to it."""
    text = f"{100 * share:.{decimals}f}"
    while 0.0 < share < 1.0 and float(text) in (0.0, 100.0) and decimals < 9:
        decimals += 1
        text = f"{100 * share:.{decimals}f}"
    return f"{text}\u00a0%"


def probability(p: float) -> str:
    """0.93 -> "93 %", more digits near 1."""
    if p > 0.999:
        return "100\u00a0%" if p == 1.0 else ">\u00a099.9\u00a0%"
    return percent(p, 0 if p < 0.99 else 1)


def percent_range(estimate: Estimate) -> str:
    """ "95.7–98.9 %"; "–" where there is no interval."""
    if math.isnan(estimate.low):
        return "–"
    return f"{percent(estimate.low)[:-2]}–{percent(estimate.high)}"
