"""The HTTP side of the bridge: one POST in, one envelope out, HTTP 200 whatever happens."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

import aiohttp
from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.web_protocol import _ErrInfo
from msgspec import Raw, Struct

from bridge import fmz
from bridge.cache import MISS, Cache, Question
from bridge.caller import Caller
from bridge.routes import Route, Routes
from bus import config
from bus.connection import Bus
from bus.errors import BadRequest, BusError, Busy, Internal, NoWorker, TimedOut, outcome_unknown
from bus.messages import Failure, Reply, Request, Spans, encode_exact
from bus.methods import METHODS, is_write
from bus.metrics import Metrics
from bus.seal import Sealer, frame

log = logging.getLogger(__name__)

MARGIN_S = 0.5
"""The deadline in the message is this much before the host's, a tenth of it at most, so that a worker's last word still arrives."""
IDLE_GRACE_S = 1.0
"""While draining, how long a kept-alive connection may stay silent before it is closed."""
DRAIN_S = 15.0
REPLY_S = 0.05
"""What is left of the deadline to hand an answer to the host."""
STREAM = "/stream/"
JSON = "application/json"
ONLY_POST = b'{"error":"POST an FMZ request here, as a robot does; see the README"}'
MALFORMED = "body: not a well-formed POST (a bad head, length or chunk, or a header over 8190 bytes)"


class _Connection(web.RequestHandler):
    """One connection of a host. What is wrong with its HTTP is told as an envelope: aiohttp's own words quote the bytes that came."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        request = self._current_request
        if request is None or request.content.is_eof():
            return
        if self._messages and isinstance(self._messages[-1][0], _ErrInfo):
            self._lingering_time = 0.0  # aiohttp tells a body that breaks in a later packet to nobody, and would wait for its rest
            request.content.set_exception(web.RequestPayloadError(MALFORMED))

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        error: BusError
        if status < 500:
            log.warning("malformed HTTP", extra={"fields": {"error": type(exc).__name__}})
            error = BadRequest(MALFORMED)
        else:
            log.error("unhandled error", exc_info=exc)
            error = Internal("internal error, see the bridge's log")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = web.Response(body=fmz.refuse(error), content_type=JSON, headers={"Connection": "close"})
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Plain(web.StreamResponse):
    """An envelope for a connection that stays open: one head for all of them, and one write. aiohttp makes the headers of each Response
    anew, which costs as much as all that the bridge does for an answer from memory (measured)."""

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nDate: %b\r\n\r\n%b"

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._keep_alive = True

    async def prepare(self, request: web.BaseRequest) -> None:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the host has gone")
        answer = self.HEAD % (len(self._content), rfc822_formatted_time().encode(), self._content)
        request.writer.output_size += len(answer)  # by which handle_error() knows that the answer has begun
        transport.write(answer)
        self._eof_sent = True
        if request.protocol.writing_paused:
            await request.writer.drain()

    async def write_eof(self, data: bytes = b"") -> None:
        pass


class _Course(Struct):
    """What became of a request so far. key: its idempotency key, "" for a read. waited: s spent waiting for workers."""

    started: float
    trace: bool
    exchange: str = "unknown"
    method: str = "unknown"
    outcome: str = "ok"
    key: str = ""
    waited: float = 0.0
    spans: Spans | None = None


class Streams(Protocol):
    """Who serves GET /stream/... (push.py); it outlives no connection, so that it takes no part in what is in flight."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse: ...


class Bridge:
    """Answers hosts. in_flight: requests taken and not yet answered."""

    def __init__(
        self,
        settings: config.Bridge,
        orders: config.Orders,
        *,
        bus: Bus,
        caller: Caller,
        routes: Routes,
        sealer: Sealer,
        metrics: Metrics,
        cache: Cache,
        push: Streams | None = None,
    ) -> None:
        self._settings = settings
        self._by_nonce = orders.nonce_identity == "auto"
        self._bus = bus
        self._caller = caller
        self._routes = routes
        self._sealer = sealer
        self._metrics = metrics
        self._cache = cache
        self._push = push
        self._open_keys: dict[str, web.RequestHandler] = {}
        self._busy: set[object] = set()
        self._margin_s = min(MARGIN_S, settings.deadline_s / 10)
        self._idle = asyncio.Event()
        self.in_flight = 0
        self.draining = False
        self.server = _Server(
            self.handle,
            access_log=None,
            request_factory=partial(web.BaseRequest, loop=asyncio.get_running_loop(), client_max_size=settings.max_body_kib * 1024),
            keepalive_timeout=settings.idle_s,
            auto_decompress=False,
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. The only place where a host's connection meets an exception."""
        if self._push is not None and request.method == "GET" and request.path.startswith(STREAM):
            return await self._push.handle(request)
        started = time.perf_counter()
        self.in_flight += 1
        self._busy.add(request.protocol)
        try:
            response = await self._answer(request, started)
        finally:
            self.in_flight -= 1
            self._busy.discard(request.protocol)
            if self.draining and not self.in_flight:
                self._idle.set()
        if self.draining:
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest, started: float) -> web.StreamResponse:
        if request.method != "POST":
            return web.Response(body=ONLY_POST, status=405, content_type=JSON, headers={"Allow": "POST"})
        one = _Course(started, request.headers.get("Fmzbus-Trace") == "1")
        question: Question | None = None
        keys: tuple[str, ...] = ()
        try:
            body = await self._read(request, started)
            call = fmz.decode(body, request.headers.get("Http-Method", ""))
            one.method, keys = call.method.name, (call.access_key, call.secret_key)
            route = self._routes.find(request.rel_url.raw_path)
            if route.known:
                one.exchange = route.exchange
            # Who may call is to be decided here, before anything is looked at that others were answered.
            question = self._cache.question(route, call)
            content = self._cache.find(question) if question is not None else None
            if content is None:
                content = await self._ask(request, route, call, question, one)
        except BusError as e:
            content, one.outcome = fmz.refuse(e, *keys), e.code
        except Exception:  # every request gets one answer, whatever is wrong with us
            log.exception("unhandled error")  # the traceback stays here, the host gets one line
            told = "internal error, see the bridge's log"
            error = outcome_unknown(told, one.key if METHODS[one.method].places else "") if one.key else Internal(told)
            content, one.outcome = fmz.refuse(error), error.code
        finally:
            if one.key and self._open_keys.get(one.key) is request.protocol:
                del self._open_keys[one.key]
        elapsed = time.perf_counter() - started
        self._metrics.answered(one.exchange, one.method, one.outcome, elapsed)
        if question is not None:
            self._metrics.cached(one.exchange, one.method, question.result)
        if not (one.trace or self.draining) and request.keep_alive and request.version == HttpVersion11:
            return _Plain(content)
        response = web.Response(body=content, content_type=JSON)
        if one.trace:
            response.headers["Server-Timing"] = _timing(elapsed, one.waited, one.spans)
            response.headers["Fmzbus-Cache"] = question.result if question is not None else MISS
        return response

    async def _ask(self, request: web.BaseRequest, route: Route, call: fmz.HostCall, question: Question | None, one: _Course) -> bytes:
        """The answer of a worker, as an envelope. Raises BusError."""
        if self.in_flight > self._settings.max_in_flight * (2 if one.method == "cancel" else 1):  # which finds room where others do not
            raise Busy(f"{self._settings.max_in_flight} requests are in flight already")
        if question is not None:
            left_s = self._settings.deadline_s - (time.perf_counter() - one.started) - REPLY_S
            sent = time.perf_counter()
            try:
                return await self._cache.ask(
                    question, lambda params, resolved: self._send(route, call, fmz.encode_params(params), one, resolved=resolved), left_s
                )
            finally:
                one.waited = one.waited or time.perf_counter() - sent
        params = fmz.encode_params(call.params)
        if is_write(call.method, call.params):
            one.key = self._key(route.path, call, params, request.protocol)
        reply = await self._send(route, call, params, one)
        if isinstance(reply, Failure):
            raise reply.error
        content = fmz.answer(reply)
        if reply.tell:  # a host that has hung up does not know of its order: an equal one that comes next is a repetition
            arrived = request.transport is not None and not request.transport.is_closing()
            await self._caller.told(reply.tell, one.key, arrived=arrived)
        return content

    async def _send(self, route: Route, call: fmz.HostCall, params: bytes, one: _Course, *, resolved: bool = False) -> Reply:
        key_id, sealed, mac_key = self._sealer.box(call.access_key, call.secret_key)
        left_s = self._settings.deadline_s - (time.perf_counter() - one.started)
        now_ms = self._bus.now_ms()
        message = Request(
            exchange=route.exchange,
            path=route.path,
            method=one.method,
            params=Raw(params),
            expires_at_ms=now_ms + int((left_s - self._margin_s) * 1000),
            idempotency_key=one.key,
            key_id=key_id,
            sealed=sealed,
            trace=one.trace,
            asked_ms=now_ms - int((time.perf_counter() - one.started) * 1000) if one.key else 0,
            resolved=resolved,
        )
        sent = time.perf_counter()
        try:
            reply = await self._caller.call(
                route.exchange, one.method, frame(encode_exact(message), mac_key), key=one.key, timeout_s=left_s - REPLY_S
            )
        except NoWorker as e:
            if route.known:
                raise
            raise self._routes.unknown(route.path.partition("/")[0]) from e
        finally:
            one.waited = time.perf_counter() - sent
        one.spans = reply.spans
        return reply

    async def _read(self, request: web.BaseRequest, started: float) -> bytes:
        if len(self.server._connections) > self._settings.max_connections:  # .connections makes a list of them all
            raise Busy(f"{self._settings.max_connections} connections are open already")
        try:
            if request.content.is_eof():  # the usual case: the body came with the head, no timer is needed, and nothing to wait for
                body = request.content.read_nowait()
                if len(body) > self._settings.max_body_kib * 1024:
                    raise BadRequest(f"body: expected at most {self._settings.max_body_kib} KiB")
                return body
            async with asyncio.timeout(self._settings.deadline_s - (time.perf_counter() - started) - self._margin_s):
                if request.headers.get("Expect", "").lower() == "100-continue":
                    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    request.writer.output_size = 0  # the answer itself has not begun
                return await request.read()
        except web.HTTPRequestEntityTooLarge as e:
            raise BadRequest(f"body: expected at most {self._settings.max_body_kib} KiB") from e
        except TimeoutError as e:
            raise TimedOut("the body did not arrive") from e
        except (aiohttp.ClientError, ConnectionError, web.RequestPayloadError) as e:
            raise BadRequest("body: broken off or badly chunked") from e

    def _key(self, path: str, call: fmz.HostCall, params: bytes, connection: web.RequestHandler) -> str:
        """The idempotency key. Two equal requests that are open at once are two orders: the second gets a random key; unless the host of
        the first has hung up, for then the second is its repetition."""
        key = fmz.idempotency_key(path, call, params, by_nonce=self._by_nonce)
        first = self._open_keys.get(key)
        if first is not None and first.transport is not None and not first.transport.is_closing():
            key = fmz.idempotency_key(path, call, params, by_nonce=False)
        self._open_keys[key] = connection
        return key

    async def drain(self) -> None:
        """Answer what is open, each reply with `Connection: close`; then close what stayed silent. A host repeats no POST by itself, so
        no connection is closed while a request may be on its way, except one that was silent for IDLE_GRACE_S."""
        self.draining = True
        await asyncio.sleep(IDLE_GRACE_S)
        for connection in self.server.connections:
            if connection not in self._busy:
                connection.force_close()
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()


def _timing(elapsed: float, waited: float, spans: Spans | None) -> str:
    """Server-Timing, ms per hop: bridge and bus without what they wait for, worker without the exchange."""
    worker, venue = (spans.worker_ms, spans.venue_ms) if spans else (0.0, 0.0)
    hops = {
        "bridge": (elapsed - waited) * 1000,
        "bus": waited * 1000 - worker,
        "worker": worker - venue,
        "venue": venue,
        "total": elapsed * 1000,
    }
    return ", ".join(f"{hop};dur={max(ms, 0):.3f}" for hop, ms in hops.items())


@asynccontextmanager
async def listening(bridge: Bridge, host: str, port: int, inherited: socket.socket | None) -> AsyncIterator[str]:
    """Accept hosts until left, then drain. Yields the service address. Raises OSError when the port is taken.

    Without an inherited socket several bridges may share the port (SO_REUSEPORT).
    """
    loop = asyncio.get_running_loop()
    if inherited is not None:
        server = await loop.create_server(bridge.server, sock=inherited, backlog=1024)
    else:
        server = await loop.create_server(bridge.server, host, port, reuse_port=True, backlog=1024)
    bound = server.sockets[0].getsockname()
    try:
        yield f"http://{bound[0]}:{bound[1]}"
    finally:
        server.close()
        try:
            async with asyncio.timeout(DRAIN_S):
                await bridge.drain()
        except TimeoutError:
            log.warning("drain ended with requests open", extra={"fields": {"in_flight": bridge.in_flight}})
        await bridge.server.shutdown(1)
