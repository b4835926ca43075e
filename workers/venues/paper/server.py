"""The paper exchange over HTTP: who calls, how often, what is written down first, and the reply. `serving()` runs it.

An order request with a right signature is on disk before anything else is decided about it, and completed in the transaction that
writes what it changed; every reply waits until all that it could tell of is committed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

from aiohttp import web

from workers.venues.paper import auth, control, fees, intake, ledger, replies, schema
from workers.venues.paper.connection import PATH
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.faults import Encounter, Faults
from workers.venues.paper.history import History
from workers.venues.paper.limits import Limiter
from workers.venues.paper.service import Call, Route, route
from workers.venues.paper.sockets import Sockets
from workers.venues.paper.store import Store, database

log = logging.getLogger(__name__)

LIMIT_A_MINUTE = 60_000
"""Weight a key, or an address without one, may use in a minute."""

LARGEST_BODY = 64 * 1024

TICK_S = 0.25
"""How often resting orders meet the market while nobody asks."""


class Exchange:
    """The HTTP side of one exchange."""

    def __init__(
        self, *, engine: Engine, store: Store, holders: dict[str, auth.Holder], clock: Callable[[], float], limit: int, faults: Faults
    ) -> None:
        self.engine = engine
        self.store = store
        self.holders = holders
        self.clock = clock
        self.limiter = Limiter(limit)
        self.faults = faults
        self.marks: list[tuple[bool | None, int]] = []
        self.history = History(engine.seed, step_ms=engine.step_ms, since_ms=int(clock() * 1000))
        self.sockets = Sockets(
            engine=engine,
            store=store,
            holders=holders,
            limiter=self.limiter,
            clock=clock,
            faults=faults,
            history=self.history,
            bind=self._bind,
            settle=self._write_changes,
        )
        self.next_account = max((holder.account for holder in holders.values()), default=0) + 1

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, as far as the armed faults allow. Raises nothing but CancelledError."""
        reply = await self._answer(request)
        if reply.code == 0 and request.method == "GET" and request.path == PATH:
            try:
                return await self.sockets.serve(request)
            except Refused as e:
                reply = replies.refused(e, self._headers(f"address {request.remote}"))
        delivered = await replies.send(request, reply)
        if reply.entry is not None:
            self.marks.append((delivered, reply.entry))
        return reply.response

    async def _answer(self, request: web.BaseRequest) -> replies.Reply:
        caller = f"address {request.remote}"
        try:
            target = request.raw_path
            path = _clean(unquote(target.partition("?")[0]))
            found, argument = route(request.method, path)
            body = await _body(request)
            met = self._meet(request, path, argument, body)
            if slow := met.take("latency"):
                await asyncio.sleep(slow.seconds)
            call = Call(
                self.engine,
                self.store,
                self.history,
                self._write_changes,
                account=0,
                verb=request.method,
                path=path,
                argument=argument,
                query=request.query,
                body=body,
                now_ms=int(self.clock() * 1000),
            )
            if skew := met.take("clock-skew"):
                call.skew_ms = int(skew.seconds * 1000)
            if not found.recorded and (reply := replies.stopped(met)):
                return reply
            if not found.signed:
                self.limiter.charge(caller, found.weight, self.clock())
                return replies.told(await self._serve(found, call, met), self._headers(caller), met)
            try:
                holder, stamp = auth.identify(request.headers, self.holders, verb=request.method, target=target, body=body)
            except Refused:
                self.limiter.charge(caller, found.weight, self.clock())
                raise
            if not holder.account:  # before an account is opened for it, a new key is looked at as closely as an old one
                self.limiter.charge(caller, found.weight, self.clock())
                stamp.check(call.now_ms + call.skew_ms)
            call.account = holder.account or self._bind(holder, call.now_ms)
            caller = f"account {call.account}"
            if found.recorded:
                return await self._record(found, call, stamp, caller, target, met)
            self._admit(found, stamp, caller, call)
            return replies.told(await self._serve(found, call, met), self._headers(caller), met)
        except Refused as e:
            return replies.refused(e, self._headers(caller))
        except Exception:
            log.exception("unhandled error")
            return replies.refused(Refused(Code.INTERNAL, "internal error, see the exchange's log"), self._headers(caller))

    async def tick(self) -> None:
        """Let resting orders fill by themselves, for ever."""
        while True:
            self.engine.advance_all(int(self.clock() * 1000))
            self.sockets.tick()
            self._write_changes()
            self.write_marks()
            # At the latest when the market moves next.
            step_s = self.engine.step_ms / 1000
            await asyncio.sleep(min(TICK_S, max(0.001, step_s - self.clock() % step_s)))

    def write_marks(self) -> None:
        """Hand the store which replies were delivered since the last call."""
        if marks := self._take_marks():
            self.store.submit(schema.deliver(marks))

    def _take_marks(self) -> list[tuple[bool | None, int]]:
        marks, self.marks = self.marks, []
        return marks

    def _meet(self, request: web.BaseRequest, path: str, argument: str, body: bytes) -> Encounter:
        key, symbol = request.headers.get("Paper-Key", ""), ""
        if not self.faults.idle:
            symbol = intake.names_symbol(request.query, body)
            if not symbol and argument.isdecimal() and key in self.holders:
                order = self.engine.open_orders.get(self.holders[key].account, {}).get(int(argument[:18]))
                symbol = order.symbol if order else ""
        return Encounter(self.faults, f"{request.method} {path}", symbol, key)

    async def _serve(self, found: Route, call: Call, met: Encounter) -> object:
        try:
            document = await found.serve(call)
        finally:
            # Also after a refusal: looking at the market may have filled somebody's order.
            self._write_changes()
        await self.store.settled()
        if old := met.take("stale-read"):
            return replies.stale(document, call.now_ms - int(old.seconds * 1000))
        return document

    async def _record(self, found: Route, call: Call, stamp: auth.Stamp, caller: str, target: str, met: Encounter) -> replies.Reply:
        """Serve an order request between the ledger's first line about it and its last."""
        client_order_id = call.argument if "/by-client-id/" in call.path else intake.client_order_id(call.body)
        received = await self.store.submit(
            schema.receive(
                account=call.account,
                verb=call.verb,
                target=_clean(target),
                client_order_id=client_order_id,
                body=call.body,
                received_ms=call.now_ms,
                marks=self._take_marks(),
            )
        )
        call.client_id_known = received.client_id_known
        call.now_ms = int(self.clock() * 1000)  # writing took its time: whether the order is still in time is decided now
        executed = False
        try:
            stopped = replies.stopped(met)
            if stopped is None:
                self._admit(found, stamp, caller, call)
                document = await self._execute(found, call, met)
                executed = True
            reply = stopped or replies.told(document, self._headers(caller), met)
        except Refused as e:
            reply = replies.refused(e, self._headers(caller))
        outcome = schema.Outcome(
            order=call.order,
            executed=executed,
            http_status=reply.status,
            code=reply.code,
            answered_ms=int(self.clock() * 1000),
            fault="+".join(met.met) or None,
            delivered=False if reply.dropped else None,
        )
        changes = self.engine.drain()
        written = self.store.submit(schema.complete(received.number, outcome, schema.rows(changes)))
        self.sockets.changed(changes)
        await written
        reply.entry = received.number
        return reply

    async def _execute(self, found: Route, call: Call, met: Encounter) -> object:
        try:
            return await found.serve(call)
        except Refused as e:
            if e.code is not Code.DUPLICATE_CLIENT_ORDER_ID or not met.take("duplicate-client-id"):
                raise
            call.again = True
            return await found.serve(call)

    def _admit(self, found: Route, stamp: auth.Stamp, caller: str, call: Call) -> None:
        self.limiter.charge(caller, found.weight, self.clock())
        stamp.check(call.now_ms + call.skew_ms)

    def _bind(self, holder: auth.Holder, now_ms: int) -> int:
        """Open an account for a new key; in memory at once, so that a second secret in the same moment comes too late."""
        holder = auth.Holder(self.next_account, holder.key, holder.secret)
        self.next_account += 1
        self.holders[holder.key] = holder
        self.engine.accounts.open(holder.account)
        self.store.submit(schema.bind(holder, now_ms))
        self._write_changes()
        return holder.account

    def _write_changes(self) -> None:
        """Hand the store what was changed, and tell the sockets."""
        if changes := self.engine.drain():
            self.store.submit(schema.write(schema.rows(changes)))
        self.sockets.changed(changes)

    def _headers(self, caller: str) -> dict[str, str]:
        return {"Paper-Used-Weight": str(self.limiter.used(caller))}


@asynccontextmanager
async def serving(
    *,
    state: Path,
    host: str,
    port: int,
    seed: int,
    clock: Callable[[], float] = time.time,
    limit_a_minute: int = LIMIT_A_MINUTE,
    rates: fees.Schedule = fees.STANDARD,
    book_interval_s: float | None = None,
) -> AsyncIterator[int]:
    """Run an exchange beside the body; yield the port it listens on (port 0: any free one).

    state: its folder, created when missing; a second exchange on it is refused.
    clock: UTC in seconds; the market, the windows and the limits all go by it.
    rates: the fees of orders to come.
    book_interval_s: how often the market's own book changes some of its sizes, 0.001 to 1, for those who need many updates; None: on the
    second, as all else.
    Raises OSError when the port or the folder is taken. Leaving the body stops listening, finishes what is open and closes the file; a file
    that cannot be written any more ends the body.
    """
    with database(state) as db:
        engine = Engine(seed, rates=rates, step_ms=1000 if book_interval_s is None else max(1, round(book_interval_s * 1000)))
        holders = schema.restore(db, engine)
        store = Store(db)
        faults = Faults(clock, seed)
        exchange = Exchange(engine=engine, store=store, holders=holders, clock=clock, limit=limit_a_minute, faults=faults)

        async def entries(query: ledger.Query) -> list[ledger.Entry]:
            exchange.write_marks()
            await store.settled()
            return await asyncio.to_thread(ledger.read, state, query)

        runner = web.ServerRunner(web.Server(exchange.handle, access_log=None), shutdown_timeout=5)
        try:
            await runner.setup()
            bound = await _listen(runner, host, port)
            async with control.serving(state, faults, entries, clock), asyncio.TaskGroup() as group:
                jobs = [group.create_task(exchange.tick()), group.create_task(store.broken())]
                yield bound
                exchange.sockets.close()
                await runner.cleanup()
                exchange.write_marks()
                for job in jobs:
                    job.cancel()
        finally:
            await runner.cleanup()
            await store.close()


async def _listen(runner: web.ServerRunner, host: str, port: int) -> int:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as e:
        raise OSError(e.errno, f"the paper exchange cannot listen on {host}:{port}: {e.strerror or e}") from None
    bound: int = runner.addresses[0][1]
    return bound


def _clean(text: str) -> str:
    """Text that can be stored and sent: a request line may hold any byte, which arrives as a lone surrogate."""
    return text.encode("utf-8", "backslashreplace").decode()


async def _body(request: web.BaseRequest) -> bytes:
    """The request's body. Raises Refused(BODY_TOO_LARGE | BAD_BODY) without reading further than that takes."""
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > LARGEST_BODY:
                raise Refused(Code.BODY_TOO_LARGE, f"body: at most {LARGEST_BODY} bytes")
            chunks.append(chunk)
    except web.RequestPayloadError:
        raise Refused(Code.BAD_BODY, "body: broken transfer") from None
    return b"".join(chunks)
