"""Shows where a network looks, as figures and scores that people can check.

`explanation.py` computes a network's own attention and Grad-CAM (`gradcam.py`) for each image,
and `figure.py` draws them in the colors of `overlay.py`. `deletion.py`, `sanity.py`,
`channel_gates.py`, `pointing.py` and `masks.py` measure how trustworthy maps are;
`faithfulness.py` combines scores and checks. `writing.py` does all of this for many images
(`inputs.py`, `records.py`).
"""
