"""What travels: any bytes give a value or the documented error, and a value comes back as it went."""

import contextlib
import string
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import Raw, Struct

from bus.errors import ERRORS
from bus.messages import (
    Api,
    Candle,
    Direction,
    Empty,
    Failure,
    MarginLevel,
    Market,
    OrderRef,
    Position,
    Records,
    Reply,
    Request,
    Spans,
    Success,
    Ticker,
    Trade,
    decimal,
    decode_reply,
    decode_request,
    encode,
    encode_exact,
    host_id,
    number,
    plain,
)
from bus.methods import DECODERS, METHODS

WIRE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What pool, caller and seal catch at their decoding lines."""

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12)
decimals = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30)
deep = st.sampled_from([b"[" * 100_000, b'{"type":"ok","data":' + b"[" * 100_000, b'{"data":' * 100_000])


def json(value: object) -> bytes:
    return msgspec.json.encode(value)


@given(st.one_of(st.binary(), anything.map(json), deep))
@example(b'{"type":"ok","data":"\xff"}')
@example(b'{"type":"error","code":"\xff","message":""}')
def test_any_bytes_are_a_reply_or_a_wire_error(data: bytes) -> None:
    try:
        reply = decode_reply(data)
    except WIRE_ERRORS:
        return
    assert isinstance(reply, Success | Failure)


@given(st.one_of(st.binary(), anything.map(json), deep))
def test_any_bytes_are_a_request_or_a_wire_error(data: bytes) -> None:
    with contextlib.suppress(*WIRE_ERRORS):
        assert isinstance(decode_request(data), Request)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.one_of(st.binary(), anything.map(json), deep))
def test_any_bytes_are_params_or_a_wire_error(method: str, data: bytes) -> None:
    with contextlib.suppress(*WIRE_ERRORS):
        assert isinstance(DECODERS[method].decode(data), METHODS[method].params)


spans = st.none() | st.builds(Spans, st.floats(0, 1e6), st.floats(0, 1e6))
documents = anything.map(json).map(Raw)
successes = st.builds(Success, data=documents, spans=spans) | st.builds(Success, data=documents, raw=documents, spans=spans)
failures = st.builds(Failure, code=st.sampled_from(sorted(ERRORS)), message=text, spans=spans)


@given(successes | failures)
def test_a_reply_comes_back_as_it_went(reply: Reply) -> None:
    back = decode_reply(encode(reply))
    assert type(back) is type(reply)
    assert back.spans == reply.spans
    if isinstance(reply, Success):
        assert isinstance(back, Success)
        assert (bytes(back.data), bytes(back.raw)) == (bytes(reply.data), bytes(reply.raw))
    else:
        assert back == reply


@given(
    st.builds(
        Request,
        exchange=text,
        path=text,
        method=text,
        params=documents,
        expires_at_ms=st.integers(0, 2**53),
        idempotency_key=text,
        key_id=text,
        sealed=st.binary(),
        trace=st.booleans(),
    )
)
def test_a_request_comes_back_as_it_went(request: Request) -> None:
    back = decode_request(encode_exact(request))
    assert bytes(back.params) == bytes(request.params)
    for name in ("exchange", "path", "method", "expires_at_ms", "idempotency_key", "key_id", "sealed", "trace"):
        assert getattr(back, name) == getattr(request, name)


params: dict[str, st.SearchStrategy[Struct]] = {
    "ticker": st.builds(Market, text),
    "records": st.builds(Records, text, st.integers(1, 10**6), st.none() | st.integers(1, 5000)),
    "accounts": st.just(Empty()),
    "trade": st.builds(
        Trade,
        text,
        st.sampled_from(["buy", "sell", "closebuy", "closesell"]),
        decimals,
        decimals,
        st.sampled_from(["", "open", "close"]),
        st.dictionaries(text, text, max_size=3),
    ),
    "cancel": st.builds(OrderRef, text, text),
    "__api": st.builds(Api, text, st.sampled_from(["GET", "DELETE"]), st.dictionaries(text, text, max_size=3)),
    "margin_level": st.builds(MarginLevel, decimals, text),
    "direction": st.builds(Direction, st.sampled_from(["buy", "closesell"])),
}


@pytest.mark.parametrize("method", params)
@given(data=st.data())
def test_params_come_back_digit_for_digit(method: str, data: st.DataObject) -> None:
    sent = data.draw(params[method])
    back = DECODERS[method].decode(encode_exact(sent))
    assert back == sent
    assert str(back) == str(sent)  # 1.50 is not 1.5


def test_an_older_peer_is_understood_without_the_new_fields() -> None:
    old = b'{"exchange":"okx","path":"okx","method":"ticker","params":{},"expires_at_ms":1,"idempotency_key":"","key_id":"k","sealed":""}'
    assert decode_request(old).trace is False
    assert decode_reply(b'{"type":"ok","data":1}') == Success(data=Raw(b"1"))
    assert decode_reply(b'{"type":"ok","data":1,"from_a_newer_one":2}') == Success(data=Raw(b"1"))


# ---------------------------------------------------------------- what a host reads


def test_results_carry_the_names_and_numbers_of_the_protocol() -> None:
    ten = Decimal("0.10")
    ticker = Ticker(time_ms=1_500_793_319_499, buy=ten, sell=ten, last=ten, high=ten, low=ten, vol=ten)
    assert encode(ticker) == b'{"time":1500793319499,"buy":0.10,"sell":0.10,"last":0.10,"high":0.10,"low":0.10,"vol":0.10}'
    assert encode(Candle(60, *[Decimal("1E-8")] * 5)) == b"[60,1E-8,1E-8,1E-8,1E-8,1E-8]"
    position = Position(
        symbol="BTC_USDT.swap",
        margin_level=Decimal(10),
        amount=Decimal(1),
        frozen_amount=Decimal(0),
        price=Decimal(50000),
        profit=Decimal("-1.5"),
        type=1,
        contract_type="swap",
        margin=Decimal(0),
    )
    keys = "Symbol MarginLevel Amount FrozenAmount Price Profit Type ContractType Margin"
    assert list(msgspec.json.decode(encode(position))) == keys.split()


@given(decimals)
def test_every_decimal_leaves_as_a_json_number_of_the_same_value(value: Decimal) -> None:
    assert msgspec.json.decode(encode([value]), type=list[Decimal]) == [value]


# ---------------------------------------------------------------- numbers

digits = st.text(string.digits, min_size=1, max_size=25)
written = st.builds(
    lambda sign, whole, point, fraction, exponent: sign + whole + (point + fraction if point else "") + exponent,
    st.sampled_from(["", "-", "+"]),
    digits,
    st.sampled_from(["", "."]),
    digits,
    st.sampled_from(["", "e5", "E-8", "e+30", "E0"]),
)


@given(written, st.sampled_from(["", " ", "\t", " \n"]))
def test_a_written_number_is_read_exactly(number: str, blank: str) -> None:
    assert str(decimal(blank + number + blank)) == str(Decimal(number))


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "abc",
        "NaN",
        "nan",
        "sNaN",
        "Infinity",
        "-inf",
        "1e400000",
        "1e100",
        "1_000",
        "1,000",
        "0x10",
        "--1",
        "1 2",
        "1e",
        ".",
        "e5",
        "٣",
        "\x00",
    ],
)
def test_what_is_no_number_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        decimal(wrong)


@given(st.text())
def test_any_text_is_a_finite_number_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert decimal(text).is_finite()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1,234.5", "1234.5"),
        ("1,234,567", "1234567"),
        (" 0.10 ", "0.10"),
        (None, "0"),
        (0, "0"),
        (1234567890123456789, "1234567890123456789"),
        (0.1, "0.1"),
        (Decimal("1E-8"), "1E-8"),
    ],
)
def test_numbers_of_exchanges_are_read(value: object, expected: str) -> None:
    assert str(number(value)) == expected


@pytest.mark.parametrize("wrong", ["", "n/a", True, [], {}, "NaN", float("nan"), float("inf"), Decimal("NaN"), b"1"])
def test_something_else_in_an_answer_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="number"):
        number(wrong)


@given(anything)
def test_any_json_value_is_a_number_or_refused(value: Any) -> None:
    with contextlib.suppress(ValueError):
        assert number(value).is_finite()


@given(decimals)
def test_plain_keeps_the_value_without_exponent_or_trailing_zeros(value: Decimal) -> None:
    text = plain(value)
    assert Decimal(text) == value
    assert set(text) <= {*string.digits, "-", "."}
    assert "." not in text or text[-1] not in "0."


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1E-8", "0.00000001"), ("1E+2", "100"), ("0.10", "0.1"), ("-1", "-1"), ("10", "10"), ("0", "0"), ("0.000", "0"), ("-1.0", "-1")],
)
def test_plain_numbers(value: str, expected: str) -> None:
    assert plain(Decimal(value)) == expected


def test_an_id_that_a_host_cannot_count_to_leaves_as_a_string() -> None:
    assert [host_id(value) for value in (7, 2**53, 2**53 + 1, 10**18)] == [7, 2**53, "9007199254740993", "1000000000000000000"]
