"""A state file of an older exchange is brought up to date; one of a newer exchange is refused and left alone."""

import sqlite3
from pathlib import Path

import pytest

from tests.paper import NOW_S, Clock, exchange
from workers.venues.paper import schema
from workers.venues.paper.store import database

VERSION_1 = """
CREATE TABLE accounts (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, secret TEXT NOT NULL, opened_ms INTEGER NOT NULL);
CREATE TABLE balances (
    account INTEGER, currency TEXT, free TEXT NOT NULL, frozen TEXT NOT NULL, PRIMARY KEY (account, currency)) WITHOUT ROWID;
CREATE TABLE leverages (account INTEGER, symbol TEXT, leverage INTEGER NOT NULL, PRIMARY KEY (account, symbol)) WITHOUT ROWID;
CREATE TABLE positions (
    account INTEGER, symbol TEXT, side TEXT,
    lots INTEGER NOT NULL, frozen INTEGER NOT NULL, cost TEXT NOT NULL, margin TEXT NOT NULL,
    PRIMARY KEY (account, symbol, side)) WITHOUT ROWID;
CREATE TABLE orders (
    number INTEGER PRIMARY KEY, account INTEGER NOT NULL, client_order_id TEXT, symbol TEXT NOT NULL, side TEXT NOT NULL,
    kind TEXT NOT NULL, offset TEXT, price INTEGER NOT NULL, lots INTEGER NOT NULL, quote_amount TEXT NOT NULL, leverage INTEGER NOT NULL,
    time_ms INTEGER NOT NULL, update_ms INTEGER NOT NULL, status TEXT NOT NULL, filled INTEGER NOT NULL, spent TEXT NOT NULL);
CREATE UNIQUE INDEX orders_by_client_order_id ON orders (account, client_order_id) WHERE client_order_id IS NOT NULL;
CREATE TABLE fills (
    number INTEGER PRIMARY KEY, trade INTEGER NOT NULL, account INTEGER NOT NULL, order_number INTEGER NOT NULL, symbol TEXT NOT NULL,
    side TEXT NOT NULL, role TEXT NOT NULL, price INTEGER NOT NULL, lots INTEGER NOT NULL, time_ms INTEGER NOT NULL);
CREATE TABLE ledger (
    number INTEGER PRIMARY KEY, received_ms INTEGER NOT NULL, account INTEGER NOT NULL, verb TEXT NOT NULL, target TEXT NOT NULL,
    client_order_id TEXT, body TEXT NOT NULL,
    order_number INTEGER, order_status TEXT, http_status INTEGER, code INTEGER, answered_ms INTEGER,
    delivered INTEGER);
PRAGMA user_version = 1;
"""
"""The tables as version 1 made them."""

T_MS = NOW_S * 1000
USDT = 10**12


def version_1(state: Path) -> None:
    """A long of 0.1 BTC at 52990.6, opened with leverage 20, and a resting order to open as much again at 40000."""
    state.mkdir()
    with sqlite3.connect(state / "paper.sqlite3") as db:
        db.executescript(VERSION_1)
        db.execute("INSERT INTO accounts VALUES (1, 'key-1', 'secret-1', ?)", (T_MS,))
        held = 264_953 * USDT // 1_000 + 200 * USDT
        rows = [(0, "USDT", str(-(10**6) * USDT), "0"), (1, "USDT", str(10**6 * USDT - held), str(held))]
        db.executemany("INSERT INTO balances VALUES (?, ?, ?, ?)", rows)
        db.execute("INSERT INTO leverages VALUES (1, 'BTC_USDT.swap', 20)")
        cost = 5_299_060 * USDT // 1_000
        db.execute("INSERT INTO positions VALUES (1, 'BTC_USDT.swap', 'long', 100, 0, ?, ?)", (str(cost), str(cost // 20)))
        order = "INSERT INTO orders VALUES (?, 1, ?, 'BTC_USDT.swap', 'buy', ?, 'open', ?, 100, '0', 20, ?, ?, ?, ?, ?)"
        db.execute(order, (1, "a", "market", 0, T_MS, T_MS, "closed", 100, str(cost)))
        db.execute(order, (2, "b", "limit", 400_000, T_MS, T_MS, "open", 0, "0"))
        db.execute("INSERT INTO fills VALUES (1, 1, 1, 1, 'BTC_USDT.swap', 'buy', 'taker', 529906, 100, ?)", (T_MS,))
        db.execute("INSERT INTO ledger VALUES (1, ?, 1, 'POST', '/api/v1/orders', 'a', '{}', 1, 'closed', 200, 0, ?, NULL)", (T_MS, T_MS))
    db.close()


async def test_a_file_of_version_1_opens_with_everything_in_it(tmp_path: Path) -> None:
    version_1(tmp_path / "paper")
    clock = Clock(NOW_S + 60)
    for _ in range(2):
        async with exchange(tmp_path / "paper", clock) as client:
            (position,) = await client.get("/api/v1/positions")
            assert {name: position[name] for name in ("side", "amount", "leverage", "margin", "entry_price")} == {
                "side": "long",
                "amount": "0.1",
                "leverage": 20,
                "margin": "264.953",
                "entry_price": "52990.6",
            }
            assert [(row["id"], row["price"], row["status"]) for row in await client.get("/api/v1/orders")] == [("2", "40000", "open")]
            assert [(row["price"], row["fee"]) for row in await client.get("/api/v1/fills")] == [("52990.6", "0")]
            assert await client.get("/api/v1/account") == {"balances": [{"currency": "USDT", "free": "999535.047", "frozen": "464.953"}]}
    async with exchange(tmp_path / "paper", clock) as client:
        # It froze no fee, and gets back what it froze.
        await client("DELETE", "/api/v1/orders/2")
        assert await client.get("/api/v1/account") == {"balances": [{"currency": "USDT", "free": "999735.047", "frozen": "264.953"}]}
        clock.now_s = 1_795_190_400
        (payment,) = await client.get("/api/v1/funding/payments")
        assert (payment["time"], payment["amount"], payment["rate"]) == (1_795_190_400_000, "0.1", "0.0000357")


def test_the_tables_of_a_migrated_file_are_those_of_a_new_one(tmp_path: Path) -> None:
    version_1(tmp_path / "old")
    shapes = []
    for name in ("old", "new"):
        with database(tmp_path / name) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (schema.VERSION,)
            tables = [table for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
            shapes.append({table: [tuple(row[1:]) for row in db.execute(f"PRAGMA table_info({table})")] for table in tables})
    assert shapes[0] == shapes[1]


def test_a_file_of_a_newer_exchange_is_refused_and_left_alone(tmp_path: Path) -> None:
    with database(tmp_path) as db:
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    wanted = f"a newer paper exchange wrote this state: version {schema.VERSION + 1}, and this one knows {schema.VERSION}"
    for _ in range(2):
        with pytest.raises(OSError, match=wanted), database(tmp_path):
            pass
    with sqlite3.connect(tmp_path / "paper.sqlite3") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (schema.VERSION + 1,)
    db.close()
