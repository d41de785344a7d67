"""Regard: attention networks for image classification that show where they look.

>>> import regard
>>> model = regard.create_model("cbam_resnet50")
>>> with regard.record(model) as maps:
...     logits = model(images)

The names below are imported when they are first used, so that `import regard` is instant.
Importing regard also registers its networks with timm, whichever is imported first.
"""

import importlib
from typing import TYPE_CHECKING, Any

from regard._timm_hook import register_with_timm

__version__ = "0.1.0"

register_with_timm()

if TYPE_CHECKING:
    from regard.attention import AttentionMap as AttentionMap
    from regard.attention import record as record
    from regard.engines.choice import open_engine as open_engine
    from regard.models import create_model as create_model
    from regard.models import list_models as list_models
    from regard.models.authors import CheckpointError as CheckpointError
    from regard.models.authors import load_authors_weights as load_authors_weights
    from regard.models.cbam import CBAM as CBAM
    from regard.models.cbam import SE as SE
    from regard.models.cbam import graft as graft
    from regard.models.cbam import twins as twins
    from regard.models.folder import save_model as save_model
    from regard.models.sononet import AttentionGate as AttentionGate
    from regard.prediction import Classifier as Classifier
    from regard.prediction import load as load
    from regard.training.losses import heads_loss as heads_loss
    from regard.training.run import train as train

_WHERE = {
    "AttentionMap": "regard.attention",
    "record": "regard.attention",
    "create_model": "regard.models",
    "list_models": "regard.models",
    "CheckpointError": "regard.models.authors",
    "load_authors_weights": "regard.models.authors",
    "CBAM": "regard.models.cbam",
    "SE": "regard.models.cbam",
    "graft": "regard.models.cbam",
    "twins": "regard.models.cbam",
    "save_model": "regard.models.folder",
    "AttentionGate": "regard.models.sononet",
    "Classifier": "regard.prediction",
    "load": "regard.prediction",
    "heads_loss": "regard.training.losses",
    "train": "regard.training.run",
    "open_engine": "regard.engines.choice",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name == "explain":  # a package that can be called
        return importlib.import_module("regard.explain")
    if name not in _WHERE:
        raise AttributeError(f"module 'regard' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
