"""Matching against a plain reference exchange: lists, sorting and loops in Decimal, with no idea of how the real one works inside.

The market's own tape and book are taken as given (test_paper_market.py looks after them); everything else is done again: who trades with
whom, fees, self-trade, partial fills second by second, what is frozen, margin. After each step fills, books and balances must be the same.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import ROUND_DOWN, ROUND_UP, Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_paper_engine import NOW_MS, sound, ticket
from workers.venues.paper import market as model
from workers.venues.paper.accounts import FEE_ACCOUNT, MARKET_ACCOUNT
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Refused
from workers.venues.paper.markets import MARKETS, PLAY_MONEY
from workers.venues.paper.money import UNIT, plain

pytestmark = pytest.mark.slow

ZERO = Decimal(0)
LEAST = Decimal(10) ** -12
RATES = {"spot": (Decimal("0.0008"), Decimal("0.001")), "swap": (Decimal("0.0002"), Decimal("0.0005"))}
LEVERAGE = 7
ACCOUNTS = (1, 2, 3)
POOR = 3
"""This account has but a 2,000th of its play money left."""


def down(value: Decimal) -> Decimal:
    return value.quantize(LEAST, ROUND_DOWN)


def up(value: Decimal) -> Decimal:
    return value.quantize(LEAST, ROUND_UP)


class TooPoor(Exception):
    """The reference refuses an order."""


@dataclass
class Resting:
    number: int
    account: int
    side: str
    offset: str | None
    price: Decimal
    left: Decimal


@dataclass
class Holding:
    amount: Decimal = ZERO
    cost: Decimal = ZERO
    margin: Decimal = ZERO


@dataclass
class Reference:
    """One market of an exchange, written down as the README says it."""

    symbol: str
    second: int
    orders: list[Resting] = field(default_factory=list)
    free: dict[tuple[int, str], Decimal] = field(default_factory=dict)
    frozen: dict[tuple[int, str], Decimal] = field(default_factory=dict)
    held: dict[tuple[int, str], Holding] = field(default_factory=dict)
    fees: dict[str, Decimal] = field(default_factory=dict)
    taken: dict[tuple[str, Decimal], Decimal] = field(default_factory=dict)
    fills: list[tuple[Any, ...]] = field(default_factory=list)
    next_number: int = 1

    def __post_init__(self) -> None:
        market = MARKETS[self.symbol]
        self.base, self.quote, self.swap = market.base, market.quote, market.is_swap
        self.tick, self.lot = Decimal(plain(market.tick)), Decimal(plain(market.lot))
        self.maker_rate, self.taker_rate = RATES[market.kind]
        for account in ACCOUNTS:
            for currency, grant in PLAY_MONEY.items():
                self.free[account, currency] = Decimal(plain(grant)) / (2_000 if account == POOR else 1)
                self.frozen[account, currency] = ZERO

    # What the market brings

    def levels(self, side: str) -> list[tuple[Decimal, Decimal]]:
        depth = model.depth(7, self.symbol, self.second)
        rows = [(price * self.tick, lots * self.lot) for price, lots in (depth.asks if side == "sell" else depth.bids)]
        return [(price, amount - self.taken.get((side, price), ZERO)) for price, amount in rows]

    def tape(self) -> list[tuple[Decimal, Decimal]]:
        return [(trade.price * self.tick, trade.lots * self.lot) for trade in model.prints(7, self.symbol, self.second)]

    def queue(self, side: str) -> list[Resting]:
        """Resting orders of a side, the first to trade first."""
        mine = [order for order in self.orders if order.side == side]
        return sorted(mine, key=lambda order: (order.price if side == "sell" else -order.price, order.number))

    def turn(self) -> None:
        self.second += 1
        self.taken = {}
        for side, other in (("buy", "sell"), ("sell", "buy")):
            offers = [(price, amount, False) for price, amount in self.tape()]
            offers += [(price, amount, True) for price, amount in self.levels(other)]
            got: dict[int, Decimal] = {}
            for price, amount, is_level in offers:
                for order in self.queue(side):
                    better = order.price - price if side == "buy" else price - order.price
                    if better > 0 or (is_level and better == 0):
                        part = min(amount, order.left - got.get(order.number, ZERO))
                        got[order.number] = got.get(order.number, ZERO) + part
                        amount -= part
                        if is_level:
                            self.taken[other, price] = self.taken.get((other, price), ZERO) + part
            for order in self.queue(side):
                if got.get(order.number):
                    self.fill_resting(order, got[order.number], None)

    # Money

    def needs(self, order: Resting, amount: Decimal) -> tuple[str, Decimal]:
        """What freezes for that much of a resting order."""
        if not self.swap:
            return (self.quote, order.price * amount) if order.side == "buy" else (self.base, amount)
        if order.offset == "close":
            return self.quote, ZERO
        return self.quote, up(order.price * amount / LEVERAGE) + up(order.price * amount * self.maker_rate)

    def freeze(self, order: Resting, sign: int, amount: Decimal) -> None:
        currency, value = self.needs(order, amount)
        self.free[order.account, currency] -= sign * value
        self.frozen[order.account, currency] += sign * value

    def settle(self, account: int, side: str, offset: str | None, price: Decimal, amount: Decimal, rate: Decimal) -> Decimal:
        """Pay and deliver; returns the fee."""
        worth = price * amount
        if self.swap:
            fee = self.settle_swap(account, side, offset, amount, worth, down(worth * rate))
            currency = self.quote
        elif side == "buy":
            self.free[account, self.quote] -= worth
            self.free[account, self.base] += amount
            fee, currency = down(amount * rate), self.base
        else:
            self.free[account, self.base] -= amount
            self.free[account, self.quote] += worth
            fee, currency = down(worth * rate), self.quote
        self.free[account, currency] -= fee
        self.fees[currency] = self.fees.get(currency, ZERO) + fee
        return fee

    def settle_swap(self, account: int, side: str, offset: str | None, amount: Decimal, worth: Decimal, fee: Decimal) -> Decimal:
        which = "long" if (side, offset) in (("buy", "open"), ("sell", "close")) else "short"
        position = self.held.setdefault((account, which), Holding())
        if offset == "open":
            margin = down(worth / LEVERAGE)
            position.amount += amount
            position.cost += worth
            position.margin += margin
            self.free[account, self.quote] -= margin
            self.frozen[account, self.quote] += margin
            return fee
        cost, margin = down(position.cost * amount / position.amount), down(position.margin * amount / position.amount)
        profit = max(-margin, worth - cost if which == "long" else cost - worth)
        position.cost, position.margin, position.amount = position.cost - cost, position.margin - margin, position.amount - amount
        self.frozen[account, self.quote] -= margin
        self.free[account, self.quote] += margin + profit
        return min(fee, margin + profit)

    def fill_resting(self, order: Resting, amount: Decimal, taker: int | None) -> None:
        before, after = self.needs(order, order.left), self.needs(order, order.left - amount)
        self.free[order.account, before[0]] += before[1] - after[1]
        self.frozen[order.account, before[0]] -= before[1] - after[1]
        fee = self.settle(order.account, order.side, order.offset, order.price, amount, self.maker_rate)
        self.fills.append((order.number, taker, order.side, "maker", order.price, amount, fee))
        order.left -= amount
        if not order.left:
            self.orders.remove(order)

    # Orders

    def place(self, account: int, side: str, price: Decimal | None, amount: Decimal, money: Decimal, offset: str | None) -> None:
        """Raises TooPoor. An order for money has amount 0, a market order no price."""
        number, other = self.next_number, "sell" if side == "buy" else "buy"
        incoming = Resting(number, account, side, offset, price or ZERO, amount)
        offers: list[tuple[Decimal, int, int, Decimal, Resting | None]] = []
        offers += [(order.price, 0, order.number, order.left, order) for order in self.queue(other)]
        offers += [(at, 1, 0, left, None) for at, left in self.levels(other) if left > 0]
        offers.sort(key=lambda offer: (offer[0] if other == "sell" else -offer[0], offer[1], offer[2]))
        trades: list[tuple[Decimal, Decimal, Resting | None]] = []
        in_the_way = []
        left, budget = amount, money
        for at, _, _, available, maker in offers:
            if price is not None and (at > price if side == "buy" else at < price):
                break
            wanted = left if amount else budget / at // self.lot * self.lot
            if wanted <= 0:
                break
            if maker is not None and maker.account == account:
                in_the_way.append(maker)
                continue
            traded = min(wanted, available)
            trades.append((at, traded, maker))
            left -= traded if amount else ZERO
            budget -= traded * at
        self.check(incoming, trades, left, money)
        self.next_number += 1
        for own in in_the_way:
            self.cancel(own.number)
        for at, traded, maker in trades:
            fee = self.settle(account, side, offset, at, traded, self.taker_rate)
            self.fills.append((number, maker.number if maker else None, side, "taker", at, traded, fee))
            if maker is not None:
                self.fill_resting(maker, traded, number)
            else:
                self.taken[other, at] = self.taken.get((other, at), ZERO) + traded
        if price is not None and left:
            incoming.left = left
            self.orders.append(incoming)
            self.freeze(incoming, 1, left)

    def check(self, order: Resting, trades: list[tuple[Decimal, Decimal, Resting | None]], left: Decimal, money: Decimal) -> None:
        market = MARKETS[self.symbol]
        worth = (order.price or (trades[0][0] if trades else model.second(7, self.symbol, self.second).close * self.tick)) * order.left
        if (worth if order.left else money) < Decimal(plain(market.min_notional)):
            raise TooPoor
        if order.offset == "close":
            which = "long" if order.side == "sell" else "short"
            resting = sum(o.left for o in self.orders if (o.account, o.side, o.offset) == (order.account, order.side, "close"))
            if self.held.get((order.account, which), Holding()).amount - resting < order.left:
                raise TooPoor
            return
        if order.side == "sell" and not self.swap:
            needed, currency = order.left, self.base
        else:
            currency, needed = self.quote, money
            if not money:
                shares = [down(at * traded / LEVERAGE) + down(at * traded * self.taker_rate) for at, traded, _ in trades]
                now = sum(shares) if self.swap else sum(at * traded for at, traded, _ in trades)
                needed = now + (self.needs(order, left)[1] if order.price else ZERO)
        if self.free[order.account, currency] < needed:
            raise TooPoor

    def cancel(self, number: int) -> None:
        (order,) = [order for order in self.orders if order.number == number]
        self.freeze(order, -1, order.left)
        self.orders.remove(order)


@dataclass
class Pair:
    """The exchange and its reference, driven alike and compared after each step."""

    symbol: str
    engine: Engine = field(init=False)
    reference: Reference = field(init=False)
    traded: int = 0
    now_ms: int = NOW_MS

    def __post_init__(self) -> None:
        self.engine = Engine(seed=7)
        for account in ACCOUNTS:
            self.engine.accounts.open(account)
            if MARKETS[self.symbol].is_swap:
                self.engine.accounts.set_leverage(account, self.symbol, LEVERAGE)
        for currency, held in self.engine.accounts.balances[POOR].items():
            self.engine.accounts.balances[MARKET_ACCOUNT][currency].free += held.free - held.free // 2_000
            held.free //= 2_000
        self.engine.advance(self.symbol, self.now_ms)
        self.reference = Reference(self.symbol, self.now_ms // 1000)

    def step(self, what: str, account: int, side: str, away: int, lots: int, offset: str) -> None:
        market, reference = MARKETS[self.symbol], self.reference
        if what == "wait":
            self.now_ms += 1000
            self.engine.advance(self.symbol, self.now_ms)
            reference.turn()
        elif what == "cancel":
            if numbers := sorted(order.number for order in reference.orders):
                number = numbers[lots % len(numbers)]
                reference.cancel(number)
                (order,) = [held[number] for held in self.engine.open_orders.values() if number in held]
                self.engine.cancel(order, self.now_ms)
        else:
            price = self.engine.last(self.symbol) + away if what == "limit" else 0
            money = lots * 997 * UNIT // 10**7 if what == "money" and side == "buy" and not market.is_swap else 0
            self.place(account, side, price, 0 if money else lots, money, offset if market.is_swap else None)
        self.compare()

    def place(self, account: int, side: str, price: int, lots: int, money: int, offset: str | None) -> None:
        reference = self.reference
        asked = (price * reference.tick or None, lots * reference.lot, Decimal(plain(money)))
        try:
            self.engine.place(account, ticket(self.symbol, side, price, lots, money=money, offset=offset), self.now_ms)
        except Refused:
            with pytest.raises(TooPoor):
                reference.place(account, side, *asked, offset)
        else:
            reference.place(account, side, *asked, offset)

    def compare(self) -> None:
        engine, reference, market = self.engine, self.reference, MARKETS[self.symbol]
        fills = engine.drain().fills
        trades = {fill.trade: [other for other in fills if other.trade == fill.trade] for fill in fills}
        seen = []
        for fill in fills:
            other = next((f.order for f in trades[fill.trade] if f is not fill), None)
            assert len({f.account for f in trades[fill.trade]}) == len(trades[fill.trade]), "nobody trades with himself"
            price, amount = fill.price * reference.tick, fill.lots * reference.lot
            seen.append((fill.order, other, fill.side, fill.role, price, amount, Decimal(plain(fill.fee))))
        assert seen == reference.fills
        self.traded += len(seen)
        reference.fills.clear()
        for side in ("buy", "sell"):
            rows = [
                (order.number, order.price * reference.tick, order.remaining * reference.lot)
                for _, _, order in engine.books[self.symbol].sides[side].rows
            ]
            assert rows == [(order.number, order.price, order.left) for order in reference.queue(side)]
        for account in ACCOUNTS:
            for currency in (market.base, market.quote):
                held = engine.accounts.balances[account][currency]
                assert Decimal(plain(held.free)) == reference.free[account, currency]
                assert Decimal(plain(held.frozen)) == reference.frozen[account, currency]
        for currency in (market.base, market.quote):
            fees = engine.accounts.free(FEE_ACCOUNT, currency)
            assert Decimal(plain(fees)) == reference.fees.get(currency, ZERO)
            everybody = sum(b[currency].free + b[currency].frozen for b in engine.accounts.balances.values() if currency in b)
            assert everybody == 0


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with localcontext(prec=60):
        yield


WHAT = ("limit",) * 12 + ("market", "market", "money", "cancel", "cancel", "wait", "wait")


@pytest.mark.parametrize(("symbol", "lots"), [("ETH_BTC", 20_000), ("LTC_BTC", 3_000), ("BTC_USDT.swap", 2_000)])
@pytest.mark.parametrize("number", range(4))
def test_the_exchange_does_what_the_reference_does(symbol: str, lots: int, number: int) -> None:
    """12 sequences, together 10,800 orders accepted and some refused."""
    draw, pair = random.Random(f"{symbol} {number}"), Pair(symbol)
    while pair.engine.next_order <= 900:
        away = draw.choice((-1, 1)) * int(draw.expovariate(0.3))
        pair.step(
            draw.choice(WHAT),
            draw.choice(ACCOUNTS),
            draw.choice(("buy", "sell")),
            away,
            draw.randint(1, lots),
            draw.choice(("open", "open", "close")),
        )
    sound(pair.engine)
    assert pair.traded > 800


steps = st.lists(
    st.tuples(
        st.sampled_from(WHAT),
        st.sampled_from(ACCOUNTS),
        st.sampled_from(("buy", "sell")),
        st.integers(-8, 8),
        st.integers(1, 10**7),
        st.sampled_from(("open", "close")),
    ),
    max_size=25,
)


@given(st.sampled_from(("ETH_BTC", "BTC_USDT.swap")), steps)
@settings(max_examples=60, deadline=None)
def test_the_exchange_does_what_the_reference_does_in_any_order(symbol: str, all_steps: list[tuple[str, int, str, int, int, str]]) -> None:
    """Few steps, any amounts: what fails here is shrunk to the shortest sequence."""
    pair = Pair(symbol)
    for what, account, side, away, lots, offset in all_steps:
        pair.step(what, account, side, away, min(lots, MARKETS[symbol].max_amount // MARKETS[symbol].lot), offset)
