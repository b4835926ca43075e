"""bridge/shared.py over a real nats-server: one call for many who ask the same, and how long its answer serves others."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from msgspec import Raw

from bridge import shared
from bridge.shared import HEARD_S, JOIN_S, Answer, Key, Shared, sharing
from bus import market, server, subjects
from bus.connection import Bus, connected
from bus.errors import BadRequest, BusError, Busy, Internal, RateLimited, StaleData, TimedOut, VenueRejected, VenueUnavailable
from bus.follow import following
from bus.messages import Failure, Reply, Success
from tests import servers
from tests.servers import eventually

pytestmark = pytest.mark.slow

LIFE_S = {"ticker": 0.5, "records": 30.0}
KEY: Key = ("paper", "records", b'{"symbol":"BTC_USDT"}')
LONG_S = 10.0


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Exchange:
    """What a worker would answer: each call waits until it is let go. asked: how many calls there were."""

    asked: int = 0
    waiting: list["asyncio.Future[Reply]"] = field(default_factory=list)

    async def __call__(self) -> Reply:
        self.asked += 1
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]

    async def let_go(self, reply: Reply | BusError) -> None:
        """End the oldest call, as soon as there is one."""
        await eventually(lambda: self.waiting)
        future = self.waiting.pop(0)
        if isinstance(reply, BusError):
            future.set_exception(reply)
        else:
            future.set_result(reply)


def good(text: str = "1") -> Success:
    return Success(data=Raw(text.encode()))


def failed(error: BusError) -> Failure:
    return Failure.of(error)


def value(text: str = "1") -> tuple[bytes, bool]:
    return b'{"data":%b}' % text.encode(), False


@pytest_asyncio.fixture(scope="module")
async def bus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    state = tmp_path_factory.mktemp("s")
    async with servers.nats(state), connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus:
        yield bus


async def several(one: Shared, ask: Callable[[], Awaitable[Reply]], count: int) -> list["asyncio.Task[tuple[bytes | Failure, bool]]"]:
    """So many who ask the same at once, in this order."""
    tasks = [asyncio.create_task(one.get(KEY, ask, LONG_S)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


# ---------------------------------------------------------------- in flight


async def test_who_asks_the_same_meanwhile_shares_the_call(bus: Bus) -> None:
    one, exchange = Shared(bus, {}), Exchange()
    tasks = await several(one, exchange, 5)
    await exchange.let_go(good())
    answers = await asyncio.gather(*tasks)
    assert answers == [value()] + [(value()[0], True)] * 4
    assert exchange.asked == 1
    assert one.find(KEY) is None, "without a life it serves nobody who comes later"


async def test_another_question_is_another_call(bus: Bus) -> None:
    one, exchange = Shared(bus, {}), Exchange()
    keys: list[Key] = [KEY, ("okx", *KEY[1:]), (KEY[0], "trades", KEY[2]), (*KEY[:2], b'{"symbol":"BTC_USDT.swap"}')]
    tasks = [asyncio.create_task(one.get(key, exchange, LONG_S)) for key in keys]
    for number in range(len(keys)):
        await exchange.let_go(good(str(number)))
    assert await asyncio.gather(*tasks) == [value(str(number)) for number in range(len(keys))]


@pytest.mark.parametrize("error", [VenueUnavailable("gone"), RateLimited("slow down"), StaleData("old")])
async def test_a_failure_of_the_exchange_is_everybodys(bus: Bus, error: BusError) -> None:
    one, exchange = Shared(bus, {}), Exchange()
    tasks = await several(one, exchange, 3)
    await exchange.let_go(failed(error))
    assert await asyncio.gather(*tasks) == [(failed(error), False), (failed(error), True), (failed(error), True)]
    assert exchange.asked == 1


@pytest.mark.parametrize("error", [VenueRejected("bad key"), BadRequest("no"), Internal("ours")])
async def test_a_failure_that_may_be_the_askers_own_is_not_shared(bus: Bus, error: BusError) -> None:
    one, exchange = Shared(bus, {}), Exchange()
    tasks = await several(one, exchange, 3)
    await exchange.let_go(failed(error))
    await eventually(lambda: len(exchange.waiting) == 2)  # each asks by itself, both at once
    await exchange.let_go(good("2"))
    await exchange.let_go(good("3"))
    assert await asyncio.gather(*tasks) == [(failed(error), False), value("2"), value("3")]


@pytest.mark.parametrize("raised", [True, False])
async def test_after_a_failure_on_the_way_one_asks_for_all_the_others(bus: Bus, raised: bool) -> None:  # noqa: FBT001
    one, exchange = Shared(bus, {}), Exchange()
    tasks = await several(one, exchange, 4)
    busy = Busy("full")
    await exchange.let_go(busy if raised else failed(busy))
    await exchange.let_go(good())
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert first is busy or first == (failed(busy), False)
    assert others == [value()] + [(value()[0], True)] * 2
    assert exchange.asked == 2


async def test_a_leader_that_is_cancelled_takes_nobody_along(bus: Bus) -> None:
    one, exchange = Shared(bus, {}), Exchange()
    leader, *others = await several(one, exchange, 3)
    await eventually(lambda: exchange.waiting)
    leader.cancel()
    exchange.waiting.clear()
    await exchange.let_go(good())
    assert await asyncio.gather(*others) == [value(), (value()[0], True)]
    assert leader.cancelled()


async def test_each_waits_until_its_own_deadline(bus: Bus) -> None:
    one, exchange = Shared(bus, {}), Exchange()
    (leader,) = await several(one, exchange, 1)
    with pytest.raises(TimedOut, match="no answer from a worker of paper in time"):
        await one.get(KEY, exchange, 0.05)
    assert not leader.done()
    await exchange.let_go(good())
    assert await leader == value()
    assert exchange.asked == 1


async def test_a_call_that_hangs_is_not_joined_for_ever(bus: Bus) -> None:
    clock = Clock()
    one, exchange = Shared(bus, {}, clock), Exchange()
    (hanging,) = await several(one, exchange, 1)
    clock.now_s += JOIN_S
    tasks = await several(one, exchange, 2)
    await eventually(lambda: len(exchange.waiting) == 2)
    hung = exchange.waiting.pop(0)
    await exchange.let_go(good("2"))
    assert await asyncio.gather(*tasks) == [value("2"), (value("2")[0], True)]
    hung.set_result(good("1"))
    assert await hanging == value("1")
    assert one._flights == {}


# ---------------------------------------------------------------- for a while


async def test_an_answer_lives_from_when_it_was_asked_for(bus: Bus) -> None:
    clock = Clock()
    one, exchange = Shared(bus, LIFE_S, clock), Exchange()
    (task,) = await several(one, exchange, 1)
    clock.now_s += 29.0  # so long the exchange took
    await exchange.let_go(good())
    assert await task == value()
    assert one.find(KEY) == value()[0]
    clock.now_s += 0.99
    assert one.find(KEY) == value()[0]
    clock.now_s += 0.01
    assert one.find(KEY) is None
    await one.forget()
    assert (one._answers, one._bytes) == ({}, 0)


async def test_a_failure_does_not_live(bus: Bus) -> None:
    one, exchange = Shared(bus, LIFE_S), Exchange()
    (task,) = await several(one, exchange, 1)
    await exchange.let_go(failed(VenueUnavailable("gone")))
    await task
    assert one.find(KEY) is None


async def test_the_newer_answer_stays(bus: Bus) -> None:
    clock = Clock()
    one = Shared(bus, LIFE_S, clock)
    await one.keep(KEY, Answer(b"newer", 999.0))
    await one.keep(KEY, Answer(b"older", 998.0))
    assert one.find(KEY) == b"newer"


async def test_memory_is_bounded(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST_BYTES", 1000)
    monkeypatch.setattr(shared, "MOST_ANSWERS", 5)
    monkeypatch.setattr(shared, "LARGEST", 500)
    clock = Clock()
    one = Shared(bus, LIFE_S, clock)
    keys: list[Key] = [("paper", "records", str(number).encode()) for number in range(9)]
    for key in keys:
        await one.keep(key, Answer(b"x" * 300, clock.now_s))
    assert [one.find(key) is not None for key in keys] == [False] * 6 + [True] * 3
    for key in keys:
        await one.keep(key, Answer(b"y", clock.now_s + 0.001))
    assert [one.find(key) is not None for key in keys] == [False] * 4 + [True] * 5
    await one.keep(KEY, Answer(b"x" * 501, clock.now_s))
    assert one.find(KEY) is None
    assert one._bytes == sum(len(answer.content) for answer in one._answers.values()) == 5


# ---------------------------------------------------------------- over bridges


@dataclass
class Side:
    bus: Bus
    shared: Shared


@asynccontextmanager
async def bridges(state: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Two bridges that tick and have heard of each other."""
    url = server.url(state, "bridge")
    ages = dict.fromkeys(market.KINDS, 5.0)
    async with (
        servers.nats(state),
        connected(url, "bridge", closed=lambda: None) as left,
        connected(url, "bridge", closed=lambda: None) as right,
        sharing(left, LIFE_S) as first,
        sharing(right, LIFE_S) as second,
        following(left, ages),
        following(right, ages),
    ):
        await eventually(lambda: first._ticks and second._ticks)
        yield Side(left, first), Side(right, second)


async def ask(side: Side, text: str) -> None:
    async def answer() -> Reply:
        return good(text)

    assert await side.shared.get(KEY, answer, LONG_S) == value(text)


async def test_a_bridge_that_was_asked_the_same_gets_the_answer_of_another(state: Path) -> None:
    async with bridges(state) as (left, right):
        await ask(right, "1")
        asked_ms = right.shared._answers[KEY].asked_s * 1000
        await eventually(lambda: left.shared._ticks[right.bus.process][1] > asked_ms)  # so that what comes is newer for certain
        await ask(left, "2")
        await eventually(lambda: right.shared.find(KEY) == value("2")[0])
        age_s = right.shared._clock() - right.shared._answers[KEY].asked_s
        assert 0 < age_s < 2, "at least as old as it is"
        other: Key = ("paper", "records", b'{"symbol":"ETH_USDT"}')
        assert right.shared.find(other) is None


async def test_an_answer_of_any_age_is_not_taken(state: Path) -> None:
    """It echoes no tick of ours, one of the future, or it is too old."""
    async with bridges(state) as (left, right):
        await ask(right, "1")
        await right.bus.nc.flush()
        tick_ms = int(right.shared._clock() * 1000)
        me = right.bus.process
        subject = next(sub.subject for sub in right.bus.nc._subs.values() if sub.subject.startswith("shared."))
        heads = [
            (0, {}),
            (0, {"bridge-x": tick_ms}),
            (0, {me: tick_ms + 60_000}),
            (31_000, {me: tick_ms}),
            (-9, {me: tick_ms + 5}),
            "x",
            [1],
        ]
        for head in heads:
            await left.bus.nc.publish(subject, msgspec.json.encode(head) + b"\n" + b"wrong")
        await eventually(lambda: right.shared._clock() * 1000 > tick_ms + 5)
        await left.bus.nc.publish(subject, msgspec.json.encode((0, {me: tick_ms + 5})) + b"\n")
        await left.bus.nc.publish(subject, msgspec.json.encode((0, {me: tick_ms + 5})) + b"\n" + b"right")
        await eventually(lambda: right.shared.find(KEY) == b"right")


async def test_a_bridge_alone_tells_nobody(state: Path) -> None:
    async with (
        servers.nats(state),
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus,
        sharing(bus, LIFE_S) as one,
        following(bus, dict.fromkeys(market.KINDS, 5.0)),
    ):
        heard: list[bytes] = []

        async def note(message: "object") -> None:
            heard.append(b"")

        await bus.nc.subscribe("shared.>", cb=note)
        await ask(Side(bus, one), "1")
        await bus.nc.flush()
        assert (heard, one._listening) == ([], {})


async def test_what_nobody_asks_for_is_listened_for_no_more(state: Path) -> None:
    async with servers.nats(state), connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus:
        clock = Clock()
        one = Shared(bus, LIFE_S, clock)
        one._ticks["bridge-other"] = (clock.now_s, 1)
        await one.keep(KEY, Answer(b"1", clock.now_s))
        assert list(one._listening) == [KEY]
        clock.now_s += 29.0
        assert one.find(KEY) == b"1"
        clock.now_s += HEARD_S - 1
        await one.forget()
        assert [sub.subject.split(".")[0] for sub in bus.nc._subs.values()].count("shared") == 1
        clock.now_s += 2
        await one.forget()
        assert one._listening == {}
        assert [sub.subject.split(".")[0] for sub in bus.nc._subs.values()].count("shared") == 0
    assert subjects.shared("paper", "records", "00ff").startswith("shared.paper.records.")
