"""An HTTP exchange of the tests' own, and the venue that speaks to it: it holds what it got until a test lets go, and notes all of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

from aiohttp import web
from msgspec import Struct

from bus import config
from bus.messages import Market, Placed, Ticker, Trade, number, plain
from workers.http import Call


class Arrival(Struct, frozen=True):
    """One request. at_s: monotonic, this machine's. signed_ms: the time its worker signed it with."""

    kind: str
    tag: str
    client_order_id: str
    signed_ms: int
    at_s: float


class Exchange:
    """arrivals: every request, in order. settings: what a system needs in its configuration to serve it as /held."""

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.settings: dict[str, object] = {}
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        """Answer nothing from now on."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def tags(self, kind: str) -> list[str]:
        return [arrival.tag for arrival in self.arrivals if arrival.kind == kind]

    async def handle(self, request: web.Request) -> web.Response:
        kind, query = request.path.strip("/"), request.query
        self.arrivals.append(Arrival(kind, query["tag"], query["client_order_id"], int(query["signed_ms"]), time.monotonic()))
        await self._open.wait()
        return web.json_response({"tag": query["tag"]})


class Held:
    """The venue of /held. A ticker's `last` is the number in its symbol, an order's id is its amount: each answer tells its question."""

    public = frozenset({"ticker"})
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, name: str, settings: config.Venue) -> None:
        self._base = settings.base_url

    async def _send(self, call: Call, verb: str, kind: str, tag: str) -> Any:
        query = f"tag={tag}&client_order_id={call.client_order_id}&signed_ms={call.now_ms()}"
        return (await call.send(verb, f"{self._base}/{kind}?{query}")).json()

    async def ticker(self, call: Call, params: Market) -> Ticker:
        reply = await self._send(call, "GET", "ticker", params.symbol.partition("_")[0])
        nothing = Decimal(0)
        return Ticker(time_ms=0, buy=nothing, sell=nothing, last=number(reply["tag"]), high=nothing, low=nothing, vol=nothing)

    async def trade(self, call: Call, params: Trade) -> Placed:
        return Placed(int((await self._send(call, "POST", "order", plain(params.amount)))["tag"]))


@asynccontextmanager
async def exchanging() -> AsyncIterator[Exchange]:
    """The exchange, on a free port; lets everything go at the end."""
    exchange = Exchange()
    app = web.Application()
    app.add_routes([web.get("/ticker", exchange.handle), web.post("/order", exchange.handle)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        exchange.settings = {"venues__held__class": "tests.held:Held", "venues__held__base_url": address}
        yield exchange
    finally:
        exchange.release()
        await runner.cleanup()
