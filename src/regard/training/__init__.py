"""Training: `run.py` writes a run's folder; `loop.py` is the training loop.

`config.py` defines the recipe and its fields, `recipe_files.py` reads and writes recipes as TOML,
with the shipped ones in `recipes/`; `plan.py` derives from the data what a run needs before it
starts; `splits.py` loads the images of each split; `optim.py` has learning rates and optimizers;
`losses.py`; `self_adaptive.py` the targets for labels that may be wrong; `checkpoint.py` the
states to resume from; `progress.py` the display. Two choices are measured with the trial steps of
`trial.py`: `compile.py` decides whether to compile, `memory.py` how to split a step into batches.
`activation_checkpointing.py` trades time for memory.
"""
