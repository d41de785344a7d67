"""Studies: networks trained several times on the same splits, and their comparison.

`plan.py` expands a study into runs (row x fold x seed), `runner.py` trains them as ordinary
runs in separate processes and resumes those that were stopped, `results.py` gathers their
results, `page.py` writes the page. The statistics are in `regard.evaluation.repeats`.
"""
