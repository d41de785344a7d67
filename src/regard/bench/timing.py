"""Fair timing: turns go round all contestants, so that a slow moment hits all alike."""

import math
import random
import time
from collections.abc import Callable, Sequence

from regard.bench.contestants import Step

LEAST = 0.1  # seconds that the timed calls of a turn take together, at least
MOST_CALLS = 1000


def take_turns(
    steps: Sequence[Step],
    turns: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    echo: Callable[[str], None] = lambda line: None,
) -> list[tuple[list[float], int] | Exception]:
    """Times each step in each turn; the order is another in each turn, the same in each run.

    A step that is shorter than LEAST is called several times a turn, after one call that is
    not timed: threads of the contestant before it may still be spinning.

    Args:
        steps: that are ready; each is called twice before the first turn.
        turns: how many.
        clock: seconds.
        echo: is told how long all of it will take.

    Returns:
        For each step the seconds of a call in each turn and the calls of a turn; or what it
        raised.
    """
    calls: dict[int, int] = {}
    found: list[tuple[list[float], int] | Exception] = [([], 0) for _ in steps]
    expected = 0.0
    for k, step in enumerate(steps):
        try:
            step()
            once = _time(step, 1, clock)
        except Exception as error:
            found[k] = error
            continue
        calls[k] = max(1, min(MOST_CALLS, math.ceil(LEAST / once))) if once > 0 else MOST_CALLS
        expected += turns * once * (calls[k] + (calls[k] > 1))
        found[k] = ([], calls[k])
    echo(f"{turns} turns of {len(calls)}, about {expected:.0f} s")
    for turn in range(turns):
        order = sorted(calls)
        random.Random(turn).shuffle(order)
        for k in order:
            seconds = found[k]
            assert isinstance(seconds, tuple)
            try:
                if calls[k] > 1:
                    steps[k]()
                seconds[0].append(_time(steps[k], calls[k], clock))
            except Exception as error:
                found[k] = error
                del calls[k]
    return found


def _time(step: Step, calls: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(calls):
        step()
    return (clock() - started) / calls
