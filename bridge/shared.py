"""One answer for many: identical public reads in flight are one call, and what it answered serves whoever asks the same soon after.

Also over bridges: whoever asked passes the answer on to those who were asked the same lately. As with beats (bus/market.py) it carries
the newest tick that its sender had heard from each of them, so that they bound its age by their own clocks.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import blake2b

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bridge import fmz
from bus import market, subjects
from bus.connection import Bus
from bus.errors import BusDown, BusError, Busy, Expired, NoWorker, RateLimited, StaleData, TimedOut, VenueUnavailable
from bus.lifecycle import running
from bus.messages import Failure, Reply

Key = tuple[str, str, bytes]
"""(exchange, method, params as they travel, the symbol with its contract)"""
Ask = Callable[[], Awaitable[Reply]]

JOIN_S = 1.0
"""A call that is in flight for longer is not joined: it may hang, and what it answers may be older than its answer."""
MOST_ANSWERS = 4096
MOST_BYTES = 32 << 20
MOST_HEARD = 1024
"""Answers of other bridges that are listened for."""
HEARD_S = 60.0
FORGET_EVERY_S = 5.0
LARGEST = 512 << 10
GONE_S = 2.0

OF_THE_EXCHANGE = frozenset({VenueUnavailable.code, RateLimited.code, StaleData.code})
"""Failures that would meet everybody who asks. Not a rejection: it may be about the key of the one who asked."""
OF_THE_PATH = frozenset({Expired.code, Busy.code, BusDown.code, NoWorker.code, TimedOut.code})
"""Failures after which one of those who wait tries again for all of them; after the others each asks for itself."""


class Answer(Struct, frozen=True):
    """content: the finished envelope. asked_s: when the exchange was asked, by our own clock, or earlier."""

    content: bytes
    asked_s: float


class _Told(Struct, frozen=True, array_like=True):
    """The head of what travels. age_ms: since the exchange was asked; heard: bridge -> its newest tick."""

    age_ms: int
    heard: dict[str, int]


class _Flight(Struct):
    asked_s: float
    landed: asyncio.Future[bytes | Failure | None]
    """None: the one who asked got no answer for all."""


class _Listening(Struct):
    subscription: Subscription
    used_s: float


_decode = msgspec.json.Decoder(_Told).decode


class Shared:
    """life_s: by method, 0 for an answer that only those share who ask while it is on its way."""

    def __init__(self, bus: Bus, life_s: Mapping[str, float], clock: Callable[[], float] = market.clock) -> None:
        self._bus = bus
        self._life_s = dict(life_s)
        self._clock = clock
        self._flights: dict[Key, _Flight] = {}
        self._answers: OrderedDict[Key, Answer] = OrderedDict()
        self._bytes = 0
        self._ticks: dict[str, tuple[float, int]] = {}
        self._listening: dict[Key, _Listening] = {}

    def find(self, key: Key) -> bytes | None:
        """The answer that somebody got a moment ago."""
        answer = self._answers.get(key)
        if answer is None or not self._lives(key, answer):
            return None
        listening = self._listening.get(key)
        if listening is not None:
            listening.used_s = self._clock()
        return answer.content

    def _lives(self, key: Key, answer: Answer) -> bool:
        return self._clock() - answer.asked_s < self._life_s.get(key[1], 0.0)

    async def get(self, key: Key, ask: Ask, timeout_s: float) -> tuple[bytes | Failure, bool]:
        """The envelope, or how it failed, and whether somebody else had asked. ask: the call itself, for the one who makes it.

        Raises what ask raises, for that one alone; TimedOut after timeout_s with a call that somebody else made.
        """
        until_s = self._clock() + timeout_s
        while (flight := self._flights.get(key)) is not None and self._clock() - flight.asked_s < JOIN_S:
            await asyncio.wait((flight.landed,), timeout=until_s - self._clock())
            if not flight.landed.done():
                raise TimedOut(f"no answer from a worker of {key[0]} in time")
            landed = flight.landed.result()
            if isinstance(landed, bytes) or (landed is not None and landed.code in OF_THE_EXCHANGE):
                return landed, True
            if landed is not None:
                return await self._ask(key, ask, None), False
        flight = self._flights[key] = _Flight(self._clock(), asyncio.get_running_loop().create_future())
        try:
            return await self._ask(key, ask, flight), False
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            if not flight.landed.done():
                flight.landed.set_result(None)

    async def _ask(self, key: Key, ask: Ask, flight: _Flight | None) -> bytes | Failure:
        asked_s = self._clock()
        reply = await ask()
        landed = reply if isinstance(reply, Failure) else fmz.answer(reply)
        if flight is not None and not (isinstance(landed, Failure) and landed.code in OF_THE_PATH):
            flight.landed.set_result(landed)
        if isinstance(landed, bytes):
            await self.keep(key, Answer(landed, asked_s))
        return landed

    async def keep(self, key: Key, answer: Answer) -> None:
        """Have an answer serve those who ask the same meanwhile, here and at the other bridges."""
        if self._lives(key, answer) and self._store(key, answer):
            await self._listen(key)
            await self._pass_on(key, answer)

    def _store(self, key: Key, answer: Answer) -> bool:
        before = self._answers.get(key)
        if len(answer.content) > LARGEST or (before is not None and before.asked_s >= answer.asked_s):
            return False
        self._answers[key] = answer
        self._answers.move_to_end(key)
        self._bytes += len(answer.content) - (len(before.content) if before is not None else 0)
        while len(self._answers) > MOST_ANSWERS or self._bytes > MOST_BYTES:
            self._bytes -= len(self._answers.popitem(last=False)[1].content)
        return True

    # ---------------------------------------------------------------- over bridges

    def _others(self) -> dict[str, int]:
        horizon_s = self._clock() - GONE_S
        self._ticks = {bridge: heard for bridge, heard in self._ticks.items() if heard[0] >= horizon_s}
        return {bridge: tick_ms for bridge, (_, tick_ms) in self._ticks.items()}

    async def _listen(self, key: Key) -> None:
        """Listen for what other bridges are answered to the same question."""
        listening = self._listening.get(key)
        if listening is not None:
            listening.used_s = self._clock()
        elif len(self._listening) < MOST_HEARD and self._others():

            async def hear(message: Msg) -> None:
                self._take(key, message.data)

            with contextlib.suppress(BusError, nats.errors.Error):
                subscription = await self._bus.nc.subscribe(_subject(key), cb=hear, pending_msgs_limit=64)
                if key in self._listening:  # somebody was faster
                    await subscription.unsubscribe()
                else:
                    self._listening[key] = _Listening(subscription, self._clock())

    async def _pass_on(self, key: Key, answer: Answer) -> None:
        heard = self._others()
        if not heard:
            return
        age_ms = int((self._clock() - answer.asked_s) * 1000) + 1
        with contextlib.suppress(BusError, nats.errors.Error):
            self._bus.check()
            head = msgspec.json.encode(_Told(age_ms, heard))
            await self._bus.nc.publish(_subject(key), b"%b\n%b" % (head, answer.content))

    def _take(self, key: Key, data: bytes) -> None:
        head, _, content = data.partition(b"\n")
        try:
            told = _decode(head)
        except market.UNREADABLE:
            return
        tick_ms = told.heard.get(self._bus.process)
        if tick_ms is None or tick_ms > self._clock() * 1000 or told.age_ms < 0 or not content:
            return  # it may be of any age
        answer = Answer(content, (tick_ms - told.age_ms) / 1000)
        if self._lives(key, answer):
            self._store(key, answer)

    async def hear_tick(self, message: Msg) -> None:
        """A follower's tick; those of bridges count."""
        process = message.subject.rpartition(".")[2]
        if process.startswith("bridge-") and process != self._bus.process:
            with contextlib.suppress(ValueError):
                self._ticks[process] = self._clock(), market.read_tick(message.data)[0]

    async def forget(self) -> None:
        """Drop answers that are too old, and listen no more for what nobody has asked for lately."""
        for key in [key for key, answer in self._answers.items() if not self._lives(key, answer)]:
            self._bytes -= len(self._answers.pop(key).content)
        horizon_s = self._clock() - HEARD_S
        for key in [key for key, listening in self._listening.items() if listening.used_s < horizon_s]:
            with contextlib.suppress(nats.errors.Error):
                await self._listening.pop(key).subscription.unsubscribe()

    async def keep_forgetting(self) -> None:
        while True:
            await asyncio.sleep(FORGET_EVERY_S)
            await self.forget()


def _subject(key: Key) -> str:
    exchange, method, params = key
    return subjects.shared(exchange, method, blake2b(params, digest_size=16).hexdigest())


@asynccontextmanager
async def sharing(bus: Bus, life_s: Mapping[str, float]) -> AsyncIterator[Shared]:
    """Shared answers for the life of a bridge."""
    shared = Shared(bus, life_s)
    subscription = await bus.nc.subscribe(subjects.tick("*"), cb=shared.hear_tick)
    async with running(shared.keep_forgetting()):
        try:
            yield shared
        finally:
            if not bus.nc.is_closed:
                await subscription.unsubscribe()
                for listening in shared._listening.values():
                    await listening.subscription.unsubscribe()
