"""A tiny exchange with a real WebSocket, the Feed that speaks its protocol, and what Lines hear of it."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from aiohttp import web
from prometheus_client import CollectorRegistry

from bus.lifecycle import running
from bus.messages import Level
from bus.metrics import FeedMetrics
from workers import lines
from workers.lag import Lag
from workers.lines import Lines
from workers.updates import BookDelta, BookSnapshot, Channel, Refused, Update

A, B, C = (Channel("ticker", name) for name in "ABC")
BOOK = Channel("depth", "BOOK")


@dataclass
class Tiny:
    """{"ask": [names]} and {"drop": [names]} up; {"of": name, "n": number} down, dated by "at", refused by "no", "whole" or not."""

    url: str
    feeds: ClassVar[frozenset[str]] = frozenset({"ticker", "depth"})
    per_socket: ClassVar[int] = 100
    requests_per_s: ClassVar[float] = 50.0
    keepalive: ClassVar[str] = ""

    def socket_url(self) -> str:
        return self.url

    def channel(self, kind: str, symbol: str, period_m: int) -> Channel:
        return Channel(kind, symbol, period_m)

    def subscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return [json.dumps({"ask": [channel.instrument for channel in channels], "levels": levels})]

    def unsubscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return [json.dumps({"drop": [channel.instrument for channel in channels]})]

    def parse(self, frame: bytes) -> Sequence[Update]:
        row = json.loads(frame)
        channel = BOOK if row["of"] == "BOOK" else Channel("ticker", row["of"])
        if "no" in row:
            return [Refused(channel=channel, why=row["no"])]
        kind = BookSnapshot if row.get("whole") else BookDelta if channel is BOOK else BookSnapshot
        return [kind(channel=channel, time_ms=row.get("at"), bids=[], asks=[], sequence=row["n"])]

    def checksum(self, bids: Sequence[Level], asks: Sequence[Level]) -> int | None:
        return None


def tiny(url: str, **limits: object) -> Tiny:
    """A feed with limits of its own: tiny(url, per_socket=2)."""
    made: Tiny = type("Tiny", (Tiny,), limits)(url)
    return made


@dataclass
class Exchange:
    """sockets: all there ever were; asked: what came over them, with when; refusal: what the handshake is answered with; hello: whether
    each channel that is asked for is told 1, 2, 3 ... at once."""

    url: str = ""
    sockets: list[web.WebSocketResponse] = field(default_factory=list)
    asked: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)
    shaken: list[float] = field(default_factory=list)
    refusal: web.Response | None = None
    hello: int = 0
    where: dict[str, web.WebSocketResponse] = field(default_factory=dict)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.shaken.append(time.monotonic())
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None
            return refusal
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        number = len(self.sockets)
        self.sockets.append(ws)
        async for message in ws:
            row = json.loads(message.data)
            self.asked.append((time.monotonic(), number, row))
            for name in row.get("ask", ()):
                self.where[name] = ws
                for n in range(1, self.hello + 1):
                    await self.tell(name, n)
            for name in row.get("drop", ()):
                self.where.pop(name, None)
        return ws

    async def tell(self, name: str, n: int, **more: object) -> None:
        await self.where[name].send_str(json.dumps({"of": name, "n": n} | more))

    def rows(self, word: str) -> list[tuple[int, list[str]]]:
        """What was asked or dropped, and over which socket."""
        return [(number, row[word]) for _, number, row in self.asked if word in row]


@asynccontextmanager
async def served(exchange: Exchange) -> AsyncIterator[Exchange]:
    application = web.Application()
    application.router.add_get("/", exchange.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    exchange.url = "ws://{}:{}/".format(*runner.addresses[0])
    try:
        yield exchange
    finally:
        for ws in exchange.sockets:
            if not ws.closed:
                await ws.close()
        await runner.cleanup()


@dataclass
class Heard:
    lines: Lines
    lag: Lag
    registry: CollectorRegistry
    updates: list[tuple[Update, float]] = field(default_factory=list)
    lost: list[tuple[list[Channel], str]] = field(default_factory=list)

    def of(self, channel: Channel) -> list[object]:
        """The numbers, or the reasons, that were told of a channel."""
        return [
            getattr(update, "sequence", None) or getattr(update, "why", None) for update, _ in self.updates if update.channel == channel
        ]

    def connects(self, result: str) -> float:
        return self.registry.get_sample_value("fmzbus_feed_connects_total", {"exchange": "tiny", "result": result}) or 0


@asynccontextmanager
async def reading(feed: Tiny, *, hearing: Callable[[Update], None] = lambda _: None) -> AsyncIterator[Heard]:
    """Lines that run until left."""
    registry = CollectorRegistry()
    async with lines.session() as session:

        def hear(update: Update, proven_s: float) -> None:
            heard.updates.append((update, proven_s))
            hearing(update)

        lag = Lag()
        made = Lines(
            "tiny",
            feed,
            session=session,
            levels=20,
            lag=lag,
            heard=hear,
            lost=lambda channels, why: heard.lost.append((list(channels), why)),
            metrics=FeedMetrics(registry),
        )
        heard = Heard(made, lag, registry)
        async with running(made.run()):
            yield heard


def within(waits: Sequence[float], least: Sequence[float]) -> bool:
    """Whether each is as long as it should be, and not much longer: the machine may be busy, and the test looks every 20 ms."""
    return all(least_s - 0.03 <= wait_s < least_s + 0.4 for wait_s, least_s in zip(waits, least, strict=True))


@contextmanager
def elsewhere(job: Callable[[], Coroutine[None, None, None]]) -> Iterator[None]:
    """Run a job in a thread with a loop of its own, which goes on while ours stands still."""
    thread = threading.Thread(target=lambda: asyncio.run(job()))
    thread.start()
    try:
        yield
    finally:
        thread.join()
