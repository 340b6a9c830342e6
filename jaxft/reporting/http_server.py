"""An HTTP server that bounds what clients can take: time, connections, and the memory of their request bodies.

uvicorn speaks HTTP. It has no time limit for a request's headers or body and no bound on the bodies in memory.
"""

import asyncio
import heapq
import itertools
import json
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import h11
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxft.errors import Interrupted

HEADER_SECONDS = 10.0  # for a request's line and headers, and for a client to read its answer
BODY_SECONDS = 10.0  # between two parts of a body, on top of what it takes at MIN_RATE
MIN_RATE = 20_000  # bytes per second of a body
BUSY_RATE = 1_000_000  # the same while others wait for memory, after the first second
WAIT_SECONDS = 30.0  # for memory
LINGER_SECONDS = 5.0  # to read on after an answer that came before the body's end; else the client may not see it
STOP_SECONDS = 1.0  # for bodies that are arriving when the server stops
GRACE_SECONDS = 10  # for requests that are being answered when the server stops
SMALL_BYTES = 2_000_000  # larger bodies leave a part of the memory free for smaller ones
MAX_CONNECTIONS = 500
BACKLOG = 200  # asyncio accepts this many at once; with MAX_CONNECTIONS below the usual limit of 1,024 open files


class RefusedError(Exception):
    """A request that is answered with an HTTP status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _Arrival:
    """A request body that is arriving."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._started = asyncio.get_running_loop().time()
        self._size = 0
        self.dropped: RefusedError | None = None

    def seconds(self) -> float:
        return asyncio.get_running_loop().time() - self._started

    def rate(self) -> float:
        """Returns the bytes per second since the start."""
        return self._size / max(self.seconds(), 1e-3)

    def add(self, size: int) -> None:
        """Counts received bytes and extends the time limit."""
        self._size += size
        if not self.dropped:
            slowest = self._started + BODY_SECONDS + self._size / MIN_RATE
            self._limit.reschedule(min(asyncio.get_running_loop().time() + BODY_SECONDS, slowest))

    def drop(self, reason: RefusedError, seconds: float = 0) -> None:
        """Refuses the request unless the body is complete after this time."""
        if not self.dropped and not self._limit.expired():
            self.dropped = reason
            self._limit.reschedule(asyncio.get_running_loop().time() + seconds)


class Uploads:
    """The request bodies in memory: at most `max_bytes` each and `max_total` bytes in all.

    A body's size is reserved before it is read, the smallest first; a part of the memory is only for small ones. While
    a body waits for memory, those that arrive slowly are dropped.
    """

    def __init__(self, max_bytes: int, max_total: int) -> None:
        self._max_bytes = max_bytes
        self._free = max_total
        self._waiting: list[int] = []  # sizes
        self._arriving: set[_Arrival] = set()
        self._stopping = False

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytearray]:
        """Receives a request's body; its memory counts as taken until the context ends.

        Raises RefusedError, or starlette's ClientDisconnect.
        """
        declared = request.headers.get("content-length")  # digits: h11 has verified it
        size = self._max_bytes if declared is None else int(declared)
        if size > self._max_bytes:
            raise self._too_large()
        await self._reserve(size)
        try:
            yield await self._receive(request)
        finally:
            self._free += size

    async def discard(self, receive: Receive) -> None:
        """Reads the rest of a body that nobody needs, for a few seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS) as limit:
                with self._listed(limit):
                    while (await receive()).get("more_body", False):
                        pass

    def stop(self) -> None:
        """Drops the bodies that are arriving, after a moment for those that are nearly complete, and all later ones."""
        self._stopping = True
        for arrival in self._arriving:
            arrival.drop(_stopped(), STOP_SECONDS)

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the file is larger than {self._max_bytes // 1_000_000} MB")

    async def _reserve(self, size: int) -> None:
        """Waits until a body of this size fits. Only the smallest of those that wait may take memory or drop others."""
        needed = size if size <= SMALL_BYTES else size + self._max_bytes
        self._waiting.append(size)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while (size > min(self._waiting) or self._free < needed) and not self._stopping:
                    slowest = min(self._arriving, key=_Arrival.rate, default=None)
                    if size == min(self._waiting) and slowest and slowest.seconds() > 1 and slowest.rate() < BUSY_RATE:
                        slowest.drop(RefusedError(503, "the server is busy and the file too slow; try again"))
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise RefusedError(503, "the server is busy; try again") from None
        finally:
            self._waiting.remove(size)
        if self._stopping:
            raise _stopped()
        self._free -= size

    async def _receive(self, request: Request) -> bytearray:
        body = bytearray()
        arrival = None
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                with self._listed(limit) as arrival:
                    async for part in request.stream():
                        body += part
                        if len(body) > self._max_bytes:
                            raise self._too_large()
                        arrival.add(len(part))
        except TimeoutError:
            slow = RefusedError(408, f"the file arrived too slowly ({len(body):,} bytes so far)")
            raise (arrival and arrival.dropped) or slow from None
        return body

    @contextmanager
    def _listed(self, limit: asyncio.Timeout) -> Iterator[_Arrival]:
        arrival = _Arrival(limit)
        self._arriving.add(arrival)
        if self._stopping:
            arrival.drop(_stopped())
        try:
            yield arrival
        finally:
            self._arriving.discard(arrival)


def _stopped() -> RefusedError:
    return RefusedError(503, "the server has been stopped")


class Queue:
    """Requests that take turns to work in one thread, the cheapest first."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap
        self._count = itertools.count()
        self._busy = False

    @asynccontextmanager
    async def turn(self, cost: int) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
        """Waits for the thread; yields a coroutine function that calls a function in it."""
        loop = asyncio.get_running_loop()
        if self._busy:
            turn = loop.create_future()
            heapq.heappush(self._waiting, (cost, next(self._count), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        self._busy = True
        try:
            yield partial(loop.run_in_executor, self._thread)
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        self._busy = False
        while self._waiting and not self._busy:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.cancelled():
                turn.set_result(None)
                self._busy = True


class CloseUnread:
    """Middleware that closes the connection if a request was answered before the end of its body.

    Otherwise the client could send for ever. It closes with a delay, because closing at once would discard an answer
    that the client has not read yet.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads) -> None:
        self._app = app
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        ended = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"
        begun = b"expect" not in headers  # a client that expects 100 Continue sends nothing before it
        started = closing = False

        async def receive_counting() -> Message:
            nonlocal ended, begun
            begun = True
            message = await receive()
            ended = ended or not message.get("more_body", False)
            return message

        async def send_closing(message: Message) -> None:
            nonlocal started, closing
            if message["type"] == "http.response.start":
                started, closing = True, not ended
                if closing:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                await send(message)
            elif closing and not message.get("more_body", False):
                await send({**message, "more_body": True})
                if begun:
                    await self._uploads.discard(receive)
                await send({"type": "http.response.body"})
            else:
                await send(message)

        try:
            await self._app(scope, receive_counting, send_closing)
        except asyncio.CancelledError:  # the server stops and waits no longer
            if not started:
                await JSONResponse({"error": _stopped().reason}, 503)(scope, receive, send)


class _Protocol(H11Protocol):
    """A connection with time limits. If there are too many, the one that waits longest for a request is closed."""

    _timer: asyncio.TimerHandle | None = None  # of a request's headers
    _write_timer: asyncio.TimerHandle | None = None
    _since = 0.0  # when it last began to wait for a request
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [other for other in self.connections if isinstance(other, _Protocol) and other._is_waiting()]
            min(waiting, key=lambda other: other._since).transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answers malformed HTTP as uvicorn does, but in JSON, and closes late enough for the client to read it."""
        self._refused = True
        self._stop_timer()
        if self.cycle:  # the body of this request is malformed
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps({"error": "the request is not valid HTTP, or its headers are too long"}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.loop.call_later(1.0, self.transport.close)

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        """Starts the time limit for the next request's headers, or ends it if they are complete."""
        if not self._is_waiting():
            self._stop_timer()
        elif self._timer is None:
            self._since = self.loop.time()
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, uploads: Uploads) -> None:
        super().__init__(config)
        self._uploads = uploads

    async def shutdown(self, sockets: Any = None) -> None:
        self._uploads.stop()
        await super().shutdown(sockets)


def make_server(app: ASGIApp, uploads: Uploads) -> uvicorn.Server:
    """Returns a server with all limits of this module."""
    config = uvicorn.Config(
        CloseUnread(app, uploads),
        http=_Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",  # uvicorn logs a traceback for each request that is cut off
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return _Server(config, uploads)


def run(app: ASGIApp, uploads: Uploads, listener: socket.socket) -> NoReturn:
    """Serves until Ctrl-C or SIGTERM, then finishes what it is answering and raises Interrupted."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(signal.Signals(number))

    # uvicorn replaces these handlers while it serves, and sends itself the signal again at its end.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        make_server(app, uploads).run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    raise AssertionError("uvicorn ended without a signal")
