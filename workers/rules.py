"""What an exchange says about its markets, and how an order is made to fit: pure functions, and answers kept for a while."""

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Hashable
from decimal import ROUND_DOWN, Context, Decimal
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Struct

from bus.errors import BadRequest, BusError
from bus.messages import Trade
from workers.http import Call

T = TypeVar("T")

KEEP_S = 600.0
RETRY_S = 10.0
"""After the rules of a market could not be read."""
PATIENCE_S = 2.0
"""How long an order waits for them: it may go without."""
MOST_KEPT = 4096
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What a venue raises for an answer in another format than it expects."""

EXACT = Context(prec=1000, rounding=ROUND_DOWN)
"""Arithmetic without rounding: a number of ours has at most 64 digits and a two-digit exponent (bus/messages.py)."""


class Rules(Struct, frozen=True):
    """One market. tick: step of prices, in quote. lot, min_amount: in base, or contracts. min_value: in quote. contract_size: base
    coins in one contract. None where the exchange has none, or does not tell.

    Raises ValueError for a number that is none, or below 0; 0 is read as None.
    """

    tick: Decimal | None = None
    lot: Decimal | None = None
    min_amount: Decimal | None = None
    min_value: Decimal | None = None
    contract_size: Decimal | None = None

    def __post_init__(self) -> None:
        for value in (self.tick, self.lot, self.min_amount, self.min_value, self.contract_size):
            if value is not None and not (value.is_finite() and value >= 0):
                raise ValueError("a rule of a market that is not a number of 0 or more")


def is_contract(trade: Trade) -> bool:
    return bool(trade.offset) or "." in trade.symbol


def spends_money(trade: Trade) -> bool:
    """Whether the amount is money in quote: a spot market buy's is (fmz-protocol C.2)."""
    return trade.is_market and trade.side == "buy" and not trade.offset


def contract_size(trade: Trade, rules: Rules | None) -> Decimal | None:
    """Base coins that one unit of the amount stands for; None where it is not known."""
    if rules is not None and rules.contract_size:
        return rules.contract_size
    return None if is_contract(trade) else Decimal(1)


def fitted(trade: Trade, rules: Rules, rounding: Literal["refuse", "down"]) -> Trade:
    """The order as the exchange takes it: price on the tick, amount on the lot, nothing below a minimum.

    "refuse" changes nothing and names the nearest that is allowed; "down" takes the amount down, a buy's price down and a sell's up:
    never more, and never a worse price. Below a minimum is refused in both. An amount that is money knows no lot; a market order's
    value, and whether a small rest of a position may be closed, is left to the exchange.

    Raises BadRequest.
    """
    price, amount = trade.price, trade.amount
    if rules.tick and not trade.is_market:
        price = _price(trade, rules.tick, rounding)
    if not spends_money(trade):
        amount = _amount(trade.amount, rules, rounding)
    _check_value(trade, price, amount, rules)
    if price == trade.price and amount == trade.amount:
        return trade
    return msgspec.structs.replace(trade, price=price, amount=amount)


def _price(trade: Trade, tick: Decimal, rounding: str) -> Decimal:
    below = _down(trade.price, tick)
    if below == trade.price:
        return trade.price
    above = EXACT.add(below, tick)
    if rounding == "down" and (below or trade.side == "sell"):  # a price of 0 would be a market order
        return below if trade.side == "buy" else above
    raise BadRequest(f"price: {trade.price:f} does not fit the tick {tick:f}: {f'{below:f} or ' if below else ''}{above:f}")


def _amount(amount: Decimal, rules: Rules, rounding: str) -> Decimal:
    lot, least = rules.lot, _smallest(rules)
    below = _down(amount, lot) if lot else amount
    if below < least:
        raise BadRequest(f"amount: {amount:f} is below the smallest that is allowed, {least:f}")
    if lot and below != amount and rounding == "refuse":
        raise BadRequest(f"amount: {amount:f} does not fit the lot {lot:f}: {below:f} or {EXACT.add(below, lot):f}")
    return amount if below == amount else below


def _smallest(rules: Rules) -> Decimal:
    """The smallest amount above 0 that is on the lot and not below the minimum."""
    least = rules.min_amount or Decimal(0)
    return max(rules.lot, _up(least, rules.lot)) if rules.lot else least


def _down(value: Decimal, step: Decimal) -> Decimal:
    """The multiple of the step, with as many decimals as that has."""
    return EXACT.multiply(EXACT.divide_int(value, step), step)


def _up(value: Decimal, step: Decimal) -> Decimal:
    below = _down(value, step)
    return below if below == value else EXACT.add(below, step)


def _check_value(trade: Trade, price: Decimal, amount: Decimal, rules: Rules) -> None:
    if not rules.min_value or trade.offset == "close":
        return
    if spends_money(trade):
        if amount < rules.min_value:
            raise BadRequest(f"amount: {amount:f} is below the smallest value that is allowed, {rules.min_value:f}")
        return
    size = contract_size(trade, rules)
    if trade.is_market or size is None:
        return
    unit = EXACT.multiply(price, size)
    worth = EXACT.multiply(amount, unit)
    if worth < rules.min_value:
        near = ""
        if rules.lot:
            lots = EXACT.divide_int(_up(rules.min_value, value_of_lot := EXACT.multiply(rules.lot, unit)), value_of_lot)
            near = f"; the nearest amount is {max(EXACT.multiply(lots, rules.lot), _smallest(rules)):f}"
        told = f"amount: {amount:f} at {price:f} is worth {worth:f}, below the smallest value that is allowed, {rules.min_value:f}"
        raise BadRequest(told + near)


def reading(call: Call) -> Call:
    """The same request as a read of its own: a look-up neither marks an order as sent nor carries its client order id."""
    read = copy.copy(call)
    read.write = read.sent = False
    read.client_order_id = ""
    return read


class Kept(Generic[T]):
    """Answers that are good for a while; of equal questions at once only one is asked."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._kept: dict[Hashable, tuple[float, T]] = {}
        self._asking: dict[Hashable, asyncio.Lock] = {}

    def fresh(self, key: Hashable) -> tuple[T] | None:
        """(the answer,), or None where there is none that is still good."""
        entry = self._kept.get(key)
        return (entry[1],) if entry is not None and self._monotonic() < entry[0] else None

    def last(self, key: Hashable) -> T | None:
        """The answer, however old."""
        entry = self._kept.get(key)
        return None if entry is None else entry[1]

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[tuple[T, float]]]) -> T:
        """ask: returns the answer and for how many seconds it is good, from the moment of asking. What it raises is not kept."""
        if (kept := self.fresh(key)) is not None:
            return kept[0]
        lock = self._asking.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                if (kept := self.fresh(key)) is not None:
                    return kept[0]
                asked = self._monotonic()
                answer, life_s = await ask()
                self._kept.pop(key, None)
                self._kept[key] = (asked + life_s, answer)
                if len(self._kept) > MOST_KEPT:
                    del self._kept[next(iter(self._kept))]
                return answer
        finally:
            if not lock.locked():
                self._asking.pop(key, None)


class Markets:
    """The rules of every market that was traded, kept for ten minutes."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._kept: Kept[Rules | None] = Kept(monotonic)

    async def rules(self, venue: Any, call: Call, symbol: str) -> Rules | None:
        """None where the venue does not offer them, or they cannot be read; those read before count then. Raises nothing of a venue's."""
        if not hasattr(venue, "rules"):
            return None
        key = (call.exchange, symbol)
        if (kept := self._kept.fresh(key)) is not None:
            return kept[0]

        async def ask() -> tuple[Rules | None, float]:
            look = reading(call)
            look.expires_at_ms = min(call.expires_at_ms, call.now_ms() + int((PATIENCE_S + look.margin_s) * 1000))
            try:
                return await venue.rules(look, symbol), KEEP_S
            except (BusError, *UNREADABLE):
                return self._kept.last(key), RETRY_S

        return await self._kept.get(key, ask)
