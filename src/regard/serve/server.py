"""The server process: listening, signals, and shutdown."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from regard.errors import FileError, UsageError
from regard.predict import Classifier
from regard.serve.app import create_app, name_of
from regard.serve.uploads import Limits

log: logging.Logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for a request's headers
BACKLOG = 2048  # connections that may wait to be accepted
GRACE = 7.0  # seconds after SIGTERM for requests in progress; then stalled connections are closed


class _Protocol(H11Protocol):
    """Closes connections whose request headers take longer than PATIENCE."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self._give_up, self.cycle)

    def on_response_complete(self) -> None:
        done = self.cycle
        super().on_response_complete()
        self.loop.call_later(PATIENCE, self._give_up, done)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():  # no new headers since then
            self.transport.close()


class _Server(uvicorn.Server):
    """Reports when it listens; closes connections that outlast GRACE or the second Ctrl-C."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:  # since Python 3.12.1, asyncio waits for open connections
            self.loop.call_soon_threadsafe(self._hang_up)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # a request cut off by a second signal or the time limit is no error worth a traceback
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self.loop.call_later(GRACE, self._hang_up)
        await super().shutdown(sockets=sockets)

    def _hang_up(self) -> None:
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def read_test_result(run: Path) -> dict[str, Any] | None:
    """The test result in a run's folder: split, images, and accuracy with its interval.

    Also "classes": name, images, recall and precision of each.
    None if the folder has no evaluation.json; a damaged one causes a warning.
    """
    path = run / "evaluation.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        top1 = content["metrics"]["top1"]
        return {
            "split": str(content["split"]),
            "images": int(content["n"]),
            "accuracy": {k: None if top1[k] is None else float(top1[k]) for k in top1},
            "classes": [
                {
                    "name": str(c["name"]), "images": int(c["count"]),
                    "recall": c["recall"]["value"], "precision": c["precision"]["value"],
                }
                for c in content.get("per_class", [])
            ],
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s can't be read: the page won't show the network's test results", path)
        return None


def serve(
    classifier: Classifier,
    *,
    host: str,
    port: int,
    limits: Limits,
    tested: dict[str, Any] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, finishes the requests in progress, and exits.

    Args:
        classifier: the network.
        host: name or address to listen on.
        port: port to listen on; 0 picks a free one.
        limits: limits of uploads and work.
        tested: the result of `read_test_result`, shown on the page.

    Raises:
        UsageError: no such host or port.
        FileError: it can't listen on the address.
        SystemExit: 0, after a signal.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port={port}: choose one from 0 to 65535")
    listener = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        create_app(classifier, limits=limits, host=host, tested=tested), http=_Protocol,
        log_level="error", timeout_keep_alive=5, timeout_graceful_shutdown=int(GRACE) + 2,
        h11_max_incomplete_event_size=65536, server_header=False, backlog=BACKLOG,
    )  # fmt: skip
    # the limits are checked before anything is decoded; Pillow's own warning adds nothing
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    # uvicorn raises the signal again once it has finished
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    ready = f"{address}  ({name_of(classifier)}; Ctrl-C stops)"
    with listener:
        _Server(config, lambda: log.info(ready)).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    # '' would be every address of this machine; a name that is not Unicode can't be resolved
    if not host or any("\ud800" <= c <= "\udfff" for c in host):
        raise UsageError(f"host={host!r}: a name or an address, such as 127.0.0.1, is needed")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if os.name == "posix":  # on Windows this would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # the port is taken only now
    except OSError as error:
        listener.close()
        raise FileError(f"can't listen on {host}:{port} ({error.strerror})") from error
    return listener
