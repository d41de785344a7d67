"""What `regard bench` does with its flags."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regard.bench.contestants import DEFAULT_MODELS
from regard.bench.results import append_csv, check_csv, columns, print_results
from regard.bench.run import run_bench


def command(
    models: Sequence[str] | None,
    *,
    csv: Path | None,
    as_json: bool,
    echo: Callable[[str], None],
    **choices: Any,
) -> int:
    """Measures, prints a table or JSON, adds rows to a CSV file; 1 if nothing was measured.

    Raises:
        UsageError: a wrong choice, told before anything is measured.
        OSError: the CSV file can't be written.
    """
    if csv is not None:
        check_csv(csv, columns())
    report = run_bench(models or DEFAULT_MODELS, echo=echo, **choices)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_results(report.results, report.header)
    if csv is not None:
        append_csv(csv, report.rows())
    return 0 if any(r.fault is None for r in report.results) else 1
