"""`regard bench`: how fast networks predict on this machine, engine by engine."""

import logging
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from regard.errors import UsageError
from regard.log import info_on_stderr

log = logging.getLogger(__name__)
NETWORKS = ("cbam_resnet50", "attention56", "ag_sononet8")
EngineName = Literal["eager", "compiled", "onnxruntime", "openvino"]
Precision = Literal["auto", "fp32", "bf16", "int8"]
Several = Parameter(negative=(), consume_multiple=True)


def command(
    network: Annotated[list[str] | None, Parameter(name="NETWORK", negative=())] = None,
    /,
    *,
    engine: Annotated[list[EngineName] | None, Several] = None,
    precision: Annotated[list[Precision] | None, Several] = None,
    batch_size: Annotated[list[int] | None, Several] = None,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    rounds: int = 10,
    device: Literal["cpu", "cuda"] = "cpu",
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Measure how fast networks predict on this machine, engine by engine.

    From a batch of images in memory to probabilities, on noise, with random weights for networks
    given by name: neither changes the time.

    Parameters
    ----------
    network
        Networks' names or runs' folders; default: cbam_resnet50, attention56, ag_sononet8.
    engine
        Engines to measure; default: all that are installed.
    precision
        Precisions to measure (int8: OpenVINO only); default: all that the machine computes in.
    batch_size
        Batch sizes; default: 8.
    size
        Height and width of the images; default: each network's own.
    threads
        CPU threads; default: all cores.
    rounds
        Timing rounds; more give a tighter estimate.
    device
        Device of eager and compiled.
    json
        Print JSON, with the seconds of each round.
    """
    batches = batch_size or [8]
    given = {"batch-size": batches, "size": size or (), "threads": (threads,), "rounds": (rounds,)}
    for flag, numbers in given.items():
        if any(n is not None and n < 1 for n in numbers):
            raise UsageError(f"--{flag} {' '.join(map(str, numbers))}: at least 1")
    engines = engine or list(get_args(EngineName))
    from regard.engines.bench import installed

    with info_on_stderr():
        pairs = installed(engines, precision or ["auto"], device)
        machine, results = _measure(
            network or NETWORKS, pairs, batches, size, threads, device, rounds
        )
    if json:
        from json import dumps

        print(dumps({"machine": machine, "results": results}, indent=2, default=vars))
    else:
        from regard.machine import describe

        print(describe(machine))
        for r in results:
            print(f"\n{r['network']}, batch {r['batch']}, {'x'.join(map(str, r['size']))}")
            _print_table(r["engines"], r["batch"])
    return 0 if any(t.fault is None for r in results for t in r["engines"]) else 1


def _measure(
    names: Any, pairs: Any, batches: Any, size: Any, threads: int | None, device: str, rounds: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine, and the timings of each network and batch size."""
    import torch

    from regard.engines import bench
    from regard.machine import describe_machine

    torch.set_num_threads(threads or torch.get_num_threads())
    results = []
    for name in dict.fromkeys(names):
        model, preprocess = bench.network(name, size)
        for batch in dict.fromkeys(batches):
            log.info("%s, batch %d", name, batch)
            timings = bench.bench(model.to(device), preprocess, pairs, batch=batch, rounds=rounds)
            shape = list(preprocess.input_size)
            results.append({"network": name, "batch": batch, "size": shape, "engines": timings})
        torch.compiler.reset()  # it gives up on a function that it compiled too often
    return describe_machine(torch.device(device)), results


def _print_table(timings: Any, batch: int) -> None:
    """The engines, fastest first; each that failed has had its line."""
    rows = sorted((t for t in timings if t.fault is None), key=lambda t: t.quartiles[1])
    eager = [t.quartiles[1] for t in rows if (t.engine, t.precision) == ("eager", "fp32")]
    print("engine       precision        ms        quartiles  images/s  x eager fp32  start s")
    for t in rows:
        low, median, high = (1e3 * q for q in t.quartiles)
        ratio = f"{1e3 * eager[0] / median:.2f}" if eager else ""
        print(
            f"{t.engine:<12} {t.precision:<9} {median:9.1f} {f'{low:.1f}-{high:.1f}':>16} "
            f"{1e3 * batch / median:9,.1f} {ratio:>13} {t.startup:8.1f}"
        )
