"""What a trade costs: the maker's and the taker's rate by kind of market. Pure.

A fee is taken from what the fill brings (base of a spot buy, quote of a spot sell) or, on swaps, in the quote currency, and goes to an
account of the exchange's own. It is rounded down to a whole UNIT-th.
"""

from collections.abc import Mapping
from typing import NamedTuple

from workers.venues.paper.money import UNIT, plain

SCALE = 1_000_000
"""Rates are whole millionths."""


class Rates(NamedTuple):
    """In millionths of what is traded: of the order that rested, and of the one that came in."""

    maker: int
    taker: int

    def listing(self) -> dict[str, str]:
        """The two fields of GET /api/v1/markets."""
        return {"maker_fee": plain(self.maker * UNIT // SCALE), "taker_fee": plain(self.taker * UNIT // SCALE)}


Schedule = Mapping[str, Rates]
"""By kind of market."""

STANDARD: Schedule = {"spot": Rates(800, 1_000), "swap": Rates(200, 500)}
NO_FEES: Schedule = {"spot": Rates(0, 0), "swap": Rates(0, 0)}


def fee(value: int, rate: int) -> int:
    return value * rate // SCALE
