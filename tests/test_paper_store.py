"""What the paper exchange remembers: the ledger, restarts, a kill at any moment, a file that cannot be written."""

import asyncio
import logging
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.paper import GOOD, README, Client, Clock, exchange, until
from workers.venues.paper.engine import Engine
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.schema import restore
from workers.venues.paper.server import serving
from workers.venues.paper.store import Store, database

pytestmark = pytest.mark.slow


async def test_the_ledger_has_every_order_request_and_what_became_of_it(client: Client, tmp_path: Path) -> None:
    await client.order("BTC_USDT", "buy", type="limit", price="40000", amount="0.01", client_order_id="good")
    await client("POST", "/api/v1/orders", GOOD | {"amount": "100", "client_order_id": "poor"})
    await client("POST", "/api/v1/orders", b"nonsense")
    await client("DELETE", "/api/v1/orders/by-client-id/good")
    late = client.signed("POST", "/api/v1/orders", b"{}", time_ms=1)
    await client("POST", "/api/v1/orders", b"{}", signed=False, headers=late)
    with sqlite3.connect(tmp_path / "paper/paper.sqlite3") as db:
        rows = db.execute(
            "SELECT verb, target, client_order_id, order_number, order_status, http_status, code FROM ledger ORDER BY number"
        ).fetchall()
        (body,) = db.execute("SELECT body FROM ledger WHERE number = 3").fetchone()
    db.close()
    assert rows == [
        ("POST", "/api/v1/orders", "good", 1, "open", 200, 0),
        ("POST", "/api/v1/orders", "poor", None, None, 400, 2010),
        ("POST", "/api/v1/orders", None, None, None, 400, 1006),
        ("DELETE", "/api/v1/orders/by-client-id/good", "good", 1, "cancelled", 200, 0),
        ("POST", "/api/v1/orders", None, None, None, 401, 1003),
    ]
    assert body == "nonsense"


async def test_everything_is_there_again_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    targets = (
        "/api/v1/account",
        "/api/v1/orders",
        "/api/v1/orders/history",
        "/api/v1/positions",
        "/api/v1/fills",
        "/api/v1/leverage?symbol=ETH_USDT.swap",
    )
    async with exchange(tmp_path, clock) as client:
        await client.order("BTC_USDT", "buy", type="limit", price="40000", amount="0.01", client_order_id="rests")
        await client.order("BTC_USDT", "sell", type="market", amount="0.3", client_order_id="done")
        await client.order("ETH_USDT.swap", "buy", type="market", amount="2")
        await client.order("ETH_USDT.swap", "sell", type="limit", price="9000", amount="1.5", offset="close")
        await client("POST", "/api/v1/leverage", {"symbol": "ETH_USDT.swap", "leverage": 3})
        before = [await client.get(target) for target in targets]
        tape = await client.get("/api/v1/trades?symbol=BTC_USDT", signed=False)
    async with exchange(tmp_path, clock) as client:
        assert [await client.get(target) for target in targets] == before
        assert await client.get("/api/v1/trades?symbol=BTC_USDT", signed=False) == tape
        for cid in ("rests", "done"):
            assert (await client("POST", "/api/v1/orders", GOOD | {"client_order_id": cid}))[1]["code"] == 2013
        assert (await client.other("key-1", "other")("GET", "/api/v1/account"))[1]["code"] == 1002
        assert (await client("DELETE", "/api/v1/orders"))[0] == 200


async def test_the_state_is_its_owners_alone_and_the_log_shows_no_secret(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with exchange(tmp_path / "new" / "paper", clock) as client:
        await client.order("BTC_USDT", "buy", type="market", quote_amount="10")
        await client.other("key-1", "wrong-secret")("GET", "/api/v1/account")
        folder = tmp_path / "new" / "paper"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert not {word for word in ("secret-1", "wrong-secret", "key-1") if word in caplog.text}


async def test_a_taken_port_or_folder_is_a_clear_error(tmp_path: Path, clock: Clock) -> None:
    async with serving(state=tmp_path / "a", host="127.0.0.1", port=0, seed=7, clock=clock) as port:
        with pytest.raises(OSError, match=f"the paper exchange cannot listen on 127.0.0.1:{port}"):
            async with serving(state=tmp_path / "b", host="127.0.0.1", port=port, seed=7, clock=clock):
                pass
        with pytest.raises(OSError, match="another paper exchange uses this state folder"):
            async with serving(state=tmp_path / "a", host="127.0.0.1", port=0, seed=7, clock=clock):
                pass


async def test_a_file_that_cannot_be_written_ends_the_exchange(tmp_path: Path) -> None:
    with database(tmp_path) as db:
        store = Store(db)
        with pytest.raises(sqlite3.OperationalError):
            await store.submit(lambda connection: connection.execute("INSERT INTO nowhere VALUES (1)"))
        with pytest.raises(sqlite3.OperationalError):
            await store.broken()
        with pytest.raises(sqlite3.OperationalError):
            store.submit(lambda connection: None)
        await store.close()


async def test_an_exchange_that_cannot_write_answers_and_ends(tmp_path: Path, clock: Clock) -> None:
    async def break_the_file() -> None:
        async with exchange(tmp_path, clock) as client:
            await client.get("/api/v1/account")
            with sqlite3.connect(tmp_path / "paper.sqlite3") as db:
                db.execute("DROP TABLE ledger")
            db.close()
            assert await client("POST", "/api/v1/orders", GOOD) == (
                500,
                {"code": 1000, "message": "internal error, see the exchange's log"},
            )
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as ended:
        await break_the_file()
    assert isinstance(ended.value.exceptions[0], sqlite3.OperationalError)


async def test_leaving_answers_every_order_that_was_received(tmp_path: Path, clock: Clock) -> None:
    async with aiohttp.ClientSession() as session:
        async with serving(state=tmp_path, host="127.0.0.1", port=0, seed=7, clock=clock) as port:
            client = Client(session, f"http://127.0.0.1:{port}", clock)
            orders = [asyncio.create_task(client("POST", "/api/v1/orders", GOOD)) for _ in range(50)]
            with sqlite3.connect(tmp_path / "paper.sqlite3") as db:
                await until(lambda: db.execute("SELECT count(*) FROM ledger").fetchone() > (0,))
            db.close()
        replies = await asyncio.gather(*orders, return_exceptions=True)
    told = {document["id"] for _, document in (reply for reply in replies if not isinstance(reply, BaseException))}
    # Those that came too late were not let in at all.
    assert all(isinstance(reply, tuple | aiohttp.ClientError) for reply in replies)
    async with exchange(tmp_path, clock) as client:
        assert {order["id"] for order in await client.get("/api/v1/orders")} == told


SERVE = """
import asyncio, pathlib, sys
from workers.venues.paper.server import serving

async def main():
    async with serving(state=pathlib.Path(sys.argv[1]), host="127.0.0.1", port=0, seed=7) as port:
        sys.stdout.write(f"{port}\\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("orders_before_the_kill", [1, 37, 150])
async def test_after_a_kill_everything_that_was_told_is_there(tmp_path: Path, orders_before_the_kill: int) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=README.parents[3]
    )
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    told: dict[str, Any] = {}

    async def trade(client: Client, account: int) -> None:
        for number in range(10_000):
            fields = {"type": "limit", "price": "10", "amount": "0.2"} if number % 3 else {"type": "market", "amount": "0.0001"}
            document = await client.order("BTC_USDT", "buy", client_order_id=f"c{account}-{number}", **fields)
            told[document["client_order_id"]] = document
            if len(told) == orders_before_the_kill:
                os.kill(process.pid, signal.SIGKILL)

    async with aiohttp.ClientSession() as session:
        first = Client(session, f"http://127.0.0.1:{port}", time.time)
        clients = [first.other(f"key-{n}", "s") for n in range(4)]
        ended = await asyncio.gather(*(trade(client, n) for n, client in enumerate(clients)), return_exceptions=True)
    await process.wait()
    assert all(isinstance(end, aiohttp.ClientError) for end in ended), ended
    assert len(told) >= orders_before_the_kill

    with database(tmp_path) as db:
        engine = Engine(7)
        restore(db, engine)
        stored = {cid: (status, filled) for cid, status, filled in db.execute("SELECT client_order_id, status, filled FROM orders")}
        finished = {cid for (cid,) in db.execute("SELECT client_order_id FROM ledger WHERE http_status = 200")}
    market = MARKETS["BTC_USDT"]
    assert {cid: stored[cid] for cid in told} == {
        cid: (document["status"], round(float(document["filled"]) * 10**6)) for cid, document in told.items()
    }
    # What was executed and what the ledger calls executed is one and the same, told or not.
    assert finished == set(stored)
    for currency in ("BTC", "USDT"):
        assert sum(b[currency].free + b[currency].frozen for b in engine.accounts.balances.values() if currency in b) == 0
    for number, orders in engine.open_orders.items():
        held = sum(market.notional(order.price, order.remaining) for order in orders.values())
        assert engine.accounts.balances[number]["USDT"].frozen == held


async def test_an_order_that_waited_for_the_disk_until_it_expired_is_refused(tmp_path: Path) -> None:
    async with exchange(tmp_path / "paper", time.time) as client:
        await client.get("/api/v1/account")
        disk = sqlite3.connect(tmp_path / "paper" / "paper.sqlite3", isolation_level=None)
        disk.execute("BEGIN IMMEDIATE")  # the exchange cannot write until this ends
        expires_ms = int(time.time() * 1000) + 300
        placing = asyncio.ensure_future(client("POST", "/api/v1/orders", GOOD | {"expires_at": expires_ms, "client_order_id": "late"}))
        await until(lambda: time.time() * 1000 > expires_ms)
        disk.execute("COMMIT")
        disk.close()
        status, refusal = await placing
        assert (status, refusal["code"]) == (400, 1004)
        assert (await client("GET", "/api/v1/orders/by-client-id/late"))[0] == 404


async def test_a_refused_first_call_opens_no_account(client: Client) -> None:
    stale = client.signed("GET", "/api/v1/account", b"", time_ms=1)
    status, refusal = await client("GET", "/api/v1/account", signed=False, headers=stale)
    assert (status, refusal["code"]) == (401, 1003)
    assert "balances" in await client.other(client.key, "another secret".replace(" ", "-")).get("/api/v1/account")
