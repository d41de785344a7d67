"""A web page and an HTTP API for a trained network: `regard serve RUN`.

`app.py` has the routes, `worker.py` runs the network in batches in one thread, `uploads.py`
reads and checks uploads, `safety.py` guards every request, `server.py` is the process.
"""
