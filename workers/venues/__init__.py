"""What a venue is, and how one is found.

A venue is one class in one file: `Venue` below is all that it must offer. It is found by name: a row of VENUES, an entry point of
group `fmzbus.venues`, or `[venues.NAME] class = "module:Class"`. One instance serves every account; the keys come with each call.
"""

import importlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any, ClassVar, Protocol, runtime_checkable

from bus import config
from bus.messages import (
    Api,
    Balance,
    Candle,
    Depth,
    Empty,
    Level,
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
from workers.updates import Channel, Update

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


@runtime_checkable
class Feed(Protocol):
    """May be offered: the exchange's socket, as pure functions. workers/lines.py keeps the connections, workers/desk.py the values; a
    venue that offers it lets `ticker` and `depth` be called without keys, by which quiet markets are proven.

    Updates should carry time_ms, and the venue offer time_ms() (Expiry): else a frame is only proven by the socket's pings, and an exchange
    that answers those ahead of late frames makes them look new.

    feeds: kinds of workers/updates.py. per_socket: channels that one connection may have. requests_per_s: frames that one connection
    may send. keepalive: a frame that the exchange wants to hear every 15 s, "" where WebSocket's own pings do.
    """

    feeds: ClassVar[frozenset[str]]
    per_socket: ClassVar[int]
    requests_per_s: ClassVar[float]
    keepalive: ClassVar[str]

    def socket_url(self) -> str:
        """ "wss://..."; "" where there is none now, and nothing is fed."""

    def channel(self, kind: str, symbol: str, period_m: int) -> Channel:
        """What feeds a symbol in the host's spelling, with its contract. Raises BadRequest for one that cannot be."""

    def subscribe(self, channels: Sequence[Channel], levels: int) -> list[str]:
        """The frames that ask for channels, at most per_socket. levels: that a book should have at least, where one can choose."""

    def unsubscribe(self, channels: Sequence[Channel], levels: int) -> list[str]: ...

    def parse(self, frame: bytes) -> Sequence[Update]:
        """What a frame tells; nothing, where it tells of something else. Raises ValueError, LookupError, TypeError or msgspec's errors
        for what is not of the form that the exchange documents."""

    def checksum(self, bids: Sequence[Level], asks: Sequence[Level]) -> int | None:
        """That of a book, best levels first, as the exchange makes it; None where it makes none."""


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
