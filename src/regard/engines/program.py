"""The program that is written with an exported file: a copy of standalone.py for that file."""

import sys
from importlib import resources
from pathlib import Path

from regard.version import __version__

_RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}
_TAKEN = {*sys.stdlib_module_names, "numpy", "PIL", "onnxruntime", "onnx", "openvino", "torch",
          "torchvision", "timm", "regard"}  # fmt: skip


def program_name(out: Path) -> str:
    """The program's name for a file, as which it must not hide a module that it imports."""
    return f"{out.stem}_predict.py" if out.stem in _TAKEN else f"{out.stem}.py"


def program(out: Path) -> str:
    """A program that predicts image files with an exported file, without Regard or PyTorch."""
    text = resources.files("regard.engines").joinpath("standalone.py").read_text(encoding="ascii")
    default, runtime = 'MODEL = "net.onnx"', _RUNTIMES[out.suffix]
    assert default in text
    head = f"# Written by Regard {__version__}: pip install numpy pillow {runtime}\n"
    return head + text.replace(default, f"MODEL = {out.name!a}", 1)
