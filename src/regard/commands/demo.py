"""`regard demo`: trains AG-SonoNet-8 on real handwritten digits and shows where it looks.

scikit-learn's digits are 1,797 scans of 8x8 pixels from forms that 43 people filled in
(NIST), 16 gray levels, embedded in the library: nothing is downloaded. It is an ordinary run
of the recipe `demo`.
"""

import logging
import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import SeedFlag
from regard.errors import Stopped, UsageError

SHIPPED = "ag_sononet8.digits"


def command(
    *,
    out: Path = Path("runs/demo"),
    seed: SeedFlag = 0,
    epochs: int = 15,
    fast: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Train AG-SonoNet-8 on handwritten digits and show where it looks.

    Takes under a minute on two cores and downloads nothing. The run's folder holds the network,
    its metrics, and report.html to look at.

    Parameters
    ----------
    out
        Folder of the run. An earlier demo in it is replaced.
    seed
        Random seed for weight initialization, sample order and augmentation; the split stays.
    epochs
        Training epochs.
    fast
        Skip training: use the weights that come with Regard (seed 0, 15 epochs).
    """
    if fast and (seed, epochs) != (0, 15):
        raise UsageError("--fast: nothing is trained; leave out --seed and --epochs")
    if epochs < 1:
        raise UsageError(f"--epochs {epochs}: at least 1")
    if fast:
        take_shipped(out)
    else:
        run(out, seed=seed, epochs=epochs)
    return 0


log: logging.Logger = logging.getLogger(__name__)
MARK = ".regard-demo"  # in a folder that a demo may replace


def run(out: Path, *, seed: int, epochs: float) -> Path:
    """Trains, tests and writes the run folder with its report; returns the folder.

    Raises:
        UsageError: `out` holds something that no demo wrote.
        OSError: `out` can't be written.
    """
    _prepare(out)
    from regard.commands.train import train

    try:
        return train("digits", recipe="demo", out=out, seed=seed, epochs=epochs)
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped  # a demo is run again, not resumed


def take_shipped(out: Path) -> Path:
    """Tests the shipped weights on the digits that they were not trained on; see `run`.

    The folder is as after the training that made them, but for TensorBoard's events.
    """
    _prepare(out)
    from dataclasses import replace

    from regard.data.content import content_hashes
    from regard.data.sources import open_data
    from regard.data.splits_file import write_splits
    from regard.evaluation import evaluate
    from regard.models.io import network_folder
    from regard.report.build import report_run
    from regard.run_data import predictions_of
    from regard.runs import RunFolder
    from regard.trained_on import KNOWN, known_images
    from regard.training.finish import accuracy_words

    source = network_folder(SHIPPED)
    known = known_images(source)
    assert known is not None
    for path in source.iterdir():
        if path.name != KNOWN:
            shutil.copyfile(path, out / path.name)
    table = open_data("digits")
    hashes = content_hashes(table)
    write_splits(replace(table, splits=known.splits_of(hashes)), out / "splits.csv", hashes)
    split, said, _ = predictions_of(out)
    found = evaluate(said)
    RunFolder(out).write_evaluation(split, found, said)
    log.info(f"{SHIPPED}, already trained: {accuracy_words(found, split)}")
    log.info(f"the network: {out}")
    log.info(f"the report: {report_run(out)}")
    return out


def _prepare(out: Path) -> None:
    """Makes the folder of a demo, in place of an earlier one."""
    if out.is_file():
        raise UsageError(f"{out} is a file: give --out a folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise UsageError(f"{out} holds something else: give --out a new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
