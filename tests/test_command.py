"""The `fmzbus` command as a person types it, against a running system."""

import asyncio
import contextlib
import os
import pty
import re
import time
from asyncio.subprocess import PIPE
from pathlib import Path

import msgspec
import pytest

from bus import call
from tests import servers
from tests.servers import COMMAND, System

pytestmark = pytest.mark.slow


async def fmzbus(system: System, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Run it -> (exit status, standard output, standard error)."""
    process = await asyncio.create_subprocess_exec(
        COMMAND, *arguments, env=os.environ | {"FMZBUS__STATE": str(system.state)} | env, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(b""), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_help_teaches_every_command(shared_system: System) -> None:
    status, out, _ = await fmzbus(shared_system, "--help")
    assert status == 0
    for command in (
        "up",
        "bridge",
        "worker",
        "feeder",
        "call",
        "status",
        "watch",
        "doctor",
        "sessions",
        "keys",
        "logs",
        "orders",
        "order",
        "settle",
        "cancel-all",
        "halt",
        "resume",
        "backup",
        "restore",
        "paper",
        "bench-traffic",
        "new-venue",
        "check-venue",
    ):
        assert re.search(rf"^\s+{command} +\S", out, re.M), command
        one_status, one, _ = await fmzbus(shared_system, command, "--help")
        assert one_status == 0
        assert "--help" in one


async def test_call_trades_on_paper_with_a_demo_key(shared_system: System) -> None:
    status, out, _ = await fmzbus(shared_system, "call", "paper", "trade", "symbol=BTC_USDT", "type=buy", "price=-1", "amount=100")
    assert status == 0
    order_id = msgspec.json.decode(out)["data"]["id"]
    _, out, _ = await fmzbus(shared_system, "call", "paper", "order", "symbol=BTC_USDT", f"id={order_id}")
    order = msgspec.json.decode(out)["data"]
    assert (order["id"], order["status"], order["type"], order["price"]) == (order_id, "closed", "buy", 0)
    assert 0 < order["avg_price"] * order["deal_amount"] <= 100


async def test_call_takes_the_keys_of_the_environment(shared_system: System) -> None:
    keys = {"FMZBUS_ACCESS_KEY": "environment", "FMZBUS_SECRET_KEY": "one"}
    status, out, _ = await fmzbus(shared_system, "call", "paper", "accounts", **keys)
    assert (status, '"data"' in out) == (0, True)
    status, out, _ = await fmzbus(shared_system, "call", "paper", "accounts", **keys | {"FMZBUS_SECRET_KEY": "another"})
    assert status == 1
    assert "bound to another secret" in out


async def test_call_without_keys_says_where_they_come_from(shared_system: System) -> None:
    status, _, err = await fmzbus(shared_system, "call", "bitgo", "accounts")
    assert status == 1
    assert "FMZBUS_ACCESS_KEY and FMZBUS_SECRET_KEY" in err


async def test_call_prompts_at_a_terminal_and_shows_no_secret(shared_system: System) -> None:
    master, terminal = pty.openpty()
    env = os.environ | {"FMZBUS__STATE": str(shared_system.state)}
    process = await asyncio.create_subprocess_exec(
        COMMAND, "call", "bitgo", "nonsense", env=env, start_new_session=True, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    os.set_blocking(master, False)
    shown = b""

    def read() -> None:
        nonlocal shown
        with contextlib.suppress(OSError):  # what a terminal says when its last program has gone
            shown += os.read(master, 4096)

    asyncio.get_running_loop().add_reader(master, read)
    try:
        await servers.eventually(lambda: b"access key" in shown)
        os.write(master, b"my-access\n")
        await servers.eventually(lambda: b"secret key" in shown)
        os.write(master, b"my-secret\n")
        await servers.eventually(lambda: b"nonsense not support" in shown)
        assert await process.wait() == 1
    finally:
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)
    assert b"my-secret" not in shown


async def test_call_names_futures_calls_as_fmz_does(shared_system: System) -> None:
    keys = {"FMZBUS_ACCESS_KEY": "futures", "FMZBUS_SECRET_KEY": "s"}
    for arguments, data in (
        (["SetContractType", "swap"], {"InstrumentID": "swap", "instrument": "swap"}),
        (["SetDirection", "buy"], True),
        (["SetMarginLevel", "level=7"], True),
        (["GetPosition"], []),
        (["io", "code=3", 'args=["swap"]'], []),
    ):
        _, out, _ = await fmzbus(shared_system, "call", "paper/cli", *arguments, **keys)
        assert msgspec.json.decode(out)["data"] == data


SUMS = r"{} calls: {}; p50 [\d.]+ ms, p90 [\d.]+ ms, p99 [\d.]+ ms; in the bridge p50 ([\d.]+) ms, p99 [\d.]+ ms"


async def test_call_repeats_and_traces(shared_system: System) -> None:
    status, out, err = await fmzbus(shared_system, "call", "paper", "accounts", "--repeat", "20", "--trace")
    assert status == 0
    assert out.count('"data"') == 1
    assert re.search(f"^{SUMS.format(20, 'miss 20')}$", err, re.M), err  # nothing of one account comes from a cache
    timing = re.search(r"^Server-Timing: (.*)$", err, re.M)
    assert timing
    hops = dict(re.findall(r"(\w+);dur=([\d.]+)", timing[1]))
    assert hops.keys() == {"bridge", "bus", "worker", "venue", "total"}
    parts = sum(float(hops[hop]) for hop in ("bridge", "bus", "worker", "venue"))
    assert parts == pytest.approx(float(hops["total"]), abs=0.01)
    assert float(hops["venue"]) > 0
    assert "Fmzbus-Cache: miss" in err


async def test_call_says_how_much_came_from_the_cache_and_how_long_the_bridge_took(shared_system: System) -> None:
    _, _, err = await fmzbus(shared_system, "call", "paper", "ticker", "symbol=BTC_USDT", "--repeat", "1000")
    found = re.fullmatch(SUMS.format(1000, r"hit (\d+)(?:, shared \d+)?(?:, miss \d+)?") + "\n", err)
    assert found, err
    assert int(found[1]) >= 900  # 994 or so where nothing else runs: the first asks the exchange, and the next come before its feeder
    assert float(found[2]) < 1  # 0.05 where nothing else runs


async def test_a_raw_call_takes_its_verb(shared_system: System) -> None:
    _, out, _ = await fmzbus(shared_system, "call", "paper", "__api_/no/such", "a=1", "--verb", "GET")
    assert msgspec.json.decode(out)["data"] == {"verb": "GET", "path": "/no/such", "params": {"a": "1"}}


async def test_call_without_a_bridge_asks_the_right_question(shared_system: System) -> None:
    status, _, err = await fmzbus(shared_system, "call", "paper", "ticker", "--url", "http://127.0.0.1:1")
    assert status == 1
    assert "is `fmzbus up` running?" in err


async def test_status_lists_the_fleet(shared_system: System) -> None:
    status, out, _ = await fmzbus(shared_system, "status", "--json")
    assert status == 0
    told = msgspec.json.decode(out)
    assert "@" not in told["bus"]
    assert sorted(one["role"] for one in told["alive"]) == ["bridge", "feeder", "worker", "worker"]
    pids = shared_system.pids
    assert {one["pid"] for one in told["alive"]} == {pids[name] for name in ("bridge-1", "feeder-1", "worker-1", "worker-2")}
    assert all(one["serves"] == ["bitgo", "null", "paper"] for one in told["alive"] if one["role"] == "worker")
    _, table, _ = await fmzbus(shared_system, "status")
    assert shared_system.address in table
    feeder = next(one["process"] for one in told["alive"] if one["role"] == "feeder")
    assert re.search(rf"^{feeder} .* paper 0 ", table, re.M), table
    assert re.search(rf"^paper +candles depth ticker trades +{feeder} +\d+ +\d+ +0 +\d+ quiet ones *$", table, re.M), table


async def test_status_without_a_bus_says_so(shared_system: System, tmp_path: Path) -> None:
    started = time.monotonic()
    status, _, err = await fmzbus(shared_system, "status", FMZBUS__STATE=f"{tmp_path}/nobody")
    assert (status, "is `fmzbus up` running" in err) == (1, True)
    assert time.monotonic() - started < 10
    assert not (tmp_path / "nobody").exists()


async def test_sessions_are_listed_and_cleared(shared_system: System) -> None:
    keys = {"FMZBUS_ACCESS_KEY": "sessions", "FMZBUS_SECRET_KEY": "s"}
    await fmzbus(shared_system, "call", "paper/listed", "SetContractType", "swap", **keys)
    _, out, _ = await fmzbus(shared_system, "sessions")
    found = re.search(r"^(paper=2Flisted\.[0-9a-f]{16}) +swap +- +-", out, re.M)
    assert found, out
    status, _, err = await fmzbus(shared_system, "sessions", "clear", "no.such", "--yes")
    assert (status, "no session named no.such" in err) == (1, True)
    status, out, err = await fmzbus(shared_system, "sessions", "clear", found[1], "--yes")
    assert (status, out) == (0, "forgot 1\n"), err
    _, out, _ = await fmzbus(shared_system, "sessions")
    assert found[1] not in out


async def test_keys_rotate_while_requests_go_on(shared_system: System) -> None:
    status, _, err = await fmzbus(shared_system, "keys", "new")
    assert (status, "`fmzbus keys rotate` replaces them" in err) == (1, True)
    before = {path.name for path in (shared_system.state / "keys").glob("*.secret")}
    status, out, _ = await fmzbus(shared_system, "keys", "rotate")
    assert status == 0
    assert {path.name for path in (shared_system.state / "keys").glob("*.secret")} == before | {f"{out.split()[0]}.secret"}
    for _ in range(3):
        status, out, _ = await fmzbus(shared_system, "call", "paper", "accounts")
        assert (status, '"data"' in out) == (0, True)


async def test_logs_are_shown_for_people_and_programs(shared_system: System) -> None:
    await fmzbus(shared_system, "call", "paper", "cancel", "symbol=BTC_USDT", "id=999999")
    _, out, _ = await fmzbus(shared_system, "logs", "worker")
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z info worker-\d+ write exchange=paper method=cancel .*outcome=venue_rejected", out, re.M
    )
    _, out, _ = await fmzbus(shared_system, "logs", "--json", "-n", "3")
    lines = [msgspec.json.decode(line) for line in out.splitlines()]
    assert len(lines) == 3
    assert [line["time_ms"] for line in lines] == sorted(line["time_ms"] for line in lines)


async def test_a_config_mistake_is_named_before_anything_starts(shared_system: System) -> None:
    status, _, err = await fmzbus(shared_system, "up", FMZBUS__BRIDGE__PORTT="1")
    assert status == 1
    assert "unknown field `portt` - at `$.bridge`" in err


@pytest.mark.parametrize("command", [("up", "--port", "0", "--admin-port", "0"), ("keys", "new")])
async def test_a_state_folder_that_is_a_file_is_named_in_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "afile").touch()
    process = await asyncio.create_subprocess_exec(COMMAND, *command, "--state", str(tmp_path / "afile"), stdout=PIPE, stderr=PIPE)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, out) == (1, b"")
    assert re.fullmatch(rf"fmzbus: {re.escape(str(tmp_path / 'afile'))}\S*: (File exists|Not a directory)\n", err.decode())


async def test_a_lookup_that_reaches_no_bus_says_one_thing(tmp_path: Path) -> None:
    env = os.environ | {"FMZBUS__STATE": str(tmp_path / "s"), "FMZBUS__NATS__URL": "nats://127.0.0.1:1"}
    for command in ("status", "sessions"):
        process = await asyncio.create_subprocess_exec(COMMAND, command, env=env, stdout=PIPE, stderr=PIPE)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1
        assert err.decode() == "fmzbus: no bus answers; is `fmzbus up` running on this state folder, or [nats] url right?\n"
    assert not (tmp_path / "s").exists()


def test_several_calls_add_up_to_one_line() -> None:
    replied = call.Replied(seconds=[0.001] * 999 + [0.5], bridge_ms=[0.05] * 999 + [7.0], answers={"miss": 1, "shared": 5, "hit": 994})
    assert (
        replied.line()
        == "1000 calls: hit 994, shared 5, miss 1; p50 1.00 ms, p90 1.00 ms, p99 1.00 ms; in the bridge p50 0.05 ms, p99 0.05 ms"
    )
    assert call.Replied(seconds=[0.001, 0.003], answers={"miss": 2}).line() == "2 calls: miss 2; p50 2.00 ms, p90 2.80 ms, p99 2.98 ms"


def test_arguments_that_are_not_k_v_are_named() -> None:
    with pytest.raises(ValueError, match="expected k=v, got 'BTC_USDT'"):
        call.body("ticker", ["BTC_USDT"], "a", "b")
    assert call.body("trade", ["symbol=A_B", "type=buy;x=1"], "a", "b")["params"] == {"symbol": "A_B", "type": "buy;x=1"}
