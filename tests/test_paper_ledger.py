"""What the paper exchange can prove afterwards: by query, after a SIGKILL at any moment, and on the whole path under `fmzbus up`."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from bus import paper
from tests.host import hosting
from tests.paper import GOOD, NOW_S, README
from tests.rig import ORDERS, Answer, Rig, rigged, send
from tests.servers import System
from tests.test_command import fmzbus
from tests.test_paper_store import SERVE
from workers.venues.paper import auth, ledger, replies
from workers.venues.paper.ledger import Query, account_hash, read
from workers.venues.paper.store import database

pytestmark = pytest.mark.slow


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rigged(tmp_path / "paper") as made:
        yield made


# Queries


async def test_a_line_says_what_was_received_executed_and_replied(rig: Rig) -> None:
    await rig.place("good")
    (row,) = await rig.ledger("?client_order_id=good")
    order = row.pop("order")
    assert (order["id"], order["status"], order["amount"]) == ("1", "open", "0.01")
    assert json.loads(row.pop("body")) == GOOD | {"client_order_id": "good"}
    assert row == {
        "number": 1,
        "received_ms": NOW_S * 1000,
        "account": account_hash("key-1"),
        "client_order_id": "good",
        "verb": "POST",
        "target": ORDERS,
        "executed": True,
        "order_id": "1",
        "order_status": "open",
        "status": 200,
        "code": 0,
        "answered_ms": NOW_S * 1000,
        "delivered": True,
        "fault": None,
    }


async def test_a_client_order_id_finds_the_cancel_of_its_order_by_id(rig: Rig) -> None:
    order = (await rig.place("mine")).json
    await rig.place("other")
    await rig("DELETE", f"{ORDERS}/{order['id']}")
    rows = await rig.ledger("?client_order_id=mine")
    assert [(row["verb"], row["client_order_id"], row["order_status"], row["order"]["status"]) for row in rows] == [
        ("POST", "mine", "open", "cancelled"),
        ("DELETE", "mine", "cancelled", "cancelled"),
    ]


async def test_lines_are_found_by_account_and_time_and_the_newest_come(rig: Rig) -> None:
    other = Rig(rig.client.other("key-2", "s"), rig.clock, rig.state)
    for number, one in enumerate((rig, other, rig, other)):
        await one.place(f"c{number}", amount="0.001")
        rig.clock.now_s += 60
    since = f"since_ms={(NOW_S + 60) * 1000}"

    async def found(query: str) -> list[str]:
        return [row["client_order_id"] for row in await rig.ledger("?" + query)]

    assert await found(f"account={account_hash('key-2')}") == ["c1", "c3"]
    assert await found(since) == ["c1", "c2", "c3"]
    assert await found(f"{since}&until_ms={(NOW_S + 120) * 1000}&account={account_hash('key-1')}") == ["c2"]
    assert await found("limit=2") == ["c2", "c3"]
    assert await found("last_s=121") == ["c2", "c3"]
    assert await found(f"account={account_hash('nobody')}") == []
    assert await found("client_order_id=nobody") == []


async def test_refusals_and_nonsense_are_in_the_ledger(rig: Rig) -> None:
    await rig.place("poor", amount="100")
    await rig("POST", ORDERS, ["nonsense"])
    assert [(row["client_order_id"], row["executed"], row["order"], row["status"], row["code"]) for row in await rig.ledger()] == [
        ("poor", False, None, 400, 2010),
        (None, False, None, 400, 2002),
    ]


async def test_a_ledger_of_before_these_columns_is_carried_on(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        await rig.place("poor", amount="100")
        await rig.place("old")
    with closing(sqlite3.connect(tmp_path / "paper.sqlite3", isolation_level=None)) as db:
        for old in ("ALTER TABLE ledger DROP COLUMN executed", "ALTER TABLE ledger DROP COLUMN fault", "DELETE FROM seconds"):
            db.execute(old)
        db.execute("PRAGMA user_version = 1")
    async with rigged(tmp_path) as rig:
        await rig.place("new")
        assert [(row["client_order_id"], row["executed"]) for row in await rig.ledger()] == [("poor", False), ("old", True), ("new", True)]


async def test_the_ledger_shows_no_key_and_no_secret(rig: Rig) -> None:
    await rig.place("c")
    text = json.dumps(await rig.ledger())
    assert "key-1" not in text
    assert "secret-1" not in text


async def test_a_connection_that_was_closed_is_known_before_the_event_loop_reads_it() -> None:
    accepted: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
    async with await asyncio.start_server(lambda _, writer: accepted.set_result(writer), "127.0.0.1", 0) as server:
        with socket.create_connection(server.sockets[0].getsockname()):
            writer = await accepted
            assert not replies.gone(writer.transport)
        assert replies.gone(writer.transport)
        assert not writer.transport.is_closing()
        writer.close()


# SIGKILL at any moment

ROUNDS = 6
ROUGH = [
    {"kind": "execute-then-drop", "probability": 0.12},
    {"kind": "http-503", "executed": True, "probability": 0.1, "path": "POST /api/v1/orders"},
    {"kind": "drop", "probability": 0.08, "path": "POST /api/v1/orders"},
    {"kind": "truncated-json", "probability": 0.1, "path": "POST /api/v1/orders"},
    {"kind": "late-reply", "probability": 0.2, "seconds": 0.02, "jitter": 0.02},
]


@dataclass
class Told:
    """What clients were told by client order id; lost: those that read to the end of a connection and saw no whole reply."""

    replies: dict[str, Answer] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)

    @property
    def sent(self) -> set[str]:
        return self.replies.keys() | self.lost | self.unread


def signed_order(client_order_id: str, key: str) -> tuple[bytes, dict[str, str]]:
    body = json.dumps(GOOD | {"amount": "0.001", "client_order_id": client_order_id}).encode()
    stamp = str(int(time.time() * 1000))
    signature = auth.sign(b"s", timestamp=stamp, window="", verb="POST", target=ORDERS, body=body)
    return body, {"Paper-Key": key, "Paper-Secret": "s", "Paper-Timestamp": stamp, "Paper-Sign": signature}


async def give_up(port: int, body: bytes, headers: dict[str, str]) -> None:
    """Send an order and go away without reading."""
    lines = [f"POST {ORDERS} HTTP/1.1", "Host: paper", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    writer.close()
    await writer.wait_closed()


async def trade_until_killed(port: int, pid: int, seed: int, told: Told) -> None:
    """Four clients trade; one of them kills the exchange, while the requests of the others are under way, at a random point of its own."""
    chance = random.Random(seed)
    last, on_sending = len(told.sent) + chance.randint(10, 90), chance.random() < 0.5

    def maybe_kill(*, sending: bool) -> None:
        if sending == on_sending and len(told.sent) + sending >= last:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def client(name: int) -> None:
        for number in range(10_000):
            client_order_id = f"r{seed}-{name}-{number}"
            body, headers = signed_order(client_order_id, f"key-{name}")
            try:
                if number % 12 == 11:
                    told.unread.add(client_order_id)
                    await give_up(port, body, headers)
                    continue
                asking = asyncio.create_task(send(port, "POST", ORDERS, body, headers))
                maybe_kill(sending=True)
                answer = await asking
            except OSError:
                return  # nobody listens any more
            whole = answer.status and int(answer.headers.get("content-length", -1)) == len(answer.body)
            if whole:
                told.replies[client_order_id] = answer
            else:
                told.lost.add(client_order_id)
            maybe_kill(sending=False)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for name in range(4):
            group.create_task(client(name))


async def test_after_kills_the_ledger_is_what_was_told_plus_what_was_lost(tmp_path: Path) -> None:
    told = Told()
    for seed in range(ROUNDS):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVE, str(tmp_path), stdout=asyncio.subprocess.PIPE, cwd=README.parents[3]
        )
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        where = json.loads((tmp_path / "control.json").read_bytes())
        for fault in ROUGH:
            body = json.dumps(fault).encode()
            assert (await send(where["port"], "POST", "/faults", body, {"Authorization": f"Bearer {where['token']}"})).status == 200
        await trade_until_killed(port, process.pid, seed, told)
        assert await process.wait() == -signal.SIGKILL

    rows = {row.client_order_id or "": row for row in read(tmp_path, Query(limit=ledger.MOST_ROWS))}
    assert len(rows) == len(read(tmp_path, Query(limit=ledger.MOST_ROWS)))
    assert rows.keys() <= told.sent
    # What a client was told is what the ledger says was replied; and nothing that was told is called undelivered.
    for client_order_id, answer in told.replies.items():
        row = rows[client_order_id]
        assert (row.status, row.delivered is not False) == (answer.status, True), row
        if row.code == 0 and "late-reply" in (row.fault or "late-reply"):
            assert answer.json["id"] == row.order_id
    # What was lost on the way is not called delivered.
    assert [rows[lost] for lost in told.lost & rows.keys() if rows[lost].delivered] == []
    # That a fault sent no reply is known, however soon the kill came after it.
    silent = [row for row in rows.values() if row.status is None and row.answered_ms is not None]
    assert {row.delivered for row in silent} == {False}
    # No order without its line, no line that claims an order there is not, none twice.
    with database(tmp_path) as db:
        orders = [str(number) for (number,) in db.execute("SELECT number FROM orders ORDER BY number")]
    executed = [row for row in rows.values() if row.executed]
    assert sorted((row.order_id or "" for row in executed), key=int) == orders
    assert all(row.order_id is None and row.order is None for row in rows.values() if not row.executed)
    # It was worth the effort: each of these happened.
    assert [row for row in executed if row.client_order_id in told.lost and row.delivered is False]
    assert [row for row in rows.values() if row.delivered is None]
    assert [row for row in executed if row.status == 503 and row.delivered]
    assert {row.fault for row in rows.values()} >= {None, *(str(fault["kind"]) for fault in ROUGH)}
    assert len(told.replies) > 50


# On the whole path


async def test_an_executed_and_dropped_order_is_told_as_unknown_and_the_ledger_knows(shared_system: System) -> None:
    status, out, _ = await fmzbus(shared_system, "paper", "fault", "execute-then-drop", "--count", "1")
    assert (status, out) == (0, "armed #1 execute-then-drop, once, on POST /api/v1/orders|DELETE /api/v1/orders*\n")
    blind = ("paper", "fault", "http-503", "--path", "GET /api/v1/orders/by-client-id/*")
    assert (await fmzbus(shared_system, *blind))[0] == 0  # or the worker would look it up, and nothing be unknown
    async with hosting(shared_system.address, 1) as host:
        assert "data" in await host("paper", "ticker", symbol="BTC_USDT")
        reply = await host("paper", "trade", symbol="BTC_USDT", type="buy", price="1000", amount="0.5")
        assert (await fmzbus(shared_system, "paper", "fault", "--clear"))[0] == 0
        told = re.fullmatch(r"outcome unknown: .*; client order id ([0-9a-f]{32})", reply["error"])
        assert told, reply
        assert "data" in await host("paper", "trade", symbol="BTC_USDT", type="buy", price="1000", amount="0.25")
    status, out, _ = await fmzbus(shared_system, "paper", "ledger", told[1], "--json")
    assert status == 0
    (row,) = msgspec.json.decode(out)
    assert (row["executed"], row["status"], row["delivered"], row["fault"]) == (True, None, False, "execute-then-drop")
    assert (row["order"]["status"], row["order"]["amount"], row["order"]["price"]) == ("open", "0.5", "1000")
    assert row["client_order_id"] == told[1] == row["order"]["client_order_id"]
    status, out, _ = await fmzbus(shared_system, "paper", "ledger", "--since", "10m")
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert lines[0] == ["received (UTC)", "account", "client order id", "request", "order", "executed", "id", "now", *lines[0][8:]]
    assert lines[0][8:] == ["replied", "delivered", "fault"]
    account = account_hash("access_key")
    sent = "POST /orders"
    assert lines[1][1:] == [account, told[1], sent, "buy 0.5 BTC_USDT 1000", "yes", row["order_id"], "open", "none", "no", row["fault"]]
    assert lines[2][3:5] + lines[2][8:] == [sent, "buy 0.25 BTC_USDT 1000", "200", "yes", "-"]


async def test_the_command_says_so_when_the_exchange_died_or_never_heard_of_an_order(shared_system: System, state: Path) -> None:
    (state / "paper").mkdir(parents=True)
    (state / "paper/control.json").write_text('{"port":1,"token":"t","pid":1}')
    status, _, err = await fmzbus(shared_system, "paper", "ledger", "--state", str(state))
    assert (status, "no paper exchange runs on the state folder" in err) == (1, True)
    assert await fmzbus(shared_system, "paper", "ledger", "nobody") == (0, "", "the paper exchange received no such order request\n")
    assert await fmzbus(shared_system, "paper", "ledger", "nobody", "--json") == (0, "[]\n", "")


# The command, in this process


@pytest.fixture
def on_shared_system(shared_system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """--state writes to the environment: what was there before comes back after the test."""
    monkeypatch.setenv("FMZBUS__STATE", str(shared_system.state))


def typed(*arguments: str) -> tuple[int, str, str]:
    """Run `fmzbus paper` -> (exit status, standard output, standard error)."""
    result = CliRunner().invoke(paper.app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_lists_arms_schedules_and_clears(on_shared_system: None, tmp_path: Path) -> None:
    status, out, _ = typed("fault", "latency", "--seconds", "2", "--jitter", "1", "--symbol", "XRP_USDT")
    assert (status, re.sub(r"#\d+", "#", out)) == (0, "armed # latency, every time, everywhere, for XRP_USDT, --seconds 2, --jitter 1\n")
    file = tmp_path / "night.toml"
    file.write_text('[[fault]]\nat_s = 3600\nfor_s = 5\nkind = "http-503"\nexecuted = true\nsymbol = "XRP_USDT"\n')
    status, out, _ = typed("fault", "--schedule", str(file))
    assert (status, "http-503, every time, everywhere, for XRP_USDT, --executed, begins in 3600 s, lasts 5 s" in out) == (0, True)
    _, out, _ = typed("fault")
    assert re.search(r"^execute-then-drop +executed, then the connection is closed without a reply *$", out, re.M)
    assert re.search(r"^truncated-json .* --executed *$", out, re.M)
    assert re.search(r"^armed #\d+ latency, every time", out, re.M)
    _, out, _ = typed("fault", "--json")
    assert [row["kind"] for row in msgspec.json.decode(out)["armed"]] == ["latency", "http-503"]
    assert typed("fault", "--clear", "latency")[1] == "cleared 1\n"
    assert typed("fault", "--clear")[1] == "cleared 1\n"
    assert "nothing is armed" in typed("fault")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fault", "dorp"), "kind: no fault is called 'dorp'; there are: latency"),
        (("fault", "--count", "3"), "which fault? Name a kind first"),
        (("fault", "drop", "--count", "1", "--probability", "0.5"), "either --count or --probability"),
        (("fault", "drop", "--for", "soon"), "'soon' is no span of time; write 30s, 10m, 2h or 1d"),
        (("fault", "drop", "--schedule", "x"), "--schedule goes alone"),
        (("fault", "--schedule", "no-such.toml"), "no-such.toml: No such file or directory"),
        (("ledger", "--since", "yesterday"), "'yesterday' is no span of time"),
        (("ledger", "--state", "no-such-folder"), "no paper exchange runs on the state folder no-such-folder: start it with `fmzbus up`"),
        (("fault", "--state", "no-such-folder"), "no paper exchange runs on the state folder no-such-folder"),
    ],
)
def test_a_mistake_at_the_command_is_named(on_shared_system: None, arguments: tuple[str, ...], told: str) -> None:
    status, out, err = typed(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"fmzbus: {told}"), err


def test_help_shows_examples_that_work(on_shared_system: None) -> None:
    _, out, _ = typed("fault", "--help")
    examples = re.findall(r"^ +fmzbus paper (fault [a-z].*(?:\\\n.*)?)$", out, re.M)
    assert len(examples) == 3
    for example in examples:
        arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|[^\s\\]+', example)]
        assert typed(*arguments, "--key", "nobody")[0] == 0
    assert typed("fault", "--clear")[1] == "cleared 3\n"
