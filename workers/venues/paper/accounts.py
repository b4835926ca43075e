"""Who owns what: balances, positions, and how one fill moves them. Pure, and money is never made or lost.

Every fill is settled between the account and the market's own account (number 0, which may owe): two users who trade with each other both
settle with it at one price, which leaves it as it was. Funding goes through it as well; fees go to an account of their own (number -1). So
the sum of one currency over all accounts is zero for ever.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from workers.venues.paper import funding
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.fees import fee
from workers.venues.paper.markets import MARKETS, PLAY_MONEY, find_swap
from workers.venues.paper.orders import Fill, Order, Position

MARKET_ACCOUNT = 0
"""The market's own account, which also handed out the play money."""

FEE_ACCOUNT = -1
"""Where the fees go."""

DEFAULT_LEVERAGE = 10


@dataclass(slots=True)
class Balance:
    """In UNIT-ths; frozen is what resting orders and open positions hold. Neither falls below zero, except the market's own free."""

    free: int = 0
    frozen: int = 0


class PositionKey(NamedTuple):
    account: int
    symbol: str
    side: str


@dataclass(slots=True)
class Changes:
    """What was touched since the last look: the rows that have to be written, in one transaction.

    seconds: by symbol, up to where resting orders and positions have met the market and need not meet it again.
    """

    orders: dict[int, Order] = field(default_factory=dict)
    balances: dict[tuple[int, str], Balance] = field(default_factory=dict)
    positions: dict[PositionKey, Position] = field(default_factory=dict)
    leverages: dict[tuple[int, str], int] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    payments: list[funding.Payment] = field(default_factory=list)
    seconds: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.orders or self.balances or self.positions or self.leverages or self.fills or self.payments or self.seconds)


@dataclass(slots=True)
class Accounts:
    """All accounts' balances, positions and leverage settings; `changes` collects what each call touched."""

    balances: dict[int, dict[str, Balance]] = field(default_factory=lambda: {MARKET_ACCOUNT: {}, FEE_ACCOUNT: {}})
    positions: dict[PositionKey, Position] = field(default_factory=dict)
    leverages: dict[tuple[int, str], int] = field(default_factory=dict)
    changes: Changes = field(default_factory=Changes)

    def open(self, account: int) -> None:
        """Give a new account its play money."""
        self.balances[account] = {}
        for currency, grant in PLAY_MONEY.items():
            self._balance(account, currency).free += grant
            self._balance(MARKET_ACCOUNT, currency).free -= grant

    def free(self, account: int, currency: str) -> int:
        return self._peek(account, currency).free

    def leverage(self, account: int, symbol: str) -> int:
        return self.leverages.get((account, symbol), DEFAULT_LEVERAGE)

    def set_leverage(self, account: int, symbol: str, leverage: int) -> None:
        """For orders to come; open positions and resting orders keep theirs. Raises Refused(LEVERAGE | BAD_PARAMETER)."""
        market = find_swap(symbol)
        if not 1 <= leverage <= market.max_leverage:
            nearest = 1 if leverage < 1 else market.max_leverage
            raise Refused(Code.LEVERAGE, f"leverage: expected 1 to {market.max_leverage}; the nearest is {nearest}")
        self.leverages[account, symbol] = self.changes.leverages[account, symbol] = leverage

    def available(self, key: PositionKey) -> int:
        """Lots of a position that no resting close order speaks for."""
        position = self.positions.get(key)
        return position.lots - position.frozen if position else 0

    def freeze(self, order: Order) -> None:
        """Set aside what the rest of an order may need while it rests."""
        self._hold(order, 1)

    def release(self, order: Order) -> None:
        """Give back what the rest of an order held."""
        self._hold(order, -1)

    def fill(self, order: Order, price: int, lots: int, *, rate: int, resting: bool) -> int:
        """Execute `lots` of an order at `price`: pay, deliver, count. Returns the fee, in the smallest unit of the fill's fee_currency.

        rate: of the fee, in millionths. A resting order pays from what it froze, another from what is free.
        """
        if resting:
            self._unhold(order, lots)
        market = MARKETS[order.symbol]
        notional = market.notional(price, lots)
        if market.is_swap:
            charged = self._fill_swap(order, lots, notional, fee(notional, rate))
        else:
            paid, brought = (notional, lots * market.lot) if order.side == "buy" else (lots * market.lot, notional)
            bought, sold = (market.base, market.quote) if order.side == "buy" else (market.quote, market.base)
            self._transfer(order.account, sold, -paid)
            self._transfer(order.account, bought, brought)
            charged = self._charge(order.account, bought, fee(brought, rate))
        order.filled += lots
        order.spent += notional
        self.changes.orders[order.number] = order
        return charged

    def fund(self, position: Position, *, rate: int, price: int, time_ms: int) -> None:
        """Let a position pay or receive funding at a price; it is paid from what is free, then from the margin, never more than both."""
        market = MARKETS[position.symbol]
        value = funding.due(position.side, market.notional(price, position.lots), rate)
        balance = self._balance(position.account, market.quote)
        from_margin = min(position.margin, max(0, -value - balance.free))
        if from_margin:
            position.margin -= from_margin
            balance.frozen -= from_margin
            balance.free += from_margin
        value = max(value, -balance.free)
        self._transfer(position.account, market.quote, value)
        self._touch(position)
        key = (position.account, position.symbol, position.side)
        self.changes.payments.append(funding.Payment(*key, time_ms, rate, price, position.lots, value))

    def liquidate(self, position: Position) -> None:
        """Take a position whose margin is used up: the market gets the margin and bears what the loss exceeds it by."""
        currency = MARKETS[position.symbol].quote
        self._balance(position.account, currency).frozen -= position.margin
        self._balance(MARKET_ACCOUNT, currency).free += position.margin
        position.lots = position.frozen = position.cost = position.margin = 0
        self._touch(position)

    def _fill_swap(self, order: Order, lots: int, notional: int, charged: int) -> int:
        key = PositionKey(order.account, order.symbol, order.position_side)
        currency = MARKETS[order.symbol].quote
        balance = self._balance(order.account, currency)
        if order.offset == "open":
            position = self.positions.setdefault(key, Position(*key))
            margin = notional // order.leverage
            balance.free -= margin
            balance.frozen += margin
            position.lots += lots
            position.cost += notional
            position.margin += margin
            position.leverage = order.leverage
        else:
            position = self.positions[key]
            cost, margin = position.cost * lots // position.lots, position.margin * lots // position.lots
            profit = notional - cost if position.side == "long" else cost - notional
            # Margined alone: a position cannot lose more than its margin.
            profit = max(profit, -margin)
            balance.frozen -= margin
            balance.free += margin
            self._transfer(order.account, currency, profit)
            position.lots -= lots
            position.cost -= cost
            position.margin -= margin
            # Nor does a close cost more than it gives back.
            charged = min(charged, margin + profit)
        self._touch(position)
        return self._charge(order.account, currency, charged)

    def _hold(self, order: Order, sign: int) -> None:
        if order.offset == "close":
            position = self.positions[PositionKey(order.account, order.symbol, order.position_side)]
            position.frozen += sign * order.remaining
            self._touch(position)
            return
        balance, held = self._balance(order.account, order.held_currency), order.held(order.remaining)
        balance.free -= sign * held
        balance.frozen += sign * held

    def _unhold(self, order: Order, lots: int) -> None:
        if order.offset == "close":
            self.positions[PositionKey(order.account, order.symbol, order.position_side)].frozen -= lots
            return
        balance = self._balance(order.account, order.held_currency)
        held = order.held(order.remaining) - order.held(order.remaining - lots)
        balance.free += held
        balance.frozen -= held

    def _transfer(self, account: int, currency: str, value: int) -> None:
        self._balance(account, currency).free += value
        self._balance(MARKET_ACCOUNT, currency).free -= value

    def _charge(self, account: int, currency: str, charged: int) -> int:
        if charged:
            self._balance(account, currency).free -= charged
            self._balance(FEE_ACCOUNT, currency).free += charged
        return charged

    def _peek(self, account: int, currency: str) -> Balance:
        return self.balances[account].get(currency) or Balance()

    def _balance(self, account: int, currency: str) -> Balance:
        """A balance about to be changed."""
        balance = self.balances[account].setdefault(currency, Balance())
        self.changes.balances[account, currency] = balance
        return balance

    def _touch(self, position: Position) -> None:
        key = PositionKey(position.account, position.symbol, position.side)
        self.changes.positions[key] = position
        if not position.lots:
            del self.positions[key]
