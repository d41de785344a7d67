"""The engines: each maps images (B, C, H, W) in 0..255 to probabilities (B, classes)."""

import copy
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.data.preprocess import Preprocess
from regard.engines.conversion import (
    Deployed,
    DeployedWithFeatures,
    fold_batch_norms,
    import_openvino,
    onnx_model,
    openvino_model,
)
from regard.errors import UsageError
from regard.extras import require
from regard.features import inputs_of, joined_features, last_layers
from regard.log import silence_libraries
from regard.machine import cpu_has_bf16, keep_freed_memory

Run = Callable[[Tensor], Sequence[Tensor]]
"""(B, C, H, W) float32 with one fixed B -> (B, classes), and with features also (B, D)."""


class Engine:
    """A network compiled for fixed batch sizes; smaller batches are padded, larger ones split.

    Several threads may call it.

    Args:
        model: in evaluation mode; not changed.
        preprocess: its `input_size` is the size of all images.
        sizes: the batch sizes to compile for.
        precision: one of `precisions`.
        features: whether `with_features` returns the input of the last layer.

    Raises:
        UsageError: a package is not installed, the engine does not support the precision, or the
            network can't be converted.
    """

    name = ""
    needs: tuple[str, ...] = ()  # modules of the extra that has the engine's name
    precisions: tuple[str, ...] = ("fp32", "bf16")
    pads = True  # whether a batch is padded to one of `sizes`

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Preprocess,
        sizes: tuple[int, ...] = (32,),
        precision: str = "fp32",
        *,
        features: bool = False,
    ) -> None:
        if self.needs:
            require(self.name, f"engine {self.name}", *self.needs)
        if precision not in self.precisions:
            raise UsageError(
                f"precision {precision!r}: engine {self.name} computes in "
                f"{' or '.join(self.precisions)}"
            )
        self.precision, self.gives_features = precision, features
        self.sizes: tuple[int, ...] = tuple(sorted(set(sizes)))
        self.device: torch.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self._runs = self._build(model, preprocess)
        for size in self.sizes:  # the first call compiles and allocates
            self(torch.zeros(size, *preprocess.input_size))

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..255, any B -> (B, classes), float32, on the CPU."""
        return self._answers(images)[0]

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Like a call, with the features (B, D), float32; only if `gives_features`."""
        probabilities, features = self._answers(images)
        return probabilities, features

    @torch.no_grad()  # required for freezing
    def _answers(self, images: Tensor) -> Sequence[Tensor]:
        most = self.sizes[-1]
        parts = [self._one(images[k : k + most]) for k in range(0, len(images), most)]
        if len(parts) == 1:
            return parts[0]
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def _deployed(self, own: torch.nn.Module, preprocess: Preprocess) -> Deployed:
        """The graph to run, made from the engine's own copy of the network."""
        kind = DeployedWithFeatures if self.gives_features else Deployed
        return kind(own, preprocess)

    def _one(self, images: Tensor) -> Sequence[Tensor]:
        count = len(images)
        size = next(s for s in self.sizes if s >= count)
        x = self._as_floats(images)
        # padded with its first image, as zeros could be slow (denormals)
        if self.pads and count < size:
            x = torch.cat([x, x[:1].expand(size - count, -1, -1, -1)])
        return [answer[:count].cpu() for answer in self._runs(x)]

    def _as_floats(self, images: Tensor) -> Tensor:
        return images.to(self.device).float()

    def __repr__(self) -> str:
        return f"{self.name}, {self.precision}"


class _OutsideTorch(Engine):
    """An engine that computes outside PyTorch, with its own threads, on the CPU."""

    def _as_floats(self, images: Tensor) -> Tensor:
        # converted by NumPy: torch's threads would spin for milliseconds afterwards, on the cores
        # that this engine's threads are about to need
        return torch.from_numpy(images.cpu().numpy().astype(np.float32))


class Eager(Engine):
    """PyTorch, operator by operator, in channels_last."""

    name = "eager"
    pads = False

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        bf16 = self.precision == "bf16"
        own = fold_batch_norms(model).bfloat16() if bf16 else copy.deepcopy(model)
        deployed = Deployed(own.to(memory_format=torch.channels_last), preprocess)
        features = self.gives_features  # no reference to the engine, which refers to `run`
        layers = last_layers(own) if features else []

        def run(x: Tensor) -> Sequence[Tensor]:
            with inputs_of(layers) as given:  # for this call only: several threads may call
                answers = _several(deployed(x.contiguous(memory_format=torch.channels_last)))
            return [*answers, joined_features(given)] if features else answers

        return run


class Compiled(Engine):
    """torch.compile with frozen weights: BN folded, channels_last, operators fused."""

    name = "compiled"

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        silence_libraries()  # inductor warns at its first use if there is no GPU
        folded = fold_batch_norms(model).to(memory_format=torch.channels_last)
        if self.precision == "bf16":
            folded = folded.bfloat16()
        compiled = torch.compile(_own_code(self._deployed(folded, preprocess)), dynamic=False)
        on_cpu = self.device.type == "cpu"
        alone = threading.Lock()  # settings are per process, features per network

        def run(x: Tensor) -> Sequence[Tensor]:
            # not an option of torch.compile: dynamo reads it before inductor sees the options, and
            # would pass the weights as inputs, which can't be frozen
            with alone, torch._inductor.config.patch(freezing=on_cpu):
                return _several(compiled(x.contiguous(memory_format=torch.channels_last)))

        return run


def _own_code(module: torch.nn.Module) -> Callable[[Tensor], Any]:
    """A function that calls a module, with its own code object.

    Dynamo caches what it compiles on the code object, as long as that exists and at most 8 times:
    a ninth network or batch size would run eagerly.
    """

    def call(images: Tensor) -> Any:
        return module(images)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )


class OnnxRuntime(_OutsideTorch):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    needs: tuple[str, ...] = ("onnxruntime", "onnx", "onnxscript")
    precisions: tuple[str, ...] = ("fp32",)

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        deployed = self._deployed(fold_batch_norms(model).cpu(), preprocess)
        session = onnxruntime_session(onnx_model(deployed).SerializeToString())

        def run(x: Tensor) -> Sequence[Tensor]:
            answers = session.run(None, {"images": x.cpu().numpy()})
            return [torch.from_numpy(answer) for answer in answers]

        return run


class OpenVino(_OutsideTorch):
    """OpenVINO on the CPU; in bf16 it chooses the layers itself.

    Per-image normalization is then done beforehand in float32: bf16 rounds the mean, and pixels
    between whole numbers, by up to half a gray level, which is much for a pale image.
    """

    name = "openvino"
    needs: tuple[str, ...] = ("openvino",)

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        before = self.precision == "bf16" and preprocess.normalization == "image"
        preprocess = preprocess.without_normalization() if before else preprocess
        converted = self._convert(self._deployed(fold_batch_norms(model).cpu(), preprocess))
        runs = {}
        for size in self.sizes:  # a fixed shape is faster than a dynamic one
            converted.reshape([size, *preprocess.input_size])
            compiled = compile_openvino(converted, self.precision, preprocess.normalization)
            runs[size] = compiled.create_infer_request()
        alone = threading.Lock()  # an inference request holds the outputs of one call

        def run(x: Tensor) -> Sequence[Tensor]:
            images = x.cpu().contiguous().numpy()
            images = _normalize_each(images) if before else images
            with alone:
                answers = runs[len(x)].infer([images], share_inputs=True)
                return [torch.from_numpy(answers[i].copy()) for i in range(len(answers))]

        return run

    def _convert(self, deployed: Deployed) -> Any:
        return openvino_model(deployed)


ENGINES: dict[str, type[Engine]] = {e.name: e for e in (Eager, Compiled, OnnxRuntime, OpenVino)}


def _normalize_each(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """`regard.data.preprocess.normalize_each` in NumPy, see `_OutsideTorch._as_floats`."""
    rest = images - images.mean(axis=(1, 2, 3), keepdims=True)
    std = np.sqrt(np.square(rest).mean(axis=(1, 2, 3), keepdims=True))
    rest /= np.maximum(std, np.float32(1e-3))
    return rest


def _several(answer: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
    return [answer] if isinstance(answer, Tensor) else answer


# ------------------------------------------------------------------------------- runtimes
def onnxruntime_session(model: str | bytes) -> Any:
    """An ONNX file or its content, loaded for the CPU with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def compile_openvino(model: Any, precision: str, normalization: str) -> Any:
    """A model compiled for this CPU with as many threads as torch has.

    With "int8", layers that are not quantized compute in bf16 if the CPU does, which is OpenVINO's
    default, but in fp32 if they normalize each image by its own statistics, see `OpenVino`.
    """
    wide = precision == "int8" and normalization == "fixed" and cpu_has_bf16()
    bf16 = precision == "bf16" or wide
    return (
        import_openvino()
        .Core()
        .compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            },
        )
    )
