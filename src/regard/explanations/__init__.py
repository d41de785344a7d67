"""Where a network looked, as pictures and scores that people can check.

`explanation.py` gathers a network's own attention and Grad-CAM (`gradcam.py`) for each image,
`figure.py` draws them with the colors of `overlay.py`, and `faithfulness.py` and `pointing.py`
measure how far they can be believed.
"""
