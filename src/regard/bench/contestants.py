"""What competes: a network in an engine at a batch size; and how it is made ready."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from regard.data.preprocess import Preprocess
from regard.engines import ENGINES, Deployed
from regard.engines.backends import OpenVino
from regard.errors import UsageError
from regard.export import openvino_int8
from regard.machine import keep_freed_memory
from regard.models.cbam import twins
from regard.models.create import make
from regard.training.losses import multi_head_cross_entropy

DEFAULT_MODELS = ("cbam_resnet50", "attention56", "ag_sononet8")
AUTHORS = "eager-nchw"
"""The authors' way: the network called as it is, operator by operator, fp32, NCHW."""
COMPILE = "torch.compile"
"""A peer under torch.compile with its defaults, fp32, NCHW."""
TRAIN_ENGINES = ("eager", "compiled")  # of training, in channels_last
SEED = 0

Step = Callable[[], object]  # one prediction of a batch, or one training step


@dataclass(frozen=True)
class Contestant:
    """What is timed, as plain data, so that another process can make it ready as well.

    Attributes:
        kind: "predict" or "train".
        of: the network that was asked for; what has the same `kind`, `of` and `batch` is
            measured turn by turn.
        network: its name; of a peer LIBRARY:NAME.
        role: "network", "twin" (the same without attention) or "peer" (another library's).
        engine: AUTHORS, COMPILE, or one of regard.engines.ENGINES; in training eager or
            compiled.
        precision: "fp32", "bf16", or of openvino "int8".
        batch: images.
        size: (C, H, W) of an image.
        threads: of the CPU.
        device: "cpu" or "cuda".
    """

    kind: str
    of: str
    network: str
    role: str
    engine: str
    precision: str
    batch: int
    size: tuple[int, int, int]
    threads: int
    device: str = "cpu"

    def __str__(self) -> str:
        way = "authors' way" if self.engine == AUTHORS and self.role != "peer" else self.engine
        return f"{self.network}, {way}, {self.precision}"


def prepare(c: Contestant) -> tuple[Step, float]:
    """A contestant's step, called once, and the seconds until then (conversion, compiling).

    The network itself is made before that time begins: a run loads it with whatever engine.

    Raises:
        Exception: whatever a converter, a compiler or the network throws.
    """
    if c.kind == "train":
        model = build(c.network, c.size).to(c.device)  # its own: the steps change it
        begin = functools.partial(_training_step, c, model)
    else:
        model = trained_looking(c.network, c.size, c.device)
        begin = functools.partial(_prediction_step, c, model)
    started = time.perf_counter()
    step = begin()
    step()
    return step, time.perf_counter() - started


def _prediction_step(c: Contestant, model: nn.Module) -> Step:
    """From (B, C, H, W) uint8 on the CPU to probabilities there."""
    preprocess, images = preprocess_of(c.of, c.size), noise(c.batch, c.size)
    if c.engine not in (AUTHORS, COMPILE):
        made = Int8 if c.precision == "int8" else ENGINES[c.engine]
        engine = made(model, preprocess, (c.batch,), c.precision)
        return lambda: engine(images)
    called: Any = torch.compile(model) if c.engine == COMPILE else model

    @torch.no_grad()
    def step() -> Tensor:
        return called(preprocess.normalize(images.to(c.device))).softmax(dim=1).cpu()

    return step


class Int8(OpenVino):
    """OpenVINO in 8 bits, as `regard export --int8` makes it; its ranges are those of noise."""

    needs = ("openvino", "nncf")
    precisions = ("int8",)

    def _convert(self, deployed: Deployed, preprocess: Preprocess) -> Any:
        return openvino_int8(deployed, preprocess, noise(16, preprocess.input_size).float())


def _training_step(c: Contestant, model: nn.Module) -> Step:
    """Forward, cross entropy, backward and SGD, on a batch that is ready."""
    bf16 = c.precision == "bf16"
    layout = torch.contiguous_format if c.engine == AUTHORS else torch.channels_last
    if c.engine != AUTHORS and c.device == "cpu":
        keep_freed_memory()
    model = model.to(memory_format=layout).train()
    x = preprocess_of(c.of, c.size).normalize(noise(c.batch, c.size)).to(c.device)
    x = x.contiguous(memory_format=layout)
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(model.num_classes, (c.batch,), generator=generator).to(c.device)  # type: ignore[call-overload]
    # a rate so small that a thousand steps leave the network's values where they were
    fused = c.engine != AUTHORS
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4, fused=fused
    )
    forward: Any = torch.compile(model) if c.engine == "compiled" else model
    weights: Any = getattr(model, "head_weights", None)

    def step() -> float:
        with torch.autocast(torch.device(c.device).type, dtype=torch.bfloat16, enabled=bf16):
            outputs = forward(x)
        loss = multi_head_cross_entropy(outputs.float(), labels, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# ----------------------------------------------------------------------- networks and images
def build(name: str, size: tuple[int, int, int]) -> nn.Module:
    """A network with random weights, the same each time; peers by LIBRARY:NAME.

    Raises:
        UsageError: no network is called so.
    """
    library, colon, rest = name.partition(":")
    # the generator of all is left as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if not colon:
            return make(name, {})
        if library == "timm":
            plain, _, layer = rest.partition("+")
            return make(plain, {"block_args": {"attn_layer": layer}})
        from pytorchcv.model_provider import get_model

        return get_model(rest, in_size=size[1:])


@functools.lru_cache(maxsize=4)
def trained_looking(name: str, size: tuple[int, int, int], device: str) -> nn.Module:
    """The network for prediction, with the BN statistics of noise: no values without bounds.

    Shared by all engines of a group: none of them changes it.
    """
    model = build(name, size)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(noise(4, size).float() / 128 - 1)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return model.eval().to(device)


def preprocess_of(name: str, size: tuple[int, int, int]) -> Preprocess:
    """A network's own standardization, at the size that is measured."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    return Preprocess.from_config({**cfg.to_dict(), "input_size": size})


def noise(batch: int, size: tuple[int, int, int]) -> Tensor:
    """(batch, C, H, W) uint8, the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(256, (batch, *size), dtype=torch.uint8, generator=generator)


def input_size(name: str, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W): a network's own, or with another height and width.

    Raises:
        UsageError: no network is called so, or it can't take images of this size.
    """
    with torch.device("meta"):
        model = make(name, {}).eval()
        cfg: Any = model.pretrained_cfg
        channels, *own = cfg["input_size"]
        height, width = size or own
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, height, width))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            told = f"size {height} {width}: {name}, made for {own[0]} {own[1]}, can't take it"
            raise UsageError(f"{told} ({reason})") from error
    return channels, height, width


def twin_of(name: str) -> str | None:
    """The network without its attention, or None."""
    try:
        plain = twins(name)["plain"]
    except ValueError:
        return None
    return None if plain == name else plain


def absent_packages(engine: str, precision: str = "fp32") -> list[str]:
    """The packages that an engine of ENGINES needs and that are not installed."""
    needs = Int8.needs if precision == "int8" else ENGINES[engine].needs
    return [package for package in needs if find_spec(package) is None]


def peers_of(name: str) -> tuple[list[str], list[str]]:
    """Other libraries' implementations of a network, and a line for each that is not there."""
    found, told = [], []
    family, _, base = name.partition("_")
    if find_spec("pytorchcv") is None:
        told.append("peers: pytorchcv is not installed")
    else:
        from pytorchcv.model_provider import _models

        theirs = {"attention": name.replace("attention", "resattnet"), "cbam": name,
                  "se": f"se{base}"}.get(family.rstrip("0123456789"))  # fmt: skip
        if theirs in _models:
            found.append(f"pytorchcv:{theirs}")
        else:
            told.append(f"peers: pytorchcv has no {name}")
    if family in ("cbam", "se") and twin_of(name) is not None and base.startswith("resne"):
        found.append(f"timm:{base}+{family}")
    else:
        told.append(f"peers: timm has no {name}")
    return found, told
