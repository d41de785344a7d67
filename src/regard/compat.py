"""Private names of timm, torch and others that Regard uses, each with the version it was seen in.

A name that has moved ends here with a sentence, not somewhere else with an AttributeError.
"""
