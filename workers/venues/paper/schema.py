"""What is on disk and how it is read and written: the tables, rows from records and back, and the ledger of order requests.

Every function here is one job for the store, given the connection; money is text, since it outgrows SQLite's 64-bit numbers.
"""

import errno
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from workers.venues.paper.accounts import Balance, Changes, PositionKey
from workers.venues.paper.auth import Holder
from workers.venues.paper.engine import TAPE, Engine, Trade
from workers.venues.paper.funding import Payment
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.orders import Fill, Order, Position

_TABLES = """
CREATE TABLE IF NOT EXISTS accounts (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, secret TEXT NOT NULL, opened_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS balances (
    account INTEGER, currency TEXT, free TEXT NOT NULL, frozen TEXT NOT NULL, PRIMARY KEY (account, currency)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leverages (
    account INTEGER, symbol TEXT, leverage INTEGER NOT NULL, PRIMARY KEY (account, symbol)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS positions (
    account INTEGER, symbol TEXT, side TEXT,
    lots INTEGER NOT NULL, frozen INTEGER NOT NULL, cost TEXT NOT NULL, margin TEXT NOT NULL, leverage INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (account, symbol, side)) WITHOUT ROWID;
-- Up to where resting orders and positions have met each market.
CREATE TABLE IF NOT EXISTS seconds (symbol TEXT PRIMARY KEY, second INTEGER NOT NULL) WITHOUT ROWID;
-- The key is what keeps an interval from being settled twice.
CREATE TABLE IF NOT EXISTS payments (
    account INTEGER, symbol TEXT, side TEXT, time_ms INTEGER, rate INTEGER NOT NULL, price INTEGER NOT NULL, lots INTEGER NOT NULL,
    value TEXT NOT NULL, PRIMARY KEY (account, time_ms, symbol, side)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS orders (
    number INTEGER PRIMARY KEY, account INTEGER NOT NULL, client_order_id TEXT, symbol TEXT NOT NULL, side TEXT NOT NULL,
    kind TEXT NOT NULL, offset TEXT, price INTEGER NOT NULL, lots INTEGER NOT NULL, quote_amount TEXT NOT NULL, leverage INTEGER NOT NULL,
    time_ms INTEGER NOT NULL, update_ms INTEGER NOT NULL, status TEXT NOT NULL, filled INTEGER NOT NULL, spent TEXT NOT NULL,
    maker_rate INTEGER NOT NULL DEFAULT 0);
-- Not unique: the fault duplicate-client-id makes a second order with the same one.
DROP INDEX IF EXISTS orders_by_client_order_id;
CREATE INDEX IF NOT EXISTS orders_by_client_id ON orders (account, client_order_id, number) WHERE client_order_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS orders_by_account ON orders (account, number);
CREATE INDEX IF NOT EXISTS orders_by_symbol ON orders (account, symbol, number);
CREATE INDEX IF NOT EXISTS orders_open ON orders (number) WHERE status = 'open';
CREATE TABLE IF NOT EXISTS fills (
    number INTEGER PRIMARY KEY, trade INTEGER NOT NULL, account INTEGER NOT NULL, order_number INTEGER NOT NULL, symbol TEXT NOT NULL,
    side TEXT NOT NULL, role TEXT NOT NULL, price INTEGER NOT NULL, lots INTEGER NOT NULL, time_ms INTEGER NOT NULL,
    fee TEXT NOT NULL DEFAULT '0');
CREATE INDEX IF NOT EXISTS fills_by_account ON fills (account, number);
CREATE INDEX IF NOT EXISTS fills_by_account_symbol ON fills (account, symbol, number);
CREATE INDEX IF NOT EXISTS fills_by_symbol ON fills (symbol, trade);
-- Every order request with a right signature: the first columns are committed before it is looked at, the rest with what it did.
-- executed: 1, or 0 for a refusal. http_status, code: what the reply says; code is null where a fault left none, both where no reply
-- was sent. fault: those it met, joined by +. delivered: written after the reply, see the README; null: not known.
CREATE TABLE IF NOT EXISTS ledger (
    number INTEGER PRIMARY KEY, received_ms INTEGER NOT NULL, account INTEGER NOT NULL, verb TEXT NOT NULL, target TEXT NOT NULL,
    client_order_id TEXT, body TEXT NOT NULL,
    order_number INTEGER, order_status TEXT, http_status INTEGER, code INTEGER, answered_ms INTEGER,
    delivered INTEGER, executed INTEGER, fault TEXT);
CREATE INDEX IF NOT EXISTS ledger_by_client_order_id ON ledger (client_order_id, account) WHERE client_order_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS ledger_by_order ON ledger (order_number) WHERE order_number IS NOT NULL;
"""

VERSION = 2
"""Of the tables, kept as the file's user_version."""

_LATER = {
    "orders": ("maker_rate INTEGER NOT NULL DEFAULT 0",),
    "fills": ("fee TEXT NOT NULL DEFAULT '0'",),
    "positions": ("leverage INTEGER NOT NULL DEFAULT 1",),
    "ledger": ("executed INTEGER", "fault TEXT"),
}
"""Columns that a file of version 1 lacks. Its orders froze no fee, so they pay none while they rest."""

_FROM_1 = (
    "UPDATE ledger SET executed = (code = 0) WHERE code IS NOT NULL",
    "UPDATE positions SET leverage = max(1, CAST(round(CAST(cost AS REAL) / CAST(margin AS REAL)) AS INTEGER)) WHERE margin != '0'",
    "INSERT INTO seconds SELECT symbol, max(update_ms) / 1000 FROM orders GROUP BY symbol",
)
"""What version 1 did not write down: whether a request was executed, the leverage of a margin, how far orders had met the market."""

_ORDER = (
    "number, account, client_order_id, symbol, side, kind, offset, price, lots, quote_amount,"
    " leverage, time_ms, update_ms, status, filled, spent, maker_rate"
)
_FILL = "number, trade, account, order_number, symbol, side, role, price, lots, time_ms, fee"
_POSITION = "account, symbol, side, lots, frozen, cost, margin, leverage"
_PAYMENT = "account, symbol, side, time_ms, rate, price, lots, value"

_WRITES = (
    "INSERT OR REPLACE INTO balances VALUES (?, ?, ?, ?)",
    "INSERT OR REPLACE INTO leverages VALUES (?, ?, ?)",
    "INSERT OR REPLACE INTO positions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    "DELETE FROM positions WHERE account = ? AND symbol = ? AND side = ?",
    "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (number) DO UPDATE SET "
    "update_ms = excluded.update_ms, status = excluded.status, filled = excluded.filled, spent = excluded.spent",
    "INSERT INTO fills VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    "INSERT INTO payments VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    "INSERT OR REPLACE INTO seconds VALUES (?, ?)",
)

Rows = tuple[Sequence[tuple[Any, ...]], ...]
"""Parameters for each of _WRITES."""


class Received(NamedTuple):
    """An order request on its way in. client_id_known: its account has an order with that client order id on disk."""

    number: int
    client_id_known: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of an order request: whether it was executed, the order it placed or cancelled, if any, and what the reply says.

    code: 0 for served. http_status, code: None for a reply without one, and where none is sent. fault: those that it met.
    delivered: False where no reply will be sent, None where deliver() is to tell.
    """

    order: Order | None
    executed: bool
    http_status: int | None
    code: int | None
    answered_ms: int
    fault: str | None
    delivered: bool | None


def create(db: sqlite3.Connection) -> None:
    """Make the tables of a new file, or bring those of an older exchange up to date, in one transaction.

    Raises OSError when a newer exchange wrote the file.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise OSError(errno.EINVAL, f"a newer paper exchange wrote this state: version {version}, and this one knows {VERSION}")
    db.executescript("BEGIN IMMEDIATE;" + _TABLES)
    for table, columns in _LATER.items():
        held = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        for column in columns:
            if column.partition(" ")[0] not in held:
                db.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
    if version == 1:
        for statement in _FROM_1:
            db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def rows(changes: Changes) -> Rows:
    """The changes as they are now: the records may change again before the store gets to writing them."""
    held = [(key, position) for key, position in changes.positions.items() if position.lots]
    return (
        [(*key, str(b.free), str(b.frozen)) for key, b in changes.balances.items()],
        [(*key, leverage) for key, leverage in changes.leverages.items()],
        [(*key, p.lots, p.frozen, str(p.cost), str(p.margin), p.leverage) for key, p in held],
        [key for key, position in changes.positions.items() if not position.lots],
        [_order_row(order) for order in changes.orders.values()],
        [(f.number, f.trade, f.account, f.order, f.symbol, f.side, f.role, f.price, f.lots, f.time_ms, str(f.fee)) for f in changes.fills],
        [(p.account, p.symbol, p.side, p.time_ms, p.rate, p.price, p.lots, str(p.value)) for p in changes.payments],
        list(changes.seconds.items()),
    )


def write(rows: Rows) -> Callable[[sqlite3.Connection], None]:
    """Write changed balances, positions, orders and new fills."""

    def job(db: sqlite3.Connection) -> None:
        for statement, parameters in zip(_WRITES, rows, strict=True):
            if parameters:
                db.executemany(statement, parameters)

    return job


def bind(holder: Holder, opened_ms: int) -> Callable[[sqlite3.Connection], None]:
    """Write a new account and the secret its key is bound to."""

    def job(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO accounts VALUES (?, ?, ?, ?)", (holder.account, holder.key, holder.secret.decode(), opened_ms))

    return job


def receive(
    *,
    account: int,
    verb: str,
    target: str,
    client_order_id: str | None,
    body: bytes,
    received_ms: int,
    marks: Sequence[tuple[bool | None, int]] = (),
) -> Callable[[sqlite3.Connection], Received]:
    """Write down an order request before anything is done about it, and on the way the marks of replies before it."""
    text = body.decode("utf-8", "replace")

    def job(db: sqlite3.Connection) -> Received:
        deliver(marks)(db)
        cursor = db.execute(
            "INSERT INTO ledger (received_ms, account, verb, target, client_order_id, body) VALUES (?, ?, ?, ?, ?, ?)",
            (received_ms, account, verb, target, client_order_id, text),
        )
        known = client_order_id is not None and order_by_client_id(account, client_order_id)(db) is not None
        return Received(cursor.lastrowid or 0, known)

    return job


def complete(number: int, outcome: Outcome, changed: Rows) -> Callable[[sqlite3.Connection], None]:
    """Write what became of a received request, in one transaction with all that it changed."""
    order = outcome.order
    told = (outcome.executed, outcome.http_status, outcome.code, outcome.answered_ms, outcome.fault, outcome.delivered)
    row = (order and order.number, order and order.status, *told, number)

    def job(db: sqlite3.Connection) -> None:
        write(changed)(db)
        db.execute(
            "UPDATE ledger SET order_number = ?, order_status = ?, executed = ?, http_status = ?, code = ?, answered_ms = ?, fault = ?,"
            " delivered = ? WHERE number = ?",
            row,
        )

    return job


def deliver(marks: Sequence[tuple[bool | None, int]]) -> Callable[[sqlite3.Connection], None]:
    """Note which replies were delivered: (delivered, number of the ledger's line)."""

    def job(db: sqlite3.Connection) -> None:
        db.executemany("UPDATE ledger SET delivered = ? WHERE number = ?", marks)

    return job


def order_by_number(account: int, number: int) -> Callable[[sqlite3.Connection], Order | None]:
    def job(db: sqlite3.Connection) -> Order | None:
        row = db.execute(f"SELECT {_ORDER} FROM orders WHERE number = ? AND account = ?", (number, account)).fetchone()  # noqa: S608  our columns
        return row and _order(row)

    return job


def order_by_client_id(account: int, client_order_id: str) -> Callable[[sqlite3.Connection], Order | None]:
    def job(db: sqlite3.Connection) -> Order | None:
        where = "account = ? AND client_order_id = ? ORDER BY number LIMIT 1"
        row = db.execute(f"SELECT {_ORDER} FROM orders WHERE {where}", (account, client_order_id)).fetchone()  # noqa: S608  our columns
        return row and _order(row)

    return job


def order_history(account: int, symbol: str | None, limit: int) -> Callable[[sqlite3.Connection], list[Order]]:
    """The newest orders that are done, oldest first."""

    def job(db: sqlite3.Connection) -> list[Order]:
        mine, parameters = _of_account(account, symbol)
        where = f"{mine} AND status != 'open' ORDER BY number DESC LIMIT ?"
        found = db.execute(f"SELECT {_ORDER} FROM orders WHERE {where}", (*parameters, limit))  # noqa: S608  our columns
        return [_order(row) for row in found][::-1]

    return job


def fills(account: int, symbol: str | None, limit: int) -> Callable[[sqlite3.Connection], list[Fill]]:
    """The account's newest fills, oldest first."""

    def job(db: sqlite3.Connection) -> list[Fill]:
        mine, parameters = _of_account(account, symbol)
        found = db.execute(f"SELECT {_FILL} FROM fills WHERE {mine} ORDER BY number DESC LIMIT ?", (*parameters, limit))  # noqa: S608  our columns
        return [_fill(row) for row in found][::-1]

    return job


def payments(account: int, symbol: str | None, limit: int) -> Callable[[sqlite3.Connection], list[Payment]]:
    """The account's newest funding payments, oldest first."""

    def job(db: sqlite3.Connection) -> list[Payment]:
        mine, parameters = _of_account(account, symbol)
        where = f"{mine} ORDER BY time_ms DESC, symbol DESC, side DESC LIMIT ?"
        found = db.execute(f"SELECT {_PAYMENT} FROM payments WHERE {where}", (*parameters, limit))  # noqa: S608  our columns
        return [_payment(row) for row in found][::-1]

    return job


def restore(db: sqlite3.Connection, engine: Engine) -> dict[str, Holder]:
    """Fill a new engine with what the disk knows; return the holders by key."""
    holders = {key: Holder(number, key, secret.encode()) for number, key, secret in db.execute("SELECT number, key, secret FROM accounts")}
    accounts = engine.accounts
    for account, currency, free, frozen in db.execute("SELECT account, currency, free, frozen FROM balances"):
        accounts.balances.setdefault(account, {})[currency] = Balance(int(free), int(frozen))
    for account, symbol, leverage in db.execute("SELECT account, symbol, leverage FROM leverages"):
        accounts.leverages[account, symbol] = leverage
    for account, symbol, side, lots, frozen, cost, margin, leverage in db.execute(f"SELECT {_POSITION} FROM positions"):  # noqa: S608  our columns
        key = PositionKey(account, symbol, side)
        accounts.positions[key] = Position(*key, lots, frozen, int(cost), int(margin), leverage)
    resting = (_order(row) for row in db.execute(f"SELECT {_ORDER} FROM orders WHERE status = 'open' ORDER BY number"))  # noqa: S608  our columns
    engine.restore(resting, dict(db.execute("SELECT symbol, second FROM seconds").fetchall()))
    for symbol in MARKETS:
        # Both fills of a trade show the same public side: the taker's is the opposite of the maker's.
        found = db.execute(
            "SELECT trade, price, lots, CASE WHEN (role = 'taker') = (side = 'buy') THEN 'buy' ELSE 'sell' END, time_ms"
            " FROM fills WHERE symbol = ? GROUP BY trade ORDER BY trade DESC LIMIT ?",
            (symbol, TAPE),
        )
        engine.tapes[symbol].extend(Trade(*row) for row in found.fetchall()[::-1])
    engine.next_order, engine.next_fill, engine.next_trade = db.execute(
        "SELECT (SELECT ifnull(max(number), 0) + 1 FROM orders), (SELECT ifnull(max(number), 0) + 1 FROM fills),"
        " ifnull((SELECT trade FROM fills ORDER BY number DESC LIMIT 1), 0) + 1"
    ).fetchone()
    return holders


def _of_account(account: int, symbol: str | None) -> tuple[str, tuple[Any, ...]]:
    """A condition that an index serves, with or without a symbol: a long history must not hold up the writes."""
    return ("account = ?", (account,)) if symbol is None else ("account = ? AND symbol = ?", (account, symbol))


def _order_row(o: Order) -> tuple[Any, ...]:
    head = (o.number, o.account, o.client_order_id, o.symbol, o.side, o.kind, o.offset, o.price, o.lots, str(o.quote_amount))
    return (*head, o.leverage, o.time_ms, o.update_ms, o.status, o.filled, str(o.spent), o.maker_rate)


def _order(row: tuple[Any, ...]) -> Order:
    values = list(row)
    values[9], values[15] = int(values[9]), int(values[15])
    return Order(*values)


def _fill(row: tuple[Any, ...]) -> Fill:
    values = list(row)
    values[10] = int(values[10])
    return Fill(*values)


def _payment(row: tuple[Any, ...]) -> Payment:
    values = list(row)
    values[7] = int(values[7])
    return Payment(*values)
