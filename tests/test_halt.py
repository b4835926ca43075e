"""bus/halt.py and its commands against a real nats-server: kept on disk, changed by compare-and-set, found by every spelling."""

import asyncio
import os
import re
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from bus import server
from bus.connection import Bus, connected
from bus.errors import BusDown
from bus.halt import Halt, Halts, Record, path_name, path_names
from tests import servers
from tests.host import hosting

pytestmark = pytest.mark.slow

HALT = Halt("me@here", 1_795_168_693_000, "a test")
LATER = Halt("you@there", 1_795_168_700_000)
ACCOUNT = "0123456789abcdef"


@pytest_asyncio.fixture
async def bus(state: Path) -> AsyncIterator[Bus]:
    async with servers.nats(state), connected(server.url(state, "operator"), "operator", closed=lambda: None) as bus:
        yield bus


async def fmzbus(state: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command -> (exit status, standard output, standard error)."""
    env = os.environ | {"FMZBUS__STATE": str(state)}
    process = await asyncio.create_subprocess_exec(servers.COMMAND, *arguments, env=env, stdout=PIPE, stderr=PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def test_a_halt_stops_whom_it_names_and_nobody_else() -> None:
    account = Record().halted(HALT, ACCOUNT, "")
    assert account.stops(ACCOUNT, "okx", "okx/r1") == (f"account {ACCOUNT}", HALT)
    assert account.stops("another", "okx", "okx/r1") is None
    path = Record().halted(HALT, "", "okx/r1")
    assert path.stops(ACCOUNT, "okx", "okx/R1") == ("path okx/r1", HALT)
    assert path.stops(ACCOUNT, "okx", "okx/r2") is None
    assert path.stops(ACCOUNT, "okx", "okx") is None
    whole = Record().halted(HALT, "", "okx")
    assert whole.stops(ACCOUNT, "okx", "okx/r1") == ("path okx", HALT)
    assert whole.stops(ACCOUNT, "okx_demo", "okx_demo/r1") is None
    assert Record().halted(HALT, "", "").stops("anybody", "any", "any/where") == ("everything", HALT)


def test_a_route_is_halted_under_both_of_its_names() -> None:
    for named in ("digitalasset", "paper", "digitalasset/r1", "paper/r1"):
        assert Record().halted(HALT, "", named).stops(ACCOUNT, "paper", "digitalasset/R1") == (f"path {named}", HALT)


def test_a_path_is_spelled_in_one_way() -> None:
    assert path_name(" /OKX/Robot-7/ ") == "okx/robot-7"
    assert path_names("okx", "okx") == ("okx",)
    assert path_names("paper", "x/A/b") == ("x/a/b", "paper/a/b", "x", "paper")


def test_halts_are_independent_and_the_first_keeps_its_time() -> None:
    record = Record().halted(HALT, ACCOUNT, "okx").halted(LATER, ACCOUNT, "").halted(LATER, "", "")
    assert record == Record(all=LATER, accounts={ACCOUNT: HALT}, paths={"okx": HALT})
    assert record.resumed("", "") == Record(accounts={ACCOUNT: HALT}, paths={"okx": HALT})
    assert record.resumed("", "okx").resumed(ACCOUNT, "") == Record(all=LATER)
    assert record.resumed("another", "") == record


async def test_where_no_record_was_written_nothing_is_halted(bus: Bus) -> None:
    assert await Halts(bus).read() == (Record(), 0)


async def test_commands_at_once_all_count(bus: Bus) -> None:
    halts = [Halts(bus) for _ in range(8)]

    def adding(number: int) -> asyncio.Future[Record]:
        return asyncio.ensure_future(halts[number].change(lambda record: record.halted(HALT, "", f"okx/r{number}")))

    await asyncio.gather(*(adding(number) for number in range(8)))
    record, _ = await halts[0].read()
    assert record == Record(paths={f"okx/r{number}": HALT for number in range(8)})


async def test_a_bucket_of_other_replicas_is_used_as_it_is(bus: Bus) -> None:
    await Halts(bus, 1).change(lambda record: record.halted(HALT, "", ""))
    assert (await Halts(bus, 3).read())[0] == Record(all=HALT)


async def test_a_record_that_is_not_one_of_ours_is_not_guessed(bus: Bus) -> None:
    await Halts(bus).read()
    await bus.nc.jetstream().publish("$KV.halt.record", b'{"all": "yes"}')
    with pytest.raises(BusDown, match="not readable"):
        await Halts(bus).read()


async def test_a_bucket_lost_with_its_disk_is_made_again(bus: Bus) -> None:
    halts = Halts(bus)
    await halts.change(lambda record: record.halted(HALT, "", ""))
    await bus.nc.jetstream().delete_stream("KV_halt")
    with pytest.raises(BusDown):
        await halts.read()
    assert await halts.read() == (Record(), 0)


async def test_a_worker_may_read_the_record_and_not_write_it(state: Path) -> None:
    async with servers.nats(state), connected(server.url(state, "worker"), "worker", closed=lambda: None) as worker:
        halts = Halts(worker, timeout_s=0.3)
        assert await halts.read() == (Record(), 0)
        with pytest.raises(BusDown, match="written"):
            await halts.change(lambda record: record.halted(HALT, "", ""))
        assert await halts.read() == (Record(), 0)


async def test_halt_and_resume_as_a_person_types_them(state: Path) -> None:
    async with servers.nats(state) as nats:
        assert (await fmzbus(state, "halt", "--show"))[::2] == (0, "nothing is halted\n")
        status, out, _ = await fmzbus(state, "halt", "--reason", "the  market\nis mad")
        assert status == 0
        assert "everything" in out
        assert "the market is mad" in out
        assert "cancels and reads go on" in out
        status, out, _ = await fmzbus(state, "halt", "--account", ACCOUNT.upper(), "--path", "/OKX/Robot-7", "--json")
        assert status == 0
        record = msgspec.json.decode(out, type=Record)
        assert record.all is not None
        assert (record.all.reason, list(record.accounts), list(record.paths)) == ("the market is mad", [ACCOUNT], ["okx/robot-7"])
        await nats.stop(9)
    async with servers.nats(state):
        status, out, _ = await fmzbus(state, "halt", "--show", "--json")
        assert msgspec.json.decode(out, type=Record) == record
        status, out, _ = await fmzbus(state, "resume")
        assert status == 0
        assert out.startswith("ended 1 halt\n")
        assert f"account {ACCOUNT}" in out
        assert "path okx/robot-7" in out
        assert "everything" not in out
        status, out, _ = await fmzbus(state, "resume", "--path", "okx/robot-8")
        assert (status, out.splitlines()[0]) == (1, "nothing was halted there")
        status, out, err = await fmzbus(state, "resume", "--account", ACCOUNT, "--path", "okx/robot-7")
        assert (status, out, err) == (0, "ended 2 halts\n", "nothing is halted\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--account", "my-key"), "expected the 16 signs [0-9a-f] of an account's hash, got 'my-key'; nothing was changed"),
        (("--path", "/"), "expected a path such as okx/robot-7, got '/'; nothing was changed"),
        (("--path", "okx robot"), "nothing was changed"),
        ((), "NOT halted: no bus answers"),
    ],
)
async def test_a_halt_that_stops_nothing_says_so(state: Path, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = await fmzbus(state, "halt", *arguments)
    assert (status, out) == (1, "")
    assert said in err


REST: dict[str, Any] = {"symbol": "BTC_USDT", "type": "buy", "price": "20000", "amount": "0.01"}
"""An order that rests far below the market."""


async def test_a_running_system_stops_orders_within_a_second_while_cancels_go_on_and_after_a_restart(state: Path) -> None:
    async with servers.system(state) as system, hosting(system.address) as host:
        placed = (await host("paper/r1", "trade", **REST))["data"]["id"]
        status, _, err = await fmzbus(state, "halt", "--path", "paper/r1", "--reason", "mad market")
        assert (status, err) == (0, "")
        await asyncio.sleep(1)  # the promise itself: from here on no worker lets one pass
        for _ in range(10):
            refused = (await host("paper/r1", "trade", **REST))["error"]
            assert re.fullmatch(r"guard: path paper/r1 is halted since .* UTC by \S+: mad market; order not sent", refused)
        assert (await host("paper/r1", "__api_orders", **REST))["error"].endswith("`cancel` goes on")
        assert [row["id"] for row in (await host("paper/r1", "orders"))["data"]] == [placed]
        assert (await host("paper/r1", "cancel", symbol="BTC_USDT", id=placed))["data"] is True
        assert "data" in await host("paper/r2", "trade", **REST)
    async with servers.system(state) as system, hosting(system.address) as host:
        assert (await host("paper/r1", "trade", **REST))["error"].startswith("guard: path paper/r1 is halted")
        assert (await fmzbus(state, "resume", "--path", "PAPER/r1"))[0] == 0
        await asyncio.sleep(1)
        for _ in range(4):
            assert "data" in await host("paper/r1", "trade", **REST)
