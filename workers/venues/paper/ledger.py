"""What the exchange can prove: for each order request what was received, when, what was executed, what was replied, and whether it arrived.

Read from the file beside the exchange that writes it, or after its death; README.md says what `delivered` means.
"""

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from workers.venues.paper import schema

MOST_ROWS = 100_000

TimeMs = Annotated[int, Meta(ge=0, le=10**15)]

_COLUMNS = (
    "ledger.number, received_ms, account, key, client_order_id, verb, target, body, executed, order_number, order_status,"
    " http_status, code, answered_ms, delivered, fault"
)

_SAME_ORDER = "order_number IN (SELECT order_number FROM ledger WHERE client_order_id = ? AND order_number IS NOT NULL)"


class Query(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which requests: "" and None for any.

    client_order_id: also the cancels of its orders by the exchange's id. account: account_hash() of an access key.
    since_ms, until_ms: received then, both included. limit: the newest so many.
    """

    client_order_id: str = ""
    account: str = ""
    since_ms: TimeMs | None = None
    until_ms: TimeMs | None = None
    limit: Annotated[int, Meta(ge=1, le=MOST_ROWS)] = 1_000


class Entry(Struct, frozen=True, kw_only=True):
    """One order request.

    executed: None when it was received and nothing came of it (the exchange died first). order: the order it placed or cancelled as
    it is now; order_status: as the reply told. status, code: HTTP status and code (0: served) of the reply; status None: no reply was sent;
    code None: a fault left none in it. delivered: see the README, None: not known. fault: those it met, joined by "+".
    """

    number: int
    received_ms: int
    account: str
    client_order_id: str | None
    verb: str
    target: str
    body: str
    executed: bool | None
    order_id: str | None
    order_status: str | None
    order: dict[str, object] | None
    status: int | None
    code: int | None
    answered_ms: int | None
    delivered: bool | None
    fault: str | None


def account_hash(key: str) -> str:
    """How the ledger names an account: 16 hex digits of its access key's SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def read(state: Path, query: Query) -> list[Entry]:
    """The requests that fit, in the order in which they were received. state: the exchange's folder. For a thread: it blocks."""
    with _reading(state / "paper.sqlite3") as db:
        where: list[str] = ["1"]
        parameters: list[str | int] = []
        if query.client_order_id:
            where.append(f"(client_order_id = ? OR {_SAME_ORDER})")
            parameters += [query.client_order_id] * 2
        if query.account:
            keys = [key for (key,) in db.execute("SELECT key FROM accounts") if account_hash(key) == query.account]
            where.append(f"key IN ({', '.join('?' * len(keys))})")
            parameters += keys
        for bound, condition in ((query.since_ms, "received_ms >= ?"), (query.until_ms, "received_ms <= ?")):
            if bound is not None:
                where.append(condition)
                parameters.append(bound)
        found = db.execute(
            f"SELECT {_COLUMNS} FROM ledger JOIN accounts ON accounts.number = account"  # noqa: S608  our columns and conditions
            f" WHERE {' AND '.join(where)} ORDER BY ledger.number DESC LIMIT ?",
            (*parameters, query.limit),
        ).fetchall()
        return [_entry(db, row) for row in reversed(found)]


def _entry(db: sqlite3.Connection, row: tuple[Any, ...]) -> Entry:
    number, received_ms, account, key, client_order_id, verb, target, body, executed, order_number, order_status, *told = row
    http_status, code, answered_ms, delivered, fault = told
    order = schema.order_by_number(account, order_number)(db) if order_number is not None else None
    return Entry(
        number=number,
        received_ms=received_ms,
        account=account_hash(key),
        client_order_id=client_order_id or (order.client_order_id if order else None),
        verb=verb,
        target=target,
        body=body,
        executed=None if executed is None else bool(executed),
        order_id=None if order_number is None else str(order_number),
        order_status=order_status,
        order=order.document() if order else None,
        status=http_status,
        code=code,
        answered_ms=answered_ms,
        delivered=None if delivered is None else bool(delivered),
        fault=fault,
    )


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """One moment of the file, seen without holding up who writes it."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
        db.execute("BEGIN")
        yield db
