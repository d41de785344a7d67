"""A web page and an HTTP API for a trained network: `regard serve RUN`.

`app.py` has the routes, `worker.py` runs the network in one thread and in batches, `uploads.py`
reads and checks what is sent, `safety.py` guards every request, `server.py` is the process.
"""
