"""The file formats of `regard export`: writing, metadata, 8 bits, and loading."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from regard.engines.backends import compile_openvino, onnxruntime_session
from regard.engines.conversion import (
    Deployed,
    exported,
    import_openvino,
    onnx_int8,
    onnx_model,
    openvino_int8,
    openvino_model,
    quiet,
)
from regard.extras import require

Facts = Mapping[str, Any]  # the metadata; every value is JSON-serializable
Run = Callable[[Tensor], list[Tensor]]  # (B, C, H, W) float32 in 0..255 -> the graph's outputs


class Format:
    """One file format; to add one, write a subclass and list it in FORMATS."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str | None] = None  # a key of regard.extras
    needs: ClassVar[tuple[str, ...]] = ()  # modules of that extra
    int8_needs: ClassVar[tuple[str, ...] | None] = None  # None: the format does not support 8 bits

    def require(self, int8: bool) -> None:
        """Refuses the format if a package is missing.

        Raises:
            UsageError: names the packages and the command that installs them.
        """
        if self.extra is not None:
            needs = (*self.needs, *(self.int8_needs or ())) if int8 else self.needs
            require(self.extra, f"export to {self.name}", *needs)

    def parts(self, path: Path) -> list[Path]:
        """The files that make up an export, `path` first."""
        return [path]

    def write(self, path: Path, deployed: Deployed, facts: Facts) -> None:
        """Converts and writes the network in float32."""
        raise NotImplementedError

    def quantize(self, path: Path, deployed: Deployed, facts: Facts, images: Tensor) -> None:
        """Replaces the file by an 8-bit version, calibrated on `images` (n, C, H, W) in 0..255."""
        raise NotImplementedError

    def metadata(self, path: Path) -> dict[str, Any]:
        """The metadata stored in a file."""
        raise NotImplementedError

    def open(self, path: Path, precision: str = "fp32") -> Run:
        """Loads a file in its own runtime on the CPU, as "fp32" or with the settings for "int8"."""
        raise NotImplementedError


class Onnx(Format):
    """ONNX, opset 20, checked by ONNX itself."""

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    extra: ClassVar[str] = "onnxruntime"
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    int8_needs: ClassVar[tuple[str, ...]] = ()

    def write(self, path: Path, deployed: Deployed, facts: Facts) -> None:
        self._save(onnx_model(deployed), path, facts)

    def quantize(self, path: Path, deployed: Deployed, facts: Facts, images: Tensor) -> None:
        self._save(onnx_int8(path, images), path, facts)

    @staticmethod
    def _save(model: Any, path: Path, facts: Facts) -> None:
        import onnx

        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {f"regard.{k}": v for k, v in _texts(facts).items()})
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))

    def metadata(self, path: Path) -> dict[str, Any]:
        import onnx

        props = onnx.load(str(path), load_external_data=False).metadata_props
        return {
            p.key.removeprefix("regard."): json.loads(p.value)
            for p in props
            if p.key.startswith("regard.")
        }

    def open(self, path: Path, precision: str = "fp32") -> Run:
        session = onnxruntime_session(str(path))
        return lambda x: [torch.from_numpy(a) for a in session.run(None, {"images": x.numpy()})]


class OpenVino(Format):
    """OpenVINO's FILE.xml with the weights in FILE.bin, in float32 rather than float16."""

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    extra: ClassVar[str] = "openvino"
    needs: ClassVar[tuple[str, ...]] = ("openvino",)
    int8_needs: ClassVar[tuple[str, ...]] = ("nncf",)

    def parts(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def write(self, path: Path, deployed: Deployed, facts: Facts) -> None:
        self._save(openvino_model(deployed), path, facts)

    def quantize(self, path: Path, deployed: Deployed, facts: Facts, images: Tensor) -> None:
        self._save(openvino_int8(deployed, images), path, facts)

    @staticmethod
    def _save(model: Any, path: Path, facts: Facts) -> None:
        for name, text in _texts(facts).items():
            model.set_rt_info(text, ["regard", name])
        import_openvino().save_model(model, str(path), compress_to_fp16=False)

    def metadata(self, path: Path) -> dict[str, Any]:
        info = import_openvino().Core().read_model(str(path)).get_rt_info(["regard"]).value
        texts = {k: v if isinstance(v, str) else str(v.value) for k, v in info.items()}
        return {name: json.loads(text) for name, text in texts.items()}

    def open(self, path: Path, precision: str = "fp32") -> Run:
        model = import_openvino().Core().read_model(str(path))
        compiled = compile_openvino(model, precision, self.metadata(path)["normalization"])
        count = len(compiled.outputs)
        alone = threading.Lock()  # calls share one request, which holds the outputs

        def run(x: Tensor) -> list[Tensor]:
            with alone:
                answers = compiled(x.contiguous().numpy())
                return [torch.from_numpy(answers[k].copy()) for k in range(count)]

        return run


class Torch(Format):
    """torch.export's .pt2."""

    name: ClassVar[str] = "torch"
    suffix: ClassVar[str] = ".pt2"

    def write(self, path: Path, deployed: Deployed, facts: Facts) -> None:
        program = exported(deployed)
        with quiet():
            extra = {"regard.json": json.dumps(_texts(facts))}
            torch.export.save(program, str(path), extra_files=extra)

    def metadata(self, path: Path) -> dict[str, Any]:
        extra = {"regard.json": ""}
        with quiet():
            torch.export.load(str(path), extra_files=extra)
        return {name: json.loads(text) for name, text in json.loads(extra["regard.json"]).items()}

    def open(self, path: Path, precision: str = "fp32") -> Run:
        with quiet():
            module = torch.export.load(str(path)).module()

        def run(x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                answers = module(x)
            return list(answers) if isinstance(answers, tuple) else [answers]

        return run


FORMATS: dict[str, Format] = {f.name: f for f in (Onnx(), OpenVino(), Torch())}


def _texts(facts: Facts) -> dict[str, str]:
    """Each value as JSON, as the files store it: ASCII, as a class name may not be valid UTF-8."""
    return {name: json.dumps(value) for name, value in facts.items()}
