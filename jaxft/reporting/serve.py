"""A local web page that predicts the targets of images dropped on it, for `python -m jaxft.predict --serve`."""

import asyncio
import base64
import hashlib
import io
import ipaddress
import os
import re
import socket
import traceback
from collections.abc import Collection, Sequence
from email.message import Message
from functools import cache
from importlib.resources import files
from typing import Any, NoReturn
from urllib.parse import urlsplit

from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxft.classifier import Classifier
from jaxft.data.image_file import decode, load_formats
from jaxft.errors import UserError, printable
from jaxft.reporting.http_server import BACKLOG, Queue, RefusedError, Uploads, run
from jaxft.targets.tags import TagsTarget

MAX_BYTES = 20_000_000  # of an image file
MAX_BYTES_IN_ALL = 100_000_000  # of the files in memory
MAX_PIXELS = 50_000_000  # of an image
LARGE_PIXELS = 4_000_000  # larger images have a queue of their own
# Formats that Pillow decodes in C and whose header holds the size of the image (unlike that of ICO and ICNS).
# JPEG 2000 is missing because its decoder holds Python's lock: 6 s for 5 million pixels of noise.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JXL", "PNG", "TIFF", "WEBP")
MAX_PIXELS_OF = {
    "BMP": 10_000_000,  # decoded in Python if compressed
    "WEBP": 25_000_000,  # its decoder holds Python's lock for a part of the time
}
MAX_SCANS = 100  # of a progressive JPEG, as in libtiff; each takes time but hardly a byte
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)


def make_app(classifier: Classifier, host: str, top_k: int, uploads: Uploads, allow_hosts: Sequence[str]) -> Starlette:
    """Returns the app: GET / is the page; POST /predict takes an image file and returns the prediction or {"error"}.

    The prediction is {"top_k"} if the only target is a class, else {"targets": {name: ...}} as `predict --json` has it,
    for tags also {"thresholds": {tag: probability}}.
    """
    page = files("jaxft.reporting").joinpath("templates/serve.html").read_text("utf-8")
    policy = "; ".join(
        [
            "default-src 'none'; img-src blob: data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
            f"style-src '{_inline_hash(page, 'style')}'",
            f"script-src '{_inline_hash(page, 'script')}'",
        ]
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    small, large = Queue(), Queue()  # decoding a large image takes seconds and hundreds of megabytes

    async def show(_: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def predict(request: Request) -> Response:
        _check_encoding(request)
        try:
            async with uploads.body(request) as body:
                content = _image_file(request, body)
                pixels = await asyncio.to_thread(_count_pixels, content)
                async with (small if pixels <= LARGE_PIXELS else large).turn(pixels) as in_thread:
                    if await request.is_disconnected():
                        return Response()
                    return JSONResponse(await in_thread(classify, content))
        except UserError as error:
            raise RefusedError(422, f"{error}{_hint(request)}") from None
        except ClientDisconnect:
            return Response()  # which nobody reads

    def classify(content: bytes) -> dict[str, Any]:
        interpolation = classifier.preprocessing.interpolation
        image = decode(
            content, "the file", at_most=classifier.decoded_size, interpolation=interpolation, max_pixels=MAX_PIXELS
        )
        (found,) = classifier.predict([image], top_k)
        if not isinstance(found, dict):
            return {"top_k": found.to_json()["top_k"]}
        thresholds = {
            name: {"thresholds": dict(zip(target.field.names, map(float, target.thresholds(calibration)), strict=True))}
            for name, target, calibration in (
                (target.field.name, target, classifier.calibrations.get(target.field.name, {}))
                for target in classifier.targets
            )
            if isinstance(target, TagsTarget)
        }
        return {"targets": {name: own.to_json() | thresholds.get(name, {}) for name, own in found.items()}}

    app = Starlette(
        routes=[Route("/", show), Route("/predict", predict, methods=["POST"])],
        middleware=[Middleware(_CheckHost, names=allowed_names(host, allow_hosts))],
        exception_handlers={RefusedError: _refuse, HTTPException: _refuse_route, Exception: _report_bug},
    )
    app.router.redirect_slashes = False
    return app


def allowed_names(host: str, allow_hosts: Collection[str]) -> frozenset[str]:
    """Returns the names and addresses that a request's Host may have, besides the address that it connects to.

    A page of another host could reach the server under a name of its own (DNS rebinding), but never under an address.
    Raises UserError if one of `allow_hosts` is not a name.
    """
    names = {"localhost", "127.0.0.1", "::1", _normal(host)}
    if _is_wildcard(host):
        names.add(_normal(socket.gethostname()))
    for name in allow_hosts:
        if not _name_of(name) or _name_of(name) != _normal(name):
            raise UserError(
                f"--allow_host takes a name without scheme and port, such as photos.example.org, not '{name}'"
            )
        names.add(_normal(name))
    return frozenset(names)


def _is_wildcard(host: str) -> bool:
    return _normal(host) in ("0.0.0.0", "::")


def _normal(host: str) -> str:
    """Returns a host name or address as it is compared: lower case, IPv4 addresses not as IPv6."""
    host = host.lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host
    return str(getattr(address, "ipv4_mapped", None) or address)


def _name_of(header: str) -> str:
    """Returns the name or address in a Host header, without the port; '' if it is malformed."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d*)?", header, re.ASCII)
    return _normal(match[1]) if match else ""


class _CheckHost:
    """Middleware that refuses requests by pages of other hosts (DNS rebinding, cross-site requests)."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        allowed = self._names | {_normal(str(server[0])) for server in [scope["server"]] if server}
        if _name_of(host) not in allowed:
            reason = f"the host '{printable(host[:100])}' is not allowed; --allow_host NAME allows it"
            app = _refusal(RefusedError(400, reason))
        elif origin is not None and _name_of(urlsplit(origin).netloc) not in allowed:
            reason = f"pages of '{printable(origin[:100])}' are not allowed; --allow_host NAME allows them"
            app = _refusal(RefusedError(403, reason))
        await app(scope, receive, send)


def _check_encoding(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        raise RefusedError(415, f"send the bytes of an image file, not JSON: {_command(request)}")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, f"send the image file without a Content-Encoding: {_command(request)}")


def _image_file(request: Request, body: bytearray) -> bytes:
    """Returns the file that a request holds: its body, or the only file of a form. Raises RefusedError."""
    content_type = Message()
    content_type["Content-Type"] = request.headers.get("content-type", "")
    if content_type.get_content_type() == "multipart/form-data":
        content = _file_of_form(body, content_type.get_boundary() or "", _command(request))
    else:
        content = bytes(body)
    body.clear()
    if not content:
        raise RefusedError(422, f"the file is empty and cannot be read as an image; send one: {_command(request)}")
    return content


def _file_of_form(body: bytearray, boundary: str, command: str) -> bytes:
    """Returns the only file in a multipart/form-data body (RFC 7578). Raises RefusedError."""
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if not boundary or not parts or not parts.pop().startswith(b"--"):
        raise RefusedError(422, f"the form is incomplete; send only the file: {command}")
    found = []
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        if re.search(rb"""^content-disposition:.*;\s*filename\*?=""", head, re.IGNORECASE | re.MULTILINE):
            found.append(content)
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file (with curl: -F file=@FILE)"
        raise RefusedError(422, f"the form holds {what}; send one file: {command}")
    return found[0]


def _command(request: Request) -> str:
    return f"curl --data-binary @FILE http://{request.headers.get('host', 'HOST')}/predict"


def _hint(request: Request) -> str:
    """Returns how to send a file, if the body looks like that of `curl -d @FILE`, which drops line ends."""
    if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return f"; send the file with --data-binary: {_command(request)}"
    return ""


@cache
def _formats() -> tuple[str, ...]:
    """Returns those of FORMATS that this Pillow and its plugins read."""
    load_formats()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _count_pixels(content: bytes) -> int:
    """Reads an image's size from its header. Raises UserError if it is too large or not an image."""
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            width, height = image.size
            limit = MAX_PIXELS_OF.get(image.format or "", MAX_PIXELS)
            scans = _count_scans(content) if image.format in ("JPEG", "MPO") else 0
    except Exception:  # Pillow's plugins raise exceptions of any type for damaged files
        raise UserError(f"the file cannot be read as an image; the page reads {', '.join(_formats())}") from None
    if width * height > limit:
        what = f"{image.format} images " if limit < MAX_PIXELS else ""
        raise UserError(f"the file has {width} x {height} pixels; the page reads {what}up to {limit:,} in all")
    if scans > MAX_SCANS:
        raise UserError(f"the file is a JPEG of more than {MAX_SCANS} scans; save it with fewer")
    return width * height


def _count_scans(jpeg: bytes) -> int:
    """Returns the number of scans of a JPEG, up to MAX_SCANS + 1. Segments beyond 10,000 count as scans."""
    position, scans, segments = 2, 0, 0
    while (marker := _JPEG_MARKER.search(jpeg, position)) and marker[0] != b"\xff\xd9" and scans <= MAX_SCANS:
        segments += 1
        scans += marker[0] == b"\xff\xda" or segments > 10_000
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")
    return scans


def _refusal(error: RefusedError) -> Response:
    return JSONResponse({"error": error.reason}, error.status, {"Retry-After": "1"} if error.status == 503 else None)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _refusal(error)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405 and request.url.path == "/predict":
        reason = f"/predict takes POST: {_command(request)}"
    else:
        reason = "there are two addresses: GET / is a page, POST /predict classifies an image file"
    return JSONResponse({"error": reason}, error.status_code, error.headers)


async def _report_bug(request: Request, error: Exception) -> Response:
    traceback.print_exception(error)
    return JSONResponse({"error": "a bug in jaxft; its traceback is in the server's output"}, 500)


def _inline_hash(page: str, element: str) -> str:
    """Returns the hash of the page's inline style or script, for its Content-Security-Policy."""
    match = re.search(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    assert match
    return "sha256-" + base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()


def listen(host: str, port: int) -> socket.socket:
    """Opens the port, 0 for any free one. Raises UserError if the host or the port is not available."""
    if not host:
        raise UserError("--host is empty; give an address of this machine, or 0.0.0.0 for all of them")
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be between 0 and 65535, not {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda row: row[0] != socket.AF_INET)
        both = _normal(host) == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except socket.gaierror as error:
        raise UserError(f"--host '{host}' is not known ({error.strerror}); give an address of this machine") from None
    except (UnicodeError, ValueError) as error:
        raise UserError(f"--host '{printable(host[:100])}' is not a host name ({error})") from None
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot listen on {host}:{port} ({cause}); try another --port or --host") from None


def serve(
    classifier: Classifier, listener: socket.socket, host: str, top_k: int, allow_hosts: Sequence[str]
) -> NoReturn:
    """Serves until Ctrl-C or SIGTERM, then raises Interrupted."""
    uploads = Uploads(MAX_BYTES, MAX_BYTES_IN_ALL)
    app = make_app(classifier, host, top_k, uploads, allow_hosts)
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if _is_wildcard(host) else f"[{host}]" if ":" in host else host
    others = f", on other machines http://{socket.gethostname()}:{port}/," if _is_wildcard(host) else ""
    print(f"open http://{shown}:{port}/{others} in a browser; Ctrl-C stops it", flush=True)
    run(app, uploads, listener)
