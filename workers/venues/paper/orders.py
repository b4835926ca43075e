"""What the exchange keeps: orders, fills, positions; plain records with the arithmetic of one record."""

from dataclasses import dataclass

from workers.venues.paper.fees import fee
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.money import UNIT, plain


@dataclass(slots=True, order=False, eq=False)
class Order:
    """One order. Prices are ticks, amounts lots, money UNIT-ths of the quote currency.

    number: the id as a number, given in order of arrival.
    price: 0 for a market order. lots: 0 where quote_amount says how much to spend.
    spent: price times amount of what is filled, before fees. leverage: the setting when it was placed, 1 on spot.
    maker_rate: what it pays for trades while it rests, in millionths, as it was when it was placed.
    status: "open" until it is "closed" (filled) or "cancelled" (with filled > 0 after a partial fill).
    """

    number: int
    account: int
    client_order_id: str | None
    symbol: str
    side: str
    kind: str
    offset: str | None
    price: int
    lots: int
    quote_amount: int
    leverage: int
    time_ms: int
    update_ms: int
    status: str = "open"
    filled: int = 0
    spent: int = 0
    maker_rate: int = 0

    @property
    def remaining(self) -> int:
        return self.lots - self.filled

    @property
    def position_side(self) -> str:
        """Hedge mode: buy+open and sell+close are the long side."""
        return "long" if (self.side == "buy") == (self.offset == "open") else "short"

    def held(self, remaining: int) -> int:
        """What freezes while `remaining` lots rest: quote (spot buy), base (spot sell), margin and fee (swap open), nothing (close)."""
        market = MARKETS[self.symbol]
        if not market.is_swap:
            return market.notional(self.price, remaining) if self.side == "buy" else remaining * market.lot
        if self.offset == "close":
            return 0
        notional = market.notional(self.price, remaining)
        # Rounded up, while what single fills take is rounded down: it always suffices.
        return -(-notional // self.leverage) - fee(-notional, self.maker_rate)

    @property
    def held_currency(self) -> str:
        market = MARKETS[self.symbol]
        return market.base if self.side == "sell" and not market.is_swap else market.quote

    def document(self) -> dict[str, object]:
        """The order as the API shows it."""
        market = MARKETS[self.symbol]
        return {
            "id": str(self.number),
            "client_order_id": self.client_order_id,
            "symbol": self.symbol,
            "side": self.side,
            "type": self.kind,
            "offset": self.offset,
            "price": market.price_text(self.price) if self.price else None,
            "amount": market.amount_text(self.lots) if self.lots else None,
            "quote_amount": plain(self.quote_amount) if self.quote_amount else None,
            "filled": market.amount_text(self.filled),
            "average_price": plain(self.spent * UNIT // (self.filled * market.lot)) if self.filled else "0",
            "status": self.status,
            "time": self.time_ms,
            "update_time": self.update_ms,
        }


@dataclass(frozen=True, slots=True)
class Fill:
    """One side of one trade, for the account it belongs to; the maker's and the taker's fill share `trade`. fee: in UNIT-ths."""

    number: int
    trade: int
    account: int
    order: int
    symbol: str
    side: str
    role: str
    price: int
    lots: int
    time_ms: int
    fee: int = 0

    @property
    def fee_currency(self) -> str:
        market = MARKETS[self.symbol]
        return market.base if self.side == "buy" and not market.is_swap else market.quote

    def document(self) -> dict[str, object]:
        market = MARKETS[self.symbol]
        return {
            "id": str(self.number),
            "order_id": str(self.order),
            "symbol": self.symbol,
            "side": self.side,
            "role": self.role,
            "price": market.price_text(self.price),
            "amount": market.amount_text(self.lots),
            "fee": plain(self.fee),
            "fee_currency": self.fee_currency,
            "time": self.time_ms,
        }


@dataclass(slots=True)
class Position:
    """One side of one swap of one account, margined alone.

    lots: what is held; frozen: lots spoken for by resting close orders.
    cost: price times amount at which it was opened, in UNIT-ths of quote; margin: what is frozen for it and can be lost.
    leverage: that of the order which opened it or last added to it.
    """

    account: int
    symbol: str
    side: str
    lots: int = 0
    frozen: int = 0
    cost: int = 0
    margin: int = 0
    leverage: int = 1

    def profit(self, price: int) -> int:
        """Unrealised, at a price in ticks."""
        worth = MARKETS[self.symbol].notional(price, self.lots)
        return worth - self.cost if self.side == "long" else self.cost - worth

    def ruin(self) -> int:
        """The mark price, in ticks, at which the loss has used the margin up; at most 0 where a long position cannot lose as much."""
        per_tick = MARKETS[self.symbol].notional(1, self.lots)
        return (self.cost - self.margin) // per_tick if self.side == "long" else -(-(self.cost + self.margin) // per_tick)

    def document(self, mark: int) -> dict[str, object]:
        market = MARKETS[self.symbol]
        return {
            "symbol": self.symbol,
            "side": self.side,
            "amount": market.amount_text(self.lots),
            "frozen": market.amount_text(self.frozen),
            "entry_price": plain(self.cost * UNIT // (self.lots * market.lot)),
            "mark_price": market.price_text(mark),
            "leverage": self.leverage,
            "margin": plain(self.margin),
            "unrealized_pnl": plain(self.profit(mark)),
            "liquidation_price": market.price_text(max(0, self.ruin())),
        }
