"""`regard bench`: how fast networks predict, or train, on this machine, engine by engine."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter

from regard.commands.flags import DeviceFlag, JsonFlag, SizeFlag, height_and_width
from regard.errors import UsageError
from regard.log import info_on_stderr

log: logging.Logger = logging.getLogger(__name__)
MOST_THREADS = 1024  # 100,000,000 crash the process
NETWORKS = ("cbam_resnet50", "attention56", "ag_sononet8")
EngineName = Literal["eager", "fused", "compiled", "graphs", "onnxruntime", "openvino"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "int8"]
Several: Parameter = Parameter(negative=(), consume_multiple=True)


def command(
    network: Annotated[list[str] | None, Parameter(name="NETWORK", negative=())] = None,
    /,
    *,
    train: Annotated[bool, Parameter(negative=())] = False,
    recipe: str | None = None,
    engine: Annotated[list[EngineName] | None, Several] = None,
    precision: Annotated[list[Precision] | None, Several] = None,
    batch_size: Annotated[list[int] | None, Several] = None,
    size: SizeFlag = None,
    threads: int | None = None,
    rounds: int = 10,
    device: DeviceFlag = "auto",
    json: JsonFlag = False,
) -> int:
    """Measure how fast networks predict or train on this machine, engine by engine.

    Predicting is from a batch of images in memory to probabilities; a training step is forward,
    backward and optimizer on images that are on the device. Both use noise as images, and random
    weights for networks given by name; neither affects the timing.

    Parameters
    ----------
    network
        Network names or run folders, before the flags; default: cbam_resnet50, attention56,
        ag_sononet8.
    train
        Measure training steps. Networks named together are timed in the same rounds, and
        attention networks are compared with their plain twin if that is named too.
    recipe
        With --train: the recipe whose optimizer and loss a step uses; default: quick.
    engine
        Engines to measure; default: all installed ones; eager and compiled with --train. fused
        (--train only) computes the end of ResNet blocks with CBAM as one operator; graphs (--train
        on CUDA only) does so too and replays the passes as CUDA graphs.
    precision
        Precisions to measure (int8: OpenVINO only; tf32 and fp16: training on GPUs only);
        default: fp32, plus bf16 and int8 where the hardware supports them.
    batch_size
        Batch sizes; default: 8.
    threads
        CPU threads; default: all cores.
    rounds
        Timing rounds; more give a tighter estimate.
    json
        Print JSON, with the seconds of each round.
    """
    batches = batch_size or [8]
    given = {"batch-size": batches, "threads": (threads,), "rounds": (rounds,)}
    for flag, numbers in given.items():
        if any(n is not None and n < 1 for n in numbers):
            raise UsageError(f"--{flag} {' '.join(map(str, numbers))}: at least 1")
    if threads is not None and threads > MOST_THREADS:
        raise UsageError(f"--threads {threads}: at most {MOST_THREADS}")
    if recipe is not None and not train:
        raise UsageError(f"--recipe {recipe}: only with --train")
    asked = _Asked(
        list(network or NETWORKS), engine, precision or ["auto"], batches, height_and_width(size),
        rounds, recipe or "quick",
    )  # fmt: skip
    from regard.machine import choose_device, describe_machine

    where = choose_device(device)
    _use_threads(threads)
    with info_on_stderr():
        results = _training(asked, where) if train else _predicting(asked, where)
        machine = describe_machine(where)
    if json:
        from json import dumps

        print(dumps({"machine": machine, "results": results}, indent=2, default=vars))
    else:
        _print(machine, results, train)
    return 1 if any(t.fault is not None for r in results for t in r["engines"]) else 0


@dataclass(frozen=True)
class _Asked:
    networks: list[str]
    engines: Sequence[str] | None
    precisions: Sequence[str]
    batches: Sequence[int]
    size: tuple[int, int] | None
    rounds: int
    recipe: str


def _use_threads(threads: int | None) -> None:
    import torch

    torch.set_num_threads(threads or torch.get_num_threads())


def _predicting(asked: _Asked, device: Any) -> list[dict[str, Any]]:
    """The timings of each network and batch size."""
    import torch

    from regard.engines import bench

    narrow = {"tf32", "fp16"} & set(asked.precisions)
    if narrow:
        raise UsageError(f"--precision {' '.join(sorted(narrow))}: only with --train")
    training = {"fused", "graphs"}
    engines = asked.engines or [n for n in get_args(EngineName) if n not in training]
    for name in training.intersection(engines):
        raise UsageError(f"--engine {name}: only with --train")
    pairs = bench.installed(engines, asked.precisions, device)
    results = []
    networks = {name: bench.network(name, asked.size) for name in asked.networks}
    for name, (model, preprocess) in networks.items():  # none is measured if one is wrong
        for batch in dict.fromkeys(asked.batches):
            log.info("%s, batch %d", name, batch)
            timings = bench.bench(
                model.to(device), preprocess, pairs, batch=batch, rounds=asked.rounds
            )
            shape = list(preprocess.input_size)
            results.append({"network": name, "batch": batch, "size": shape, "engines": timings})
        torch.compiler.reset()  # it gives up on a function that it compiled too often
    return results


def _training(asked: _Asked, device: Any) -> list[dict[str, Any]]:
    """The timings of each batch size, of all networks together."""
    import torch

    from regard.training.bench import USUAL, bench_training, trainable
    from regard.training.recipe_files import load_recipe

    cases = trainable(asked.engines or USUAL, asked.precisions, device)
    recipe = load_recipe(asked.recipe).for_start(random=False)  # with Muon's rate for gates
    results = []
    for batch in dict.fromkeys(asked.batches):
        log.info("training, batch %d", batch)
        timings = bench_training(
            asked.networks, cases, recipe, device, batch=batch, size=asked.size,
            rounds=asked.rounds,
        )  # fmt: skip
        results.append({
            "batch": batch, "recipe": asked.recipe, "optimizer": recipe.optimizer,
            "engines": timings,
        })  # fmt: skip
        torch.compiler.reset()
    return results


def _print(machine: dict[str, Any], results: list[dict[str, Any]], train: bool) -> None:
    from regard.machine import describe

    print(describe(machine))
    for r in results:
        if train:
            named = f"{r['recipe']} ({r['optimizer']})"
            print(f"\ntraining steps of recipe {named}, batch {r['batch']}")
            _print_training(r["engines"], r["batch"])
        else:
            print(f"\n{r['network']}, batch {r['batch']}, {'x'.join(map(str, r['size']))}")
            _print_table(r["engines"], r["batch"])


def _print_training(timings: Any, batch: int) -> None:
    """The cases in the order in which they were named; each that failed has had its line."""
    from regard.training.bench import over_plain

    width = max(7, *(len(t.network) for t in timings))
    heading = "engine   precision  ms a step        quartiles  images/s  x plain  memory  start s"
    print(f"{'network':<{width}}  {heading}")
    for t in (t for t in timings if t.fault is None):
        low, median, high = (1e3 * q for q in t.quartiles)
        ratio = over_plain(t, timings)
        memory = "" if t.memory is None else f"{t.memory / 1e9:.2f} GB"
        print(
            f"{t.network:<{width}}  {t.engine:<8} {t.precision:<9} {median:10.1f} "
            f"{f'{low:.1f}-{high:.1f}':>16} {1e3 * batch / median:9,.1f} "
            f"{'' if ratio is None else f'{ratio:.2f}':>8} {memory:>7} {t.startup:8.1f}"
        )


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
