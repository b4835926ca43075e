"""workers/settle.py: whoever dies, an order's fate is found out by another, never too early, and told the same to all."""

import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from msgspec import Struct

from bus.fleet import Fleet
from bus.journal import Intent, Outcome
from bus.lifecycle import running
from tests import exchanges, servers
from tests.host import Host, hosting
from tests.ordering import Account, Mute, Worker, account, buy, error, executed, key, placed, received, trading, unknown, until, working
from tests.rig import Rig
from workers import settle
from workers.http import Call
from workers.venues import Venue

pytestmark = pytest.mark.slow

DEADLINE_S = 2.0
SETTLE_AFTER_S = 0.5
PLACES = "POST /api/v1/orders"


class Cluster(Struct):
    """Two bridges without a worker: a test starts those it needs, with these settings or
    venues. worker: one in this process that settles nothing."""

    state: Path
    rig: Rig
    hosts: tuple[Host, Host]
    worker: Worker
    venues: dict[str, Venue]
    settings: dict[str, object]
    fleet: Fleet

    def pid(self, process: str) -> int:
        return next(one.pid for one in self.fleet.alive() if one.process == process)


@pytest_asyncio.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("settle")
    state = folder / "s"
    async with servers.nats(state), trading(folder / "paper") as (rig, venues):
        settings: dict[str, object] = {
            "venues__paper__base_url": rig.client.base,
            "workers__exchanges": '["paper"]',
            "orders__settle_after_s": SETTLE_AFTER_S,
            "bridge__deadline_s": DEADLINE_S,
        }
        async with (
            servers.bridge(state, **settings) as (_, one),
            servers.bridge(state, **settings) as (_, other),
            hosting(one) as first,
            hosting(other) as second,
            servers.watching(state) as fleet,
            working(state, venues, settling=False, announced=False) as worker,  # nobody takes it for one of those who settle
        ):
            yield Cluster(state, rig, (first, second), worker, venues, settings, fleet)


@pytest.fixture
def who() -> Account:
    return account()


def body(who: Account, price: str = "1000") -> bytes:
    """One request of a host; the same bytes are the same request."""
    params = {"symbol": "BTC_USDT", "type": "buy", "price": price, "amount": "0.01"}
    nonce = time.time_ns() | 1
    return msgspec.json.encode(
        {"access_key": who.access_key, "secret_key": who.secret_key, "nonce": nonce, "method": "trade", "params": params}
    )


def died(worker: Worker, who: Account, *, left_s: float = 1.0, **changes: Any) -> tuple[Intent, bytes]:
    """What a worker leaves that died between its intent and the send."""
    named = key()
    now_ms = worker.bus.now_ms()
    _, opened = worker.settler._opener.open(frame := worker.frame("trade", buy(), who, named=named, left_s=left_s))
    intent = Intent(
        exchange="paper",
        path="paper",
        account=opened.account,
        method="trade",
        key=named,
        asked_ms=now_ms,
        received_ms=now_ms,
        expires_at_ms=now_ms + int(left_s * 1000),
        worker="worker-dead",
        symbol="BTC_USDT",
        side="buy",
        price="1000",
        amount="0.01",
    )
    return msgspec.structs.replace(intent, **changes), frame


async def settled(worker: Worker, named: str, exchange: str = "paper", within_s: float = 15) -> tuple[Outcome, int]:
    """The outcome and when it was written, once nothing else is left of the order."""

    async def gone() -> bool:
        return await worker.outcome(named, exchange) is not None and named not in await worker.unsettled()

    await until(gone, within_s)
    outcome = await worker.outcome(named, exchange)
    assert outcome is not None
    entry = await worker.entry(named, exchange)
    assert entry is not None
    return outcome, entry.outcome_ms


# ---------------------------------------------------------------- a worker that dies


async def test_an_order_whose_worker_was_killed_is_found_by_another_and_told_to_its_repetition(cluster: Cluster, who: Account) -> None:
    """The exchange has executed it and holds the reply."""
    first, second = cluster.hosts
    async with servers.worker(cluster.state, **cluster.settings) as one, servers.worker(cluster.state, **cluster.settings) as other:
        await servers.eventually(lambda: len([each for each in cluster.fleet.alive() if each.role == "worker" and each.ready]) == 2)
        await cluster.rig.arm("late-reply", path=PLACES, key=who.access_key, seconds=5, count=1)
        request, begun = body(who), time.monotonic()
        asking = asyncio.create_task(first.post("paper", request))

        async def mine() -> str:
            rows = await executed(cluster.rig, who)
            return rows[0][0] if rows else ""

        named = await until(mine)
        sender = cluster.pid((await cluster.worker.intent(named)).worker)
        victim = one if one.process.pid == sender else other
        assert victim.process.pid == sender
        victim.send(signal.SIGKILL)
        told = (await asking)["error"]
        assert time.monotonic() - begun < DEADLINE_S + 1
        assert re.fullmatch(rf"outcome unknown: .*; client order id {named}", told)
        assert (await second.post("paper", body(who)))["error"].startswith("fenced: ") or await cluster.worker.outcome(named)
        outcome, _ = await settled(cluster.worker, named)
        assert (outcome.state, outcome.by) == ("placed", "settler")
        for host in cluster.hosts:
            assert (await host.post("paper", request))["data"] == {"id": outcome.order_id}
        assert len(await received(cluster.rig, named)) == 1

        async def passes() -> bool:
            return "data" in await second.post("paper", body(who))  # an equal one with a new nonce, once a host was told

        await until(passes)


async def test_repetitions_after_a_host_hung_up_and_at_another_bridge_are_one_order(cluster: Cluster, who: Account) -> None:
    first, second = cluster.hosts
    async with servers.worker(cluster.state, **cluster.settings):
        await cluster.rig.arm("late-reply", path=PLACES, key=who.access_key, seconds=0.8, count=1)
        request = body(who)
        async with aiohttp.ClientSession() as session:
            with pytest.raises(TimeoutError):
                await session.post(f"{first.address}/paper", data=request, timeout=aiohttp.ClientTimeout(total=0.3))
        replies = await asyncio.gather(first.post("paper", request), second.post("paper", request))
        ((named, order_id),) = await executed(cluster.rig, who)
        assert [reply["data"]["id"] for reply in replies] == [order_id] * 2
        assert len(await received(cluster.rig, named)) == 1
        await cluster.rig.arm("late-reply", path=PLACES, key=who.access_key, seconds=0.5, count=2)
        twice = body(who, "1001")
        both = await asyncio.gather(first.post("paper", twice), first.post("paper", twice))
        assert len({reply["data"]["id"] for reply in both}) == 2  # both hosts are there: two equal requests are two orders


async def test_what_dead_workers_left_is_settled_each_in_its_way_and_never_too_early(cluster: Cluster, who: Account) -> None:
    worker = cluster.worker
    absent, frame = died(worker, who)
    await worker.journal.begin(absent, frame)
    raw, _ = died(worker, who, method="__api", resource="POST /api/v1/orders", side="", price="", amount="", symbol="")
    await worker.journal.begin(raw, b"")
    finished, frame = died(worker, who, amount="0.5")
    held = await worker.journal.begin(finished, frame)
    await worker.journal.finish(held, Outcome(state="placed", order_id="77"))  # its worker died before it was let go
    async with working(cluster.state, cluster.venues, settle_after_s=SETTLE_AFTER_S):
        outcome, written_ms = await settled(worker, absent.key)
        assert (outcome.state, outcome.by) == ("absent", "settler")
        assert written_ms > absent.expires_at_ms + SETTLE_AFTER_S * 1000
        assert (await settled(worker, finished.key))[0].order_id == "77"

        async def marked() -> bool:
            entry = await worker.entry(raw.key)
            return entry is not None and entry.unknown is not None

        await until(marked)
        assert await worker.outcome(raw.key) is None
        assert raw.key in await worker.unsettled()
        left = await worker.journal.held("paper", raw.key)
        assert left is not None
        await worker.journal.finish(left, Outcome(state="done", by="person"))
        await worker.journal.told(left)
    assert await executed(cluster.rig, who) == []


async def test_absent_is_proven_by_the_exchanges_clock_only(cluster: Cluster, who: Account) -> None:
    intent, frame = died(cluster.worker, who, left_s=0.3)
    await cluster.worker.journal.begin(intent, frame)
    await cluster.rig.arm("clock-skew", seconds=-1.5)
    try:
        async with working(cluster.state, cluster.venues, settle_after_s=SETTLE_AFTER_S):
            outcome, written_ms = await settled(cluster.worker, intent.key)
    finally:
        await cluster.rig.control("DELETE", "/faults?kind=clock-skew")
    assert outcome.state == "absent"
    assert written_ms > intent.expires_at_ms + SETTLE_AFTER_S * 1000 + 1500 - 5


async def test_the_first_worker_up_settles_before_it_is_ready(cluster: Cluster, who: Account) -> None:
    intent, frame = died(cluster.worker, who, left_s=3)
    await cluster.worker.journal.begin(intent, frame)
    env = servers.process_env(cluster.state, "worker", **cluster.settings)
    async with servers.running(sys.executable, "-m", "workers", env=env) as first:
        await first.said('"event":"settling before serving"')
        await servers.eventually(lambda: [one for one in cluster.fleet.alive() if one.pid == first.process.pid])
        (present,) = [one for one in cluster.fleet.alive() if one.pid == first.process.pid]
        assert not present.ready
        assert not await servers.readiness(f"http://{present.admin}")
        await first.said('"event":"ready"')
        assert first.output.index('"event":"settled"') < first.output.index('"event":"ready"')
        assert await servers.readiness(f"http://{present.admin}")
        assert (await settled(cluster.worker, intent.key))[0].state == "absent"
        later, frame = died(cluster.worker, who, left_s=1)
        await cluster.worker.journal.begin(later, frame)
        async with servers.worker(cluster.state, **cluster.settings) as second:  # one that comes to others leaves it to them
            assert "settling before serving" not in second.output
        await settled(cluster.worker, later.key)


async def test_a_start_serves_after_a_while_with_what_it_cannot_settle(state: Path, who: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "START_S", 0.5)
    async with servers.nats(state), exchanges.serving() as scripted:
        venues = cast("dict[str, Venue]", {"paper": Finder(scripted.url)})
        scripted.otherwise = lambda _seen: exchanges.DROPPED
        async with working(state, venues, settling=False, announced=False) as worker:
            intent, frame = died(worker, who)
            await worker.journal.begin(intent, frame)
            begun = time.monotonic()
            await worker.settler.before_serving()
            assert 0.5 < time.monotonic() - begun < 2.5
            assert await worker.unsettled() == {intent.key}
            assert scripted.requests


# ---------------------------------------------------------------- who does it


class Finder(Mute):
    """Its orders can be found, and are never proven absent."""

    lookups = frozenset({"client_order_id"})

    async def find_order(self, call: Call, client_order_id: str, _symbol: str) -> Any:
        (await call.send("GET", f"{self._base}/find/{client_order_id}")).json()


async def test_of_two_workers_one_looks_an_order_up(state: Path, who: Account) -> None:
    async with servers.nats(state), exchanges.serving() as one, exchanges.serving() as other:
        sides = [cast("dict[str, Venue]", {"paper": Finder(exchange.url)}) for exchange in (one, other)]
        async with working(state, sides[0]) as first, working(state, sides[1]):
            intents = []
            for number in range(20):
                intent, frame = died(first, who, left_s=0.2, amount=str(number + 1))
                await first.journal.begin(intent, frame)
                intents.append(intent.key)
            await servers.eventually(lambda: len(one.requests) + len(other.requests) >= 40)
            found = [{seen.path.rpartition("/")[2] for seen in exchange.requests} for exchange in (one, other)]
            assert found[0] | found[1] == set(intents)
            assert found[0] & found[1] == set()
            assert all(found)


async def test_a_job_that_loses_a_cancellation_is_cancelled_again() -> None:
    """asyncio.wait_for before Python 3.12 forgets one when its future is done in the same turn: nats-py's request() then just goes on."""

    async def deaf() -> None:
        heard = 0
        while heard < 2:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1
        raise asyncio.CancelledError

    async with asyncio.timeout(2):
        async with running(deaf()):
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------- what nobody expects


class Wild(Mute):
    """Its look-up raises what no venue should."""

    lookups = frozenset({"client_order_id"})

    async def find_order(self, _call: Call, _client_order_id: str, _symbol: str) -> Any:
        raise RuntimeError("no look-up today")


async def test_a_look_up_that_raises_anything_stops_no_worker(state: Path, who: Account) -> None:
    async with servers.nats(state), exchanges.serving() as scripted:
        venues = cast("dict[str, Venue]", {"mute": Wild(scripted.url)})
        async with working(state, venues) as worker:
            scripted.will(exchanges.DROPPED)
            named = key()
            told = error(await worker.trade(who, named=named, exchange="mute", left_s=0.6))
            assert re.fullmatch(unknown(named), told)
            await asyncio.sleep(2)  # some rounds of the settler
            scripted.will(exchanges.json({"id": 7}))
            assert placed(await worker.trade(who, buy("0.5"), exchange="mute")) == "7"
            assert named in await worker.unsettled()


async def test_whatever_lies_on_the_bus_stops_no_worker(state: Path, who: Account) -> None:
    async with servers.nats(state), exchanges.serving() as scripted:
        venues = cast("dict[str, Venue]", {"mute": Mute(scripted.url)})
        async with working(state, venues) as worker:
            await worker.bus.nc.publish("unsettled.mute.key.account.fence", b"noise")
            await asyncio.sleep(2)  # some rounds of the settler
            scripted.will(exchanges.json({"id": 7}))
            assert placed(await worker.trade(who, buy("0.5"), exchange="mute")) == "7"
