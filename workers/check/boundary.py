"""A worker in a thread of its own: the venue behind the very boundary that serves hosts, so that what a host would see is what is judged.

A thread, so that a venue that blocks its event loop blocks neither the exchange nor the one who judges it.
"""

import asyncio
import concurrent.futures
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Raw, Struct

from bus.connection import Bus
from bus.errors import BusError
from bus.messages import Failure, Request, Success, decode_reply, encode, encode_exact
from bus.methods import METHODS
from bus.metrics import Metrics
from bus.seal import Credentials, Opener, Sealer, frame, new_keys
from bus.sessions import Session, Sessions
from workers import http
from workers.calls import Calls
from workers.check.ear import Ear, heartbeat, overheard
from workers.check.wire import Seen
from workers.venues import Venue

T = TypeVar("T")

PATIENCE_S = 3.0
"""How long after its deadline a call is waited for before the venue counts as stuck."""
MAKING_S = 10.0
"""How long a venue's constructor may take."""
HASTY_S = 0.5
"""How long a call of a hasty exchange may take."""

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


class Answered(Struct):
    """What a host got. data: with exact numbers, None for an error. text: of the error, as the host reads it. sent: the requests that the
    exchange got meanwhile. trace: where in the venue's code a fault of its own came from."""

    method: str
    data: Any
    code: str
    text: str
    client_order_id: str
    took_s: float
    sent: list[Seen]
    trace: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.code)

    def __str__(self) -> str:
        """For a report."""
        if not self.failed:
            return f"{self.method} answered {_short(self.data)}"
        return f"{self.method} answered {self.code}: {self.text}" + (f" [{self.trace}]" if self.trace else "")


def _short(data: Any) -> str:
    text = encode(data).decode()
    return text if len(text) <= 160 else f"{text[:157]}..."


class Stuck(Exception):
    """A call did not end, long after its deadline."""


class Ended(Exception):
    """The venue's code tried to end the process."""


class Unmade(Exception):
    """The venue's constructor raised, or did not return."""


class _Clock:
    """The part of the bus that a call needs."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


class _Memory(Sessions):
    """Futures state without a bus."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, str], Session] = {}

    async def read(self, path: str, account: str) -> Session:
        return self._states.get((path, account), Session())

    async def change(self, path: str, account: str, **changes: Any) -> Session:
        state = msgspec.structs.replace(await self.read(path, account), **changes)
        self._states[path, account] = state
        return state


class _Inside(Struct, frozen=True):
    """What lives in the venue's thread."""

    venue: Venue
    loop: asyncio.AbstractEventLoop
    calls: Calls
    http: http.Http
    stop: asyncio.Event
    own: asyncio.Task[Any] | None


async def _serve(
    name: str, made: Callable[[], dict[str, Venue]], keys_path: Path, ready: concurrent.futures.Future[_Inside], ear: Ear
) -> None:
    """In the thread: be a worker until told to stop."""
    try:
        venues = made()
    except (Exception, SystemExit) as e:  # noqa: BLE001 - it is raised where it is waited for
        ready.set_exception(Unmade(f"raised {type(e).__name__}: {e}"))
        return
    metrics = Metrics()
    async with http.opened({f"{name}-hasty": HASTY_S}, 10.0, metrics) as sessions:
        calls = Calls(cast("Bus", _Clock()), Opener(keys_path), _Memory(), venues, sessions, metrics)
        inside = _Inside(venues[name], asyncio.get_running_loop(), calls, sessions, asyncio.Event(), asyncio.current_task())
        with heartbeat(ear):
            ready.set_result(inside)
            await inside.stop.wait()


async def _kept(work: Coroutine[Any, Any, T]) -> T:
    """What would end a worker must not end this thread."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as e:
        raise Ended(f"the venue raised {type(e).__name__}({e}), which ends a worker and all its calls") from None


class Boundary:
    """venue: the instance that is checked; `name` and `name`-hasty both lead to it, `name`-dead to one whose base_url nobody listens at."""

    def __init__(self, name: str, venue: Venue, sealer: Sealer, ear: Ear, seen: list[Seen], inside: _Inside) -> None:
        self.name = name
        self.venue = venue
        self.ear = ear
        self._sealer = sealer
        self._seen = seen
        self._in = inside

    def frame(self, method: str, params: Struct, keys: tuple[str, str], left_s: float, exchange: str) -> tuple[bytes, str]:
        """-> (what the bridge would have sent, its client order id)."""
        key_id, sealed, mac_key = self._sealer.box(*keys)
        request = Request(
            exchange=exchange,
            path=exchange,
            method=method,
            params=Raw(encode_exact(params)),
            expires_at_ms=_Clock().now_ms() + int(left_s * 1000),
            idempotency_key=secrets.token_hex(16),
            key_id=key_id,
            sealed=sealed,
        )
        return frame(msgspec.json.encode(request), mac_key), request.idempotency_key

    async def call(self, method: str, params: Struct, keys: tuple[str, str], *, left_s: float, exchange: str) -> Answered:
        """One request of a host's. Raises Stuck."""
        data, key = self.frame(method, params, keys, left_s, exchange)
        client_order_id = key if METHODS[method].places else ""
        before, self.ear.trace, started = len(self._seen), "", time.monotonic()
        reply = decode_reply(await self._inside(self._in.calls.answer(data), left_s + PATIENCE_S, method))
        answered = Answered(method, None, "", "", client_order_id, time.monotonic() - started, self._seen[before:], self.ear.trace)
        match reply:
            case Success(data=content):
                answered.data = _decode(content)
            case Failure(code=code):
                answered.code, answered.text = code, reply.error.text
        return answered

    async def direct(self, function: Callable[..., Coroutine[Any, Any, T]], keys: tuple[str, str], *args: Any) -> T:
        """Call a function of the venue's that is no method of the host's: find_order. Raises what it raises, or Stuck."""
        call = http.Call(
            self._in.http,
            exchange=self.name,
            path=self.name,
            credentials=Credentials(*keys),
            account="check",
            client_order_id=secrets.token_hex(16),
            expires_at_ms=_Clock().now_ms() + 10_000,
            now_ms=_Clock().now_ms,
            write=False,
        )
        return await self._inside(function(call, *args), 10 + PATIENCE_S, "find_order")

    async def cancelled(self, method: str, params: Struct, keys: tuple[str, str], sent: Callable[[], Coroutine[Any, Any, bool]]) -> str:
        """Begin a call, cancel it once `sent`; what is wrong with how it ended, "" for nothing. Raises Stuck."""
        go = asyncio.Event()
        future = asyncio.run_coroutine_threadsafe(self._cut(self.frame(method, params, keys, 10.0, self.name)[0], go), self._in.loop)
        arrived = await sent()
        self._in.loop.call_soon_threadsafe(go.set)
        wrong = await self._until(future, PATIENCE_S, method)
        return wrong if arrived else "the exchange got no request"

    async def _cut(self, data: bytes, go: asyncio.Event) -> str:
        task = asyncio.create_task(_kept(self._in.calls.answer(data)))
        await go.wait()
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=1)
        if not done:
            return "the call was still running 1 s after it had been cancelled"
        if not task.cancelled() and (error := task.exception()):
            return str(error)
        if not task.cancelled():
            return f"the cancelled call went on and answered {task.result()[:120].decode(errors='replace')}"
        for _ in range(20):
            left = asyncio.all_tasks() - {self._in.own, asyncio.current_task(), None}
            if not left:
                return ""
            await asyncio.wait(left, timeout=0.05)
        return "a task of the venue's outlived the call: " + ", ".join(sorted(str(task.get_coro()).split(" at ")[0] for task in left))

    async def _inside(self, work: Coroutine[Any, Any, T], within_s: float, what: str) -> T:
        return await self._until(asyncio.run_coroutine_threadsafe(_kept(work), self._in.loop), within_s, what)

    async def _until(self, future: concurrent.futures.Future[T], within_s: float, what: str) -> T:
        try:
            async with asyncio.timeout(within_s):  # wait_for() would lose a cancel that comes with the answer
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Stuck(
                f"{what} did not end within {within_s:.1f} s, though its deadline had passed: it blocks, or swallows a cancel"
            ) from None


def explain(error: BaseException) -> str:
    """An exception that a direct call ended with."""
    return f"{error.code}: {error.text}" if isinstance(error, BusError) else f"{type(error).__name__}: {error}"


@asynccontextmanager
async def started(name: str, made: Callable[[], dict[str, Venue]], folder: Path, source: str, seen: list[Seen]) -> AsyncIterator[Boundary]:
    """A worker thread beside the body. A venue that never lets go of it is left behind with its daemon thread.

    made: makes the venues, in that thread. Raises Unmade.
    """
    keys_path = folder / "keys"
    new_keys(keys_path)
    ready: concurrent.futures.Future[_Inside] = concurrent.futures.Future()
    ear = Ear(source)

    def run() -> None:
        ear.thread = threading.get_ident()
        try:
            with overheard(ear.thread, ear.printed):
                asyncio.run(_serve(name, made, keys_path, ready, ear))
        except Exception as e:  # noqa: BLE001 - it is raised where it is waited for
            if not ready.done():
                ready.set_exception(e)

    thread = threading.Thread(target=run, name=f"venue {name}", daemon=True)
    logging.getLogger().addHandler(ear)
    thread.start()
    inside = None
    try:
        try:
            inside = await asyncio.wait_for(asyncio.wrap_future(ready), MAKING_S)
        except TimeoutError:
            raise Unmade(f"did not return within {MAKING_S:.0f} s") from None
        yield Boundary(name, inside.venue, Sealer(keys_path), ear, seen, inside)
    finally:
        if inside is not None:
            inside.loop.call_soon_threadsafe(inside.stop.set)
            await asyncio.to_thread(thread.join, PATIENCE_S)
        logging.getLogger().removeHandler(ear)
