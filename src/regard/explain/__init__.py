"""Where a network looked, as pictures and scores that people can check.

>>> found = explain(model, x, images, classes=names)     # arrays and figures, for notebooks
>>> found[0].figure()

`maps.py` gathers a network's own attention and Grad-CAM (`gradcam.py`), `figure.py` draws them
with `overlay.py`'s colours, `faithfulness.py` and `pointing.py` score how far they can be
believed, and `of_run.py` is the command.
"""
