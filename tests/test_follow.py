"""bus/follow.py over a real nats-server: what a follower asks for, what it believes, and what it does about what got lost."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bus import market, server, subjects
from bus.connection import Bus, connected
from bus.errors import BadRequest, Busy
from bus.follow import WAITING, Follower, Key, following
from bus.market import Entry
from tests import feeding, servers
from tests.feeding import Feeder, ticker
from tests.servers import eventually

pytestmark = pytest.mark.slow

AGES = dict.fromkeys(market.KINDS, 5.0)
BTC: Key = ("paper", "ticker", "BTC_USDT")
PAIR = BTC[1:]


@asynccontextmanager
async def follower(
    state: Path, *, unused_s: float = 60.0, most: int = 2000, told: list[bytes] | None = None
) -> AsyncIterator[tuple[Follower, Bus]]:
    """A follower with a bridge's rights. told: where its values are noted."""

    def note(entry: Entry) -> None:
        if told is not None:
            told.append(entry.content)

    async with (
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus,
        following(bus, AGES, unused_s=unused_s, most=most, told=note) as one,
    ):
        await bus.nc.flush()
        yield one, bus


@asynccontextmanager
async def both(state: Path) -> AsyncIterator[tuple[Feeder, Follower, Bus]]:
    async with servers.nats(state), feeding.feeder(state) as feeder, follower(state) as (one, bus):
        await eventually(lambda: bus.process in feeder.heard)
        yield feeder, one, bus


async def is_answered(one: Follower, key: Key, data: bytes, within_s: float = 5) -> None:
    await eventually(lambda: one.find(key) == market.reply(data), within_s)


# ---------------------------------------------------------------- the usual course


async def test_what_is_followed_is_wished_told_and_proven(state: Path) -> None:
    async with both(state) as (feeder, one, bus):
        assert one.find(BTC) is None
        entry = await one.follow(BTC)
        await feeder.wish(*PAIR)
        assert feeder.wished == {bus.process: {PAIR}}
        await feeder.value(*PAIR, ticker("100"))
        await eventually(lambda: entry.epoch)
        assert one.find(BTC) is None, "nobody has proven it"
        await feeder.ticked()
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("100"))
        assert 0 <= one.age_s(entry) < 1
        await feeder.value(*PAIR, ticker("101"))
        await is_answered(one, BTC, ticker("101"))


async def test_a_beat_that_answers_no_tick_proves_nothing(state: Path) -> None:
    async with both(state) as (feeder, one, _):
        entry = await one.follow(BTC)
        await one._bus.flush()
        feeder.echoes = False
        await feeder.value(*PAIR, ticker("100"))
        await feeder.beat(whole=True)
        await eventually(lambda: entry.shard is not None and entry.shard.complete)
        assert entry.epoch == feeder.epoch
        assert one.find(BTC) is None
        feeder.echoes = True
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("100"))


async def test_a_feeder_that_falls_silent_proves_nothing_after_a_while(state: Path) -> None:
    async with both(state) as (feeder, one, _):
        await one.follow(BTC)
        await one._bus.flush()
        await feeder.value(*PAIR, ticker("100"))
        await feeder.beat(whole=True)
        began = time.monotonic()
        await is_answered(one, BTC, ticker("100"))
        await eventually(lambda: one.find(BTC) is None)
        assert time.monotonic() - began < market.BEAT_OLD_S + 0.2


async def test_a_withdrawal_ends_an_answer_at_once(state: Path) -> None:
    told: list[bytes] = []
    async with servers.nats(state), feeding.feeder(state) as feeder, follower(state, told=told) as (one, bus):
        await eventually(lambda: bus.process in feeder.heard)
        await one.follow(BTC)
        await bus.flush()  # else the value may come before the subscription is there
        async with feeding.alive(feeder):
            await feeder.value(*PAIR, ticker("100"))
            await is_answered(one, BTC, ticker("100"))
            await feeder.withdraw(*PAIR, "the book has a gap")
            await eventually(lambda: one.find(BTC) is None, market.BEAT_S)
            await feeder.value(*PAIR, ticker("102"))
            await is_answered(one, BTC, ticker("102"))
    assert told == [market.reply(ticker("100")), market.withdrawal("the book has a gap"), market.reply(ticker("102"))]


async def test_what_is_no_kind_is_not_followed(state: Path) -> None:
    async with both(state) as (_, one, __):
        for key in (("paper", "tickers", "BTC_USDT"), ("paper", "ticker", ""), ("paper", "ticker", "机" * 64)):
            with pytest.raises(BadRequest):
                await one.follow(key)
        assert one.entries == {}


# ---------------------------------------------------------------- what there is room for


def key(number: int, exchange: str = "paper") -> Key:
    return exchange, "ticker", f"M{number}_USDT"


async def test_no_more_is_followed_of_an_exchange_than_allowed(state: Path) -> None:
    async with servers.nats(state), follower(state, most=3) as (one, _):
        for number in range(3):
            await one.follow(key(number))
        with pytest.raises(Busy, match="3 symbols of paper are followed already"):
            await one.follow(key(3))
        assert await one.follow(key(0)) is one.entries[key(0)], "what is followed goes on"
        assert (await one.follow(key(3, "okx"))).exchange == "okx", "each exchange has a limit of its own"
        await one.leave(key(0))
        await one.follow(key(3))
        assert list(one.entries) == [key(1), key(2), key(3, "okx"), key(3)]


async def test_doubtful_markets_take_no_more_than_a_quarter_of_the_room(state: Path) -> None:
    async with servers.nats(state), follower(state, most=8) as (one, _):
        for number in range(2):
            await one.follow(key(number), known=False)
        with pytest.raises(Busy, match="2 symbols of paper"):
            await one.follow(key(2), known=False)
        await one.follow(key(0))  # somebody has answered for it
        await one.follow(key(2), known=False)
        for number in range(3, 8):
            await one.follow(key(number))
        for known in (True, False):
            with pytest.raises(Busy):
                await one.follow(key(8), known=known)
        assert [entry.known for entry in one.entries.values()] == [True, False, False, *[True] * 5]


async def test_a_doubtful_market_is_wished_as_a_known_one_as_soon_as_it_is_known(state: Path) -> None:
    async with both(state) as (feeder, one, bus):
        await one.follow(BTC, known=False)
        await eventually(lambda: feeder.wished == {bus.process: set()})  # it was said, and names nothing that is known
        await one.follow(BTC)
        await feeder.wish(*PAIR, within_s=market.WISHES_S / 5)
        assert one.entries[BTC].known


async def test_a_key_is_left_as_often_as_somebody_likes(state: Path) -> None:
    async with both(state) as (feeder, one, bus):
        await one.leave(BTC)
        await one.follow(BTC)
        await asyncio.gather(one.leave(BTC), one.leave(BTC))
        await one.leave(BTC)
        assert one.entries == {}
        async with feeding.alive(feeder):
            await one.follow(BTC)
            await bus.flush()
            await feeder.value(*PAIR, ticker("100"))
            await is_answered(one, BTC, ticker("100"))


# ---------------------------------------------------------------- those who come late


async def test_a_late_joiner_gets_the_last_value_from_the_snapshot(state: Path) -> None:
    async with servers.nats(state), feeding.feeder(state) as feeder:
        await feeder.value(*PAIR, ticker("100"))
        async with follower(state) as (one, bus), feeding.alive(feeder):
            await eventually(lambda: bus.process in feeder.heard)
            await one.follow(BTC)
            await is_answered(one, BTC, ticker("100"), within_s=2)
            assert feeder.n == 1, "it was told once"


async def test_an_old_snapshot_is_no_answer(state: Path) -> None:
    """The feeder that told it has been replaced; a beat of the new one says so before the snapshot is read, or after it."""
    async with servers.nats(state), feeding.feeder(state) as feeder:
        await feeder.value(*PAIR, ticker("100"))
        feeder.replaced()
        async with follower(state) as (one, bus), feeding.alive(feeder):
            await eventually(lambda: bus.process in feeder.heard)
            entry = await one.follow(BTC)
            await feeder.ticked()
            await feeder.ticked()
            assert one.find(BTC) is None
            await feeder.value(*PAIR, ticker("101"))
            await is_answered(one, BTC, ticker("101"))
            assert (entry.epoch, entry.n) == (feeder.epoch, 1)


# ---------------------------------------------------------------- what gets lost


async def test_a_value_that_got_lost_is_not_answered_and_asked_for_again(state: Path) -> None:
    async with both(state) as (feeder, one, _):
        await one.follow(BTC)
        await one._bus.flush()
        async with feeding.alive(feeder):
            await feeder.value(*PAIR, ticker("100"))
            await is_answered(one, BTC, ticker("100"))
            n = await feeder.value(*PAIR, ticker("101"), lost=True)
            await feeder.beat(whole=True)
            await eventually(lambda: one.find(BTC) is None)
            await eventually(lambda: PAIR in feeder.lost, 3)
            assert one.find(BTC) is None
            await feeder.again(*PAIR, ticker("101"), n)
            await is_answered(one, BTC, ticker("101"))


async def test_a_first_value_that_got_lost_is_asked_for_again(state: Path) -> None:
    async with both(state) as (feeder, one, _):
        await one.follow(BTC)
        await feeder.wish(*PAIR)
        n = await feeder.value(*PAIR, ticker("100"), lost=True)
        async with feeding.alive(feeder):
            await eventually(lambda: PAIR in feeder.lost, 3)
            await feeder.again(*PAIR, ticker("100"), n)
            await is_answered(one, BTC, ticker("100"))


@pytest.mark.parametrize("epochs", [1, -1])
async def test_a_value_of_another_feeders_epoch_is_asked_for_again(state: Path, epochs: int) -> None:
    """However it is numbered: the newer one has told less so far. A lower epoch is one of after the bus's clock was set back."""
    async with servers.nats(state), feeding.feeder(state, epoch=7) as feeder, follower(state) as (one, bus):
        await eventually(lambda: bus.process in feeder.heard)
        entry = await one.follow(BTC)
        await bus.flush()
        for last in ("98", "99", "100"):
            await feeder.value(*PAIR, ticker(last))
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("100"))
        feeder.replaced()
        feeder.epoch = 7 + epochs
        assert entry.shard is not None
        entry.shard.heard_s -= market.SILENT_S  # so long ago, by the follower's clock
        await feeder.ticked()
        n = await feeder.value(*PAIR, ticker("101"), lost=True)
        async with feeding.alive(feeder):
            await eventually(lambda: PAIR in feeder.lost, 3)
            assert one.find(BTC) is None
            await feeder.again(*PAIR, ticker("101"), n)
            await is_answered(one, BTC, ticker("101"))


async def test_a_full_subscription_never_answers_what_is_not_the_newest(state: Path) -> None:
    """nats-py drops the newest values; the beat tells of them."""
    async with both(state) as (feeder, one, _):
        entry = await one.follow(BTC)
        await one._bus.flush()
        await feeder.value(*PAIR, ticker("1"))
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("1"))
        n = 1
        while entry.n == n:  # until the last of them are among the dropped
            for _ in range(3 * WAITING):  # without a pause, so that they arrive as one
                n = await feeder.value(*PAIR, ticker(str(n + 1)))
            await feeder.beat(whole=True)
            await eventually(lambda: entry.shard is not None and entry.shard.number == feeder.number)
            assert one.find(BTC) in (None, market.reply(ticker(str(n))))
        assert one.find(BTC) is None
        async with feeding.alive(feeder):
            await eventually(lambda: PAIR in feeder.lost, 3)
            await feeder.again(*PAIR, ticker(str(n)), n)
            await is_answered(one, BTC, ticker(str(n)))
        assert one.dropped > 0


async def test_a_missed_beat_ends_answers_until_a_whole_one(state: Path) -> None:
    async with both(state) as (feeder, one, _):
        entry = await one.follow(BTC)
        await one._bus.flush()
        await feeder.value(*PAIR, ticker("100"))
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("100"))
        feeder.wants_whole = False
        await feeder.value(*PAIR, ticker("101"), lost=True)
        await feeder.beat([PAIR], lost=True)
        await feeder.beat()
        await eventually(lambda: entry.shard is not None and entry.shard.number == feeder.number)
        assert one.find(BTC) is None, "what the missed beat told is not known"
        await eventually(lambda: feeder.wants_whole, 1)
        await feeder.beat(whole=True)
        await eventually(lambda: entry.shard is not None and entry.shard.complete)
        assert one.find(BTC) is None, "it tells of a value that has not come"


async def test_strangers_noise_is_passed_over(state: Path) -> None:
    async with both(state) as (feeder, one, _):
        entry = await one.follow(BTC)
        async with connected(server.url(state, "operator"), "operator", closed=lambda: None) as stranger:
            for content, headers in ((b"x", None), (b"x", {market.HEADER: "one two"}), (b"x", {market.HEADER: "1 2 3"})):
                await stranger.nc.publish(subjects.feed(*BTC), content, headers=headers)
            await stranger.nc.publish(subjects.beat("paper", 0), b"{}")
            await stranger.nc.publish(subjects.beat("paper", "x"), market.encode(market.Beat(feeder="f", epoch=9, number=1, top=1)))
            await stranger.nc.flush()
        async with feeding.alive(feeder):
            await feeder.value(*PAIR, ticker("100"))
            await is_answered(one, BTC, ticker("100"))
        assert (entry.epoch, entry.n) == (1, 1)


# ---------------------------------------------------------------- what ends, and what comes back


async def test_what_nobody_asks_for_ends_and_is_wished_no_more(state: Path) -> None:
    async with servers.nats(state), feeding.feeder(state) as feeder, follower(state, unused_s=0.8) as (one, bus):
        eth: Key = ("paper", "ticker", "ETH_USDT")
        await one.follow(BTC)
        await one.follow(eth)
        await feeder.wish(*eth[1:])
        before = bus.nc._sid

        def asks() -> bool:
            one.find(BTC)
            return eth not in one.entries

        await eventually(asks)
        await eventually(lambda: one.find(BTC) is None and feeder.wished[bus.process] == {PAIR})
        assert list(one.entries) == [BTC]
        await eventually(lambda: not one.entries and feeder.wished[bus.process] == set())
        assert {sub.subject for sub in bus.nc._subs.values() if sub.subject.startswith("feed.")} == set()
        assert bus.nc._sid == before, "nothing was subscribed to again"


async def test_a_feeder_that_starts_is_told_all_wishes(state: Path) -> None:
    async with servers.nats(state), follower(state) as (one, bus):
        await one.follow(BTC)
        async with feeding.feeder(state) as feeder:
            await feeder.wish(*PAIR, within_s=2)
            assert feeder.wished == {bus.process: {PAIR}}


async def test_answers_end_with_the_bus_and_come_back_with_it(state: Path) -> None:
    async with servers.nats(state) as first, feeding.feeder(state) as feeder, follower(state) as (one, bus):
        await eventually(lambda: bus.process in feeder.heard)
        await one.follow(BTC)
        await one._bus.flush()
        async with feeding.alive(feeder):
            await feeder.value(*PAIR, ticker("100"))
            await is_answered(one, BTC, ticker("100"))
            await first.stop(9)
            await eventually(lambda: one.find(BTC) is None, market.BEAT_OLD_S + 0.5)
            async with servers.nats(state):
                await eventually(lambda: bus.nc.is_connected)
                await is_answered(one, BTC, ticker("100"))
                await feeder.value(*PAIR, ticker("101"))
                await is_answered(one, BTC, ticker("101"))


async def test_a_follower_that_stood_still_answers_nothing_old(state: Path) -> None:
    """Its buffers are full of beats; none of them answers a tick of after the pause."""
    async with both(state) as (feeder, one, bus):
        await one.follow(BTC)
        await one._bus.flush()
        await feeder.value(*PAIR, ticker("100"))
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("100"))
        tick_ms = feeder.heard[bus.process]
        await eventually(lambda: one.find(BTC) is None)
        feeder.heard[bus.process] = tick_ms
        await feeder.beat(whole=True)
        entry = one.entries[BTC]
        await eventually(lambda: entry.shard is not None and entry.shard.number == feeder.number)
        assert one.find(BTC) is None
        await asyncio.gather(feeder.ticked())
        await feeder.beat(whole=True)
        await is_answered(one, BTC, ticker("100"))
