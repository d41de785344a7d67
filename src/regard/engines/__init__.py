"""Prediction as fast as the machine allows: engines behind one door.

>>> classifier = regard.load("runs/demo")
>>> classifier.engine = open_engine(classifier, "auto")

`deployed.py` is what every engine runs, `backends.py` the engines, `choice.py` how one is chosen.
"""

from regard.engines.backends import ENGINES, Engine
from regard.engines.choose import BOUNDS, PRECISIONS, Measured, open_engine, probe_images
from regard.engines.conversion import Deployed, fold_batch_norms, spatial_maps

__all__ = [
    "BOUNDS",
    "ENGINES",
    "PRECISIONS",
    "Deployed",
    "Engine",
    "Measured",
    "fold_batch_norms",
    "open_engine",
    "probe_images",
    "spatial_maps",
]
