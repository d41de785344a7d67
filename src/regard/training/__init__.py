"""Training: `run.py` makes a run's folder; `loop.py` is the loop, on one screen.

`config.py` is the recipe and what its fields mean, `recipe_files.py` those in files, with the
shipped ones in `recipes/`;
`plan.py` what follows from the data before a run starts; `splits.py` the images of each split;
`optim.py` learning rates and optimizers; `losses.py`; `checkpoint.py` what resuming needs;
`progress.py` what a person sees. Decided by measuring, with the trial steps of `trial.py`:
`compile.py` whether to compile, and `memory.py` how to split a step.
`activation_checkpointing.py` trades time for memory.
"""
