"""Funding and the mark price of the swaps: pure functions of (seed, symbol, second), like the market itself.

Eight hours make an interval; it ends, and its rate is exchanged between longs and shorts, at 00:00, 08:00 and 16:00 UTC. The mark price is
the spot price plus a basis that shrinks, over the interval, from the whole rate to nothing: what a fair buyer would still have to pay.
"""

from dataclasses import dataclass

from workers.venues.paper import market as price_model
from workers.venues.paper.markets import MARKETS, Market
from workers.venues.paper.money import UNIT, plain

INTERVAL_S = 28_800

SCALE = 100_000_000
"""Rates are whole 10^-8."""

USUAL = 10_000
"""What a rate wanders around: 0.01 % for eight hours."""

NOISE = ((21, 30_000), (5, 15_000), (2, 5_000))
"""Octaves of a rate: (period in intervals, amplitude): a rate is from -0.04 % to 0.06 %."""

MOST_BASIS = 1_000
"""The mark price is nearer to the spot price than the spot price divided by this."""


@dataclass(frozen=True, slots=True)
class Payment:
    """What one position paid (value below zero) or received at the end of an interval.

    rate: in 1 / SCALE. price: in ticks. value: in UNIT-ths of quote.
    """

    account: int
    symbol: str
    side: str
    time_ms: int
    rate: int
    price: int
    lots: int
    value: int

    def document(self) -> dict[str, object]:
        market = MARKETS[self.symbol]
        return {
            "symbol": self.symbol,
            "side": self.side,
            "time": self.time_ms,
            "rate": rate_text(self.rate),
            "price": market.price_text(self.price),
            "amount": market.amount_text(self.lots),
            "payment": plain(self.value),
            "currency": market.quote,
        }


def rate(seed: int, symbol: str, interval: int) -> int:
    """Of one interval, counted from 1970: above zero, longs pay shorts."""
    return USUAL + sum(price_model.noise(seed, "funding", symbol, period, interval) * amplitude >> 15 for period, amplitude in NOISE)


def rate_text(rate: int) -> str:
    return plain(rate * UNIT // SCALE)


def next_end(second_s: int) -> int:
    """When the interval that this second lies in ends, exclusively: the end of one interval lies in the next."""
    return (second_s // INTERVAL_S + 1) * INTERVAL_S


def index(seed: int, market: Market, second_s: int) -> int:
    """The price of the swap's spot market, in the swap's ticks, to the nearest."""
    return _ticks(market, _spot(seed, market, second_s), 1)


def mark(seed: int, market: Market, second_s: int) -> int:
    """Index times (1 + rate times the part of the interval that is left), in the swap's ticks, to the nearest."""
    interval, gone = divmod(second_s, INTERVAL_S)
    whole = SCALE * INTERVAL_S
    return _ticks(market, _spot(seed, market, second_s) * (whole + rate(seed, market.symbol, interval) * (INTERVAL_S - gone)), whole)


def due(side: str, worth: int, rate: int) -> int:
    """What a position of that worth receives at a rate, before it is known whether its owner can pay; rounded towards zero."""
    value = worth * abs(rate) // SCALE
    return value if (rate > 0) == (side == "short") else -value


def _spot(seed: int, market: Market, second_s: int) -> int:
    """In UNIT-ths of quote."""
    (spot,) = market.follows
    return price_model.second(seed, spot, second_s).close * MARKETS[spot].tick


def _ticks(market: Market, value: int, scale: int) -> int:
    whole = market.tick * scale
    return max(1, (2 * value + whole) // (2 * whole))
