"""The FMZ general protocol, host side: every tolerance of fmz-protocol A.2, B.4 and C, and nothing but BadRequest for the rest."""

import json
import re
import string
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Raw

from bridge import fmz
from bus.errors import BadRequest, BusError, VenueRejected
from bus.messages import (
    Api,
    ContractType,
    Direction,
    Empty,
    MarginLevel,
    Market,
    OrderList,
    OrderRef,
    Positions,
    Records,
    Success,
    Trade,
    decimal,
)

NONCE = 1_730_275_031_047_002_001
KEYS = {"access_key": "access", "secret_key": "secret", "nonce": NONCE}


def body(method: str, params: Any = None, **fields: Any) -> bytes:
    return msgspec.json.encode(KEYS | {"method": method, "params": {} if params is None else params} | fields)


def decode(method: str, params: Any = None, verb: str = "", **fields: Any) -> Any:
    """The params of one call."""
    return fmz.decode(body(method, params, **fields), verb).params


def refusal(method: str, params: Any = None, verb: str = "", **fields: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        fmz.decode(body(method, params, **fields), verb)
    return str(caught.value)


TRADE = {"symbol": "ETH_BTC", "type": "buy", "price": "0.1", "amount": "2"}

# ---------------------------------------------------------------- the envelope a host sends


@pytest.mark.parametrize(
    ("nonce", "told_apart_by"),
    [
        (1623307269528738001, 1623307269528738001),  # nanoseconds, as captured
        ("1502345965295519602", 1502345965295519602),  # the same as text, as the older examples print it
        (1623307269528000000, None),  # milliseconds with zeros behind
        ("1500793319499", None),  # milliseconds
        (1.5e18, None),
        (None, None),
        ("", None),
        ("soon", None),
        ({}, None),
        (True, None),
        (-1623307269528738001, None),
    ],
)
def test_a_nonce_of_any_kind_is_accepted(nonce: object, told_apart_by: int | None) -> None:
    assert fmz.decode(body("accounts", nonce=nonce)).nonce == told_apart_by


def test_a_body_needs_no_more_than_a_method() -> None:
    call = fmz.decode(b'{"method":"accounts"}')
    assert (call.access_key, call.secret_key, call.nonce, call.params) == ("", "", None, Empty())


@pytest.mark.parametrize("params", [None, {}, {"anything": [1, {"else": None}]}])
def test_accounts_takes_empty_null_and_strange_params(params: object) -> None:
    assert fmz.decode(msgspec.json.encode({"method": "accounts", "params": params})).params == Empty()


@pytest.mark.parametrize("order", [["access_key", "method", "nonce", "params", "secret_key"], ["params", "method", "secret_key", "nonce"]])
def test_keys_may_come_in_any_order_with_blanks_and_a_bom(order: list[str]) -> None:
    fields = {**KEYS, "method": "ticker", "params": {"symbol": "ETH_BTC"}}
    text = b"\xef\xbb\xbf \n" + msgspec.json.format(msgspec.json.encode({name: fields[name] for name in order}), indent=2) + b"\r\n"
    assert fmz.decode(text).params == Market("ETH_BTC")


def test_the_last_of_two_equal_fields_counts() -> None:
    assert fmz.decode(b'{"method":"depth","method":"ticker","params":{"symbol":"A","symbol":"B"}}').params == Market("B")


def test_unicode_escapes_are_read() -> None:
    assert fmz.decode(rb'{"method":"ti\u0063ker","params":{"sym\u0062ol":"\u0042TC"}}').params == Market("BTC")


# ---------------------------------------------------------------- keys

PEM = "-----BEGIN KEY-----\nMIIB+/=\r\nAgEA\n-----END KEY-----"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("secret,trade password,with,commas", "secret,trade password,with,commas"),
        (PEM, PEM),
        (f"{PEM}\n", PEM),
        (f"{PEM}\r\n\r\n", PEM),
        (" blanks stay ", " blanks stay "),
        ("\nfirst line stays", "\nfirst line stays"),
        ("tab stays\t\n", "tab stays\t"),
        (12345678901234567890, "12345678901234567890"),
        (None, ""),
        ("", ""),
        ("密钥", "密钥"),
    ],
)
def test_keys_stay_as_typed_but_for_line_ends_behind(sent: object, kept: str) -> None:
    call = fmz.decode(body("accounts", access_key=sent, secret_key=sent))
    assert (call.access_key, call.secret_key) == (kept, kept)


def test_keys_in_params_replace_the_others_and_leave_the_params() -> None:
    call = fmz.decode(body("__api_x", {"access_key": "other", "secret_key": "theirs\n", "a": "1"}))
    assert (call.access_key, call.secret_key) == ("other", "theirs")
    assert call.params == Api("x", "POST", {"a": "1"})


@pytest.mark.parametrize("nothing", ["", None])
def test_empty_keys_in_params_replace_nothing_and_leave_the_params(nothing: object) -> None:
    call = fmz.decode(body("__api_x", {"access_key": nothing, "secret_key": nothing}))
    assert (call.access_key, call.secret_key) == ("access", "secret")
    assert call.params == Api("x")


def test_one_key_may_be_replaced_alone() -> None:
    call = fmz.decode(body("accounts", {"secret_key": 7}))
    assert (call.access_key, call.secret_key) == ("access", "7")


@pytest.mark.parametrize("wrong", [["topsecret"], {"topsecret": 1}, True])
def test_a_key_of_a_wrong_type_is_refused_without_showing_it(wrong: object) -> None:
    assert refusal("accounts", secret_key=wrong).startswith("body: Expected `int | str | null`, got ")
    assert refusal("accounts", {"access_key": wrong}) == "params: access_key and secret_key: expected strings"


def test_a_call_shows_no_key() -> None:
    call = fmz.decode(body("trade", TRADE))
    assert repr(call) == "HostCall(trade)"


# ---------------------------------------------------------------- scalars


@pytest.mark.parametrize(
    ("period", "limit", "expected"),
    [
        ("1440", None, Records("BTC", 1440)),
        (1, "", Records("BTC", 1)),
        (" 60 ", " 10 ", Records("BTC", 60, 10)),
        (5.0, 500, Records("BTC", 5, 500)),
        ("1e2", 0, Records("BTC", 100)),
        ("15.000", "5000", Records("BTC", 15, 5000)),
    ],
)
def test_whole_numbers_come_as_text_integer_or_float(period: object, limit: object, expected: Records) -> None:
    assert decode("records", {"symbol": "BTC", "period": period, "limit": limit}) == expected


@pytest.mark.parametrize("period", ["0", "-1", "1.5", "", None, "x", 1e300, "1" * 60, [], {}, False, "525601"])
def test_a_period_that_is_no_number_of_minutes_is_refused(period: object) -> None:
    text = refusal("records", {"symbol": "BTC", "period": period})
    assert text.startswith("period: expected ")
    assert ", got " in text


@pytest.mark.parametrize("limit", ["-1", "5001", "1.5", "all", []])
def test_a_limit_that_is_no_number_of_bars_is_refused(limit: object) -> None:
    assert refusal("records", {"symbol": "BTC", "period": 1, "limit": limit}).startswith("limit: expected ")


@pytest.mark.parametrize(
    ("symbol", "kept"),
    [
        (" btc ", "btc"),
        (600519, "600519"),
        *((same, same) for same in ("ETH_BTC", "BTC_USDT.swap", "BTC-PERP", "BTC_USDT.BTC-240108-40000-C", "比特币", "x" * 64)),
    ],
)
def test_a_symbol_is_free_text_in_the_callers_spelling(symbol: object, kept: str) -> None:
    assert decode("ticker", {"symbol": symbol}) == Market(kept)


@pytest.mark.parametrize("symbol", ["", "  ", None])
def test_an_empty_symbol_is_named_where_one_is_needed_and_means_all_for_orders(symbol: object) -> None:
    assert refusal("ticker", {"symbol": symbol}) == "symbol is empty! expected a symbol such as BTC_USDT"
    assert decode("orders", {"symbol": symbol}) == OrderList("")
    assert decode("order", {"symbol": symbol, "id": "1"}) == OrderRef("1", "")


@pytest.mark.parametrize("symbol", ["BTC USDT", "BTC\nUSDT", "BTC\x00", "BTC\u2028USDT", "\u202eCTB", "BTC\u00a0USDT", "x" * 65])
def test_a_malformed_symbol_is_refused(symbol: str) -> None:
    text = "symbol: expected 1 to 64 printable signs without blanks, got "
    for method in ("ticker", "depth", "trades", "orders"):
        assert refusal(method, {"symbol": symbol}).startswith(text)


@pytest.mark.parametrize("symbol", [True, [], {}, ["BTC"]])
def test_a_symbol_of_a_wrong_type_is_refused(symbol: object) -> None:
    assert refusal("ticker", {"symbol": symbol}).startswith("symbol: expected a string or a number, got ")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b'"XXX"', "XXX"),
        (b"1547130415509278720", "1547130415509278720"),
        (b'"1547130415509278720"', "1547130415509278720"),
        (b"123456789012345678901234567890", "123456789012345678901234567890"),
        (b'"ETH-USDT,1547130415509278720"', "ETH-USDT,1547130415509278720"),
        (b'" 7 "', " 7 "),
        (b'"007"', "007"),
        (b"1.50", "1.50"),
        (b"-1", "-1"),
        (b'"' + b"x" * 200 + b'"', "x" * 200),
    ],
)
def test_an_order_id_stays_byte_for_byte(sent: bytes, kept: str) -> None:
    for method in (b"order", b"cancel"):
        assert fmz.decode(b'{"method":"%b","params":{"symbol":"ETH_USDT","id":%b}}' % (method, sent)).params == OrderRef(kept, "ETH_USDT")


@pytest.mark.parametrize("wrong", [None, "", "x" * 201, "a\nb", [], True])
def test_an_order_id_of_another_kind_is_refused(wrong: object) -> None:
    assert refusal("cancel", {"symbol": "ETH_BTC", "id": wrong}).startswith("id: expected ")


# ---------------------------------------------------------------- trade


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b'"0.1"', "0.1"),
        (b"0.1", "0.1"),
        (b'"1e-8"', "1E-8"),
        (b"1e-8", "1E-8"),
        (b'" 1.50 "', "1.50"),
        (b"1.50", "1.50"),
        (b'"+5"', "5"),
        (b'".5"', "0.5"),
        (b"123456789012345678.123456789012345678", "123456789012345678.123456789012345678"),
        (b"0.30000000000000004", "0.30000000000000004"),
    ],
)
def test_price_and_amount_keep_their_digits(sent: bytes, kept: str) -> None:
    trade = fmz.decode(b'{"method":"trade","params":{"symbol":"BTC","type":"buy","price":%b,"amount":%b}}' % (sent, sent)).params
    assert isinstance(trade, Trade)
    assert (str(trade.price), str(trade.amount)) == (kept, kept)
    travelled = msgspec.json.decode(fmz.encode_params(trade), type=Trade)
    assert (str(travelled.price), str(travelled.amount)) == (kept, kept)


@pytest.mark.parametrize("price", ["-1", -1, -1.0, "0", 0, "-0", "-0.5", "0e99"])
def test_a_price_that_is_not_positive_is_a_market_order(price: object) -> None:
    trade = decode("trade", TRADE | {"price": price})
    assert trade.is_market
    assert len(str(trade.price)) <= 4


@pytest.mark.parametrize(
    "price", ["", None, "abc", "NaN", "Infinity", "-Infinity", "1,000", "1e31", "1e-31", "1e400", "1" * 65, [], {}, True]
)
def test_a_price_that_is_no_number_is_refused(price: object) -> None:
    assert refusal("trade", TRADE | {"price": price}).startswith("price: expected ")


@pytest.mark.parametrize("amount", ["", None, "abc", "NaN", "inf", "0", 0, "-1", "-0.1", "1e31", "1e-31", [], {}, False])
def test_an_amount_that_is_no_positive_number_is_refused(amount: object) -> None:
    text = refusal("trade", TRADE | {"amount": amount})
    assert text.startswith("amount: expected ")
    assert ", got " in text


def test_a_refused_number_says_what_came() -> None:
    assert refusal("trade", TRADE | {"amount": "-5"}) == "amount: expected a decimal number above 0, got '\"-5\"'"
    assert refusal("trade", TRADE | {"price": None}) == "price: expected a decimal number, -1 for a market order, got nothing"


@pytest.mark.parametrize("side", ["buy", "sell", "closebuy", "closesell", " Buy ", "SELL", "CloseBuy", "closeSell"])
def test_a_side_counts_in_any_case(side: str) -> None:
    assert decode("trade", TRADE | {"type": side}).side == side.strip().lower()


@pytest.mark.parametrize(
    ("written", "side", "options"),
    [
        ("buy;", "buy", {}),
        ("BUY;tdMode=isolated&k=", "buy", {"tdMode": "isolated", "k": ""}),
        ('sell; {"ordType":"post_only","n":1.50,"none":null}', "sell", {"ordType": "post_only", "n": "1.50", "none": ""}),
        ("closebuy ; a=b;c", "closebuy", {"a": "b;c"}),
        ("sell;just words", "sell", {"just words": ""}),
    ],
)
def test_options_may_follow_the_side(written: str, side: str, options: dict[str, str]) -> None:
    trade = decode("trade", TRADE | {"type": written})
    assert (trade.side, trade.options) == (side, options)


@pytest.mark.parametrize("wrong", ["", None, "hold", "buysell", ";buy", 1, [], 'buy;{"a":', 'buy;{"a":[1]}', "buy;{1}"])
def test_a_side_that_is_none_is_refused(wrong: object) -> None:
    assert refusal("trade", TRADE | {"type": wrong}).startswith("type: expected ")


def test_the_offset_is_not_the_hosts_to_set() -> None:
    assert decode("trade", TRADE | {"offset": "close", "side": "sell", "options": {}}) == Trade(
        "ETH_BTC", "buy", Decimal("0.1"), Decimal(2)
    )


sizes = st.integers(-30, 30)
mantissas = st.text(string.digits, min_size=1, max_size=28).filter(lambda digits: digits.strip("0") != "")
forms = st.sampled_from(['"{}"', "{}", '" {} "', '"\\t{}"'])


@given(mantissas, sizes, st.sampled_from("ef"), forms)
@example("1", -8, "e", "{}")
def test_any_number_of_sensible_size_survives_exactly(digits: str, exponent: int, notation: str, form: str) -> None:
    value = Decimal(f"{digits.lstrip('0')}E{exponent}")
    text = format(value, notation)
    if len(text) > 64 or abs(value.adjusted()) > 30:
        return
    trade = fmz.decode(
        b'{"method":"trade","params":{"symbol":"B","type":"buy","price":%b,"amount":%b}}' % ((form.format(text).encode(),) * 2)
    )
    sent = msgspec.json.decode(fmz.encode_params(trade.params), type=Trade)
    assert sent.price == sent.amount == value
    assert str(sent.price) == str(decimal(text))


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "method", ["GetTicker", "TICKER", "no_such_method", "tickers", "markets", "positions", "contract_type", "margin_level"]
)
def test_a_method_without_evidence_is_not_supported(method: str) -> None:
    assert refusal(method, {"symbol": "BTC"}) == f"{method} not support"


def test_a_method_that_is_missing_or_endless_is_not_supported_in_few_words() -> None:
    assert refusal("") == "method: expected a name such as ticker, got nothing"
    assert refusal("x" * 5000) == f"'{'x' * 39}... (5000 long) not support"
    assert refusal("two\nlines") == "two\nlines not support"


@pytest.mark.parametrize("wrong", [None, 5, ["ticker"], {}, True])
def test_a_method_of_a_wrong_type_is_named(wrong: object) -> None:
    with pytest.raises(BadRequest, match=r"^body: Expected `str`, got `\w+` - at `\$\.method`$"):
        fmz.decode(msgspec.json.encode({"method": wrong}))


# ---------------------------------------------------------------- raw calls


@pytest.mark.parametrize("resource", ["cancel_borrow", "/transfer", "/api/v5/a_b/c", "_", "https://www.bitgo.cn/x?y=z", "转账", "_api_x"])
def test_a_resource_is_what_follows_the_prefix_unchanged(resource: str) -> None:
    assert decode(f"__api_{resource}") == Api(resource)


@pytest.mark.parametrize(
    ("header", "verb"),
    [("", "POST"), ("  ", "POST"), ("GET", "GET"), ("get", "GET"), ("Delete", "DELETE"), (" put ", "PUT"), ("patch", "PATCH")],
)
def test_the_verb_counts_in_any_case_and_is_post_where_none_is_said(header: str, verb: str) -> None:
    assert decode("__api_x", verb=header).verb == verb


@pytest.mark.parametrize("header", ["HEAD", "OPTIONS", "FETCH", "GET POST", "x" * 5000, "\udcff"])
def test_another_verb_is_refused(header: str) -> None:
    text = refusal("__api_x", verb=header)
    assert text.startswith("verb: expected one of GET, POST, PUT, DELETE, PATCH, got ")
    assert len(text) < 150


def test_the_verb_matters_to_raw_calls_only() -> None:
    assert decode("accounts", verb="NONSENSE") == Empty()


def test_values_of_a_query_stay_as_they_are() -> None:
    query = (
        b'{"borrow_id":"123","obj":"%7B%22a%22%3A1%7D","amount":"\'1\'","n":1.50,"big":1547130415509278720,'
        b'"no":null,"yes":true,"list":[1, {"a":null}]}'
    )
    api = fmz.decode(b'{"method":"__api_x","params":' + query + b"}").params
    assert isinstance(api, Api)
    assert api.query == {
        "borrow_id": "123",
        "obj": "%7B%22a%22%3A1%7D",
        "amount": "'1'",
        "n": "1.50",
        "big": "1547130415509278720",
        "no": "",
        "yes": "true",
        "list": '[1, {"a":null}]',
    }


def test_unknown_keys_of_the_body_pass_through_below_the_params() -> None:
    api = decode("__api_x", {"a": "1"}, a="2", raw='{"b":3}', extra={"c": [4]})
    assert api.query == {"a": "1", "raw": '{"b":3}', "extra": '{"c":[4]}'}


def test_unknown_keys_of_the_body_are_nothing_to_other_methods() -> None:
    assert decode("ticker", {"symbol": "BTC", "more": [1]}, raw="x", extra={}) == Market("BTC")


@pytest.mark.parametrize("resource", ["", "x" * 201, "a\r\nHost: b", "a\x00"])
def test_a_resource_that_cannot_be_one_is_refused(resource: str) -> None:
    assert refusal(f"__api_{resource}").startswith("method: expected __api_ and a resource of 1 to 200 printable signs, got ")


# ---------------------------------------------------------------- io


@pytest.mark.parametrize(
    ("code", "args", "expected"),
    [
        (0, [12], MarginLevel(Decimal(12))),
        ("0", ["12.5"], MarginLevel(Decimal("12.5"))),
        (0, ["BTC_USDT.swap", 15], MarginLevel(Decimal(15), "BTC_USDT.swap")),
        (0, [15, " BTC_USDT.swap "], MarginLevel(Decimal(15), "BTC_USDT.swap")),
        (0, [None, 10.0, ""], MarginLevel(Decimal("10.0"))),
        (1, ["closesell"], Direction("closesell")),
        (1, [" Buy "], Direction("buy")),
        (2, ["quarter"], ContractType("quarter")),
        (2, ["BTC-USD-200925"], ContractType("BTC-USD-200925")),
        (2.0, [200925], ContractType("200925")),
        (3, [], Positions()),
        (3, None, Positions()),
        (3, [None], Positions()),
        (3, [""], Positions()),
        (3, ["USDT.swap"], Positions("USDT.swap")),
        (3, ["swap"], Positions("swap")),
    ],
)
def test_futures_calls(code: object, args: object, expected: object) -> None:
    call = fmz.decode(body("io", {"args": args, "code": code}))
    assert call.params == expected
    assert call.method.io == int(str(code)[0])


def test_positions_need_no_args_at_all() -> None:
    assert decode("io", {"code": 3}) == Positions()


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "code: expected the number of a futures call, 0 to 3"),
        ({"code": None}, "code: expected the number of a futures call, 0 to 3"),
        ({"code": "x"}, "code: expected the number of a futures call, 0 to 3"),
        ({"code": 1.5}, "code: expected the number of a futures call, 0 to 3"),
        ({"code": [2]}, "code: expected the number of a futures call, 0 to 3"),
        ({"code": 7, "args": []}, "io code 7 not support"),
        ({"code": 4, "args": ["cross", True]}, "args: expected a list of strings and numbers"),
        ({"code": 4, "args": ["cross"]}, "io cross not support"),
        ({"code": 4}, "io code 4 not support"),
        ({"code": 2, "args": "swap"}, "args: expected a list of strings and numbers"),
        ({"code": 2, "args": {"0": "swap"}}, "args: expected a list of strings and numbers"),
        ({"code": 2, "args": [["swap"]]}, "args: expected a list of strings and numbers"),
        ({"code": 0, "args": []}, "args: expected a leverage above 0, such as 10, and at most one symbol beside it"),
        ({"code": 0, "args": [0]}, "args: expected a leverage above 0, such as 10, and at most one symbol beside it"),
        ({"code": 0, "args": [1, 2]}, "args: expected a leverage above 0, such as 10, and at most one symbol beside it"),
        ({"code": 0, "args": [1, "a", "b"]}, "args: expected a leverage above 0, such as 10, and at most one symbol beside it"),
        ({"code": 1, "args": []}, "args: expected one direction: buy, sell, closebuy or closesell"),
        ({"code": 1, "args": ["up"]}, "args: expected buy, sell, closebuy or closesell, got 'up'"),
        ({"code": 2, "args": [None]}, "args: expected one contract, such as swap or quarter"),
        ({"code": 2, "args": ["a b"]}, "args: expected 1 to 64 printable signs without blanks, got 'a b'"),
        ({"code": 3, "args": ["a", "b"]}, "args: expected at most one contract or symbol"),
    ],
)
def test_futures_calls_that_make_no_sense(params: object, text: str) -> None:
    assert refusal("io", params) == text


# ---------------------------------------------------------------- idempotency keys


def key(path: str = "okx/r1", *, by_nonce: bool = True, params: Any = None, **fields: Any) -> str:
    call = fmz.decode(body("trade", TRADE | (params or {}), **fields))
    return fmz.idempotency_key(path, call, fmz.encode_params(call.params), by_nonce=by_nonce)


def test_the_same_request_has_the_same_key_in_any_spelling() -> None:
    assert key() == key(nonce=str(NONCE)) == key(params={"type": "BUY"}) == key(raw="unknown")
    assert len(key()) == 32
    assert set(key()) <= set("0123456789abcdef")


def test_whatever_differs_makes_another_key() -> None:
    keys = [
        key(),
        key(path="okx/r2"),
        key(nonce=NONCE + 1),
        key(access_key="other"),
        key(params={"amount": "3"}),
        key(params={"amount": "2.0"}),
        key(params={"type": "sell"}),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("nonce", [None, "", 1500793319499, 1623307269528000000, 10**18 - 1, "x"])
def test_a_nonce_that_repeats_by_nature_makes_a_random_key(nonce: object) -> None:
    assert key(nonce=nonce) != key(nonce=nonce)


def test_nonce_identity_can_be_turned_off() -> None:
    assert key(by_nonce=False) != key(by_nonce=False)


# ---------------------------------------------------------------- the envelope a host gets


def test_a_success_is_spliced_byte_for_byte() -> None:
    assert fmz.answer(Success(data=Raw(b'[1.50, "\xc3\xa9"]'))) == b'{"data":[1.50, "\xc3\xa9"]}'
    assert fmz.answer(Success(data=Raw(b"false"))) == b'{"data":false}'
    assert fmz.answer(Success(data=Raw(b"{}"), raw=Raw(b'{"id": 1}'))) == b'{"data":{},"raw":{"id": 1}}'


def test_a_failure_is_its_text() -> None:
    assert fmz.refuse(VenueRejected('no "money"\nleft')) == b'{"error":"no \\"money\\" left"}'


# ---------------------------------------------------------------- anything at all

text = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
methods = st.sampled_from(["ticker", "records", "accounts", "trade", "order", "orders", "cancel", "io", "__api_", "__api_x"]) | values
names = st.sampled_from(["symbol", "type", "price", "amount", "period", "limit", "id", "args", "code", "access_key", "secret_key"]) | text
verbs = st.sampled_from(["", "GET", "delete"]) | text


def is_call_or_refused(content: bytes, verb: str) -> None:
    try:
        call = fmz.decode(content, verb)
    except BadRequest as refused:
        text = refused.text
        envelope = fmz.refuse(refused)
    else:
        is_sound(call)
        return
    assert msgspec.json.decode(envelope) == {"error": text}


def is_sound(call: fmz.HostCall) -> None:
    assert isinstance(call, fmz.HostCall)
    assert isinstance(call.params, call.method.params)
    assert fmz.encode_params(call.params)  # what decodes, travels
    assert len(fmz.idempotency_key("okx", call, b"", by_nonce=True)) == 32


@given(st.binary(max_size=200), verbs)
@example(b'{"method":"__api_x","params":{"a":["\xff"]}}', "")
@example(b'{"method":"__api_x","\xff":1}', "")
@example(b'{"method":"ticker","params":{"symbol":"\xff"}}', "")
@example(b'{"method":"accounts","nonce":"\xff"}', "")
@example(b'{"method":"accounts","access_key":"\\ud800"}', "")
@example(b'{"method":"accounts","access_key":' + b"9" * 5000 + b"}", "")
@example(b'{"method":"__api_x","params":{"a":' + b"[" * 990 + b"]" * 990 + b"}}", "")
@example(b"[" * 200_000, "")
@example(b'{"a":' * 50_000, "")
def test_any_bytes_are_a_call_or_refused(content: bytes, verb: str) -> None:
    is_call_or_refused(content, verb)


@given(
    st.fixed_dictionaries(
        {"method": methods},
        optional={
            "params": st.dictionaries(names, values, max_size=6) | values,
            "access_key": values,
            "secret_key": values,
            "nonce": values,
            "more": values,
        },
    ),
    verbs,
)
def test_any_json_in_any_field_is_a_call_or_refused(content: dict[str, Any], verb: str) -> None:
    is_call_or_refused(msgspec.json.encode(content), verb)


@given(st.sampled_from(["params", "access_key", "secret_key", "nonce", "method", "more"]), st.binary(max_size=30))
def test_broken_json_in_any_field_is_a_call_or_refused(field: str, junk: bytes) -> None:
    is_call_or_refused(b'{"method":"__api_x","%b":%b}' % (field.encode(), junk), "")
    is_call_or_refused(b'{"method":"trade","params":{"symbol":"B","%b":"%b"}}' % (field.encode(), junk), "")


@given(st.dictionaries(names, values, max_size=4), st.text(string.ascii_letters, min_size=8, max_size=40))
def test_no_refusal_ever_shows_a_key(params: dict[str, Any], secret: str) -> None:
    marked = f"K{secret}K"
    for fields in ({"access_key": marked, "secret_key": marked}, {"access_key": [marked]}, {"secret_key": {marked: 1}}):
        for given_params in (params, params | {"access_key": [marked]}, params | {"secret_key": marked, "id": "\x00"}):
            try:
                shown = repr(fmz.decode(body("trade", given_params, **fields)))
            except BusError as e:
                shown = e.text
            assert marked not in shown


# ---------------------------------------------------------------- the short way

VALUES: st.SearchStrategy[Any] = st.sampled_from(
    ["BTC_USDT", " BTC_USDT\t", "btc_usdt.swap", "", " ", "a b", "x" * 65, "机器", "\ud800", 7, 1.5, None, True, [], {}, ["x"], "k\n"]
)


@given(
    method=st.sampled_from(["ticker", "depth"]),
    envelope=st.dictionaries(st.sampled_from(["access_key", "secret_key", "nonce", "more"]), VALUES),
    params=st.none() | VALUES | st.dictionaries(st.sampled_from(["symbol", "access_key", "secret_key", "more"]), VALUES),
    before=st.sampled_from(["", "\ufeff", " "]),
    after=st.sampled_from(["", " ", "}", "\x00"]),
)
def test_quotes_are_read_the_short_way_as_any_other_call_is(method: str, envelope: Any, params: Any, before: str, after: str) -> None:
    """A blank behind the colon is all that keeps a request off the short way."""

    def read(colon: str) -> Any:
        text = json.dumps(envelope | {"params": params})[1:]
        content = f'{before}{{"method"{colon}"{method}",{text}{after}'.encode()
        try:
            call = fmz.decode(content)
        except BadRequest as e:
            return re.sub(r"byte \d+", "", str(e))
        return (call.access_key, call.secret_key, call.method, call.params, call.nonce)

    assert read(":") == read(": ")


def test_a_quote_with_bad_utf8_in_a_field_nobody_reads_is_refused() -> None:
    for colon in (b":", b": "):
        with pytest.raises(BadRequest, match="UTF-8"):
            fmz.decode(b'{"method"%b"ticker","more":"\xff","access_key":"a","secret_key":"s","params":{"symbol":"BTC_USDT"}}' % colon)
