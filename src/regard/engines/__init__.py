"""Prediction as fast as the machine allows: engines with one interface.

>>> classifier = regard.load("runs/demo")
>>> classifier.engine = open_engine(classifier, "auto")

`conversion.py` builds what every engine runs, `backends.py` has the engines, `choose.py` opens one,
`formats.py` has the file formats of `regard export`, `standalone.py` the program written with a
file, and `bench.py` the measurement of `regard bench`. A new engine is a subclass of `Engine` in
ENGINES, a new file format a subclass of `Format` in FORMATS.
"""

from regard.engines.backends import ENGINES, Engine
from regard.engines.choose import (
    PRECISIONS,
    TOLERANCES,
    Measurement,
    open_engine,
    open_if_it_pays,
    probe_images,
)
from regard.engines.conversion import Deployed, fold_batch_norms, spatial_maps

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "TOLERANCES",
    "Deployed",
    "Engine",
    "Measurement",
    "fold_batch_norms",
    "open_engine",
    "open_if_it_pays",
    "probe_images",
    "spatial_maps",
]
