"""What a feeder knows of one channel: takes what the socket tells, gives the finished value. Pure."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bus import market
from bus.messages import Candle, Depth, Level, Ticker, TradeRow, encode
from workers.book import Book
from workers.updates import Bars, BookDelta, BookSnapshot, Channel, Quote, Tape, Update

AUDITED = 10
"""Levels a side that a book by REST must have, where ours has as many."""
TRADES = 50
BARS = 10
"""So many of the newest a value holds."""

Checksum = Callable[[Sequence[Level], Sequence[Level]], int | None]


class Source:
    """proven_s: when what is known was last proven, monotonic. refusals, silences, strikes: of its subscription, answers of nothing to
    it, and REST answers that said something else, each in a row. empty: there is nothing to tell. levels: of each side of a depth."""

    def __init__(self, channel: Channel, levels: int, checksum: Checksum) -> None:
        self.channel = channel
        self.refusals = self.silences = self.strikes = 0
        self.empty = False
        self.proven_s = market.NEVER
        self.changes = 0
        """Counts what happened, so that an audit notices that it was overtaken."""
        self._levels = levels
        self._checksum = checksum
        self._book = Book()
        self._time_ms = 0
        self._top: tuple[list[Level], list[Level]] | None = None
        self._ticker: Ticker | None = None
        self._rows: deque[TradeRow] = deque(maxlen=TRADES)
        self._bars: dict[int, Candle] = {}
        self._taped = False

    @property
    def known(self) -> bool:
        return bool(self._ticker or self._top or self._bars or self._taped)

    def forget(self) -> None:
        """What is known is not true any more."""
        self._book, self._ticker, self._taped = Book(), None, False
        self._rows.clear()
        self._bars.clear()
        self.blank()
        self.empty = False

    def blank(self) -> None:
        """There is nothing to tell for now: the book has a side without a level."""
        self._top, self.empty = None, True
        self.proven_s = market.NEVER
        self.changes += 1

    def take(self, update: Update, proven_s: float) -> bool:
        """Take an update. -> whether the value is another one.

        Raises workers.book.EmptyBook: blank() it; any other BookError: forget() it, and subscribe anew.
        """
        self.changes += 1
        self.refusals, self.empty = 0, False
        match update:
            case Quote(ticker=ticker):
                changed, self._ticker = ticker != self._ticker, ticker
            case BookSnapshot() | BookDelta():
                changed = self._take_levels(update)
            case Tape(rows=rows, whole=whole):
                if whole:
                    self._rows.clear()
                self._rows.extend(rows)
                changed, self._taped = bool(rows or not self._taped), True
            case Bars(candles=candles):
                changed = any(self._bars.get(candle.time_s) != candle for candle in candles)
                self._bars |= {candle.time_s: candle for candle in candles}
                for time_s in sorted(self._bars)[:-BARS]:
                    del self._bars[time_s]
            case _:
                return False
        self.proven_s = proven_s if changed else max(proven_s, self.proven_s)
        return changed

    def _take_levels(self, update: BookSnapshot | BookDelta) -> bool:
        if isinstance(update, BookSnapshot):
            self._book.snapshot(update.bids, update.asks, update.sequence)
        else:
            self._book.apply(update.bids, update.asks, previous=update.previous, sequence=update.sequence)
        if update.checksum is not None:
            self._book.check(self._checksum, update.checksum)
        top = self._book.top(self._levels)
        if top == self._top:
            return False
        self._top = top
        self._time_ms = update.time_ms or self._time_ms
        return True

    def agrees(self, answer: Any) -> bool:
        """Whether what the exchange answers by REST is what is known: a Ticker, or a Depth as far as both have levels, at least AUDITED."""
        if isinstance(answer, Depth) and self._top is not None:
            asks, bids = self._top
            return all(
                len(theirs) >= min(len(mine), AUDITED) and mine[: len(theirs)] == theirs[: len(mine)]
                for mine, theirs in ((asks, answer.asks), (bids, answer.bids))
            )
        return isinstance(answer, Ticker) and self._ticker is not None and _timeless(answer) == _timeless(self._ticker)

    def content(self, symbol: str) -> bytes:
        """The finished reply, for one spelling of the symbol; only while it is known."""
        if self._ticker is not None:
            return market.reply(encode(msgspec.structs.replace(self._ticker, symbol=symbol)))
        if self._top is not None:
            return market.reply(encode(Depth(time_ms=self._time_ms, asks=self._top[0], bids=self._top[1])))
        return market.reply(encode(list(self._rows) if self._taped else [self._bars[time_s] for time_s in sorted(self._bars)]))


def _timeless(ticker: Ticker) -> Ticker:
    return msgspec.structs.replace(ticker, time_ms=0, symbol=None)
