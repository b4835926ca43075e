"""The exchange without its HTTP: orders meet the books and the market, accounts are settled. Pure: time comes in as an argument.

Everything here happens at once, between two awaits of the server, so no request sees another half done. What changed is collected in
`accounts.changes`; the server writes it in the same transaction as the ledger's line and answers only after that.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from workers.venues.paper import market as price_model
from workers.venues.paper.accounts import Accounts, Changes, PositionKey
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.markets import MARKETS, Market
from workers.venues.paper.matching import Book, Match, matches, reached
from workers.venues.paper.orders import Fill, Order, Position

MOST_OPEN_ORDERS = 1_000
"""Open orders an account may have."""

RECENT_IDS = 100_000
"""Client order ids remembered here because the store may not have written them yet; it knows all the older ones."""

TAPE = 1_000
"""Users' trades kept for GET /api/v1/trades, per market."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ticket:
    """An order as asked for: price in ticks (0: market), lots (0: spend quote_amount, in UNIT-ths)."""

    market: Market
    side: str
    kind: str
    offset: str | None
    price: int
    lots: int
    quote_amount: int
    client_order_id: str | None


class Trade(NamedTuple):
    """One trade with a user in it, as the public sees it; side is the taker's."""

    number: int
    price: int
    lots: int
    side: str
    time_ms: int


class Engine:
    """All accounts, books and open orders of one exchange."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.accounts = Accounts()
        self.books: dict[str, Book] = {symbol: Book() for symbol in MARKETS}
        self.tapes: dict[str, deque[Trade]] = {symbol: deque(maxlen=TAPE) for symbol in MARKETS}
        self.open_orders: dict[int, dict[int, Order]] = {}
        self.by_client_id: dict[tuple[int, str], Order] = {}
        self.next_order = self.next_fill = self.next_trade = 1
        self._recent_ids: OrderedDict[tuple[int, str], None] = OrderedDict()

    def restore(self, orders: Iterable[Order]) -> None:
        """Put resting orders back into their books; the first advance() fills those that the market has passed in the meantime."""
        for order in orders:
            self._rest(order)

    def drain(self) -> Changes:
        """What was touched since the last call."""
        changes, self.accounts.changes = self.accounts.changes, Changes()
        return changes

    def advance_all(self, now_ms: int) -> None:
        """advance() every market in which somebody has an order or a position."""
        held = {key.symbol for key in self.accounts.positions}
        for symbol, book in self.books.items():
            if symbol in held or any(side.rows for side in book.sides.values()):
                self.advance(symbol, now_ms)

    def depth(self, symbol: str) -> price_model.Depth:
        """The market's own book in the second that advance() has reached."""
        return price_model.depth(self.seed, symbol, self.books[symbol].second)

    def last(self, symbol: str) -> int:
        """The market's last price, in ticks; also the mark price."""
        return price_model.second(self.seed, symbol, self.books[symbol].second).close

    def advance(self, symbol: str, now_ms: int) -> None:
        """Let the market reach `now`: fill the resting orders it came to, take the positions it ruined.

        Does its work once a second at most, and never goes back in time.
        """
        book, second = self.books[symbol], now_ms // 1000
        if second <= book.second:
            return
        before = book.second
        book.turn(second)
        depth = self.depth(symbol)
        bars: dict[int, price_model.Bar] = {}
        for side in book.sides.values():
            for _, _, order in list(side.rows):
                # The second in which an order came to rest is over for it: it saw that second's book already.
                since = max(before, order.time_ms // 1000) + 1
                if since > second:
                    continue
                if since not in bars:
                    bars[since] = price_model.span(self.seed, symbol, since, second + 1)
                if reached(order, bars[since], depth):
                    self._fill_resting(order, order.remaining, self._trade(order, order.price, order.remaining, now_ms, maker=True), now_ms)
        if MARKETS[symbol].is_swap:
            self._liquidate(symbol, now_ms)

    def place(self, account: int, ticket: Ticket, now_ms: int, *, client_id_known: bool = False) -> Order:
        """Execute what can be executed at once; the rest of a limit order rests, the rest of a market order is cancelled.

        client_id_known: the store has an order of this account with that client order id. advance() comes first.
        Raises Refused, and has then changed nothing.
        """
        market, book = ticket.market, self.books[ticket.market.symbol]
        client_key = (account, ticket.client_order_id or "")
        if ticket.client_order_id and (client_id_known or client_key in self._recent_ids):
            raise Refused(Code.DUPLICATE_CLIENT_ORDER_ID, "client_order_id: you have used it before")
        if ticket.kind == "limit" and len(self.open_orders.get(account, ())) >= MOST_OPEN_ORDERS:
            raise Refused(Code.TOO_MANY_ORDERS, f"an account may have {MOST_OPEN_ORDERS} open orders")
        order = Order(
            number=self.next_order,
            account=account,
            client_order_id=ticket.client_order_id,
            symbol=market.symbol,
            side=ticket.side,
            kind=ticket.kind,
            offset=ticket.offset,
            price=ticket.price,
            lots=ticket.lots,
            quote_amount=ticket.quote_amount,
            leverage=self.accounts.leverage(account, market.symbol) if market.is_swap else 1,
            time_ms=max(now_ms, book.second * 1000),
            update_ms=max(now_ms, book.second * 1000),
        )
        plan = self._plan(order)
        self._check(order, plan)

        self.next_order += 1
        if ticket.client_order_id:
            self._remember(client_key)
        for match in plan:
            self._execute(order, match, now_ms)
        if plan or order.kind == "limit":
            book.changes += 1
        if order.kind == "limit" and order.remaining:
            self.accounts.freeze(order)
            self._rest(order)
        else:
            # An order for money is done when what is left buys no further lot.
            done = order.filled == order.lots if order.lots else bool(plan) and self._spent(order)
            order.status = "closed" if done else "cancelled"
        self.accounts.changes.orders[order.number] = order
        return order

    def cancel(self, order: Order, now_ms: int) -> None:
        """Take an open order off its book and give back what it held."""
        book = self.books[order.symbol]
        self.accounts.release(order)
        self._unrest(order)
        order.status, order.update_ms = "cancelled", max(now_ms, book.second * 1000)
        book.changes += 1
        self.accounts.changes.orders[order.number] = order

    def _plan(self, order: Order) -> list[Match]:
        # A self-trade rule belongs here: for now an order may meet one of the same account, which moves no money.
        return matches(
            self.books[order.symbol],
            self.depth(order.symbol),
            order.side,
            limit=order.price or None,
            lots=order.lots or None,
            money=order.quote_amount,
            lot_notional=MARKETS[order.symbol].lot_notional,
        )

    def _check(self, order: Order, plan: list[Match]) -> None:
        """Refuse what is too small or cannot be paid."""
        market = MARKETS[order.symbol]
        planned = sum(match.lots for match in plan)
        # A market order is worth what the first level says; a limit order what it says itself.
        price = order.price or (plan[0].price if plan else self.last(order.symbol))
        market.check_notional(market.notional(price, order.lots) if order.lots else order.quote_amount)
        if order.offset == "close":
            free_lots = self.accounts.available(PositionKey(order.account, order.symbol, order.position_side))
            if order.lots > free_lots:
                left = f"{market.amount_text(free_lots)} of the {order.position_side} position"
                raise Refused(Code.NO_POSITION, f"amount: only {left} can be closed")
            return
        if order.side == "sell" and not market.is_swap:
            self.accounts.require(order.account, market.base, order.lots * market.lot)
            return
        rest = order.held(order.lots - planned) if order.kind == "limit" else 0
        now = sum(market.notional(match.price, match.lots) // order.leverage for match in plan)
        self.accounts.require(order.account, market.quote, max(now + rest, order.quote_amount))

    def _execute(self, taker: Order, match: Match, now_ms: int) -> None:
        book, other = self.books[taker.symbol], "sell" if taker.side == "buy" else "buy"
        trade = self._trade(taker, match.price, match.lots, now_ms, maker=False)
        self.accounts.fill(taker, match.price, match.lots, resting=False)
        self._note_fill(taker, trade, "taker")
        if match.maker is None:
            book.take(other, match)
        else:
            self._fill_resting(match.maker, match.lots, trade, now_ms)

    def _fill_resting(self, order: Order, lots: int, trade: Trade, now_ms: int) -> None:
        self.accounts.fill(order, order.price, lots, resting=True)
        self._note_fill(order, trade, "maker")
        order.update_ms = max(now_ms, trade.time_ms)
        if not order.remaining:
            self._unrest(order)
            order.status = "closed"

    def _liquidate(self, symbol: str, now_ms: int) -> None:
        """Close the positions whose margin the loss has used up, by an order that the owner finds in the history."""
        mark = self.last(symbol)
        for position in [p for p in self.accounts.positions.values() if p.symbol == symbol and p.margin + p.profit(mark) <= 0]:
            for order in list(self.open_orders.get(position.account, {}).values()):
                if order.symbol == symbol and order.offset == "close" and order.position_side == position.side:
                    self.cancel(order, now_ms)
            self._liquidate_one(position, mark, now_ms)

    def _liquidate_one(self, position: Position, mark: int, now_ms: int) -> None:
        order = Order(
            number=self.next_order,
            account=position.account,
            client_order_id=None,
            symbol=position.symbol,
            side="sell" if position.side == "long" else "buy",
            kind="market",
            offset="close",
            price=0,
            lots=position.lots,
            quote_amount=0,
            leverage=1,
            time_ms=now_ms,
            update_ms=now_ms,
            status="closed",
            filled=position.lots,
            spent=MARKETS[position.symbol].notional(mark, position.lots),
        )
        self.next_order += 1
        self.accounts.liquidate(position)
        self._note_fill(order, self._trade(order, mark, order.lots, now_ms, maker=False), "taker")
        self.accounts.changes.orders[order.number] = order

    def _spent(self, order: Order) -> bool:
        """Whether what is left of the money buys nothing more at the best price: else the book ended first."""
        market = MARKETS[order.symbol]
        best = next(self.books[order.symbol].own_levels("sell", self.depth(order.symbol)), None)
        return best is not None and order.quote_amount - order.spent < market.notional(best[0], 1)

    def _trade(self, order: Order, price: int, lots: int, now_ms: int, *, maker: bool) -> Trade:
        opposite = "sell" if order.side == "buy" else "buy"
        trade = Trade(self.next_trade, price, lots, opposite if maker else order.side, max(now_ms, self.books[order.symbol].second * 1000))
        self.next_trade += 1
        self.tapes[order.symbol].append(trade)
        return trade

    def _note_fill(self, order: Order, trade: Trade, role: str) -> None:
        fill = Fill(
            number=self.next_fill,
            trade=trade.number,
            account=order.account,
            order=order.number,
            symbol=order.symbol,
            side=order.side,
            role=role,
            price=trade.price,
            lots=trade.lots,
            time_ms=trade.time_ms,
        )
        self.next_fill += 1
        self.accounts.changes.fills.append(fill)

    def _rest(self, order: Order) -> None:
        self.books[order.symbol].sides[order.side].add(order)
        self.open_orders.setdefault(order.account, {})[order.number] = order
        if order.client_order_id:
            self.by_client_id[order.account, order.client_order_id] = order

    def _unrest(self, order: Order) -> None:
        self.books[order.symbol].sides[order.side].remove(order)
        del self.open_orders[order.account][order.number]
        if order.client_order_id:
            del self.by_client_id[order.account, order.client_order_id]

    def _remember(self, client_key: tuple[int, str]) -> None:
        self._recent_ids[client_key] = None
        if len(self._recent_ids) > RECENT_IDS:
            self._recent_ids.popitem(last=False)
