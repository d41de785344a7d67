"""Regard: attention networks for image classification that show where they look.

>>> import regard
>>> model = regard.create_model("cbam_resnet50")
>>> with regard.record(model) as maps:
...     logits = model(images)

The names below are imported when they are first used, so that `import regard` is instant.
Importing regard also registers its networks with timm, whichever is imported first.
"""

import lazy_loader

from regard._timm_hook import register_with_timm
from regard.version import __version__ as __version__

register_with_timm()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
