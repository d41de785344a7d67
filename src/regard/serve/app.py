"""The routes of `regard serve`, and what keeps them safe."""

import asyncio
import base64
import html
import io
import ipaddress
import math
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from uvicorn.protocols.http.h11_impl import H11Protocol

from regard.attention import StageMap, attention_kinds
from regard.errors import FileError, UsageError
from regard.explanations.overlay import describe, overlay
from regard.predict import Classifier
from regard.serve.engine import Engine, Looked
from regard.serve.uploads import Limits, check, read_body
from regard.version import __version__

PATIENCE = 10.0  # for the headers of a request, in seconds
SAME = (  # without another engine
    "The answer is that of `regard predict --json` of this file alone: to the last bit where no "
    "other request is answered in the same batch, else within 1e-6."
)
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def create_app(classifier: Classifier, *, limits: Limits | None = None, host: str = "") -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
        classifier: of `regard.load`.
        limits: of uploads and work.
        host: where it will listen; on a loopback address requests under another name are
            refused (a page elsewhere could otherwise reach it by DNS rebinding).
    """
    limits = limits or Limits()
    engine = Engine(classifier)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(
        title="Regard", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.engine = engine
    _add_routes(app, classifier, engine, limits)
    _add_safety(app, limits, only_loopback=is_loopback(host))
    return app


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's, reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _add_routes(app: FastAPI, classifier: Classifier, engine: Engine, limits: Limits) -> None:
    page = resources.files("regard.serve").joinpath("page.html").read_text(encoding="utf-8")
    most = len(classifier.class_names)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> HTMLResponse:
        text = page.replace("NONCE", request.state.nonce)
        return HTMLResponse(text.replace("TITLE", html.escape(_name(classifier))))

    @app.get("/healthz", summary="Whether the server answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/model", summary="The network: classes, input, attention maps")
    async def model() -> dict[str, Any]:
        return {
            "name": _name(classifier),
            "classes": classifier.class_names,
            "input_size": classifier.preprocess.input_size,
            "parameters": sum(p.numel() for p in classifier.model.parameters()),
            "attention": attention_kinds(classifier.model),
        }

    @app.post(
        "/api/predict", summary="Classify an image", openapi_extra=IMAGE_BODY,
        description=SAME if classifier.engine is None else f"Answered by {classifier.engine!r}.",
    )  # fmt: skip
    async def predict(request: Request, top: int = 5) -> dict[str, Any]:
        body = await _image(request, engine, limits)
        found = await engine.predict(body, max(1, min(top, most)))
        return {"classes": [{"class": name, "probability": p} for name, p in found]}

    @app.post("/api/explain", summary="Where the network looked", openapi_extra=IMAGE_BODY)
    async def explain(
        request: Request, target: str | None = None, form: str = "json", top: int = 5
    ) -> Response:
        if target is not None and target not in classifier.class_names:
            names = ", ".join(classifier.class_names[:20])
            raise HTTPException(422, f"target={target!r}: choose one of {names}")
        if form not in ("json", "png", "npz"):
            raise HTTPException(422, f"form={form!r}: choose one of json, png, npz")
        looked = await engine.explain(await _image(request, engine, limits), target)
        if form == "png":
            return Response(await engine.beside(looked.png), media_type="image/png")
        if form == "npz":
            numbers = await engine.beside(looked.npz)
            return Response(numbers, media_type="application/octet-stream")
        return JSONResponse(await engine.beside(_as_json, looked, top))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(_docs(app, str(request.base_url), request.state.nonce))


def _name(classifier: Classifier) -> str:
    return str(classifier.config.get("architecture", type(classifier.model).__name__))


async def _image(request: Request, engine: Engine, limits: Limits) -> bytes:
    body = await read_body(request, limits)
    await engine.beside(check, body, limits)
    return body


# ---------------------------------------------------------------------------- explaining
def _as_json(looked: Looked, top: int) -> dict[str, Any]:
    found = looked.found
    return {
        "classes": [{"class": n, "probability": p} for n, p in found.classes[: max(1, top)]],
        "target": {"class": found.target[0], "probability": found.target[1]},
        "image": _uri(found.image),
        "box": list(looked.box),
        "maps": [_map(looked, m) for m in found.spatial()],
        "channels": [
            {"stage": m.stage, "name": m.name, "weights": sorted(m.values.tolist(), reverse=True)}
            for m in found.modules
            if m.kind == "channel"
        ],
    }


def _map(looked: Looked, m: StageMap) -> dict[str, Any]:
    image, box = looked.found.image, looked.found.box
    height, width = image.shape[:2]
    times = max(1, -(-256 // max(height, width)))  # a small image keeps its square pixels
    return {
        "name": m.name, "kind": m.kind, "stage": m.stage, "size": list(m.values.shape),
        "reduction": m.reduction, "range": describe(m.values),
        "picture": _uri(overlay(image, m.values, size=(height * times, width * times), box=box)),
    }  # fmt: skip


def _uri(picture: Any) -> str:
    buffer = io.BytesIO()
    small = max(picture.shape[:2]) < 256
    Image.fromarray(picture).save(buffer, "PNG" if small else "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -------------------------------------------------------------------------------- safety
def _add_safety(app: FastAPI, limits: Limits, *, only_loopback: bool) -> None:
    """Bounds the work, adds the headers, and makes every error JSON without a trace."""
    in_work = 0

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        nonlocal in_work
        request.state.nonce = secrets.token_urlsafe(16)
        working = request.url.path.startswith("/api/") and request.method == "POST"
        answer: Response | None = _refused(request, only_loopback)
        if answer is None and working and in_work >= limits.requests:
            answer = JSONResponse(
                {"detail": f"{limits.requests} requests are in work: come again"}, 503,
                {"Retry-After": "1"},
            )  # fmt: skip
        if answer is not None:
            return _with_headers(answer, request.state.nonce)
        in_work += working
        try:
            answer = await asyncio.wait_for(call_next(request), limits.seconds)
        except TimeoutError:
            answer = JSONResponse({"detail": "the answer took too long"}, 504)
        except Exception as error:
            print(f"regard: {request.url.path}: {type(error).__name__}: {error}", file=sys.stderr)
            answer = JSONResponse({"detail": "the server failed on this request"}, 500)
        finally:
            in_work -= working
        return _with_headers(answer, request.state.nonce)


def _refused(request: Request, only_loopback: bool) -> Response | None:
    """The answer to what another site's page might have sent; None to all else."""
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if only_loopback and not is_loopback(name):
        return JSONResponse({"detail": "this server goes by localhost or its address only"}, 400)
    asked_by = request.headers.get("sec-fetch-site", "none")  # browsers alone send it
    if request.method == "POST" and asked_by not in ("same-origin", "none"):
        return JSONResponse({"detail": "another site's page may not ask"}, 403)
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


def _docs(app: FastAPI, address: str, nonce: str) -> str:
    """The OpenAPI document as a page, without scripts."""
    rows = []
    for path, verbs in app.openapi()["paths"].items():
        for verb, what in verbs.items():
            names = ", ".join(p["name"] for p in what.get("parameters", []))
            rows.append(
                f"<h2><code>{verb.upper()} {html.escape(path)}</code></h2>"
                f"<p>{html.escape(what.get('summary', ''))}. "
                f"{html.escape(what.get('description', ''))}</p>"
                + (f"<p>Parameters: <code>{html.escape(names)}</code></p>" if names else "")
                + ("<p>Body: the image file's bytes.</p>" if "requestBody" in what else "")
            )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Regard: API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style nonce="{nonce}">:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,'
        "sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}h2{font-size:1.1rem;"
        "margin-top:2rem}</style><h1>Regard: API</h1><p>The whole description: "
        '<a href="/openapi.json">openapi.json</a>. With curl: <code>curl --data-binary @image.jpg '
        f"{html.escape(address)}api/predict</code></p>" + "".join(rows) + "</html>"
    )


# ------------------------------------------------------------------------------- running
class _Protocol(H11Protocol):
    """Hangs up where the headers of a request take longer than PATIENCE."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self._give_up, self.cycle)

    def on_response_complete(self) -> None:
        done = self.cycle
        super().on_response_complete()
        self.loop.call_later(PATIENCE, self._give_up, done)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last and not self.transport.is_closing():  # no new headers since
            self.transport.close()


class _Server(uvicorn.Server):
    """Says when it listens, and from then on takes signals."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready()


def serve(
    classifier: Classifier, *, host: str, port: int, limits: Limits, echo: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT, finishes what is in work, and exits.

    Raises:
        UsageError: the port is none.
        OSError: the address can't be listened on.
        SystemExit: 0, once a signal has ended it.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: choose one of 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise FileError(f"can't listen on {host}:{port} ({error.strerror})") from error
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        create_app(classifier, limits=limits, host=host), http=_Protocol, log_level="error",
        timeout_keep_alive=5, timeout_graceful_shutdown=math.ceil(limits.seconds),
        h11_max_incomplete_event_size=65536, server_header=False,
    )  # fmt: skip
    # before uvicorn takes signals, and after: it raises them again once it has finished
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with listener:
        ready = f"{address}  ({_name(classifier)}; Ctrl-C ends)"
        _Server(config, lambda: echo(ready)).run(sockets=[listener])
