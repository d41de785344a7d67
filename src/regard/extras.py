"""The optional packages: which extra of Regard installs them, and whether they are installed.

Nothing here imports them, so a missing one is reported before anything slow is loaded.
"""

from importlib.util import find_spec

from regard.errors import UsageError

EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": ("fastapi", "uvicorn"),
    "dicom": ("pydicom",),
    "tiff": ("tifffile", "imagecodecs"),
    "hf": ("datasets",),
    "gpu": ("torchcodec",),
    "cleanlab": ("cleanlab",),
    "ray": ("ray",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
}
"""Each of the extras in pyproject.toml for users, with the modules that it installs."""


def missing(extra: str, *modules: str) -> list[str]:
    """The modules of an extra (default: all of them) that are not installed."""
    return [name for name in modules or EXTRAS[extra] if not is_installed(name)]


def hint(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'regard[{extra}]'"


def require(extra: str, what: str, *modules: str) -> None:
    """Refuses `what` if a module of an extra (default: any of its modules) is missing.

    Raises:
        UsageError: names the modules, and the one command that installs them.
    """
    if absent := missing(extra, *modules):
        raise UsageError(f"{what} needs {' and '.join(absent)}: {hint(extra)}")


def is_installed(name: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return find_spec(name) is not None
    except ValueError:  # sys.modules holds a stand-in without a spec
        return False
