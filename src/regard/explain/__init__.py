"""Where a network looked, as pictures and scores that people can check.

>>> found = regard.explain(model, x, images, classes=names)  # arrays and figures, for notebooks
>>> found[0].figure()

`maps.py` gathers a network's own attention and Grad-CAM (`gradcam.py`), `figure.py` draws them
with `overlay.py`'s colours, `faithfulness.py` and `pointing.py` score how far they can be
believed, and `of_run.py` is the command.
"""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """`regard.explain` is this package, and `regard.explain(...)` is `maps.explain`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `regard.explain.maps.explain`."""
        from regard.explain.maps import explain

        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
