"""WebSocket streams for strategies that use Dial() instead of polling: ws://bridge:6666/stream/<exchange>/<kind>/<symbol>.

Each text frame is one finished reply, {"data": ...}: first the last value if it is fresh, then every new one. What is not proven any
more is told too, {"error": "stale: ..."}, and so is the value once it is again. A reader that takes them too slowly loses the oldest
and is told how many, {"lost": 12}, before the next. What it sends is ignored. Before the upgrade a refusal is plain HTTP with
{"error": ...}; when the bridge stops, a stream ends with code 1001.
"""

import asyncio
import contextlib
import logging
import math
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import unquote

import msgspec
import nats.errors
from aiohttp import WSCloseCode, WSMsgType, web

from bridge.routes import Routes
from bus import market, subjects
from bus.errors import BadRequest, BusDown, BusError, Busy
from bus.fleet import Fleet
from bus.follow import Follower, Key
from bus.lifecycle import running
from bus.market import Entry
from bus.metrics import Metrics

log = logging.getLogger(__name__)

MOST = 1000
"""Streams that one bridge keeps; more are refused."""
WAITING = 64
"""Values that may wait for one reader."""
BUFFER = 64 * 1024
"""Bytes that may lie unsent in this process for one reader, and about as many in the system's socket: what lies there grows old."""
MOST_HEARD = 4096
"""Bytes of a frame that a reader may send; a longer one ends the stream."""
HEARTBEAT_S = 15.0
"""A reader that is silent gets a ping that often, and has half of that to answer."""
CHECK_S = 0.25
PATIENCE_S = 5.0
"""A reader that was told nothing for so long is told that there is nothing."""
STUCK_S = 30.0
"""A reader whose connection takes nothing for so long is cut off."""
CLOSE_S = 2.0

UNPROVEN = market.withdrawal("nobody proves any more that this is true")
NOTHING = market.withdrawal("no value has come yet")


class Waiting:
    """Frames that wait for one reader. lost: called for each that it will not get. clock: monotonic."""

    def __init__(self, max_age_s: float, lost: Callable[[], None], clock: Callable[[], float] = market.clock) -> None:
        self._max_age_s = max_age_s
        self._count = lost
        self._clock = clock
        self._frames: deque[tuple[float, bytes]] = deque()
        self._lost = 0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, content: bytes) -> None:
        if len(self._frames) >= WAITING:
            self._lose()
        self._frames.append((self._clock(), content))

    def take(self) -> list[bytes]:
        """What is to be sent next. A value that waited longer than it counts as fresh is lost, unless it is the newest: then it is still
        proven, or a withdrawal would stand behind it."""
        oldest_s = self._clock() - self._max_age_s
        while len(self._frames) > 1 and self._frames[0][0] < oldest_s:
            self._lose()
        lost, self._lost = self._lost, 0
        _, content = self._frames.popleft()
        return [b'{"lost":%d}' % lost, content] if lost else [content]

    def _lose(self) -> None:
        self._frames.popleft()
        self._lost += 1
        self._count()


class Reader:
    """One listener. told: the value that it takes for true, None where it knows of none; patient_until_s: when it shall hear so."""

    def __init__(self, request: web.BaseRequest, stream: web.WebSocketResponse, waiting: Waiting) -> None:
        self._request = request
        self._stream = stream
        self.waiting = waiting
        self._ready = asyncio.Event()
        self.told: bytes | None = None
        self.patient_until_s = market.clock() + PATIENCE_S

    def offer(self, content: bytes, *, fresh: bool) -> None:
        """Put one reply behind those that wait. Never blocks: a reader that is slow is nobody else's trouble."""
        self.waiting.put(content)
        self.told, self.patient_until_s = content if fresh else None, math.inf
        self._ready.set()

    async def tell(self) -> None:
        """Send what is offered, at the pace of the reader."""
        with contextlib.suppress(ConnectionError):  # it has gone, which hear() sees as well
            while True:
                await self._ready.wait()
                self._ready.clear()
                while self.waiting:
                    for frame in self.waiting.take():
                        await self._stream.send_frame(frame, WSMsgType.TEXT)
                        await self._room()

    async def hear(self) -> None:
        """Return when the reader has gone. Between two of its frames others have their turn."""
        with contextlib.suppress(ConnectionError):
            async for message in self._stream:
                if message.type is WSMsgType.PING:
                    await self._stream.pong(message.data)
                    await self._room()
                await asyncio.sleep(0)

    async def _room(self) -> None:
        """Wait until what was written has left this process, but for ever for nobody."""
        if self._request.protocol.writing_paused and self._request.transport is not None:
            giving_up = asyncio.get_running_loop().call_later(STUCK_S, self._request.transport.abort)
            try:
                await self._request.writer.drain()
            finally:
                giving_up.cancel()

    async def close(self) -> None:
        """Say that the bridge goes away, to a reader that may not listen."""
        await self._stream.close(code=WSCloseCode.GOING_AWAY, drain=False)


class Push:
    """All streams of a bridge. heard: tells what feeders feed. open: how many streams there are."""

    def __init__(self, follower: Follower, routes: Routes, heard: Fleet, metrics: Metrics) -> None:
        self._follower = follower
        self._routes = routes
        self._heard = heard
        self._metrics = metrics
        self._readers: dict[Key, set[Reader]] = {}
        self._fed: set[tuple[str, str]] = set()
        self._draining = False
        self.open = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Serve one GET of /stream/... until its reader has gone."""
        # Who may listen is decided here, before anything is looked up: bridge/access.py, once there is access control.
        if self._draining or self.open >= MOST:
            return _refusal(503, Busy("the bridge is stopping" if self._draining else f"{MOST} streams are open already"))
        self.open += 1
        try:
            return await self._serve(request)
        finally:
            self.open -= 1

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        # Pings are answered, and room in the transport is waited for, by Reader: aiohttp does neither in a way that ends, or is bounded,
        # with a peer that sends and does not read.
        stream = web.WebSocketResponse(
            timeout=CLOSE_S, heartbeat=HEARTBEAT_S, compress=False, max_msg_size=MOST_HEARD, writer_limit=sys.maxsize, autoping=False
        )
        try:
            key = self._key(request.rel_url.raw_path)
            if not stream.can_prepare(request):
                return _refusal(426, BadRequest("open this address as a WebSocket, as Dial() does"))
            entry = await self._follower.follow(key, known=False)
            await stream.prepare(request)
        except BadRequest as e:
            return _refusal(404, e)
        except BusError as e:
            return _refusal(503, e)
        except (nats.errors.Error, ConnectionError) as e:
            return _refusal(503, BusDown(str(e)))
        _bound(request)
        reader = Reader(request, stream, Waiting(entry.max_age_s, self._metrics.stream_lost.inc))
        if self._draining:
            await reader.close()
            return stream
        self._readers.setdefault(key, set()).add(reader)
        try:
            if (content := self._follower.find(key)) is not None:
                reader.offer(content, fresh=True)
            async with running(reader.tell()):
                await reader.hear()
        finally:
            self._readers[key].discard(reader)
            if not self._readers[key]:
                del self._readers[key]
            if request.transport is not None:  # who does not take the last words is not waited for
                asyncio.get_running_loop().call_later(CLOSE_S, request.transport.abort)
        return stream

    def _key(self, raw_path: str) -> Key:
        """What a path names. Raises BadRequest for what nobody tells, NoWorker while no worker was ever heard."""
        match raw_path.split("/"):
            case ["", "stream", exchange, kind, symbol]:
                pass
            case _:
                raise BadRequest("expected /stream/<exchange>/<kind>/<symbol>, as in /stream/okx/ticker/BTC_USDT")
        exchange = self._routes.find(f"/{exchange}").exchange
        kind, symbol = unquote(kind), subjects.name(unquote(symbol), "symbol")
        name, _ = market.base(kind)
        self._hear()
        if (exchange, name) not in self._fed and self._heard.settled:
            raise BadRequest(f"no feeder tells {name} of {subjects.shown(exchange)}")
        subjects.feed(exchange, kind, symbol)  # raises for a symbol that escaping makes too long
        return exchange, kind, symbol

    def _hear(self) -> None:
        """Keep in mind what was ever fed: a stream is not refused while its feeder is replaced."""
        for presence in self._heard.alive():
            for exchange, feed in presence.feeds.items():
                self._fed.update((exchange, kind) for kind in feed.kinds)

    def told(self, entry: Entry) -> None:
        """Take what the follower heard, in its own turn: this only puts it before the readers."""
        key = (entry.exchange, entry.kind, entry.symbol)
        readers = self._readers.get(key)
        if readers:
            content = entry.content if entry.withdrawn else self._follower.find(key)
            if content is not None:  # else it is not proven yet, which keep_telling() looks for
                for reader in readers:
                    reader.offer(content, fresh=not entry.withdrawn)

    async def keep_telling(self) -> None:
        """Tell what no message tells: that a value is not proven any more, or is again. And wish for what is listened to."""
        while True:
            await asyncio.sleep(CHECK_S)
            self._hear()
            for key, readers in list(self._readers.items()):
                if key not in self._follower.entries:  # left as unused, by a process that was stopped for a minute
                    with contextlib.suppress(nats.errors.Error):
                        await self._follower.follow(key, known=False)
                content = self._follower.find(key)
                now_s = market.clock()
                for reader in readers:
                    if content is not None and content is not reader.told:
                        reader.offer(content, fresh=True)
                    elif content is None and (reader.told is not None or now_s >= reader.patient_until_s):
                        reader.offer(NOTHING if reader.told is None else UNPROVEN, fresh=False)

    async def close_all(self) -> None:
        """Take no more streams, and end those that are open with code 1001, in 2 s at most."""
        self._draining = True
        closing = [asyncio.ensure_future(reader.close()) for readers in self._readers.values() for reader in readers]
        if closing:
            await asyncio.wait(closing)


@asynccontextmanager
async def pushing(follower: Follower, routes: Routes, heard: Fleet, metrics: Metrics) -> AsyncIterator[Push]:
    """The streams of a bridge's life. The follower's `told` must lead to push.told()."""
    push = Push(follower, routes, heard, metrics)
    metrics.streams.set_function(lambda: push.open)
    async with running(push.keep_telling()):
        try:
            yield push
        finally:
            await push.close_all()


def _bound(request: web.BaseRequest) -> None:
    """Let little lie in buffers, here and in the system: a slow reader shall get what is new, and cost no memory."""
    if request.transport is not None:
        request.transport.set_write_buffer_limits(high=BUFFER)
        with contextlib.suppress(OSError):
            request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)


def _refusal(status: int, error: BusError) -> web.Response:
    headers = {"Upgrade": "websocket"} if status == 426 else None
    return web.Response(status=status, body=msgspec.json.encode({"error": error.text}), content_type="application/json", headers=headers)
