"""The stand-in exchange of exchange.py as a venue: class "tests.bench.stand:Stand", base_url where it listens."""

from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar

import msgspec
from msgspec import Struct

from bus import config
from bus.messages import Depth, Level, Market, Ticker
from tests.bench.exchange import Asked
from workers.http import Call
from workers.updates import BookDelta, BookSnapshot, Channel, Quote, Update


class _Told(Struct, gc=False):
    channel: str
    symbol: str
    time: int


class _Ticker(_Told, kw_only=True, gc=False):
    bid: Decimal
    ask: Decimal
    last: Decimal
    open: Decimal
    high: Decimal
    low: Decimal
    volume: Decimal


class _Book(_Told, kw_only=True, gc=False):
    sequence: int
    previous: int = 0
    asks: list[Level]
    bids: list[Level]


_told = msgspec.json.Decoder(_Told).decode
_ticker = msgspec.json.Decoder(_Ticker).decode
_book = msgspec.json.Decoder(_Book).decode


class Stand:
    public = frozenset({"ticker", "depth"})
    contracts = False
    lookups = frozenset[str]()
    feeds: ClassVar[frozenset[str]] = frozenset({"ticker", "depth"})
    per_socket: ClassVar[int] = 200
    requests_per_s: ClassVar[float] = 10.0
    keepalive: ClassVar[str] = ""

    def __init__(self, name: str, settings: config.Venue) -> None:
        self._base = settings.base_url

    async def ticker(self, call: Call, params: Market) -> Ticker:
        answer = await call.send("GET", f"{self._base}/ticker?symbol={params.symbol}")
        return _quote(_ticker(answer.body))

    async def depth(self, call: Call, params: Market) -> Depth:
        book = _book((await call.send("GET", f"{self._base}/depth?symbol={params.symbol}")).body)
        return Depth(time_ms=book.time, asks=book.asks, bids=book.bids)

    async def time_ms(self, call: Call) -> int:
        return int((await call.send("GET", f"{self._base}/time")).body)

    def socket_url(self) -> str:
        return f"{self._base.replace('http', 'ws', 1)}/ws" if self._base else ""

    def channel(self, kind: str, symbol: str, _period_m: int) -> Channel:
        return Channel(kind, symbol)

    def subscribe(self, channels: Sequence[Channel], _levels: int) -> list[str]:
        return [_frame("subscribe", channels)]

    def unsubscribe(self, channels: Sequence[Channel], _levels: int) -> list[str]:
        return [_frame("unsubscribe", channels)]

    def parse(self, frame: bytes) -> Sequence[Update]:
        told = _told(frame)
        if told.channel == "ticker":
            row = _ticker(frame)
            return (Quote(channel=Channel("ticker", row.symbol), time_ms=row.time, ticker=_quote(row)),)
        book = _book(frame)
        channel = Channel("depth", book.symbol)
        if told.channel == "snapshot":
            return (BookSnapshot(channel=channel, time_ms=book.time, bids=book.bids, asks=book.asks, sequence=book.sequence),)
        return (
            BookDelta(
                channel=channel,
                time_ms=book.time,
                bids=book.bids,
                asks=book.asks,
                previous=book.previous,
                sequence=book.sequence,
            ),
        )

    def checksum(self, _bids: Sequence[Level], _asks: Sequence[Level]) -> int | None:
        return None


def _quote(row: _Ticker) -> Ticker:
    return Ticker(time_ms=row.time, buy=row.bid, sell=row.ask, last=row.last, high=row.high, low=row.low, vol=row.volume, open=row.open)


def _frame(op: str, channels: Sequence[Channel]) -> str:
    return msgspec.json.encode(Asked(op, [(one.kind, one.instrument) for one in channels])).decode()
