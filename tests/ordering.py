"""Workers in this process, as workers/__main__.py puts them together, and the paper exchange that they trade on: for tests of orders."""

import asyncio
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from pathlib import Path
from time import time
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Raw, Struct

from bridge.caller import Caller, calling
from bus import config, fleet, server, subjects
from bus.connection import Bus, connected
from bus.journal import Entry, Intent, Journal, Outcome
from bus.lifecycle import running
from bus.messages import Api, Failure, OrderRef, Placed, Reply, Request, Success, Trade, decode_reply, decode_request, encode_exact
from bus.metrics import Metrics
from bus.seal import MAC_SIZE, Opener, Sealer, frame
from bus.sessions import Sessions
from tests import paper, servers
from tests.rig import Rig
from workers import http
from workers.calls import Calls
from workers.guard import guarding
from workers.http import Call
from workers.orders import Orders
from workers.settle import Settler
from workers.venues import Venue
from workers.venues.paper.client import Paper

T = TypeVar("T")

SETTLE_AFTER_S = 0.3
LEFT_S = 2.0
"""The deadline of a request, from when it is asked."""


class Account(Struct, frozen=True):
    """The keys of one host."""

    access_key: str
    secret_key: str


def account() -> Account:
    """Keys that nobody else has."""
    return Account(f"key-{secrets.token_hex(6)}", f"secret-{secrets.token_hex(12)}")


def key() -> str:
    return secrets.token_hex(16)


class Worker:
    """One worker without its pool: what reaches it is handed to it. state: the folder with the sealing keys."""

    def __init__(self, state: Path, bus: Bus, journal: Journal, settler: Settler, calls: Calls, caller: Caller) -> None:
        self.bus = bus
        self.journal = journal
        self.settler = settler
        self._calls = calls
        self._caller = caller
        self._sealer = Sealer(state / "keys")

    def frame(
        self, method: str, params: Struct, who: Account, *, named: str, left_s: float = LEFT_S, exchange: str = "paper", path: str = ""
    ) -> bytes:
        """A request as a bridge sends it. named: its idempotency key."""
        key_id, sealed, mac_key = self._sealer.box(who.access_key, who.secret_key)
        now_ms = self.bus.now_ms()
        request = Request(
            exchange=exchange,
            path=path or exchange,
            method=method,
            params=Raw(encode_exact(params)),
            expires_at_ms=now_ms + int(left_s * 1000),
            idempotency_key=named,
            key_id=key_id,
            sealed=sealed,
            asked_ms=now_ms,
        )
        return frame(encode_exact(request), mac_key)

    async def answer(self, data: bytes, *, told: bool = True) -> Reply:
        """told: whether its host has the answer, or has hung up; the bridge says so."""
        reply = decode_reply(await self._calls.answer(data))
        if isinstance(reply, Success) and reply.tell:
            key = decode_request(memoryview(data)[MAC_SIZE:]).idempotency_key
            await self._caller.told(reply.tell, key, arrived=told)
            await until(lambda: self._has_heard(key))
        return reply

    async def _has_heard(self, key: str) -> bool:
        return key not in self.settler._answered or key in self.settler._owed

    async def trade(self, who: Account, order: Trade | None = None, *, named: str = "", **options: Any) -> Reply:
        return await self.answer(self.frame("trade", order or buy(), who, named=named or key(), **options))

    async def cancel(self, who: Account, order_id: str, *, named: str = "", **options: Any) -> Reply:
        return await self.answer(self.frame("cancel", OrderRef(id=order_id, symbol="BTC_USDT"), who, named=named or key(), **options))

    async def raw(self, who: Account, resource: str, query: dict[str, str], *, named: str = "", **options: Any) -> Reply:
        return await self.answer(self.frame("__api", Api(resource=resource, query=query), who, named=named or key(), **options))

    async def entry(self, named: str, exchange: str = "paper") -> Entry | None:
        """What the journal knows of an order."""
        held = await self.journal.held(exchange, named)
        settled = await self.journal.settled(exchange, named)
        return settled or (held.entry if held else None)

    async def outcome(self, named: str, exchange: str = "paper") -> Outcome | None:
        entry = await self.entry(named, exchange)
        return entry.outcome if entry else None

    async def intent(self, named: str, exchange: str = "paper") -> Intent:
        entry = await self.entry(named, exchange)
        assert entry is not None
        return entry.intent

    async def unsettled(self) -> set[str]:
        """Keys of the orders without an outcome, or not let go yet."""
        return {place.split(".")[2] for place in await self.journal.unsettled()}


def buy(amount: str = "0.01", price: str = "1000", side: Any = "buy", symbol: str = "BTC_USDT") -> Trade:
    """A limit order that rests, on the paper exchange."""
    return Trade(symbol=symbol, side=side, price=Decimal(price), amount=Decimal(amount))


def error(reply: Reply) -> str:
    """The text that its host reads."""
    assert isinstance(reply, Failure), reply
    return reply.error.text


def placed(reply: Reply) -> str:
    """The id of the order."""
    assert isinstance(reply, Success), reply
    return str(msgspec.json.decode(reply.data)["id"])


def unknown(named: str) -> str:
    """A pattern for what a host is told about an order whose fate is not known."""
    return rf"outcome unknown: .*; client order id {named}$"


class Mute:
    """A venue without look-ups; its exchange answers as scripted."""

    public = frozenset[str]()
    contracts = False
    lookups = frozenset[str]()

    def __init__(self, base_url: str) -> None:
        self._base = base_url

    async def trade(self, call: Call, params: Trade) -> Placed:
        return Placed((await call.send("POST", f"{self._base}/order")).json()["id"])

    async def api(self, call: Call, params: Any) -> Any:
        return (await call.send("POST", f"{self._base}/raw")).json()


async def until(question: Callable[[], Awaitable[T]], within_s: float = 10) -> T:
    """Ask until the answer is a true one; only asking tells."""
    async with asyncio.timeout(within_s):
        while not (answer := await question()):  # noqa: ASYNC110 - as servers.eventually
            await asyncio.sleep(0.02)
    return answer


@asynccontextmanager
async def working(
    state: Path, venues: Mapping[str, Venue], *, settling: bool = True, announced: bool = True, **settings: Any
) -> AsyncIterator[Worker]:
    """A worker of its own connection, with a worker's rights. settling: whether it settles behind. settings: of [orders]."""
    orders = config.Orders(**({"settle_after_s": SETTLE_AFTER_S} | settings))
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bus = await enter(connected(server.url(state, "worker"), "worker", closed=lambda: None))
        sessions, journal = Sessions(bus), Journal(bus, orders)
        await sessions.open()
        await journal.open()
        exchanges = await enter(http.opened({}, 5.0, metrics))
        heard = await enter(fleet.followed(bus))
        guard = await enter(guarding(bus, config.Config(orders=orders)))
        opener = Opener(state / "keys")
        settler = Settler(bus, journal, opener, venues, exchanges, heard, orders, metrics)
        calls = Calls(bus, opener, sessions, venues, exchanges, metrics, Orders(bus, journal, settler, guard, orders))
        if announced:
            await enter(fleet.announced(bus, admin="", version="test", serves=sorted(venues), ready=lambda: True))
        if settling:
            await enter(running(settler.run()))
        await bus.nc.subscribe(subjects.told(bus.process), cb=settler.hear)
        caller = await enter(calling(await enter(connected(server.url(state, "bridge"), "bridge", closed=lambda: None)), metrics))
        yield Worker(state, bus, journal, settler, calls, caller)


@asynccontextmanager
async def trading(folder: Path) -> AsyncIterator[tuple[Rig, dict[str, Venue]]]:
    """The paper exchange in this process by the true time, and what a worker needs to serve it."""
    async with paper.exchange(folder, time) as client:
        yield Rig(client, paper.Clock(), folder), {"paper": cast("Venue", Paper("paper", config.Venue(base_url=client.base)))}


async def executed(rig: Rig, who: Account) -> list[tuple[str, str]]:
    """What the exchange executed for an account: (client order id, id) of each order, by its ledger."""
    mine = rig.client.other(who.access_key, who.secret_key)
    rows = await rig.ledger()
    ids = {row["id"] for half in ("", "/history") for row in await mine.get(f"/api/v1/orders{half}")}
    return [
        (row["client_order_id"], row["order_id"]) for row in rows if row["executed"] and row["verb"] == "POST" and row["order_id"] in ids
    ]


async def received(rig: Rig, named: str) -> list[dict[str, Any]]:
    """The ledger's rows of orders with this client order id."""
    rows = [row for row in await rig.ledger(f"?client_order_id={named}") if row["verb"] == "POST"]
    return cast("list[dict[str, Any]]", rows)


@asynccontextmanager
async def stopped(nats: servers.Running) -> AsyncIterator[None]:
    """Until left it is as a machine that hangs: its connections stay, and what is sent to it waits."""
    nats.send(signal.SIGSTOP)
    await servers.eventually(lambda: ") T " in Path(f"/proc/{nats.process.pid}/stat").read_text())
    try:
        yield
    finally:
        if nats.process.returncode is None:
            nats.send(signal.SIGCONT)
