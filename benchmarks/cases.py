"""The measured cases as data: a network in an engine at a batch size; and their preparation."""

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
from regard.engines import ENGINES
from regard.engines.bench import OpenVinoInt8, noise
from regard.errors import UsageError
from regard.files import reason
from regard.log import silence_libraries
from regard.machine import keep_freed_memory
from regard.models.create import make
from regard.models.zoo import twins
from regard.training.losses import multi_head_cross_entropy

DEFAULT_MODELS = ("cbam_resnet50", "attention56", "ag_sononet8")
AUTHORS = "eager-nchw"
"""The baseline, called "authors' way": the unchanged network, op by op, in fp32 and NCHW."""
COMPILE = "torch.compile"
"""A peer under torch.compile with its default settings, fp32, NCHW."""
TRAIN_ENGINES = ("eager", "compiled")  # for training, in channels_last
SEED = 0

Step = Callable[[], object]  # one prediction of a batch, or one training step


@dataclass(frozen=True)
class Case:
    """What is timed, as plain data, so that another process can also prepare it.

    Attributes:
        kind: "predict" or "train".
        of: the network of the group: cases with the same `kind`, `of` and `batch` are timed
            together, in the same rounds.
        network: its name; a peer's is LIBRARY:NAME.
        role: "network", "twin" (the same without attention) or "peer" (another library's).
        engine: AUTHORS, COMPILE, or one of regard.engines.ENGINES; eager or compiled for training.
        precision: "fp32", "bf16", or "int8" with openvino.
        batch: images per batch.
        size: (C, H, W) of an image.
        threads: number of CPU threads.
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
        return f"{self.network}, {self.engine_label}, {self.precision}"

    @property
    def engine_label(self) -> str:
        """The engine's name in tables."""
        return "authors' way" if self.engine == AUTHORS and self.role != "peer" else self.engine


def prepare(case: Case) -> tuple[Step, float]:
    """A case's step, after a first call, and the seconds until then (conversion, compiling).

    The time does not include building the network, which every engine needs.

    Raises:
        Exception: whatever a converter, a compiler or the network raises.
    """
    silence_libraries()
    if case.kind == "train":
        model = build(case.network, case.size).to(case.device)  # not shared, as training changes it
        begin = functools.partial(_training_step, case, model)
    else:
        model = with_noise_statistics(case.network, case.size, case.device)
        begin = functools.partial(_prediction_step, case, model)
    started = time.perf_counter()
    step = begin()
    step()
    return step, time.perf_counter() - started


def _prediction_step(case: Case, model: nn.Module) -> Step:
    """From (B, C, H, W) uint8 on the CPU to probabilities there."""
    preprocess, images = preprocess_of(case.of, case.size), noise(case.batch, case.size)
    if case.engine not in (AUTHORS, COMPILE):
        made = OpenVinoInt8 if case.precision == "int8" else ENGINES[case.engine]
        engine = made(model, preprocess, (case.batch,), case.precision)
        return lambda: engine(images)
    called: Any = torch.compile(model) if case.engine == COMPILE else model

    @torch.no_grad()
    def step() -> Tensor:
        return called(preprocess.normalize(images.to(case.device))).softmax(dim=1).cpu()

    return step


def _training_step(case: Case, model: nn.Module) -> Step:
    """Forward, cross entropy, backward and SGD, on a batch in memory."""
    bf16 = case.precision == "bf16"
    layout = torch.contiguous_format if case.engine == AUTHORS else torch.channels_last
    if case.engine != AUTHORS and case.device == "cpu":
        keep_freed_memory()
    model = model.to(memory_format=layout).train()
    x = preprocess_of(case.of, case.size).normalize(noise(case.batch, case.size)).to(case.device)
    x = x.contiguous(memory_format=layout)
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(model.num_classes, (case.batch,), generator=generator).to(case.device)  # type: ignore[call-overload]
    # a rate so small that the weights stay the same for a thousand steps
    optimizer = torch.optim.SGD(
        model.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4, fused=case.engine != AUTHORS
    )
    forward: Any = torch.compile(model) if case.engine == "compiled" else model
    weights: Any = getattr(model, "head_weights", None)

    def step() -> float:
        with torch.autocast(torch.device(case.device).type, dtype=torch.bfloat16, enabled=bf16):
            outputs = forward(x)
        loss = multi_head_cross_entropy(outputs.float(), labels, weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


# ----------------------------------------------------------------------- networks and images
def build(name: str, size: tuple[int, int, int]) -> nn.Module:
    """A network with random weights, the same in each call; peers by LIBRARY:NAME.

    Raises:
        UsageError: there is no such network.
    """
    library, colon, rest = name.partition(":")
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
def with_noise_statistics(name: str, size: tuple[int, int, int], device: str) -> nn.Module:
    """The network for prediction, with BN statistics from noise, so that values stay finite.

    Shared by all engines of a group, as none of them changes it.
    """
    model = build(name, size)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(noise(4, size).float() / 128 - 1)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval().to(device)


def preprocess_of(name: str, size: tuple[int, int, int]) -> Preprocess:
    """A network's own normalization, at the measured size."""
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    return Preprocess.from_config({**cfg.to_dict(), "input_size": size})


def input_size(name: str, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W): a network's own, or with another height and width.

    Raises:
        UsageError: there is no such network, or it can't take images of this size.
    """
    with torch.device("meta"):
        model = make(name, {}).eval()
        cfg: Any = model.pretrained_cfg
        channels, *own = cfg["input_size"]
        height, width = size or own
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, height, width))
        except Exception as error:  # each network rejects a size in its own way
            asked = f"size {height} {width}: {name}, made for {own[0]} {own[1]}, can't take it"
            raise UsageError(f"{asked} ({reason(error)})") from error
    return channels, height, width


def twin_of(name: str) -> str | None:
    """The network without its attention, or None."""
    try:
        plain = twins(name)["plain"]
    except ValueError:
        return None
    return None if plain == name else plain


def peers_of(name: str) -> tuple[list[str], list[str]]:
    """Other libraries' implementations of a network, and a note for each that is missing."""
    found, notes = [], []
    family, _, base = name.partition("_")
    if find_spec("pytorchcv") is None:
        notes.append("peers: pytorchcv is not installed")
    else:
        from pytorchcv.model_provider import _models

        theirs = {"attention": name.replace("attention", "resattnet"), "cbam": name,
                  "se": f"se{base}"}.get(family.rstrip("0123456789"))  # fmt: skip
        if theirs in _models:
            found.append(f"pytorchcv:{theirs}")
        else:
            notes.append(f"peers: pytorchcv has no {name}")
    if family in ("cbam", "se") and twin_of(name) is not None and base.startswith("resne"):
        found.append(f"timm:{base}+{family}")
    else:
        notes.append(f"peers: timm has no {name}")
    return found, notes
