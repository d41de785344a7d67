"""`--engine auto`: every engine that is installed is measured once, and the answer remembered."""

import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.engines.backends import ENGINES, Eager, Engine
from regard.errors import ImageError, UsageError
from regard.machine import describe_machine, has_bf16
from regard.predict import Classifier

PRECISIONS = ("auto", "fp32", "bf16")
BOUNDS = {"fp32": 1e-4, "bf16": 0.05}
"""By how much a probability may differ from eager fp32 for `auto` to take an engine."""


TURNS, WARM = 7, 2


Echo = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """One engine on one network and machine.

    Attributes:
        start: seconds until it is ready (conversion, compiling).
        batch: seconds for the largest batch, the median of TURNS.
        difference: the largest difference of a probability from eager fp32.
        same: whether the likeliest class is the same on every image that was tried.
        fault: why it can't be used, or None.
    """

    engine: str
    precision: str
    start: float = 0.0
    batch: float = 0.0
    difference: float = 0.0
    same: bool = True
    fault: str | None = None

    @property
    def good(self) -> bool:
        """Whether `auto` may take it."""
        return self.fault is None and self.same and self.difference <= BOUNDS[self.precision]


def open_engine(
    classifier: Classifier,
    name: str = "auto",
    *,
    precision: str = "auto",
    sizes: tuple[int, ...] = (32,),
    images: Tensor | None = None,
    count: int | None = None,
    echo: Echo = lambda line: None,
) -> Engine:
    """A classifier's network in an engine; `classifier.engine = open_engine(...)` uses it.

    Args:
        classifier: of `regard.load`.
        name: "auto", or one of ENGINES.
        precision: "auto" is bf16 where the machine computes in it (eager stays in fp32, which
            is what the others are held against); "fp32" refuses bf16.
        sizes: batches to be ready for; the last one is measured.
        images: (B, C, H, W) in 0..255, on which the answers are compared with eager fp32: real
            ones, if the agreement is to mean something.
        count: of images to come; an engine that takes long to start must be worth it. None:
            many.
        echo: is told what was chosen, and why.

    Raises:
        UsageError: no such engine or precision, one that is not installed or can't take this
            network.
    """
    if name != "auto" and name not in ENGINES:
        raise UsageError(f"engine {name!r}: choose auto, {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: choose {', '.join(PRECISIONS)}")
    device = next(classifier.model.parameters()).device
    fast = has_bf16(device)
    if precision == "bf16" and not fast:
        raise UsageError("precision 'bf16': this machine only emulates it; choose fp32 or auto")
    probe = _probe(classifier, images, max(sizes))
    if name != "auto":
        wide = "bf16" in ENGINES[name].precisions and name != "eager"
        chosen = precision if precision != "auto" else "bf16" if fast and wide else "fp32"
        engine, found = measure(classifier, name, chosen, sizes, probe, turns=0)
        if engine is None:
            raise UsageError(found.fault)
        if name != "eager":
            echo(f"{engine!r}: {_agreement(found, images)}")
        return engine
    path = memory_path()
    key, told = _key(classifier, sizes, precision)
    rows = _recall(path, key)
    if rows is None:
        echo("measuring the engines for this network and machine, once")
        rows = measure_all(classifier, precision, sizes, probe, echo=echo)
        _remember(path, key, told, rows, echo)
    best = cheapest(rows, count, max(sizes))
    echo(_why(best, rows, count, max(sizes)))
    engine, found = measure(classifier, best.engine, best.precision, sizes, probe, turns=0)
    if engine is None or not found.good:  # it was good once; these images show otherwise
        echo(f"{best.engine}: {found.fault or _agreement(found, images)}; eager takes its place")
        return Eager(classifier.model, classifier.preprocess, sizes)
    return engine


def measure_all(
    classifier: Classifier,
    precision: str,
    sizes: tuple[int, ...],
    probe: Tensor,
    echo: Echo = lambda line: None,
) -> list[Measured]:
    """Every engine that is installed, in each precision that is allowed."""
    bf16 = precision != "fp32" and has_bf16(next(classifier.model.parameters()).device)
    rows = []
    for name, kind in ENGINES.items():
        for p in ("fp32", "bf16"):
            if p not in kind.precisions or (p == "bf16" and not bf16):
                continue
            if name == "eager" and p == "bf16":
                continue
            _, found = measure(classifier, name, p, sizes, probe)
            rows.append(found)
            if found.fault is not None:
                echo(f"  {name}, {p}: {found.fault}")
            else:
                echo(f"  {name}, {p}: {_rate(found, sizes[-1])}, ready in {found.start:.1f} s")
    return rows


def measure(
    classifier: Classifier,
    name: str,
    precision: str,
    sizes: tuple[int, ...],
    probe: Tensor,
    turns: int = TURNS,
) -> tuple[Engine | None, Measured]:
    """One engine: made ready, compared with eager fp32 on `probe`, and timed."""
    started = time.perf_counter()
    try:
        engine = ENGINES[name](classifier.model, classifier.preprocess, sizes, precision)
        start = time.perf_counter() - started
        answer = engine(probe)
    except Exception as error:  # whatever a converter or a compiler throws
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300]
        return None, Measured(name, precision, fault=reason)
    expected = answer
    if (name, precision) != ("eager", "fp32"):
        expected = Eager(classifier.model, classifier.preprocess, sizes)(probe)
    seconds = []
    for turn in range(turns + WARM if turns else 0):
        begun = time.perf_counter()
        engine(probe)
        if turn >= WARM:
            seconds.append(time.perf_counter() - begun)
    return engine, Measured(
        name, precision, start,
        statistics.median(seconds) if seconds else 0.0,
        float((answer - expected).abs().max()) if answer.isfinite().all() else float("inf"),
        bool((answer.argmax(dim=1) == expected.argmax(dim=1)).all()),
    )  # fmt: skip


def cheapest(rows: list[Measured], count: int | None, size: int) -> Measured:
    """The engine with which `count` images take least, its start included; None: many."""

    def cost(row: Measured) -> float:
        return row.batch if count is None else row.start + row.batch * count / size

    return min((row for row in rows if row.good), key=cost)


def _why(best: Measured, rows: list[Measured], count: int | None, size: int) -> str:
    eager = next(row for row in rows if row.engine == "eager")
    line = f"engine {best.engine}, {best.precision}: {_rate(best, size)}"
    if best is not eager:
        line += f", {eager.batch / best.batch:.1f} times eager fp32's"
    fastest = cheapest(rows, None, size)
    if fastest is not best:
        line += f" ({fastest.engine} would take {fastest.start:.0f} s to start)"
    out = [r for r in rows if r.fault is None and not r.good]
    for row in out:
        what = "another class" if not row.same else f"{row.difference:.2g} off"
        line += f"; not {row.engine} in {row.precision}: {what}"
    return line


def _rate(row: Measured, size: int) -> str:
    return f"{size / row.batch:,.0f} images/s"


def _agreement(found: Measured, images: Tensor | None) -> str:
    on = "noise" if images is None else f"{len(images)} images"
    line = f"probabilities within {found.difference:.1g} of eager fp32's on {on}"
    return line if found.same else line + ", another class likeliest for some"


def _probe(classifier: Classifier, images: Tensor | None, size: int) -> Tensor:
    """A full batch: the images given, again and again, or noise."""
    if images is None or len(images) == 0:
        generator = torch.Generator().manual_seed(0)
        shape = classifier.preprocess.input_size
        return torch.rand(size, *shape, generator=generator) * 255
    return images[torch.arange(size) % len(images)].float()


def probe_images(reads: Iterable[Callable[[], Tensor]], most: int = 32) -> Tensor | None:
    """The first images that can be read, as (B, C, H, W) in 0..255, to compare answers on."""
    found: list[Tensor] = []
    for read in reads:
        if len(found) == most:
            break
        with contextlib.suppress(ImageError):
            found.append(read().float())
    return torch.stack(found) if found else None


# ------------------------------------------------------------------------------ the memory
def memory_path() -> Path:
    """Where measurements are kept: $XDG_CACHE_HOME/regard/engines.json, else ~/.cache/..."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "regard", "engines.json")


def _key(
    classifier: Classifier, sizes: tuple[int, ...], precision: str
) -> tuple[str, dict[str, Any]]:
    """What a measurement depends on: the network's shape, its input, and the machine."""
    model = classifier.model
    shapes = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    arguments = getattr(model, "_model_args", None) or {}
    network = hashlib.sha256(f"{shapes} {sorted(arguments.items())}".encode()).hexdigest()
    told = {
        "network": (getattr(model, "pretrained_cfg", None) or {}).get("architecture"),
        "shape": network[:16],
        "input_size": list(classifier.preprocess.input_size),
        "normalization": classifier.preprocess.normalization,
        "sizes": list(sizes),
        "precision": precision,
        "machine": describe_machine(next(model.parameters()).device),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32], told


def _recall(path: Path, key: str) -> list[Measured] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Measured(**row) for row in content[key]["measured"]]
    except (OSError, ValueError, KeyError, TypeError):  # absent, of an older version, or damaged
        return None


def _remember(path: Path, key: str, told: dict[str, Any], rows: list[Measured], echo: Echo) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        content[key] = {
            **told,
            "date": time.strftime("%Y-%m-%d"),
            "measured": [asdict(row) for row in rows],
        }
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".engines-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(beside, path)
    except OSError as error:
        echo(f"what was measured can't be kept: {error}")
