"""What dies, stalls or floods, and what hosts see of it: an answer in time, no late order, and service again without an operator."""

import asyncio
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus import server
from bus.errors import SILENCED
from tests import servers
from tests.held import exchanging
from tests.host import Host, hosting
from tests.load import Asked, loaded, order, ticker
from tests.servers import COMMAND, eventually, grows, pids_of

pytestmark = pytest.mark.slow

DEADLINE_S = 6
"""Instead of the default of 10 s: the same promise, tested sooner."""
SLACK_S = 1.5
"""What this machine may take to bring an answer back and to wake the test."""
AT_ONCE_S = 3
"""A generous "at once": far from any time limit, so that it can only come from not waiting at all."""
OUTAGE_S = 5
WEDGED_S = 10
"""By when a worker that was stopped gets no more requests."""
LATER = 1_000_000
"""Number of the first request of a second load, so that no two requests have the same."""


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


async def buy(host: Host, number: int) -> dict[str, Any]:
    return await host("held", "trade", symbol="BTC_USDT", type="buy", price=1, amount=number)


async def look(host: Host, number: int) -> dict[str, Any]:
    return await host("held", "ticker", symbol=f"{number}_USDT")


async def until_answered(host: Host, within_s: float = 30) -> None:
    """Ask until there is an answer, as a robot does."""
    async with asyncio.timeout(within_s):
        while "data" not in await host("null", "ticker", symbol="BTC_USDT"):  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.05)


async def until_refused(host: Host) -> None:
    """Ask anew every 20 ms, waiting for no answer, until one is refused because the bus is not there: at once, and as such."""
    asking: list[asyncio.Task[dict[str, Any]]] = []
    async with asyncio.timeout(AT_ONCE_S):
        while not any(task.done() and task.result().get("error", "").startswith("network: no connection to the bus") for task in asking):
            asking.append(asyncio.create_task(host("null", "ticker", symbol="BTC_USDT")))
            await asyncio.sleep(0.02)
    for reply in await asyncio.gather(*asking):
        assert "data" in reply or re.match("network|timeout", reply["error"]), reply


def assert_number(reply: dict[str, Any], number: int) -> None:
    """The reply is the one to this very request."""
    assert reply["data"].get("id", reply["data"].get("last")) == number


@pytest.mark.slow
async def test_a_killed_worker_leaves_no_caller_without_an_answer(state: Path) -> None:
    async with (
        exchanging() as exchange,
        servers.system(
            state, "--bench", "--workers", "1", paper__enabled="false", bridge__deadline_s=DEADLINE_S, **exchange.settings
        ) as system,
        servers.watching(state) as fleet,
        hosting(system.address) as host,
    ):
        exchange.hold()
        asked_s = time.monotonic()
        reads = [asyncio.create_task(look(host, number)) for number in range(1, 11)]
        writes = [asyncio.create_task(buy(host, number)) for number in range(11, 21)]
        await eventually(lambda: len(exchange.arrivals) == 20)
        killed = system.pids["worker-1"]
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: pids_of(fleet, "worker") - {killed})
        assert "data" in await host("null", "ticker", symbol="BTC_USDT")  # service is back before the deadline
        assert not any(task.done() for task in reads + writes)
        replies = await asyncio.gather(*reads, *writes)
        assert time.monotonic() - asked_s < DEADLINE_S + SLACK_S
        for reply in replies[:10]:
            assert re.search(SILENCED, reply["error"]), reply
        ids = {arrival.tag: arrival.client_order_id for arrival in exchange.arrivals if arrival.kind == "order"}
        for number, reply in enumerate(replies[10:], 11):
            assert reply["error"].startswith("outcome unknown: ")
            assert reply["error"].endswith(f"client order id {ids[str(number)]}")
            assert not re.search(SILENCED, reply["error"])
        assert "worker-1 ended (SIGKILL); restarting" in system.running.output


@pytest.mark.slow
async def test_a_killed_nats_server_comes_back_and_every_request_has_one_answer(state: Path) -> None:
    async with (
        exchanging() as exchange,
        servers.system(state, "--bench", paper__enabled="false", bridge__deadline_s=4, **exchange.settings) as system,
        hosting(system.address) as host,
    ):
        async with loaded(system.address, order("held"), 32) as first:
            await grows(lambda: first.good, 200)
            os.kill(system.pids["nats"], signal.SIGKILL)
            await until_refused(host)
            await grows(lambda: first.good, 200)
        assert "nats ended (SIGKILL); restarting" in system.running.output
        assert_one_answer_each(first.asked, exchange.tags("order"))
        assert max((one.took_s for one in first.asked if one.reply.get("error", "").startswith("network")), default=0) < AT_ONCE_S
        assert_number(await look(host, 1), 1)


@pytest.mark.slow
async def test_a_stalled_nats_server_lets_no_order_come_late_and_costs_no_memory(state: Path) -> None:
    deadline_s = 3  # shorter than the outage: what is sent at its beginning is too late at its end
    async with (
        exchanging() as exchange,
        servers.system(state, "--bench", paper__enabled="false", bridge__deadline_s=deadline_s, **exchange.settings) as system,
        servers.watching(state) as fleet,
    ):
        ours = {name: pid for name, pid in system.pids.items() if name != "nats"}
        async with loaded(system.address, order("held"), 64) as first:
            await grows(lambda: first.good, 500)
            before = {name: resident_mb(pid) for name, pid in ours.items()}
            os.kill(system.pids["nats"], signal.SIGSTOP)
            stopped_s = time.monotonic()
            async with loaded(system.address, order("held"), 64, LATER) as later:
                try:
                    await asyncio.sleep(OUTAGE_S)  # how long it lasts is what is tested
                finally:
                    os.kill(system.pids["nats"], signal.SIGCONT)
                resumed_s = time.monotonic()
                await eventually(lambda: any("data" in one.reply and one.sent_s > resumed_s for one in later.asked), 30)
                await grows(lambda: first.good, 500)
            after = {name: resident_mb(pid) for name, pid in ours.items()}
        asked = first.asked + later.asked
        assert_one_answer_each(asked, exchange.tags("order"))
        assert max(one.took_s for one in asked) < deadline_s + SLACK_S
        sent_s = {one.number: one.sent_s for one in asked}
        assert [one for one in exchange.arrivals if one.at_s > sent_s[int(one.tag)] + deadline_s] == []
        assert sum(stopped_s < one.sent_s < resumed_s - deadline_s for one in asked) >= 64  # some would have been late
        assert {name: after[name] - before[name] for name in ours if after[name] - before[name] >= 20} == {}
        await eventually(lambda: {one.pid for one in fleet.alive()} == set(ours.values()))  # nobody had to be restarted


def assert_one_answer_each(asked: list[Asked], executed: list[str]) -> None:
    """Each request has its own answer or an error that says what became of it, and no order was executed twice."""
    assert [one for one in asked if one.broken] == []
    assert len({one.number for one in asked}) == len(asked)
    orders = [int(tag) for tag in executed]
    assert len(orders) == len(set(orders))
    for one in asked:
        if "data" in one.reply:
            assert_number(one.reply, one.number)
        elif one.reply["error"].startswith("outcome unknown: "):
            assert re.search(r"client order id [0-9a-f]{32}$", one.reply["error"]), one
        else:
            assert one.reply["error"].startswith(("network", "timeout")), one
            assert one.number not in orders, one


@pytest.mark.slow
async def test_no_order_is_sent_after_its_deadline_when_the_worker_wakes_up_late(state: Path) -> None:
    """A worker stopped for longer than the deadline finds the requests in its socket: it must not execute them."""
    async with (
        exchanging() as exchange,
        servers.system(state, "--bench", "--workers", "1", paper__enabled="false", bridge__deadline_s=2, **exchange.settings) as system,
        hosting(system.address) as host,
    ):
        assert_number(await buy(host, 1), 1)
        os.kill(system.pids["worker-1"], signal.SIGSTOP)
        try:
            replies = await asyncio.gather(*(buy(host, number) for number in range(2, 12)))
        finally:
            os.kill(system.pids["worker-1"], signal.SIGCONT)
        assert all(reply["error"].startswith("outcome unknown: ") for reply in replies)
        await until_answered(host)
        assert_number(await buy(host, 12), 12)
        assert exchange.tags("order") == ["1", "12"]


@pytest.mark.slow
async def test_a_wedged_worker_loses_its_traffic_and_serves_again_when_it_wakes_up(state: Path) -> None:
    async with (
        servers.system(state, "--bench", "--workers", "2", paper__enabled="false", bridge__deadline_s=4) as system,
        servers.watching(state) as fleet,
        hosting(system.address) as host,
    ):
        wedged, other = system.pids["worker-1"], system.pids["worker-2"]
        async with loaded(system.address, ticker("null"), 16) as load:
            await grows(lambda: load.good, 200)
            os.kill(wedged, signal.SIGSTOP)
            try:
                await eventually(lambda: pids_of(fleet, "worker") == {other})
                async with asyncio.timeout(WEDGED_S):
                    while await connected_workers(state) > 1:  # noqa: ASYNC110 - only asking tells
                        await asyncio.sleep(0.1)
                lost_s = time.monotonic()  # what is asked from here on is answered by the other one
                before = await answered(system.admin("worker-2"))
                for _ in range(500):
                    assert "data" in await host("null", "ticker", symbol="BTC_USDT")
                assert await answered(system.admin("worker-2")) >= before + 500
            finally:
                os.kill(wedged, signal.SIGCONT)
            await eventually(lambda: pids_of(fleet, "worker") == {wedged, other}, 30)
            served = await answered(system.admin("worker-1"))
            await grows(lambda: load.good, 500)
        assert load.broken == []
        assert [asked for asked in load.asked if asked.sent_s > lost_s and "data" not in asked.reply] == []
        assert await answered(system.admin("worker-1")) > served


async def connected_workers(state: Path) -> int:
    """Workers that the bus still delivers to."""
    found = msgspec.json.decode(await servers.get(f"http://127.0.0.1:{server.settings(state).monitor_port}/connz"))
    return sum(one["name"] == "fmzbus worker" for one in found["connections"])


async def answered(admin: str) -> int:
    """How many tickers of /null a worker has answered."""
    text = await servers.get(f"{admin}/metrics")
    return sum(int(float(count)) for count in re.findall(r'fmzbus_request_seconds_count{exchange="null".*} (\S+)', text))


async def test_a_flood_is_answered_busy_at_once_and_the_others_rightly(state: Path) -> None:
    async with (
        exchanging() as exchange,
        servers.nats(state),
        servers.worker(state, **exchange.settings),
        servers.bridge(state, bridge__max_in_flight=8, **exchange.settings) as (_, address),
        hosting(address) as host,
    ):
        exchange.hold()
        inside = [asyncio.create_task(buy(host, number)) for number in range(1, 9)]
        await eventually(lambda: len(exchange.arrivals) == 8)
        async with asyncio.timeout(AT_ONCE_S):
            replies = await asyncio.gather(*(buy(host, number) for number in range(9, 109)))
        assert replies == [{"error": "network busy: 8 requests are in flight already"}] * 100
        assert not any(task.done() for task in inside)
        exchange.release()
        assert await asyncio.gather(*inside) == [{"data": {"id": number}} for number in range(1, 9)]
        assert_number(await buy(host, 109), 109)
        assert sorted(map(int, exchange.tags("order"))) == [*range(1, 9), 109]


async def test_a_full_worker_says_busy_at_once(state: Path) -> None:
    async with (
        exchanging() as exchange,
        servers.nats(state),
        servers.worker(state, workers__max_in_flight=4, **exchange.settings),
        servers.bridge(state, **exchange.settings) as (_, address),
        hosting(address) as host,
    ):
        exchange.hold()
        inside = [asyncio.create_task(buy(host, number)) for number in range(1, 5)]
        await eventually(lambda: len(exchange.arrivals) == 4)
        async with asyncio.timeout(AT_ONCE_S):
            reply = await buy(host, 5)
        assert reply == {"error": "network busy: a worker has 4 requests in flight; nothing was sent"}
        exchange.release()
        assert await asyncio.gather(*inside) == [{"data": {"id": number}} for number in range(1, 5)]
        assert_number(await buy(host, 6), 6)
        assert sorted(map(int, exchange.tags("order"))) == [1, 2, 3, 4, 6]


async def test_without_a_worker_the_answer_comes_at_once(state: Path) -> None:
    async with (
        exchanging() as exchange,
        servers.nats(state),
        servers.bridge(state, **exchange.settings) as (_, address),
        hosting(address) as host,
    ):
        async with asyncio.timeout(AT_ONCE_S):
            assert await buy(host, 1) == {"error": "network: no worker serves held now"}
            assert await host("null", "ticker", symbol="BTC_USDT") == {"error": "network: no worker is running yet"}
        async with servers.worker(state, bench="true", **exchange.settings):
            await until_answered(host)
        async with asyncio.timeout(AT_ONCE_S):  # it was there and is gone: its exchange is still known by name
            assert await host("null", "ticker", symbol="BTC_USDT") == {"error": "network: no worker serves null now"}
            assert await buy(host, 2) == {"error": "network: no worker serves held now"}
        assert exchange.arrivals == []


@pytest.mark.slow
async def test_whatever_dies_is_restarted_with_growing_patience_and_the_fleet_is_whole_again(state: Path) -> None:
    async with servers.system(state, "--bench") as system, servers.watching(state) as fleet, hosting(system.address) as host:
        await whole(state)
        for name in ("bridge-1", "worker-1", "paper", "nats"):
            os.kill(system.pids[name], signal.SIGKILL)
        for name in ("bridge-1", "worker-1", "paper", "nats"):
            await system.running.said(rf"{name} ended \(SIGKILL\); restarting in 0.25 s")
        untouched = system.pids["worker-2"]
        dead = {system.pids["bridge-1"], system.pids["worker-1"]}

        def everybody() -> set[int]:
            return pids_of(fleet, "bridge") | pids_of(fleet, "worker")

        await eventually(lambda: len(everybody()) == 3 and not everybody() & dead, 30)
        after = await whole(state)
        assert untouched in {one["pid"] for one in after}
        assert [one["address"] for one in after if one["role"] == "bridge"] == [system.address]
        await until_answered(host)
        assert "data" in await host("paper", "ticker", symbol="BTC_USDT")
        await eventually(lambda: len(pids_of(fleet, "worker") - {untouched}) == 1)
        (again,) = pids_of(fleet, "worker") - {untouched}
        os.kill(again, signal.SIGKILL)
        await system.running.said(r"worker-1 ended \(SIGKILL\); restarting in 0.5 s")
        await eventually(lambda: len(everybody()) == 3 and again not in everybody(), 30)


async def whole(state: Path) -> list[dict[str, Any]]:
    """Wait until `fmzbus status --json` shows a bridge, a feeder and two workers, all ready. (A beat may be late on a busy machine.)"""
    async with asyncio.timeout(30):
        while True:
            alive = await status(state)
            if sorted(one["role"] for one in alive if one.get("ready", True)) == ["bridge", "feeder", "worker", "worker"]:
                return alive


async def status(state: Path) -> list[dict[str, Any]]:
    """What `fmzbus status --json` prints."""
    done = await asyncio.to_thread(
        subprocess.run, [COMMAND, "status", "--json", "--state", str(state)], check=True, capture_output=True, text=True
    )
    shown = msgspec.json.decode(done.stdout, type=dict[str, Any])
    assert shown["bus"] == f"nats://127.0.0.1:{server.settings(state).port}"
    alive: list[dict[str, Any]] = shown["alive"]
    return alive
