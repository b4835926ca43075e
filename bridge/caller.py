"""One request, one reply: publishes a call, waits on an inbox of its own, and says what a silence means.

nats-py's own request() leaves entries behind when a publish fails and would hand a request to a connection that is down, to be
executed when it is back (both measured); here every call is checked before and cleaned up after.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from nats.aio.msg import Msg

from bus import subjects
from bus.connection import Bus
from bus.errors import BusError, Internal, NoWorker, OutcomeUnknown, TimedOut
from bus.messages import Reply, decode_reply
from bus.metrics import Metrics

NO_RESPONDERS = "503"


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
        timer = loop.call_later(timeout_s, self._give_up, answered, exchange, key)
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
            raise _silence(exchange, key, "an unreadable reply") if key else Internal("unreadable reply of a worker") from e

    @staticmethod
    def _give_up(answered: asyncio.Future[Msg], exchange: str, key: str) -> None:
        if not answered.done():
            answered.set_exception(
                _silence(exchange, key, "no answer in time") if key else TimedOut(f"no answer from a worker of {exchange} in time")
            )

    async def _on_reply(self, message: Msg) -> None:
        answered = self._waiting.get(message.subject[len(self._inbox) :])
        if answered is None or answered.done():
            self._metrics.late_replies.inc()
        else:
            answered.set_result(message)


def _silence(exchange: str, key: str, what: str) -> BusError:
    return OutcomeUnknown(f"{what} from a worker of {exchange}; the order may be alive, look before you repeat it; client order id {key}")


@asynccontextmanager
async def calling(bus: Bus, metrics: Metrics) -> AsyncIterator[Caller]:
    caller = Caller(bus, metrics)
    subscription = await bus.nc.subscribe(f"{caller._inbox}*", cb=caller._on_reply)
    try:
        yield caller
    finally:
        if not bus.nc.is_closed:
            await subscription.unsubscribe()
