"""`regard errors`: the labels that may be wrong, ranked."""

import json as json_format
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from regard.commands.flags import JsonFlag, check_page
from regard.errors import UsageError
from regard.log import info_on_stderr


def command(
    runs: Annotated[list[Path], Parameter(name="RUN")],
    /,
    *,
    data: str | None = None,
    top: int = 100,
    html: Path | None = None,
    csv: Path | None = None,
    json: JsonFlag = False,
    root: Path | None = None,
) -> int:
    """Rank the images whose labels may be wrong, by the loss of networks trained on the others.

    Give the runs of a cross-validation (`regard train --fold 1/5 ...`) together, or a study's
    folder: then every image is ranked by a network that was not trained on it. For a single run
    this holds only for its validation and test images.

    Parameters
    ----------
    runs
        Runs on the same data, or folders that hold them.
    data
        Where the data is now, if it was moved.
    top
        Images to list.
    html
        Write a page with their pictures to this file.
    csv
        Write all images, ranked, to this file.
    json
        Print JSON.
    root
        Folder of cifar10 and cifar100.
    """
    if top < 1:
        raise UsageError(f"--top {top}: at least 1")
    if html is not None:
        check_page(html)
    if csv is not None and csv.exists():
        raise UsageError(f"--csv {csv}: exists; it is not replaced")
    if csv is not None and not csv.absolute().parent.is_dir():
        raise UsageError(f"--csv {csv}: its folder does not exist")
    from regard.files import write_text
    from regard.report.label_errors import (
        find_label_errors,
        sample_note,
        to_csv,
        write_errors_page,
    )

    with info_on_stderr():
        suspects, table = find_label_errors(runs, data=data, root=root)
    shown = suspects[:top]
    if csv is not None:
        write_text(csv, to_csv(suspects))
    if html is not None:
        write_errors_page(shown, table, html)
    if json:
        print(json_format.dumps([asdict(s) for s in shown], indent=1))
    else:
        print(to_csv(shown).encode("utf-8", "backslashreplace").decode(), end="")
        print(f"regard: {sample_note(suspects)}", file=sys.stderr)
    return 0
