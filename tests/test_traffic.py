"""`fmzbus bench-traffic`: what is due is sent, counted, and timed from when it was due."""

import asyncio
import os
import re
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web

from bus import traffic
from tests.servers import COMMAND, System

pytestmark = pytest.mark.slow


@asynccontextmanager
async def answering(delay_s: float = 0, error: str = "") -> AsyncIterator[tuple[str, list[dict[str, object]]]]:
    """A bridge that answers everything alike; yields its address and the requests it saw."""
    seen: list[dict[str, object]] = []

    async def handle(request: web.BaseRequest) -> web.Response:
        seen.append(msgspec.json.decode(await request.read()) | {"path": request.path})
        await asyncio.sleep(delay_s)
        return web.json_response({"error": error} if error else {"data": True})

    runner = web.ServerRunner(web.Server(handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


async def drive(address: str, **options: object) -> traffic.Second:
    settings = {"hosts": 3, "rate": 100, "seconds": 1.0, "trade": False, "seed": 7, "show": lambda number, second: None} | options
    return await traffic.drive(address, "paper", **settings)  # type: ignore[arg-type]


async def test_every_request_is_sent_once_and_counted() -> None:
    async with answering() as (address, seen):
        total = await drive(address, trade=True)
    assert total.sent == total.ok == len(seen)
    assert 90 <= total.sent <= 100
    assert {one["method"] for one in seen} == {"ticker", "depth", "accounts", "trade"}
    assert {one["access_key"] for one in seen} == {"traffic-0", "traffic-1", "traffic-2"}
    assert all(one["path"] == f"/paper/host-{str(one['access_key'])[-1]}" for one in seen)


async def test_the_same_seed_sends_the_same_requests() -> None:
    runs = []
    for _ in range(2):
        async with answering() as (address, seen):
            await drive(address)
            runs.append([(one["method"], one["params"], one["access_key"]) for one in seen])
    shorter = min(map(len, runs))
    assert runs[0][:shorter] == runs[1][:shorter]


async def test_errors_are_counted_by_their_first_words() -> None:
    async with answering(error="network busy: too much") as (address, _):
        total = await drive(address)
    assert (total.ok, total.errors) == (0, {"network busy": total.sent})
    total = await drive("http://127.0.0.1:1")
    assert total.errors == {"ClientConnectorError": total.sent}


async def test_a_slow_answer_shows_in_the_percentiles_and_holds_nothing_up() -> None:
    async with answering(delay_s=0.5) as (address, seen):
        total = await drive(address)
    assert total.sent == len(seen) >= 90
    assert total.percentile(50) >= 500


async def test_the_command_shows_a_live_line_and_a_sum(shared_system: System) -> None:
    process = await asyncio.create_subprocess_exec(
        COMMAND, "bench-traffic", "--hosts", "5", "--rate", "50", "--seconds", "2", "--trade", "--url", shared_system.address,
        env=dict(os.environ), stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 40)
    text = out.decode()
    assert process.returncode == 0, text
    assert re.search(r"^   1 s  sent +\d+  ok +\d+  errors    0  p50 +[\d.]+ ms  p99 +[\d.]+ ms$", text, re.M)
    total = re.search(r"^all +sent +(\d+)  ok +(\d+)", text, re.M)
    assert total
    assert total[1] == total[2]


async def test_ctrl_c_shows_the_sum() -> None:
    async with answering() as (address, _):
        process = await asyncio.create_subprocess_exec(
            COMMAND, "bench-traffic", "--seconds", "60", "--url", address, stdout=PIPE, stderr=PIPE
        )
        assert process.stdout
        first = await asyncio.wait_for(process.stdout.readline(), 20)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 20)
    assert first.startswith(b"   1 s")
    assert re.search(rb"^all +sent +\d+  ok +\d+  errors    0 .*\(\d+/s of 100/s asked for\)$", out, re.M)
    assert (process.returncode, err) == (0, b"")


async def test_an_error_is_not_cut_inside_its_quotes() -> None:
    async with answering(error="no exchange named 'a:b' here; did you mean one of the many others that there are?: x") as (address, _):
        total = await drive(address)
    assert total.errors == {"no exchange named 'a:b' here; did you mean one of the many others that there are?": total.sent}


async def test_trading_is_for_the_paper_exchange_only() -> None:
    process = await asyncio.create_subprocess_exec(
        COMMAND, "bench-traffic", "--exchange", "okx", "--trade", env=dict(os.environ), stdout=PIPE, stderr=PIPE
    )
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert b"for the paper exchange only" in err
