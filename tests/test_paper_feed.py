"""The paper exchange's socket as the feeder sees it: payloads of ours in the shape of its README, and the real exchange on loopback."""

import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import config
from bus.errors import BadRequest
from bus.messages import Candle, Level, Ticker, TradeRow
from tests.paper import README
from workers.book import Book
from workers.updates import Bars, BookDelta, BookSnapshot, Channel, Quote, Refused, Tape, Update
from workers.venues import Feed
from workers.venues.paper.client import Paper

DOCUMENTED = (ValueError, LookupError, TypeError, msgspec.MsgspecError)
TIME = 1795168693000
DEPTH, TICKER, TRADES, CANDLES = (
    Channel(kind, "BTC_USDT", 15 if kind == "candles" else 0) for kind in ("depth", "ticker", "trades", "candles")
)
BIDS = [["52559.53", "0.034343"], ["52559.52", "0.205898"]]
ASKS = [["52559.55", "0.198268"], ["52559.56", "0.323809"], ["52559.58", "1.5"]]
"""The book of the README's worked example."""

BAR = [TIME - 13000, "1.5", "2.5", "1.25", "2", "0"]
DATA: dict[str, dict[str, Any]] = {
    "snapshot": {"channel": "depth", "type": "snapshot", "levels": 100, "sequence": 5, "checksum": 1428354797, "asks": ASKS, "bids": BIDS},
    "delta": {
        "channel": "depth",
        "type": "delta",
        "levels": 100,
        "sequence": 6,
        "previous": 5,
        "checksum": 1,
        "asks": ASKS[:1],
        "bids": [["52559.53", "0"]],
    },
    "ticker": {
        "channel": "ticker",
        "bid": "52559.53",
        "ask": "52559.55",
        "last": "52559.54",
        "open": "51000",
        "high": "53000.1",
        "low": "50500.5",
        "volume": "12345.678901",
    },
    "tape": {
        "channel": "trades",
        "type": "snapshot",
        "trades": [
            {"id": "17951686930", "time": TIME - 1000, "price": "52559.5", "amount": "0.000001", "side": "sell"},
            {"id": "u3", "time": TIME, "price": "52559.55", "amount": "2", "side": "buy"},
        ],
    },
    "trades": {"channel": "trades", "type": "update", "trades": []},
    "candle": {"channel": "candles", "interval": 15, "closed": False, "candle": BAR},
}
"""Each goes with the symbol BTC_USDT and the time TIME."""


def levels(rows: list[list[str]]) -> list[Level]:
    return [(Decimal(price), Decimal(amount)) for price, amount in rows]


def frame(document: dict[str, Any]) -> bytes:
    return json.dumps({"symbol": "BTC_USDT", "time": TIME} | document).encode()


def venue(base_url: str = "http://127.0.0.1:1", ws_url: str = "") -> Paper:
    return Paper("paper", config.Venue(base_url=base_url, ws_url=ws_url))


FEED: Feed = venue()

# ---------------------------------------------------------------- what we ask


@pytest.mark.parametrize(
    ("base_url", "ws_url", "meant"),
    [
        ("http://127.0.0.1:6690", "", "ws://127.0.0.1:6690/ws/v1"),
        ("https://paper.example/", "", "wss://paper.example/ws/v1"),
        ("https://paper.example/", "http://other:1", "ws://other:1/ws/v1"),
        ("http://a", "wss://sockets.example:444/", "wss://sockets.example:444/ws/v1"),
        ("http://a", "ws://b/ws/v1", "ws://b/ws/v1"),
        ("", "", ""),
    ],
)
def test_the_sockets_address_is_derived_or_given(base_url: str, ws_url: str, meant: str) -> None:
    assert venue(base_url, ws_url).socket_url() == meant


@pytest.mark.parametrize(
    ("kind", "symbol", "period_m", "meant"),
    [
        ("ticker", "BTC_USDT", 0, Channel("ticker", "BTC_USDT")),
        ("depth", "btc_usdt.SWAP", 0, Channel("depth", "BTC_USDT.swap")),
        ("trades", "btc", 1, Channel("trades", "BTC_USDT")),
        ("candles", "ETH-PERP", 15, Channel("candles", "ETH_USDT.swap", 15)),
        ("candles", "1INCH_USDT", 43200, Channel("candles", "1INCH_USDT", 43200)),
    ],
)
def test_a_host_spelling_means_a_channel(kind: str, symbol: str, period_m: int, meant: Channel) -> None:
    assert FEED.channel(kind, symbol, period_m) == meant


@pytest.mark.parametrize(
    ("kind", "symbol", "period_m"),
    [
        *(("ticker", symbol, 0) for symbol in ("", "_", "BTC USDT", "BTC_USDT_ETH", 'BTC_"', "BTC_USDT.a.b", "币_USDT")),
        *(("ticker", symbol, 0) for symbol in ("A" * 64, "A" * 17 + "_B", "B_" + "A" * 17, "BTC_USDT." + "x" * 9, "BTC_USDT\n")),
        ("candles", "BTC_USDT", 0),
        ("candles", "BTC_USDT", 43201),
        ("orders", "BTC_USDT", 0),
    ],
)
def test_what_cannot_be_is_not_asked_for(kind: str, symbol: str, period_m: int) -> None:
    with pytest.raises(BadRequest):
        FEED.channel(kind, symbol, period_m)


def test_one_frame_asks_for_what_is_wanted_of_one_market() -> None:
    swap = Channel("depth", "BTC_USDT.swap")
    first, second = map(json.loads, FEED.subscribe([DEPTH, swap, CANDLES], 20))
    assert first == {
        "id": "BTC_USDT depth candles-15",
        "op": "subscribe",
        "args": [
            {"channel": "depth", "symbol": "BTC_USDT", "levels": 20},
            {"channel": "candles", "symbol": "BTC_USDT", "interval": 15},
        ],
    }
    arg = {"channel": "depth", "symbol": "BTC_USDT.swap", "levels": 20}
    assert second == {"id": "BTC_USDT.swap depth", "op": "subscribe", "args": [arg]}


def test_each_channel_ends_by_a_frame_of_its_own() -> None:
    assert [json.loads(text) for text in FEED.unsubscribe([TICKER, TRADES], 20)] == [
        {"id": f"BTC_USDT {kind}", "op": "unsubscribe", "args": [{"channel": kind, "symbol": "BTC_USDT"}]} for kind in ("ticker", "trades")
    ]


@pytest.mark.parametrize(("wanted", "asked"), [(0, 1), (1, 1), (200, 200), (1000, 200)])
def test_a_book_has_as_many_levels_as_the_exchange_allows(wanted: int, asked: int) -> None:
    (text,) = FEED.subscribe([DEPTH], wanted)
    assert json.loads(text)["args"][0]["levels"] == asked


names = st.from_regex(r"[A-Z0-9]{1,16}_[A-Z0-9]{1,16}(\.[a-z0-9]{1,8})?", fullmatch=True)
channels = st.one_of(
    st.builds(Channel, st.sampled_from(["ticker", "depth", "trades"]), names),
    st.builds(Channel, st.just("candles"), names, st.integers(1, 43200)),
)


@given(
    st.lists(channels, unique=True, max_size=100), st.sampled_from(["BTC_USDT", "B" * 16 + "_" + "C" * 16 + "." + "d" * 8]), st.booleans()
)
def test_a_refusal_names_every_channel_of_its_frame_and_no_other(wanted: list[Channel], name: str, alike: bool) -> None:  # noqa: FBT001
    if alike:
        wanted = list({Channel(one.kind, name, one.period_m): None for one in wanted})
    refused: list[Update] = []
    for text in FEED.subscribe(wanted, 20):
        request = json.loads(text)
        assert len(request["id"]) <= 64
        assert len(request["args"]) <= 100
        answer = {"id": request["id"], "op": "subscribe", "code": 2001, "message": "unknown symbol"}
        parsed = FEED.parse(json.dumps(answer).encode())
        assert [one.channel.kind for one in parsed] == [arg["channel"] for arg in request["args"]]
        assert {one.channel.instrument for one in parsed} == {arg["symbol"] for arg in request["args"]}
        refused += parsed
    assert sorted(refused, key=repr) == sorted((Refused(channel=one, why="paper 2001 unknown symbol") for one in wanted), key=repr)


# ---------------------------------------------------------------- what the exchange tells


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("snapshot", BookSnapshot(channel=DEPTH, time_ms=TIME, bids=levels(BIDS), asks=levels(ASKS), sequence=5, checksum=1428354797)),
        (
            "delta",
            BookDelta(
                channel=DEPTH,
                time_ms=TIME,
                bids=levels([["52559.53", "0"]]),
                asks=levels(ASKS[:1]),
                previous=5,
                sequence=6,
                checksum=1,
            ),
        ),
        (
            "ticker",
            Quote(
                channel=TICKER,
                time_ms=TIME,
                ticker=Ticker(
                    time_ms=TIME,
                    buy=Decimal("52559.53"),
                    sell=Decimal("52559.55"),
                    last=Decimal("52559.54"),
                    open=Decimal(51000),
                    high=Decimal("53000.1"),
                    low=Decimal("50500.5"),
                    vol=Decimal("12345.678901"),
                ),
            ),
        ),
        (
            "tape",
            Tape(
                channel=TRADES,
                time_ms=TIME,
                whole=True,
                rows=[
                    TradeRow(id="17951686930", time_ms=TIME - 1000, price=Decimal("52559.5"), amount=Decimal("0.000001"), type="sell"),
                    TradeRow(id="u3", time_ms=TIME, price=Decimal("52559.55"), amount=Decimal(2), type="buy"),
                ],
            ),
        ),
        ("trades", Tape(channel=TRADES, time_ms=TIME, rows=[])),
        (
            "candle",
            Bars(
                channel=CANDLES,
                time_ms=TIME,
                candles=[Candle((TIME - 13000) // 1000, Decimal("1.5"), Decimal("2.5"), Decimal("1.25"), Decimal(2), Decimal(0))],
            ),
        ),
    ],
)
def test_each_message_is_read(name: str, update: Update) -> None:
    assert list(FEED.parse(frame(DATA[name]))) == [update]
    assert list(FEED.parse(frame(DATA[name] | {"new_field": [1]}))) == [update]


@pytest.mark.parametrize(
    "quiet",
    [
        {"id": "BTC_USDT ticker", "op": "subscribe", "code": 0, "args": [{"channel": "ticker", "symbol": "BTC_USDT"}]},
        {"id": "BTC_USDT ticker", "op": "unsubscribe", "code": 2002, "message": "args: not subscribed"},
        {"id": None, "op": "pong", "time": TIME},
        {"channel": "orders", "symbol": "", "time": TIME, "type": "snapshot", "sequence": 0, "orders": []},
        {"channel": "liquidations", "type": "update"},
    ],
)
def test_what_is_nothing_to_tell_is_not_told(quiet: dict[str, Any]) -> None:
    assert list(FEED.parse(json.dumps(quiet).encode())) == []


PRICES: list[object] = ["NaN", "sNaN", "Infinity", "-1", "0", "1e19", "1e-19", "1e999999999", "", "x", None, True, []]
AMOUNTS: list[object] = ["NaN", "Infinity", "-0.1", "1e18", "1E-19", "", None]
ROWS: list[object] = [[["1"]], [["1", "2", "3"]], [[]], {}, "1", [1]]
BROKEN: list[bytes] = [
    *(b"", b"{}", b"[]", b"null", b"5", b"{", b'"depth"', b"\xff", b'{"channel":"\xff"}', b'{"x":' + b"[" * 100_000),
    *(
        json.dumps({"id": of, "op": op, "code": 1101, "message": "slower"}).encode()
        for of in (None, 7, "x", "", "BTC_USDT")
        for op in ("subscribe", None)
    ),
    *(
        json.dumps({"id": of, "op": "subscribe", "code": 2001, "message": ""}).encode()
        for of in ("BTC_USDT ticker-1", "BTC_USDT candles", "BTC_USDT candles-", "BTC_USDT  ticker", "BTC_USDT candles-07", "BTC ticker")
    ),
    *(frame({"channel": name, "type": "other"}) for name in ("depth", "trades", "ticker", "candles")),
    *(
        frame({key: value for key, value in DATA[name].items() if key != gone})
        for name in DATA
        for gone in DATA[name]
        if gone not in ("levels", "closed", "channel", "type")
    ),
    *(frame(DATA["snapshot"] | {"bids": [[price, "1"]]}) for price in PRICES),
    *(frame(DATA["delta"] | {"asks": [["1", amount]]}) for amount in AMOUNTS),
    *(frame(DATA["delta"] | {"asks": rows}) for rows in ROWS),
    *(frame(DATA["delta"] | {name: value}) for name in ("sequence", "previous", "checksum", "time") for value in (None, "5", 1.5)),
    *(frame(DATA["ticker"] | {name: "NaN"}) for name in DATA["ticker"] if name != "channel"),
    *(frame(DATA["ticker"] | {name: "-1"}) for name in DATA["ticker"] if name != "channel"),
    *(
        frame(DATA["trades"] | {"trades": [DATA["tape"]["trades"][0] | wrong]})
        for wrong in ({"side": "up"}, {"price": "0"}, {"amount": "-1"}, {"id": None}, {"amount": "NaN"})
    ),
    *(frame(DATA["candle"] | {"candle": [*BAR[:at], wrong, *BAR[at + 1 :]]}) for at in range(6) for wrong in ("NaN", "-1", None)),
    *(frame(DATA["candle"] | {"candle": bar}) for bar in (BAR[:5], [*BAR, "1"], [*BAR[:4], "0", "1"])),
]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_what_is_not_of_the_documented_form_is_an_error(broken: bytes) -> None:
    with pytest.raises(DOCUMENTED):
        FEED.parse(broken)


def sound(updates: Sequence[Update]) -> None:
    """Whatever was read can be held by a book, and told."""
    for update in updates:
        msgspec.json.encode(update)
        if isinstance(update, BookSnapshot | BookDelta):
            assert all(price > 0 and 0 <= amount < 10**18 for price, amount in update.bids + update.asks)


@given(st.binary())
def test_any_bytes_are_read_or_refused_as_documented(data: bytes) -> None:
    with suppress(*DOCUMENTED):
        sound(FEED.parse(data))


scraps = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.decimals().map(str),
    st.lists(st.lists(st.decimals(places=2).map(str), max_size=3), max_size=3),
    st.sampled_from([f'"{text}"' for text in ("1e400", "1E-400", "9" * 5000)]),
)


@given(st.sampled_from(sorted(DATA)), st.data())
def test_any_value_in_any_place_is_read_or_refused_as_documented(name: str, data: st.DataObject) -> None:
    document = {"symbol": "BTC_USDT", "time": TIME} | DATA[name] | {"id": 1, "op": None, "code": 0}
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(document)), scraps, max_size=2))
    text = json.dumps(document | changed).encode()
    at = data.draw(st.integers(0, len(text)))
    for cut in (text, text[:at], text[:at] + data.draw(st.binary(max_size=2)) + text[at:]):
        with suppress(*DOCUMENTED):
            sound(FEED.parse(cut))


# ---------------------------------------------------------------- the checksum


def test_the_checksum_is_that_of_the_readmes_example() -> None:
    assert "and the checksum is 1428354797." in README.read_text()
    assert FEED.checksum(levels(BIDS), levels(ASKS)) == 1428354797
    (snapshot,) = FEED.parse(frame(DATA["snapshot"]))
    assert isinstance(snapshot, BookSnapshot)
    book = Book()
    book.snapshot(snapshot.bids, snapshot.asks, snapshot.sequence)
    book.check(FEED.checksum, 1428354797)


def test_the_checksum_is_of_the_digits_as_they_were_sent() -> None:
    for row in (["0.0000001", "100"], ["0.00000010", "1000000000000.0"]):
        expected = zlib.crc32(":".join(row).encode())
        assert FEED.checksum(levels([row]), []) == FEED.checksum([], levels([row])) == expected


def test_the_checksum_is_over_the_best_25_levels() -> None:
    bids, asks = ([(Decimal(at), Decimal(1)) for at in places] for places in (range(99, 59, -1), range(100, 140)))
    assert FEED.checksum(bids, asks) == FEED.checksum(bids[:25], asks[:25])
    assert len({FEED.checksum(bids[:n], asks[:m]) for n, m in ((25, 25), (24, 25), (25, 24), (24, 24))}) == 4
