"""Where a network looked, as figures and scores that people can check.

`explanation.py` computes a network's own attention and Grad-CAM (`gradcam.py`) for each image,
and `figure.py` draws them with the colors of `overlay.py`. `deletion.py`, `sanity.py`,
`pointing.py` and `masks.py` measure how far maps can be believed; `faithfulness.py` puts scores
and checks together. `writing.py` does it all for many images (`inputs.py`, `records.py`).
"""
