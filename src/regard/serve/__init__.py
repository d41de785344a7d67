"""A page to try a trained network on, and its API: `regard serve RUN`.

`app.py` is the routes, `engine.py` the network behind them, in one thread and in batches, and
`uploads.py` what is taken from a request and what is not.
"""
