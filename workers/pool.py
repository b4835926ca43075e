"""The worker as a FastStream application: takes requests of its exchanges, hands each to a task of its own, drains without loss.

FastStream keeps the subscriptions, of one queue group, and their life. Measured (0.7.8): its own concurrency (max_workers) costs three
quarters of the rate, an exception in a handler sends no reply, and its stages between a subscription and a handler (context, log,
acknowledgement) cost as much as all that a worker does for a request. So a message goes straight from its subscription to the pool,
which starts one of a bounded set of tasks, and that replies by itself.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import nats.errors
from faststream.nats import NatsBroker
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import subjects
from bus.connection import Bus
from bus.errors import Busy, Internal
from bus.messages import Failure, encode

log = logging.getLogger(__name__)

CANCEL = ".cancel"
LEAVE_S = 2.0
"""How long the bus may take to confirm that we take no more; nats-py by itself waits 10 s for a server that has gone."""

Answer = Callable[[bytes], Awaitable[bytes]]


class _Broker(NatsBroker):
    """A broker on a connection that exists: NatsBroker cannot pass on all that bus/connection.py sets."""

    def __init__(self, nc: Client, **options: Any) -> None:
        super().__init__(**options)
        self._nc = nc

    async def _connect(self) -> Client:
        self.config.connect(self._nc)
        return self._nc


class Pool:
    """The tasks in flight. answer: frame -> encoded reply, raises nothing."""

    def __init__(self, bus: Bus, answer: Answer, max_in_flight: int) -> None:
        self._bus = bus
        self._answer = answer
        self._max = max_in_flight
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def take(self, message: Msg) -> None:
        if len(self._tasks) >= self._max * (2 if message.subject.endswith(CANCEL) else 1):  # a cancel finds room where others do not
            await self._reply(message.reply, encode(Failure.of(Busy(f"a worker has {self._max} requests in flight; nothing was sent"))))
            return
        task = asyncio.create_task(self._handle(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, message: Msg) -> None:
        await self._reply(message.reply, await self._answer(message.data))

    async def _reply(self, reply_to: str, reply: bytes) -> None:
        if not reply_to:
            return
        if len(reply) > self._bus.nc.max_payload:
            told = f"the exchange executed the call, but its answer has {len(reply)} bytes and the bus carries {self._bus.nc.max_payload}"
            reply = encode(Failure.of(Internal(told)))
        try:
            await self._bus.nc.publish(reply_to, reply)
        except nats.errors.Error as e:
            # The caller's own deadline tells it that the outcome is unknown.
            log.warning("reply lost", extra={"fields": {"error": repr(e)}})

    async def finished(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def serving(
    bus: Bus,
    exchanges: Iterable[str],
    answer: Answer,
    *,
    max_in_flight: int,
    drain_s: float,
    answered: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Pool]:
    """Take requests until left, then drain: no new ones, the buffered ones answered, the last replies out, then the connection closes.

    answered: waits until the replies have arrived, as far as somebody says so.
    Raises TimeoutError when an exchange hangs longer than drain_s.
    """
    pool = Pool(bus, answer, max_in_flight)
    broker = _Broker(bus.nc, apply_types=False, graceful_timeout=drain_s, logger=None)
    for exchange in exchanges:
        subscriber = broker.subscriber(subjects.rpc_of(exchange), queue=subjects.WORKERS, no_reply=True)
        subscriber(pool.take)
        subscriber.process_message = pool.take  # type: ignore[method-assign, assignment]  # without the stages between
    await broker.start()
    await bus.flush()  # start() returns before the server has the subscriptions
    try:
        yield pool
    finally:
        try:
            async with asyncio.timeout(drain_s):
                await asyncio.gather(*(_stop_taking(subscriber) for subscriber in broker.subscribers))
                await pool.finished()
                if answered is not None:
                    await answered()
        finally:
            bus.leaving = True
            with contextlib.suppress(nats.errors.Error, TimeoutError):  # without a bus there is nobody to take leave of
                async with asyncio.timeout(LEAVE_S):
                    await broker.stop()


async def _stop_taking(subscriber: Any) -> None:
    # broker.stop() alone unsubscribes and throws away what had arrived (measured: 5 of 40 lost).
    subscription, subscriber.subscription = subscriber.subscription, None
    with contextlib.suppress(nats.errors.Error, TimeoutError):  # no answer from the bus: what is in flight is finished all the same
        async with asyncio.timeout(LEAVE_S):
            await subscription.drain()
