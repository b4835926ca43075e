"""The endpoints: what each call does, with the weight it costs. No HTTP here; server.py finds the caller and writes the reply.

A handler changes the engine without an await in between, and its caller hands the changes to the store right after it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from workers.venues.paper import history, intake, quotes, schema
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.history import History
from workers.venues.paper.markets import find_swap
from workers.venues.paper.money import plain
from workers.venues.paper.orders import Order
from workers.venues.paper.store import Job, Store

MOST_ROWS = 1_000
LONGEST_INTERVAL = 43_200


@dataclass(slots=True)
class Call:
    """One request, understood as far as HTTP goes.

    write_changes: hands the store what advance() did, ahead of a read that must see it.
    argument: the id at the end of the path. client_id_known: the store has an order with the body's client order id; again: let it pass.
    skew_ms: by how much the exchange's clock, as others see it, is ahead of now_ms. order: set by a handler that placed or cancelled
    one, for the ledger.
    """

    engine: Engine
    store: Store
    history: History
    write_changes: Callable[[], None]
    account: int
    verb: str
    path: str
    argument: str
    query: Mapping[str, str]
    body: bytes
    now_ms: int
    client_id_known: bool = False
    again: bool = False
    skew_ms: int = 0
    order: Order | None = None


class Route(NamedTuple):
    """How a path is served. recorded: an order request, which the ledger has before it is looked at."""

    serve: Callable[[Call], Awaitable[object]]
    weight: int
    signed: bool = True
    recorded: bool = False


def route(verb: str, path: str) -> tuple[Route, str]:
    """The route of a path and the id at its end, "" where it has none. Whatever we do not know is echoed."""
    head, _, last = path.rpartition("/")
    if found := ROUTES.get((verb, path)):
        return found, ""
    if found := ROUTES.get((verb, head + "/*")):
        return found, last
    return ECHO, ""


async def time(call: Call) -> object:
    return {"time": call.now_ms + call.skew_ms}


async def markets(call: Call) -> object:
    return quotes.markets(call.engine)


async def ticker(call: Call) -> object:
    return quotes.ticker(call.engine, _market_now(call), call.now_ms)


async def depth(call: Call) -> object:
    symbol, limit = _market_now(call), intake.number(call.query, "limit", 20, low=1, high=quotes.MOST_DEPTH)
    return quotes.depth(call.engine, symbol, limit, call.now_ms)


async def trades(call: Call) -> object:
    symbol, limit = _market_now(call), intake.number(call.query, "limit", 100, low=1, high=MOST_ROWS)
    return quotes.trades(call.engine, symbol, limit)


async def depth_then(call: Call) -> object:
    symbol, limit = _market_now(call), intake.number(call.query, "limit", 20, low=1, high=history.LEVELS)
    call.write_changes()
    return call.history.depth(symbol, _moment(call), limit, call.now_ms)


async def ticker_then(call: Call) -> object:
    symbol = _market_now(call)
    call.write_changes()
    return call.history.ticker(symbol, _moment(call), call.now_ms)


async def connect(call: Call) -> object:
    """The request that becomes a WebSocket is served by sockets.py; what a request is checked for happens on its way here."""
    return {}


async def candles(call: Call) -> object:
    symbol, limit = intake.symbol(call.query), intake.number(call.query, "limit", 500, low=1, high=MOST_ROWS)
    if "interval" not in call.query:
        raise Refused(Code.BAD_PARAMETER, "interval: the parameter is missing")
    interval = intake.number(call.query, "interval", 1, low=1, high=LONGEST_INTERVAL)
    end_ms = intake.number(call.query, "end", call.now_ms + 1, low=1, high=10**14)
    # In a thread: a thousand bars that nobody asked for before take up to a tenth of a second.
    return await asyncio.to_thread(
        quotes.candles, call.engine.seed, symbol, interval=interval, limit=limit, end_ms=end_ms, now_ms=call.now_ms
    )


async def mark(call: Call) -> object:
    symbol = find_swap(_market_now(call)).symbol
    return quotes.mark(call.engine, symbol, call.now_ms)


async def funding(call: Call) -> object:
    symbol, limit = find_swap(_market_now(call)).symbol, intake.number(call.query, "limit", 100, low=1, high=MOST_ROWS)
    return quotes.funding_rates(call.engine, symbol, limit, call.now_ms)


async def account(call: Call) -> object:
    call.engine.advance_all(call.now_ms)
    balances = sorted(call.engine.accounts.balances[call.account].items())
    return {"balances": [{"currency": name, "free": plain(b.free), "frozen": plain(b.frozen)} for name, b in balances]}


async def place(call: Call) -> object:
    ticket = intake.order(call.body, now_ms=call.now_ms + call.skew_ms)
    call.engine.advance(ticket.market.symbol, call.now_ms)
    call.order = call.engine.place(call.account, ticket, call.now_ms, client_id_known=call.client_id_known, again=call.again)
    return call.order.document()


async def open_orders(call: Call) -> object:
    symbol = intake.optional_symbol(call.query)
    call.engine.advance_all(call.now_ms)
    return [order.document() for order in _open(call, symbol)]


async def order_history(call: Call) -> object:
    symbol, limit = intake.optional_symbol(call.query), intake.number(call.query, "limit", 100, low=1, high=MOST_ROWS)
    call.engine.advance_all(call.now_ms)
    call.write_changes()
    return [order.document() for order in await call.store.submit(schema.order_history(call.account, symbol, limit))]


async def fills(call: Call) -> object:
    symbol, limit = intake.optional_symbol(call.query), intake.number(call.query, "limit", 100, low=1, high=MOST_ROWS)
    call.engine.advance_all(call.now_ms)
    call.write_changes()
    return [fill.document() for fill in await call.store.submit(schema.fills(call.account, symbol, limit))]


async def funding_payments(call: Call) -> object:
    symbol, limit = intake.optional_symbol(call.query), intake.number(call.query, "limit", 100, low=1, high=MOST_ROWS)
    call.engine.advance_all(call.now_ms)
    call.write_changes()
    return [payment.document() for payment in await call.store.submit(schema.payments(call.account, symbol, limit))]


async def order_by_id(call: Call) -> object:
    return (await _by_id(call)).document()


async def order_by_client_id(call: Call) -> object:
    return (await _by_client_id(call)).document()


async def cancel_by_id(call: Call) -> object:
    return _cancel(call, await _by_id(call))


async def cancel_by_client_id(call: Call) -> object:
    return _cancel(call, await _by_client_id(call))


async def cancel_all(call: Call) -> object:
    symbol = intake.optional_symbol(call.query)
    call.engine.advance_all(call.now_ms)
    orders = _open(call, symbol)
    for order in orders:
        call.engine.cancel(order, call.now_ms)
    return {"cancelled": [str(order.number) for order in orders]}


async def positions(call: Call) -> object:
    wanted, engine = intake.optional_symbol(call.query), call.engine
    engine.advance_all(call.now_ms)
    return [
        position.document(engine.mark(key.symbol))
        for key, position in sorted(engine.accounts.positions.items())
        if key.account == call.account and wanted in (None, key.symbol)
    ]


async def set_leverage(call: Call) -> object:
    new = intake.leverage(call.body)
    call.engine.accounts.set_leverage(call.account, new.symbol, new.leverage)
    return {"symbol": new.symbol, "leverage": new.leverage}


async def get_leverage(call: Call) -> object:
    market = find_swap(intake.symbol(call.query))
    return {"symbol": market.symbol, "leverage": call.engine.accounts.leverage(call.account, market.symbol)}


async def echo(call: Call) -> object:
    return {"verb": call.verb, "path": call.path, "params": intake.parameters(call.query, call.body)}


ECHO = Route(echo, 1)

ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/api/v1/time"): Route(time, 1, signed=False),
    ("GET", "/api/v1/markets"): Route(markets, 2, signed=False),
    ("GET", "/api/v1/ticker"): Route(ticker, 1, signed=False),
    ("GET", "/api/v1/depth"): Route(depth, 2, signed=False),
    ("GET", "/api/v1/trades"): Route(trades, 2, signed=False),
    ("GET", "/api/v1/candles"): Route(candles, 2, signed=False),
    ("GET", "/api/v1/mark"): Route(mark, 1, signed=False),
    ("GET", "/api/v1/funding"): Route(funding, 1, signed=False),
    ("GET", "/api/v1/history/depth"): Route(depth_then, 2, signed=False),
    ("GET", "/api/v1/history/ticker"): Route(ticker_then, 2, signed=False),
    ("GET", "/ws/v1"): Route(connect, 5, signed=False),
    ("GET", "/api/v1/account"): Route(account, 2),
    ("POST", "/api/v1/orders"): Route(place, 1, recorded=True),
    ("GET", "/api/v1/orders"): Route(open_orders, 2),
    ("DELETE", "/api/v1/orders"): Route(cancel_all, 1, recorded=True),
    ("GET", "/api/v1/orders/history"): Route(order_history, 5),
    ("GET", "/api/v1/orders/*"): Route(order_by_id, 1),
    ("DELETE", "/api/v1/orders/*"): Route(cancel_by_id, 1, recorded=True),
    ("GET", "/api/v1/orders/by-client-id/*"): Route(order_by_client_id, 1),
    ("DELETE", "/api/v1/orders/by-client-id/*"): Route(cancel_by_client_id, 1, recorded=True),
    ("GET", "/api/v1/positions"): Route(positions, 2),
    ("POST", "/api/v1/leverage"): Route(set_leverage, 1),
    ("GET", "/api/v1/leverage"): Route(get_leverage, 1),
    ("GET", "/api/v1/fills"): Route(fills, 5),
    ("GET", "/api/v1/funding/payments"): Route(funding_payments, 5),
}
"""The API by verb and path; `*` stands for one last id. The README has the same table."""


def _market_now(call: Call) -> str:
    symbol = intake.symbol(call.query)
    call.engine.advance(symbol, call.now_ms)
    return symbol


def _open(call: Call, symbol: str | None) -> list[Order]:
    orders = call.engine.open_orders.get(call.account, {}).values()
    return [order for order in orders if symbol in (None, order.symbol)]


async def _by_id(call: Call) -> Order:
    if not (call.argument.isascii() and call.argument.isdecimal() and len(call.argument) <= 18):
        raise Refused(Code.ORDER_NOT_FOUND, "no order with this id")
    number = int(call.argument)
    return await _current(call, call.engine.open_orders.get(call.account, {}).get(number), schema.order_by_number(call.account, number))


async def _by_client_id(call: Call) -> Order:
    key = (call.account, call.argument)
    return await _current(call, call.engine.by_client_id.get(key), schema.order_by_client_id(*key))


async def _current(call: Call, resting: Order | None, on_disk: Job[Order | None]) -> Order:
    """An order is in memory while it is open, on disk afterwards."""
    if resting:
        call.engine.advance(resting.symbol, call.now_ms)
        return resting
    if order := await call.store.submit(on_disk):
        return call.engine.open_orders.get(call.account, {}).get(order.number, order)
    raise Refused(Code.ORDER_NOT_FOUND, "no order with this id")


def _cancel(call: Call, order: Order) -> object:
    if order.status != "open":
        raise Refused(Code.ORDER_NOT_OPEN, f"the order is {order.status}")
    call.engine.cancel(order, call.now_ms)
    call.order = order
    return order.document()


def _moment(call: Call) -> int:
    """The required parameter `time`, in ms. Raises Refused(BAD_PARAMETER)."""
    if "time" not in call.query:
        raise Refused(Code.BAD_PARAMETER, "time: the parameter is missing")
    return intake.number(call.query, "time", 0, low=0, high=10**14)
