"""What goes wrong on purpose, seen from outside with a bare client that knows nothing of how it is done."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.paper import GOOD, NOW_S, Clock
from tests.rig import ORDERS, Rig, rigged, send
from workers.venues.paper.faults import Fault, FaultError, Faults, Wanted, scheduled, wanted

pytestmark = pytest.mark.slow

TICKER = "/api/v1/ticker?symbol=BTC_USDT"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rigged(tmp_path / "paper") as made:
        yield made


# Each kind, seen from outside

CUT = {"no": b'{"id":"0","st', "yes": b'{"id":"1","client_order_id":"c0",'}

SPOILT = [
    ("execute-then-drop", {}, True, 0, None, b""),
    ("drop", {}, False, 0, None, b""),
    ("http-503", {}, False, 503, None, b"Service Unavailable\n"),
    ("http-503", {"executed": True}, True, 503, None, b"Service Unavailable\n"),
    ("http-502-html", {}, False, 502, None, b"<html>\r\n<head><title>502 Bad Gateway</title>"),
    ("http-502-html", {"executed": True}, True, 502, None, b"<html>\r\n<head><title>502 Bad Gateway</title>"),
    ("html-200", {}, False, 200, None, b"<html>\r\n<head><title>Please wait</title>"),
    ("html-200", {"executed": True}, True, 200, None, b"<html>\r\n<head><title>Please wait</title>"),
    ("truncated-json", {"executed": False}, False, 200, None, CUT["no"]),
    ("truncated-json", {}, True, 200, None, CUT["yes"]),
    ("no-id", {}, True, 200, 0, b'{"client_order_id":"c0","symbol":"BTC_USDT",'),
    ("rate-limit", {"seconds": 3}, False, 429, 1101, b'{"code":1101,"message":"too many requests"}'),
    ("ban", {}, False, 418, 1102, b'{"code":1102,"message":"banned for going on after too many requests"}'),
    ("maintenance", {}, False, 503, 1103, b'{"code":1103,"message":"the exchange is under maintenance"}'),
]


@pytest.mark.parametrize(("kind", "fields", "executed", "status", "code", "begins"), SPOILT)
async def test_a_spoilt_order_looks_as_its_kind_says_and_as_often(
    rig: Rig, kind: str, fields: dict[str, Any], executed: object, status: int, code: int | None, begins: bytes
) -> None:
    await rig.arm(kind, count=2, **fields)
    answers = [await rig.place(f"c{number}") for number in range(3)]
    assert [answer.status for answer in answers] == [status, status, 200]
    assert answers[0].body.startswith(begins)
    assert answers[2].json["status"] == "open"
    if status:
        assert int(answers[0].headers["content-length"]) == len(answers[0].body)
    if kind == "truncated-json":
        with pytest.raises(ValueError, match=r"Unterminated string|Expecting"):
            json.loads(answers[0].body)
    waits = {"rate-limit": "3", "ban": "60", "maintenance": "60"}
    assert answers[0].headers.get("retry-after") == waits.get(kind)
    placed = {order["client_order_id"] for order in (await rig("GET", ORDERS)).json}
    assert placed == ({"c0", "c1", "c2"} if executed else {"c2"})
    rows = await rig.ledger()
    spoilt = (executed, status or None, code, bool(status), kind)
    assert [(row["executed"], row["status"], row["code"], row["delivered"], row["fault"]) for row in rows] == [
        spoilt,
        spoilt,
        (True, 200, 0, True, None),
    ]
    assert [row["order"] and row["order"]["client_order_id"] for row in rows] == (["c0", "c1", "c2"] if executed else [None, None, "c2"])
    assert await rig.armed() == []


@pytest.mark.parametrize(
    ("kind", "status", "begins"),
    [
        ("drop", 0, b""),
        ("http-503", 503, b"Service"),
        ("http-502-html", 502, b"<html>"),
        ("html-200", 200, b"<html>"),
        ("truncated-json", 200, b'{"symbol":"BTC_USDT","time":'),
        ("rate-limit", 429, b'{"code":1101'),
        ("ban", 418, b'{"code":1102'),
        ("maintenance", 503, b'{"code":1103'),
    ],
)
async def test_public_reads_meet_faults_as_well(rig: Rig, kind: str, status: int, begins: bytes) -> None:
    await rig.arm(kind, count=1)
    first, second = await rig("GET", TICKER), await rig("GET", TICKER)
    assert (first.status, second.status) == (status, 200)
    assert first.body.startswith(begins)
    assert second.json["symbol"] == "BTC_USDT"


async def test_faults_that_execute_leave_reads_and_refusals_alone(rig: Rig) -> None:
    await rig.arm("execute-then-drop", count=1)
    assert (await rig("GET", TICKER)).status == 200
    assert (await rig.place("poor", amount="100")).json["code"] == 2010
    assert (await rig.place("good")).status == 0
    assert (await rig.place("next")).status == 200


async def test_a_cancel_can_be_executed_and_lost(rig: Rig) -> None:
    order = (await rig.place("c")).json
    await rig.arm("execute-then-drop", count=1)
    assert (await rig("DELETE", f"{ORDERS}/{order['id']}")).status == 0
    assert (await rig("GET", f"{ORDERS}/{order['id']}")).json["status"] == "cancelled"


async def test_latency_lets_a_request_arrive_late(rig: Rig) -> None:
    await rig.client.get("/api/v1/account")  # the ledger knows accounts: a new key's refused first call opens none
    await rig.arm("latency", seconds=0.7, count=1)
    late = asyncio.create_task(rig.place("late"))
    async with asyncio.timeout(5):
        while await rig.armed():
            pass
    rig.clock.now_s += 6
    assert (await late).json["code"] == 1003
    (row,) = await rig.ledger()
    assert (row["fault"], row["received_ms"], row["executed"]) == ("latency", (NOW_S + 6) * 1000, False)
    started = asyncio.get_running_loop().time()
    await rig.arm("latency", seconds=0.2, jitter=0.1, count=1)
    assert (await rig("GET", TICKER)).status == 200
    assert asyncio.get_running_loop().time() - started >= 0.1


async def test_a_late_reply_is_executed_at_once(rig: Rig) -> None:
    await rig.arm("late-reply", seconds=0.7, count=1)
    late = asyncio.create_task(rig.place("late"))
    rows = await rig.ledger_once(lambda rows: bool(rows) and rows[0]["executed"])
    assert not late.done()
    assert [(row["status"], row["delivered"], row["fault"]) for row in rows] == [(200, None, "late-reply")]
    answer = await late
    assert (answer.status, answer.json["id"]) == (200, rows[0]["order_id"])
    await rig.ledger_once(lambda rows: rows[0]["delivered"] is True)


async def test_a_reply_to_somebody_who_has_gone_is_not_delivered(rig: Rig) -> None:
    await rig.arm("late-reply", seconds=0.7, count=1)
    body = json.dumps(GOOD | {"client_order_id": "gone"}).encode()
    lines = [f"POST {ORDERS} HTTP/1.1", "Host: paper", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in rig.client.signed("POST", ORDERS, body).items()]
    _, writer = await asyncio.open_connection("127.0.0.1", int(rig.client.base.rpartition(":")[2]))
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await rig.ledger_once(bool)
    writer.close()
    await writer.wait_closed()
    (row,) = await rig.ledger_once(lambda rows: rows[0]["delivered"] is not None)
    assert (row["executed"], row["status"], row["delivered"]) == (True, 200, False)


async def test_a_duplicate_client_order_id_becomes_a_second_order(rig: Rig) -> None:
    await rig.arm("duplicate-client-id", count=1)
    answers = [await rig.place("twice"), await rig.place("twice"), await rig.place("twice")]
    assert [answer.status for answer in answers] == [200, 200, 409]
    first, second = (answer.json["id"] for answer in answers[:2])
    assert first != second
    assert [(row["id"], row["client_order_id"]) for row in (await rig("GET", ORDERS)).json] == [(first, "twice"), (second, "twice")]
    rows = await rig.ledger("?client_order_id=twice")
    assert [(row["executed"], row["order_id"], row["fault"]) for row in rows] == [
        (True, first, None),
        (True, second, "duplicate-client-id"),
        (False, None, None),
    ]
    assert (await rig("DELETE", f"{ORDERS}/by-client-id/twice")).json["id"] == first
    assert (await rig("DELETE", f"{ORDERS}/{second}")).json["status"] == "cancelled"
    assert (await rig("GET", ORDERS)).json == []


async def test_two_orders_with_one_client_order_id_are_there_after_a_restart(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        await rig.arm("duplicate-client-id")
        ids = [(await rig.place("twice")).json["id"] for _ in range(2)]
    async with rigged(tmp_path) as rig:
        for order_id in reversed(ids):
            assert (await rig("DELETE", f"{ORDERS}/{order_id}")).json["status"] == "cancelled"


@pytest.mark.parametrize("skew", [30, -30])
async def test_a_skewed_clock_shifts_time_and_windows(rig: Rig, skew: int) -> None:
    await rig.arm("clock-skew", seconds=skew)
    assert (await rig("GET", "/api/v1/time")).json == {"time": (NOW_S + skew) * 1000}
    assert (await rig.place("by-the-true-clock")).json["code"] == 1003
    body = json.dumps(GOOD | {"expires_at": NOW_S * 1000}).encode()
    headers = rig.client.signed("POST", ORDERS, body, time_ms=(NOW_S + skew) * 1000)
    answer = await send(int(rig.client.base.rpartition(":")[2]), "POST", ORDERS, body, headers)
    assert (answer.status, answer.json.get("code")) == ((400, 1004) if skew > 0 else (200, None))
    assert {row["received_ms"] for row in await rig.ledger()} == {NOW_S * 1000}
    await rig.control("DELETE", "/faults?kind=clock-skew")
    assert (await rig("GET", "/api/v1/time")).json == {"time": NOW_S * 1000}


async def test_a_stale_read_does_not_know_new_orders_yet(rig: Rig) -> None:
    order = (await rig.place("new")).json
    await rig.arm("stale-read", seconds=5)
    assert (await rig("GET", f"{ORDERS}/by-client-id/new")).json == {"code": 2011, "message": "no order with this id"}
    assert (await rig("GET", f"{ORDERS}/{order['id']}")).status == 404
    assert (await rig("GET", ORDERS)).json == []
    rig.clock.now_s += 5
    assert (await rig("GET", f"{ORDERS}/by-client-id/new")).json["id"] == order["id"]
    assert [row["id"] for row in (await rig("GET", ORDERS)).json] == [order["id"]]


# Where, how often, when


async def test_a_fault_strikes_where_path_symbol_and_key_fit(rig: Rig) -> None:
    await rig.arm("http-503", path="POST /api/v1/orders", symbol="ETH_USDT", key="key-1")
    assert (await rig.place("a")).status == 200
    assert (await rig.place("b", symbol="ETH_USDT", price="1000")).status == 503
    assert (await rig("GET", "/api/v1/depth?symbol=ETH_USDT")).status == 200
    other = Rig(rig.client.other("key-2", "s"), rig.clock, rig.state)
    resting = (await other.place("c", symbol="ETH_USDT", price="1000")).json
    await rig.arm("http-502-html", path="/api/v1/orders/*", symbol="ETH_USDT")
    assert (await other("DELETE", f"{ORDERS}/{resting['id']}")).status == 502
    assert (await other("DELETE", f"{ORDERS}/999")).status == 404
    await rig.control("DELETE", "/faults")
    await rig.arm("drop", path="/api/v1/ticker|GET /api/v1/orders")
    statuses = [(await rig(verb, target)).status for verb, target in (("GET", TICKER), ("GET", ORDERS), ("DELETE", ORDERS))]
    assert statuses == [0, 0, 200]
    await rig.control("DELETE", "/faults")
    await rig.arm("drop", path="DELETE")
    assert [(await rig(verb, ORDERS)).status for verb in ("GET", "DELETE")] == [200, 0]


async def test_a_request_with_a_wrong_signature_meets_no_order_fault(rig: Rig) -> None:
    await rig.arm("http-503", path="POST /api/v1/orders", count=1)
    assert (await rig("POST", ORDERS, GOOD, **{"Paper-Sign": "0"})).json["code"] in (1001, 1002)
    assert (await rig.place("right")).status == 503


async def test_requests_at_once_meet_a_fault_exactly_as_often_as_its_count(rig: Rig) -> None:
    await rig.arm("execute-then-drop", count=7)
    answers = await asyncio.gather(*(rig.place(f"c{number}", amount="0.001") for number in range(20)))
    assert sorted(answer.status for answer in answers) == [0] * 7 + [200] * 13
    rows = await rig.ledger()
    assert len({row["order_id"] for row in rows}) == 20
    assert sum(row["delivered"] is False for row in rows) == 7


async def test_a_probability_strikes_the_same_requests_in_every_run(rig: Rig) -> None:
    await rig.arm("http-503", probability=0.4)
    seen = [(await rig("GET", TICKER)).status for _ in range(60)]
    again = Faults(rig.clock, seed=7)
    again.arm(Wanted(kind="http-503", probability=0.4))
    assert seen == [503 if again.take("http-503", path="GET /api/v1/ticker") else 200 for _ in range(60)]
    assert 10 < seen.count(503) < 40
    other = Faults(rig.clock, seed=8)
    other.arm(Wanted(kind="http-503", probability=0.4))
    assert seen != [503 if other.take("http-503") else 200 for _ in range(60)]
    (row,) = await rig.armed()
    assert row["struck"] == seen.count(503)


def test_jitter_is_drawn_for_each_strike_and_never_turns_time_back() -> None:
    faults = Faults(Clock(), seed=1)
    faults.arm(Wanted(kind="slow-socket", seconds=1, jitter=2, count=200))
    spans = [fault.seconds for _ in range(200) if (fault := faults.take("slow-socket", path="depth", symbol="BTC_USDT"))]
    assert len(spans) == 200
    assert (min(spans), max(spans) <= 3, len(set(spans)) > 100) == (0.0, True, True)


async def test_a_fault_ends_after_its_time_and_tells_how_long_it_lasts(rig: Rig) -> None:
    await rig.arm("maintenance", for_s=90)
    assert (await rig("GET", TICKER)).headers["retry-after"] == "90"
    rig.clock.now_s += 80.5
    assert (await rig("GET", TICKER)).headers["retry-after"] == "10"
    rig.clock.now_s += 9.5
    assert (await rig("GET", TICKER)).status == 200
    assert await rig.armed() == []


async def test_clear_takes_one_kind_or_all(rig: Rig) -> None:
    for kind in ("drop", "drop", "stall", "http-503"):
        await rig.arm(kind, symbol="XRP_USDT")
    assert (await rig.control("DELETE", "/faults?kind=drop")).json == {"cleared": 2}
    assert [row["kind"] for row in await rig.armed()] == ["stall", "http-503"]
    assert (await rig.control("DELETE", "/faults?kind=nothing")).status == 400
    assert (await rig.control("DELETE", "/faults")).json == {"cleared": 2}


SCHEDULE = b"""
[[fault]]
at_s = 10
for_s = 5
kind = "http-503"

[[fault]]
at_s = 12
kind = "rate-limit"
count = 1
path = "/api/v1/ticker"
"""


async def test_a_schedule_runs_by_the_exchanges_clock(rig: Rig) -> None:
    armed = (await rig.control("POST", "/schedule", SCHEDULE)).json
    assert [(row["kind"], row["begins_in_s"], row["left_s"], row["count"]) for row in armed] == [
        ("http-503", 10, 5, None),
        ("rate-limit", 12, None, 1),
    ]
    seen = []
    for now_s in (0, 9, 10, 12, 14, 15, 16):
        rig.clock.now_s = NOW_S + now_s
        seen.append((now_s, (await rig("GET", TICKER)).status))
    assert seen == [(0, 200), (9, 200), (10, 503), (12, 429), (14, 503), (15, 200), (16, 200)]


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_fault_or_an_error_that_says_why(body: bytes) -> None:
    for decode in (wanted, lambda text: scheduled(text.decode(errors="replace"))):
        with suppress(FaultError):
            assert decode(body)


async def test_only_so_many_faults_can_be_armed() -> None:
    faults = Faults(Clock(), seed=1)
    faults.schedule([Wanted(kind="drop")] * 1000)
    with pytest.raises(FaultError, match="at most 1000 faults"):
        faults.arm(Wanted(kind="drop"))
    assert faults.clear() == 1000


def test_socket_faults_are_taken_by_channel_and_symbol() -> None:
    faults = Faults(Clock(), seed=1)
    faults.arm(Wanted(kind="book-gap", path="depth", symbol="BTC_USDT", amount=3, count=1))
    assert faults.take("book-gap", path="ticker", symbol="BTC_USDT") is None
    assert faults.take("book-gap", path="depth", symbol="ETH_USDT") is None
    assert faults.take("book-gap", path="depth /api/v1/stream", symbol="BTC_USDT") == Fault(kind="book-gap", number=1, amount=3.0)
    assert faults.take("book-gap", path="depth", symbol="BTC_USDT") is None


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (Wanted(kind="latency", symbol="NOPE"), "symbol: no market is called 'NOPE'"),
        (Wanted(kind="latency", count=1, probability=0.5), "either count or probability"),
    ],
)
def test_a_fault_that_could_never_strike_as_meant_is_refused(strange: Wanted, said: str) -> None:
    with pytest.raises(FaultError, match=said):
        Faults(Clock(), 7).arm(strange)
