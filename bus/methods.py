"""METHODS: what a host may ask. A new method is one row here, its Structs in messages.py and one function per venue."""

from typing import Any

import msgspec
from msgspec import Struct

from bus.messages import (
    Api,
    Balance,
    Candle,
    ContractType,
    Depth,
    Direction,
    Empty,
    MarginLevel,
    Market,
    Order,
    OrderList,
    OrderRef,
    Placed,
    Position,
    Positions,
    Records,
    Ticker,
    Trade,
    TradeRow,
)


class Method(Struct, frozen=True):
    """One row.

    params: what travels to the worker; result: what it answers, in the host's shape.
    write: the exchange changes by it, so it goes out at most once and an ambiguous failure is OutcomeUnknown.
    places: it creates an order, whose client order id is the idempotency key.
    io: the code of a futures call, which a host sends as method `io`; None for a call by its own name.
    local: answered by the worker from the session state, without a call to the exchange.
    """

    name: str
    params: type[Struct]
    result: Any
    write: bool = False
    places: bool = False
    io: int | None = None
    local: bool = False

    @property
    def function(self) -> str:
        """What a venue calls it: the name, without the underscores that Python gives a meaning of its own."""
        return self.name.strip("_")


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("ticker", Market, Ticker),
        Method("depth", Market, Depth),
        Method("trades", Market, list[TradeRow]),
        Method("records", Records, list[Candle]),
        Method("accounts", Empty, list[Balance]),
        Method("trade", Trade, Placed, write=True, places=True),
        Method("order", OrderRef, Order),
        Method("orders", OrderList, list[Order]),
        Method("cancel", OrderRef, bool, write=True),
        Method("__api", Api, Any, write=True),
        Method("margin_level", MarginLevel, bool, io=0, local=True),
        Method("direction", Direction, bool, io=1, local=True),
        Method("contract_type", ContractType, dict, io=2, local=True),
        Method("positions", Positions, list[Position], io=3),
    )
}

BY_IO = {row.io: row for row in METHODS.values() if row.io is not None}
DECODERS = {row.name: msgspec.json.Decoder(row.params) for row in METHODS.values()}


def is_write(method: Method, params: Struct) -> bool:
    """Whether this very call may change something at the exchange: a raw call with GET does not."""
    return method.write and not (isinstance(params, Api) and params.verb == "GET")


def host_name(method: Method) -> str:
    """What the host called it, for error texts: "ticker", "io", "__api_"."""
    return "io" if method.io is not None else method.name
