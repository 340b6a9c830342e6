"""A local web page that classifies images dropped on it, for `python -m jaxft.predict --serve`."""

import base64
import hashlib
import re
import socket
import threading
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jaxft.classifier import Classifier
from jaxft.data.image_file import decode
from jaxft.errors import UserError
from jaxft.targets.classification import rank

MAX_BYTES = 20_000_000  # of an image file
MAX_PIXELS = 50_000_000  # of an image


def make_app(classifier: Classifier, host: str, top_k: int) -> Starlette:
    """Returns the app: GET / is the page; POST /predict takes an image file and returns {"top_k"} or {"error"}."""
    page = files("jaxft.reporting").joinpath("templates/serve.html").read_text("utf-8")
    policy = "; ".join(
        [
            "default-src 'none'; img-src blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
            f"style-src '{_inline_hash(page, 'style')}'",
            f"script-src '{_inline_hash(page, 'script')}'",
        ]
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    one_at_a_time = threading.Lock()  # decoding an image may take half a gigabyte

    async def show(_: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def predict(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BYTES:
                return _refusal(413, f"the file is larger than {MAX_BYTES // 1_000_000} MB")
        try:
            return JSONResponse(await run_in_threadpool(classify, bytes(body)))
        except UserError as error:
            return _refusal(422, str(error))

    def classify(body: bytes) -> dict[str, Any]:
        with one_at_a_time:
            row = classifier.probabilities([decode(body, "the file", max_pixels=MAX_PIXELS)])[0]
        return {"top_k": rank(row, classifier.class_names, top_k).to_json()["top_k"]}

    return Starlette(
        routes=[Route("/", show), Route("/predict", predict, methods=["POST"])],
        # Refuse other host names: a foreign page could reach the server by DNS rebinding.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", host])],
    )


def _refusal(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)


def _inline_hash(page: str, element: str) -> str:
    """Returns the hash of the page's inline style or script, for its Content-Security-Policy."""
    match = re.search(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    assert match
    return "sha256-" + base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()


def serve(classifier: Classifier, host: str, port: int, top_k: int) -> None:
    """Serves until Ctrl-C. port: 0 takes a free one. Raises UserError if it is not available."""
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); try another --port") from None
    app = make_app(classifier, host, top_k)
    print(f"open http://{host}:{listener.getsockname()[1]}/ in a browser; Ctrl-C stops it", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
