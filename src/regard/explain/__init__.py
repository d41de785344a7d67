"""Where a network looked, as pictures and scores that people can check.

`regard.explain.overlay` lays an attention map over its image.
"""
