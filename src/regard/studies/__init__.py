"""Studies: networks trained several times on the same splits, and what follows from it.

`plan.py` expands a study into runs (row x fold x seed), `runner.py` trains them as ordinary
runs in processes of their own and continues where it was stopped, `results.py` gathers what
they say, `page.py` writes it down. The statistics are `regard.evaluation.repeats`.
"""
