"""The program that is written next to an exported file: a copy of standalone.py for that file."""

import re
import sys
from importlib import resources
from pathlib import Path

from regard.version import __version__

_RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}
_TAKEN = {*sys.stdlib_module_names, "numpy", "PIL", "onnxruntime", "onnx", "openvino", "torch",
          "torchvision", "timm", "regard"}  # fmt: skip
_HEAD = "# Written by Regard"


def program_path(out: Path) -> Path:
    """The program's path for an exported file; its name must not shadow a module that it imports.

    If net.py belongs to net.onnx, the program of net.pt2 is net_pt2.py.
    """
    path = out.with_name(f"{out.stem}_predict.py" if out.stem in _TAKEN else f"{out.stem}.py")
    if _model_of(path) in (None, f"{out.name!a}"):
        return path
    return out.with_name(f"{out.stem}_{out.suffix[1:]}.py")


def _model_of(path: Path) -> str | None:
    """The literal that names the exported file in a program of Regard's; None for other files."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(r"^MODEL = ('[^'\n]*'|\"[^\"\n]*\")", text, re.M)
    return found[1] if found and text.startswith(_HEAD) else None


def program(out: Path) -> str:
    """A program that predicts image files with an exported file, without Regard or PyTorch."""
    text = resources.files("regard.engines").joinpath("standalone.py").read_text(encoding="ascii")
    default, runtime = 'MODEL = "net.onnx"', _RUNTIMES[out.suffix]
    assert default in text
    head = f"{_HEAD} {__version__}: pip install numpy pillow {runtime}\n"
    return head + text.replace(default, f"MODEL = {out.name!a}", 1)
