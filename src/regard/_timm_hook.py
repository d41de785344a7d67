"""Registers Regard's networks with timm, at once or when timm is imported.

`import regard` must be instant, so it can't import timm, which takes seconds; and
`import regard, timm; timm.create_model("cbam_resnet50")` must work. So where timm is not
there yet, its import is watched, once, and the networks are registered right after it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _RegisterAfter(importlib.abc.Loader):
    """timm's own loader, and then the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # whoever asks for timm's resources finds its own loader
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("regard.models")


class _WatchTimm(importlib.abc.MetaPathFinder):
    """Finds timm as it is found anyway, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_with_timm() -> None:
    """Registers the networks now if timm is imported, or else when it will be."""
    if "timm" in sys.modules:
        importlib.import_module("regard.models")
    elif not any(isinstance(finder, _WatchTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchTimm())
