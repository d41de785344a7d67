"""What `regard bench` does with its flags."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

log = logging.getLogger(__name__)


def command(
    model: Annotated[list[str] | None, Parameter(negative=())] = None,
    /,
    *,
    peers: Annotated[bool, Parameter(negative=())] = False,
    engine: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    precision: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    train: Annotated[bool, Parameter(negative=())] = False,
    batch_size: Annotated[list[int] | None, Parameter(negative=(), consume_multiple=True)] = None,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    turns: int = 10,
    memory: Annotated[bool, Parameter(negative=())] = False,
    device: str = "cpu",
    json: bool = False,
    csv: Path | None = None,
) -> int:
    """Measure how fast networks predict here, beside the authors' way and their plain twins.

    The weights are random and the images noise: neither changes the time.

    Parameters
    ----------
    model
        Networks' names; without: cbam_resnet50, attention56 and ag_sononet8.
    peers
        Also the same networks of pytorchcv and timm.
    engine
        eager, compiled, onnxruntime, openvino; without: all that are installed.
    precision
        fp32, bf16, int8 (of openvino), or auto: all that the machine computes in.
    train
        Measure training steps as well.
    batch_size
        Images at a time; without: 8.
    size
        Height and width of the images; without: each network's own.
    threads
        Of the CPU; without: as many as torch takes.
    turns
        In which each is timed; more is surer.
    memory
        Measure each one's peak memory too, in a process of its own.
    device
        cpu or cuda.
    json
        Print JSON, with each turn's seconds.
    csv
        Add the rows to a CSV file.
    """
    return run_and_print(
        model, csv=csv, as_json=json, echo=log.warning, peers=peers, engines=engine,
        precisions=precision or ["auto"], train=train, batch_sizes=batch_size or [8], size=size,
        threads=threads, turns=turns, memory=memory, device=device,
    )  # fmt: skip


def run_and_print(
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
    from regard.bench.contestants import DEFAULT_MODELS
    from regard.bench.results import append_csv, check_csv, columns, print_results
    from regard.bench.run import run_bench

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
