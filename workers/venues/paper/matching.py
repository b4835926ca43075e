"""The users' resting orders of one market, and who a new order trades with: pure, no money in it.

Price first, then time. At one price the users' orders come before the market's own level. Trading happens at the price of what rested.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from workers.venues.paper.market import Bar, Depth
from workers.venues.paper.orders import Order


class Match(NamedTuple):
    """One trade to be: maker is the user's resting order, or None for the market's own level."""

    price: int
    lots: int
    maker: Order | None


@dataclass(slots=True)
class Side:
    """Resting orders of one side, best first: rows are (price key, order number, order), the key negated on the buy side."""

    sign: int
    rows: list[tuple[int, int, Order]] = field(default_factory=list)

    def add(self, order: Order) -> None:
        insort(self.rows, (self.sign * order.price, order.number, order))

    def remove(self, order: Order) -> None:
        del self.rows[bisect_left(self.rows, (self.sign * order.price, order.number))]

    def levels(self) -> dict[int, int]:
        """Lots by price, best first."""
        lots: dict[int, int] = {}
        for _, _, order in self.rows:
            lots[order.price] = lots.get(order.price, 0) + order.remaining
        return lots


@dataclass(slots=True)
class Book:
    """One market's book: the users' orders, and how much of the market's own levels is taken in the current second.

    taken: lots by price, of the side that sells ("sell": asks) and of the side that buys ("buy": bids).
    changes: counts what a reader could notice within the second; with the second it is the depth's sequence.
    """

    sides: dict[str, Side] = field(default_factory=lambda: {"buy": Side(-1), "sell": Side(1)})
    taken: dict[str, dict[int, int]] = field(default_factory=lambda: {"buy": {}, "sell": {}})
    second: int = -1
    changes: int = 0

    def turn(self, second: int) -> None:
        """Begin a second: the market's levels are whole again."""
        self.second, self.changes = second, 0
        self.taken = {"buy": {}, "sell": {}}

    @property
    def sequence(self) -> int:
        """Never falls, changes with every change: the second, then up to a million changes within it."""
        return self.second * 1_000_000 + self.changes

    def take(self, side: str, match: Match) -> None:
        """Note what was taken of the market's own level on `side`."""
        if match.maker is None:
            self.taken[side][match.price] = self.taken[side].get(match.price, 0) + match.lots

    def own_levels(self, side: str, depth: Depth) -> Iterator[tuple[int, int]]:
        """The market's levels on `side` as far as nobody took them, best first."""
        taken = self.taken[side]
        for price, lots in depth.asks if side == "sell" else depth.bids:
            if (left := lots - taken.get(price, 0)) > 0:
                yield price, left

    def best(self, side: str, depth: Depth) -> int:
        """The best price of users and market together; where everything is taken, the first price beyond it all."""
        own = next(self.own_levels(side, depth), None)
        prices = [row[2].price for row in self.sides[side].rows[:1]] + ([own[0]] if own else [])
        if prices:
            return max(prices) if side == "buy" else min(prices)
        if side == "sell":
            return 1 + max([depth.asks[-1][0]] + [row[2].price for row in self.sides["buy"].rows[:1]])
        return max(1, min([depth.bids[-1][0]] + [row[2].price for row in self.sides["sell"].rows[:1]]) - 1)

    def visible(self, side: str, depth: Depth, limit: int) -> list[tuple[int, int]]:
        """(price, lots) of users and market together, best first."""
        lots = self.sides[side].levels()
        for price, left in self.own_levels(side, depth):
            lots[price] = lots.get(price, 0) + left
        return sorted(lots.items(), reverse=side == "buy")[:limit]


def matches(book: Book, depth: Depth, side: str, *, limit: int | None, lots: int | None, money: int, lot_notional: int) -> list[Match]:
    """What an incoming order of `side` trades with now; nothing is changed.

    limit: the worst price in ticks, None for a market order.
    lots: how much to trade; None to spend `money` (in UNIT-ths of quote) instead, as far as whole lots go.
    """
    other = "sell" if side == "buy" else "buy"
    found: list[Match] = []
    for price, available, maker in _opposite(book, depth, other):
        if limit is not None and (price > limit if side == "buy" else price < limit):
            break
        wanted = money // (price * lot_notional) if lots is None else lots
        if wanted == 0:
            break
        traded = min(wanted, available)
        found.append(Match(price, traded, maker))
        money -= traded * price * lot_notional
        if lots is not None:
            lots -= traded
    return found


def _opposite(book: Book, depth: Depth, side: str) -> Iterator[Match]:
    """All that rests on `side`, in the order in which it trades."""
    sign = book.sides[side].sign
    users: Sequence[tuple[int, int, Order]] = book.sides[side].rows
    reached = 0
    for price, lots in book.own_levels(side, depth):
        while reached < len(users) and users[reached][0] <= sign * price:
            maker = users[reached][2]
            yield Match(maker.price, maker.remaining, maker)
            reached += 1
        yield Match(price, lots, None)
    for _, _, maker in users[reached:]:
        yield Match(maker.price, maker.remaining, maker)


def reached(order: Order, bar: Bar, depth: Depth) -> bool:
    """Whether the market came to a resting order: it traded through its price within `bar`, or its book now offers it.

    Touching the price is not enough: others stood there first.
    """
    if order.side == "buy":
        return bar.low < order.price or depth.asks[0][0] <= order.price
    return bar.high > order.price or depth.bids[0][0] >= order.price
