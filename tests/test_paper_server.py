"""The paper exchange over real HTTP on loopback, with a bare client: public endpoints, signatures, the echo, rate limits."""

import asyncio
from pathlib import Path

import pytest

from tests.paper import NOW_S, README, Client, Clock, exchange
from workers.venues.paper import market as model
from workers.venues.paper.auth import sign
from workers.venues.paper.errors import STATUS, Code
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.service import ROUTES

# Public endpoints


async def test_the_markets_are_listed_with_their_rules(client: Client) -> None:
    listed = {row["symbol"]: row for row in await client.get("/api/v1/markets", signed=False)}
    assert sorted(listed) == sorted(MARKETS)
    assert listed["BTC_USDT.swap"] == {
        "symbol": "BTC_USDT.swap",
        "type": "swap",
        "base": "BTC",
        "quote": "USDT",
        "tick_size": "0.1",
        "lot_size": "0.001",
        "min_amount": "0.001",
        "min_notional": "1",
        "max_amount": "1000",
        "contract_size": "1",
        "max_leverage": 100,
        "maker_fee": "0.0002",
        "taker_fee": "0.0005",
    }
    assert (listed["ETH_BTC"]["maker_fee"], listed["ETH_BTC"]["taker_fee"]) == ("0.0008", "0.001")
    assert (await client.get("/api/v1/time", signed=False)) == {"time": NOW_S * 1000}


async def test_the_ticker_shows_the_market_and_its_day(client: Client) -> None:
    market, day = MARKETS["BTC_USDT"], model.span(7, "BTC_USDT", NOW_S + 1 - 86_400, NOW_S + 1)
    depth = model.depth(7, "BTC_USDT", NOW_S)
    assert await client.get("/api/v1/ticker?symbol=BTC_USDT", signed=False) == {
        "symbol": "BTC_USDT",
        "time": NOW_S * 1000,
        "bid": market.price_text(depth.bids[0][0]),
        "ask": market.price_text(depth.asks[0][0]),
        "last": market.price_text(day.close),
        "open": market.price_text(day.open),
        "high": market.price_text(day.high),
        "low": market.price_text(day.low),
        "volume": market.amount_text(day.volume),
    }


async def test_depth_has_the_users_resting_orders_in_it(client: Client) -> None:
    before = await client.get("/api/v1/depth?symbol=BTC_USDT&limit=200", signed=False)
    assert [len(before["asks"]), len(before["bids"])] == [200, 200]
    await client.order("BTC_USDT", "buy", type="limit", price="52000.01", amount="0.5")
    after = await client.get("/api/v1/depth?symbol=BTC_USDT&limit=200", signed=False)
    assert ["52000.01", "0.5"] in after["bids"]
    assert ["52000.01", "0.5"] not in before["bids"]
    assert after["sequence"] > before["sequence"]
    assert await client("GET", "/api/v1/depth?symbol=BTC_USDT&limit=201", signed=False) == (
        400,
        {"code": 2002, "message": "limit: expected a whole number from 1 to 200"},
    )


async def test_trades_are_the_markets_tape_and_the_users_fills(client: Client) -> None:
    tape = await client.get("/api/v1/trades?symbol=ETH_BTC&limit=20", signed=False)
    last = model.second(7, "ETH_BTC", NOW_S).close
    assert len(tape) == 20
    assert [t["time"] for t in tape] == sorted(t["time"] for t in tape)
    assert (tape[-1]["time"], tape[-1]["price"]) == (NOW_S * 1000, MARKETS["ETH_BTC"].price_text(last))
    order = await client.order("ETH_BTC", "sell", type="market", amount="0.01")
    (mine,) = [t for t in await client.get("/api/v1/trades?symbol=ETH_BTC&limit=20", signed=False) if t["id"].startswith("u")]
    assert mine == {"id": "u1", "time": NOW_S * 1000, "price": order["average_price"], "amount": "0.01", "side": "sell"}


async def test_candles_come_in_any_interval_and_end_with_the_unfinished_bar(client: Client) -> None:
    bars = await client.get("/api/v1/candles?symbol=LTC_USDT&interval=1440&limit=3", signed=False)
    day_ms = 86_400_000
    assert [bar[0] for bar in bars] == [NOW_S * 1000 // day_ms * day_ms - back * day_ms for back in (2, 1, 0)]
    ticker = await client.get("/api/v1/ticker?symbol=LTC_USDT", signed=False)
    assert bars[-1][4] == ticker["last"]
    earlier = await client.get(f"/api/v1/candles?symbol=LTC_USDT&interval=1440&limit=2&end={bars[-1][0]}", signed=False)
    assert earlier == bars[:2]
    assert len(await client.get("/api/v1/candles?symbol=LTC_USDT&interval=10080&limit=1000", signed=False)) == 1000


@pytest.mark.parametrize(
    ("target", "code", "names"),
    [
        ("/api/v1/ticker", 2002, "symbol"),
        ("/api/v1/ticker?symbol=BTC_CNY", 2001, "BTC_CNY"),
        ("/api/v1/ticker?symbol=" + "x" * 5000, 2001, "xxx"),
        ("/api/v1/ticker?symbol=%ff%fe", 2001, "symbol"),
        ("/api/v1/candles?symbol=BTC_USDT", 2002, "interval"),
        ("/api/v1/candles?symbol=BTC_USDT&interval=0", 2002, "interval"),
        ("/api/v1/candles?symbol=BTC_USDT&interval=1&limit=1001", 2002, "limit"),
        ("/api/v1/candles?symbol=BTC_USDT&interval=1&end=soon", 2002, "end"),
        ("/api/v1/trades?symbol=BTC_USDT&limit=1e3", 2002, "limit"),
    ],
)
async def test_a_wrong_query_is_told_what_is_wrong(client: Client, target: str, code: int, names: str) -> None:
    status, document = await client("GET", target, signed=False)
    assert (status, document["code"]) == (400, code)
    assert names in document["message"]
    assert len(document["message"]) <= 200


# Signatures


def test_the_readmes_signature_is_right() -> None:
    text = README.read_text()
    body = b'{"symbol":"BTC_USDT","side":"buy","type":"limit","price":"50000","amount":"0.01"}'
    signature = sign(b"demo-secret", timestamp="1795168693000", window="5000", verb="POST", target="/api/v1/orders", body=body)
    assert body.decode() in text
    assert f"Paper-Sign: {signature}" in text


def test_the_readme_lists_every_endpoint_code_and_market() -> None:
    text = README.read_text()
    for (verb, path), found in ROUTES.items():
        shown = path.replace("by-client-id/*", "by-client-id/{client_order_id}").replace("*", "{id}")
        assert f"| `{verb} {shown}` | {found.weight} |" in text
    for code in Code:
        assert f"| {code.value} | {int(STATUS.get(code, 400))} |" in text
    for market in MARKETS.values():
        row = market.listing()
        assert (
            f"| {row['symbol']} | {row['tick_size']} | {row['lot_size']} | {row['max_amount']} | {row['min_notional']} {market.quote} |"
            in text
        )


async def test_a_new_key_gets_play_money(client: Client) -> None:
    assert (await client.get("/api/v1/account")) == {
        "balances": [
            {"currency": "BTC", "free": "10000", "frozen": "0"},
            {"currency": "DOGE", "free": "10000000", "frozen": "0"},
            {"currency": "ETH", "free": "100000", "frozen": "0"},
            {"currency": "LTC", "free": "100000", "frozen": "0"},
            {"currency": "SOL", "free": "100000", "frozen": "0"},
            {"currency": "USDT", "free": "1000000", "frozen": "0"},
            {"currency": "XRP", "free": "10000000", "frozen": "0"},
        ]
    }


async def test_the_first_secret_is_bound_to_its_key(client: Client) -> None:
    await client.get("/api/v1/account")
    thief = client.other("key-1", "another")
    assert await thief("GET", "/api/v1/account") == (401, {"code": 1002, "message": "this key is bound to another secret"})
    silent = thief.signed("GET", "/api/v1/account", b"")
    del silent["Paper-Secret"]
    assert (await client("GET", "/api/v1/account", signed=False, headers=silent))[1]["code"] == 1002
    known = client.signed("GET", "/api/v1/account", b"")
    del known["Paper-Secret"]
    assert (await client("GET", "/api/v1/account", signed=False, headers=known))[0] == 200


async def test_a_new_key_must_show_its_secret(client: Client) -> None:
    headers = client.signed("GET", "/api/v1/account", b"")
    del headers["Paper-Secret"]
    status, document = await client("GET", "/api/v1/account", signed=False, headers=headers)
    assert (status, document["code"]) == (401, 1001)


@pytest.mark.parametrize("missing", ["Paper-Key", "Paper-Timestamp", "Paper-Sign"])
async def test_a_missing_header_is_named(client: Client, missing: str) -> None:
    headers = client.signed("GET", "/api/v1/account", b"")
    del headers[missing]
    assert await client("GET", "/api/v1/account", signed=False, headers=headers) == (
        401,
        {"code": 1001, "message": f"{missing}: the header is missing"},
    )


async def test_a_signature_holds_for_one_request_only(client: Client) -> None:
    body = b'{"symbol":"BTC_USDT","side":"buy","type":"market","quote_amount":"10"}'
    headers = client.signed("POST", "/api/v1/orders", body)
    for verb, target, data in (
        ("POST", "/api/v1/orders", body.replace(b"10", b"99")),
        ("POST", "/api/v1/orders?x=1", body),
        ("DELETE", "/api/v1/orders", body),
    ):
        assert (await client(verb, target, data, signed=False, headers=headers))[1]["code"] == 1002
    assert (await client("POST", "/api/v1/orders", body, signed=False, headers=headers | {"Paper-Window": "9000"}))[1]["code"] == 1002
    assert (await client("POST", "/api/v1/orders", body, signed=False, headers=headers))[0] == 200


@pytest.mark.parametrize(("late_ms", "window", "code"), [(5_000, "", None), (5_001, "", 1003), (-5_001, "", 1003), (59_000, "60000", None)])
async def test_a_request_may_travel_as_long_as_its_window(client: Client, late_ms: int, window: str, code: int | None) -> None:
    headers = client.signed("GET", "/api/v1/account", b"", time_ms=NOW_S * 1000 - late_ms, window=window)
    status, document = await client("GET", "/api/v1/account", signed=False, headers=headers)
    assert (status, document.get("code")) == (401 if code else 200, code)


@pytest.mark.parametrize("window", ["0", "60001", "-1", "1e3", "x" * 5000])
async def test_a_window_out_of_bounds_is_refused(client: Client, window: str) -> None:
    headers = client.signed("GET", "/api/v1/account", b"", window=window)
    assert (await client("GET", "/api/v1/account", signed=False, headers=headers))[1]["code"] == 1001


async def test_two_accounts_do_not_see_each_other(client: Client) -> None:
    other = client.other("key-2", "secret-2")
    order = await client.order("BTC_USDT", "buy", type="limit", price="40000", amount="1", client_order_id="mine")
    await client.order("BTC_USDT.swap", "buy", type="market", amount="0.01")
    for target in (f"/api/v1/orders/{order['id']}", "/api/v1/orders/by-client-id/mine"):
        for verb in ("GET", "DELETE"):
            assert await other(verb, target) == (404, {"code": 2011, "message": "no order with this id"})
    for target in ("/api/v1/orders", "/api/v1/orders/history", "/api/v1/fills", "/api/v1/positions"):
        assert await other.get(target) == []
    assert await other("DELETE", "/api/v1/orders") == (200, {"cancelled": []})
    assert (await client.get(f"/api/v1/orders/{order['id']}"))["status"] == "open"


# Whatever else is signed


async def test_an_unknown_resource_is_echoed_when_signed(client: Client) -> None:
    status, document = await client("POST", "/cancel_borrow?a=1&b=x%20y&borrow_id=9", {"borrow_id": "123", "symbol": "cny"})
    assert (status, document) == (
        200,
        {"verb": "POST", "path": "/cancel_borrow", "params": {"a": "1", "b": "x y", "borrow_id": "123", "symbol": "cny"}},
    )
    assert await client("DELETE", "/api/v1/ticker", b"symbol=BTC_USDT&n=") == (
        200,
        {"verb": "DELETE", "path": "/api/v1/ticker", "params": {"symbol": "BTC_USDT", "n": ""}},
    )
    assert (await client("GET", "/nowhere", signed=False))[1]["code"] == 1001


async def test_bytes_that_are_no_text_in_the_request_line_break_nothing(client: Client) -> None:
    port = int(client.base.rpartition(":")[2])
    for target in (b"/\xff\xfe?\xff=\xff", b"/%ff%00?%ff=%00", b"/api/v1/orders/\xff"):
        decoded = target.decode("utf-8", "surrogateescape")
        headers = client.signed("DELETE", decoded, b"")
        lines = [b"DELETE " + target + b" HTTP/1.1", b"Host: x", b"Connection: close", *(f"{k}: {v}".encode() for k, v in headers.items())]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\r\n".join(lines) + b"\r\n\r\n")
        status = int((await reader.read()).split()[1])
        writer.close()
        assert status in (200, 400, 404)
    assert (await client("GET", "/api/v1/account"))[0] == 200


# Limits


async def test_too_many_requests_are_refused_then_banned(tmp_path: Path, clock: Clock) -> None:
    async with exchange(tmp_path, clock, limit_a_minute=20) as client:
        for _ in range(10):
            await client.get("/api/v1/account")
        assert client.weights == list(range(2, 21, 2))
        wait_s = 60 - NOW_S % 60 + 1
        for _ in range(10):
            async with client.session.get(client.base + "/api/v1/fills", headers=client.signed("GET", "/api/v1/fills", b"")) as reply:
                assert (reply.status, reply.headers["Retry-After"]) == (429, str(wait_s))
                assert (await reply.json())["code"] == 1101
        for _ in range(2):
            async with client.session.get(client.base + "/api/v1/fills", headers=client.signed("GET", "/api/v1/fills", b"")) as reply:
                assert (reply.status, reply.headers["Retry-After"] in ("60", "61")) == (418, True)
                assert (await reply.json())["code"] == 1102
        # The public endpoints count by address, another key by itself.
        assert (await client("GET", "/api/v1/time", signed=False))[0] == 200
        assert (await client.other("key-2", "s")("GET", "/api/v1/account"))[0] == 200
        clock.now_s += 59
        assert (await client("GET", "/api/v1/account"))[0] == 418
        clock.now_s += 2
        assert (await client("GET", "/api/v1/account"))[0] == 200


async def test_the_limit_opens_again_with_the_next_minute(tmp_path: Path, clock: Clock) -> None:
    async with exchange(tmp_path, clock, limit_a_minute=2) as client:
        statuses = [(await client("GET", "/api/v1/time", signed=False))[0] for _ in range(3)]
        clock.now_s += 60
        assert [*statuses, (await client("GET", "/api/v1/time", signed=False))[0]] == [200, 200, 429, 200]
