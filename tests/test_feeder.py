"""workers/feeder.py: the process. One that dies, hangs or leaves is replaced; one that comes back to life does no harm."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import nats
import pytest
from nats.aio.msg import Msg

from bus import server, subjects
from bus.connection import connected
from bus.follow import Follower, following
from tests import paper, servers
from tests.servers import Running

pytestmark = pytest.mark.slow

TICKER, DEPTH = ("paper", "ticker", "BTC_USDT"), ("paper", "depth", "BTC_USDT")
AGES = {"ticker": 5.0, "depth": 5.0, "trades": 5.0, "candles": 5.0}
REPLACED_S = 3.0


class Stage:
    """A bus, an exchange that moves ten times a second, and somebody who follows two of its markets."""

    def __init__(self, state: Path, base_url: str, follower: Follower) -> None:
        self._state = state
        self._base_url = base_url
        self.follower = follower

    def feeder(self, **config: object) -> contextlib.AbstractAsyncContextManager[Running]:
        return servers.feeder(self._state, **{"venues__paper__base_url": self._base_url} | config)

    @property
    def answers(self) -> bool:
        return None not in (self.follower.find(TICKER), self.follower.find(DEPTH))

    @property
    def epoch(self) -> int:
        return self.follower.entries[DEPTH].epoch

    async def fresh(self, within_s: float = 10) -> float:
        """Wait until both are answered; how long that took."""
        since_s = time.monotonic()
        await servers.eventually(lambda: self.answers, within_s)
        return time.monotonic() - since_s


@pytest.fixture
async def stage(state: Path, tmp_path: Path) -> AsyncIterator[Stage]:
    async with (
        servers.nats(state),
        paper.exchange(tmp_path / "paper", time.time, book_interval_s=0.1) as client,
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus,
        following(bus, AGES) as follower,
    ):
        await follower.follow(TICKER)
        await follower.follow(DEPTH)
        yield Stage(state, client.base, follower)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_feeder_that_dies_or_hangs_is_replaced_within_three_seconds(stage: Stage, number: int) -> None:
    async with stage.feeder() as first:
        await stage.fresh()
        async with stage.feeder():
            epoch = stage.epoch
            first.send(number)
            since_s = time.monotonic()
            await servers.eventually(lambda: stage.epoch > epoch and stage.answers)
            assert time.monotonic() - since_s < REPLACED_S
            if number == signal.SIGSTOP:
                epoch = stage.epoch
                first.send(signal.SIGCONT)
                await first.said("another feeder took a shard over")
                await stage.fresh()
                assert stage.epoch == epoch


async def test_a_feeder_that_hung_alone_feeds_again_when_it_goes_on(stage: Stage) -> None:
    async with stage.feeder() as only:
        await stage.fresh()
        only.send(signal.SIGSTOP)
        await servers.eventually(lambda: not stage.answers, 3)
        only.send(signal.SIGCONT)
        assert await stage.fresh() < 5


async def test_a_feeder_that_is_told_to_stop_says_so_and_another_goes_on_at_once(stage: Stage) -> None:
    async with stage.feeder() as first:
        await stage.fresh()
        async with stage.feeder():
            epoch = stage.epoch
            first.send(signal.SIGTERM)
            since_s = time.monotonic()
            await servers.eventually(lambda: stage.epoch > epoch and stage.answers)
            assert time.monotonic() - since_s < 1.5
            assert await first.process.wait() == 0


async def test_after_a_restart_of_the_bus_the_stream_is_there_again_and_latecomers_find_what_was_told(state: Path, tmp_path: Path) -> None:
    async with (
        paper.exchange(tmp_path / "paper", time.time, book_interval_s=0.1) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        bus = contextlib.AsyncExitStack()
        await bus.enter_async_context(servers.nats(state))
        stack.push_async_callback(lambda: bus.aclose())
        await stack.enter_async_context(servers.feeder(state, venues__paper__base_url=client.base))
        reader = await stack.enter_async_context(connected(server.url(state, "bridge"), "bridge", closed=lambda: None))
        stage = Stage(state, client.base, await stack.enter_async_context(following(reader, AGES)))
        await stage.follower.follow(TICKER)
        await stage.follower.follow(DEPTH)
        await stage.fresh()
        await bus.aclose()
        await servers.eventually(lambda: not stage.answers, 3)
        bus = contextlib.AsyncExitStack()
        await bus.enter_async_context(servers.nats(state))
        assert await stage.fresh() < 5
        async with (
            connected(server.url(state, "operator"), "operator", closed=lambda: None) as late,
        ):
            question = f"$JS.API.DIRECT.GET.{subjects.MARKET}.{subjects.feed(*TICKER)}"
            message = await late.nc.request(question, timeout=2)
            assert msgspec.json.decode(message.data)["data"]["symbol"] == "BTC_USDT"


async def test_a_plain_listener_is_fed_and_one_who_asks_for_nonsense_is_not(stage: Stage, state: Path) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def hear(message: Msg) -> None:
        await heard.put(message.data)

    async with stage.feeder() as feeding:
        plain = await nats.connect(server.url(state, "reader"))
        try:
            await plain.subscribe("feed.paper.ticker.ETH_USDT", cb=hear)
            await plain.subscribe("feed.paper.ticker.NO_SUCH", cb=hear)
            told = msgspec.json.decode(await asyncio.wait_for(heard.get(), 10))
            assert told["data"]["symbol"] == "ETH_USDT"
            await feeding.said("an unknown market is wished for")
        finally:
            await plain.close()


async def test_an_exchange_without_a_socket_cannot_be_fed(state: Path) -> None:
    env = servers.process_env(state, "feeder", market__exchanges='["bitgo"]')
    async with servers.running(sys.executable, "-m", "workers.feeder", env=env) as one:
        await one.said(r"\[market\] exchanges: bitgo offers no socket")
        assert await one.process.wait() == 1
