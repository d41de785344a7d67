"""Converts a network for deployment: pixels in, probabilities out, all in one graph.

`Deployed` defines the graph, `fold_batch_norms` makes it smaller, and the functions below them
convert it into a program of torch.export, ONNX or OpenVINO, in float32 or in 8 bits.
"""

import contextlib
import copy
import io
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from regard.attention import attention_kinds
from regard.data.preprocess import Preprocess
from regard.errors import UsageError
from regard.features import joined_features, last_layers
from regard.files import reason


class Deployed(nn.Module):
    """Normalization, network and softmax as one module; resizing stays outside.

    Args:
        model: in evaluation mode; its weights are shared, not copied.
        preprocess: how the network's images are normalized.
        maps: names of attention modules whose maps are additional outputs.
        temperature: the logits are divided by it.

    Shapes: (B, C, H, W) in 0..255 -> probabilities (B, classes) in float32; with `maps` a tuple
    of the probabilities and of each map as (B, h, w), the mean over its channels.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        maps: list[str] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.preprocess: Preprocess = preprocess
        self.temperature: float = temperature
        self.maps: list[str] = maps or []
        self.dtype: torch.dtype = next(model.parameters()).dtype

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs: probabilities, then attention.NAME for each map."""
        return ["probabilities", *(f"attention.{name}" for name in self.maps)]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.preprocess.normalize(images).to(self.dtype)
        if not self.maps:
            return self._softmax(self.model(x))
        outputs: dict[str, Tensor] = {}
        with contextlib.ExitStack() as hooks:  # on the model only during this call
            for name in self.maps:
                module = self.model.get_submodule(name)
                hook = module.register_forward_hook(
                    lambda module, inputs, output, name=name: outputs.__setitem__(name, output)
                )
                hooks.callback(hook.remove)
            probabilities = self._softmax(self.model(x))
        return (probabilities, *(outputs[name].float().mean(dim=1) for name in self.maps))

    def _softmax(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return (logits if self.temperature == 1.0 else logits / self.temperature).softmax(dim=1)


class DeployedWithFeatures(Deployed):
    """`Deployed` that also outputs the features, for an engine's own copy of the network.

    The hooks stay on the model, as hooks for one call, which `Deployed` has, can't be compiled.

    Shapes: (B, C, H, W) in 0..255 -> (B, classes) and (B, D), float32.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess) -> None:
        super().__init__(model, preprocess)
        self._given: list[Tensor] = []
        for layer in last_layers(model):
            layer.register_forward_pre_hook(lambda _, inputs: self._given.append(inputs[0]))

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return ["probabilities", "features"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self._given.clear()
        probabilities = super().forward(images)
        assert isinstance(probabilities, Tensor)
        features = joined_features(self._given)
        self._given.clear()
        return probabilities, features


def spatial_maps(model: nn.Module) -> list[str]:
    """Names of the attention modules with spatial maps: all but channel gates."""
    return [name for name, kind in attention_kinds(model).items() if kind != "channel"]


class _Tracer(fx.Tracer):
    """Traces as timm does: timm's non-traceable functions and modules are leaves."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = tuple(get_notrace_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


def _joined(
    model: nn.Module, first: type[nn.Module], then: type[nn.Module]
) -> list[tuple[str, str]]:
    """Pairs of module names, where the second is called once, directly on the first's output.

    The first is called once too, and its output is not used elsewhere. Empty if the network can't
    be traced because its control flow depends on data.
    """
    try:
        nodes = _Tracer().trace(model).nodes
    except Exception:  # torch.fx raises many kinds; an unfolded network is slower, not wrong
        return []
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in nodes if node.op == "call_module")

    def is_one(node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and type(modules[str(node.target)]) is kind

    found = []
    for node in nodes:
        if not is_one(node, then) or calls[node.target] > 1:
            continue
        before = node.args[0]
        while is_one(before, nn.Identity) and len(before.users) == 1:
            before = before.args[0]
        if is_one(before, first) and calls[before.target] == 1 and len(before.users) == 1:
            found.append((before.target, node.target))
    return found


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, by)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy with each BN that directly follows one convolution folded into it.

    Computes the same function up to rounding, with fewer passes over the feature maps; done in the
    weights' own precision, before any cast to bf16. A BN before its convolution (pre-activation
    units) stays. A network that can't be traced is copied unchanged.
    """
    model = copy.deepcopy(model).eval()
    for of_conv, of_bn in _joined(model, nn.Conv2d, nn.BatchNorm2d):
        conv: Any = model.get_submodule(of_conv)
        bn: Any = model.get_submodule(of_bn)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        _replace(model, of_bn, nn.Identity())
    return model


# ------------------------------------------------------------------------------- programs
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses what exporters print and their own deprecation warnings."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # a library's logging.info() would add one that prints, and stays
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)


def exported(deployed: Deployed) -> torch.export.ExportedProgram:
    """The program of torch.export for any batch size.

    Raises:
        UsageError: the network can't be exported.
    """
    batch = torch.export.Dim("batch", min=1, max=2**16)
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(2, *deployed.preprocess.input_size, generator=generator) * 255
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(deployed, (example,), dynamic_shapes=({0: batch},))
        except Exception as error:  # torch has no specific class for these
            raise UsageError(f"torch.export: {reason(error)}") from error


def onnx_model(deployed: Deployed) -> Any:
    """The ONNX model for any batch size: images -> probabilities, then the maps by name.

    Raises:
        UsageError: the network can't be converted.
    """
    program = exported(deployed)
    with quiet():
        try:
            return torch.onnx.export(
                program, (), input_names=["images"], output_names=deployed.output_names,
                dynamo=True, verbose=False,
            ).model_proto  # type: ignore[union-attr]  # fmt: skip
        except Exception as error:  # the exporter has no specific class for these
            raise UsageError(f"torch.onnx: {reason(error)}") from error


def import_openvino() -> Any:
    """Imports OpenVINO without the usage statistics that it and NNCF would send to the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # not importable
    os.environ.setdefault("NNCF_CI", "1")
    import openvino

    return openvino


def openvino_model(deployed: Deployed) -> Any:
    """OpenVINO's model for any batch size: images -> probabilities, then the maps by name.

    Raises:
        UsageError: the network can't be converted.
    """
    openvino = import_openvino()
    program = exported(deployed)
    with quiet():
        try:
            model = openvino.convert_model(program)
        except Exception as error:  # OpenVINO raises plain RuntimeError and its own kinds
            raise UsageError(f"openvino: {reason(error)}") from error
    model.reshape([-1, *deployed.preprocess.input_size])
    model.inputs[0].tensor.set_names({"images"})
    for port, name in zip(model.outputs, deployed.output_names, strict=True):
        port.tensor.set_names({name})
    return model


# ----------------------------------------------------------------------------------- INT8
def openvino_int8(deployed: Deployed, images: Tensor) -> Any:
    """OpenVINO's model in 8 bits, calibrated on `images` (n, C, H, W) in 0..255.

    Only convolutions are quantized: they have nearly all of the arithmetic, and gates, masks and
    sums in bf16 are as fast and lose less. Ranges cover the values of all images, since NNCF's
    default, the mean of each image's extremes, cuts off many. NNCF's bias correction is disabled.
    With both defaults, a probability of the digits network was off by 0.21, without them by 0.03.
    """
    import_openvino()
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino_model(deployed)
    others = {op.get_type_name() for op in model.get_ops()} - {"Convolution", "GroupConvolution"}
    with quiet():
        return nncf.quantize(
            model, nncf.Dataset([image.numpy() for image in images.split(1)]),
            preset=nncf.QuantizationPreset.MIXED, subset_size=len(images),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            ),
            # NNCF's graph lacks some of the other types, and its validation would refuse them
            ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False),
        )  # fmt: skip


def onnx_int8(path: Path, images: Tensor) -> Any:
    """The ONNX file in 8 bits, calibrated on `images` (n, C, H, W) in 0..255."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"images": image.numpy()}

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, quiet():
        ready, small = Path(scratch, "ready.onnx"), Path(scratch, "int8.onnx")
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready), str(small), Calibration(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )  # fmt: skip
        return onnx.load(str(small))
