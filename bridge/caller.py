"""One request, one reply: publishes a call, waits on an inbox of its own, and says what a silence means.

nats-py's own request() leaves entries behind when a publish fails and would hand a request to a connection that is down, to be
executed when it is back (both measured); here every call is checked before and cleaned up after.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import nats.errors
from nats.aio.msg import Msg

from bus import subjects
from bus.connection import Bus
from bus.errors import BusError, Internal, NoWorker, TimedOut, outcome_unknown
from bus.messages import Reply, decode_reply
from bus.methods import METHODS
from bus.metrics import Metrics

NO_RESPONDERS = "503"
LAST_LOOK_S = 0.01


class Caller:
    def __init__(self, bus: Bus, metrics: Metrics) -> None:
        self._bus = bus
        self._metrics = metrics
        self._inbox = f"_INBOX.bridge.{bus.process}."
        self._tokens = itertools.count()
        self._waiting: dict[str, asyncio.Future[Msg]] = {}

    async def call(self, exchange: str, method: str, frame: bytes, *, key: str, timeout_s: float) -> Reply:
        """Send one frame to a worker of the exchange and return its reply. key: the idempotency key of a write, "" for a read.

        Raises NoWorker, BusDown and Busy when nothing was delivered; after timeout_s OutcomeUnknown for a write, TimedOut for a read.
        """
        self._bus.check()
        token = str(next(self._tokens))
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Msg] = loop.create_future()
        self._waiting[token] = answered
        timer = loop.call_later(timeout_s - LAST_LOOK_S, self._time_is_up, answered, exchange, method, key)
        try:
            await self._bus.nc.publish(subjects.rpc(exchange, method), frame, reply=self._inbox + token)
            message = await answered
        finally:
            timer.cancel()
            self._waiting.pop(token, None)
        if message.headers and message.headers.get("Status") == NO_RESPONDERS:
            raise NoWorker(f"no worker serves {exchange} now")
        try:
            return decode_reply(message.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            what = f"an unreadable reply from a worker of {exchange}"
            raise _unknown(method, key, what) if key else Internal(what) from e

    async def told(self, worker: str, key: str, *, arrived: bool) -> None:
        """Say to a worker whether a host has the answer to its order. Without waiting: where it gets lost the worker takes care."""
        with contextlib.suppress(BusError, nats.errors.Error):
            self._bus.check()
            await self._bus.nc.publish(subjects.told(worker, arrived=arrived), key.encode())

    def _time_is_up(self, *call: Any) -> None:
        # A process that stood still finds its timers due before it has read what arrived meanwhile: one more look.
        asyncio.get_running_loop().call_later(LAST_LOOK_S, self._give_up, *call)

    @staticmethod
    def _give_up(answered: asyncio.Future[Msg], exchange: str, method: str, key: str) -> None:
        if not answered.done():
            what = f"no answer from a worker of {exchange} in time"
            answered.set_exception(_unknown(method, key, what) if key else TimedOut(what))

    async def _on_reply(self, message: Msg) -> None:
        answered = self._waiting.get(message.subject[len(self._inbox) :])
        if answered is None or answered.done():
            self._metrics.late_replies.inc()
        else:
            answered.set_result(message)


def _unknown(method: str, key: str, what: str) -> BusError:
    return outcome_unknown(what, key if METHODS[method].places else "")


@asynccontextmanager
async def calling(bus: Bus, metrics: Metrics) -> AsyncIterator[Caller]:
    caller = Caller(bus, metrics)
    subscription = await bus.nc.subscribe(f"{caller._inbox}*", cb=caller._on_reply)
    try:
        yield caller
    finally:
        if not bus.nc.is_closed:
            await subscription.unsubscribe()
