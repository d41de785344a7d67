"""Opens an engine by name; `auto` measures the installed engines once and caches the result."""

import contextlib
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.engines.backends import ENGINES, Eager, Engine
from regard.errors import FileError, ImageError, UsageError
from regard.extras import hint, missing
from regard.files import plural, reason, write_atomically
from regard.log import clock
from regard.machine import describe_machine, has_bf16
from regard.predict import Classifier

log: logging.Logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05}
"""The largest difference of a probability from eager fp32 that `auto` accepts in an engine."""
WORTH_MEASURING = 180.0  # seconds with eager from which the others may be measured
WORTH_TAKING = 0.1  # fraction of eager's time
ROUNDS, WARMUP = 7, 2  # timed calls of an engine, after untimed ones


@dataclass(frozen=True)
class Measurement:
    """One engine on one network and machine.

    Attributes:
        startup: seconds for conversion, compiling and the first call.
        batch: seconds for the largest batch, the median of ROUNDS.
        difference: the largest difference of a probability from eager fp32.
        same_top1: whether the top-1 class is that of eager fp32 for every image.
        fault: why the engine can't be used, or None.
    """

    engine: str
    precision: str
    startup: float = 0.0
    batch: float = 0.0
    difference: float = 0.0
    same_top1: bool = True
    fault: str | None = None

    @property
    def acceptable(self) -> bool:
        """Whether `auto` may take it."""
        within = self.difference <= TOLERANCES[self.precision]
        return self.fault is None and self.same_top1 and within


def open_engine(
    classifier: Classifier,
    name: str = "auto",
    *,
    precision: str = "auto",
    sizes: tuple[int, ...] = (32,),
    images: Tensor | None = None,
    count: int | None = None,
) -> Engine:
    """Opens a classifier's network in an engine; `classifier.engine = open_engine(...)` uses it.

    Logs the choice, how far its probabilities are from eager fp32, and what is not installed.

    Args:
        classifier: from `regard.load`.
        name: "auto" or one of ENGINES.
        precision: "auto" is bf16 if the machine computes in it, except for eager, which is the
            reference.
        sizes: batch sizes to compile for; the last one is measured.
        images: (B, C, H, W) in 0..255 for comparing probabilities with eager fp32; real images
            make the comparison meaningful. Default: noise.
        count: number of images to predict, which decides whether a slow start pays off.
            Default: many.

    Raises:
        UsageError: there is no such engine or precision, it is not installed, or the engine can't
            take the network.
    """
    check_choice(name, precision, next(classifier.model.parameters()).device)
    probe = _probe(classifier, images, max(sizes))
    if name == "auto":
        return _open_fastest(classifier, precision, sizes, probe, count)
    engine, found = measure(
        classifier, name, _resolve(name, precision, classifier), sizes, probe, rounds=0
    )
    if engine is None:
        raise UsageError(found.fault)
    if name != "eager":
        on = "noise" if images is None else plural(len(images), "image")
        other = "" if found.same_top1 else "; the top-1 class differs for some"
        log.info("%r: probabilities within %.1g of eager fp32 on %s%s",
                 engine, found.difference, on, other)  # fmt: skip
    return engine


def check_choice(name: str, precision: str, device: torch.device | None = None) -> None:
    """Refuses an unknown engine or precision, and bf16 where the device emulates it.

    Raises:
        UsageError: names the value and the choices.
    """
    if name not in ("auto", *ENGINES):
        raise UsageError(f"engine {name!r}: choose auto, {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if precision == "bf16" and not has_bf16(device):
        raise UsageError("precision 'bf16': this machine only emulates it; choose fp32 or auto")


def _resolve(name: str, precision: str, classifier: Classifier) -> str:
    if precision != "auto":
        return precision
    wide = name != "eager" and "bf16" in ENGINES[name].precisions
    return "bf16" if wide and has_bf16(next(classifier.model.parameters()).device) else "fp32"


def missing_engines(names: Iterable[str] | None = None) -> dict[str, str]:
    """Those of the engines (default: all) that are not installed, with the command to install each.

    Raises:
        UsageError: there is no such engine.
    """
    names = list(names or ENGINES)
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"engine {name!r}: choose {', '.join(ENGINES)}")
    return {n: hint(n) for n in names if ENGINES[n].needs and missing(n, *ENGINES[n].needs)}


# ----------------------------------------------------------------------------------- auto
def _open_fastest(
    classifier: Classifier,
    precision: str,
    sizes: tuple[int, ...],
    probe: Tensor,
    count: int | None,
) -> Engine:
    """The engine that predicts `count` images soonest, including its start."""
    if absent := missing_engines():
        log.info("not installed: %s", ", ".join(f"{n} ({how})" for n, how in absent.items()))
    rows = _cached(classifier, precision, sizes)
    if rows is None:
        log.info("measuring the engines for this network and machine, once")
        rows = _measured(classifier, precision, sizes, probe)
    return _take(classifier, rows, sizes, probe, count)


def _take(
    classifier: Classifier,
    rows: list[Measurement],
    sizes: tuple[int, ...],
    probe: Tensor,
    count: int | None,
) -> Engine:
    """The cheapest of the measured engines whose probabilities still agree with eager's."""
    while any(row.acceptable for row in rows):
        best = cheapest(rows, count, sizes[-1])
        engine, found = measure(classifier, best.engine, best.precision, sizes, probe, rounds=0)
        if engine is not None and found.acceptable:
            how = _explain(best, rows, count, sizes[-1])
            log.info("%s; probabilities within %.1g of eager fp32", how, found.difference)
            return engine
        # the cached measurement is outdated: other images, or a package is gone
        log.info("%s, %s: %s", best.engine, best.precision, found.fault or _disagreement(found))
        rows = [row for row in rows if row is not best]
    raise UsageError("no engine can be used: the network fails, or its answers are not finite")


def open_if_it_pays(
    classifier: Classifier,
    *,
    sizes: tuple[int, ...] = (32,),
    images: Callable[[], Tensor | None] = lambda: None,
    count: int | None = None,
) -> Engine | None:
    """A faster engine in fp32, if it saves a long job at least a tenth of its time; else None.

    None stands for the network itself, the reference bit for bit. Engines are measured only for a
    job of more than `WORTH_MEASURING` seconds; for a shorter one, or one of unknown length, earlier
    measurements are used.

    Args:
        classifier, sizes: as for `open_engine`.
        images: reads the images for comparing probabilities; called only if needed.
        count: number of images to predict. Default: unknown.
    """
    size = max(sizes)
    rows = _cached(classifier, "fp32", sizes)
    if rows is None:
        if count is None:
            return None
        probe = _probe(classifier, images(), size)
        seconds = count * _seconds_an_image(classifier, probe[:8])
        if seconds < WORTH_MEASURING:
            return None
        log.info("about %s in eager mode: measuring the faster engines for this network and "
                 "machine, once", clock(seconds))  # fmt: skip
        rows = _measured(classifier, "fp32", sizes, probe)
    eager = next(row for row in rows if row.engine == "eager")
    best = cheapest(rows, count, size) if eager.acceptable else eager
    if best is eager or cost(best, count, size) > (1 - WORTH_TAKING) * cost(eager, count, size):
        return None
    engine = _take(classifier, rows, sizes, _probe(classifier, images(), size), count)
    return None if engine.name == "eager" else engine


def _seconds_an_image(classifier: Classifier, images: Tensor) -> float:
    """Seconds per image of the network itself, from the second of two calls."""
    for _ in range(2):
        started = time.perf_counter()
        classifier.answers(images).cpu()
    return (time.perf_counter() - started) / len(images)


def _cached(
    classifier: Classifier, precision: str, sizes: tuple[int, ...]
) -> list[Measurement] | None:
    return _read_cache(cache_path(), _cache_key(classifier, sizes, precision)[0])


def _measured(
    classifier: Classifier, precision: str, sizes: tuple[int, ...], probe: Tensor
) -> list[Measurement]:
    """Measures all installed engines, and caches the result."""
    rows = _measure_all(classifier, precision, sizes, probe)
    _write_cache(cache_path(), *_cache_key(classifier, sizes, precision), rows)
    return rows


def _measure_all(
    classifier: Classifier, precision: str, sizes: tuple[int, ...], probe: Tensor
) -> list[Measurement]:
    """Measurements of all installed engines, with eager in fp32 (the reference) first."""
    bf16 = precision != "fp32" and has_bf16(next(classifier.model.parameters()).device)
    absent, rows = missing_engines(), []
    for name, kind in ENGINES.items():
        for each in ("fp32", "bf16") if bf16 else ("fp32",):
            reference = name == "eager" and each == "fp32"
            asked = precision in ("auto", each) and each in kind.precisions and name not in absent
            if not reference and (not asked or name == "eager"):
                continue
            _, row = measure(classifier, name, each, sizes, probe)
            rows.append(row)
            what = row.fault or f"{_rate(row, sizes[-1])}, ready in {row.startup:.1f} s"
            log.info("  %s, %s: %s", name, each, what)
    return rows


def measure(
    classifier: Classifier,
    name: str,
    precision: str,
    sizes: tuple[int, ...],
    probe: Tensor,
    rounds: int = ROUNDS,
) -> tuple[Engine | None, Measurement]:
    """Opens an engine, compares it with eager fp32 on `probe`, and times it, if `rounds` > 0."""
    started = time.perf_counter()
    try:
        engine = ENGINES[name](
            classifier.model, classifier.preprocess, sizes, precision,
            features=classifier.familiarity is not None,
        )  # fmt: skip
        startup = time.perf_counter() - started
        answer = engine(probe)
    except Exception as error:  # converters and compilers raise almost anything
        return None, Measurement(name, precision, fault=reason(error, 300))
    expected = answer
    if (name, precision) != ("eager", "fp32"):
        expected = Eager(classifier.model, classifier.preprocess, sizes)(probe)
    seconds = []
    for number in range(rounds + WARMUP if rounds else 0):
        begun = time.perf_counter()
        engine(probe)
        if number >= WARMUP:
            seconds.append(time.perf_counter() - begun)
    return engine, Measurement(
        name, precision, startup,
        statistics.median(seconds) if seconds else 0.0,
        float((answer - expected).abs().max()) if answer.isfinite().all() else float("inf"),
        bool((answer.argmax(dim=1) == expected.argmax(dim=1)).all()),
    )  # fmt: skip


def cheapest(rows: list[Measurement], count: int | None, size: int) -> Measurement:
    """The row with the least time for `count` images, including the start; None: many images."""
    return min((row for row in rows if row.acceptable), key=lambda row: cost(row, count, size))


def cost(row: Measurement, count: int | None, size: int) -> float:
    """Seconds for `count` images in batches of `size`; for a single batch if it is None."""
    return row.batch if count is None else row.startup + row.batch * count / size


def _explain(best: Measurement, rows: list[Measurement], count: int | None, size: int) -> str:
    """Why `best` was chosen, on one line."""
    eager = next((row for row in rows if row.engine == "eager"), best)
    line = f"engine {best.engine}, {best.precision}: {_rate(best, size)}"
    if best is not eager:
        line += f", {eager.batch / best.batch:.1f} times as fast as eager fp32"
    fastest = cheapest(rows, None, size)
    if fastest is not best:
        line += f" ({fastest.engine} would take {fastest.startup:.0f} s to start)"
    for row in rows:
        if row.fault is None and not row.acceptable:
            line += f"; not {row.engine} in {row.precision}: {_disagreement(row)}"
    return line


def _disagreement(row: Measurement) -> str:
    return f"{row.difference:.2g} off" if row.same_top1 else "another top-1 class"


def _rate(row: Measurement, size: int) -> str:
    return f"{size / row.batch:,.0f} images/s"


# --------------------------------------------------------------------------- probe images
def _probe(classifier: Classifier, images: Tensor | None, size: int) -> Tensor:
    """A full batch (size, C, H, W): the images, repeated as needed, or noise."""
    if images is None or len(images) == 0:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(size, *classifier.preprocess.input_size, generator=generator) * 255
    return images[torch.arange(size) % len(images)].float()


def probe_images(reads: Iterable[Callable[[], Tensor]], most: int = 32) -> Tensor | None:
    """The first images that can be read, (B, C, H, W) in 0..255, for comparing probabilities."""
    found: list[Tensor] = []
    for read in reads:
        if len(found) == most:
            break
        with contextlib.suppress(ImageError):
            image = read().float()
            found.append(image if image.ndim == 3 else image[0])  # the first of several views
    return torch.stack(found) if found else None


# ---------------------------------------------------------------------------------- cache
def cache_path() -> Path:
    """The file of cached measurements: $XDG_CACHE_HOME/regard/engines.json, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "regard", "engines.json")


def _cache_key(
    classifier: Classifier, sizes: tuple[int, ...], precision: str
) -> tuple[str, dict[str, Any]]:
    """What a measurement depends on: the network's shape, its input and the machine."""
    model = classifier.model
    shapes = [(name, tuple(t.shape)) for name, t in model.state_dict().items()]
    arguments = getattr(model, "_model_args", None) or {}
    network = hashlib.sha256(f"{shapes} {sorted(arguments.items())}".encode()).hexdigest()
    facts = {
        "network": (getattr(model, "pretrained_cfg", None) or {}).get("architecture"),
        "shape": network[:16],
        "input_size": list(classifier.preprocess.input_size),
        "normalization": classifier.preprocess.normalization,
        "sizes": list(sizes),
        "precision": precision,
        "machine": describe_machine(next(model.parameters()).device),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32], facts


def _read_cache(path: Path, key: str) -> list[Measurement] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [Measurement(**row) for row in content[key]["measured"]]
    except (OSError, ValueError, KeyError, TypeError):  # absent, from another version, or damaged
        return None


def _write_cache(path: Path, key: str, facts: dict[str, Any], rows: list[Measurement]) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    content = content if isinstance(content, dict) else {}
    measured = [asdict(row) for row in rows]
    content[key] = {**facts, "date": time.strftime("%Y-%m-%d"), "measured": measured}
    text = json.dumps(content, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    except (FileError, OSError) as error:
        log.warning("the measurements of the engines can't be cached (%s: %s)", path, reason(error))
