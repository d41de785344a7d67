"""`regard demo`: trains AG-SonoNet-8 on real handwritten digits and shows where it looks.

scikit-learn's digits are 1,797 scans of 8x8 pixels from forms that 43 people filled in
(NIST), 16 grey levels, embedded in the library: nothing is downloaded. It is an ordinary run
of the recipe `demo`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from regard.training import Stopped, train

MARK = ".regard-demo"  # in a folder that a demo may replace


def run(out: Path, *, seed: int, epochs: float, echo: Callable[[str], None]) -> Path:
    """Trains, tests and writes the run folder with its report; returns the folder.

    Raises:
        ValueError: `out` holds something that no demo wrote.
        OSError: `out` can't be written.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file: give --out a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise ValueError(f"{out} holds something else: give --out a new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    try:
        return train("digits", recipe="demo", out=out, echo=echo, seed=seed, epochs=epochs)
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped  # a demo is run again, not resumed
