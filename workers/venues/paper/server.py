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

import msgspec
from aiohttp import web

from workers.venues.paper import auth, intake, schema
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.limits import Limiter
from workers.venues.paper.service import Call, Route, route
from workers.venues.paper.store import Store, database

log = logging.getLogger(__name__)

LIMIT_A_MINUTE = 60_000
"""Weight a key, or an address without one, may use in a minute."""

LARGEST_BODY = 64 * 1024

TICK_S = 0.25
"""How often resting orders meet the market while nobody asks."""


class Exchange:
    """The HTTP side of one exchange."""

    def __init__(self, *, engine: Engine, store: Store, holders: dict[str, auth.Holder], clock: Callable[[], float], limit: int) -> None:
        self.engine = engine
        self.store = store
        self.holders = holders
        self.clock = clock
        self.limiter = Limiter(limit)
        self.next_account = max((holder.account for holder in holders.values()), default=0) + 1

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request. Raises nothing but CancelledError."""
        caller = f"address {request.remote}"
        try:
            target = request.raw_path
            path = _clean(unquote(target.partition("?")[0]))
            found, argument = route(request.method, path)
            body = await _body(request)
            call = Call(self.engine, self.store, 0, request.method, path, argument, request.query, body, int(self.clock() * 1000))
            if not found.signed:
                self.limiter.charge(caller, found.weight, self.clock())
                return self._reply(caller, await self._serve(found, call))
            try:
                holder, stamp = auth.identify(request.headers, self.holders, verb=request.method, target=target, body=body)
            except Refused:
                self.limiter.charge(caller, found.weight, self.clock())
                raise
            call.account = holder.account or self._bind(holder, call.now_ms)
            caller = f"account {call.account}"
            if found.recorded:
                return await self._record(found, call, stamp, caller, target)
            self._admit(found, stamp, caller, call.now_ms)
            return self._reply(caller, await self._serve(found, call))
        except Refused as e:
            return self._reply(caller, refusal=e)
        except Exception:
            log.exception("unhandled error")
            return self._reply(caller, refusal=Refused(Code.INTERNAL, "internal error, see the exchange's log"))

    async def tick(self) -> None:
        """Let resting orders fill by themselves, for ever."""
        while True:
            await asyncio.sleep(TICK_S)
            self.engine.advance_all(int(self.clock() * 1000))
            self._write_changes()

    async def _serve(self, found: Route, call: Call) -> object:
        try:
            document = await found.serve(call)
        finally:
            # Also after a refusal: looking at the market may have filled somebody's order.
            self._write_changes()
        await self.store.settled()
        return document

    async def _record(self, found: Route, call: Call, stamp: auth.Stamp, caller: str, target: str) -> web.Response:
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
            )
        )
        call.client_id_known = received.client_id_known
        document: object = None
        refusal = None
        try:
            self._admit(found, stamp, caller, call.now_ms)
            document = await found.serve(call)
        except Refused as e:
            refusal = e
        outcome = schema.Outcome(
            order=call.order,
            http_status=refusal.status if refusal else 200,
            code=refusal.code if refusal else 0,
            answered_ms=int(self.clock() * 1000),
        )
        await self.store.submit(schema.complete(received.number, outcome, schema.rows(self.engine.drain())))
        return self._reply(caller, document, refusal=refusal)

    def _admit(self, found: Route, stamp: auth.Stamp, caller: str, now_ms: int) -> None:
        self.limiter.charge(caller, found.weight, self.clock())
        stamp.check(now_ms)

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
        if changes := self.engine.drain():
            self.store.submit(schema.write(schema.rows(changes)))

    def _reply(self, caller: str, document: object = None, *, refusal: Refused | None = None) -> web.Response:
        headers = {"Paper-Used-Weight": str(self.limiter.used(caller))}
        status = 200
        if refusal:
            status, document = refusal.status, {"code": int(refusal.code), "message": refusal.message}
            if refusal.retry_after_s is not None:
                headers["Retry-After"] = str(refusal.retry_after_s)
        return web.Response(body=msgspec.json.encode(document), status=status, headers=headers, content_type="application/json")


@asynccontextmanager
async def serving(
    *,
    state: Path,
    host: str,
    port: int,
    seed: int,
    clock: Callable[[], float] = time.time,
    limit_a_minute: int = LIMIT_A_MINUTE,
) -> AsyncIterator[int]:
    """Run an exchange beside the body; yield the port it listens on (port 0: any free one).

    state: its folder, created when missing; a second exchange on it is refused.
    clock: UTC in seconds; the market, the windows and the limits all go by it.
    Raises OSError when the port or the folder is taken. Leaving the body stops listening, finishes what is open and closes the file; a file
    that cannot be written any more ends the body.
    """
    with database(state) as db:
        engine = Engine(seed)
        holders = schema.restore(db, engine)
        store = Store(db)
        exchange = Exchange(engine=engine, store=store, holders=holders, clock=clock, limit=limit_a_minute)
        runner = web.ServerRunner(web.Server(exchange.handle, access_log=None), shutdown_timeout=5)
        try:
            await runner.setup()
            bound = await _listen(runner, host, port)
            async with asyncio.TaskGroup() as group:
                jobs = [group.create_task(exchange.tick()), group.create_task(store.broken())]
                yield bound
                await runner.cleanup()
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
