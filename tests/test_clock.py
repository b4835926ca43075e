"""Time on the bus: machines whose clocks are wrong, and what a process knows of the server's clock."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec import Raw, Struct

from bus import server, subjects
from bus.connection import MAX_DOUBT_S, Bus, connected
from bus.messages import Failure, Request, Success, decode_reply, encode_exact
from bus.seal import Sealer, frame
from tests import servers
from tests.held import Exchange, exchanging
from tests.host import hosting
from tests.servers import eventually
from workers.venues.null import TICKER

pytestmark = pytest.mark.slow

SHIFT = """
import os, time

shift_ns = int(os.environ["CLOCK_SHIFT_S"]) * 10**9
real_ns = time.time_ns
time.time_ns = lambda: real_ns() + shift_ns
time.time = lambda: time.time_ns() / 1e9
"""
"""A sitecustomize.py: the wall clock of its process is off, the monotonic one is not. (datetime's own now() cannot be replaced without
breaking whoever compares the type; nothing on the way of a request asks it.)"""

SHIFTS = [3, -3, 3600]
"""3 s as real machines are off; an hour, because the paper exchange's window of 5 s would forgive 3 s to a wall clock used after all."""


FULL_MS = 9_500
"""A request's deadline on the bus: the host's 10 s less half a second."""


class Parts(Struct):
    """What is shared by the tests: everything but the worker. settings: of a bridge or worker beside it."""

    state: Path
    exchange: Exchange
    settings: dict[str, object]


@pytest_asyncio.fixture(scope="module")
async def parts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parts]:
    state = tmp_path_factory.mktemp("clock") / "s"
    async with exchanging() as exchange, servers.nats(state):
        env = servers.process_env(state, "worker", paper__port=0)
        async with servers.running(sys.executable, "-m", "workers.venues.paper", env=env) as paper:
            port = (await paper.said(r'"port":(\d+)'))[1]
            yield Parts(state, exchange, {"bench": "true", "venues__paper__base_url": f"http://127.0.0.1:{port}", **exchange.settings})


@asynccontextmanager
async def wrong_clock(parts: Parts, module: str, shift_s: int, folder: Path) -> AsyncIterator[servers.Running]:
    """A bridge or a worker on a machine whose clock is wrong by that much."""
    (folder / "sitecustomize.py").write_text(SHIFT)
    role = module.rstrip("s")
    env = servers.process_env(parts.state, role, bridge__port=0, **parts.settings)
    env |= {"PYTHONPATH": str(folder), "CLOCK_SHIFT_S": str(shift_s)}
    async with servers.running(sys.executable, "-m", module, env=env) as one:
        logged = await one.said(r'"time_ms":(\d+),.*"event":"ready"')
        assert int(logged[1]) / 1000 - time.time() == pytest.approx(shift_s, abs=1.5)  # it is wrong indeed
        yield one


@asynccontextmanager
async def operating(state: Path) -> AsyncIterator[Bus]:
    async with connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        yield bus


async def asked(bus: Bus, state: Path, left_ms: int) -> Success | Failure:
    """A worker's reply to a request that ends in so many ms."""
    key_id, sealed, mac_key = Sealer(state / "keys").box("access", "secret")
    request = Request(
        exchange="null",
        path="null",
        method="ticker",
        params=Raw(b'{"symbol":"BTC_USDT"}'),
        expires_at_ms=bus.now_ms() + left_ms,
        idempotency_key="",
        key_id=key_id,
        sealed=sealed,
    )
    inbox = await bus.nc.subscribe("_INBOX.bridge.test")  # a worker may answer bridges only
    await bus.nc.publish(subjects.rpc("null", "ticker"), frame(encode_exact(request), mac_key), reply="_INBOX.bridge.test")
    reply = await inbox.next_msg(5)
    await inbox.unsubscribe()
    return decode_reply(reply.data)


@pytest.mark.slow
@pytest.mark.parametrize("shift_s", SHIFTS)
async def test_a_worker_whose_clock_is_wrong_serves_as_any_other(shift_s: int, parts: Parts, tmp_path: Path) -> None:
    async with (
        wrong_clock(parts, "workers", shift_s, tmp_path),
        servers.bridge(parts.state, **parts.settings) as (_, address),
        hosting(address) as anybody,
        operating(parts.state) as bus,
    ):
        host = anybody.other(f"clock{shift_s}", "secret")
        before_ms = time.time() * 1000
        assert (await host("held", "trade", symbol="BTC_USDT", type="buy", price=1, amount=7))["data"] == {"id": 7}
        after_ms = time.time() * 1000
        signed_ms = parts.exchange.arrivals[-1].signed_ms
        assert before_ms - MAX_DOUBT_S * 1000 <= signed_ms <= after_ms + MAX_DOUBT_S * 1000

        placed = await host("paper", "trade", symbol="BTC_USDT", type="buy", price=-1, amount=100)
        found = await host("paper", "order", symbol="BTC_USDT", id=placed["data"]["id"])
        assert found["data"]["status"] == "closed"
        assert {row["currency"] for row in (await host("paper", "accounts"))["data"]} >= {"BTC", "USDT"}

        in_time = await asked(bus, parts.state, 2_000)
        assert isinstance(in_time, Success)
        assert bytes(in_time.data).startswith(bytes(TICKER)[:20])
        too_late = await asked(bus, parts.state, -1_000)
        assert too_late == Failure(code="expired", message="the request reached a worker too late; nothing was sent")
        assert too_late.error.text == "timeout: the request reached a worker too late; nothing was sent"


@pytest.mark.slow
@pytest.mark.parametrize("shift_s", [3, -3600])
async def test_a_bridge_whose_clock_is_wrong_gives_each_request_its_full_time(shift_s: int, parts: Parts, tmp_path: Path) -> None:
    async with servers.worker(parts.state, **parts.settings), wrong_clock(parts, "bridge", shift_s, tmp_path) as bridge:
        address = (await bridge.said(r'"event":"ready","address":"([^"]+)"'))[1]
        async with hosting(address) as host, operating(parts.state) as bus:
            ears = await bus.nc.subscribe("rpc.held.trade")
            await bus.nc.flush()
            before_ms = time.time() * 1000
            assert (await host("held", "trade", symbol="BTC_USDT", type="buy", price=1, amount=8))["data"] == {"id": 8}
            after_ms = time.time() * 1000
            heard = await ears.next_msg(5)
            expires_at_ms = int(re.findall(rb'"expires_at_ms":(\d+)', heard.data)[0])
            doubt_ms = MAX_DOUBT_S * 1000
            assert before_ms + FULL_MS - doubt_ms <= expires_at_ms <= after_ms + FULL_MS + doubt_ms


@pytest.mark.parametrize("skew_s", [0.0, 86_400.0, -1_000.0])
async def test_bus_time_is_the_servers_clock_whatever_our_own_says(skew_s: float, parts: Parts) -> None:
    url = server.url(parts.state, "operator")
    async with connected(url, "operator", closed=lambda: None, monotonic=lambda: time.monotonic() + skew_s) as bus:
        assert bus.ready
        assert 0 < bus.doubt_s <= MAX_DOUBT_S
        assert_right(bus)


async def test_a_clock_that_goes_wrong_later_is_noticed_at_the_next_measurement(parts: Parts) -> None:
    skew_s = 0.0
    url = server.url(parts.state, "operator")
    async with connected(url, "operator", closed=lambda: None, monotonic=lambda: time.monotonic() + skew_s) as bus:
        skew_s = 3.0
        assert bus.now_ms() - time.time() * 1000 > 2_000
        await bus.measure_time()
        assert_right(bus)


async def test_a_process_in_doubt_of_the_time_is_not_ready_until_it_knows_it(parts: Parts) -> None:
    asked_clock = 0
    slow = True

    def monotonic() -> float:
        """A clock by which every round trip takes over 0.6 s."""
        nonlocal asked_clock
        asked_clock += 1
        return time.monotonic() + (0.6 * asked_clock if slow else 0)

    async with connected(server.url(parts.state, "operator"), "operator", closed=lambda: None, monotonic=monotonic) as bus:
        assert bus.nc.is_connected
        assert bus.doubt_s > MAX_DOUBT_S
        assert not bus.ready
        slow = False
        await eventually(lambda: bus.ready, 5)  # by itself, long before the next regular measurement
        assert_right(bus)


async def test_a_measurement_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    """A server that stalls, answers late once, and stalls again: the late answer alone would put bus time wrong by half its delay."""
    state = tmp_path / "s"
    asked_clock = 0

    def monotonic() -> float:
        nonlocal asked_clock
        asked_clock += 1
        if asked_clock == 1:  # the first request leaves now
            stall(nats.process.pid)
            asyncio.get_running_loop().call_later(0.7, os.kill, nats.process.pid, signal.SIGCONT)
        if asked_clock == 3:  # the second one
            stall(nats.process.pid)
        return time.monotonic()

    async with servers.nats(state) as nats, operating(state) as bus:
        doubt_s = bus.doubt_s
        bus._monotonic = monotonic
        try:
            with pytest.raises(TimeoutError):
                await bus.measure_time()
        finally:
            os.kill(nats.process.pid, signal.SIGCONT)
        bus._monotonic = time.monotonic
        assert bus.doubt_s == doubt_s
        assert_right(bus)


def stall(pid: int) -> None:
    """Stop a process, and return once none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)
    while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in Path(f"/proc/{pid}/task").glob("*/stat")):
        pass


def assert_right(bus: Bus) -> None:
    """Bus time is the server's, which runs on this machine, within the doubt that the process itself has."""
    before_ms = time.time() * 1000
    now_ms = bus.now_ms()
    after_ms = time.time() * 1000
    assert before_ms - bus.doubt_s * 1000 - 2 <= now_ms <= after_ms + bus.doubt_s * 1000 + 2
