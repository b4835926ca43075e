"""The markets the exchange lists, and the play money an account begins with: tables, and the arithmetic of ticks and lots.

Inside the exchange a price is a whole number of ticks and an amount a whole number of lots.
"""

from dataclasses import dataclass
from typing import Literal

from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.money import UNIT, plain, positive, units

MILLION = 1_000_000

MOST_TICKS = 10**12
"""The highest price an order may name: far above any market, within what the store counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Market:
    """One listed market.

    tick, lot, min_amount, max_amount, min_notional: in UNIT-ths of quote per base, base, base, base, quote.
    usual_price: in ticks; the price model wanders around it, within a factor of two.
    week_volume: base coins traded by the market itself in a usual week.
    follows: the symbols (a, b) of which this one is the quotient, or (a,) of which it is the copy; empty for a market of its own.
    """

    symbol: str
    kind: Literal["spot", "swap"]
    base: str
    quote: str
    tick: int
    lot: int
    min_amount: int
    max_amount: int
    min_notional: int
    usual_price: int
    week_volume: int
    max_leverage: int = 1
    follows: tuple[str, ...] = ()

    @property
    def is_swap(self) -> bool:
        return self.kind == "swap"

    def price_text(self, ticks: int) -> str:
        return plain(ticks * self.tick)

    def amount_text(self, lots: int) -> str:
        return plain(lots * self.lot)

    def notional(self, ticks: int, lots: int) -> int:
        """What `lots` at `ticks` are worth, in UNIT-ths of quote: exact, as tick times lot is a whole number of them."""
        return ticks * lots * self.lot_notional

    @property
    def lot_notional(self) -> int:
        """One lot at one tick, in UNIT-ths of quote."""
        return self.tick * self.lot // UNIT

    def parse_price(self, text: str) -> int:
        """A request's price in ticks. Raises Refused: BAD_PARAMETER, ABOVE_MAXIMUM, TICK_SIZE (naming the nearest)."""
        value = positive("price", text)
        ticks, rest = divmod(value, self.tick)
        if rest:
            nearest = max(1, ticks + (2 * rest >= self.tick))
            wanted = f"a multiple of the tick size {plain(self.tick)}; the nearest is {self.price_text(nearest)}"
            raise Refused(Code.TICK_SIZE, f"price: {text} is not {wanted}")
        if ticks > MOST_TICKS:
            raise Refused(Code.ABOVE_MAXIMUM, f"price: {text} is above the maximum {self.price_text(MOST_TICKS)}")
        return ticks

    def parse_amount(self, text: str) -> int:
        """A request's amount in lots. Raises Refused: BAD_PARAMETER, BELOW_MINIMUM, ABOVE_MAXIMUM, LOT_SIZE (naming the nearest)."""
        value = positive("amount", text)
        lots, rest = divmod(value, self.lot)
        if value < self.min_amount:
            raise Refused(Code.BELOW_MINIMUM, f"amount: {text} is below the minimum {plain(self.min_amount)}")
        if value > self.max_amount:
            raise Refused(Code.ABOVE_MAXIMUM, f"amount: {text} is above the maximum {plain(self.max_amount)}")
        if rest:
            nearest = lots + (2 * rest >= self.lot)
            wanted = f"a multiple of the lot size {plain(self.lot)}; the nearest is {self.amount_text(nearest)}"
            raise Refused(Code.LOT_SIZE, f"amount: {text} is not {wanted}")
        return lots

    def check_notional(self, ticks: int, lots: int) -> None:
        """Raise Refused(BELOW_MINIMUM), naming the least amount, when so many lots at that price are worth too little."""
        if (notional := self.notional(ticks, lots)) < self.min_notional:
            worth = f"{self.amount_text(lots)} at {self.price_text(ticks)} is worth {plain(notional)} {self.quote}"
            least = self.amount_text(-(-self.min_notional // self.notional(ticks, 1)))
            raise Refused(
                Code.BELOW_MINIMUM, f"amount: {worth}, below the minimum worth {plain(self.min_notional)}; the nearest is {least}"
            )

    def check_quote_amount(self, money: int) -> None:
        """Raise Refused(BELOW_MINIMUM) when an order spends too little."""
        if money < self.min_notional:
            least = f"{plain(self.min_notional)} {self.quote}"
            raise Refused(Code.BELOW_MINIMUM, f"quote_amount: {plain(money)} is below the minimum worth {least}")

    def listing(self) -> dict[str, object]:
        """The row of GET /api/v1/markets."""
        return {
            "symbol": self.symbol,
            "type": self.kind,
            "base": self.base,
            "quote": self.quote,
            "tick_size": plain(self.tick),
            "lot_size": plain(self.lot),
            "min_amount": plain(self.min_amount),
            "min_notional": plain(self.min_notional),
            "max_amount": plain(self.max_amount),
            "contract_size": "1",
            "max_leverage": self.max_leverage,
        }


def _spot(symbol: str, price: str, tick: str, lot: str, max_amount: int, week_volume: int, follows: tuple[str, ...] = ()) -> Market:
    base, _, quote = symbol.partition("_")
    return Market(
        symbol=symbol,
        kind="spot",
        base=base,
        quote=quote,
        tick=units(tick),
        lot=units(lot),
        min_amount=units(lot),
        max_amount=max_amount * UNIT,
        min_notional=units("1" if quote == "USDT" else "0.00001"),
        usual_price=units(price) // units(tick),
        week_volume=week_volume,
        follows=follows,
    )


def _swap(spot: str, price: str, tick: str, lot: str, max_amount: int, week_volume: int) -> Market:
    base, _, quote = spot.partition("_")
    return Market(
        symbol=spot + ".swap",
        kind="swap",
        base=base,
        quote=quote,
        tick=units(tick),
        lot=units(lot),
        min_amount=units(lot),
        max_amount=max_amount * UNIT,
        min_notional=units("1"),
        usual_price=units(price) // units(tick),
        week_volume=week_volume,
        max_leverage=100,
        follows=(spot,),
    )


# fmt: off
MARKETS: dict[str, Market] = {market.symbol: market for market in (
    #     symbol       usual price  tick        lot         max amount    base a week
    _spot("BTC_USDT",  "60000",     "0.01",     "0.000001", 1_000,        200_000),
    _spot("ETH_USDT",  "3000",      "0.01",     "0.00001",  20_000,       2 * MILLION),
    _spot("ETH_BTC",   "0.05",      "0.000001", "0.0001",   20_000,       300_000, ("ETH_USDT", "BTC_USDT")),
    _spot("LTC_USDT",  "80",        "0.01",     "0.0001",   100_000,      3 * MILLION),
    _spot("LTC_BTC",   "0.00133",   "0.0000001", "0.001",   100_000,      300_000, ("LTC_USDT", "BTC_USDT")),
    _spot("SOL_USDT",  "150",       "0.001",    "0.001",    100_000,      20 * MILLION),
    _spot("DOGE_USDT", "0.15",      "0.00001",  "0.1",      10 * MILLION, 5_000 * MILLION),
    _spot("XRP_USDT",  "0.6",       "0.0001",   "0.1",      10 * MILLION, 2_000 * MILLION),
    _swap("BTC_USDT",  "60000",     "0.1",      "0.001",    1_000,        800_000),
    _swap("ETH_USDT",  "3000",      "0.01",     "0.01",     20_000,       8 * MILLION),
)}

PLAY_MONEY: dict[str, int] = {
    "USDT": 1 * MILLION * UNIT, "BTC": 10_000 * UNIT, "ETH": 100_000 * UNIT, "LTC": 100_000 * UNIT, "SOL": 100_000 * UNIT,
    "DOGE": 10 * MILLION * UNIT, "XRP": 10 * MILLION * UNIT,
}
# fmt: on


def find(symbol: str) -> Market:
    """The market of that symbol. Raises Refused(UNKNOWN_SYMBOL)."""
    market = MARKETS.get(symbol)
    if market is None:
        raise Refused(Code.UNKNOWN_SYMBOL, f"unknown symbol {symbol[:40]!r}; GET /api/v1/markets lists them")
    return market


def find_swap(symbol: str) -> Market:
    """The swap of that symbol. Raises Refused(UNKNOWN_SYMBOL | BAD_PARAMETER)."""
    market = find(symbol)
    if not market.is_swap:
        near = f"; the nearest is {symbol}.swap" if f"{symbol}.swap" in MARKETS else ""
        raise Refused(Code.BAD_PARAMETER, f"symbol: {symbol} is no swap{near}")
    return market
