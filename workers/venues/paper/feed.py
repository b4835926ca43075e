"""The paper exchange's socket as pure functions: the frames that ask, and what the frames that come tell. See README.md, WebSocket.

An answer that refuses says neither which subscription it means nor that the others of the frame hold. So a frame asks for the channels
of one market alone, which are refused alike, and its id is their names.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal, InvalidOperation
from itertools import chain, zip_longest
from typing import Literal

import msgspec
from msgspec import Struct

from bus.errors import BadRequest
from bus.messages import Candle, Level, Ticker, TradeRow
from bus.subjects import shown
from workers.updates import Bars, BookDelta, BookSnapshot, Channel, Quote, Refused, Tape, Update

PATH = "/ws/v1"
KINDS = frozenset({"ticker", "depth", "trades", "candles"})
MOST_LEVELS = 200
MOST_MINUTES = 43_200
LONGEST_ID = 64
CHECKED = 25
"""Levels a side that a checksum is over."""

_SYMBOL = re.compile(r"[A-Z0-9]{1,16}_[A-Z0-9]{1,16}(\.[a-z0-9]{1,8})?")
LEAST, MOST, ZERO = Decimal("1e-18"), Decimal("1e18"), Decimal(0)
"""18 digits on each side of the point: what numbers of an exchange keep to, and no text of them is long."""


def socket_url(address: str) -> str:
    """Of an address of the exchange: "http://host:1" -> "ws://host:1/ws/v1"; "" of ""."""
    scheme, mark, host = address.rstrip("/").removesuffix(PATH).partition("://")
    return f"{ {'http': 'ws', 'https': 'wss'}.get(scheme, scheme) }{mark}{host}{PATH}" if host else ""


def channel(kind: str, instrument: str, period_m: int) -> Channel:
    """Raises BadRequest for what the exchange cannot have."""
    if kind not in KINDS:
        raise BadRequest(f"kind: the paper exchange feeds {', '.join(sorted(KINDS))}, not {shown(kind)}")
    if not _SYMBOL.fullmatch(instrument):
        raise BadRequest(f"symbol: expected one like BTC_USDT or BTC_USDT.swap, got {shown(instrument)}")
    if kind != "candles":
        return Channel(kind, instrument)
    if not 1 <= period_m <= MOST_MINUTES:
        raise BadRequest(f"period: expected 1 to {MOST_MINUTES} minutes, got {period_m}")
    return Channel(kind, instrument, period_m)


# ---------------------------------------------------------------- what we ask


def subscribe(channels: Iterable[Channel], levels: int) -> list[str]:
    """One frame for each market, more where its name would be too long. levels: of a book; the exchange has 1 to 200."""
    return [_frame("subscribe", asked, levels) for asked in _markets(channels)]


def unsubscribe(channels: Iterable[Channel], levels: int) -> list[str]:
    """One frame for each: the exchange refuses to end what did not begin, and whatever else is in that frame with it."""
    return [_frame("unsubscribe", [one], levels) for one in channels]


def _markets(channels: Iterable[Channel]) -> Iterator[list[Channel]]:
    markets: defaultdict[str, list[Channel]] = defaultdict(list)
    for one in channels:
        asked = markets[one.instrument]
        if len(_id([*asked, one])) > LONGEST_ID:
            yield asked
            asked = markets[one.instrument] = []
        asked.append(one)
    yield from markets.values()


def _frame(op: str, channels: Sequence[Channel], levels: int) -> str:
    args = [_argument(one, levels) for one in channels]
    return msgspec.json.encode({"id": _id(channels), "op": op, "args": args}).decode()


def _argument(one: Channel, levels: int) -> dict[str, str | int]:
    argument: dict[str, str | int] = {"channel": one.kind, "symbol": one.instrument}
    if one.kind == "depth":
        argument["levels"] = min(max(levels, 1), MOST_LEVELS)
    elif one.kind == "candles":
        argument["interval"] = one.period_m
    return argument


def _id(channels: Sequence[Channel]) -> str:
    """ "BTC_USDT ticker depth candles-15", of channels of one market."""
    kinds = (f"{one.kind}-{one.period_m}" if one.period_m else one.kind for one in channels)
    return " ".join((channels[0].instrument, *kinds))


def _channels(of: str | int | None) -> list[Channel]:
    """What _id() made a text of. Raises ValueError for one that it did not make."""
    instrument, *kinds = str(of).split(" ")
    pairs = [kind.partition("-") for kind in kinds]
    try:
        channels = [channel(kind, instrument, int(minutes or 0)) for kind, _, minutes in pairs]
    except BadRequest as e:
        raise ValueError("an answer to what we did not ask") from e
    if not channels or _id(channels) != of:
        raise ValueError("an answer to what we did not ask")
    return channels


# ---------------------------------------------------------------- what the exchange tells


class _Head(Struct, gc=False):
    """Of any message: channel and type of data, the others of an answer."""

    channel: str = ""
    type: str = ""
    op: str | None = None
    code: int = 0
    id: str | int | None = None
    message: str = ""


class _Snapshot(Struct, gc=False):
    symbol: str
    time: int
    sequence: int
    checksum: int
    asks: list[Level]
    bids: list[Level]


class _Delta(_Snapshot, kw_only=True, gc=False):
    previous: int


class _Ticker(Struct, gc=False):
    symbol: str
    time: int
    bid: Decimal
    ask: Decimal
    last: Decimal
    open: Decimal
    high: Decimal
    low: Decimal
    volume: Decimal


class _Trade(Struct, gc=False):
    id: str
    time: int
    price: Decimal
    amount: Decimal
    side: Literal["buy", "sell"]


class _Trades(Struct, gc=False):
    symbol: str
    time: int
    trades: list[_Trade]


class _Candle(Struct, gc=False):
    symbol: str
    time: int
    interval: int
    candle: tuple[int, Decimal, Decimal, Decimal, Decimal, Decimal]


_head = msgspec.json.Decoder(_Head).decode
_snapshot = msgspec.json.Decoder(_Snapshot).decode
_delta = msgspec.json.Decoder(_Delta).decode
_ticker = msgspec.json.Decoder(_Ticker).decode
_trades = msgspec.json.Decoder(_Trades).decode
_candle = msgspec.json.Decoder(_Candle).decode


def parse(frame: bytes) -> Sequence[Update]:
    """What a frame tells; nothing for an answer that accepts, and for channels that are none of ours.

    Raises ValueError, of which msgspec's errors are, for what is not of the form that the README documents.
    """
    try:
        head = _head(frame)
        if not head.channel:
            return _refusal(head)
        read = _READ.get((head.channel, head.type))
        if read is not None:
            return (read(frame),)
    except RecursionError as e:
        raise ValueError("nested too deep") from e
    except InvalidOperation as e:
        raise ValueError("not a number") from e
    if head.channel in KINDS:
        raise ValueError(f"{head.channel}: a type of message that is not documented")
    return ()


def _refusal(answer: _Head) -> Sequence[Update]:
    if answer.op is None and not answer.code:
        raise ValueError("neither data nor an answer")
    if not answer.code or answer.op == "unsubscribe":
        return ()
    return [Refused(channel=one, why=f"paper {answer.code} {answer.message}") for one in _channels(answer.id)]


def _read_snapshot(frame: bytes) -> Update:
    book = _snapshot(frame)
    return BookSnapshot(
        channel=Channel("depth", book.symbol),
        time_ms=book.time,
        bids=_levels(book.bids),
        asks=_levels(book.asks),
        sequence=book.sequence,
        checksum=book.checksum,
    )


def _read_delta(frame: bytes) -> Update:
    book = _delta(frame)
    return BookDelta(
        channel=Channel("depth", book.symbol),
        time_ms=book.time,
        bids=_levels(book.bids),
        asks=_levels(book.asks),
        previous=book.previous,
        sequence=book.sequence,
        checksum=book.checksum,
    )


def _read_ticker(frame: bytes) -> Update:
    row = _ticker(frame)
    _prices(row.bid, row.ask, row.last, row.open, row.high, row.low)
    _amount(row.volume)
    ticker = Ticker(time_ms=row.time, buy=row.bid, sell=row.ask, last=row.last, high=row.high, low=row.low, vol=row.volume, open=row.open)
    return Quote(channel=Channel("ticker", row.symbol), time_ms=row.time, ticker=ticker)


def _tape(frame: bytes, *, whole: bool) -> Update:
    tape = _trades(frame)
    for row in tape.trades:
        _prices(row.price)
        _amount(row.amount)
    rows = [TradeRow(id=row.id, time_ms=row.time, price=row.price, amount=row.amount, type=row.side) for row in tape.trades]
    return Tape(channel=Channel("trades", tape.symbol), time_ms=tape.time, rows=rows, whole=whole)


def _read_candle(frame: bytes) -> Update:
    bar = _candle(frame)
    start_ms, *values = bar.candle
    _prices(*values[:4])
    _amount(values[4])
    candle = Candle(start_ms // 1000, *values)
    return Bars(channel=Channel("candles", bar.symbol, bar.interval), time_ms=bar.time, candles=[candle])


_READ: dict[tuple[str, str], Callable[[bytes], Update]] = {
    ("depth", "snapshot"): _read_snapshot,
    ("depth", "delta"): _read_delta,
    ("ticker", ""): _read_ticker,
    ("trades", "snapshot"): lambda frame: _tape(frame, whole=True),
    ("trades", "update"): lambda frame: _tape(frame, whole=False),
    ("candles", ""): _read_candle,
}


def _levels(rows: list[Level]) -> list[Level]:
    for price, amount in rows:
        if not (LEAST <= price < MOST and (LEAST <= amount < MOST or amount == ZERO)):  # the two below, without their calls
            raise ValueError("a level that cannot be")
    return rows


def _prices(*prices: Decimal) -> None:
    for price in prices:
        if not LEAST <= price < MOST:
            raise ValueError("a price that cannot be")


def _amount(amount: Decimal) -> None:
    if not (LEAST <= amount < MOST or amount == ZERO):
        raise ValueError("an amount that cannot be")


def checksum(bids: Sequence[Level], asks: Sequence[Level]) -> int:
    """CRC-32 over the best 25 levels a side, a bid and an ask in turn, with the digits that were sent."""
    turns = chain.from_iterable(zip_longest(bids[:CHECKED], asks[:CHECKED], fillvalue=()))
    numbers = list(chain.from_iterable(turns))
    text = ":".join(map(str, numbers))
    if "E" in text:  # below a millionth; else str() is the same, and three times as fast
        text = ":".join([f"{number:f}" for number in numbers])
    return zlib.crc32(text.encode())
