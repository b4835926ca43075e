"""What a venue is, and how one is found.

A venue is one class in one file: `Venue` below is all that it must offer. It is found by name: a row of VENUES, an entry point of
group `fmzbus.venues`, or `[venues.NAME] class = "module:Class"`. One instance serves every account; the keys come with each call.
"""

import importlib
from importlib import metadata
from typing import Any, ClassVar, Protocol

from bus import config
from bus.messages import (
    Api,
    Balance,
    Candle,
    Depth,
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
    WithRaw,
)
from workers.http import Call
from workers.rules import Rules

PUBLIC = frozenset({"ticker", "depth", "trades", "records"})
"""What most exchanges answer alike to everybody."""


class Venue(Protocol):
    """One exchange, spoken to in its own words.

    A function is named after its row in METHODS (`__api` is api) and takes (call, params); a venue that lacks one answers
    `<method> not support`. Each sends through `call.send`, which knows the deadline and what a broken connection means, and raises
    only bus/errors.py: VenueRejected where the exchange said no, `call.unclear(...)` for an answer that makes no sense; a row it
    cannot read (KeyError and the like) becomes that by itself. Results are in the host's shape (bus/messages.py); WithRaw adds the
    exchange's own reply.

    public: reads whose answer is the same for everybody; only these are ever cached or shared between accounts.
    contracts: whether it trades futures, so that the session state (contract, direction, leverage) applies to it.
    lookups: by what an order can be found again after an unclear answer: "client_order_id", or nothing.
    """

    public: ClassVar[frozenset[str]]
    contracts: ClassVar[bool]
    lookups: ClassVar[frozenset[str]]

    def __init__(self, name: str, settings: config.Venue) -> None: ...

    async def ticker(self, call: Call, params: Market) -> Ticker: ...
    async def depth(self, call: Call, params: Market) -> Depth: ...
    async def trades(self, call: Call, params: Market) -> list[TradeRow]: ...
    async def records(self, call: Call, params: Records) -> list[Candle]: ...
    async def accounts(self, call: Call, params: Empty) -> list[Balance] | WithRaw: ...
    async def trade(self, call: Call, params: Trade) -> Placed | WithRaw: ...
    async def order(self, call: Call, params: OrderRef) -> Order | WithRaw: ...
    async def orders(self, call: Call, params: OrderList) -> list[Order] | WithRaw: ...
    async def cancel(self, call: Call, params: OrderRef) -> bool | WithRaw: ...


class RawCalls(Protocol):
    """May be offered: `exchange.IO("api", ...)`. The resource is confined to the venue's own hosts."""

    async def api(self, call: Call, params: Api) -> Any: ...


class Contracts(Protocol):
    """Must be offered where contracts is true. margin_level: called when a symbol came with it; else the level goes with an order."""

    async def positions(self, call: Call, params: Positions) -> list[Position] | WithRaw: ...
    async def margin_level(self, call: Call, params: MarginLevel) -> None: ...


class Lookup(Protocol):
    """Must be offered where lookups has "client_order_id": the order, or None where the exchange says there is none."""

    async def find_order(self, call: Call, client_order_id: str, symbol: str) -> Order | None: ...


class Expiry(Protocol):
    """May be offered where an order carries call.expires_at_ms as the exchange's own expiry (recvWindow, expTime, deadline), so that it
    refuses the order from then on: the exchange's clock, UTC in ms. Only with it is an order ever told to be absent."""

    async def time_ms(self, call: Call) -> int: ...


class KnowsMarkets(Protocol):
    """May be offered: what the exchange says about one market, so that an order is made to fit, or told why not, before it is sent.

    Asked once in ten minutes a symbol. Raises for a symbol it does not list.
    """

    async def rules(self, call: Call, symbol: str) -> Rules: ...


VENUES = {
    "bitgo": "workers.venues.bitgo:Bitgo",
    "null": "workers.venues.null:Null",
    "paper": "workers.venues.paper.client:Paper",
}


def available(settings: config.Config) -> dict[str, Venue]:
    """Every exchange this process can serve, by the name hosts use, narrowed by [workers] exchanges.

    paper is there when its address is known, null with --bench only. Raises config.ConfigError for a name or class that is not there.
    """
    points = {point.name: point.value for point in metadata.entry_points(group="fmzbus.venues")}
    classes = points | VENUES
    named = {name: settings.venues.get(name, config.Venue()) for name in classes} | settings.venues
    if not named["paper"].base_url:
        del named["paper"]
    if not settings.bench:
        named.pop("null", None)
    wanted = settings.workers.exchanges or list(named)
    missing = [name for name in wanted if name not in named]
    if missing:
        raise config.ConfigError(f"[workers] exchanges: nothing is known of {', '.join(missing)}; there are {', '.join(sorted(named))}")
    return {name: _load(name, named[name], classes)(name, named[name]) for name in wanted}


def _load(name: str, settings: config.Venue, classes: dict[str, str]) -> type[Venue]:
    target = settings.cls or classes.get(settings.exchange or name)
    if target is None:
        raise config.ConfigError(f"[venues.{name}]: expected exchange = one of {', '.join(sorted(classes))}, or class = 'module:Class'")
    module, _, attribute = target.partition(":")
    try:
        venue: type[Venue] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise config.ConfigError(f"[venues.{name}] {target}: {e}") from e
    return venue
