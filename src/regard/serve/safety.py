"""Checks and limits of every request: who may ask, how many at once, how long; safe responses."""

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from regard.errors import RegardError
from regard.serve.uploads import Limits

log: logging.Logger = logging.getLogger(__name__)

_LEFT = 499  # the client closed the connection: nobody reads this response


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reachable only from this machine."""
    host = host.lower().removesuffix(".")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def add_safety(app: FastAPI, limits: Limits, *, only_loopback: bool) -> None:
    """Limits the work, adds headers, and answers every error with JSON, without a traceback."""
    in_work = 0

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        nonlocal in_work
        request.state.nonce = secrets.token_urlsafe(16)
        # not request.url, which reads the Host header and fails on a malformed one
        working = request.scope["path"].startswith("/api/") and request.method == "POST"
        answer: Response | None = _refused(request, only_loopback)
        if answer is None and working and in_work >= limits.requests:
            answer = JSONResponse(
                {"detail": f"the server is working on {limits.requests} requests: try again"}, 503,
                {"Retry-After": "1"},
            )  # fmt: skip
        if answer is None:
            in_work += working
            try:
                answer = await _answered(request, call_next, limits.seconds)
            finally:
                in_work -= working
        return _with_headers(answer, request.state.nonce)

    app.add_middleware(_HeadAsGet)


async def _answered(
    request: Request, call_next: Callable[[Request], Awaitable[Response]], seconds: float
) -> Response:
    try:
        return await asyncio.wait_for(call_next(request), seconds)
    except TimeoutError:
        return JSONResponse({"detail": "the answer took too long"}, 504)
    except ClientDisconnect:
        return Response(status_code=_LEFT)
    except RegardError as error:  # about this image: its message says what is wrong
        return JSONResponse({"detail": str(error)}, 422)
    except Exception as error:
        if await request.is_disconnected():
            return Response(status_code=_LEFT)
        log.warning("%s: %s: %s", request.scope["path"], type(error).__name__, error)
        return JSONResponse({"detail": "the server failed on this request"}, 500)


class _HeadAsGet:
    """Handles HEAD as GET; the server sends only the headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)


def _refused(request: Request, only_loopback: bool) -> Response | None:
    """The refusal of a request that a page of another site could have sent; otherwise None."""
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if only_loopback and not is_loopback(name):
        detail = "this server only answers requests to localhost or its address"
        return JSONResponse({"detail": detail}, 400)
    asked_by = request.headers.get("sec-fetch-site", "none")  # sent by browsers only
    if request.method == "POST" and asked_by not in ("same-origin", "none"):
        return JSONResponse({"detail": "requests from other sites are refused"}, 403)
    return None


def _with_headers(answer: Response, nonce: str) -> Response:
    answer.headers.update(
        {
            "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
            f"img-src 'self' data: blob:; script-src 'nonce-{nonce}'; "
            f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
    )
    return answer
