"""The engines: each answers (B, C, H, W) in 0..255 with probabilities (B, classes)."""

import contextlib
import copy
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.data.preprocess import Preprocess
from regard.engines.conversion import Deployed, fold_batch_norms, pair_columns
from regard.errors import UsageError
from regard.machine import cpu_has_bf16, keep_freed_memory

Run = Callable[[Tensor], Tensor]  # (B, C, H, W) float32 of one fixed B -> (B, classes)


class Engine:
    """A network made ready for batches of fixed sizes; other sizes are filled up or cut.

    Args:
        model: in evaluation mode. Not changed.
        preprocess: whose `input_size` is the only size that comes.
        sizes: the batches to be ready for.
        precision: "fp32" or "bf16".

    Raises:
        UsageError: a package that it needs is not installed, or the network can't be converted.
    """

    name = ""
    needs: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32", "bf16")
    fills_up = True  # a batch to one of `sizes`

    def __init__(
        self,
        model: torch.nn.Module,
        preprocess: Preprocess,
        sizes: tuple[int, ...] = (32,),
        precision: str = "fp32",
    ) -> None:
        absent = [package for package in self.needs if find_spec(package) is None]
        if absent:
            raise UsageError(
                f"engine {self.name} needs {' and '.join(absent)}: "
                f"pip install 'regard[{self.name}]' brings it"
            )
        if precision not in self.precisions:
            raise UsageError(f"engine {self.name} computes in {' or '.join(self.precisions)}")
        self.precision = precision
        self.sizes = tuple(sorted(set(sizes)))
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self._runs = self._build(model, preprocess)
        for size in self.sizes:  # what is compiled or allocated at the first call is done here
            self(torch.zeros(size, *preprocess.input_size))

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        raise NotImplementedError

    @torch.no_grad()  # which freezing asks for
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0..255, any B -> (B, classes), float32, on the CPU."""
        most = self.sizes[-1]
        parts = [self._one(images[k : k + most]) for k in range(0, len(images), most)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one(self, images: Tensor) -> Tensor:
        count = len(images)
        size = next(s for s in self.sizes if s >= count)
        x = self._as_floats(images)
        # filled up with its first image: zeros could be slow (denormals)
        if self.fills_up and count < size:
            x = torch.cat([x, x[:1].expand(size - count, -1, -1, -1)])
        return self._runs(x)[:count].cpu()

    def _as_floats(self, images: Tensor) -> Tensor:
        return images.to(self.device).float()

    def __repr__(self) -> str:
        return f"{self.name}, {self.precision}"


class _OutsideTorch(Engine):
    """An engine with threads of its own, on the CPU."""

    def _as_floats(self, images: Tensor) -> Tensor:
        # by numpy, as torch's threads would go on spinning for milliseconds after so short a
        # work, on the cores that this engine's threads are about to need
        return torch.from_numpy(images.cpu().numpy().astype(np.float32))


class Eager(Engine):
    """PyTorch, operator by operator, in channels_last."""

    name = "eager"
    fills_up = False

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        bf16 = self.precision == "bf16"
        own = fold_batch_norms(model).bfloat16() if bf16 else copy.deepcopy(model)
        deployed = Deployed(own.to(memory_format=torch.channels_last), preprocess)

        def run(x: Tensor) -> Tensor:
            found = deployed(x.contiguous(memory_format=torch.channels_last))
            assert isinstance(found, Tensor)
            return found

        return run


class Compiled(Engine):
    """torch.compile with frozen weights: BN folded, channels_last, operators fused."""

    name = "compiled"

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        folded = pair_columns(fold_batch_norms(model)).to(memory_format=torch.channels_last)
        if self.precision == "bf16":
            folded = folded.bfloat16()
        compiled = torch.compile(Deployed(folded, preprocess), dynamic=False)
        on_cpu = self.device.type == "cpu"

        def run(x: Tensor) -> Tensor:
            # as an option of torch.compile it would come too late: dynamo would hand the weights
            # over as inputs, and nothing of them could be frozen. The calls while an engine is
            # made compile; none does later, and what is asked for then costs next to nothing.
            with torch._inductor.config.patch(freezing=on_cpu):
                return compiled(x.contiguous(memory_format=torch.channels_last))

        return run


class OnnxRuntime(_OutsideTorch):
    """ONNX Runtime on the CPU, through a file in memory."""

    name = "onnxruntime"
    needs = ("onnxruntime", "onnx", "onnxscript")
    precisions: tuple[str, ...] = ("fp32",)

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        import onnxruntime

        program = onnx_program(Deployed(fold_batch_norms(model).cpu(), preprocess), preprocess)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        content = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": x.cpu().numpy()})[0])

        return run


class OpenVino(_OutsideTorch):
    """OpenVINO on the CPU; in bf16 by its own choice of layers."""

    name = "openvino"
    needs: tuple[str, ...] = ("openvino",)

    def _build(self, model: torch.nn.Module, preprocess: Preprocess) -> Run:
        found = self._convert(Deployed(fold_batch_norms(model).cpu(), preprocess), preprocess)
        runs = {}
        for size in self.sizes:  # a fixed shape is faster than one that may change
            found.reshape([size, *preprocess.input_size])
            runs[size] = compile_openvino(found, self.precision).create_infer_request()

        def run(x: Tensor) -> Tensor:
            answers = runs[len(x)].infer([x.cpu().contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(answers[0].copy())

        return run

    def _convert(self, deployed: Deployed, preprocess: Preprocess) -> Any:
        return openvino_model(deployed, preprocess)


ENGINES: dict[str, type[Engine]] = {e.name: e for e in (Eager, Compiled, OnnxRuntime, OpenVino)}


# ------------------------------------------------------------------- conversion, also of export
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print and warn of their own deprecations, which nobody here can act on."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        yield


def example(preprocess: Preprocess, batch: int = 2) -> Tensor:
    """(batch, C, H, W) of noise in 0..255 to trace with."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, *preprocess.input_size, generator=generator) * 255


def exported(deployed: Deployed, preprocess: Preprocess) -> torch.export.ExportedProgram:
    """The graph of torch.export, of any batch.

    Raises:
        UsageError: the network can't be exported.
    """
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(
                deployed, (example(preprocess),), dynamic_shapes=({0: batch},)
            )
        except Exception as error:  # torch has no class of its own for these
            raise UsageError(f"torch.export: {_first_line(error)}") from error


def onnx_program(deployed: Deployed, preprocess: Preprocess) -> Any:
    """torch.onnx's program of any batch: images -> probabilities, then the maps by name.

    Raises:
        UsageError: the network can't be converted.
    """
    program = exported(deployed, preprocess)
    with quiet():
        try:
            return torch.onnx.export(
                program, (), input_names=["images"], output_names=output_names(deployed),
                dynamo=True, verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise UsageError(f"torch.onnx: {_first_line(error)}") from error


def import_openvino() -> Any:
    """OpenVINO, without the messages about its use that it and NNCF would send over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # not importable
    os.environ.setdefault("NNCF_CI", "1")
    import openvino

    return openvino


def openvino_model(deployed: Deployed, preprocess: Preprocess) -> Any:
    """OpenVINO's model of any batch: images -> probabilities, then the maps by name.

    Raises:
        UsageError: the network can't be converted.
    """
    openvino = import_openvino()
    program = exported(deployed, preprocess)
    with quiet():
        try:
            model = openvino.convert_model(program)
        except Exception as error:
            raise UsageError(f"openvino: {_first_line(error)}") from error
    model.reshape([-1, *preprocess.input_size])
    model.inputs[0].tensor.set_names({"images"})
    for port, name in zip(model.outputs, output_names(deployed), strict=True):
        port.tensor.set_names({name})
    return model


def compile_openvino(model: Any, precision: str) -> Any:
    """A model made ready for this CPU, with as many threads as torch has.

    Of "int8" what is not in 8 bits is in bf16 where the CPU computes in it, as OpenVINO itself
    has it.
    """
    openvino = import_openvino()
    bf16 = precision == "bf16" or (precision == "int8" and cpu_has_bf16())
    return openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )


def output_names(deployed: Deployed) -> list[str]:
    """Of the graph's outputs: probabilities, then attention.NAME of each map."""
    return ["probabilities", *(f"attention.{name}" for name in deployed.maps)]


def _first_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
