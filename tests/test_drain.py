"""SIGTERM, under load: what was asked is answered, nobody is cut off, and nothing stays behind."""

import asyncio
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bus import up
from bus.fleet import Fleet
from tests import servers
from tests.held import exchanging
from tests.host import Host, hosting
from tests.load import Load, loaded, ticker
from tests.servers import eventually, grows, pids_of

pytestmark = pytest.mark.slow

HOSTS = 32
HELD = 20


async def replaced(fleet: Fleet, role: str, before: Iterable[int], gone: int) -> set[int]:
    """Wait until another process has the place of the one that went; who serves then."""
    others = set(before) - {gone}
    await eventually(lambda: others <= (now := pids_of(fleet, role)) and gone not in now and len(now) == len(others) + 1, 30)
    return pids_of(fleet, role)


def assert_all_answered(load: Load, answer: dict[str, Any]) -> None:
    assert load.broken == []
    assert load.errors == []
    assert all(asked.reply == answer for asked in load.asked)


async def buy(host: Host, number: int) -> dict[str, Any]:
    return await host("held", "trade", symbol="BTC_USDT", type="buy", price=1, amount=number)


@pytest.mark.slow
@pytest.mark.parametrize("bridges", [2, 1])
async def test_bridges_are_replaced_one_by_one_under_load_and_no_request_fails(bridges: int, state: Path) -> None:
    async with (
        servers.system(state, "--bench", "--bridges", str(bridges), paper__enabled="false") as system,
        servers.watching(state) as fleet,
        hosting(system.address) as host,
    ):
        answer = await host("null", "ticker", symbol="BTC_USDT")
        first = {name: pid for name, pid in system.pids.items() if name.startswith("bridge-")}
        assert len(first) == bridges
        serving = set(first.values())
        async with loaded(system.address, ticker("null"), HOSTS) as load:
            await grows(lambda: load.good, 200)
            for name, pid in first.items():
                os.kill(pid, signal.SIGTERM)
                serving = await replaced(fleet, "bridge", serving, pid)
                assert f"{name} ended (status 0); restarting" in system.running.output
                await grows(lambda: load.good, 200)
        assert_all_answered(load, answer)
        # A host of this load leaves a connection only after `Connection: close`: each of the first ones was told.
        assert load.said_close >= HOSTS
        assert not any(servers.alive(pid) for pid in first.values())


@pytest.mark.slow
async def test_a_worker_is_replaced_under_load_and_no_request_fails(state: Path) -> None:
    async with (
        servers.system(state, "--bench", "--workers", "2", paper__enabled="false") as system,
        servers.watching(state) as fleet,
        hosting(system.address) as host,
    ):
        answer = await host("null", "ticker", symbol="BTC_USDT")
        gone, other = system.pids["worker-1"], system.pids["worker-2"]
        async with loaded(system.address, ticker("null"), HOSTS) as load:
            await grows(lambda: load.good, 200)
            os.kill(gone, signal.SIGTERM)
            await replaced(fleet, "worker", [gone, other], gone)
            await grows(lambda: load.good, 200)
        assert_all_answered(load, answer)
        assert load.said_close == 0
        assert "worker-1 ended (status 0); restarting" in system.running.output


@pytest.mark.slow
async def test_a_worker_finishes_what_a_slow_exchange_holds_while_another_answers(state: Path) -> None:
    async with exchanging() as exchange, servers.nats(state), servers.watching(state) as fleet:
        config = {"bench": "true", **exchange.settings}
        async with (
            servers.worker(state, **config) as leaving,
            servers.bridge(state, **config) as (_, address),
            hosting(address) as host,
        ):
            exchange.hold()
            asking = [asyncio.create_task(buy(host, number)) for number in range(1, HELD + 1)]
            await eventually(lambda: len(exchange.arrivals) == HELD)
            async with servers.worker(state, **config) as staying:
                leaving.send(signal.SIGTERM)
                await eventually(lambda: pids_of(fleet, "worker") == {staying.process.pid})  # it said good-bye
                for number in range(HELD):
                    assert "data" in await host("null", "ticker", symbol=f"{number}_USDT")
                assert leaving.process.returncode is None
                assert not any(task.done() for task in asking)
                exchange.release()
                assert await asyncio.gather(*asking) == [{"data": {"id": number}} for number in range(1, HELD + 1)]
                await asyncio.wait_for(leaving.process.wait(), 10)
                assert leaving.process.returncode == 0
        assert sorted(map(int, exchange.tags("order"))) == list(range(1, HELD + 1))


@pytest.mark.slow
async def test_worker_and_bridge_end_well_even_when_the_bus_is_gone(state: Path) -> None:
    async with (
        exchanging() as exchange,
        servers.nats(state) as nats,
        servers.worker(state, **exchange.settings) as worker,
        servers.bridge(state, bridge__deadline_s=4, **exchange.settings) as (bridge, address),
        hosting(address) as host,
    ):
        exchange.hold()
        asking = [asyncio.create_task(buy(host, number)) for number in range(1, HELD + 1)]
        await eventually(lambda: len(exchange.arrivals) == HELD)
        nats.send(signal.SIGKILL)
        for one in (worker, bridge):
            await one.said("disconnected from the bus")
            one.send(signal.SIGTERM)
        exchange.release()
        for reply in await asyncio.gather(*asking):  # the exchange did it, and nobody could bring the answer
            assert reply["error"].startswith("outcome unknown: ")
        for one in (worker, bridge):
            await asyncio.wait_for(one.process.wait(), 20)
            assert one.process.returncode == 0, one.output
            assert "Traceback" not in one.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_the_whole_system_drains_and_leaves_nothing_behind(number: int, state: Path) -> None:
    async with exchanging() as exchange, servers.system(state, "--bench", "--bridges", "2", **exchange.settings) as system:
        assert up.running(state) == up.Running(system.running.process.pid, system.address)
        children = system.pids
        assert sorted(children) == ["bridge-1", "bridge-2", "feeder-1", "nats", "paper", "worker-1", "worker-2"]
        exchange.hold()
        async with hosting(system.address) as host:
            answer = await host("null", "ticker", symbol="BTC_USDT")
            asking = [asyncio.create_task(buy(host, one)) for one in range(1, HELD + 1)]
            async with loaded(system.address, ticker("null"), HOSTS) as load:
                await grows(lambda: load.good, 200)
                await eventually(lambda: len(exchange.arrivals) == HELD)
                signalled_s = time.monotonic()
                os.killpg(system.running.process.pid, number)  # as a terminal does: the leader's group, which no child belongs to
                await eventually(lambda: load.said_close)
                exchange.release()
                assert await asyncio.gather(*asking) == [{"data": {"id": one}} for one in range(1, HELD + 1)]
                await asyncio.wait_for(system.running.process.wait(), 30)
        assert system.running.process.returncode == 0
        assert load.errors == []
        assert all(asked.reply == answer for asked in load.asked if not asked.broken)
        assert [asked for asked in load.broken if asked.sent_s < signalled_s] == []
        assert {name for name, pid in children.items() if servers.alive(pid)} == set()
        assert not (state / "up.json").exists()
        assert up.running(state) is None
