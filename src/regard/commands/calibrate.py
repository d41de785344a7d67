"""`regard calibrate`: the temperature and the threshold of a run."""

import logging
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, JsonFlag, SplitsFlag, TtaFlag, require_data
from regard.errors import UsageError
from regard.files import plural

if TYPE_CHECKING:
    from regard.evaluation import Calibration

log: logging.Logger = logging.getLogger(__name__)


def command(
    run: Annotated[Path, Parameter(name="RUN")],
    source: Annotated[str | None, Parameter(name="DATA")] = None,
    /,
    *,
    positive: str | None = None,
    at: str | None = None,
    temperature: bool = True,
    split: Literal["train", "val", "test", "all"] | None = None,
    splits: SplitsFlag = "auto",
    root: Path | None = None,
    device: DeviceFlag = "auto",
    tta: TtaFlag = None,
    remove: Annotated[bool, Parameter(negative=())] = False,
    json: JsonFlag = False,
) -> int:
    """Fit a temperature and choose a threshold on a run's validation images.

    Both are stored in the run's calibration.json. predict, evaluate, explain, serve and export
    use them from then on, and say so; evaluate reports what they do on the test images. --tta,
    --size, --crop-pct and --ten-crop change the probabilities: what was fitted with --tta flips is
    used only with --tta flips, and with the other three no calibration is used.

    Parameters
    ----------
    run
        A run's folder.
    source
        Labeled images to calibrate on, for a run without validation images. Images that the run
        was trained or tested on are left out. Default: the run's own validation images.
    positive
        The class whose probability is compared with the threshold.
    at
        How to choose its threshold: sensitivity=0.95, specificity=0.9, youden, or cost=5:1 (a
        false negative costs 5 false positives). Default: no threshold.
    temperature
        Fit the temperature by which the logits are divided.
    split
        Split of DATA. Default: its validation images, or those without a split.
    splits
        Whether the top folders of DATA are splits rather than classes.
    root
        Folder of cifar10 and cifar100.
    remove
        Remove the stored calibration; RUN is given alone.
    json
        Print JSON.
    """
    if remove:
        given = (source, positive, at, split, root, tta)
        if any(each is not None for each in given) or not temperature or splits != "auto" or json:
            raise UsageError("--remove: give RUN alone")
        return _remove(run)
    _check(positive, at, temperature, split, source)
    require_data(source)
    from regard.calibrating import calibrate

    found = calibrate(
        run, source, positive=positive, rule=at, temperature=temperature, split=split,
        root=root, splits=splits, device=device, tta=tta,
    )  # fmt: skip
    if json:
        print(dumps(found.to_dict(), indent=2))
    else:
        _print(run, found)
    return 0


def _remove(run: Path) -> int:
    from regard.calibrating import remove_calibration

    print(f"{run}: {'removed' if remove_calibration(run) else 'has no'} calibration")
    return 0


def _check(
    positive: str | None, at: str | None, temperature: bool, split: str | None, source: str | None
) -> None:
    """Checks what can be checked before anything is loaded."""
    from regard.evaluation.thresholds import check_rule

    if at is not None and positive is None:
        raise UsageError(f"--at {at}: name the class with --positive CLASS")
    if positive is not None and at is None:
        raise UsageError(f"--positive {positive}: give --at, such as --at sensitivity=0.95")
    if at is None and not temperature:
        raise UsageError("--no-temperature: without --positive and --at nothing is left to do")
    if split is not None and source is None:
        raise UsageError(f"--split {split}: only with DATA")
    if at is not None:
        try:
            check_rule(at)
        except UsageError as error:
            raise UsageError(str(error).replace("rule=", "--at ")) from error


def _print(run: Path, found: "Calibration") -> None:
    groups = "" if found.groups is None else f" in {plural(found.groups, 'group')}"
    print(f"{run}, on {found.images:,} {found.source}{groups}")
    for line in found.lines():
        print(line)
    if found.threshold is not None:
        print(f"`regard evaluate {run}` tests the threshold")
