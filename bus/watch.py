"""`fmzbus watch`: ticker and book of one market as the feeders tell them, with age, rate and source; and how a strategy gets the same."""

import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Annotated
from urllib.parse import quote, urlsplit

import msgspec
import typer
from msgspec import Raw, Struct
from rich.console import Group
from rich.live import Live
from rich.text import Text

from bus import call, fleet, server, subjects
from bus.config import Ages, Config
from bus.connection import Bus
from bus.errors import BusError
from bus.follow import Follower, following
from bus.lifecycle import running
from bus.market import Entry
from bus.terminal import NO_BUS, ConfigFile, StateDir, configured, err, failed, on_the_bus, out, service_address, table

app = typer.Typer()

KINDS = ("ticker", "depth")
LOOK_S = 0.1
"""How often the screen is drawn, and what grew stale is noticed."""
PATIENCE_S = 3.0
"""Without a first value for so long, it is said why; and so often a market that nobody knows is asked for again."""
RATE_S = 5.0
"""The rate is that of the last so many seconds."""
ASK_S = 10.0
PLAYER = "watch"
"""Both keys of the question whether there is such a market: it needs none of a real account."""

Side = list[tuple[Raw, Raw]]


class Book(Struct):
    """A depth, its numbers as they were told."""

    time: Raw
    asks: Side
    bids: Side


class Reply(Struct):
    data: Raw = Raw(b"null")
    error: str = ""


class View(Struct, kw_only=True, omit_defaults=True):
    """One kind at one moment. data: only while it is fresh, depth cut to the levels asked for; why, do: else, in plain words.
    age_ms: since it was proven; rate: values a second; n: its number in the feeder's epoch; time_ms: of this view, bus time."""

    time_ms: int
    exchange: str
    symbol: str
    kind: str
    fresh: bool
    age_ms: int = -1
    rate: float = 0.0
    feeder: str = ""
    epoch: int = 0
    n: int = 0
    data: Raw | None = None
    why: str = ""
    do: str = ""


class Watched:
    """One market. changes: a view of each value that is proven, and one when a kind stops being fresh."""

    def __init__(self, bus: Bus, follower: Follower, heard: fleet.Fleet, exchange: str, symbol: str, levels: int) -> None:
        self._bus = bus
        self._follower = follower
        self._heard = heard
        self._market = (exchange, symbol)
        self._levels = levels
        self._began_s = time.monotonic()
        self._told_s: dict[str, deque[float]] = {kind: deque() for kind in KINDS}
        self._seen: dict[str, object] = {}
        self.changes: asyncio.Queue[View] = asyncio.Queue()

    def hear(self, entry: Entry) -> None:
        if not entry.withdrawn:
            self._told_s[entry.kind].append(time.monotonic())
        self._look(entry.kind)

    async def keep_looking(self) -> None:
        """What a beat proves, or time makes stale, is told by no value."""
        while not self._bus.nc.is_closed:
            for kind in KINDS:
                self._look(kind)
            await asyncio.sleep(LOOK_S)
        raise failed("the bus closed the connection for good")

    def _look(self, kind: str) -> None:
        view = self.view(kind)
        seen = (view.epoch, view.n) if view.fresh else view.why
        early = kind not in self._seen and not view.fresh and time.monotonic() - self._began_s < PATIENCE_S
        if not early and self._seen.get(kind) != seen:
            self._seen[kind] = seen
            self.changes.put_nowait(view)

    def view(self, kind: str) -> View:
        exchange, symbol = self._market
        content = self._follower.find((exchange, kind, symbol))
        entry = self._follower.entries[exchange, kind, symbol]
        view = View(time_ms=self._bus.now_ms(), exchange=exchange, symbol=symbol, kind=kind, fresh=content is not None)
        view.rate = self._rate(kind)
        if entry.shard is not None:
            view.feeder, view.epoch, view.n = entry.shard.feeder, entry.epoch, entry.n
            age_s = self._follower.age_s(entry)
            view.age_ms = int(age_s * 1000) if math.isfinite(age_s) else -1
        if content is None:
            view.why, view.do = self._reason(entry)
        else:
            view.data = _cut(kind, msgspec.json.decode(content, type=Reply).data, self._levels)
        return view

    def _rate(self, kind: str) -> float:
        now_s, told_s = time.monotonic(), self._told_s[kind]
        while told_s and told_s[0] < now_s - RATE_S:
            told_s.popleft()
        return round(len(told_s) / min(RATE_S, max(now_s - self._began_s, 1.0)), 1)

    def _reason(self, entry: Entry) -> tuple[str, str]:
        """Why a value is not fresh, and what to do about it."""
        feeders = [one for one in self._heard.alive() if one.role == "feeder"]
        feeds = [one.feeds[entry.exchange] for one in feeders if entry.exchange in one.feeds]
        if not self._bus.nc.is_connected:
            return "no connection to the bus", "is it running?"
        if not feeders:
            return "no feeder", "start one: `fmzbus feeder`, or `fmzbus up --feeders 1`"
        if not feeds:
            return (
                f"no feeder feeds {entry.exchange}",
                "see `fmzbus status`: does the exchange offer a socket, do [market] exchanges name it?",
            )
        if not any(entry.kind in feed.kinds for feed in feeds):
            return f"no feeder feeds {entry.kind} of {entry.exchange}", "workers answer it: `fmzbus call`"
        if entry.epoch and entry.withdrawn:
            return msgspec.json.decode(entry.content, type=Reply).error, "its feeder tries again by itself; see `fmzbus logs feeder`"
        if not entry.epoch:
            return "nothing told yet", "see `fmzbus status` (waiting, refused) and `fmzbus logs feeder`"
        return "stale", f"not proven within {entry.max_age_s:g} s; see `fmzbus status` (provable) and `fmzbus logs feeder`"


def _cut(kind: str, data: Raw, levels: int) -> Raw:
    if kind != "depth":
        return data
    book = msgspec.json.decode(data, type=Book)
    return Raw(msgspec.json.encode(Book(book.time, book.asks[:levels], book.bids[:levels])))


# ---------------------------------------------------------------- what is shown


def line(view: View) -> str:
    """A view in one line: time, kind, values, and where they come from."""
    at = datetime.fromtimestamp(view.time_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return (
        f"{at} {view.kind} {_values(view.kind, view.data)}  ({_source(view)})"
        if view.data is not None
        else f"{at} {view.kind} {_source(view)}"
    )


def _values(kind: str, data: Raw) -> str:
    if kind == "ticker":
        ticker = msgspec.json.decode(data, type=dict[str, Raw])
        return " ".join(f"{name} {_text(ticker[name])}" for name in ("last", "buy", "sell", "high", "low", "vol") if name in ticker)
    book = msgspec.json.decode(data, type=Book)
    sides = (("bids", book.bids), ("asks", book.asks))
    return " ".join(" ".join([name, *(f"{_text(price)}x{_text(amount)}" for price, amount in side)]) for name, side in sides)


def _source(view: View) -> str:
    if view.data is None:
        return f"{view.why}: {view.do}; still trying"
    return f"{view.age_ms} ms old, {view.rate:g}/s, {view.feeder} epoch {view.epoch} n {view.n}"


def _text(number: Raw) -> str:
    return bytes(number).decode()


def screen(ticker: View, depth: View, levels: int) -> Group:
    """Both on a terminal. Nothing that is not fresh is shown."""
    head = Text(f"{ticker.exchange} {ticker.symbol}  ", style="bold")
    head.append(_values(ticker.kind, ticker.data) if ticker.data is not None else "", style="not bold")
    sources = [Text(f"{view.kind:7} {_source(view)}", style="dim" if view.fresh else "yellow") for view in (ticker, depth)]
    rows = table("amount", "bid", "ask", "amount")
    for column in rows.columns:
        column.justify = "right"
    book = msgspec.json.decode(depth.data, type=Book) if depth.data is not None else Book(Raw(b"0"), [], [])
    for level in range(levels):
        bid, ask = (tuple(map(_text, side[level])) if level < len(side) else ("", "") for side in (book.bids, book.asks))
        rows.add_row(bid[1], Text(bid[0], style="green"), Text(ask[0], style="red"), ask[1])
    return Group(head, *sources, rows)


# ---------------------------------------------------------------- the command


@app.command("watch")
def watch_command(
    exchange: Annotated[str, typer.Argument(help="As in the service address: paper, okx.")],
    symbol: Annotated[str, typer.Argument(help="As robots write it, a contract with it: BTC_USDT, BTC_USDT.swap.")],
    levels: Annotated[int, typer.Option(min=1, max=200, help="Of each side of the book.")] = 10,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many values; default: never.")] = None,
    dial: Annotated[bool, typer.Option("--dial", help="Print instead where a strategy's Dial() gets the same.")] = False,  # noqa: FBT002 - typer's own way
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object a line.")] = False,  # noqa: FBT002 - as above
    url: Annotated[str | None, typer.Option(help="Of the bridge; default the system that runs on this state folder.")] = None,
    config: ConfigFile = None,
    state: StateDir = None,
) -> None:
    """Show ticker and book live, as the feeders tell them: only what is proven to be fresh, with its age, rate and source.

    Where the output is no terminal, one line for each value, and one when a kind stops being fresh.

    \b
    fmzbus watch paper BTC_USDT
    fmzbus watch paper BTC_USDT.swap --json --count 100 > values.jsonl
    fmzbus watch paper BTC_USDT --dial
    """
    settings = configured(config, state)
    exchange = exchange.lower()
    address = url or service_address(settings)
    try:
        for text, what in ((exchange, "exchange"), (symbol, "symbol")):
            subjects.token(subjects.name(text, what))
    except BusError as e:
        raise failed(e.text) from None
    if dial:
        _tell_dials(settings, address, exchange, symbol, as_json=as_json)
        return
    try:
        _wait_for_market(address, exchange, symbol)
        on_the_bus(
            settings, lambda bus: _show(bus, settings.market.max_age_s, exchange, symbol, levels, count or math.inf, as_json), math.inf
        )
    except TimeoutError:
        raise failed(NO_BUS) from None
    except KeyboardInterrupt:
        pass


def _wait_for_market(address: str, exchange: str, symbol: str) -> None:
    """Only what a worker answers for may be wished of feeders. Returns when one does, or where no bridge is there to be asked."""
    told = ""
    while True:
        request = call.body("ticker", [f"symbol={symbol}"], PLAYER, PLAYER)
        try:
            reply = msgspec.json.decode(call.post(address, exchange, request, timeout_s=ASK_S).body, type=Reply)
        except (OSError, HTTPException, msgspec.MsgspecError) as e:
            err.print(f"no bridge answers at {address} ({e}): whether there is a {symbol} on {exchange} was not asked")
            return
        if not reply.error:
            return
        if reply.error != told:
            told = reply.error
            err.print(f"{exchange} {symbol}: {told}\nit is asked again every {PATIENCE_S:g} s; Ctrl-C ends this")
        time.sleep(PATIENCE_S)


@asynccontextmanager
async def _watching(bus: Bus, ages: Ages, exchange: str, symbol: str, levels: int) -> AsyncIterator[Watched]:
    async with (
        fleet.followed(bus) as heard,
        following(bus, msgspec.structs.asdict(ages), told=lambda entry: watched.hear(entry)) as follower,
    ):
        watched = Watched(bus, follower, heard, exchange, symbol, levels)
        for kind in KINDS:
            await follower.follow((exchange, kind, symbol))
        async with running(watched.keep_looking()):
            yield watched


async def _show(bus: Bus, ages: Ages, exchange: str, symbol: str, levels: int, left: float, as_json: bool) -> None:  # noqa: FBT001 - private
    async with _watching(bus, ages, exchange, symbol, levels) as watched:
        if as_json or not sys.stdout.isatty():
            while left > 0:
                view = await watched.changes.get()
                out.print(msgspec.json.encode(view).decode() if as_json else line(view))
                sys.stdout.flush()
                left -= view.fresh
            return
        with Live(console=out, auto_refresh=False) as live:
            while left > 0:
                await asyncio.sleep(LOOK_S)
                while not watched.changes.empty():
                    left -= watched.changes.get_nowait().fresh
                live.update(screen(watched.view("ticker"), watched.view("depth"), levels), refresh=True)


def _tell_dials(settings: Config, address: str, exchange: str, symbol: str, *, as_json: bool) -> None:
    if not settings.nats.url and not server.was_set_up(settings.state_path):
        raise failed(NO_BUS)
    addresses = dials(settings, address, exchange, symbol)
    if as_json:
        out.print(msgspec.json.encode(addresses).decode())
        return
    for one in addresses.values():
        out.print(one)
    err.print("Each message is a finished reply, {data} or {error}. In place of ticker: depth, trades, candles (of 1 minute), candles-15.")
    if settings.nats.url:
        err.print("[nats] url is a server of your own: give it a user `reader` who may subscribe to feed.> and publish nothing.")
    if not settings.nats.mqtt_port:
        err.print("MQTT is off: [nats] mqtt_port turns it on.")


def dials(settings: Config, address: str, exchange: str, symbol: str) -> dict[str, str]:
    """What Dial() is given for the ticker of a market, by protocol; without "mqtt" where [nats] mqtt_port is 0."""
    if settings.nats.url:
        parts = urlsplit(settings.nats.url.partition(",")[0].strip())
        host, bus = parts.hostname or server.HOST, f"reader:<password>@{parts.hostname}:{parts.port or 4222}"
    else:
        host, bus = server.HOST, server.url(settings.state_path, "reader").removeprefix("nats://")
    topic = subjects.feed(exchange, "ticker", symbol)
    found = {
        "ws": f"ws://{urlsplit(address).netloc}/stream/{exchange}/ticker/{quote(symbol, safe='')}",
        "nats": f"nats://{bus}?topic={topic}",
    }
    if settings.nats.mqtt_port:
        user = bus.rpartition("@")[0]
        found["mqtt"] = f"mqtt://{user}@{host}:{settings.nats.mqtt_port}?topic={topic.replace('.', '/')}"
    return found
