"""`regard export`: a network as one file that runs without Regard.

The graph takes decoded and resized images (B, C, H, W) as float32 in 0..255 and returns
probabilities: normalization and softmax are inside. Class names, input size and how to resize
are in the file's metadata, and the program written with it (engines/standalone.py) predicts image
files. Nothing gets its final name before the file was loaded again and its outputs on real images
were compared with the network's.
"""

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regard.attention import attention_kinds, record
from regard.data.loading import Reader, StreamingLoader, default_workers
from regard.data.sources import ImageTable, as_known
from regard.engines.conversion import Deployed, fold_batch_norms, spatial_maps
from regard.engines.formats import FORMATS, Format, Run
from regard.engines.program import program, program_path
from regard.errors import ExportError, FileError, ImageError, UsageError
from regard.files import plural, reason, signed, spread
from regard.models.io import network_folder
from regard.predict import Classifier, load, probabilities_of
from regard.run_data import run_table
from regard.version import __version__

log: logging.Logger = logging.getLogger(__name__)

TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""The largest difference of a probability from the network's in fp32, by the file's precision; for
maps, relative to the map's largest value."""
CHECKED = 32  # images that are compared
CALIBRATION = 300  # training images that calibrate INT8
MAX_LOSS = 0.01  # of accuracy lost by INT8


@dataclass(frozen=True)
class Images:
    """Real images for comparing outputs, for calibration, and for measuring the accuracy."""

    compared: Tensor  # (n, C, H, W) in 0..255
    training: ImageTable
    scored: ImageTable
    scored_name: str  # name of the scored images in messages


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
    device: str = "cpu",
    precision: str = "fp32",
) -> Path:
    """Writes a run's network as one file after checking that its outputs are the network's.

    Args:
        run: a run's folder; or, with `data`, any folder in timm's `local-dir` layout or the name
            of weights that come with Regard.
        to: "onnx" (opset 20), "openvino" (FILE.xml and FILE.bin) or "torch" (torch.export's .pt2).
        out: the file; its suffix must be that of `to`. A program with its name, ending in .py, is
            written to the same folder.
        data: labeled images for the comparison; default: the run's own.
        root: folder of cifar10 and cifar100.
        maps: also output the attention maps, each (B, h, w), named attention.MODULE.
        int8: 8-bit weights and activations, calibrated on CALIBRATION training images.
        force: keep an INT8 file that loses more than MAX_LOSS of the accuracy.
        overwrite: replace existing files.
        device: where the network computes the outputs for the comparison, as for `regard.load`; the
            file's own are computed on the CPU.
        precision: precision of the file: "fp32", or "bf16" with to="torch" and without int8.

    Returns:
        The file.

    Raises:
        UsageError: a wrong call, a missing package, or a network that can't be converted.
        ExportError: the file's outputs differ from the network's, or INT8 loses too much;
            nothing is left at `out`.
        FileError: the file can't be written, or no image can be read.
    """
    file_format, parts = _check_call(to, Path(out), int8, overwrite, precision)
    out = parts[0]
    folder = network_folder(run)
    classifier = load(folder, device)
    shown = spatial_maps(classifier.model) if maps else []
    if maps and not shown:
        raise UsageError(f"maps=True: the network of {run} has no spatial attention maps")
    images = _images(folder, classifier, data, root)
    folded = fold_batch_norms(classifier.model).cpu().float()
    deployed = Deployed(
        folded.bfloat16() if precision == "bf16" else folded, classifier.preprocess, shown,
        classifier.temperature,
    )  # fmt: skip
    facts = metadata(classifier, deployed, "int8" if int8 else precision)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            path = Path(scratch, out.name)
            file_format.write(path, deployed, facts)
            tolerance = TOLERANCE[precision]
            _compare(classifier, file_format.open(path), images.compared, shown, tolerance)
            if int8:
                calibration = _some(classifier, images.training, CALIBRATION)
                file_format.quantize(path, deployed, facts, calibration)
                _check_int8(classifier, file_format.open(path, "int8"), images, force)
            if file_format.metadata(path) != facts:
                raise ExportError("the file's metadata is not what was written; it was not kept")
            path.with_name(parts[-1].name).write_text(program(out), encoding="ascii")
            _publish(path, parts)
    except OSError as error:
        raise FileError(f"{out} can't be written ({reason(error)})") from error
    size = sum(p.stat().st_size for p in file_format.parts(out)) / 1e6
    shape = "x".join(map(str, classifier.preprocess.input_size))
    if classifier.calibration is not None:
        log.info("%s: %s", run, classifier.calibration.sentence())
    log.info("%s (%.1f MB): any batch of %s in 0..255 -> probabilities", out, size, shape)
    log.info("%s: predicts image files without Regard", parts[-1])
    return out


def _check_call(
    to: str, out: Path, int8: bool, overwrite: bool, precision: str
) -> tuple[Format, list[Path]]:
    """The format, and all files to write, with links resolved: `out` first, the program last."""
    if to not in FORMATS:
        raise UsageError(f"to={to}: choose one of {', '.join(FORMATS)}")
    file_format = FORMATS[to]
    if out.suffix != file_format.suffix:
        raise UsageError(f"{out}: a file for {to} ends in {file_format.suffix}")
    if int8 and file_format.int8_needs is None:
        able = [f.name for f in FORMATS.values() if f.int8_needs is not None]
        raise UsageError(f"int8=True: only with to={' or to='.join(able)}")
    if precision not in TOLERANCE:
        raise UsageError(f"precision={precision!r}: choose {' or '.join(TOLERANCE)}")
    if precision == "bf16" and (to != "torch" or int8):
        raise UsageError(
            "precision=bf16: only with to=torch and without int8; OpenVINO runs fp32 files in bf16 "
            "where the machine supports it, ONNX Runtime on CPUs never does"
        )
    file_format.require(int8)
    out = out.expanduser().resolve()
    if any("\ud800" <= c <= "\udfff" for c in str(out)):
        raise UsageError(f"{str(out)!a}: the runtimes can't open paths that are not UTF-8")
    parts = [*file_format.parts(out), program_path(out)]
    for part in parts:
        if part.exists() and not part.is_file():
            raise UsageError(f"{part} is not a regular file: choose another name")
        if part.exists() and not overwrite:
            raise UsageError(f"{part} already exists: choose another name, or give overwrite=True")
    return file_format, parts


def _publish(path: Path, parts: Sequence[Path]) -> None:
    """Moves the written files to their final names, `path` itself last."""
    for part in reversed(parts):
        written = path.with_name(part.name)
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, part)


# ------------------------------------------------------------------------------ real images
def _images(run: Path, classifier: Classifier, data: str | None, root: Any) -> Images:
    table = as_known(run_table(run, data, root), classifier.class_names)
    parts = {s: table.select(table.splits == s) for s in ("train", "val", "test")}
    split = next((s for s in ("val", "test") if len(parts[s])), "")
    scored = parts[split] if split else table
    training = parts["train"] if len(parts["train"]) else table
    name = {"val": "validation", "test": "test", "": "labeled"}[split]
    return Images(_some(classifier, scored, CHECKED), training, scored, name)


def _some(classifier: Classifier, table: ImageTable, most: int) -> Tensor:
    """At most `most` images of a table, evenly spread, (n, C, H, W) in 0..255.

    Raises:
        FileError: none can be read.
    """
    reader = Reader(table, classifier.preprocess)
    images, fault = [], ""
    for row in spread(len(table), most).tolist():
        try:
            images.append(classifier.preprocess.fit(reader.decode(row)).float())
        except ImageError as error:
            fault = str(error)
    if not images:
        raise FileError(f"no image of {table.name} can be read for the comparison: {fault}")
    return torch.stack(images)


def metadata(classifier: Classifier, deployed: Deployed, precision: str) -> dict[str, Any]:
    """The metadata of an exported file."""
    preprocess = classifier.preprocess
    kinds = attention_kinds(classifier.model)
    return {
        "class_names": classifier.class_names,
        "input_size": list(preprocess.input_size),
        "input_range": [0, 255],
        "input_channels": "gray" if preprocess.input_size[0] == 1 else "RGB",
        "resize": preprocess.resize,
        "crop_pct": preprocess.crop_pct,
        "resize_first": preprocess.resize_first,
        "interpolation": "bilinear, antialiased",
        "value_range": preprocess.value_range and list(preprocess.value_range),
        "normalization": preprocess.normalization,
        "outputs": deployed.output_names,
        "attention_kinds": {name: kinds[name] for name in deployed.maps},
        "precision": precision,
        "calibration": _calibration(classifier),
        "network": (getattr(classifier.model, "pretrained_cfg", None) or {}).get("architecture"),
        "made_by": f"regard {__version__}",
    }


def _calibration(classifier: Classifier) -> dict[str, Any] | None:
    """The temperature, which is part of the graph, and the threshold, which is not."""
    stored = classifier.calibration
    if stored is None:
        return None
    threshold = None if stored.threshold is None else stored.threshold.to_dict()
    fitted_on = f"{stored.images} {stored.source}"
    return {"temperature": stored.temperature, "threshold": threshold, "fitted_on": fitted_on}


# ------------------------------------------------------------------------------ the checks
def _compare(
    classifier: Classifier, answers: Run, images: Tensor, maps: Sequence[str], tolerance: float
) -> None:
    """Compares the file's outputs with the network's, for a single image and for batches.

    Raises:
        ExportError: they differ by more than `tolerance`, or in the top-1 class.
    """
    worst = 0.0
    for part in (images[:1], images[:3], images):
        expected = _expected(classifier, part, maps)
        found = answers(part)
        if [t.shape for t in found] != [t.shape for t in expected]:
            raise ExportError(
                "the file's outputs do not have the network's shapes; it was not kept"
            )
        if not torch.equal(found[0].argmax(dim=1), expected[0].argmax(dim=1)):
            raise ExportError("the file's top-1 class differs from the network's; it was not kept")
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            scale = 1.0 if k == 0 else float(b.abs().max().clamp_min(1e-30))
            difference = float((a - b).abs().max()) / scale
            if not difference <= tolerance:  # also true for NaN
                what = "probabilities" if k == 0 else f"the map {maps[k - 1]}"
                raise ExportError(f"{what} of the file differ by {difference:.2g}; it was not kept")
            worst = max(worst, difference)
    log.info("loaded again: %d images alone and in batches, answers within %.1g of the network's",
             len(images), worst)  # fmt: skip


def _expected(classifier: Classifier, images: Tensor, maps: Sequence[str]) -> list[Tensor]:
    if not maps:
        return [classifier.probabilities(images)]
    with record(classifier.model) as recorded:
        probabilities = classifier.probabilities(images)
    spatial = [m for name in maps if (m := recorded[name].spatial()) is not None]
    return [probabilities, *(m.float().cpu() for m in spatial)]


def _check_int8(classifier: Classifier, answers: Run, images: Images, force: bool) -> None:
    """Measures the loss of accuracy by 8 bits.

    Raises:
        ExportError: it is more than MAX_LOSS, and not `force`.
    """
    correct = _correct(classifier, images.scored)
    small = Classifier(classifier.model, classifier.class_names, classifier.preprocess)
    small.engine = lambda x: answers(x.float())[0]
    before, after = correct.mean(), _correct(small, images.scored).mean()
    line = (
        f"INT8 on {plural(len(correct), f'{images.scored_name} image')}: accuracy {after:.2%}, in "
        f"fp32 {before:.2%}, {signed(100 * (before - after), 2)} points lost"
    )
    if before - after > MAX_LOSS and not force:
        raise ExportError(f"{line}: more than {100 * MAX_LOSS:.0f}, so it was not kept")
    log.info("%s", line)


def _correct(classifier: Classifier, table: ImageTable) -> NDArray[Any]:
    """Whether the top-1 class is the label, for each image that can be read."""
    source = StreamingLoader(Reader(table, classifier.preprocess), None, 0, default_workers())
    rows, found, _ = probabilities_of(classifier, source, len(table))
    return found.argmax(axis=1) == table.labels[rows]
