"""The paper exchange in this process, and all that was ever true of its markets: each state from the moment at which it could be told.

One clock, this process' monotonic one, times both what was true and what hosts were answered, so nothing is left to granularity. A
trader keeps the books in motion between the seconds.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import aiohttp
from aiohttp import web

from bus.lifecycle import running
from tests.freshness.verdict import LEVELS, Spans, Value
from tests.paper import Client
from workers.venues.paper import quotes, schema
from workers.venues.paper.engine import Engine
from workers.venues.paper.faults import Faults, Wanted
from workers.venues.paper.history import History
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.quotes import View
from workers.venues.paper.server import Exchange
from workers.venues.paper.store import Store, database

SYMBOLS = ("BTC_USDT", "ETH_USDT", "BTC_USDT.swap")
STEP_MS = 100
"""How often the market's own book changes some of its sizes."""
NO_LIMIT = 10**9
ORDERS_A_S = 12
"""Of the trader, in each market; as many are cancelled."""
KEPT = 4
"""Orders that rest inside each book."""


class Moment(NamedTuple):
    """A book from at_s on, in ticks and lots, best first."""

    at_s: float
    second: int
    ask: int
    bid: int
    asks: list[tuple[int, int]]
    bids: list[tuple[int, int]]


class Truth(History):
    """The exchange's history, which besides keeps every single state, also two of one millisecond."""

    def __init__(self, seed: int, *, since_ms: int) -> None:
        super().__init__(seed, step_ms=STEP_MS, since_ms=since_ms)
        self.seed = seed
        self.moments: dict[str, list[Moment]] = {symbol: [] for symbol in MARKETS}

    def note(self, view: View) -> None:
        """Called with a book that has just changed, before anybody is told."""
        super().note(view)
        ask, bid = view.best
        moment = Moment(time.monotonic(), view.book.second, ask, bid, view.asks[:LEVELS], view.bids[:LEVELS])
        self.moments[view.symbol].append(moment)

    def forget(self, before_s: float) -> None:
        """What ended before that."""
        for moments in self.moments.values():
            after = next((place for place, moment in enumerate(moments) if moment.at_s >= before_s), len(moments))
            del moments[: max(0, after - 1)]

    def spans(self, kind: str, symbol: str) -> dict[Value, Spans]:
        """When each value of a market was true: [since, until) in monotonic seconds, the last one still is."""
        found: defaultdict[Value, Spans] = defaultdict(list)
        moments = self.moments[symbol]
        ends = [moment.at_s for moment in moments[1:]] + [float("inf")]
        for moment, until_s in zip(moments, ends, strict=True):
            if kind == "ticker":
                value: Value = _ticker(self.seed, symbol, moment.second, moment.ask, moment.bid)
            else:
                value = (_levels(symbol, moment.asks), _levels(symbol, moment.bids))
            spans = found[value]
            if spans and spans[-1][1] == moment.at_s:
                spans[-1] = (spans[-1][0], until_s)
            else:
                spans.append((moment.at_s, until_s))
        return found


@lru_cache(maxsize=1 << 16)
def _price(symbol: str, ticks: int) -> Decimal:
    return Decimal(MARKETS[symbol].price_text(ticks))


@lru_cache(maxsize=1 << 16)
def _amount(symbol: str, lots: int) -> Decimal:
    return Decimal(MARKETS[symbol].amount_text(lots))


def _levels(symbol: str, rows: list[tuple[int, int]]) -> Value:
    return tuple((_price(symbol, ticks), _amount(symbol, lots)) for ticks, lots in rows)


@lru_cache(maxsize=1 << 12)
def _ticker(seed: int, symbol: str, second: int, ask: int, bid: int) -> Value:
    row = quotes.ticker_of(seed, symbol, second, ask=ask, bid=bid, time_ms=0)
    return tuple(Decimal(str(row[name])) for name in ("bid", "ask", "last", "high", "low", "open", "volume"))


class Market:
    """The exchange while it runs. base: its address. ahead_s: by how much its clock differs from this machine's."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.ahead_s = 0.0
        self.base = ""
        self.faults = Faults(self.clock, seed)
        self.truth = Truth(seed, since_ms=int(self.clock() * 1000))

    def clock(self) -> float:
        return time.time() + self.ahead_s

    def arm(self, **fault: object) -> None:
        self.faults.arm(Wanted(**fault))  # type: ignore[arg-type]

    def struck(self, kind: str) -> int:
        """How often those of a kind that are armed have struck."""
        return sum(one.struck for one in self.faults.armed() if one.kind == kind)


@asynccontextmanager
async def exchange(state: Path, seed: int) -> AsyncIterator[Market]:
    """An exchange as workers.venues.paper.server runs it, but with a history that this process can read, and a trader on it."""
    market = Market(seed)
    with database(state) as db:
        engine = Engine(seed, step_ms=STEP_MS)
        holders, store = schema.restore(db, engine), Store(db)
        made = Exchange(engine=engine, store=store, holders=holders, clock=market.clock, limit=NO_LIMIT, faults=market.faults)
        made.history = made.sockets._history = market.truth
        runner = web.ServerRunner(web.Server(made.handle, access_log=None), shutdown_timeout=1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            market.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with aiohttp.ClientSession() as session, running(made.tick(), store.broken()):
                client = Client(session, market.base, market.clock)
                await _open(client)
                async with running(*(_trade(client, market, symbol) for symbol in SYMBOLS)):
                    yield market
                made.sockets.close()
                await runner.cleanup()
        finally:
            await runner.cleanup()
            await store.close()


async def _open(client: Client) -> None:
    """An order in each market that never fills: while one rests the exchange follows the market at every step, asked or not."""
    for symbol in SYMBOLS:
        ticker = await client.get(f"/api/v1/ticker?symbol={symbol}", signed=False)
        price = Decimal(ticker["bid"]) // 2
        await client.order(symbol, "buy", type="limit", price=str(price), amount="0.01")


async def _trade(client: Client, market: Market, symbol: str) -> None:
    """Small orders at the best prices and a little deeper, cancelled again, for ever."""
    rng = random.Random(f"{market.seed}-{symbol}")
    resting: list[str] = []
    listed, swap = MARKETS[symbol], symbol.endswith(".swap")
    while True:
        await asyncio.sleep(rng.uniform(0.5, 1.5) / ORDERS_A_S)
        now = market.truth.moments[symbol][-1]
        side = rng.choice(("buy", "sell"))
        away = rng.choice((-1, 0, 0, 1, 3, 8))
        # At most as good as the best of its own side, or between the two best where there is room: it rests.
        ticks = max(now.bid, now.ask - 1) if side == "sell" else min(now.ask, now.bid + 1)
        ticks += away + 1 if side == "sell" else -away - 1
        amount = listed.amount_text(rng.randint(10, 500) * (1 if swap else 100))
        fields = {"type": "limit", "price": listed.price_text(ticks), "amount": amount} | ({"offset": "open"} if swap else {})
        with suppress(aiohttp.ClientError):  # the exchange ends
            _, order = await client("POST", "/api/v1/orders", {"symbol": symbol, "side": side} | fields)
            if "id" in order:
                resting.append(order["id"])
            if len(resting) > KEPT:
                await client("DELETE", f"/api/v1/orders/{resting.pop(0)}")
