"""workers/audits.py: a market that says nothing is proven by REST, within a budget; one whose socket has died is found out."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from bus import config, market, server, subjects
from bus.connection import Bus, connected
from bus.errors import VenueRejected
from bus.follow import Follower, following
from bus.lifecycle import running
from bus.messages import Depth, Level, Market, Ticker, number
from bus.metrics import FeedMetrics, Metrics
from tests import servers
from workers import audits, http, lines
from workers.audits import Audits
from workers.desk import Desk
from workers.http import Call
from workers.updates import BookSnapshot, Channel, Quote, Update

pytestmark = pytest.mark.slow

AGES = {"ticker": 2.0, "depth": 2.0, "trades": 2.0, "candles": 2.0}


class Exchange:
    """Its markets stand still. last: what it answers by REST; a socket tells what was true when it was subscribed to, and no more.

    time: the document of its clock. open: while it is not set REST answers nothing."""

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        self.subscribed: Counter[str] = Counter()
        self.status = 200
        self.time: object = {"time": 1}
        self.open = asyncio.Event()
        self.open.set()

    def document(self, symbol: str) -> dict[str, object]:
        last = self.last[symbol]
        return {"symbol": symbol, "last": last, "asks": [[last + 1, 5]], "bids": [[last - 1, 7]]}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        kind = request.rel_url.path.strip("/")
        if kind == "ws":
            return await self._serve(request)
        self.asked[kind] += 1
        await self.open.wait()
        if kind == "time":
            return web.json_response(self.time)
        symbol = request.rel_url.query["symbol"]
        if symbol not in self.last:
            return web.Response(status=400)
        return web.json_response(self.document(symbol), status=self.status)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            for kind, symbol in msgspec.json.decode(message.data):
                self.subscribed[symbol] += 1
                await socket.send_json({"kind": kind} | self.document(symbol))
        return socket


class Quiet:
    """Its venue and feed."""

    feeds: ClassVar = frozenset({"ticker", "depth"})
    per_socket: ClassVar = 100
    requests_per_s: ClassVar = 100.0
    keepalive: ClassVar = ""

    def __init__(self, base: str) -> None:
        self._base = base

    async def _get(self, call: Call, kind: str, symbol: str) -> dict[str, list[list[int]]]:
        answer = await call.send("GET", f"{self._base}/{kind}?symbol={symbol}")
        if answer.status == 400:
            raise VenueRejected("no such market")
        return answer.json()  # type: ignore[no-any-return]

    async def ticker(self, call: Call, params: Market) -> Ticker:
        return ticker(await self._get(call, "ticker", params.symbol))

    async def depth(self, call: Call, params: Market) -> Depth:
        row = await self._get(call, "depth", params.symbol)
        return Depth(time_ms=1, asks=levels(row["asks"]), bids=levels(row["bids"]))

    def socket_url(self) -> str:
        return self._base.replace("http", "ws") + "/ws"

    def channel(self, kind: str, symbol: str, period_m: int) -> Channel:
        return Channel(kind, symbol)

    def subscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return [msgspec.json.encode([(channel.kind, channel.instrument) for channel in channels]).decode()]

    def unsubscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return []

    def parse(self, frame: bytes) -> Sequence[Update]:
        row = msgspec.json.decode(frame)
        channel = Channel(row["kind"], row["symbol"])
        if row["kind"] == "ticker":
            return [Quote(channel=channel, ticker=ticker(row))]
        return [BookSnapshot(channel=channel, asks=levels(row["asks"]), bids=levels(row["bids"]))]

    def checksum(self, bids: Sequence[Level], asks: Sequence[Level]) -> int | None:
        return None


class Ticking(Quiet):
    """It has a clock, and believes whatever document says what it shows."""

    async def time_ms(self, call: Call) -> int:
        return int((await call.send("GET", f"{self._base}/time")).json()["time"])


def ticker(row: dict[str, list[list[int]]]) -> Ticker:
    last = number(row["last"])
    return Ticker(time_ms=1, buy=last, sell=last, last=last, high=last, low=last, vol=Decimal(1))


def levels(rows: list[list[int]]) -> list[Level]:
    return [(number(price), number(amount)) for price, amount in rows]


class Stage:
    """desks: one by default; desk is the first of them."""

    def __init__(self, exchange: Exchange, desks: list[Desk], follower: Follower, bridge: Bus, registry: CollectorRegistry) -> None:
        self.exchange, self.desks, self.follower, self.bridge = exchange, desks, follower, bridge
        self.desk = desks[0]
        self._registry = registry

    def counted(self, result: str) -> float:
        """Of the first desk."""
        return self._registry.get_sample_value("fmzbus_feed_audits_total", {"exchange": "quiet", "result": result}) or 0.0

    def last(self, symbol: str) -> int | None:
        """What the follower would answer."""
        found = self.follower.find(("quiet", "ticker", symbol))
        return msgspec.json.decode(found)["data"]["last"] if found else None

    async def stays(self, symbol: str, last: int, for_s: float) -> None:
        """It is answered all the time."""
        until_s = time.monotonic() + for_s
        with pytest.raises(TimeoutError):
            await servers.eventually(lambda: self.last(symbol) != last, until_s - time.monotonic())


@asynccontextmanager
async def audited(state: Path, venue: Quiet, settings: config.Market, per_s: float, metrics: Metrics) -> AsyncIterator[Desk]:
    """A desk with a connection of its own, and its audits."""
    counted = FeedMetrics(metrics.registry)
    async with (
        connected(server.url(state, "feeder"), "feeder", closed=lambda: None) as bus,
        lines.session() as session,
        http.opened({}, 5.0, metrics) as calls,
    ):
        desk = Desk(bus, "quiet", venue, settings, session=session, metrics=counted)
        made = Audits(bus, desk, venue, calls, per_s=per_s, max_age_s=AGES, timeout_s=5.0, metrics=counted)  # type: ignore[arg-type]
        async with desk.open(), running(made.run()):
            yield desk


@asynccontextmanager
async def staged(
    state: Path, *, per_s: float, kind: Any = Quiet, desks: int = 1, clock: object = None, **last: int
) -> AsyncIterator[Stage]:
    """desks: feeders that share the exchange, a shard each. clock: the document of its clock."""
    exchange, metrics = Exchange(), [Metrics() for _ in range(desks)]
    exchange.time = clock
    exchange.last.update(last)
    settings = config.Market(shards=desks, audits_per_s=per_s)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        await enter(servers.nats(state))
        runner = web.ServerRunner(web.Server(exchange.handle), shutdown_timeout=0.1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        venue = kind(f"http://127.0.0.1:{runner.addresses[0][1]}")
        several = [await enter(audited(state, venue, settings, per_s, metrics[number])) for number in range(desks)]
        reader = await enter(connected(server.url(state, "bridge"), "bridge", closed=lambda: None))
        follower = await enter(following(reader, AGES))
        for symbol in last:
            await follower.follow(("quiet", "ticker", symbol))
        yield Stage(exchange, several, follower, reader, metrics[0].registry)


async def test_a_quiet_market_is_answered_for_as_long_as_audits_prove_it(state: Path) -> None:
    async with staged(state, per_s=5, A_USDT=100) as stage:
        await servers.eventually(lambda: stage.last("A_USDT") == 100)
        await stage.stays("A_USDT", 100, 4)
        assert stage.counted("equal") >= 3
        assert stage.exchange.subscribed["A_USDT"] == 1


async def test_without_a_budget_a_quiet_market_is_a_miss(state: Path) -> None:
    async with staged(state, per_s=0, A_USDT=100) as stage:
        await servers.eventually(lambda: stage.last("A_USDT") == 100)
        await servers.eventually(lambda: stage.last("A_USDT") is None, 4)
        assert stage.exchange.asked == {}


async def test_the_budget_is_kept_and_what_it_cannot_prove_is_a_miss(state: Path) -> None:
    symbols = {f"{letter}_USDT": 100 for letter in "ABCDEFGH"}
    async with staged(state, per_s=2, **symbols) as stage:
        await servers.eventually(lambda: all(stage.last(symbol) for symbol in symbols))
        began_s, before = time.monotonic(), stage.exchange.asked["ticker"]
        seen = []

        def look() -> bool:
            seen.append(sum(stage.last(symbol) is not None for symbol in symbols))
            return time.monotonic() - began_s > 6

        await servers.eventually(look)
        assert stage.exchange.asked["ticker"] - before <= 2 * (time.monotonic() - began_s) + 1
        assert max(seen[len(seen) // 2 :]) <= 5  # two calls a second prove four markets for two seconds, and one more is on its way


async def test_a_socket_that_says_nothing_of_a_change_is_found_out(state: Path) -> None:
    async with staged(state, per_s=5, A_USDT=100) as stage:
        await servers.eventually(lambda: stage.last("A_USDT") == 100)
        stage.exchange.last["A_USDT"] = 200
        await servers.eventually(lambda: stage.last("A_USDT") == 200)
        assert stage.exchange.subscribed["A_USDT"] == 2
        assert stage.counted("different") == 2


async def test_an_exchange_that_is_asked_too_much_is_left_alone(state: Path) -> None:
    async with staged(state, per_s=20, A_USDT=100) as stage:
        await servers.eventually(lambda: stage.last("A_USDT") == 100)
        stage.exchange.status = 429
        await servers.eventually(lambda: stage.counted("limited") == 1)
        asked = stage.exchange.asked["ticker"]
        await servers.eventually(lambda: stage.last("A_USDT") is None, 4)
        assert stage.exchange.asked["ticker"] == asked


async def test_a_listeners_market_is_fed_once_the_exchange_has_answered_for_it(state: Path) -> None:
    async with staged(state, per_s=20, A_USDT=100) as stage:
        stage.exchange.last["B_USDT"] = 300
        pairs = {("ticker", "B_USDT"), ("ticker", "NO_SUCH")}
        stage.desk.listened(pairs)
        await servers.eventually(lambda: stage.desk.wishes.exists(("ticker", "B_USDT")))
        stage.desk.listened(pairs)
        await servers.eventually(lambda: stage.exchange.subscribed["B_USDT"] == 1)
        assert stage.exchange.subscribed["NO_SUCH"] == 0
        assert stage.desk.wishes.barred(("ticker", "NO_SUCH"), time.monotonic())
        stage.desk.listened(set())
        await servers.eventually(lambda: len(stage.desk.sources) == 1)


async def test_a_market_that_a_follower_does_not_know_is_asked_for_first(state: Path) -> None:
    async with staged(state, per_s=20, A_USDT=100) as stage:
        stage.exchange.last["B_USDT"] = 300
        await stage.follower.follow(("quiet", "ticker", "B_USDT"), known=False)
        await stage.follower.follow(("quiet", "ticker", "NO_SUCH"), known=False)
        await servers.eventually(lambda: stage.last("B_USDT") == 300)
        assert stage.exchange.asked["ticker"] >= 2
        assert stage.exchange.subscribed["NO_SUCH"] == 0


@pytest.mark.parametrize("document", [{}, None, {"time": "soon"}], ids=str)
async def test_a_clock_that_answers_nonsense_is_an_error_and_the_others_are_audited(
    state: Path, monkeypatch: pytest.MonkeyPatch, document: object
) -> None:
    monkeypatch.setattr(audits, "CLOCK_S", 0.5)
    async with staged(state, per_s=20, kind=Ticking, clock=document, A_USDT=100) as stage:
        await servers.eventually(lambda: stage.counted("error") >= 2 and stage.counted("equal") >= 1)
        assert stage.last("A_USDT") == 100
        assert not stage.desk.lag.calibrated(market.clock())
        stage.exchange.time = {"time": 1_700_000_000_000}
        await servers.eventually(lambda: stage.desk.lag.calibrated(market.clock()))


async def test_desks_that_share_an_exchange_share_its_budget(state: Path) -> None:
    symbols = {f"{letter}_USDT": 100 for letter in "ABCDEFGHIJKLMNOP"}
    async with staged(state, per_s=4, desks=2, **symbols) as stage:
        first, second = stage.desks
        await servers.eventually(lambda: first.part_of_exchange == second.part_of_exchange == 0.5, 20)
        assert first.presence.provable == second.presence.provable == int(4 * 0.5 * config.Market().max_age_s.ticker)
        await servers.eventually(lambda: min(len(one.sources) for one in stage.desks) > 3)
        await servers.eventually(lambda: sum(source.known for one in stage.desks for source in one.sources.values()) == len(symbols))
        began_s, before = time.monotonic(), stage.exchange.asked["ticker"]
        await servers.eventually(lambda: time.monotonic() - began_s > 4)
        calls = stage.exchange.asked["ticker"] - before
        assert 10 <= calls <= 4 * (time.monotonic() - began_s) + 2


async def test_a_desk_that_feeds_nothing_of_an_exchange_asks_it_nothing(state: Path) -> None:
    """It stands by: the one that feeds it all has the whole budget."""
    async with staged(state, per_s=20, kind=Ticking, clock={"time": 1_700_000_000_000}) as stage:
        await servers.eventually(lambda: stage.desk.part_of_exchange == 1)
        await servers.eventually(lambda: stage.exchange.asked["time"] == 1)
        venue = Ticking(stage.desk.lines._feed._base)  # type: ignore[attr-defined]
        async with audited(state, venue, config.Market(audits_per_s=20), 20, Metrics()) as standby:
            with pytest.raises(TimeoutError):
                await servers.eventually(lambda: stage.exchange.asked["time"] > 1, 2)
            assert standby.part_of_exchange == 0


async def test_what_was_left_while_its_audit_was_on_the_way_is_not_touched(state: Path) -> None:
    async with staged(state, per_s=5, A_USDT=100) as stage:
        key = ("quiet", "ticker", "A_USDT")
        await servers.eventually(lambda: stage.last("A_USDT") == 100)
        stage.exchange.open.clear()
        await servers.grows(lambda: stage.exchange.asked["ticker"], 1)
        (left,) = stage.desk.sources.values()
        proven_s, counts = left.proven_s, [stage.counted(result) for result in ("equal", "different", "overtaken")]
        await stage.follower.leave(key)
        wish = market.encode(market.Wish(follower=stage.bridge.process, whole=True))
        await stage.bridge.nc.publish(subjects.wish("quiet"), wish)
        await servers.eventually(lambda: not stage.desk.sources)
        stage.exchange.last["A_USDT"] = 200
        await stage.follower.follow(key)
        await servers.eventually(lambda: stage.last("A_USDT") == 200)
        asked = stage.exchange.asked["ticker"]
        stage.exchange.open.set()
        await servers.eventually(lambda: stage.exchange.asked["ticker"] > asked)  # the audit before it has ended
        assert (left.strikes, left.proven_s) == (0, proven_s)
        await servers.eventually(lambda: stage.counted("equal") == counts[0] + 1)  # of the new one
        assert [stage.counted(result) for result in ("different", "overtaken")] == counts[1:]
        assert (stage.last("A_USDT"), stage.exchange.subscribed["A_USDT"]) == (200, 2)
