"""Training: `train` makes a run's folder; `loop.py` is the loop, on one screen.

`choices.py` what follows from the data, `images.py` the images of a split, `optimisation.py`
rates and optimisers, `losses.py`, `state.py` what resuming needs, `folder.py` the run's files,
`terminal.py` what a person sees, and `run.py` puts them together.
"""

from regard.training.loop import NotFiniteError, Stopped
from regard.training.run import train
from regard.training.state import StateError

__all__ = ["NotFiniteError", "StateError", "Stopped", "train"]
