"""Training: `train` makes a run's folder; `loop.py` is the loop, on one screen.

`choices.py` what follows from the data, `images.py` the images of a split, `optimisation.py`
rates and optimisers, `losses.py`, `state.py` what resuming needs, `folder.py` the run's files,
`terminal.py` what a person sees, and `run.py` puts them together. What is decided by measuring:
`speed.py` whether to compile and `memory.py` how to split a step, by steps of `rehearsal.py`;
`checkpoints.py` is gradient checkpointing.
"""

from regard.training.loop import NotFiniteError, Stopped
from regard.training.run import train
from regard.training.state import StateError

__all__ = ["NotFiniteError", "StateError", "Stopped", "train"]
