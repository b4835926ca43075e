"""workers/desk.py: a feeder's desk between a real exchange's sockets and a real bus, seen by a follower."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.msg import Msg
from prometheus_client import CollectorRegistry

from bus import config, market, server, subjects
from bus.connection import MAX_PENDING, Bus, connected
from bus.follow import Follower, Key, following
from bus.metrics import FeedMetrics
from tests import paper, servers
from tests.rig import Rig
from tests.test_lines_many import MANY, OneByOne, feeding
from tests.tiny import Exchange, served
from workers import lines
from workers.desk import Desk
from workers.updates import Channel
from workers.venues.paper.client import Paper

pytestmark = pytest.mark.slow

TICKER, DEPTH = ("paper", "ticker", "BTC_USDT"), ("paper", "depth", "BTC_USDT")
AGES = {"ticker": 5.0, "depth": 5.0, "trades": 5.0, "candles": 5.0}


class Feeder:
    """One desk with a connection of its own."""

    def __init__(self, bus: Bus, desk: Desk, registry: CollectorRegistry) -> None:
        self.bus = bus
        self.desk = desk
        self.registry = registry

    def counted(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"exchange": "paper"} | labels) or 0.0


@asynccontextmanager
async def feeder(state: Path, base_url: str, settings: config.Market | None = None) -> AsyncIterator[Feeder]:
    venue = Paper("paper", config.Venue(base_url=base_url))
    registry = CollectorRegistry()
    async with (
        connected(server.url(state, "feeder"), "feeder", closed=lambda: None) as bus,
        lines.session() as session,
    ):
        desk = Desk(bus, "paper", venue, settings or config.Market(), session=session, metrics=FeedMetrics(registry))
        async with desk.open():
            yield Feeder(bus, desk, registry)


@asynccontextmanager
async def follower(state: Path, **options: Any) -> AsyncIterator[Follower]:
    async with (
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus,
        following(bus, AGES, **options) as one,
    ):
        yield one


class Stage:
    """A bus and an exchange that moves ten times a second. rig: to look at it and to arm faults."""

    def __init__(self, state: Path, rig: Rig) -> None:
        self.state = state
        self.rig = rig

    def feeder(self, settings: config.Market | None = None) -> Any:
        return feeder(self.state, self.rig.client.base, settings)

    def follower(self, **options: Any) -> Any:
        return follower(self.state, **options)


@pytest.fixture
async def stage(state: Path, tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(servers.nats(state))
        client = await stack.enter_async_context(paper.exchange(tmp_path / "paper", time.time, book_interval_s=0.1))
        yield Stage(state, Rig(client, paper.Clock(), tmp_path / "paper"))


async def fresh(one: Follower, key: Key, within_s: float = 5) -> Any:
    """What is told of a key, as soon as it is fresh."""
    await one.follow(key)
    await servers.eventually(lambda: one.find(key) is not None, within_s)
    return msgspec.json.decode(one.find(key) or b"")["data"]


async def changes(one: Follower, key: Key, count: int) -> None:
    """Wait until so many other values were told."""
    seen = {one.find(key)}

    def enough() -> bool:
        seen.add(one.find(key))
        return len(seen - {None}) > count

    await servers.eventually(enough, 10)


def never(condition: Callable[[], object], for_s: float) -> Any:
    """Watch that a condition does not come true."""

    async def watch() -> None:
        with pytest.raises(TimeoutError):
            await servers.eventually(condition, for_s)

    return watch()


async def test_what_is_wished_is_told_as_the_exchange_has_it(stage: Stage) -> None:
    async with stage.feeder(), stage.follower() as one:
        ticker, depth = await fresh(one, TICKER), await fresh(one, DEPTH)
        assert ticker["symbol"] == "BTC_USDT"
        assert len(depth["asks"]) == len(depth["bids"]) == 20
        await changes(one, DEPTH, 5)
        depth = msgspec.json.decode(one.find(DEPTH) or b"")["data"]
        history = await stage.rig.client.get(f"/api/v1/history/depth?symbol=BTC_USDT&time={depth['time']}", signed=False)
        for side in ("asks", "bids"):
            assert [tuple(map(float, level)) for level in depth[side]] == [tuple(map(float, level)) for level in history[side][:20]]


async def test_each_spelling_is_a_value_of_its_own_over_one_subscription(stage: Stage) -> None:
    async with stage.feeder() as feeding, stage.follower() as one:
        upper, lower = await fresh(one, TICKER), await fresh(one, ("paper", "ticker", "btc_usdt"))
        assert (upper.pop("symbol"), lower.pop("symbol")) == ("BTC_USDT", "btc_usdt")
        assert upper.keys() == lower.keys()
        assert len(feeding.desk.sources) == 1


async def test_trades_and_candles_are_told_as_well(stage: Stage) -> None:
    async with stage.feeder(), stage.follower() as one:
        trades = await fresh(one, ("paper", "trades", "BTC_USDT"))
        assert [row["time"] for row in trades] == sorted(row["time"] for row in trades)
        bars = await fresh(one, ("paper", "candles-5", "BTC_USDT"))
        assert all(start % 300 == 0 for start, *_ in bars)


async def test_what_nobody_wishes_any_more_is_left(stage: Stage) -> None:
    async with stage.feeder() as feeding, stage.follower(unused_s=1.0) as one:
        await fresh(one, TICKER)
        await servers.eventually(lambda: not one.entries, 5)
        await servers.eventually(lambda: not feeding.desk.sources, 5)


async def test_no_more_pairs_are_fed_than_allowed_and_the_rest_is_counted(stage: Stage) -> None:
    async with stage.feeder(config.Market(max_symbols=1)) as feeding, stage.follower() as one:
        await fresh(one, TICKER)
        await one.follow(DEPTH)
        await servers.eventually(lambda: feeding.counted("fmzbus_feed_refused_total") == 1)
        await never(lambda: one.find(DEPTH), 1)
        assert feeding.desk.presence.refused == 1


@pytest.mark.parametrize("fault", ["book-gap", "bad-checksum", "crossed-book", "socket-cut"])
async def test_a_value_that_cannot_be_trusted_is_withdrawn_and_comes_back(stage: Stage, fault: str) -> None:
    told: list[bytes] = []
    async with stage.feeder() as feeding, stage.follower(told=lambda entry: told.append(entry.content)) as one:
        await fresh(one, DEPTH)
        await stage.rig.arm(fault, count=1)
        await servers.eventually(lambda: any(content.startswith(b'{"error":"stale: ') for content in told))
        await fresh(one, DEPTH)
        await changes(one, DEPTH, 3)
        assert feeding.counted("fmzbus_feed_withdrawn_total") == 1


async def test_a_feeder_that_leaves_is_replaced_at_once(stage: Stage) -> None:
    async with stage.follower() as one:
        async with stage.feeder():
            await fresh(one, DEPTH)
            second = stage.feeder()
            standby = await second.__aenter__()
            await never(lambda: standby.desk.presence.shards, 1)
        try:
            left_s = time.monotonic()
            await fresh(one, DEPTH)
            assert time.monotonic() - left_s < 1.5
        finally:
            await second.__aexit__(None, None, None)


async def test_two_desks_with_several_shards_share_them(stage: Stage) -> None:
    many = config.Market(shards=4)
    async with stage.feeder(many) as first:
        await servers.eventually(lambda: len(first.desk.presence.shards) == 4)
        async with stage.feeder(many) as second, stage.follower() as one:
            await servers.eventually(lambda: len(second.desk.presence.shards) == 2, 20)
            await servers.eventually(lambda: len(first.desk.presence.shards) == 2)
            assert set(first.desk.presence.shards) | set(second.desk.presence.shards) == {0, 1, 2, 3}
            for symbol in ("BTC_USDT", "ETH_USDT", "LTC_USDT", "SOL_USDT", "BTC_USDT.swap"):
                assert (await fresh(one, ("paper", "ticker", symbol)))["symbol"] == symbol


async def test_a_market_that_does_not_exist_is_not_asked_for_again_and_again(stage: Stage) -> None:
    async with stage.feeder() as feeding, stage.follower() as one:
        await one.follow(("paper", "ticker", "NO_SUCH"))
        await servers.eventually(lambda: feeding.desk.wishes.barred(("ticker", "NO_SUCH"), time.monotonic()))
        await servers.eventually(lambda: not feeding.desk.sources)
        await fresh(one, TICKER)


async def test_a_plain_listener_reads_finished_replies(stage: Stage) -> None:
    heard: asyncio.Queue[Msg] = asyncio.Queue()
    async with (
        stage.feeder(),
        stage.follower() as one,
        connected(server.url(stage.state, "operator"), "operator", closed=lambda: None) as plain,
    ):
        await plain.nc.subscribe(subjects.feed(*TICKER), cb=heard.put)
        await fresh(one, TICKER)
        message = await asyncio.wait_for(heard.get(), 5)
        assert msgspec.json.decode(message.data).keys() == {"data"}
        assert market.Proof.read((message.headers or {})[market.HEADER]).shard == 0


# ---------------------------------------------------------------- a venue and a bus that make trouble


class Picky(OneByOne):
    """It knows its markets by a table."""

    def channel(self, kind: str, symbol: str, period_m: int) -> Channel:
        return {channel.instrument: channel for channel in MANY}[symbol]


async def test_a_symbol_that_a_venue_stumbles_over_is_barred_and_the_others_go_on(state: Path) -> None:
    async with served(Exchange(hello=1)) as exchange, feeding(state, Picky(exchange.url)) as (desk, one, _):
        for symbol, known in (("NO_SUCH", True), ("NONE_SUCH", False)):
            await one.follow(("tiny", "ticker", symbol), known=known)
            await servers.eventually(lambda symbol=symbol: desk.wishes.barred(("ticker", symbol), market.clock()))  # type: ignore[misc]
        assert (await fresh(one, ("tiny", "ticker", "M0_USDT")))["last"] == 1
        assert list(desk.sources) == [MANY[0]]
        assert exchange.rows("ask") == [(0, ["M0_USDT"])]


@pytest.mark.parametrize("waits", [True, False], ids=["nothing is told", "telling is held up in the middle"])
async def test_while_the_bus_takes_no_more_nothing_is_proven_that_was_not_told(state: Path, *, waits: bool) -> None:
    """nats-server stands still and its socket is full. Each market changes, and then says the same again, which proves the new value."""
    keys: list[Key] = [("tiny", "ticker", channel.instrument) for channel in MANY[:10]]
    async with served(Exchange(hello=1)) as exchange, feeding(state, OneByOne(exchange.url)) as (desk, one, nats):
        bus = desk._bus
        for key in keys:
            await fresh(one, key)
        sources, values = list(desk.sources.values()), [value for values in desk._values.values() for value in values]

        async def say(last: int) -> None:
            for _, __, symbol in keys:
                await exchange.tell(symbol, last)

        nats.send(signal.SIGSTOP)
        try:
            while bus.nc.pending_data_size < (MAX_PENDING if waits else MAX_PENDING / 2):
                await bus.nc.publish(subjects.feed("tiny", "ticker", "JUNK"), bytes(50_000))
                await asyncio.sleep(0)
            if not waits:
                bus.nc._max_pending_size = bus.nc.pending_data_size + 1000  # then nats-py itself lets a publisher wait
            before = {value.pair: (value.n, value.proven_s) for value in values}
            await say(2)
            await servers.eventually(lambda: all(source.known and b'"last":2' in source.content("") for source in sources))
            if not waits:  # the first ones are in nats-py's own buffer, in their order, before any beat that proves them
                await servers.eventually(lambda: any(value.n != before[value.pair][0] for value in values))
            untold = [value for value in values if value.n == before[value.pair][0]]
            assert len(untold) == len(keys) if waits else 0 < len(untold) < len(keys)
            proven_s = max(source.proven_s for source in sources)
            async with asyncio.timeout(3):
                while min(source.proven_s for source in sources) <= proven_s:
                    await say(2)
                    await asyncio.sleep(0.05)
            assert all((value.n, value.proven_s) == before[value.pair] for value in untold)
            assert (desk._teller.waits, bus.nc.is_connected) == (waits, True)
        finally:
            nats.send(signal.SIGCONT)
        for key in keys:
            await servers.eventually(lambda key=key: b'"last":2' in (one.find(key) or b""))  # type: ignore[misc]
        assert bus.nc.stats["reconnects"] == 0
