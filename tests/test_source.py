"""workers/source.py: what is known of a channel, and what is told of it."""

from decimal import Decimal

import msgspec
import pytest

from bus.market import NEVER
from bus.messages import Candle, Depth, Level, Ticker, TradeRow
from workers.book import CrossedBook, EmptyBook, SequenceGap
from workers.source import BARS, TRADES, Source
from workers.updates import Bars, BookDelta, BookSnapshot, Channel, Quote, Tape

BTC = "BTC_USDT"


def source(kind: str, levels: int = 2) -> Source:
    return Source(Channel(kind, BTC), levels, lambda bids, asks: None)


def told(one: Source, symbol: str = BTC) -> object:
    return msgspec.json.decode(one.content(symbol))


def ticker(last: int, time_ms: int = 1) -> Ticker:
    return Ticker(
        time_ms=time_ms,
        buy=Decimal(last - 1),
        sell=Decimal(last + 1),
        last=Decimal(last),
        high=Decimal(110),
        low=Decimal(90),
        vol=Decimal("1.5"),
    )


def rows(*levels: tuple[int, int]) -> list[Level]:
    return [(Decimal(price), Decimal(amount)) for price, amount in levels]


def snapshot(bids: list[Level], asks: list[Level], sequence: int = 1) -> BookSnapshot:
    return BookSnapshot(channel=Channel("depth", BTC), time_ms=5, bids=bids, asks=asks, sequence=sequence)


def delta(bids: list[Level], asks: list[Level], previous: int, sequence: int) -> BookDelta:
    return BookDelta(channel=Channel("depth", BTC), time_ms=6, bids=bids, asks=asks, previous=previous, sequence=sequence)


def test_a_ticker_is_told_in_the_spelling_of_whoever_asks() -> None:
    one = source("ticker")
    assert not one.known
    assert one.take(Quote(channel=one.channel, ticker=ticker(100)), 7.0)
    assert one.known
    assert told(one, "btc_usdt") == {
        "data": {"time": 1, "buy": 99, "sell": 101, "last": 100, "high": 110, "low": 90, "vol": 1.5, "symbol": "btc_usdt"}
    }


def test_a_depth_is_cut_to_its_levels_best_first() -> None:
    one = source("depth")
    assert one.take(snapshot(rows((97, 1), (99, 3), (98, 2)), rows((102, 5), (101, 4), (103, 6))), 7.0)
    assert told(one) == {"data": {"time": 5, "asks": [[101, 4], [102, 5]], "bids": [[99, 3], [98, 2]]}}


def test_a_delta_beyond_the_levels_proves_and_changes_nothing() -> None:
    one = source("depth")
    one.take(snapshot(rows((97, 1), (99, 3), (98, 2)), rows((102, 5), (101, 4), (103, 6))), 7.0)
    assert not one.take(delta(rows((97, 9)), [], 1, 2), 8.0)
    assert one.proven_s == 8.0
    assert one.take(delta(rows((99, 0)), [], 2, 3), 9.0)
    assert told(one) == {"data": {"time": 6, "asks": [[101, 4], [102, 5]], "bids": [[98, 2], [97, 9]]}}


def test_a_change_is_as_old_as_its_own_proof_and_no_change_makes_nothing_older() -> None:
    one = source("ticker")
    one.take(Quote(channel=one.channel, ticker=ticker(100)), 7.0)
    one.take(Quote(channel=one.channel, ticker=ticker(100)), 6.0)
    assert one.proven_s == 7.0
    one.take(Quote(channel=one.channel, ticker=ticker(101)), 6.5)
    assert one.proven_s == 6.5


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (delta(rows((99, 4)), [], 7, 8), SequenceGap),
        (delta(rows((101, 4)), [], 1, 2), CrossedBook),
        (delta(rows((99, 0), (98, 0), (97, 0)), [], 1, 2), EmptyBook),
    ],
)
def test_a_book_that_is_wrong_says_so(update: BookDelta, error: type[Exception]) -> None:
    one = source("depth")
    one.take(snapshot(rows((97, 1), (99, 3), (98, 2)), rows((102, 5), (101, 4))), 7.0)
    with pytest.raises(error):
        one.take(update, 8.0)


def test_an_empty_book_goes_on_with_the_next_delta() -> None:
    one = source("depth")
    one.take(snapshot(rows((99, 3)), rows((101, 4))), 7.0)
    with pytest.raises(EmptyBook):
        one.take(delta(rows((99, 0)), [], 1, 2), 8.0)
    one.blank()
    assert not one.known
    assert one.take(delta(rows((98, 2)), [], 2, 3), 9.0)
    assert told(one) == {"data": {"time": 6, "asks": [[101, 4]], "bids": [[98, 2]]}}


def test_what_is_forgotten_needs_a_snapshot() -> None:
    one = source("depth")
    one.take(snapshot(rows((99, 3)), rows((101, 4))), 7.0)
    one.forget()
    assert (one.known, one.proven_s) == (False, NEVER)
    with pytest.raises(SequenceGap):
        one.take(delta(rows((98, 2)), [], 1, 2), 9.0)


def test_trades_are_the_newest_ones_and_a_whole_tape_begins_anew() -> None:
    one = source("trades")

    def tape(*ids: int, whole: bool = False) -> Tape:
        trades = [TradeRow(id=number, time_ms=number, price=Decimal(100), amount=Decimal(1), type="buy") for number in ids]
        return Tape(channel=one.channel, rows=trades, whole=whole)

    one.take(tape(*range(1, TRADES + 1), whole=True), 1.0)
    one.take(tape(TRADES + 1), 2.0)
    assert [row["id"] for row in msgspec.json.decode(one.content(BTC))["data"]] == list(range(2, TRADES + 2))
    one.take(tape(900, whole=True), 3.0)
    assert told(one) == {"data": [{"id": 900, "time": 900, "price": 100, "amount": 1, "type": "buy"}]}


def test_a_tape_without_trades_is_known_as_well() -> None:
    one = source("trades")
    assert one.take(Tape(channel=one.channel, rows=[], whole=True), 1.0)
    assert told(one) == {"data": []}


def test_a_bar_replaces_that_of_its_time_and_old_ones_go() -> None:
    one = source("candles")

    def bars(*starts: int, close: int) -> Bars:
        return Bars(
            channel=one.channel, candles=[Candle(start, Decimal(1), Decimal(9), Decimal(1), Decimal(close), Decimal(5)) for start in starts]
        )

    assert one.take(bars(60, close=2), 1.0)
    assert not one.take(bars(60, close=2), 2.0)
    assert one.take(bars(60, close=3), 3.0)
    assert told(one) == {"data": [[60, 1, 9, 1, 3, 5]]}
    one.take(bars(*range(120, 120 + 60 * BARS, 60), close=4), 4.0)
    assert [row[0] for row in msgspec.json.decode(one.content(BTC))["data"]] == list(range(120, 120 + 60 * BARS, 60))


def test_an_audit_compares_what_both_sides_have() -> None:
    one = source("depth")
    one.take(snapshot(rows((99, 3), (98, 2)), rows((101, 4), (102, 5))), 7.0)
    assert one.agrees(Depth(time_ms=1, asks=rows((101, 4), (102, 5), (103, 1)), bids=rows((99, 3), (98, 2))))
    assert not one.agrees(Depth(time_ms=1, asks=rows((101, 4), (102, 5)), bids=rows((99, 3))))  # so few prove nothing of the rest
    assert not one.agrees(Depth(time_ms=1, asks=rows((101, 4), (102, 6)), bids=rows((99, 3))))
    assert not one.agrees(Depth(time_ms=1, asks=[], bids=rows((99, 3))))
    quote = source("ticker")
    quote.take(Quote(channel=quote.channel, ticker=ticker(100, time_ms=1)), 7.0)
    assert quote.agrees(msgspec.structs.replace(ticker(100, time_ms=9), symbol=BTC))
    assert not quote.agrees(ticker(101))
    assert not quote.agrees(Depth(time_ms=1, asks=rows((101, 4)), bids=rows((99, 3))))
