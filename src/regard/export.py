"""`regard export`: a network as one file that runs without Regard.

The graph takes decoded and resized images (B, C, H, W) as float32 in 0..255 and gives
probabilities: standardizing and softmax are inside. Class names, the input's size and how to
resize are in the file's metadata. A file appears under its name only after it was loaded again
and answered real images as the network does.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.attention import attention_kinds, record
from regard.data.loading import Reader, StreamingLoader, default_workers
from regard.data.sources import ImageTable, as_known
from regard.engines.backends import (
    compile_openvino,
    exported,
    import_openvino,
    onnx_program,
    openvino_model,
    output_names,
    quiet,
)
from regard.engines.conversion import Deployed, fold_batch_norms, spatial_maps
from regard.errors import ExportError, FileError, ImageError, UsageError
from regard.predict import Classifier, load, probabilities_of
from regard.run_data import run_table
from regard.version import __version__

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",), "torch": ()}


INT8_NEEDS = {"onnx": (), "openvino": ("nncf",)}


BOUND = 1e-4
"""By how much a probability of the file may differ from the network's; a map relative to its
largest value."""


CHECKED = 32  # real images that are compared
CALIBRATED = 300  # training images of which INT8's ranges are taken
MOST_LOST = 0.01  # of the accuracy, by INT8
Run = Callable[[Tensor], list[Tensor]]  # (B, C, H, W) -> the graph's outputs
Echo = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """Real images to compare on: what to check with, to calibrate with, to count accuracy on."""

    checked: Tensor  # (n, C, H, W) in 0..255
    train: ImageTable
    counted: ImageTable
    split: str  # of those counted


def export(
    run: str | Path,
    *,
    to: str,
    out: str | Path,
    data: str | None = None,
    root: str | Path | None = None,
    maps: bool = False,
    int8: bool = False,
    force: bool = False,
    overwrite: bool = False,
    echo: Echo = print,
) -> Path:
    """Writes a run's network as one file, once the file has shown that it answers alike.

    Args:
        run: a run's folder, or any folder in timm's `local-dir` layout (with `data`).
        to: "onnx" (opset 20), "openvino" (FILE.xml with FILE.bin beside) or "torch"
            (torch.export's .pt2).
        out: the file; its suffix must be that of `to`.
        data: images to compare on; without, the run's own.
        root: where cifar10 and cifar100 are.
        maps: the attention maps come out as well, each (B, h, w), named attention.MODULE.
        int8: 8-bit weights and activations, calibrated on CALIBRATED training images.
        force: keep an INT8 file that loses more than MOST_LOST of the accuracy.
        overwrite: replace a file that is there already.
        echo: is told what was checked.

    Returns:
        The file.

    Raises:
        UsageError: a wrong call, or a network that can't be converted.
        ExportError: the file does not answer as the network does, or INT8 loses too much;
            nothing is left at `out`.
        OSError: the file can't be written, or no image can be read.
    """
    out = Path(out)
    _check_call(to, out, int8, overwrite)
    classifier = load(run)
    own = spatial_maps(classifier.model) if maps else []
    if maps and not own:
        raise UsageError(f"--maps: {run} has no maps of where it looks")
    images = _images(Path(run), classifier, data, root)
    deployed = Deployed(fold_batch_norms(classifier.model).float(), classifier.preprocess, own)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        path = Path(scratch, out.name)
        facts = metadata(classifier, deployed, "int8" if int8 else "fp32")
        _WRITERS[to](path, deployed, classifier, facts)
        answers = open_file(path, to)
        _compare(classifier, answers, images.checked, own, echo)
        if int8:
            calibration = _some(classifier, images.train, CALIBRATED)
            _QUANTIZERS[to](path, deployed, classifier, facts, calibration)
            _judge_int8(classifier, open_file(path, to, "int8"), images, force, echo)
        _check_metadata(path, to, facts)
        for part in sorted(Path(scratch).iterdir(), key=lambda p: p == path):  # FILE itself last
            part.chmod(0o666 & ~_umask())
            os.replace(part, out.parent / part.name)
    size = sum(p.stat().st_size for p in _parts(out, to)) / 1e6
    echo(f"{out} ({size:.1f} MB): any batch of {_shape(classifier)} in 0..255 -> probabilities")
    return out


def _check_call(to: str, out: Path, int8: bool, overwrite: bool) -> None:
    if to not in SUFFIXES:
        raise UsageError(f"--to {to}: choose one of {', '.join(SUFFIXES)}")
    if out.suffix != SUFFIXES[to]:
        raise UsageError(f"--out {out}: a file for {to} ends in {SUFFIXES[to]}")
    if int8 and to not in INT8_NEEDS:
        raise UsageError(f"--int8: only with --to {' or '.join(INT8_NEEDS)}")
    needs = (*NEEDS[to], *(INT8_NEEDS[to] if int8 else ()))
    if absent := [package for package in needs if find_spec(package) is None]:
        extra = "onnxruntime" if to == "onnx" else to
        raise UsageError(
            f"--to {to} needs {' and '.join(absent)}: pip install 'regard[{extra}]' brings it"
        )
    if out.is_dir():
        raise UsageError(f"--out {out}: that is a folder")
    if not overwrite and (there := [p for p in _parts(out, to) if p.exists()]):
        raise UsageError(f"{there[0]} is there already: choose another --out, or --overwrite")


def _parts(out: Path, to: str) -> list[Path]:
    return [out, out.with_suffix(".bin")] if to == "openvino" else [out]


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _shape(classifier: Classifier) -> str:
    return "x".join(map(str, classifier.preprocess.input_size))


# ------------------------------------------------------------------------------ real images
def _images(run: Path, classifier: Classifier, data: str | None, root: Any) -> Images:
    table = as_known(run_table(run, data, root), classifier.class_names)
    parts = {s: table.select(table.splits == s) for s in ("train", "val", "test")}
    split = next((s for s in ("val", "test") if len(parts[s])), "")
    counted = parts[split] if split else table
    train = parts["train"] if len(parts["train"]) else table
    return Images(_some(classifier, counted, CHECKED), train, counted, split or "all")


def _some(classifier: Classifier, table: ImageTable, most: int) -> Tensor:
    """At most so many images of a table, evenly spread, (n, C, H, W) in 0..255.

    Raises:
        OSError: none can be read.
    """
    reader = Reader(table, classifier.preprocess)
    found, fault = [], ""
    for row in np.linspace(0, len(table) - 1, min(most, len(table))).round().astype(int).tolist():
        try:
            found.append(classifier.preprocess.fit(reader.decode(row)).float())
        except ImageError as error:
            fault = str(error)
    if not found:
        raise FileError(f"no image of {table.name} can be read to compare on: {fault}")
    return torch.stack(found)


# ------------------------------------------------------------------------------ the metadata
def metadata(classifier: Classifier, deployed: Deployed, precision: str) -> dict[str, str]:
    """What the file says of itself; every value is JSON."""
    preprocess = classifier.preprocess
    architecture = (getattr(classifier.model, "pretrained_cfg", None) or {}).get("architecture")
    facts: dict[str, Any] = {
        "class_names": classifier.class_names,
        "input_size": list(preprocess.input_size),
        "input_range": [0, 255],
        "input_channels": "gray" if preprocess.input_size[0] == 1 else "RGB",
        "resize": preprocess.resize,
        "crop_pct": preprocess.crop_pct,
        "interpolation": "bilinear, antialiased",
        "outputs": output_names(deployed),
        "attention_kinds": {n: attention_kinds(classifier.model)[n] for n in deployed.maps},
        "precision": precision,
        "network": architecture,
        "made_by": f"regard {__version__}",
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}


def read_metadata(path: str | Path, to: str) -> dict[str, Any]:
    """The facts in an exported file."""
    if to == "onnx":
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        return {
            p.key.removeprefix("regard."): json.loads(p.value)
            for p in model.metadata_props
            if p.key.startswith("regard.")
        }
    if to == "openvino":
        model = import_openvino().Core().read_model(str(path))
        told = model.get_rt_info(["regard"]).value
        return {name: json.loads(_text(value)) for name, value in told.items()}
    extra = {"regard.json": ""}
    torch.export.load(str(path), extra_files=extra)
    return {name: json.loads(value) for name, value in json.loads(extra["regard.json"]).items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value.value)


def _check_metadata(path: Path, to: str, facts: dict[str, str]) -> None:
    if read_metadata(path, to) != {name: json.loads(value) for name, value in facts.items()}:
        raise ExportError("the file does not say of itself what was written; it was not kept")


# ------------------------------------------------------------------------------ writing
def _write_onnx(path: Path, deployed: Deployed, classifier: Classifier, facts: Any) -> None:
    model = onnx_program(deployed, classifier.preprocess).model_proto
    _save_onnx(model, path, facts)


def _save_onnx(model: Any, path: Path, facts: dict[str, str]) -> None:
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {f"regard.{k}": v for k, v in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _write_openvino(path: Path, deployed: Deployed, classifier: Classifier, facts: Any) -> None:
    _save_openvino(openvino_model(deployed, classifier.preprocess), path, facts)


def _save_openvino(model: Any, path: Path, facts: dict[str, str]) -> None:
    openvino = import_openvino()
    for name, value in facts.items():
        model.set_rt_info(value, ["regard", name])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _write_torch(path: Path, deployed: Deployed, classifier: Classifier, facts: Any) -> None:
    program = exported(deployed, classifier.preprocess)
    with quiet():
        torch.export.save(program, str(path), extra_files={"regard.json": json.dumps(facts)})


_WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino, "torch": _write_torch}


# ------------------------------------------------------------------------------ INT8
def _quantize_onnx(
    path: Path, deployed: Deployed, classifier: Classifier, facts: Any, images: Tensor
) -> None:
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
        _save_onnx(onnx.load(str(small)), path, facts)


def _quantize_openvino(
    path: Path, deployed: Deployed, classifier: Classifier, facts: Any, images: Tensor
) -> None:
    _save_openvino(openvino_int8(deployed, classifier.preprocess, images), path, facts)


def openvino_int8(deployed: Deployed, preprocess: Any, images: Tensor) -> Any:
    """OpenVINO's model in 8 bits, its ranges those of `images` (n, C, H, W) in 0..255.

    The convolutions alone are: they have nearly all of the arithmetic, and gates, masks and
    sums in bf16 are as fast and lose less.
    """
    import logging

    import_openvino()
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino_model(deployed, preprocess)
    others = {op.get_type_name() for op in model.get_ops()} - {"Convolution", "GroupConvolution"}
    with quiet():
        return nncf.quantize(
            model, nncf.Dataset([image.numpy() for image in images.split(1)]),
            preset=nncf.QuantizationPreset.MIXED, subset_size=len(images),
            # some of the others are not in NNCF's own graph: that is no fault
            ignored_scope=nncf.IgnoredScope(types=sorted(others), validate=False),
        )  # fmt: skip


_QUANTIZERS = {"onnx": _quantize_onnx, "openvino": _quantize_openvino}


# ------------------------------------------------------------------------------ reading again
def open_file(path: str | Path, to: str, precision: str = "fp32") -> Run:
    """An exported file in its own runtime on the CPU, in fp32 or as a file in "int8" is run."""
    path = Path(path)
    if to == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(a) for a in session.run(None, {"images": x.numpy()})]
    if to == "openvino":
        compiled = compile_openvino(import_openvino().Core().read_model(str(path)), precision)
        count = len(compiled.outputs)

        def answer(x: Tensor) -> list[Tensor]:
            found = compiled(x.contiguous().numpy())
            return [torch.from_numpy(found[k].copy()) for k in range(count)]

        return answer
    with quiet():
        module = torch.export.load(str(path)).module()

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found = module(x)
        return list(found) if isinstance(found, tuple) else [found]

    return run


def _compare(
    classifier: Classifier, answers: Run, images: Tensor, maps: Sequence[str], echo: Echo
) -> None:
    """Holds the file's answers against the network's, one image alone and several together.

    Raises:
        ExportError: they differ by more than BOUND, or in the likeliest class.
    """
    worst = 0.0
    for part in (images[:1], images[:3], images):
        expected = _expected(classifier, part, maps)
        found = answers(part)
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
            raise ExportError("the file's outputs are not of the network's shapes; it was not kept")
        if not torch.equal(found[0].argmax(dim=1), expected[0].argmax(dim=1)):
            raise ExportError("the file finds another class likeliest; it was not kept")
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            scale = 1.0 if k == 0 else float(b.abs().max().clamp_min(1e-30))
            difference = float((a - b).abs().max()) / scale
            if not difference <= BOUND:  # a NaN is not either
                what = "probabilities" if k == 0 else f"the map {maps[k - 1]}"
                raise ExportError(f"{what} of the file differ by {difference:.2g}; it was not kept")
            worst = max(worst, difference)
    count = len(images)
    echo(f"loaded again: {count} images alone and together, answers within {worst:.1g}")


def _expected(classifier: Classifier, images: Tensor, maps: Sequence[str]) -> list[Tensor]:
    if not maps:
        return [classifier.probabilities(images)]
    with record(classifier.model) as seen:
        shares = classifier.probabilities(images)
    found = [m for name in maps if (m := seen[name].spatial()) is not None]
    return [shares, *(m.float().cpu() for m in found)]


def _judge_int8(
    classifier: Classifier, answers: Run, images: Images, force: bool, echo: Echo
) -> None:
    """Counts what 8 bits cost on the validation images.

    Raises:
        ExportError: more than MOST_LOST, and not `force`.
    """
    right = _right(classifier, images.counted)
    small = Classifier(classifier.model, classifier.class_names, classifier.preprocess)
    small.engine = lambda x: answers(x.float())[0]
    right8 = _right(small, images.counted)
    count = len(right)
    before, after = right.mean(), right8.mean()
    which = {"val": "validation", "test": "test", "all": "labeled"}[images.split]
    line = (
        f"INT8 on the {count:,} {which} images: {after:.2%} against {before:.2%} in fp32, "
        f"{100 * (before - after):+.2f} points lost"
    )
    if before - after > MOST_LOST and not force:
        raise ExportError(f"{line}: more than {100 * MOST_LOST:.0f}, so not kept; --force keeps it")
    echo(line)


def _right(classifier: Classifier, table: ImageTable) -> Any:
    """Whether each readable image's likeliest class is its label."""
    source = StreamingLoader(Reader(table, classifier.preprocess), None, 0, default_workers())
    rows, found, _ = probabilities_of(classifier, source, len(table))
    return found.argmax(axis=1) == table.labels[rows]
