"""What the sockets tell: requests understood, and for each channel what a new reader is told and what changed since. Pure; no socket here.

A channel remembers what its readers were told last, so that one delta serves them all.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta, Struct

from workers.venues.paper import quotes
from workers.venues.paper.accounts import Changes
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.markets import MARKETS, find
from workers.venues.paper.money import plain
from workers.venues.paper.quotes import MOST_DEPTH, View
from workers.venues.paper.service import LONGEST_INTERVAL

DEFAULT_LEVELS = 100
CHECKED = 25
"""Levels a side that the checksum is over."""

FIRST_TRADES = 50
MOST_SECONDS = 100
MOST_BARS = 10
"""Told at once after a leap of the clock: the tape of so many seconds, so many closed bars. All of it could make any reader too slow."""

Document = dict[str, object]
Levels = Sequence[tuple[int, int]]
"""(price in ticks, lots), best first."""

_text = lru_cache(maxsize=1 << 14)(plain)


class Asked(NamedTuple):
    """A subscription. levels: of depth; interval: of candles, in minutes."""

    channel: str
    symbol: str = ""
    levels: int = 0
    interval: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What a connection can have once; other levels of the same book replace it."""
        return self.channel, self.symbol, self.interval

    def document(self) -> Document:
        """As a request writes it, defaults filled in."""
        return {name: value for name, value in self._asdict().items() if value}


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frame from a client. id: comes back in the answer."""

    op: Literal["subscribe", "unsubscribe", "login", "ping"]
    id: Annotated[str, Meta(max_length=64)] | int | None = None
    args: Annotated[list[msgspec.Raw], Meta(max_length=100)] = []


class Login(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The argument of a login; the fields are the headers of a signed call without `Paper-`."""

    key: str
    timestamp: str | int
    sign: str
    window: str | int = ""
    secret: str | None = None

    def headers(self) -> dict[str, str]:
        named = {"Paper-Key": self.key, "Paper-Timestamp": str(self.timestamp), "Paper-Sign": self.sign, "Paper-Window": str(self.window)}
        return named | ({"Paper-Secret": self.secret} if self.secret is not None else {})


class _Argument(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    channel: Literal["depth", "ticker", "trades", "candles", "orders"]
    symbol: str | None = None
    levels: Annotated[int, Meta(ge=1, le=MOST_DEPTH)] | None = None
    interval: Annotated[int, Meta(ge=1, le=LONGEST_INTERVAL)] | None = None


class _Head(Struct, frozen=True):
    id: Annotated[str, Meta(max_length=64)] | int | None = None
    op: Annotated[str, Meta(max_length=64)] | None = None


_request = msgspec.json.Decoder(Request)
_login = msgspec.json.Decoder(Login)
_argument = msgspec.json.Decoder(_Argument)
_head = msgspec.json.Decoder(_Head)


def head(frame: str) -> Document:
    """The id and op of a frame for the answer to it, null where they cannot be read."""
    try:
        found = _head.decode(frame)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        found = _Head()
    return {"id": found.id, "op": found.op}


def request(frame: str) -> Request:
    """What a frame asks for. Raises Refused."""
    wanted: Request = _decode(_request, frame)
    if not wanted.args and wanted.op in ("subscribe", "unsubscribe", "login"):
        raise Refused(Code.BAD_PARAMETER, f"args: {wanted.op} needs some")
    return wanted


def login(args: list[msgspec.Raw]) -> Login:
    """The one argument of a login. Raises Refused."""
    if len(args) != 1:
        raise Refused(Code.BAD_PARAMETER, "args: a login has one")
    found: Login = _decode(_login, args[0])
    return found


def asked(argument: msgspec.Raw) -> Asked:
    """One argument of a subscribe or unsubscribe. Raises Refused."""
    found: _Argument = _decode(_argument, argument)
    channel = found.channel
    for name, has, needs in (
        ("symbol", channel != "orders", channel != "orders"),
        ("levels", channel == "depth", False),
        ("interval", channel == "candles", channel == "candles"),
    ):
        given = getattr(found, name) is not None
        if given and not has:
            raise Refused(Code.BAD_PARAMETER, f"{name}: the channel {channel} does not take it")
        if needs and not given:
            raise Refused(Code.BAD_PARAMETER, f"{name}: the channel {channel} needs it")
    symbol = find(found.symbol).symbol if found.symbol is not None else ""
    levels = (found.levels or DEFAULT_LEVELS) if channel == "depth" else 0
    return Asked(channel, symbol, levels, found.interval or 0)


def compression(query: Mapping[str, str]) -> str:
    """How the messages of a connection are packed: "" (not), "gzip" or "deflate_raw". Raises Refused."""
    value = query.get("compress", "")
    if value not in ("", "gzip", "deflate_raw"):
        raise Refused(Code.BAD_PARAMETER, "compress: expected gzip or deflate_raw")
    return value


def packed(text: bytes, compress: str) -> bytes:
    """A message as it goes out."""
    if not compress:
        return text
    packer = zlib.compressobj(1, zlib.DEFLATED, 31 if compress == "gzip" else -15)
    return packer.compress(text) + packer.flush()


class Trouble(NamedTuple):
    """What armed faults do to the next delta of a book. crossed: ticks by which a bid stands above the best ask."""

    gap: bool = False
    bad_checksum: bool = False
    crossed: int = 0


FINE = Trouble()


class Channel(Protocol):
    def first(self, view: View) -> Document:
        """What a new reader is told; the channel goes on from what it told last, which is `view` or nothing."""

    def updates(self, view: View, trouble: Trouble) -> Iterator[Document]:
        """What changed since the last call, in the order in which it is to be told."""


def channel(wanted: Asked, view: View) -> Channel:
    """A channel that has just told what `view` shows."""
    match wanted.channel:
        case "depth":
            return _Depth(wanted.levels, view)
        case "ticker":
            return _Ticker(view)
        case "trades":
            return _Trades(view)
        case _:
            return _Candles(wanted.interval, view)


def snapshot(symbol: str, *, levels: int, time_ms: int, sequence: int, asks: Levels, bids: Levels) -> Document:
    """The first message of a depth subscription."""
    asks, bids = asks[:levels], bids[:levels]
    return {
        "channel": "depth",
        "symbol": symbol,
        "time": time_ms,
        "type": "snapshot",
        "levels": levels,
        "sequence": sequence,
        "checksum": checksum(_rows(symbol, bids[:CHECKED]), _rows(symbol, asks[:CHECKED])),
        "asks": _rows(symbol, asks),
        "bids": _rows(symbol, bids),
    }


def checksum(bids: Sequence[Sequence[str]], asks: Sequence[Sequence[str]]) -> int:
    """CRC-32 over the best levels as text, a bid and an ask in turn: see the README."""
    words = []
    for place in range(min(CHECKED, max(len(bids), len(asks)))):
        words += [word for side in (bids, asks) for word in side[place : place + 1]]
    return zlib.crc32(":".join(text for row in words for text in row).encode())


class _Depth:
    def __init__(self, levels: int, view: View) -> None:
        self.levels = levels
        self.sequence = view.book.sequence
        self.asks, self.bids = dict(view.asks[:levels]), dict(view.bids[:levels])

    def first(self, view: View) -> Document:
        return snapshot(view.symbol, levels=self.levels, time_ms=view.now_ms, sequence=view.book.sequence, asks=view.asks, bids=view.bids)

    def updates(self, view: View, trouble: Trouble) -> Iterator[Document]:
        asks, bids = view.asks[: self.levels], view.bids[: self.levels]
        if trouble.crossed and asks:
            bids = [(asks[0][0] + trouble.crossed, 1), *bids][: self.levels]
        before, self.sequence = self.sequence, view.book.sequence
        old_asks, self.asks = self.asks, dict(asks)
        old_bids, self.bids = self.bids, dict(bids)
        if trouble.gap:
            return
        check = checksum(_rows(view.symbol, bids[:CHECKED]), _rows(view.symbol, asks[:CHECKED]))
        yield {
            "channel": "depth",
            "symbol": view.symbol,
            "time": view.now_ms,
            "type": "delta",
            "levels": self.levels,
            "sequence": self.sequence,
            "previous": before,
            "checksum": check ^ 1 if trouble.bad_checksum else check,
            "asks": _rows(view.symbol, _changed(old_asks, self.asks)),
            "bids": _rows(view.symbol, _changed(old_bids, self.bids)),
        }


class _Ticker:
    def __init__(self, view: View) -> None:
        self.told = (view.book.second, view.best)

    def first(self, view: View) -> Document:
        return {"channel": "ticker"} | quotes.ticker(view.engine, view.symbol, view.now_ms)

    def updates(self, view: View, trouble: Trouble) -> Iterator[Document]:
        now = (view.book.second, view.best)
        if now != self.told:
            self.told = now
            yield self.first(view)


class _Trades:
    def __init__(self, view: View) -> None:
        self.second, self.number = view.book.second, view.engine.next_trade - 1

    def first(self, view: View) -> Document:
        return self._document("snapshot", view, quotes.trades(view.engine, view.symbol, FIRST_TRADES))

    def updates(self, view: View, trouble: Trouble) -> Iterator[Document]:
        new = quotes.trades_after(view.engine, view.symbol, max(self.second, view.book.second - MOST_SECONDS), self.number)
        self.second, self.number = view.book.second, view.engine.next_trade - 1
        if new:
            yield self._document("update", view, new)

    def _document(self, kind: str, view: View, trades: list[Document]) -> Document:
        return {"channel": "trades", "symbol": view.symbol, "time": view.now_ms, "type": kind, "trades": trades}


class _Candles:
    def __init__(self, interval: int, view: View) -> None:
        self.interval = interval
        self.second, self.start_ms = view.book.second, self._start_ms(view)

    def first(self, view: View) -> Document:
        return self._document(view, self._bars(view, 1)[-1], closed=False)

    def updates(self, view: View, trouble: Trouble) -> Iterator[Document]:
        if view.book.second == self.second:
            return
        start_ms = self._start_ms(view)
        over = min((start_ms - self.start_ms) // (self.interval * 60_000), MOST_BARS)
        self.second, self.start_ms = view.book.second, start_ms
        *closed, present = self._bars(view, over + 1)
        for bar in closed:
            yield self._document(view, bar, closed=True)
        yield self._document(view, present, closed=False)

    def _start_ms(self, view: View) -> int:
        seconds = self.interval * 60
        return view.book.second // seconds * seconds * 1000

    def _bars(self, view: View, count: int) -> list[list[object]]:
        now_ms = view.book.second * 1000
        return quotes.candles(view.engine.seed, view.symbol, interval=self.interval, limit=count, end_ms=now_ms + 1, now_ms=now_ms)

    def _document(self, view: View, bar: list[object], *, closed: bool) -> Document:
        head = {"channel": "candles", "symbol": view.symbol, "time": view.now_ms, "interval": self.interval}
        return head | {"closed": closed, "candle": bar}


def open_orders(engine: Engine, account: int, sequence: int, now_ms: int) -> Document:
    """The first message of an orders subscription; sequence: that of the account's last change."""
    orders = [order.document() for order in engine.open_orders.get(account, {}).values()]
    return {"channel": "orders", "symbol": "", "time": now_ms, "type": "snapshot", "sequence": sequence, "orders": orders}


def order_updates(changes: Changes, now_ms: int) -> Iterator[tuple[int, Document]]:
    """(account, message without its sequence) for each fill, then for each order as it stands after all that happened in this moment."""
    for fill in changes.fills:
        head: Document = {"channel": "orders", "symbol": fill.symbol, "time": now_ms, "type": "fill"}
        yield fill.account, head | {"fill": fill.document()}
    for order in changes.orders.values():
        head = {"channel": "orders", "symbol": order.symbol, "time": now_ms, "type": "order"}
        yield order.account, head | {"order": order.document()}


def _changed(old: dict[int, int], new: dict[int, int]) -> list[tuple[int, int]]:
    rows = [(price, lots) for price, lots in new.items() if old.get(price) != lots]
    return rows + [(price, 0) for price in old if price not in new]


def _rows(symbol: str, levels: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
    tick, lot = MARKETS[symbol].tick, MARKETS[symbol].lot
    return [(_text(price * tick), _text(lots * lot)) for price, lots in levels]


def _decode(decoder: msgspec.json.Decoder[Any], text: str | msgspec.Raw) -> Any:
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as e:
        raise Refused(Code.BAD_PARAMETER, str(e)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as e:
        reason = "nested too deep" if isinstance(e, RecursionError) else "expected JSON"
        raise Refused(Code.BAD_BODY, f"frame: {reason}") from None
