"""Registers Regard's networks with timm, at once or when timm is imported.

`import regard` must be instant, so it can't import timm, which takes seconds; yet
`import regard, timm; timm.create_model("cbam_resnet50")` must work. So if timm has not been
imported, its import is watched, and the networks are registered right after it. Looking for
timm without importing it, as `importlib.util.find_spec("timm")` does, changes nothing: the
watch ends with the import.
"""

import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _RegisterAfter(importlib.abc.Loader):
    """timm's own loader, followed by the registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # resources, source: anything of timm's loader
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # the module gets its original loader back
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _WatchTimm)]
        importlib.import_module("regard.models")


class _WatchTimm(importlib.abc.MetaPathFinder):
    """Finds timm as usual, and wraps its loader."""

    def __init__(self) -> None:
        self.looking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm" or getattr(self.looking, "now", False):
            return None
        self.looking.now = True  # the search below calls this method again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_with_timm() -> None:
    """Registers the networks now if timm is imported, otherwise once it is."""
    if "timm" in sys.modules:
        importlib.import_module("regard.models")
    elif not any(isinstance(finder, _WatchTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchTimm())
