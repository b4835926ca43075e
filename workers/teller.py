"""How a feeder's values reach the bus: each on its own subject, numbered, and proven by beats (bus/market.py)."""

import asyncio
import contextlib
from collections.abc import Callable

import nats.errors
from msgspec import Struct, field
from nats.aio.msg import Msg

from bus import market, subjects
from bus.connection import MAX_PENDING, Bus
from bus.market import BEAT_S, HEADER, NEVER, UNREADABLE, WHOLE_S, WISHES_GONE_S, WITHDRAWN, Beat, Proof
from workers.wishes import Pair

SOON_S = 0.05
"""At least so long between two beats."""
MOST_FOLLOWERS = 1000


class Part(Struct, eq=False):
    """One shard that is fed. number, n: count its beats and its values. news: what the next beat lists. whole: it lists everything."""

    shard: int
    epoch: int
    number: int = 0
    n: int = 0
    whole: bool = True
    whole_s: float = NEVER
    values: "dict[Pair, Value]" = field(default_factory=dict)
    news: "set[Value]" = field(default_factory=set)


class Value(Struct, eq=False):
    """What one pair was told last. n: 0 before the first value; proven_s: when that value was proven, NEVER for a withdrawal."""

    pair: Pair
    part: Part
    n: int = 0
    proven_s: float = NEVER


class Teller:
    """Of one exchange. parts: the shards that are fed, by number. clock: monotonic."""

    def __init__(self, bus: Bus, exchange: str, clock: Callable[[], float] = market.clock) -> None:
        self._bus = bus
        self._exchange = exchange
        self._clock = clock
        self._soon = asyncio.Event()
        self._ticks: dict[str, tuple[int, float]] = {}
        self.parts: dict[int, Part] = {}

    @property
    def waits(self) -> bool:
        """Whether what is told now would come late, or never."""
        return not self._bus.nc.is_connected or self._bus.nc.pending_data_size > MAX_PENDING

    def begin(self, shard: int, epoch: int) -> None:
        """Feed a shard; its first beat goes out at once."""
        self.parts[shard] = Part(shard, epoch)
        self._soon.set()

    async def tell(self, value: Value, content: bytes | None, proven_s: float) -> None:
        """Tell a value, None to withdraw what was told."""
        part = value.part
        part.n += 1
        value.n, value.proven_s = part.n, NEVER if content is None else proven_s
        part.news.add(value)
        header = {HEADER: Proof(part.epoch, part.n, self._age_ms(value), part.shard).header()}
        content = market.withdrawal("its feeder lost it and asks the exchange again") if content is None else content
        with contextlib.suppress(nats.errors.Error):  # a value that gets lost shows in the beats
            await self._bus.nc.publish(subjects.feed(self._exchange, *value.pair), content, headers=header)

    @staticmethod
    def prove(value: Value, proven_s: float) -> None:
        """What was told is still true."""
        if value.proven_s != NEVER:
            value.proven_s = proven_s
            value.part.news.add(value)

    def end(self, value: Value) -> None:
        """Tell a value no more."""
        part = value.part
        part.values.pop(value.pair, None)
        part.news.discard(value)
        part.whole = True  # which shows that it is gone

    def _age_ms(self, value: Value) -> int:
        return WITHDRAWN if value.proven_s == NEVER else max(0, int((self._clock() - value.proven_s) * 1000) + 1)

    # ---------------------------------------------------------------- beats

    async def hear_tick(self, message: Msg) -> None:
        """Take note of a follower's clock. A new follower, and one that missed a beat, get a whole one at once."""
        follower = message.subject.partition(".")[2]
        try:
            shown_ms, whole = market.read_tick(message.data)
        except UNREADABLE:
            return  # a stranger's noise
        if follower not in self._ticks:
            if len(self._ticks) >= MOST_FOLLOWERS:
                return
            whole = True
        self._ticks[follower] = (shown_ms, self._clock())
        if whole:
            for part in self.parts.values():
                part.whole = True
            self._soon.set()

    async def keep_beating(self) -> None:
        while True:
            await self.beat()
            await asyncio.sleep(SOON_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S - SOON_S):
                    await self._soon.wait()
            self._soon.clear()

    async def beat(self, *, leaving: bool = False) -> None:
        """Prove what was told. leaving: it is the last time."""
        if self.waits:
            return
        now_s = self._clock()
        self._ticks = {follower: seen for follower, seen in self._ticks.items() if now_s - seen[1] < WISHES_GONE_S}
        heard = {follower: shown_ms for follower, (shown_ms, _) in self._ticks.items()}
        for part in self.parts.values():
            if part.whole or now_s - part.whole_s >= WHOLE_S:
                part.whole, part.whole_s = True, now_s
                part.news.update(value for value in part.values.values() if value.n)
            part.number += 1
            beat = Beat(
                feeder=self._bus.process,
                epoch=part.epoch,
                number=part.number,
                top=part.n,
                whole=part.whole,
                leaving=leaving,
                keys={market.key(*value.pair): (value.n, self._age_ms(value)) for value in part.news},
                heard=heard,
            )
            part.whole = False
            part.news.clear()
            with contextlib.suppress(nats.errors.Error):  # the next one shows that this one is missing
                await self._bus.nc.publish(subjects.beat(self._exchange, part.shard), market.encode(beat))
