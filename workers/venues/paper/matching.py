"""The users' resting orders of one market, and who a new order trades with: pure, no money in it.

Price first, then time. At one price the users' orders come before the market's own level. Trading happens at the price of what rested.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from workers.venues.paper.market import Depth, Print
from workers.venues.paper.orders import Order

ALL = 1 << 62
"""More lots than a level can have."""


class Match(NamedTuple):
    """One trade to be: maker is the user's resting order, or None for the market's own level."""

    price: int
    lots: int
    maker: Order | None


class Plan(NamedTuple):
    """What an incoming order is about to do.

    own: resting orders of the same account that stand in its way, to be cancelled.
    complete: nothing of it is left, or for an order for money: what is left buys no further lot.
    """

    matches: list[Match]
    own: list[Order]
    complete: bool


class Passing(NamedTuple):
    """What one second of the market does to one side: lots for resting orders, each at its own price, and what it takes of the levels."""

    fills: list[tuple[Order, int]]
    taken: list[Match]


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
    step_ms: how far into the second the market's present step began; 0 where it moves on the second only.
    changes: counts what a reader could notice within the second; with second and step it is the depth's sequence.
    """

    sides: dict[str, Side] = field(default_factory=lambda: {"buy": Side(-1), "sell": Side(1)})
    taken: dict[str, dict[int, int]] = field(default_factory=lambda: {"buy": {}, "sell": {}})
    second: int = -1
    step_ms: int = 0
    changes: int = 0

    def turn(self, second: int, step_ms: int = 0) -> None:
        """Begin a second: the market's levels are whole again."""
        self.second, self.step_ms, self.changes = second, step_ms, 0
        self.taken = {"buy": {}, "sell": {}}

    def resume(self, second: int, depth: Depth) -> None:
        """Go on after a stop, in a second that was met before it: what resting orders would face was taken then."""
        self.turn(second)
        for side, other, levels in (("buy", "sell", depth.asks), ("sell", "buy", depth.bids)):
            for key, _, _ in self.sides[side].rows[:1]:
                self.taken[other] = {price: lots for price, lots in levels if self.sides[side].sign * price >= key}

    def step(self, step_ms: int, depth: Depth) -> None:
        """Begin a step within the second. `depth` is that of the step that ends: what is taken whole stays so, or somebody who has come to
        rest at its price would face it.
        """
        self.step_ms = step_ms
        for side, levels in (("sell", depth.asks), ("buy", depth.bids)):
            if taken := self.taken[side]:
                taken |= {price: ALL for price, lots in levels if taken.get(price, 0) >= lots}

    @property
    def sequence(self) -> int:
        """Never falls, grows with every change: the second, then up to a million changes within it."""
        return self.second * 1_000_000 + self.step_ms + self.changes

    def take(self, side: str, match: Match) -> None:
        """Note what was taken of the market's own level on `side`."""
        if match.maker is None:
            self.taken[side][match.price] = self.taken[side].get(match.price, 0) + match.lots

    def own_levels(self, side: str, depth: Depth) -> Iterator[tuple[int, int]]:
        """The market's levels on `side` as far as nobody took them, best first."""
        taken, levels = self.taken[side], depth.asks if side == "sell" else depth.bids
        met = 0
        for place, (price, lots) in enumerate(levels):
            if met == len(taken):
                # Only the best ones are ever touched: the long tail is passed on as it is.
                yield from levels[place:]
                return
            met += price in taken
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
        own = list(self.own_levels(side, depth))
        if not (users := self.sides[side].levels()):
            return own[:limit]
        for price, left in own:
            users[price] = users.get(price, 0) + left
        return sorted(users.items(), reverse=side == "buy")[:limit]


def plan(book: Book, depth: Depth, side: str, *, account: int, limit: int | None, lots: int | None, money: int, lot_notional: int) -> Plan:
    """What an incoming order of `side` trades with now; nothing is changed.

    limit: the worst price in ticks, None for a market order.
    lots: how much to trade; None to spend `money` (in UNIT-ths of quote) instead, as far as whole lots go.
    """
    other = "sell" if side == "buy" else "buy"
    found: list[Match] = []
    own: list[Order] = []
    for price, available, maker in _opposite(book, depth, other):
        if limit is not None and (price > limit if side == "buy" else price < limit):
            break
        wanted = money // (price * lot_notional) if lots is None else lots
        if wanted == 0:
            return Plan(found, own, complete=bool(found))
        if maker and maker.account == account:
            own.append(maker)
            continue
        traded = min(wanted, available)
        found.append(Match(price, traded, maker))
        money -= traded * price * lot_notional
        if lots is not None:
            lots -= traded
    return Plan(found, own, complete=lots == 0 if lots is not None else bool(found) and money < found[-1].price * lot_notional)


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


def passing(side: Side, tape: Sequence[Print], levels: Iterable[tuple[int, int]]) -> Passing:
    """What the resting orders of one side get from the market in one second, by their priority; nothing is changed.

    First the trades of the tape, in its order, as far as they went through an order's price: touching it is not enough, others stood there
    first. Then the market's own levels of the other side, best first, as far as they reach it.
    """
    given: dict[int, int] = {}
    taken: list[Match] = []
    place = 0
    # A trade or level serves orders whose price key is at most its bound.
    trades = [(side.sign * trade.price - 1, trade.lots, 0) for trade in tape]
    for bound, lots, level in chain(trades, ((side.sign * price, lots, price) for price, lots in levels)):
        left = lots
        while left and place < len(side.rows) and side.rows[place][0] <= bound:
            order = side.rows[place][2]
            part = min(left, order.remaining - given.get(place, 0))
            given[place] = given.get(place, 0) + part
            left -= part
            place += given[place] == order.remaining
        if level and left < lots:
            taken.append(Match(level, lots - left, None))
        if place == len(side.rows) or (level and left):
            break
    return Passing([(side.rows[at][2], lots) for at, lots in given.items()], taken)
