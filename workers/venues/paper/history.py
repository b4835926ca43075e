"""What was true when: the top of each book and its ticker at any moment of the last ten minutes. In memory, bounded. Pure.

The market's own book can be computed for any past, so only moments at which users had changed something are kept: each with the levels
that differ from the market's own. A second nobody touched takes no memory at all.
"""

from array import array
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from workers.venues.paper import market as price_model
from workers.venues.paper import quotes
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.quotes import View

KEPT_MS = 600_000
LEVELS = 50
MOST_BYTES = 64 << 20
"""About what all records may take; beyond it the oldest of the market with the most go early."""

_RECORD_BYTES = 500


class _Record(NamedTuple):
    """A book from time_ms on. asks, bids: price, lots, price, lots ... where it differs from the market's own, 0 lots: not there.

    resting: users' orders rest in it; where none do, the book is the market's own again with the next second.
    """

    time_ms: int
    sequence: int
    second: int
    step_ms: int
    resting: bool
    ask: int
    bid: int
    asks: "array[int]"
    bids: "array[int]"

    @property
    def size(self) -> int:
        return _RECORD_BYTES + 8 * (len(self.asks) + len(self.bids))


@dataclass(frozen=True, slots=True)
class State:
    """A book and what its ticker needs, true in [since_ms, until_ms); until_ms None: still. asks, bids: (ticks, lots), best first."""

    since_ms: int
    until_ms: int | None
    sequence: int
    second: int
    ask: int
    bid: int
    asks: list[tuple[int, int]]
    bids: list[tuple[int, int]]


class History:
    """since_ms: when the exchange began; it does not know what was before."""

    def __init__(self, seed: int, *, step_ms: int, since_ms: int) -> None:
        self._seed = seed
        self._step_ms = step_ms
        self._logs: dict[str, deque[_Record]] = {symbol: deque() for symbol in MARKETS}
        self._since_ms = dict.fromkeys(MARKETS, since_ms)
        self._size = 0

    def note(self, view: View) -> None:
        """Keep a book that has just changed."""
        book, log = view.book, self._logs[view.symbol]
        resting = any(side.rows for side in book.sides.values())
        own = not resting and not any(book.taken.values()) and not book.changes
        if own and not (log and log[-1].resting):
            return
        (ask, bid), time_ms = view.best, max(view.now_ms, log[-1].time_ms if log else 0)
        asks, bids = _difference(view.own.asks, view.asks, 1), _difference(view.own.bids, view.bids, -1)
        log.append(_Record(time_ms, book.sequence, book.second, book.step_ms, resting, ask, bid, asks, bids))
        self._size += log[-1].size
        # The one before the ten minutes stays: it is what their first moment shows.
        while len(log) > 1 and log[1].time_ms <= time_ms - KEPT_MS:
            self._size -= log.popleft().size
        while self._size > MOST_BYTES:
            symbol = max(self._logs, key=lambda symbol: len(self._logs[symbol]))
            self._size -= self._logs[symbol].popleft().size
            self._since_ms[symbol] = self._logs[symbol][0].time_ms if self._logs[symbol] else view.now_ms

    def check(self, symbol: str, time_ms: int, now_ms: int) -> None:
        """Raise Refused(BAD_PARAMETER) for a moment that is not, or not any more, known."""
        first_ms = max(self._since_ms[symbol], now_ms - KEPT_MS)
        if not first_ms <= time_ms <= now_ms:
            raise Refused(Code.BAD_PARAMETER, f"time: the history of {symbol} reaches from {first_ms} to {now_ms}")

    def state(self, symbol: str, time_ms: int) -> State:
        """The book at time_ms: what was true at the end of that millisecond."""
        log, second = self._logs[symbol], time_ms // 1000
        place = bisect_right(log, time_ms, key=lambda record: record.time_ms)
        until_ms = log[place].time_ms if place < len(log) else None
        record = log[place - 1] if place else None
        if record and (record.resting or second <= record.second):
            if not record.resting:
                until_ms = _earlier(until_ms, (record.second + 1) * 1000)
            own = price_model.depth(self._seed, symbol, record.second, record.step_ms)
            asks, bids = _restored(own.asks, record.asks, 1), _restored(own.bids, record.bids, -1)
            return State(record.time_ms, until_ms, record.sequence, record.second, record.ask, record.bid, asks, bids)
        step_ms = time_ms % 1000 // self._step_ms * self._step_ms
        own = price_model.depth(self._seed, symbol, second, step_ms)
        asks, bids = list(own.asks), list(own.bids)
        until_ms = _earlier(until_ms, second * 1000 + min(1000, step_ms + self._step_ms))
        return State(second * 1000 + step_ms, until_ms, second * 1_000_000 + step_ms, second, asks[0][0], bids[0][0], asks, bids)

    def depth(self, symbol: str, time_ms: int, limit: int, now_ms: int) -> dict[str, object]:
        """GET /api/v1/history/depth. Raises Refused(BAD_PARAMETER)."""
        self.check(symbol, time_ms, now_ms)
        state, market = self.state(symbol, time_ms), MARKETS[symbol]
        asks, bids = (
            [[market.price_text(price), market.amount_text(lots)] for price, lots in side[:limit]] for side in (state.asks, state.bids)
        )
        return {"symbol": symbol, "time": time_ms, **_span(state, now_ms), "sequence": state.sequence, "asks": asks, "bids": bids}

    def ticker(self, symbol: str, time_ms: int, now_ms: int) -> dict[str, object]:
        """GET /api/v1/history/ticker. Raises Refused(BAD_PARAMETER)."""
        self.check(symbol, time_ms, now_ms)
        state = self.state(symbol, time_ms)
        ticker = quotes.ticker_of(self._seed, symbol, state.second, ask=state.ask, bid=state.bid, time_ms=time_ms)
        return ticker | _span(state, now_ms) | {"sequence": state.sequence}


def _span(state: State, now_ms: int) -> dict[str, object]:
    """A state may end later than now, when the next second begins: that is still to come."""
    return {"since": state.since_ms, "until": state.until_ms if state.until_ms is not None and state.until_ms <= now_ms else None}


def _earlier(known_ms: int | None, other_ms: int) -> int:
    return other_ms if known_ms is None else min(known_ms, other_ms)


def _difference(own: tuple[tuple[int, int], ...], visible: list[tuple[int, int]], sign: int) -> "array[int]":
    """What to change in the market's own levels to see the best LEVELS of `visible`."""
    top, levels = visible[:LEVELS], dict(own)
    shown = dict(top)
    rows = array("q")
    for price, lots in top:
        if levels.get(price) != lots:
            rows.extend((price, lots))
    for price, _ in own:
        if len(top) == LEVELS and sign * price > sign * top[-1][0]:
            break
        if price not in shown:
            rows.extend((price, 0))
    return rows


def _restored(own: tuple[tuple[int, int], ...], rows: "array[int]", sign: int) -> list[tuple[int, int]]:
    levels = dict(own) | dict(zip(rows[::2], rows[1::2], strict=True))
    return sorted(((price, lots) for price, lots in levels.items() if lots), key=lambda level: sign * level[0])[:LEVELS]
