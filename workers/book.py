"""One order book, kept from a snapshot and the deltas after it. Pure.

What may be wrong with it, and what the feeder then does:

BookError
├── SequenceGap   the delta does not go on from our last sequence, or there is no snapshot yet; withdraw, subscribe again
├── BadChecksum   our levels are not those of the exchange; withdraw, subscribe again
├── CrossedBook   the best bid is at or above the best ask; withdraw, subscribe again
├── DoubleLevel   a snapshot has a price twice on one side, and nobody knows which is true; withdraw, subscribe again
└── EmptyBook     a side has no level, so there is nothing to tell; withdraw, go on: the next delta may bring some

After any but EmptyBook the book is of no use until the next snapshot: whatever is asked of it is a SequenceGap.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from bus.messages import Level


class BookError(Exception):
    """The book cannot be told. The text says why, for a log and for a withdrawal."""


class SequenceGap(BookError):
    """A delta is missing, or the snapshot is."""


class BadChecksum(BookError):
    """A delta was lost or misread, though the sequence went on."""


class CrossedBook(BookError):
    """The two sides are not of one moment."""


class DoubleLevel(BookError):
    """The snapshot contradicts itself."""


class EmptyBook(BookError):
    """True, as far as anybody knows, but no use to a host."""


class _Side:
    """Levels in ascending order of price, and their prices to search in."""

    __slots__ = ("levels", "prices")

    def __init__(self, rows: Iterable[Level] = ()) -> None:
        self.levels = sorted(level for level in rows if level[1])
        self.prices = [price for price, _ in self.levels]

    def apply(self, rows: Iterable[Level]) -> None:
        prices, levels = self.prices, self.levels
        for level in rows:
            price, amount = level
            at = bisect_left(prices, price)
            known = at < len(prices) and prices[at] == price
            if amount:
                if known:
                    levels[at] = level  # the row as it was sent: its digits are what a checksum is made of
                else:
                    prices.insert(at, price)
                    levels.insert(at, level)
            elif known:
                del prices[at], levels[at]


class Book:
    """Bids and asks of one market. sequence: of the last message, None where the exchange has none.

    A level is (price in quote, amount in base): finite, the amount not below 0, which is for the parser to see to.
    """

    __slots__ = ("_asks", "_bids", "_usable", "sequence")

    def __init__(self) -> None:
        self.sequence: int | None = None
        self._asks, self._bids = _Side(), _Side()
        self._usable = False

    def snapshot(self, bids: Sequence[Level], asks: Sequence[Level], sequence: int | None = None) -> None:
        """Begin anew, from rows in any order. Raises CrossedBook, DoubleLevel."""
        self._usable = False
        self._bids, self._asks, self.sequence = _Side(bids), _Side(asks), sequence
        if len({price for price, _ in bids}) < len(bids) or len({price for price, _ in asks}) < len(asks):
            raise DoubleLevel("the snapshot has a price twice")
        self._accept()

    def apply(self, bids: Sequence[Level], asks: Sequence[Level], previous: int | None = None, sequence: int | None = None) -> None:
        """Apply one delta: amount 0 removes a level, and nothing where there is none; of a price that comes twice the last row holds.

        previous: the sequence that it goes on from, None where the exchange has none. Raises SequenceGap, CrossedBook.
        """
        self._need()
        self._usable = False  # also where a row cannot be compared, half applied
        if previous != self.sequence:
            raise SequenceGap(f"a delta goes on from {previous}, the book is at {self.sequence}")
        self._bids.apply(bids)
        self._asks.apply(asks)
        self.sequence = sequence
        self._accept()

    def check(self, checksum: Callable[[Sequence[Level], Sequence[Level]], int | None], expected: int) -> None:
        """Compare with the exchange's checksum of the book after its last message. checksum: of bids and asks, best first.

        Raises BadChecksum.
        """
        self._need()
        found = checksum(self._bids.levels[::-1], self._asks.levels)
        if found != expected:
            self._usable = False
            raise BadChecksum(f"the checksum is {found}, the exchange has {expected}")

    def top(self, levels: int) -> tuple[list[Level], list[Level]]:
        """So many of the best asks and bids, best first. Raises EmptyBook."""
        self._need()
        asks, bids = self._asks.levels[:levels], self._bids.levels[: -levels - 1 : -1]
        if not asks or not bids:
            raise EmptyBook(f"the book has no {'bids' if asks else 'asks'}")
        return asks, bids

    def _need(self) -> None:
        if not self._usable:
            raise SequenceGap("no snapshot yet")

    def _accept(self) -> None:
        """The book is of use, unless it is crossed."""
        bids, asks = self._bids.prices, self._asks.prices
        if bids and asks and bids[-1] >= asks[0]:
            raise CrossedBook(f"a bid of {bids[-1]:f} stands at or above the ask of {asks[0]:f}")
        self._usable = True
