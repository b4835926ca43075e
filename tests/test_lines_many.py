"""More to say than an exchange lets a socket say at once: everything has its turn, and nothing is asked for that only waits for it."""

import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from bus import config, market, server
from bus.connection import connected
from bus.follow import Follower, following
from bus.messages import Ticker
from bus.metrics import FeedMetrics
from tests import servers
from tests.servers import eventually
from tests.tiny import Exchange, Tiny, reading, served
from workers import desk, lines
from workers.updates import Channel, Quote, Update

pytestmark = pytest.mark.slow

MANY = [Channel("ticker", f"M{i}_USDT") for i in range(100)]
PER_S = 20.0
LEAST_S = (len(MANY) / PER_S - 1) * lines.PACE_S
"""The first second's frames go at once."""


class OneByOne(Tiny):
    """A frame for each channel, and tickers."""

    requests_per_s = PER_S

    def subscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        return [json.dumps({"ask": [channel.instrument]}) for channel in channels]

    def parse(self, frame: bytes) -> Sequence[Update]:
        row = json.loads(frame)
        last = Decimal(row["n"])
        told = Ticker(time_ms=1, buy=last, sell=last, last=last, high=last, low=last, vol=last)
        return [Quote(channel=Channel("ticker", row["of"]), ticker=told)]


@asynccontextmanager
async def feeding(state: Path, feed: Tiny) -> AsyncIterator[tuple[desk.Desk, Follower, servers.Running]]:
    """A desk on a bus of its own, a follower, and the nats-server."""
    async with (
        servers.nats(state) as nats,
        connected(server.url(state, "feeder"), "feeder", closed=lambda: None) as bus,
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as reader,
        following(reader, dict.fromkeys(market.KINDS, 5.0)) as follower,
        lines.session() as session,
    ):
        one = desk.Desk(bus, "tiny", feed, config.Market(), session=session, metrics=FeedMetrics(CollectorRegistry()))
        async with one.open():
            yield one, follower, nats


def names(exchange: Exchange, number: int) -> Counter[str]:
    """How often each channel was asked for over a socket."""
    return Counter(name for asked, ones in exchange.rows("ask") if asked == number for name in ones)


async def test_a_hundred_markets_come_up_as_fast_as_their_exchange_allows(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk that takes those for silent which wait for their turn asks for them again and again, and the last ones never come up."""
    monkeypatch.setattr(desk, "FIRST_S", LEAST_S / 4)
    async with served(Exchange(hello=1)) as exchange, feeding(state, OneByOne(exchange.url)) as (one, follower, _):
        for channel in MANY:
            await follower.follow(("tiny", channel.kind, channel.instrument))
        await eventually(lambda: exchange.asked)
        began_s = time.monotonic()
        await eventually(lambda: one.presence.symbols == len(MANY), LEAST_S + 2)
        took_s = time.monotonic() - began_s
        assert took_s > LEAST_S - 0.5
        assert names(exchange, 0) == Counter(channel.instrument for channel in MANY), "each was asked for once"
        assert (exchange.rows("drop"), len(exchange.sockets)) == ([], 1)
        assert all(source.silences == 0 for source in one.sources.values())


async def test_a_market_that_says_nothing_is_asked_for_again_once_it_had_its_turn(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "FIRST_S", 0.5)
    async with served(Exchange()) as exchange, feeding(state, OneByOne(exchange.url)) as (_, follower, __):
        await follower.follow(("tiny", "ticker", "M0_USDT"))
        await eventually(lambda: names(exchange, 0)["M0_USDT"] == 3)
        moments = [moment for moment, _, row in exchange.asked if "ask" in row]
        waits = [after - before for before, after in itertools.pairwise(moments)]
        assert 0.5 <= waits[0] < 1.5
        assert 1.0 <= waits[1] < 2.5, "twice as long each time"


async def test_what_waited_for_its_turn_when_the_connection_ended_is_asked_for_on_the_next() -> None:
    many = MANY[:60]
    async with served(Exchange(hello=1)) as exchange, reading(OneByOne(exchange.url)) as heard:
        for channel in many:
            heard.lines.follow(channel)
        await eventually(lambda: len(exchange.where) >= PER_S)
        await exchange.sockets[0].close()
        await eventually(lambda: {update.channel for update, _ in heard.updates} == set(many))
        before = names(exchange, 0)
        assert len(before) < len(many), "some did wait"
        await eventually(lambda: names(exchange, 1) == Counter(channel.instrument for channel in many))
        assert [len(channels) for channels, _ in heard.lost] == [len(many)]
        assert all(heard.lines.silent_s(channel) < 5 for channel in many)
        assert (len(exchange.sockets), heard.lines.live) == (2, True)
