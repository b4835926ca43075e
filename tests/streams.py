"""Streams for tests: a feeder played by hand over real NATS, a follower, its streams on a port, and a reader that takes its time."""

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
from aiohttp import web
from nats.aio.client import Client
from nats.aio.msg import Msg

from bridge.push import Push, Reader, pushing
from bridge.routes import Routes
from bus import fleet, market, server, subjects
from bus.connection import connected
from bus.follow import Follower, following
from bus.lifecycle import running
from bus.market import HEADER, Beat, Proof
from bus.metrics import Metrics
from tests import servers
from tests.servers import eventually

TICKER = "/stream/paper/ticker/BTC_USDT"
AGES = dict.fromkeys(market.KINDS, 5.0)


async def flushed(nc: Client) -> None:
    """Return when the server has all that was sent. nats-py's PING overtakes what its flusher has not written yet, so that one flush() is
    not enough (measured: 3 to 8 of 1,000 subscriptions were not there yet)."""
    await nc.flush()
    await nc.flush()


class Teller:
    """What a feeder says on the bus, by hand. beating: it lives."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._heard: dict[str, int] = {}
        self._listed: dict[str, tuple[int, int]] = {}
        self._n = self._number = 0
        self.epoch = 1
        self.beating = True

    async def hear(self, message: Msg) -> None:
        self._heard[message.subject.split(".")[1]] = market.read_tick(message.data)[0]

    async def tell(self, content: bytes, symbol: str = "BTC_USDT", kind: str = "ticker", age_ms: int = 0) -> None:
        self._n += 1
        header = Proof(self.epoch, self._n, age_ms, 0).header()
        await self._nc.publish(subjects.feed("paper", kind, symbol), content, headers={HEADER: header})
        self._listed[market.key(kind, symbol)] = (self._n, age_ms)

    def prove(self, symbol: str, age_ms: int = 0) -> None:
        """Say in the next beats that the newest value of a symbol was proven so long ago."""
        name = market.key("ticker", symbol)
        self._listed[name] = (self._listed[name][0], age_ms)

    async def beat(self) -> None:
        while True:
            if self.beating:
                self._number += 1
                beat = Beat(
                    feeder="f", epoch=self.epoch, number=self._number, top=self._n, whole=True, keys=self._listed, heard=self._heard
                )
                await self._nc.publish(subjects.beat("paper", 0), market.encode(beat))
            await asyncio.sleep(0.1)


@asynccontextmanager
async def telling(state: Path) -> AsyncIterator[Teller]:
    """A feeder of paper, alive."""
    kinds = {"paper": fleet.Feed(kinds=["ticker", "candles"])}
    async with connected(server.url(state, "feeder"), "feeder", closed=lambda: None) as bus:
        teller = Teller(bus.nc)
        await bus.nc.subscribe(subjects.tick("*"), cb=teller.hear)
        async with fleet.announced(bus, admin="", version="", feeds=lambda: kinds, ready=lambda: True), running(teller.beat()):
            yield teller


class Rig:
    """A follower, its streams on a port, and what a feeder says."""

    def __init__(
        self, streams: Push, follower: Follower, teller: Teller, address: str, session: aiohttp.ClientSession, metrics: Metrics
    ) -> None:
        self.streams = streams
        self.follower = follower
        self.teller = teller
        self.address = address
        self.session = session
        self.metrics = metrics

    def sample(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)

    @asynccontextmanager
    async def dial(self, path: str = TICKER) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        async with self.session.ws_connect(self.address + path, compress=15) as stream:
            await eventually(lambda: self.reader(stream))
            await flushed(self.follower._bus.nc)  # now the server knows as well
            yield stream

    def reader(self, stream: aiohttp.ClientWebSocketResponse) -> Reader | None:
        """What the bridge has of a stream."""
        for readers in self.streams._readers.values():
            for reader in readers:
                transport = reader._request.transport
                if transport is not None and transport.get_extra_info("peername") == stream.get_extra_info("sockname"):
                    return reader
        return None

    async def fresh(self, value: bytes, symbol: str = "BTC_USDT") -> None:
        """Tell a value that the follower then knows and proves, whether or not anybody listens."""
        key = ("paper", "ticker", symbol)
        await self.follower.follow(key)
        await flushed(self.follower._bus.nc)
        await self.teller.tell(value, symbol)
        await eventually(lambda: self.follower.find(key) == value)


@asynccontextmanager
async def rigged(state: Path, ages: dict[str, float] = AGES, unused_s: float = 60.0) -> AsyncIterator[Rig]:
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        await enter(servers.nats(state))
        teller = await enter(telling(state))
        bus = await enter(connected(server.url(state, "bridge"), "bridge", closed=lambda: None))
        heard = await enter(fleet.followed(bus))
        follower = await enter(following(bus, ages, unused_s=unused_s, told=lambda entry: one.told(entry)))
        routes = Routes({"Mine": "paper"}, {"okx"}, lambda: {"paper"}, lambda: True)
        one = await enter(pushing(follower, routes, heard, metrics))
        loop = asyncio.get_running_loop()
        http = web.Server(one.handle, request_factory=partial(web.BaseRequest, loop=loop, client_max_size=1024), access_log=None)
        listener = await loop.create_server(http, "127.0.0.1", 0)
        stack.push_async_callback(http.shutdown, 1)
        stack.callback(listener.close)
        session = await enter(aiohttp.ClientSession())
        await eventually(lambda: heard.alive() and heard.settled)
        yield Rig(one, follower, teller, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", session, metrics)


async def text(stream: aiohttp.ClientWebSocketResponse, within_s: float = 5) -> str:
    message = await stream.receive(within_s)
    assert message.type is aiohttp.WSMsgType.TEXT, message
    return str(message.data)


class Slow:
    """A reader whose system takes as little as it can, by hand; it reads when it is told to."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    @asynccontextmanager
    async def dial(cls, address: str, path: str) -> AsyncIterator["Slow"]:
        one = cls()
        one.reader, one.writer = await one.connect(address)
        key = base64.b64encode(b"0123456789abcdef")
        one.writer.write(
            b"GET %b HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: %b\r\n\r\n" % (path.encode(), key)
        )
        assert b" 101 " in await one.reader.readuntil(b"\r\n\r\n")
        try:
            yield one
        finally:
            one.writer.close()

    async def connect(self, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        taker = socket.socket()
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        taker.setblocking(False)  # noqa: FBT003 - the socket module's own signature
        host, port = address.removeprefix("http://").split(":")
        await asyncio.get_running_loop().sock_connect(taker, (host, int(port)))
        return await asyncio.open_connection(sock=taker, limit=1024)

    def send(self, kind: int, content: bytes) -> None:
        """One masked frame of a client; the mask is of zeros."""
        size = bytes([0x80 | len(content)]) if len(content) < 126 else b"\xfe" + len(content).to_bytes(2, "big")
        self.writer.write(bytes([0x80 | kind]) + size + bytes(4) + content)

    async def frame(self, within_s: float = 5) -> tuple[int, bytes]:
        """-> (kind, content) of the next frame."""
        async with asyncio.timeout(within_s):
            kind, size = await self.reader.readexactly(2)
            if size > 125:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
            return kind & 0xF, await self.reader.readexactly(size)
