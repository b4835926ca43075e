"""Orders on the paper exchange over real HTTP: what is accepted, what is refused and why, and what anybody may send."""

import asyncio
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paper import GOOD, NOW_S, Client, Clock, exchange, until
from workers.venues.paper import market as model
from workers.venues.paper.markets import MARKETS


async def test_an_order_lives_and_is_found_by_both_ids(client: Client, clock: Clock) -> None:
    placed = await client.order("ETH_BTC", "sell", type="limit", price="1000", amount="1", client_order_id="A-1_z")
    assert placed == {
        "id": "1",
        "client_order_id": "A-1_z",
        "symbol": "ETH_BTC",
        "side": "sell",
        "type": "limit",
        "offset": None,
        "price": "1000",
        "amount": "1",
        "quote_amount": None,
        "filled": "0",
        "average_price": "0",
        "status": "open",
        "time": NOW_S * 1000,
        "update_time": NOW_S * 1000,
    }
    for target in ("/api/v1/orders/1", "/api/v1/orders/by-client-id/A-1_z"):
        assert await client.get(target) == placed
    assert await client.get("/api/v1/orders?symbol=ETH_BTC") == [placed]
    assert await client.get("/api/v1/orders?symbol=BTC_USDT") == []
    clock.now_s += 2
    cancelled = placed | {"status": "cancelled", "update_time": NOW_S * 1000 + 2000}
    assert await client("DELETE", "/api/v1/orders/by-client-id/A-1_z") == (200, cancelled)
    assert await client("DELETE", "/api/v1/orders/1") == (409, {"code": 2012, "message": "the order is cancelled"})
    assert await client.get("/api/v1/orders/by-client-id/A-1_z") == cancelled
    assert await client.get("/api/v1/orders") == []
    assert await client.get("/api/v1/orders/history?symbol=ETH_BTC&limit=5") == [cancelled]


async def test_a_market_order_is_filled_at_once_and_its_fills_say_at_what(client: Client) -> None:
    order = await client.order("BTC_USDT", "buy", type="market", quote_amount="100")
    asks = model.depth(7, "BTC_USDT", NOW_S).asks
    market = MARKETS["BTC_USDT"]
    assert (order["status"], order["amount"], order["quote_amount"]) == ("closed", None, "100")
    (fill,) = await client.get("/api/v1/fills")
    assert fill == {
        "id": "1",
        "order_id": "1",
        "symbol": "BTC_USDT",
        "side": "buy",
        "role": "taker",
        "price": market.price_text(asks[0][0]),
        "amount": order["filled"],
        "fee": "0.000001887",
        "fee_currency": "BTC",
        "time": NOW_S * 1000,
    }
    assert order["average_price"] == fill["price"]


async def test_all_open_orders_are_cancelled_of_one_symbol_or_of_all(client: Client) -> None:
    for symbol, price in (("BTC_USDT", "40000"), ("ETH_USDT", "1000"), ("BTC_USDT", "40001")):
        await client.order(symbol, "buy", type="limit", price=price, amount="0.01")
    assert await client("DELETE", "/api/v1/orders?symbol=BTC_USDT") == (200, {"cancelled": ["1", "3"]})
    assert await client("DELETE", "/api/v1/orders") == (200, {"cancelled": ["2"]})
    assert {"currency": "USDT", "free": "1000000", "frozen": "0"} in (await client.get("/api/v1/account"))["balances"]


async def test_a_swap_position_shows_and_closes(client: Client) -> None:
    assert await client("POST", "/api/v1/leverage", {"symbol": "BTC_USDT.swap", "leverage": 20}) == (
        200,
        {"symbol": "BTC_USDT.swap", "leverage": 20},
    )
    order = await client.order("BTC_USDT.swap", "sell", type="market", amount="0.01")
    (position,) = await client.get("/api/v1/positions?symbol=BTC_USDT.swap")
    assert {name: position[name] for name in ("side", "amount", "frozen", "entry_price", "leverage")} == {
        "side": "short",
        "amount": "0.01",
        "frozen": "0",
        "entry_price": order["average_price"],
        "leverage": 20,
    }
    assert float(position["margin"]) == pytest.approx(float(order["average_price"]) / 2000)
    assert float(position["liquidation_price"]) == pytest.approx(float(order["average_price"]) * 1.05, rel=1e-5)
    await client.order("BTC_USDT.swap", "buy", type="market", amount="0.01", offset="close")
    assert await client.get("/api/v1/positions") == []


async def test_resting_orders_fill_by_themselves(client: Client, clock: Clock, tmp_path: Path) -> None:
    order = await client.order("BTC_USDT", "buy", type="limit", price="52900", amount="0.001")
    assert order["status"] == "open"
    while model.second(7, "BTC_USDT", int(clock.now_s)).low >= 52_900_00:
        clock.now_s += 1
    with sqlite3.connect(tmp_path / "paper/paper.sqlite3") as db:
        await until(lambda: db.execute("SELECT status, filled FROM orders").fetchone() == ("closed", 1_000))
    db.close()
    (fill,) = await client.get("/api/v1/fills")
    assert (fill["price"], fill["amount"], fill["role"]) == ("52900", "0.001", "maker")


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"symbol": "BTC_CNY"}, 400, 2001, "unknown symbol 'BTC_CNY'; GET /api/v1/markets lists them"),
        ({"price": "50000.001"}, 400, 2003, "price: 50000.001 is not a multiple of the tick size 0.01; the nearest is 50000"),
        ({"price": "0.001"}, 400, 2003, "price: 0.001 is not a multiple of the tick size 0.01; the nearest is 0.01"),
        ({"amount": "0.0100007"}, 400, 2004, "amount: 0.0100007 is not a multiple of the lot size 0.000001; the nearest is 0.010001"),
        ({"amount": "0.0000001"}, 400, 2005, "amount: 0.0000001 is below the minimum 0.000001"),
        (
            {"amount": "0.000001"},
            400,
            2005,
            "amount: 0.000001 at 50000 is worth 0.05 USDT, below the minimum worth 1; the nearest is 0.00002",
        ),
        ({"amount": "1000.000001"}, 400, 2006, "amount: 1000.000001 is above the maximum 1000"),
        ({"price": "999999999999999999"}, 400, 2006, "price: 999999999999999999 is above the maximum 10000000000"),
        ({"amount": "100"}, 400, 2010, "amount: insufficient balance, 5000000 USDT needed, 1000000 free; the most is 20"),
        ({"amount": 0.01}, 400, 2002, "Expected `str | null`, got `float` - at `$.amount`"),
        ({"amount": True}, 400, 2002, "Expected `str | null`, got `bool` - at `$.amount`"),
        ({"amount": "NaN"}, 400, 2002, 'amount: expected plain decimal notation, such as "0.25"'),
        ({"amount": "Infinity"}, 400, 2002, 'amount: expected plain decimal notation, such as "0.25"'),
        ({"amount": "-1"}, 400, 2002, 'amount: expected plain decimal notation, such as "0.25"'),
        ({"amount": "1e-2"}, 400, 2002, 'amount: expected plain decimal notation, such as "0.25"'),
        ({"amount": "1" * 5000}, 400, 2002, 'amount: expected plain decimal notation, such as "0.25"'),
        ({"amount": "٣"}, 400, 2002, 'amount: expected plain decimal notation, such as "0.25"'),
        ({"amount": "0.0"}, 400, 2002, "amount: expected more than zero"),
        ({"price": "0.00000000000000001"}, 400, 2002, 'price: at most 12 decimals are counted, such as "0.25"'),
        ({"amount": None}, 400, 2002, "amount: required for this limit order"),
        ({"quote_amount": "5"}, 400, 2002, "quote_amount: not allowed in this limit order"),
        ({"type": "market"}, 400, 2002, "price: not allowed in this market order"),
        ({"offset": "open"}, 400, 2002, "offset: only swaps have it"),
        ({"side": "hold"}, 400, 2002, "Invalid enum value 'hold' - at `$.side`"),
        ({"client_order_id": "a b"}, 400, 2002, "Expected `str` matching regex '\\\\A[A-Za-z0-9_-]{1,64}\\\\Z' - at `$.client_order_id`"),
        (
            {"client_order_id": "x" * 65},
            400,
            2002,
            "Expected `str` matching regex '\\\\A[A-Za-z0-9_-]{1,64}\\\\Z' - at `$.client_order_id`",
        ),
        ({"ammount": "1"}, 400, 2002, "Object contains unknown field `ammount`"),
        ({"expires_at": NOW_S * 1000 - 1}, 400, 1004, f"expires_at: arrived at {NOW_S * 1000}, 1 ms too late"),
        ({"symbol": "BTC_USDT.swap", "offset": "close"}, 400, 2014, "amount: only 0 of the short position can be closed"),
    ],
)
async def test_a_wrong_order_is_told_what_is_wrong(client: Client, change: dict[str, Any], status: int, code: int, message: str) -> None:
    assert await client("POST", "/api/v1/orders", GOOD | change) == (status, {"code": code, "message": message})
    assert await client.get("/api/v1/orders") == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"price": "50000.001"}, "price"),
        ({"price": "999999999999", "side": "sell"}, "price"),
        ({"amount": "0.0100007"}, "amount"),
        ({"amount": "0.0000101"}, "amount"),
        ({"amount": "1000.5", "side": "sell"}, "amount"),
        ({"amount": "100"}, "amount"),
        ({"amount": "20000.1", "side": "sell", "symbol": "ETH_BTC", "price": "1"}, "amount"),
        ({"type": "market", "price": None, "amount": None, "quote_amount": "0.5"}, "quote_amount"),
        ({"type": "market", "price": None, "amount": None, "quote_amount": "2000000"}, "quote_amount"),
    ],
)
async def test_the_value_that_a_refusal_names_is_accepted(client: Client, change: dict[str, Any], field: str) -> None:
    """A refusal that is met again with what it named may find another rule broken, never the same."""
    order, told = GOOD | change, []
    while (reply := await client("POST", "/api/v1/orders", order))[0] != 200:
        message = reply[1]["message"]
        assert message.startswith(f"{field}: ")
        told.append(reply[1]["code"])
        named = re.search(r"(?:nearest is|most is|maximum|minimum|minimum worth) ([0-9.]+)(?: USDT)?$", message)
        assert named, message
        order[field] = named[1]
    assert len(told) == len(set(told)) >= 1


async def test_an_order_that_arrives_in_time_is_served(client: Client) -> None:
    assert (await client.order("BTC_USDT", "buy", type="limit", price="50000", amount="0.01", expires_at=NOW_S * 1000))["status"] == "open"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, 1006),
        (b"[]", 400, 2002),
        (b"{", 400, 1006),
        (b'{"price": NaN}', 400, 1006),
        (b'{"symbol": "\xff"}', 400, 1006),
        (b'{"symbol": "\\ud800"}', 400, 1006),
        (b"[" * 10_000 + b"]" * 10_000, 400, 2002),
        (b'{"symbol":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, 2002),
        (b'{"x":"' + b"a" * 65_536 + b'"}', 413, 1005),
        (b'{"symbol": 1e999}', 400, 2002),
    ],
)
async def test_a_broken_body_is_refused_on_every_path(client: Client, body: bytes, status: int, code: int) -> None:
    answered, document = await client("POST", "/api/v1/orders", body)
    assert (answered, document["code"]) == (status, code)
    assert (await client("POST", "/api/v1/leverage", body))[0] == status
    assert (await client("POST", "/anything", body))[0] in (200, status)


bodies = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["symbol", "side", "type", "price", "amount", "leverage"]) | st.text(), inner)
    ),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())


def test_any_body_gets_an_answer_of_ours(tmp_path: Path) -> None:
    @given(bodies)
    @settings(max_examples=60, deadline=None)
    def check(body: bytes) -> None:
        async def ask() -> None:
            for verb, target in (("POST", "/api/v1/orders"), ("POST", "/api/v1/leverage"), ("PUT", "/elsewhere")):
                status, document = await client(verb, target, body)
                assert status == 200 or (400 <= status < 500 and document["code"] and document["message"]), document

        runner.run(ask())

    with asyncio.Runner() as runner:
        running = exchange(tmp_path / "paper", Clock())
        client = runner.run(running.__aenter__())
        try:
            check()
        finally:
            runner.run(running.__aexit__(None, None, None))


@pytest.mark.parametrize(("leverage", "code"), [(0, 2015), (101, 2015), (-1, 2015), (10**30, 2015), (True, 2002), ("5", 2002), (1.5, 2002)])
async def test_leverage_out_of_range_is_refused(client: Client, leverage: object, code: int) -> None:
    status, document = await client("POST", "/api/v1/leverage", {"symbol": "BTC_USDT.swap", "leverage": leverage})
    assert (status, document["code"]) == (400, code)
    assert await client.get("/api/v1/leverage?symbol=BTC_USDT.swap") == {"symbol": "BTC_USDT.swap", "leverage": 10}
    assert (await client("POST", "/api/v1/leverage", {"symbol": "BTC_USDT", "leverage": 2}))[1]["code"] == 2002


async def test_equal_client_order_ids_at_once_make_one_order(client: Client) -> None:
    order = GOOD | {"client_order_id": "once"}
    await client.get("/api/v1/account")
    replies = await asyncio.gather(*(client("POST", "/api/v1/orders", order) for _ in range(20)))
    assert sorted(status for status, _ in replies) == [200] + [409] * 19
    assert {document["code"] for status, document in replies if status == 409} == {2013}
    assert len(await client.get("/api/v1/orders")) == 1
