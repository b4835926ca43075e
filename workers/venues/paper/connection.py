"""One WebSocket connection: its subscriptions, the requests it may make, and a bounded queue of what waits to be sent to it."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from bus.lifecycle import running
from workers.venues.paper import channels
from workers.venues.paper.channels import Asked, Document
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.limits import PATIENCE

PATH = "/ws/v1"
MOST_REQUESTS = 20
"""Of one connection in a second of the clock."""

MOST_WAITING = 1_000
MOST_WAITING_BYTES = 1 << 20

CLOSE_S = 5
"""How long a connection that we close may take to say goodbye."""

SLOW = 4001
CUT = 0
"""Not a code that is sent: the connection is aborted, or is gone already."""


class Message:
    """A document on its way, encoded once and packed once for each way of packing. path: for the faults; "" for answers: they meet none."""

    __slots__ = ("_packed", "path", "symbol", "text")

    def __init__(self, document: Document) -> None:
        self.text = msgspec.json.encode(document)
        self.path = f"{document['channel']} {PATH}" if "channel" in document else ""
        self.symbol = str(document.get("symbol", ""))
        self._packed: dict[str, bytes] = {}

    def packed(self, compress: str) -> bytes:
        if compress not in self._packed:
            self._packed[compress] = channels.packed(self.text, compress)
        return self._packed[compress]


class _Frame(NamedTuple):
    due_s: float
    data: bytes
    kind: WSMsgType


class Connection:
    """One client: its subscriptions, and what waits to be sent to it. key, account: after a login."""

    def __init__(self, ws: web.WebSocketResponse, *, address: str, compress: str, transport: asyncio.Transport) -> None:
        self.address = address
        self.key = ""
        self.account = 0
        self.subscriptions: dict[tuple[str, str, int], Asked] = {}
        self.stalled_until_s = 0.0
        self.pinged_s = 0.0
        self.silent_since_s: float | None = None
        self._ws = ws
        self._compress = compress
        self._transport = transport
        self._ended: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._queue: deque[_Frame] = deque()
        self._waiting = 0
        self._due_s = 0.0
        self._wake = asyncio.Event()
        self._second = self._requests = 0

    def tell(self, message: Message, delay_s: float = 0) -> None:
        """Queue a message; a reader with too many of them is closed instead."""
        kind = WSMsgType.BINARY if self._compress else WSMsgType.TEXT
        if delay_s:
            self._due_s = max(self._due_s, asyncio.get_running_loop().time() + delay_s)
        self._put(_Frame(self._due_s, message.packed(self._compress), kind), first=False)

    def control(self, kind: WSMsgType, data: bytes = b"") -> None:
        """Queue a ping or pong ahead of the messages."""
        self._put(_Frame(0, data, kind), first=True)

    def count(self, now_s: float) -> None:
        """Count a request. Raises Refused(TOO_MANY_REQUESTS); who goes on after it is closed."""
        if int(now_s) != self._second:
            self._second, self._requests = int(now_s), 0
        self._requests += 1
        if self._requests > MOST_REQUESTS + PATIENCE:
            self.end(WSCloseCode.POLICY_VIOLATION, "too many requests")
        if self._requests > MOST_REQUESTS:
            raise Refused(Code.TOO_MANY_REQUESTS, f"more than {MOST_REQUESTS} requests in a second", retry_after_s=1)

    def end(self, code: int, reason: str = "") -> None:
        """Have the connection closed, once, with what is still queued thrown away."""
        if not self._ended.done():
            self._ended.set_result((code, reason))
            self._queue.clear()

    async def run(self, request: Callable[["Connection", str | None], None]) -> None:
        """Read and write until either side ends it. request: takes each frame, None for a binary one."""
        # The writer stays while the connection is closed: one cancelled as it waits for a slow reader takes aiohttp's closing with it.
        async with running(self._write()):
            async with running(self._read(request)):
                code, reason = await self._ended
            if code != CUT:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._ws.close(code=code, message=reason.encode())
                        return
            self._transport.abort()

    async def _read(self, request: Callable[["Connection", str | None], None]) -> None:
        while True:
            frame = await self._ws.receive()
            match frame.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    request(self, frame.data if frame.type is WSMsgType.TEXT else None)
                    # A client that sends without a pause must not keep the others waiting.
                    await asyncio.sleep(0)
                case WSMsgType.PING:
                    self.control(WSMsgType.PONG, frame.data)
                case WSMsgType.PONG:
                    self.silent_since_s = None
                case _:
                    # A close frame is answered by now, as is one too large; aborting would lose the answer.
                    return self.end(WSCloseCode.OK)

    async def _write(self) -> None:
        clock = asyncio.get_running_loop().time
        try:
            while True:
                while self._queue:
                    if (early_s := self._queue[0].due_s - clock()) > 0:
                        await asyncio.sleep(early_s)
                        continue
                    frame = self._queue.popleft()
                    self._waiting -= len(frame.data)
                    await self._ws.send_frame(frame.data, frame.kind)
                self._wake.clear()
                await self._wake.wait()
        except ConnectionError:
            self.end(CUT)

    def _put(self, frame: _Frame, *, first: bool) -> None:
        if self._ended.done():
            return
        self._waiting += len(frame.data)
        (self._queue.appendleft if first else self._queue.append)(frame)
        if len(self._queue) > MOST_WAITING or self._waiting > MOST_WAITING_BYTES:
            self.end(SLOW, f"too slow: more than {MOST_WAITING} messages or {MOST_WAITING_BYTES} bytes were waiting")
        self._wake.set()
