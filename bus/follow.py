"""Following market data: subscribes to what is asked for, wishes it from the feeders, and answers from memory what is fresh.

One follower a process: the bridge's cache is one, `fmzbus watch` another. Everything here is plain NATS; JetStream only shortens the
way to a value that was told before somebody began to follow it.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bus import market, subjects
from bus.connection import Bus
from bus.errors import BusError, Busy
from bus.lifecycle import running
from bus.market import BEAT_S, HEADER, TICK_S, UNREADABLE, WHOLE_S, WISHES_S, Entry, Proof, Shard, Wish

log = logging.getLogger(__name__)

Key = tuple[str, str, str]
"""(exchange, kind, symbol)"""
Told = Callable[[Entry], None]

WAITING = 64
"""Values of one key that may wait to be read; what comes on top is dropped by nats-py, which the beats show."""
SNAPSHOT_S = 0.5
DOUBTFUL_PART = 4
LOST_AFTER_S = 2 * BEAT_S
"""A value that beats tell of and that did not come within this is asked for again."""


class Follower:
    """max_age_s: by kind. most: pairs of kind and symbol followed of an exchange. told: called with each entry that has changed. entries:
    all that is followed."""

    def __init__(
        self,
        bus: Bus,
        max_age_s: Mapping[str, float],
        *,
        unused_s: float,
        most: int,
        told: Told | None = None,
        clock: Callable[[], float] = market.clock,
    ) -> None:
        self._bus = bus
        self._max_age_s = dict(max_age_s)
        self._unused_s = unused_s
        self._most = most
        self._told = told
        self._clock = clock
        self._subscriptions: dict[Key, Subscription] = {}
        self._shards: defaultdict[tuple[str, int], Shard] = defaultdict(Shard)
        self._beats: dict[tuple[str, int], float] = {}
        self._missing: dict[Key, float] = {}
        self._unread: asyncio.Queue[Entry] = asyncio.Queue()
        self.entries: dict[Key, Entry] = {}
        self.dropped = 0
        """Values that arrived faster than this process read them."""

    # ---------------------------------------------------------------- what is asked of it

    def find(self, key: Key) -> bytes | None:
        """The finished reply if it is fresh, else None. Makes note that somebody asks for it."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        now_s = self._clock()
        entry.used_s = now_s
        return entry.content if market.fresh(entry, now_s) else None

    def age_s(self, entry: Entry) -> float:
        """How long ago an entry was proven, at most."""
        listed = entry.shard.listed.get(entry.key) if entry.shard else None
        proven_s = max(entry.proven_s, listed.proven_s if listed and listed.n == entry.n else market.NEVER)
        return self._clock() - proven_s

    async def follow(self, key: Key, *, known: bool = True) -> Entry:
        """Begin to follow a key, or go on. What it is worth is seen by find(), a moment later. known: its market exists, somebody has
        answered for it. Raises BadRequest for a kind that is none, Busy beyond the limit, nats.errors.Error."""
        wished = [key[1:]]
        entry = self.entries.get(key)
        if entry is not None:
            entry.used_s = self._clock()
            if known and not entry.known:
                entry.known = True
                await self._wish(key[0], Wish(follower=self._bus.process, keys=wished))
            return entry
        self._check_room(key[0], known=known)
        entry = self.entries[key] = Entry(*key, self._clock(), self._max_age_s[market.base(key[1])[0]])

        subscription: Subscription | None = None
        read = 0

        async def hear(message: Msg) -> None:
            nonlocal read
            read += 1
            lost = subscription.delivered - subscription.pending_msgs - read if subscription is not None else 0
            if lost:
                self.dropped += lost
                read += lost
            self._take(entry, message)

        try:
            subscription = await self._bus.nc.subscribe(subjects.feed(*key), cb=hear, pending_msgs_limit=WAITING)
        except BaseException:  # a cancel too must not leave an entry that nothing feeds
            self.entries.pop(key, None)
            self._missing.pop(key, None)
            raise
        if self.entries.get(key) is not entry:  # left meanwhile
            await subscription.unsubscribe()
            return entry
        self._subscriptions[key] = subscription
        entry.known = known
        self._unread.put_nowait(entry)
        await self._wish(key[0], Wish(follower=self._bus.process, keys=wished if known else [], unproven=[] if known else wished))
        return entry

    def _check_room(self, exchange: str, *, known: bool) -> None:
        """Of doubtful markets a follower follows but few, or their names could take the room of all others. Raises Busy."""
        most = self._most if known else max(1, self._most // DOUBTFUL_PART)
        if len(self.entries) < most:
            return
        followed = [entry for entry in self.entries.values() if entry.exchange == exchange and (known or not entry.known)]
        if len(followed) >= most:
            raise Busy(f"{most} symbols of {exchange} are followed already")

    async def leave(self, key: Key) -> None:
        self.entries.pop(key, None)
        self._missing.pop(key, None)
        subscription = self._subscriptions.pop(key, None)  # none yet, while follow() is about it
        if subscription is not None:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    # ---------------------------------------------------------------- what it hears

    def _take(self, entry: Entry, message: Msg) -> None:
        try:
            proof = Proof.read((message.headers or {}).get(HEADER, ""))
        except UNREADABLE:
            return  # a stranger's noise
        if entry.take(message.data, proof, self._shards[entry.exchange, proof.shard]) and self._told is not None:
            self._told(entry)

    async def hear_beat(self, message: Msg) -> None:
        _, exchange, shard = message.subject.split(".")
        try:
            beat = market.decode_beat(message.data)
            heard = self._shards[exchange, int(shard)]
        except UNREADABLE:
            return
        tick_ms = beat.heard.get(self._bus.process)
        now_s = self._clock()
        self._beats[exchange, int(shard)] = now_s
        if heard.hear(beat, None if tick_ms is None or tick_ms > now_s * 1000 else tick_ms / 1000):
            await self._look_for_lost(exchange, beat, now_s)

    async def _look_for_lost(self, exchange: str, beat: market.Beat, now_s: float) -> None:
        """Ask once more for values that a beat told of and that do not come: a single message may get lost anywhere."""
        for name, (n, _) in beat.keys.items():
            kind, _, symbol = name.partition(".")
            key = (exchange, kind, symbol)
            entry = self.entries.get(key)
            if entry is not None and (entry.epoch != beat.epoch or entry.n < n):
                self._missing.setdefault(key, now_s)
        lost = []
        for key, since_s in list(self._missing.items()):
            entry = self.entries[key]
            shard = entry.shard
            listed = shard.listed.get(entry.key) if shard else None
            if shard is not None and (listed is None or (entry.epoch == shard.epoch and entry.n >= listed.n)):
                del self._missing[key]
            elif key[0] == exchange and now_s - since_s >= LOST_AFTER_S:
                lost.append(key[1:])
                self._missing[key] = now_s
        if lost:
            await self._wish(exchange, Wish(follower=self._bus.process, lost=lost))

    async def hear_call(self, _message: Msg) -> None:
        await self._repeat()

    # ---------------------------------------------------------------- what it says

    async def _wish(self, exchange: str, wish: Wish) -> None:
        with contextlib.suppress(BusError, nats.errors.Error):
            self._bus.check()
            await self._bus.nc.publish(subjects.wish(exchange), market.encode(wish))

    async def _repeat(self) -> None:
        """Say all that is wished, and leave what nobody has asked for lately."""
        horizon_s = self._clock() - self._unused_s
        for which in [which for which, heard_s in self._beats.items() if heard_s < horizon_s]:
            del self._beats[which]
            if not any(entry.shard is self._shards[which] for entry in self.entries.values()):
                del self._shards[which]
        for key in [key for key, entry in self.entries.items() if entry.used_s < horizon_s]:
            exchange = key[0]
            await self.leave(key)
            if not any(left[0] == exchange for left in self.entries):
                await self._wish(exchange, Wish(follower=self._bus.process, whole=True))
        for exchange in {exchange for exchange, *_ in self.entries}:
            entries = [entry for entry in self.entries.values() if entry.exchange == exchange]
            keys, unproven = ([(entry.kind, entry.symbol) for entry in entries if entry.known is known] for known in (True, False))
            await self._wish(exchange, Wish(follower=self._bus.process, keys=keys, unproven=unproven, whole=True))

    async def keep_wishing(self) -> None:
        while True:
            await asyncio.sleep(min(WISHES_S, self._unused_s / 4))
            await self._repeat()

    async def keep_ticking(self) -> None:
        while True:
            with contextlib.suppress(BusError, nats.errors.Error):
                self._bus.check()
                lately_s = self._clock() - WHOLE_S
                whole = any(heard_s > lately_s and not self._shards[which].complete for which, heard_s in self._beats.items())
                await self._bus.nc.publish(subjects.tick(self._bus.process), market.tick(self._clock(), whole=whole))
            await asyncio.sleep(TICK_S)

    async def keep_reading(self) -> None:
        """Read what was told before somebody began to follow: in turn, for JetStream may be slow, or not there."""
        while True:
            entry = await self._unread.get()
            if entry.epoch or not self._bus.nc.is_connected:
                continue
            question = f"$JS.API.DIRECT.GET.{subjects.MARKET}.{subjects.feed(entry.exchange, entry.kind, entry.symbol)}"
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                self._take(entry, await self._bus.nc.request(question, timeout=SNAPSHOT_S))


@asynccontextmanager
async def following(
    bus: Bus,
    max_age_s: Mapping[str, float],
    *,
    unused_s: float = 60.0,
    most: int = 2000,
    told: Told | None = None,
    clock: Callable[[], float] = market.clock,
) -> AsyncIterator[Follower]:
    """A follower for the life of a process."""
    follower = Follower(bus, max_age_s, unused_s=unused_s, most=most, told=told, clock=clock)
    subscriptions = [
        await bus.nc.subscribe(subjects.EVERY_BEAT, cb=follower.hear_beat),
        await bus.nc.subscribe(subjects.WISH_CALL, cb=follower.hear_call),
    ]
    async with running(follower.keep_ticking(), follower.keep_wishing(), follower.keep_reading()):
        try:
            yield follower
        finally:
            if not bus.nc.is_closed:
                for subscription in subscriptions:
                    await subscription.unsubscribe()
                for key in list(follower.entries):
                    await follower.leave(key)
