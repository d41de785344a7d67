"""The routes of `regard serve`."""

import base64
import html
import io
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image

from regard.attention import StageMap, attention_kinds
from regard.explanations.explanation import Explanation
from regard.explanations.overlay import Box, describe, overlay
from regard.explanations.print_style import for_print
from regard.models.counting import count_parameters
from regard.models.io import network_words
from regard.predict import Classifier
from regard.serve.safety import add_safety, is_loopback
from regard.serve.uploads import Limits, check, check_options, read_image_bytes
from regard.serve.worker import BatchingWorker, Upload
from regard.version import __version__

NOTICE = "For research and demonstration. This is not a diagnosis and not a medical device."
SAME = (  # without another engine
    "The probabilities are those of `regard predict --json` for this file alone: identical if no "
    "other request is answered in the same batch, else within 1e-6."
)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object", "properties": {"file": {"type": "string", "format": "binary"}},
        "required": ["file"],
    }
}  # fmt: skip
IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": _BINARY, "multipart/form-data": _FORM},
    }
}


Top = Annotated[int, Query(ge=1)]


class AsciiJSON(JSONResponse):
    """JSON as `predict --json` writes it: a class name from a folder may not be valid UTF-8."""

    def render(self, content: Any) -> bytes:
        """The content encoded as bytes."""
        return json.dumps(content, allow_nan=False).encode("ascii")


def create_app(
    classifier: Classifier,
    *,
    limits: Limits | None = None,
    host: str = "",
    tested: dict[str, Any] | None = None,
) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
        classifier: a network, from `regard.load`.
        limits: limits of uploads and work.
        host: where it will listen; on a loopback address, requests with another Host header are
            refused, since a page elsewhere could otherwise reach it by DNS rebinding.
        tested: the network's test result, from `regard.serve.server.read_test_result`.
    """
    limits = limits or Limits()
    worker = BatchingWorker(classifier)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(
        title="Regard", version=__version__, description=NOTICE, docs_url=None, redoc_url=None,
        lifespan=lifespan, default_response_class=AsciiJSON,
    )  # fmt: skip
    _add_pages(app, classifier, tested)
    _add_api(app, classifier, worker, limits)
    add_safety(app, limits, only_loopback=is_loopback(host))
    return app


def name_of(classifier: Classifier) -> str:
    """The network's name."""
    config = classifier.config
    return network_words(config) if "architecture" in config else type(classifier.model).__name__


def _add_pages(app: FastAPI, classifier: Classifier, tested: dict[str, Any] | None) -> None:
    page = resources.files("regard.serve").joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("TITLE", html.escape(name_of(classifier))).replace("NOTICE", NOTICE)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> HTMLResponse:
        return HTMLResponse(page.replace("NONCE", request.state.nonce))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(_docs(app, str(request.base_url), request.state.nonce))

    @app.get("/healthz", summary="Whether the server answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/model", summary="The network: classes, input, attention maps, test result")
    async def model() -> dict[str, Any]:
        stored = classifier.calibration
        return {
            "name": name_of(classifier),
            "classes": classifier.class_names,
            "input_size": classifier.preprocess.input_size,
            "parameters": count_parameters(classifier.model),
            "attention": attention_kinds(classifier.model),
            "tested": tested,
            "calibration": None
            if stored is None
            else {
                "temperature": stored.temperature,
                "threshold": None if stored.threshold is None else stored.threshold.to_dict(),
                "sentence": stored.sentence(),
            },
            "notice": NOTICE,
        }


def _add_api(app: FastAPI, classifier: Classifier, worker: BatchingWorker, limits: Limits) -> None:
    most = len(classifier.class_names)

    async def image_of(request: Request, *options: str) -> Upload:
        check_options(request, options)
        body = await read_image_bytes(request, limits, options)
        return Upload(body, await worker.in_reader(check, body, limits))

    @app.post(
        "/api/predict", summary="Classify an image", openapi_extra=IMAGE_BODY,
        description=SAME if classifier.engine is None else f"Answered by {classifier.engine!r}.",
    )  # fmt: skip
    async def predict(request: Request, top: Top = 5) -> dict[str, Any]:
        p = await worker.predict(await image_of(request, "top"), min(top, most))
        classes = [{"class": name, "probability": share} for name, share in p.classes]
        return {"classes": classes, **_signs(p.decision, p.distance, p.unlike_training)}

    @app.post("/api/explain", summary="Where the network looked", openapi_extra=IMAGE_BODY)
    async def explain(
        request: Request, target: str | None = None, form: str = "json", top: Top = 5
    ) -> Response:
        if target is not None and target not in classifier.class_names:
            names = ", ".join(map(repr, classifier.class_names[:20]))
            raise HTTPException(422, f"target={target!r}: choose one of {names}")
        if form not in ("json", "png", "npz"):
            raise HTTPException(422, f"form={form!r}: choose one of json, png, npz")
        upload = await image_of(request, "target", "form", "top")
        explanation, box, distance = await worker.explain(upload, target)
        if form == "png":
            return Response(await worker.in_reader(_as_png, explanation), media_type="image/png")
        if form == "npz":
            arrays = await worker.in_reader(_as_npz, explanation, box)
            return Response(arrays, media_type="application/octet-stream")
        answer = await worker.in_reader(_as_json, explanation, box, top)
        shares = dict(explanation.classes)
        decision = classifier.decision([shares[name] for name in classifier.class_names])
        return AsciiJSON(answer | _signs(decision, distance, classifier.is_unlike(distance)))


# ---- answers ------------------------------------------------------------------------------
def _signs(
    decision: str | None, distance: float | None, unlike: bool | None
) -> dict[str, str | float | bool | None]:
    """The decision, and whether the image is unlike the training images, if known."""
    known: dict[str, str | float | bool | None] = {}
    if decision is not None:
        known["decision"] = decision
    if distance is not None:
        known |= {"distance": distance, "unlike_training": unlike}
    return known


def _as_png(explanation: Explanation) -> bytes:
    """The figure, as `regard explain` draws it."""
    buffer = io.BytesIO()
    with for_print():
        explanation.figure().savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def _as_npz(explanation: Explanation, box: Box) -> bytes:
    """The raw maps, as `regard explain` writes them; the box in pixels of the upload."""
    with tempfile.TemporaryDirectory(prefix="regard-") as folder:
        path = Path(folder, "maps.npz")
        replace(explanation, box=box).save_npz(path)
        return path.read_bytes()


def _as_json(explanation: Explanation, box: Box, top: int) -> dict[str, Any]:
    shown = explanation.classes[:top]
    return {
        "classes": [{"class": name, "probability": p} for name, p in shown],
        "target": {"class": explanation.target[0], "probability": explanation.target[1]},
        "image": _uri(explanation.image),
        "box": list(box),
        "maps": [_map(explanation, m) for m in explanation.spatial()],
        "channels": [
            {"stage": m.stage, "name": m.name, "weights": sorted(m.values.tolist(), reverse=True)}
            for m in explanation.modules
            if m.kind == "channel"
        ],
    }


def _map(explanation: Explanation, m: StageMap) -> dict[str, Any]:
    image, box = explanation.image, explanation.box
    height, width = image.shape[:2]
    times = max(1, -(-256 // max(height, width)))  # small images keep square pixels
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
                + ("<p>Body: the image file, or a form with it.</p>" * ("requestBody" in what))
            )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Regard: API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style nonce="{nonce}">:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,'
        "sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}h2{font-size:1.1rem;"
        f"margin-top:2rem}}</style><h1>Regard: API</h1><p>{NOTICE}</p><p>The full description: "
        '<a href="/openapi.json">openapi.json</a>. With curl: <code>curl --data-binary @image.jpg '
        f"{html.escape(address)}api/predict</code></p>" + "".join(rows) + "</html>"
    )
