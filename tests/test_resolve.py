"""bridge/resolve.py with bus/sessions.py over a real nats-server: what a bare symbol means, and that nobody goes by an old contract."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg

from bridge import fmz
from bridge.resolve import KNOWN_S, SURE_S, Resolver, resolving
from bridge.routes import Route
from bus import market, server, subjects
from bus.connection import Bus, connected
from bus.fleet import Venue
from bus.follow import following
from bus.market import BEAT_OLD_S
from bus.messages import Robot
from bus.sessions import Changed, Session, Sessions
from tests import servers
from tests.servers import eventually

pytestmark = pytest.mark.slow

VENUES = {"paper": Venue(public=["ticker"], contracts=True), "spot": Venue(public=["ticker"])}
PAPER = Route("paper", "paper/r1")
KEY = subjects.session_key("paper/r1", "account")


def call(access_key: str = "a", secret_key: str = "s") -> fmz.HostCall:
    body = {"access_key": access_key, "secret_key": secret_key, "method": "ticker", "params": {"symbol": "BTC_USDT"}}
    return fmz.decode(msgspec.json.encode(body))


@dataclass
class Pair:
    """A bridge's resolver and a worker's sessions, on connections of their own."""

    resolver: Resolver
    sessions: Sessions
    bridge: Bus
    worker: Bus

    def meant(self, access_key: str = "a", secret_key: str = "s", route: Route = PAPER) -> str | None:
        return self.resolver.resolve(route, call(access_key, secret_key), "BTC_USDT")

    def learn(self, contract: str) -> None:
        self.resolver.learn(PAPER, call(), Robot(KEY, contract), self.resolver.asked())

    async def set(self, contract: str) -> Session:
        return await self.sessions.change("paper/r1", "account", contract=contract)


@asynccontextmanager
async def pair(state: Path, *others: str) -> AsyncIterator[Pair]:
    """others: bridges that the worker believes to be alive as well."""
    async with (
        connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bridge,
        connected(server.url(state, "worker"), "worker", closed=lambda: None) as worker,
        following(bridge, dict.fromkeys(market.KINDS, 5.0)),  # it ticks
        resolving(bridge, VENUES) as resolver,
    ):
        sessions = Sessions(worker, 1, lambda: [bridge.process, *others])
        await worker.nc.subscribe(subjects.forgot(worker.process), cb=sessions.hear)
        await bridge.nc.flush()
        await worker.nc.flush()
        one = Pair(resolver, sessions, bridge, worker)
        one.learn("probe")
        await eventually(lambda: one.meant() is not None)  # a tick has come back
        await bridge_forgets(one)
        yield one


async def bridge_forgets(one: Pair) -> None:
    async with connected(one.worker.nc.connected_url.geturl(), "worker", closed=lambda: None) as stranger:  # type: ignore[union-attr]
        await stranger.nc.publish(subjects.CHANGED, msgspec.json.encode(Changed("", 0, KEY, None)))
        await eventually(lambda: one.meant() is None)


async def test_what_needs_no_state_is_resolved_at_once(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        resolve = one.resolver.resolve
        assert resolve(PAPER, call(), "BTC_USDT.swap") == "BTC_USDT.swap"
        assert resolve(Route("spot", "spot"), call(), "BTC_USDT") == "BTC_USDT"
        assert resolve(PAPER, call(), "BTC_USDT") is None, "nobody has read its state"
        assert resolve(Route("other", "other"), call(), "BTC_USDT.swap") is None, "no worker has said what it is"


async def test_what_a_worker_read_holds_for_that_robot_alone(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        one.learn("swap")
        assert one.meant() == "BTC_USDT.swap"
        assert one.meant(access_key="b") is None
        assert one.meant(secret_key="t") is None
        assert one.meant(route=Route("paper", "paper/r2")) is None
        for contract, symbol in (("", "BTC_USDT"), ("spot", "BTC_USDT"), ("quarter", "BTC_USDT.quarter")):
            one.learn(contract)
            assert one.meant() == symbol


async def test_a_change_is_told_only_when_the_bridge_has_forgotten(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        for contract in ("swap", "quarter", "swap", "spot"):
            one.learn("other")
            assert await one.set(contract) == Session(contract=contract)
            assert one.meant() is None


async def test_what_is_set_again_is_not_written_and_not_forgotten(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        await one.set("swap")
        one.learn("swap")
        bucket = await one.sessions.open()
        before = (await bucket.get(KEY)).revision
        await one.set("swap")
        assert (await bucket.get(KEY)).revision == before
        assert one.meant() == "BTC_USDT.swap"
        await one.sessions.change("paper/r1", "account", direction="buy")
        assert (await bucket.get(KEY)).revision != before
        assert one.meant() == "BTC_USDT.swap", "a direction is none of a bridge's business"


async def test_what_a_dead_worker_wrote_is_told_by_whoever_sets_it_again(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        await Sessions(one.worker).open()
        bucket = await one.sessions.open()
        await bucket.put(KEY, msgspec.json.encode(Session(contract="swap")))  # and it died before it told
        one.learn("")
        await one.set("swap")
        assert one.meant() is None


async def test_a_bridge_that_is_silent_is_waited_for_until_it_knows_nothing(state: Path) -> None:
    async with servers.nats(state), pair(state, "bridge-silent") as one:
        one.learn("")
        began = time.monotonic()
        await one.set("swap")
        assert BEAT_OLD_S <= time.monotonic() - began < BEAT_OLD_S + 1
        assert one.meant() is None
    assert SURE_S < BEAT_OLD_S


async def test_a_message_that_got_lost_is_said_again(state: Path) -> None:
    async with servers.nats(state), pair(state, "bridge-late") as one:
        began = time.monotonic()
        heard: list[Changed] = []

        async def late(message: Msg) -> None:
            changed: Changed = msgspec.json.decode(message.data, type=Changed)
            if changed.teller:
                heard.append(changed)
            if len(heard) == 3:
                await one.bridge.nc.publish(subjects.forgot(changed.teller), msgspec.json.encode(("bridge-late", changed.number)))

        await one.bridge.nc.subscribe(subjects.CHANGED, cb=late)
        await one.bridge.nc.flush()
        await one.set("swap")
        assert len(heard) == 3
        assert time.monotonic() - began < BEAT_OLD_S


async def test_an_answer_to_an_earlier_word_is_none_to_a_later_one(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        words: list[Changed] = []

        async def note(message: Msg) -> None:
            words.append(msgspec.json.decode(message.data, type=Changed))

        await one.bridge.nc.subscribe(subjects.CHANGED, cb=note)
        await one.bridge.nc.flush()
        await asyncio.gather(one.set("swap"), one.sessions.change("paper/r2", "account", contract="swap"), one.set("quarter"))
        numbers = [word.number for word in words if word.teller]
        assert sorted(set(numbers)) == [1, 2, 3]


async def test_what_was_read_before_a_change_is_not_learned_after_it(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        asked = one.resolver.asked()
        await one.set("swap")
        one.resolver.learn(PAPER, call(), Robot(KEY, ""), asked)
        assert one.meant() is None
        one.resolver.learn(PAPER, call(), Robot(KEY, "swap"), one.resolver.asked())
        assert one.meant() == "BTC_USDT.swap"
        asked = one.resolver.asked()
        await one.sessions.change("paper/r2", "account", contract="swap")
        one.resolver.learn(PAPER, call(secret_key="t"), Robot(KEY, "swap"), asked)
        assert one.meant(secret_key="t") == "BTC_USDT.swap", "another robot's change does not matter"


async def test_an_operators_clear_is_heard(state: Path) -> None:
    async with servers.nats(state), pair(state) as one:
        await one.set("swap")
        one.learn("swap")
        async with connected(server.url(state, "operator"), "operator", closed=lambda: None) as operator:
            await Sessions(operator).clear(KEY)
        await eventually(lambda: one.meant() is None)
        assert await one.sessions.read("paper/r1", "account") == Session()


async def test_nothing_is_known_after_the_connection_was_lost(state: Path) -> None:
    async with servers.nats(state) as first, pair(state) as one:
        one.learn("swap")
        asked = one.resolver.asked()
        await first.stop(9)
        async with servers.nats(state):
            await eventually(lambda: one.bridge.nc.stats["reconnects"] == 1)
            assert one.meant() is None
            one.resolver.learn(PAPER, call(), Robot(KEY, "swap"), asked)
            await eventually(lambda: one.bridge.nc.is_connected)
            assert one.meant() is None
            one.learn("swap")
            await eventually(lambda: one.meant() == "BTC_USDT.swap")


async def test_a_bridge_that_stood_still_or_was_cut_off_knows_nothing(state: Path) -> None:
    now_s = 100.0
    async with servers.nats(state), connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus:
        resolver = Resolver(bus, VENUES, clock=lambda: now_s)
        resolver.learn(PAPER, call(), Robot(KEY, "swap"), resolver.asked())
        assert resolver.resolve(PAPER, call(), "BTC_USDT") is None, "no tick has come back yet"
        await resolver.hear_tick(Msg(_client=bus.nc, data=market.tick(99.9)))
        assert resolver.resolve(PAPER, call(), "BTC_USDT") == "BTC_USDT.swap"
        now_s = 99.9 + SURE_S
        assert resolver.resolve(PAPER, call(), "BTC_USDT") is None
        await resolver.hear_tick(Msg(_client=bus.nc, data=b"noise"))
        await resolver.hear_tick(Msg(_client=bus.nc, data=market.tick(now_s)))
        assert resolver.resolve(PAPER, call(), "BTC_USDT") == "BTC_USDT.swap"


async def test_what_was_learned_is_relied_on_for_a_while_only(state: Path) -> None:
    """However often it is used: a worker that was killed over a change may have told nobody."""
    now_s = 100.0
    async with servers.nats(state), connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus:
        resolver = Resolver(bus, VENUES, clock=lambda: now_s)

        async def meant_at(at_s: float) -> str | None:
            nonlocal now_s
            now_s = at_s
            await resolver.hear_tick(Msg(_client=bus.nc, data=market.tick(now_s)))  # it is in touch all the time
            return resolver.resolve(PAPER, call(), "BTC_USDT")

        resolver.learn(PAPER, call(), Robot(KEY, "swap"), resolver.asked())
        for age_s in (0.0, 1.0, KNOWN_S / 2, KNOWN_S - 0.01):
            assert await meant_at(100 + age_s) == "BTC_USDT.swap"
        assert await meant_at(100 + KNOWN_S) is None
        resolver.learn(PAPER, call(), Robot(KEY, "swap"), resolver.asked())
        assert await meant_at(100 + 2 * KNOWN_S - 0.01) == "BTC_USDT.swap"
        assert await meant_at(100 + 2 * KNOWN_S) is None


async def test_what_is_remembered_is_bounded_and_what_was_used_last_stays(state: Path) -> None:
    async with servers.nats(state), connected(server.url(state, "bridge"), "bridge", closed=lambda: None) as bus:
        resolver = Resolver(bus, VENUES, most=3, clock=lambda: 0.0)
        await resolver.hear_tick(Msg(_client=bus.nc, data=b"0"))
        asked = resolver.asked()
        for number in range(3):
            resolver.learn(PAPER, call(str(number)), Robot(f"s{number}", "swap"), asked)
        assert resolver.resolve(PAPER, call("0"), "A") == "A.swap"
        resolver.learn(PAPER, call("3"), Robot("s3", "swap"), asked)
        assert [resolver.resolve(PAPER, call(str(number)), "A") for number in range(4)] == ["A.swap", None, "A.swap", "A.swap"]
        for number in range(9):
            await resolver.hear(Msg(_client=bus.nc, data=msgspec.json.encode(Changed("", 0, f"t{number}", None))))
        resolver.learn(PAPER, call("4"), Robot("s4", "swap"), asked)
        assert resolver.resolve(PAPER, call("4"), "A") is None, "so many were changed that its own may have been among them"
        assert len(resolver._known) == len(resolver._changed) == len(resolver._who) == 3
        await resolver.hear(Msg(_client=bus.nc, data=b"noise"))
