"""`regard demo`: trains AG-SonoNet-8 on real handwritten digits and shows where it looks.

scikit-learn's digits are 1,797 scans of 8x8 pixels from forms that 43 people filled in
(NIST), 16 gray levels, embedded in the library: nothing is downloaded. It is an ordinary run
of the recipe `demo`.
"""

import shutil
from pathlib import Path

from regard.errors import Stopped, UsageError


def command(*, out: Path = Path("runs/demo"), seed: int = 0, epochs: int = 15) -> int:
    """Train AG-SonoNet-8 on handwritten digits and show where it looks.

    Takes under a minute on two cores and downloads nothing. The run's folder holds the network,
    its metrics, and report.html to look at.

    Parameters
    ----------
    out
        Folder of the run. An earlier demo in it is replaced.
    seed
        Random seed for the split, weight initialization and augmentation.
    epochs
        Training epochs.
    """
    if epochs < 1:
        raise UsageError(f"--epochs {epochs}: at least 1")
    run(out, seed=seed, epochs=epochs)
    return 0


MARK = ".regard-demo"  # in a folder that a demo may replace


def run(out: Path, *, seed: int, epochs: float) -> Path:
    """Trains, tests and writes the run folder with its report; returns the folder.

    Raises:
        UsageError: `out` holds something that no demo wrote.
        OSError: `out` can't be written.
    """
    if out.is_file():
        raise UsageError(f"{out} is a file: give --out a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UsageError(f"{out} holds something else: give --out a new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    from regard.commands.train import train

    try:
        return train("digits", recipe="demo", out=out, seed=seed, epochs=epochs)
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped  # a demo is run again, not resumed
