"""bitgo, the worked example of the protocol document, through HTTP, NATS, a worker and an exchange that checks signatures by itself."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests import exchanges, servers
from tests.exchanges import NOW_S, Answer, Bitgo, Exchange, json
from tests.host import Host, hosting
from workers.venues import PUBLIC
from workers.venues.bitgo import instrument, signed

ACCESS, SECRET = "bitgo-access", "bitgo secret, with + and &"


@pytest_asyncio.fixture(scope="module")
async def exchange() -> AsyncIterator[Exchange]:
    async with exchanges.serving(Bitgo({ACCESS: SECRET, "second": "other"}).answer) as exchange:
        yield exchange


@pytest_asyncio.fixture(scope="module")
async def address(exchange: Exchange, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    settings: dict[str, object] = {"paper__enabled": "false", "venues__bitgo__base_url": exchange.url + "/"}
    settings |= {f"market__share_s__{method}": 0 for method in PUBLIC}  # each test has the exchange say something else
    async with servers.system(tmp_path_factory.mktemp("s"), "--workers", "1", **settings) as system:
        yield system.address


@pytest_asyncio.fixture
async def host(address: str, exchange: Exchange) -> AsyncIterator[Host]:
    exchange.will()
    async with hosting(address) as host:
        yield host.other(ACCESS, SECRET)


async def buy(host: Host, **changes: str) -> Any:
    params: dict[str, Any] = {"symbol": "BTC_CNY", "type": "buy", "price": "1000", "amount": "1"}
    return await host("bitgo", "trade", **params | changes)


async def test_the_worked_example_is_short() -> None:
    text = await asyncio.to_thread((Path(__file__).parents[1] / "workers" / "venues" / "bitgo.py").read_text)
    assert len(text.splitlines()) < 150


# ---------------------------------------------------------------- public


async def test_ticker(host: Host, exchange: Exchange) -> None:
    ticker = {"time": NOW_S * 1000 + 123, "buy": 1000.5, "sell": 1001.25, "last": 1000.75, "high": 1010, "low": 990, "vol": 12345.678}
    assert await host("bitgo", "ticker", symbol="BTC_CNY") == {"data": ticker | {"symbol": "BTC_CNY"}}
    (seen,) = exchange.requests
    assert (seen.verb, seen.path, seen.query) == ("POST", "/appApi.html", {"action": "market", "symbol": "1"})


async def test_depth_is_sorted_and_has_two_columns(host: Host, exchange: Exchange) -> None:
    depth = {"time": NOW_S * 1000, "asks": [[1001, 1.5], [1002, 0.5], [1003, 2]], "bids": [[1000, 0.25], [999, 1]]}
    assert await host("bitgo", "depth", symbol="LTC_CNY") == {"data": depth}
    assert exchange.requests[0].query == {"action": "depth", "symbol": "2"}


async def test_trades_ascend_and_carry_milliseconds(host: Host, exchange: Exchange) -> None:
    rows = [
        {"id": 11, "time": NOW_S * 1000, "price": 999, "amount": 2, "type": "sell"},
        {"id": 12, "time": NOW_S * 1000 + 5000, "price": 1000.5, "amount": 0.1, "type": "buy"},
    ]
    assert await host("bitgo", "trades", symbol="ETH_CNY") == {"data": rows}
    assert exchange.requests[0].query == {"action": "trades", "symbol": "4"}


async def test_records_ascend_and_carry_seconds(host: Host, exchange: Exchange) -> None:
    rows = [[NOW_S, 1000, 1002, 998, 1001, 5.5], [NOW_S + 60, 1001, 1003, 999, 1002, 7]]
    assert await host("bitgo", "records", symbol="DOGE_CNY", period="1440") == {"data": rows}
    assert exchange.requests[0].query == {"action": "kline", "symbol": "6", "step": "86400"}
    assert await host("bitgo", "records", symbol="DOGE_CNY", period=1, limit="1") == {"data": rows[1:]}
    assert exchange.requests[1].query["step"] == "60"


async def test_records_in_milliseconds_and_twice_the_same_bar(host: Host, exchange: Exchange) -> None:
    exchange.will(json({"data": [[NOW_S * 1000, 1, 1, 1, 1, 1], [str(NOW_S), "2", "2", "2", "2", "2", "extra"]]}))
    assert await host("bitgo", "records", symbol="BTC", period=1) == {"data": [[NOW_S, 2, 2, 2, 2, 2]]}


@pytest.mark.parametrize("method", ["trades", "records"])
@pytest.mark.parametrize("nothing", [{"data": []}, {"data": None}, {}], ids=str)
async def test_no_rows_are_an_empty_list(host: Host, exchange: Exchange, method: str, nothing: object) -> None:
    exchange.will(json(nothing))
    assert await host("bitgo", method, symbol="BTC", period=1) == {"data": []}


async def test_a_book_with_an_empty_side(host: Host, exchange: Exchange) -> None:
    exchange.will(json({"time": NOW_S * 1000, "data": {"asks": None, "bids": []}}))
    assert (await host("bitgo", "depth", symbol="BTC"))["data"] == {"time": NOW_S * 1000, "asks": [], "bids": []}


async def test_a_missing_time_is_now(host: Host, exchange: Exchange) -> None:
    exchange.will(json({"data": {"buy": 1}}))
    ticker = (await host("bitgo", "ticker", symbol="BTC"))["data"]
    assert ticker["time"] > 1_700_000_000_000
    assert (ticker["buy"], ticker["sell"]) == (1, 0)


@pytest.mark.parametrize("method", ["ticker", "depth"])
async def test_a_public_answer_without_data_is_no_answer(host: Host, exchange: Exchange, method: str) -> None:
    exchange.will(json({"code": 500, "msg": "busy"}))
    assert await host("bitgo", method, symbol="BTC") == {"error": "network: bitgo answered without data"}


@pytest.mark.parametrize(
    ("symbol", "sent"),
    [
        ("BTC_CNY", "1"),
        ("btc_cny", "1"),
        ("btc", "1"),
        ("LTC", "2"),
        ("etp_cny", "3"),
        ("eth", "4"),
        ("ETC_CNY", "5"),
        ("doge", "6"),
        ("BEC_cny", "7"),
        ("XYZ_USDT", "XYZ_USDT"),
        ("BTC-PERP", "BTC-PERP"),
        ("btc_usdt", "btc_usdt"),
    ],
)
async def test_symbols_are_mapped_or_pass_through(host: Host, exchange: Exchange, symbol: str, sent: str) -> None:
    assert instrument(symbol) == sent
    assert (await host("bitgo", "ticker", symbol=symbol))["data"]["symbol"] == symbol
    assert exchange.requests[0].query["symbol"] == sent


# ---------------------------------------------------------------- private


def test_a_known_signature() -> None:
    """md5 of `amount=1&api_key=key&price=1000&symbol=1&type=0&secret_key=secret`, computed by hand with md5sum."""
    fields = signed({"symbol": "1", "price": "1000", "amount": "1", "type": "0"}, "key", "secret", "trade")
    assert fields == {
        "symbol": "1",
        "price": "1000",
        "amount": "1",
        "type": "0",
        "api_key": "key",
        "sign": "640D006F71D7AF19BCF9C10452B293C8",
        "action": "trade",
    }


async def test_accounts_are_one_row_per_currency(host: Host) -> None:
    rows = [
        {"currency": "btc", "free": 2, "frozen": 0},
        {"currency": "cny", "free": 1234567.5, "frozen": 10},
        {"currency": "doge", "free": 0, "frozen": 0},
        {"currency": "ltc", "free": 0, "frozen": 0.5},
    ]
    assert await host("bitgo", "accounts") == {"data": rows}


async def test_an_order_from_its_placing_to_its_cancel(host: Host, exchange: Exchange) -> None:
    order_id = (await buy(host, price="1,000.50".replace(",", ""), amount="0.10"))["data"]["id"]
    assert isinstance(order_id, int)
    placed = exchange.requests[0].query
    assert {key: placed[key] for key in ("action", "symbol", "price", "amount", "type")} == {
        "action": "trade",
        "symbol": "1",
        "price": "1000.5",
        "amount": "0.1",
        "type": "0",
    }
    row = {"id": order_id, "amount": 0.1, "price": 1000.5, "status": "open", "deal_amount": 0, "type": "buy", "avg_price": 0}
    assert await host("bitgo", "orders", symbol="BTC_CNY") == {"data": [row]}
    assert await host("bitgo", "order", symbol="BTC_CNY", id=order_id) == {"data": row}
    assert await host("bitgo", "order", symbol="BTC_CNY", id=str(order_id)) == {"data": row}
    assert await host("bitgo", "cancel", symbol="BTC_CNY", id=str(order_id)) == {"data": True}
    assert await host("bitgo", "order", symbol="BTC_CNY", id=order_id) == {"data": row | {"status": "cancelled"}}
    assert await host("bitgo", "orders", symbol="BTC_CNY") == {"data": []}
    assert await host("bitgo", "cancel", symbol="BTC_CNY", id=order_id) == {"error": "order is gone"}


@pytest.mark.parametrize(("status", "word"), [(1, "open"), ("2", "open"), (3, "closed"), (4, "cancelled")])
async def test_statuses_prices_and_commas(host: Host, exchange: Exchange, status: object, word: str) -> None:
    row = {
        "id": "1,547,130,415",
        "prize": "1,000.5",
        "price": "9",
        "count": "12,000",
        "success_count": "1,500.25",
        "type": "1",
        "status": status,
    }
    exchange.will(json({"code": 200, "data": [row | {"id": 1}, row]}))
    assert (await host("bitgo", "order", symbol="BTC", id="1547130415"))["data"] == {
        "id": 1547130415,
        "amount": 12000,
        "price": 1000.5,
        "status": word,
        "deal_amount": 1500.25,
        "type": "sell",
        "avg_price": 0,
    }


async def test_a_nineteen_digit_id_keeps_its_digits(host: Host, exchange: Exchange) -> None:
    exchange.will(json({"code": 200, "orderId": 1547130415509278721}))
    order_id = (await buy(host))["data"]["id"]
    assert order_id == "1547130415509278721"  # as a number, a host's JavaScript would lose the last digits
    await host("bitgo", "cancel", symbol="BTC_CNY", id=order_id)
    assert exchange.requests[1].query["id"] == "1547130415509278721"


@pytest.mark.parametrize("price", ["-1", -1, -1.0, "-1.0"])
async def test_a_market_order_says_minus_one(host: Host, exchange: Exchange, price: object) -> None:
    assert "data" in await host("bitgo", "trade", symbol="BTC_CNY", type="sell", price=price, amount="1e-3")
    assert (exchange.requests[0].query["price"], exchange.requests[0].query["amount"], exchange.requests[0].query["type"]) == (
        "-1",
        "0.001",
        "1",
    )


async def test_unknown_orders_and_ids_that_are_none(host: Host, exchange: Exchange) -> None:
    assert await host("bitgo", "order", symbol="BTC_CNY", id="999999") == {"error": "order not found"}
    exchange.will()
    for method in ("order", "cancel"):
        for wrong in ("abc", "１２", "²"):
            text = (await host("bitgo", method, symbol="BTC_CNY", id=wrong))["error"]
            assert text == f"id: expected the whole number that trade answered, got '{wrong}'"
    assert exchange.requests == []


async def test_the_exchanges_own_words_reach_the_host(host: Host, exchange: Exchange) -> None:
    assert await buy(host, amount="1001") == {"error": "insufficient balance"}
    exchange.will(json({"code": 1, "msg": "余额不足"}), json({"code": "403"}), json({"code": 9, "msg": "connection reset"}))
    assert await buy(host) == {"error": "余额不足"}
    assert await buy(host) == {"error": "bitgo refused with code 403"}
    assert await buy(host) == {"error": "con-nection re-set"}, "a refusal must not be silenced as a transport error"


async def test_a_wrong_secret_is_refused_by_the_exchange(host: Host) -> None:
    assert await host.other(ACCESS, "wrong")("bitgo", "accounts") == {"error": "sign error"}


async def test_one_account_does_not_see_the_orders_of_another(host: Host) -> None:
    mine = (await buy(host))["data"]["id"]
    other = host.other("second", "other")
    assert await other("bitgo", "orders", symbol="BTC_CNY") == {"data": []}
    assert await other("bitgo", "order", symbol="BTC_CNY", id=mine) == {"error": "order not found"}
    assert await other("bitgo", "cancel", symbol="BTC_CNY", id=mine) == {"error": "order is gone"}
    assert (await host("bitgo", "cancel", symbol="BTC_CNY", id=mine)) == {"data": True}


async def test_a_raw_call_is_signed_and_answers_everything(host: Host, exchange: Exchange) -> None:
    reply = await host("bitgo", "__api_cancel_borrow", symbol="cny", borrow_id="12 3&=%", zeichen="é转")
    assert reply["data"]["action"] == "cancel_borrow"
    sent = {"symbol": "cny", "borrow_id": "12 3&=%", "zeichen": "é转"}
    assert sent.items() <= reply["data"]["params"].items()
    assert exchange.requests[0].verb == "POST"


async def test_contracts_are_not_traded_here(host: Host, exchange: Exchange) -> None:
    exchange.will()
    for code, args in ((0, [10]), (1, ["buy"]), (2, ["swap"]), (3, [])):
        assert await host.io("bitgo", code, *args) == {"error": "io not support"}
    for side in ("closebuy", "closesell"):
        assert await buy(host, type=side) == {"error": f"type: expected buy or sell, got {side}: bitgo trades no contracts"}
    assert exchange.requests == []


async def test_a_refused_http_status_with_the_exchanges_json_is_a_refusal(host: Host, exchange: Exchange) -> None:
    exchange.will(Answer(b'{"code":403,"msg":"no permission"}', 403))
    assert await buy(host) == {"error": "no permission"}
