"""A stand-in exchange, a process beside: real HTTP and WebSockets, as many updates a second as asked for, each with its moment of sending.

What is sent next goes through all subscribed channels in turn. A ticker has the moment of sending as its volume, a book as the amount of
its best ask: time.monotonic_ns(), one clock for all processes of a machine. Everything else about a market stands still.
"""

import argparse
import asyncio
import signal
import time
from collections.abc import Iterator

import msgspec
import uvloop
from aiohttp import web
from msgspec import Struct, field

from bus.lifecycle import running

LEVELS = 20
"""Of each side of a book."""
BEST = 1000
TICK_S = 0.001
LATE_S = 0.25
"""A schedule that was held up for longer begins anew: what could not be sent in time is not sent all at once."""
FINAL, TEXT = 0x80, 0x01
LARGEST_SHORT = 125
STEADY = '"bid":"999.5","ask":"1000.5","last":"1000","open":"990","high":"1010","low":"980"'
Channel = tuple[str, str]
"""(kind, symbol); kind is "ticker" or "depth"."""


class Told(Struct, frozen=True, kw_only=True):
    """What the exchange says of itself. sent: updates so far; late: how many the schedule lost; order: in which channels are sent; last:
    "ticker.S0000_USDT" -> its newest moment of sending, ns; unsent: bytes that wait because nobody reads them; asked: REST reads."""

    sent: int
    late: int
    order: list[Channel]
    last: dict[str, int]
    unsent: int
    asked: int


class Asked(Struct):
    """A frame of a subscriber."""

    op: str
    channels: list[Channel]


class Market(Struct):
    """One channel. at_ns: when its newest value was sent; sequence: of a book."""

    kind: str
    symbol: str
    at_ns: int
    sequence: int = 1

    def frame(self, *, whole: bool = False) -> bytes:
        """The next update; whole: what a new subscriber or a REST read gets, without a change."""
        if not whole:
            self.at_ns = time.monotonic_ns()
        head = f'"symbol":"{self.symbol}","time":{time.time_ns() // 1_000_000}'
        if self.kind == "ticker":
            return f'{{"channel":"ticker",{head},{STEADY},"volume":"{self.at_ns}"}}'.encode()
        if whole:
            asks = ",".join(f'["{BEST + n}","{self.at_ns if n == 0 else n}"]' for n in range(LEVELS))
            bids = ",".join(f'["{BEST - 1 - n}","{n + 1}"]' for n in range(LEVELS))
            return f'{{"channel":"snapshot",{head},"sequence":{self.sequence},"asks":[{asks}],"bids":[{bids}]}}'.encode()
        self.sequence += 1
        numbers = f'"previous":{self.sequence - 1},"sequence":{self.sequence}'
        return f'{{"channel":"delta",{head},{numbers},"asks":[["{BEST}","{self.at_ns}"]],"bids":[]}}'.encode()


def text_frame(payload: bytes) -> bytes:
    """A server's WebSocket frame, RFC 6455: unmasked, whole."""
    if len(payload) <= LARGEST_SHORT:
        return bytes((FINAL | TEXT, len(payload))) + payload
    return bytes((FINAL | TEXT, 126)) + len(payload).to_bytes(2, "big") + payload


class Exchange(Struct):
    """Every process that subscribes gets its own connection; a channel is sent to the one that asked last."""

    rate: float = 0.0
    sent: int = 0
    late: int = 0
    asked: int = 0
    markets: dict[Channel, Market] = field(default_factory=dict)
    readers: dict[Channel, asyncio.Transport] = field(default_factory=dict)

    def market(self, kind: str, symbol: str) -> Market:
        return self.markets.setdefault((kind, symbol), Market(kind, symbol, time.monotonic_ns()))

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        match request.path:
            case "/ws":
                return await self._subscriber(request)
            case "/time":
                return web.Response(body=b"%d" % (time.time_ns() // 1_000_000))
            case "/flow":
                self.rate = float(request.query["rate"])
                return web.Response()
            case "/told":
                return web.Response(body=msgspec.json.encode(self.told()))
            case path:
                self.asked += 1
                return web.Response(body=self.market(path[1:], request.query["symbol"]).frame(whole=True))

    def told(self) -> Told:
        return Told(
            sent=self.sent,
            late=self.late,
            order=list(self.readers),
            last={".".join(channel): self.markets[channel].at_ns for channel in self.readers},
            unsent=sum(one.get_write_buffer_size() for one in set(self.readers.values())),
            asked=self.asked,
        )

    async def _subscriber(self, request: web.BaseRequest) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        transport = request.transport
        assert transport is not None
        try:
            async for message in socket:
                asked = msgspec.json.decode(message.data, type=Asked)
                for kind, symbol in asked.channels:
                    if asked.op == "subscribe":
                        transport.write(text_frame(self.market(kind, symbol).frame(whole=True)))
                        self.readers[kind, symbol] = transport
                    else:
                        self.readers.pop((kind, symbol), None)
        finally:
            self.readers = {channel: reader for channel, reader in self.readers.items() if reader is not transport}
        return socket

    def _turns(self) -> Iterator[tuple[Market, asyncio.Transport]]:
        while True:
            for channel, reader in list(self.readers.items()):
                yield self.markets[channel], reader

    async def flow(self) -> None:
        """Send on schedule, whether it is read or not: as much as is due goes out in one write a connection."""
        turns, count, readers = self._turns(), 0, 0
        began_s, rate = time.monotonic(), 0.0
        while True:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            if (rate, readers) != (self.rate, len(self.readers)):
                turns, count, began_s, rate, readers = self._turns(), 0, now_s, self.rate, len(self.readers)
            due = int((now_s - began_s) * rate) - count if readers else 0
            if due > rate * LATE_S:
                self.late += due
                count += due
                continue
            batches: dict[asyncio.Transport, list[bytes]] = {}
            for _ in range(due):
                market, reader = next(turns)
                batches.setdefault(reader, []).append(text_frame(market.frame()))
            for reader, frames in batches.items():
                reader.write(b"".join(frames))
            count += due
            self.sent += due


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.bench.exchange", description=__doc__).parse_args()

    async def run() -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stopping.set)
        exchange = Exchange()
        server = web.Server(exchange.serve, access_log=None)
        listener = await loop.create_server(server, "127.0.0.1", 0, backlog=1024)
        async with running(exchange.flow()):
            print(f"ready http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", flush=True)
            await stopping.wait()
        listener.close()
        await server.shutdown(1)

    uvloop.run(run())


if __name__ == "__main__":
    main()
