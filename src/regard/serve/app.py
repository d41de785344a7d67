"""The routes of `regard serve`, and what keeps them safe."""

import asyncio
import base64
import html
import io
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

import regard
from regard.attention import attention_kinds
from regard.explain.maps import Explanation, StageMap
from regard.explain.overlay import describe, overlay
from regard.prediction import Classifier
from regard.serve.engine import SHOWN, Engine, figure_bytes, npz_bytes
from regard.serve.uploads import Limits, decode, read_body

LOOPBACK = ("127.0.0.1", "localhost", "::1")
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
        title="Regard", version=regard.__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    app.state.engine = engine
    _add_routes(app, classifier, engine, limits)
    _add_safety(app, limits)
    if host in LOOPBACK:
        # Starlette cuts a Host at its first colon, so that [::1] is "["
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "["])
    return app


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

    @app.post("/api/predict", summary="Classify an image", openapi_extra=IMAGE_BODY)
    async def predict(request: Request, top: int = 5) -> dict[str, Any]:
        pixels = await _image(request, limits)
        found = await engine.predict(pixels, max(1, min(top, most)))
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
        found = await engine.explain(await _image(request, limits), target)
        loop = asyncio.get_running_loop()
        if form == "png":
            picture = await loop.run_in_executor(None, figure_bytes, found)
            return Response(picture, media_type="image/png")
        if form == "npz":
            numbers = await loop.run_in_executor(None, npz_bytes, found)
            return Response(numbers, media_type="application/octet-stream")
        return JSONResponse(await loop.run_in_executor(None, _as_json, found, top))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(_docs(app, request.state.nonce))


def _name(classifier: Classifier) -> str:
    return str(classifier.config.get("architecture", type(classifier.model).__name__))


async def _image(request: Request, limits: Limits) -> Any:
    body = await read_body(request, limits)
    return await asyncio.get_running_loop().run_in_executor(None, decode, body, limits)


# ---------------------------------------------------------------------------- explaining
def _as_json(found: Explanation, top: int) -> dict[str, Any]:
    return {
        "classes": [{"class": n, "probability": p} for n, p in found.classes[: max(1, top)]],
        "target": {"class": found.target[0], "probability": found.target[1]},
        "image": _uri(_shown(found.image)),
        "box": list(found.box),
        "maps": [_map(found, m) for m in found.spatial()],
        "channels": [
            {"stage": m.stage, "name": m.name, "weights": sorted(m.values.tolist(), reverse=True)}
            for m in found.modules
            if m.kind == "channel"
        ],
    }


def _shown(image: Any) -> Any:
    """The image, made small enough to send back where it is larger, its aspect kept."""
    picture = Image.fromarray(np.asarray(image))
    longest = max(picture.size)
    if longest > SHOWN:
        factor = SHOWN / longest
        size = [max(1, round(side * factor)) for side in picture.size]
        return np.asarray(picture.resize((size[0], size[1]), Image.Resampling.BOX))
    return np.asarray(image)


def _map(found: Explanation, m: StageMap) -> dict[str, Any]:
    height, width = found.image.shape[:2]
    factor = min(1.0, SHOWN / max(height, width)) if max(height, width) > SHOWN else 1.0
    if max(height, width) < 256:
        factor = float(-(-256 // max(height, width)))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return {
        "name": m.name, "kind": m.kind, "stage": m.stage, "size": list(m.values.shape),
        "reduction": m.reduction, "range": describe(m.values),
        "picture": _uri(overlay(found.image, m.values, size=size, box=found.box)),
    }  # fmt: skip


def _uri(picture: Any) -> str:
    buffer = io.BytesIO()
    small = max(picture.shape[:2]) < 256
    Image.fromarray(picture).save(buffer, "PNG" if small else "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# -------------------------------------------------------------------------------- safety
def _add_safety(app: FastAPI, limits: Limits) -> None:
    """Bounds the work, adds the headers, and makes every error JSON without a trace."""
    in_work = 0

    @app.middleware("http")
    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        nonlocal in_work
        request.state.nonce = secrets.token_urlsafe(16)
        working = request.url.path.startswith("/api/") and request.method == "POST"
        if working and in_work >= limits.requests:
            answer: Response = JSONResponse(
                {"detail": f"{limits.requests} requests are in work: come again"}, 503,
                {"Retry-After": "1"},
            )  # fmt: skip
            return _with_headers(answer, request.state.nonce)
        in_work += working
        try:
            answer = await asyncio.wait_for(call_next(request), limits.seconds)
        except TimeoutError:
            answer = JSONResponse({"detail": "the answer took too long"}, 504)
        except Exception as error:
            print(f"regard: {request.url.path}: {type(error).__name__}: {error}", flush=True)
            answer = JSONResponse({"detail": "the server failed on this request"}, 500)
        finally:
            in_work -= working
        return _with_headers(answer, request.state.nonce)


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


def _docs(app: FastAPI, nonce: str) -> str:
    """The OpenAPI document as a page, without scripts."""
    rows = []
    for path, verbs in app.openapi()["paths"].items():
        for verb, what in verbs.items():
            names = ", ".join(p["name"] for p in what.get("parameters", []))
            rows.append(
                f"<h2><code>{verb.upper()} {html.escape(path)}</code></h2>"
                f"<p>{html.escape(what.get('summary', ''))}</p>"
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
        "http://127.0.0.1:8000/api/predict</code></p>" + "".join(rows) + "</html>"
    )


# ------------------------------------------------------------------------------- running
def serve(
    classifier: Classifier, *, host: str, port: int, limits: Limits, echo: Callable[[str], None]
) -> None:
    """Serves until SIGTERM or SIGINT, and finishes what is in work.

    Raises:
        OSError: the address can't be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"can't listen on {host}:{port} ({error.strerror})") from error
    shown = f"[{host}]" if ":" in host else host
    app = create_app(classifier, limits=limits, host=host)
    config = uvicorn.Config(
        app, log_level="error", timeout_keep_alive=5, timeout_graceful_shutdown=int(limits.seconds),
        h11_max_incomplete_event_size=65536,
    )  # fmt: skip
    # uvicorn raises the signal again once it has finished: to stop is no failure
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(config)
    echo(f"http://{shown}:{listener.getsockname()[1]}/  ({_name(classifier)}; Ctrl-C ends)")
    with listener:
        server.run(sockets=[listener])
