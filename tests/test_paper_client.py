"""The paper venue on the whole path: a host trades on the paper exchange as fmz-protocol B.1 says."""

import time
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from yarl import URL

from tests.host import Host
from workers.venues.paper.client import _matches, instrument


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("BTC_USDT", "BTC_USDT"),
        ("btc", "BTC_USDT"),
        ("btc_cny", "BTC_USDT"),
        ("ltc_btc", "LTC_BTC"),
        ("btc_usdt.swap", "BTC_USDT.swap"),
        ("BTC-PERP", "BTC_USDT.swap"),
        ("btc.swap", "BTC_USDT.swap"),
    ],
)
def test_old_and_new_spellings_mean_one_market(written: str, meant: str) -> None:
    assert instrument(written) == meant


@pytest.mark.parametrize("wanted", ["", "SWAP", "BTC_USDT.SWAP", "BTC_USDT", "USDT.SWAP"])
def test_positions_are_asked_for_by_contract_symbol_or_range(wanted: str) -> None:
    assert _matches("BTC_USDT.SWAP", wanted)
    assert not _matches("ETH_USDT.SWAP", "BTC_USDT.SWAP")
    assert not _matches("BTC_USDT.SWAP", "QUARTER")


async def test_the_ticker_echoes_the_callers_spelling(host: Host) -> None:
    for symbol in ("btc", "BTC_USDT", "btc_usdt.SWAP"):
        ticker = (await host("paper", "ticker", symbol=symbol))["data"]
        assert ticker["symbol"] == symbol
        assert ticker["low"] <= ticker["buy"] < ticker["sell"] <= ticker["high"]
        assert abs(ticker["time"] - time.time() * 1000) < 5000


async def test_depth_and_trades_and_records_are_in_order(host: Host) -> None:
    depth = (await host("paper", "depth", symbol="ETH_USDT"))["data"]
    assert len(depth["asks"]) == len(depth["bids"]) == 20
    assert [ask[0] for ask in depth["asks"]] == sorted(ask[0] for ask in depth["asks"])
    assert [bid[0] for bid in depth["bids"]] == sorted((bid[0] for bid in depth["bids"]), reverse=True)
    assert depth["bids"][0][0] < depth["asks"][0][0]
    trades = (await host("paper", "trades", symbol="ETH_USDT"))["data"]
    assert [trade["time"] for trade in trades] == sorted(trade["time"] for trade in trades)
    for period, limit in (("1", 10), ("1440", 3), ("7", 5)):
        records = (await host("paper", "records", symbol="ETH_USDT", period=period, limit=limit))["data"]
        assert len(records) == limit
        assert [row[0] for row in records] == sorted({row[0] for row in records})
        assert {later[0] - sooner[0] for sooner, later in pairwise(records)} == {int(period) * 60}
        assert records[-1][0] <= time.time() < records[-1][0] + int(period) * 60
        assert all(low <= min(opened, close) <= max(opened, close) <= high for _, opened, high, low, close, _ in records)


async def test_an_order_rests_is_listed_and_cancelled(host: Host) -> None:
    trader = host.other("resting", "s")
    placed = await trader("paper", "trade", symbol="BTC_USDT", type="buy", price="1000.00", amount="0.5")
    order_id = placed["data"]["id"]
    assert isinstance(order_id, str)
    expected = {"id": order_id, "amount": 0.5, "price": 1000, "deal_amount": 0, "avg_price": 0, "type": "buy", "symbol": "BTC_USDT"}
    (listed,) = (await trader("paper", "orders", symbol="btc_usdt"))["data"]
    assert {key: listed[key] for key in expected} == expected
    assert listed["status"] == "open"
    assert (await trader("paper", "orders", symbol="ETH_USDT"))["data"] == []
    assert [row["id"] for row in (await trader("paper", "orders"))["data"]] == [order_id]
    frozen = {row["currency"]: row["frozen"] for row in (await trader("paper", "accounts"))["data"]}
    assert frozen["USDT"] == 500
    assert (await trader("paper", "cancel", symbol="BTC_USDT", id=order_id))["data"] is True
    assert (await trader("paper", "order", symbol="BTC_USDT", id=order_id))["data"]["status"] == "cancelled"
    assert (await trader("paper", "orders", symbol="BTC_USDT"))["data"] == []
    assert await trader("paper", "cancel", symbol="BTC_USDT", id=order_id) == {"error": "paper 2012 the order is cancelled"}


@pytest.mark.parametrize("unknown", ["0", "XXX", "ETH-USDT,1547130415509278720", "../orders", "１２", "²", "ß"])
async def test_an_unknown_id_is_an_error(host: Host, unknown: str) -> None:
    for method in ("order", "cancel"):
        reply = await host("paper", method, symbol="BTC_USDT", id=unknown)
        assert reply["error"].startswith("paper 2011 "), reply


async def test_a_market_buy_spends_quote_and_a_market_sell_gives_base(host: Host) -> None:
    trader = host.other("market", "s")
    before = {row["currency"]: row["free"] for row in (await trader("paper", "accounts"))["data"]}
    bought = (await trader("paper", "trade", symbol="ETH_USDT", type="buy", price=-1, amount=100))["data"]["id"]
    order = (await trader("paper", "order", symbol="ETH_USDT", id=bought))["data"]
    assert (order["status"], order["price"], order["amount"]) == ("closed", 0, order["deal_amount"])
    after = {row["currency"]: row["free"] for row in (await trader("paper", "accounts"))["data"]}
    assert 99 < before["USDT"] - after["USDT"] <= 100
    assert after["ETH"] - before["ETH"] == pytest.approx(order["deal_amount"] * 0.999)  # less the taker fee of 0.1 %
    sold = (await trader("paper", "trade", symbol="ETH_USDT", type="sell", price="0", amount="0.02"))["data"]["id"]
    order = (await trader("paper", "order", symbol="ETH_USDT", id=sold))["data"]
    assert (order["deal_amount"], order["type"]) == (0.02, "sell")


async def test_refusals_are_the_exchanges_own_and_are_not_silenced(host: Host) -> None:
    trader = host.other("refused", "s")
    refused: tuple[tuple[dict[str, Any], int], ...] = (
        ({"symbol": "NO_SUCH", "price": "1", "amount": "1"}, 2001),
        ({"symbol": "BTC_USDT", "price": "1000", "amount": "1001"}, 2006),
        ({"symbol": "BTC_USDT", "price": "50000", "amount": "100"}, 2010),
    )
    for params, code in refused:
        reply = await trader("paper", "trade", type="buy", **params)
        assert reply["error"].startswith(f"paper {code} "), reply


async def test_the_same_request_with_the_same_nonce_is_one_order(host: Host) -> None:
    params = {"symbol": "BTC_USDT", "type": "buy", "price": "1000", "amount": "0.1"}
    body = {"access_key": "same", "secret_key": "s", "method": "trade", "params": params}

    async def post(nonce: object, path: str = "paper") -> Any:
        return (await host.post(path, msgspec.json.encode(body | {"nonce": nonce})))["data"]["id"]

    nonce = time.time_ns() | 1
    first = await post(nonce)
    assert await post(nonce) == first
    assert await post(str(nonce)) == first
    assert await post(nonce + 2) != first
    assert await post(nonce, "paper/other-robot") != first
    milliseconds = nonce // 10**6 * 10**6  # a clock that ticks in ms cannot tell requests apart
    assert await post(milliseconds) != await post(milliseconds)


async def test_raw_calls_reach_the_rest_api(host: Host) -> None:
    trader = host.other("raw", "s")
    order: dict[str, Any] = {"symbol": "BTC_USDT", "side": "buy", "type": "limit", "price": "1000", "amount": "0.1"}
    placed = (await trader("paper", "__api_/api/v1/orders", **order))["data"]
    assert placed["status"] == "open"
    get = {"Http-Method": "get"}
    assert (await trader("paper", "__api_/api/v1/orders", headers=get, symbol="BTC_USDT"))["data"] == [placed]
    gone = await trader("paper", f"__api_/api/v1/orders/{placed['id']}", headers={"Http-Method": "DELETE"})
    assert gone["data"]["status"] == "cancelled"
    echo = await trader("paper", "__api_/any?a=1", headers=get, b="2")
    assert echo["data"]["params"] == {"a": "1", "b": "2"}
    echo = await trader("paper", "__api_cancel_borrow", symbol="cny", borrow_id="123")
    assert echo["data"] == {"verb": "POST", "path": "/cancel_borrow", "params": {"symbol": "cny", "borrow_id": "123"}}


async def test_a_raw_call_cannot_leave_the_exchange(host: Host) -> None:
    reply = await host("paper", "__api_http://127.0.0.1:1/steal")
    assert reply["error"] == "method: a raw call reaches the paper exchange only"
    reply = await host("paper", "__api_//127.0.0.1:1/steal", headers={"Http-Method": "GET"})
    assert reply["data"]["path"] == "/127.0.0.1:1/steal"


async def test_a_leverage_is_a_whole_number(host: Host) -> None:
    trader = host.other("levered", "s")
    told = {"error": "leverage: expected a whole number, got 2.5"}
    assert await trader.io("paper", 0, "2.5", "BTC_USDT.swap") == told
    assert await trader.io("paper", 0, "3.0", "BTC_USDT.swap") == {"data": True}
    await trader.io("paper", 0, "2.5")
    await trader.io("paper", 1, "buy")
    assert await trader("paper", "trade", symbol="BTC_USDT.swap", type="buy", price="-1", amount="0.01") == told


async def test_keys_of_any_form_can_sign(host: Host) -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQ\n-----END PRIVATE KEY-----\n"  # pragma: allowlist secret
    for access_key, secret_key in (("键", "秘密"), ("pem", pem), ("comma", "secret,trade password")):
        reply = await host.other(access_key, secret_key)("paper", "accounts")
        assert "data" in reply, reply


async def test_a_path_is_decoded_once(host: Host) -> None:
    body = msgspec.json.encode({"method": "ticker", "params": {"symbol": "BTC_USDT"}})
    assert "data" in await host.post(URL(f"{host.address}/%70aper", encoded=True), body)
    assert (await host.post(URL(f"{host.address}/%2570aper", encoded=True), body))["error"].startswith("no exchange named '%70aper' here")
