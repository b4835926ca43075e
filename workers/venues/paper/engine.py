"""The exchange without its HTTP: orders meet the books and the market, accounts are settled. Pure: time comes in as an argument.

Everything here happens at once, between two awaits of the server, so no request sees another half done. What changed is collected in
`accounts.changes`; the server writes it in the same transaction as the ledger's line and answers only after that.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from workers.venues.paper import fees, funding
from workers.venues.paper import market as price_model
from workers.venues.paper.accounts import Accounts, Changes, PositionKey
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.markets import MARKETS, Market
from workers.venues.paper.matching import Book, Match, Plan, passing, plan
from workers.venues.paper.money import plain
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

    def __init__(self, seed: int, *, step_ms: int = 1000, rates: fees.Schedule = fees.STANDARD) -> None:
        """step_ms: how often the market's own book changes some of its sizes. rates: the fees of orders to come."""
        self.seed = seed
        self.rates = rates
        self.step_ms = step_ms
        self.accounts = Accounts()
        self.books: dict[str, Book] = {symbol: Book() for symbol in MARKETS}
        self.tapes: dict[str, deque[Trade]] = {symbol: deque(maxlen=TAPE) for symbol in MARKETS}
        self.open_orders: dict[int, dict[int, Order]] = {}
        self.by_client_id: dict[tuple[int, str], Order] = {}
        self.next_order = self.next_fill = self.next_trade = 1
        self._recent_ids: OrderedDict[tuple[int, str], None] = OrderedDict()

    def restore(self, orders: Iterable[Order], seconds: Mapping[str, int]) -> None:
        """Put resting orders back into their books. seconds: up to where each market was met; the first advance() goes on from there."""
        for order in orders:
            self._rest(order)
        for symbol, second in seconds.items():
            self.books[symbol].resume(second, price_model.depth(self.seed, symbol, second))

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
        return price_model.depth(self.seed, symbol, self.books[symbol].second, self.books[symbol].step_ms)

    def last(self, symbol: str) -> int:
        """The market's last price, in ticks."""
        return price_model.second(self.seed, symbol, self.books[symbol].second).close

    def mark(self, symbol: str) -> int:
        """The mark price of a swap in the second that advance() has reached, in ticks."""
        return funding.mark(self.seed, MARKETS[symbol], self.books[symbol].second)

    def advance(self, symbol: str, now_ms: int) -> None:
        """Let the market reach `now`: fill the resting orders it comes to, settle funding, take the positions it ruins.

        After a stop it goes through every second that matters in between, each as it would have been. Does its work once a second at most,
        and never goes back in time.
        """
        book, second = self.books[symbol], now_ms // 1000
        step_ms = now_ms % 1000 // self.step_ms * self.step_ms
        if second < book.second:
            return
        while book.second < second:
            at = self._next(symbol, book.second + 1, second)
            book.turn(at)
            self._live(symbol, now_ms if at == second else at * 1000)
        if step_ms > book.step_ms:
            book.step(step_ms, self.depth(symbol))

    def _next(self, symbol: str, start: int, end: int) -> int:
        """The first second from `start` in which something may happen to an order or a position; at the latest `end`."""
        if start == end:
            return end
        downs, ups = [], []
        buys, sells = (self.books[symbol].sides[side].rows for side in ("buy", "sell"))
        if buys:
            downs.append(buys[0][2].price - 1)
        if sells:
            ups.append(sells[0][2].price)
        for position in self._positions(symbol):
            ruin = position.ruin()
            if position.side == "long":
                downs.append(ruin + ruin // funding.MOST_BASIS + 2)
            else:
                ups.append(ruin - ruin // funding.MOST_BASIS - 2)
            end = min(end, funding.next_end(start - 1))
        if not downs and not ups:
            return end
        found = price_model.reaching(self.seed, symbol, start, end, down=max(downs, default=0), up=min(ups, default=price_model.NEVER))
        return end if found is None else found

    def _live(self, symbol: str, now_ms: int) -> None:
        """One second of the market, at its beginning: funding first, then resting orders by their priority, then ruined positions."""
        book = self.books[symbol]
        if MARKETS[symbol].is_swap and book.second % funding.INTERVAL_S == 0:
            self._fund(symbol)
        bar = price_model.second(self.seed, symbol, book.second)
        buys, sells = book.sides["buy"], book.sides["sell"]
        if (buys.rows and bar.low < buys.rows[0][2].price) or (sells.rows and bar.high >= sells.rows[0][2].price):
            tape, depth = price_model.prints(self.seed, symbol, book.second), self.depth(symbol)
            for side, other, levels in ((buys, "sell", depth.asks), (sells, "buy", depth.bids)):
                passed = passing(side, tape, levels)
                for match in passed.taken:
                    book.take(other, match)
                book.changes += bool(passed.fills)
                for order, lots in passed.fills:
                    self._fill_resting(order, lots, self._trade(order, order.price, lots, now_ms, maker=True), now_ms)
        if MARKETS[symbol].is_swap:
            self._liquidate(symbol, now_ms)

    def place(self, account: int, ticket: Ticket, now_ms: int, *, client_id_known: bool = False, again: bool = False) -> Order:
        """Execute what can be executed at once; the rest of a limit order rests, the rest of a market order is cancelled.

        client_id_known: the store has an order of this account with that client order id; again: which is a fault of the exchange's,
        and let pass. advance() comes first.
        Raises Refused, and has then changed nothing.
        """
        market, book = ticket.market, self.books[ticket.market.symbol]
        client_key = (account, ticket.client_order_id or "")
        if not again and ticket.client_order_id and (client_id_known or client_key in self._recent_ids):
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
            maker_rate=self.rates[market.kind].maker,
        )
        planned = self._plan(order)
        self._check(order, planned.matches)

        self.next_order += 1
        if ticket.client_order_id:
            self._remember(client_key)
        # No account trades with itself: what rests makes way.
        for own in planned.own:
            self.cancel(own, now_ms)
        for match in planned.matches:
            self._execute(order, match, now_ms)
        if planned.matches or order.kind == "limit":
            book.changes += 1
        if order.kind == "limit" and order.remaining:
            self.accounts.freeze(order)
            self._rest(order)
        else:
            order.status = "closed" if planned.complete else "cancelled"
        self._touch(order)
        return order

    def cancel(self, order: Order, now_ms: int) -> None:
        """Take an open order off its book and give back what it held."""
        book = self.books[order.symbol]
        self.accounts.release(order)
        self._unrest(order)
        order.status, order.update_ms = "cancelled", max(now_ms, book.second * 1000)
        book.changes += 1
        self._touch(order)

    def _plan(self, order: Order) -> Plan:
        return plan(
            self.books[order.symbol],
            self.depth(order.symbol),
            order.side,
            account=order.account,
            limit=order.price or None,
            lots=order.lots or None,
            money=order.quote_amount,
            lot_notional=MARKETS[order.symbol].lot_notional,
        )

    def _check(self, order: Order, matches: list[Match]) -> None:
        """Refuse what is too small or cannot be paid. What the order's way cancels of the account's own does not count as free yet."""
        market = MARKETS[order.symbol]
        if order.lots:
            # A market order is worth what the first level says; a limit order what it says itself.
            market.check_notional(order.price or (matches[0].price if matches else self.last(order.symbol)), order.lots)
        else:
            market.check_quote_amount(order.quote_amount)
        if order.offset == "close":
            free_lots = self.accounts.available(PositionKey(order.account, order.symbol, order.position_side))
            if order.lots > free_lots:
                left = f"{market.amount_text(free_lots)} of the {order.position_side} position"
                raise Refused(Code.NO_POSITION, f"amount: only {left} can be closed")
        elif order.side == "sell" and not market.is_swap:
            self._require(order, market.base, order.lots * market.lot)
        else:
            rest = order.held(order.lots - sum(match.lots for match in matches)) if order.kind == "limit" else 0
            taker_rate = self.rates[market.kind].taker if market.is_swap else 0
            worths = [market.notional(match.price, match.lots) for match in matches]
            now = sum(worth // order.leverage + fees.fee(worth, taker_rate) for worth in worths)
            self._require(order, market.quote, max(now + rest, order.quote_amount))

    def _require(self, order: Order, currency: str, needed: int) -> None:
        """Raise Refused(INSUFFICIENT_BALANCE) when less is free."""
        if (free := self.accounts.free(order.account, currency)) >= needed:
            return
        market = MARKETS[order.symbol]
        most = ""
        if not market.is_swap:
            # Buying more never gets cheaper by the lot, so the same part of the amount is paid for.
            most = f"; the most is {market.amount_text(order.lots * free // needed) if order.lots else plain(free)}"
        field = "amount" if order.lots else "quote_amount"
        message = f"{field}: insufficient balance, {plain(needed)} {currency} needed, {plain(free)} free{most}"
        raise Refused(Code.INSUFFICIENT_BALANCE, message)

    def _execute(self, taker: Order, match: Match, now_ms: int) -> None:
        book, other = self.books[taker.symbol], "sell" if taker.side == "buy" else "buy"
        trade = self._trade(taker, match.price, match.lots, now_ms, maker=False)
        rate = self.rates[MARKETS[taker.symbol].kind].taker
        self._note_fill(taker, trade, "taker", self.accounts.fill(taker, match.price, match.lots, rate=rate, resting=False))
        if match.maker is None:
            book.take(other, match)
        else:
            self._fill_resting(match.maker, match.lots, trade, now_ms)

    def _fill_resting(self, order: Order, lots: int, trade: Trade, now_ms: int) -> None:
        self._note_fill(order, trade, "maker", self.accounts.fill(order, order.price, lots, rate=order.maker_rate, resting=True))
        order.update_ms = max(now_ms, trade.time_ms)
        if not order.remaining:
            self._unrest(order)
            order.status = "closed"
        self._touch(order)

    def _fund(self, symbol: str) -> None:
        """Exchange the funding of the interval that ends with this second."""
        end_s = self.books[symbol].second
        rate = funding.rate(self.seed, symbol, end_s // funding.INTERVAL_S - 1)
        price = funding.index(self.seed, MARKETS[symbol], end_s)
        for position in self._positions(symbol):
            self.accounts.fund(position, rate=rate, price=price, time_ms=end_s * 1000)
            self.accounts.changes.seconds[symbol] = end_s

    def _positions(self, symbol: str) -> list[Position]:
        return [position for position in self.accounts.positions.values() if position.symbol == symbol]

    def _liquidate(self, symbol: str, now_ms: int) -> None:
        """Close the positions whose margin the loss has used up, by an order that the owner finds in the history."""
        if not (positions := self._positions(symbol)):
            return
        mark = self.mark(symbol)
        for position in [p for p in positions if p.margin + p.profit(mark) <= 0]:
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
        self._note_fill(order, self._trade(order, mark, order.lots, now_ms, maker=False), "taker", 0)
        self._touch(order)

    def _trade(self, order: Order, price: int, lots: int, now_ms: int, *, maker: bool) -> Trade:
        opposite = "sell" if order.side == "buy" else "buy"
        trade = Trade(self.next_trade, price, lots, opposite if maker else order.side, max(now_ms, self.books[order.symbol].second * 1000))
        self.next_trade += 1
        self.tapes[order.symbol].append(trade)
        return trade

    def _note_fill(self, order: Order, trade: Trade, role: str, fee: int) -> None:
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
            fee=fee,
        )
        self.next_fill += 1
        self.accounts.changes.fills.append(fill)

    def _touch(self, order: Order) -> None:
        """Have the order written, and with it up to where its market was met: an order must never meet a second before its own again."""
        self.accounts.changes.orders[order.number] = order
        self.accounts.changes.seconds[order.symbol] = self.books[order.symbol].second

    def _rest(self, order: Order) -> None:
        self.books[order.symbol].sides[order.side].add(order)
        self.open_orders.setdefault(order.account, {})[order.number] = order
        if order.client_order_id:
            self.by_client_id.setdefault((order.account, order.client_order_id), order)

    def _unrest(self, order: Order) -> None:
        self.books[order.symbol].sides[order.side].remove(order)
        del self.open_orders[order.account][order.number]
        if order.client_order_id and self.by_client_id.get(key := (order.account, order.client_order_id)) is order:
            del self.by_client_id[key]

    def _remember(self, client_key: tuple[int, str]) -> None:
        self._recent_ids[client_key] = None
        if len(self._recent_ids) > RECENT_IDS:
            self._recent_ids.popitem(last=False)
