"""One exchange in a feeder: what is wished of its shards is subscribed, kept and told; what is not true any more is withdrawn.

A source that changes again before it was told is told once, with its newest value. While the bus takes no more nothing is told, and
nothing is proven that was not told.
"""

import asyncio
import contextlib
import logging
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

from nats.aio.msg import Msg

from bus import fleet, market, subjects
from bus.config import Market
from bus.connection import Bus
from bus.errors import BadRequest
from bus.lifecycle import running
from bus.market import UNREADABLE, Wish
from bus.metrics import FeedMetrics
from workers.book import BookError, EmptyBook
from workers.lag import Lag
from workers.lines import Lines, Session
from workers.shards import Shards
from workers.source import Source
from workers.teller import Teller, Value
from workers.updates import Channel, Refused, Update
from workers.venues import Feed
from workers.wishes import Pair, Wishes

log = logging.getLogger(__name__)

LOOK_S, CLAIM_S = 0.5, 0.1
"""How often wishes are swept, and shards looked at that nobody feeds."""
LISTENERS = "listeners"
"""The follower that plain NATS and MQTT clients are together."""
FIRST_S, FIRST_MOST_S = 3.0, 60.0
"""A subscription that brought nothing within this is made anew; twice as long each time."""
REFUSALS = 3
SLICE_S = 0.01
"""After so long of telling all others have a turn."""
FULL_S = 0.01
"""How often a bus that takes no more is looked at."""


class Desk:
    """sources: what is known, by channel. wishes: what is to be fed. clock: monotonic."""

    def __init__(
        self,
        bus: Bus,
        exchange: str,
        feed: Feed,
        settings: Market,
        *,
        session: Session,
        metrics: FeedMetrics,
        clock: Callable[[], float] = market.clock,
    ) -> None:
        self.exchange = exchange
        self.wishes = Wishes(settings.max_symbols)
        self.sources: dict[Channel, Source] = {}
        self.lag = Lag()
        self._bus = bus
        self._feed = feed
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        self._teller = Teller(bus, exchange, clock)
        self._shards = Shards(bus.process, settings.shards, bus.now_ms, clock)
        self._values: defaultdict[Channel, list[Value]] = defaultdict(list)
        self._channels: dict[Pair, Channel] = {}
        self.ask: Callable[[Iterable[Pair]], None] = lambda pairs: None
        """Finds out whether markets exist, and tells wishes.found(): workers/audits.py."""
        self._dirty: dict[Source, None] = {}
        self._work = asyncio.Event()
        self._looks = asyncio.Event()
        self.lines = Lines(
            exchange,
            feed,
            session=session,
            levels=settings.depth_levels,
            lag=self.lag,
            heard=self.heard,
            lost=self.lost,
            metrics=metrics,
            clock=clock,
        )
        metrics.followed.labels(exchange).set_function(lambda: self.presence.symbols)

    # ---------------------------------------------------------------- what the sockets say

    def heard(self, update: Update, proven_s: float) -> None:
        """Take an update of the exchange."""
        source = self.sources.get(update.channel)
        if source is None:
            return  # it was left, and the exchange had not heard of that yet
        if isinstance(update, Refused):
            log.warning("subscription refused", extra={"fields": {"exchange": self.exchange, "why": update.why}})
            source.refusals += 1
            if source.refusals < REFUSALS:  # it may have been too busy
                self.lines.again(update.channel, "refused")
            else:
                for value in self._values[update.channel]:
                    self.wishes.bar(value.pair, self._clock())
            return
        try:
            changed = source.take(update, proven_s)
        except EmptyBook:
            self.distrust(update.channel, "the book has an empty side", empty=True)
        except BookError as e:
            self.distrust(update.channel, str(e), again=True)
        else:
            if not changed:
                self.prove(source)
            elif source in self._dirty:
                self._metrics.conflated.labels(self.exchange).inc()
            else:
                self._tell_soon(source)

    def lost(self, channels: Sequence[Channel], why: str) -> None:
        """Withdraw what a connection fed that has ended."""
        for channel in channels:
            self.distrust(channel, why)

    def distrust(self, channel: Channel, why: str, *, again: bool = False, empty: bool = False) -> None:
        """Withdraw what is known of a channel. again: subscribe to it anew; empty: there is only nothing to tell."""
        source = self.sources.get(channel)
        if source is None:
            return
        if source.known:
            log.warning("withdrawn", extra={"fields": {"exchange": self.exchange, "kind": channel.kind, "why": why}})
            self._metrics.withdrawn.labels(self.exchange).inc()
            self._tell_soon(source)
        if empty:
            source.blank()
        else:
            source.forget()
        if again:
            self.lines.again(channel, why)

    def prove(self, source: Source) -> None:
        """A source was proven without a change: so is what was told of it, unless that waits to be told anew."""
        if source not in self._dirty:
            for value in self._values[source.channel]:
                self._teller.prove(value, source.proven_s)

    # ---------------------------------------------------------------- what the bus says

    async def hear_wish(self, message: Msg) -> None:
        try:
            wish = market.decode_wish(message.data)
        except UNREADABLE:
            return  # a stranger's noise
        self._doubt(wish.unproven)
        self._metrics.refused.labels(self.exchange).inc(self.wishes.hear(wish, self._clock()))
        for pair in wish.lost:
            if pair in self._channels and (source := self.sources.get(self._channels[pair])) is not None:
                self._tell_soon(source)
        if not wish.whole:
            self._looks.set()

    async def hear_beat(self, message: Msg) -> None:
        try:
            shard, beat = int(message.subject.rpartition(".")[2]), market.decode_beat(message.data)
        except UNREADABLE:
            return
        if self._shards.hear(shard, beat):
            log.warning("another feeder took a shard over", extra={"fields": {"exchange": self.exchange, "shard": shard}})
            self._look()

    def listened(self, pairs: set[Pair]) -> None:
        """Take what plain listeners listen to now."""
        now_s = self._clock()
        self._doubt(pairs)
        self.wishes.hear(Wish(follower=LISTENERS, unproven=list(pairs), whole=True), now_s)

    def _doubt(self, pairs: Iterable[Pair]) -> None:
        """Have it found out whether markets of ours exist."""
        now_s = self._clock()
        unknown = ((pair, self._channel(pair, now_s)) for pair in self.wishes.unknown(pairs, now_s))
        self.ask([pair for pair, channel in unknown if channel is not None and self._shard(channel) in self._teller.parts])

    # ---------------------------------------------------------------- what is fed

    @property
    def part_of_exchange(self) -> float:
        """How much of it is fed here, 0 to 1."""
        return len(self._teller.parts) / self._settings.shards

    def _shard(self, channel: Channel) -> int:
        return zlib.crc32(channel.instrument.encode()) % self._settings.shards

    def spelling(self, channel: Channel) -> str:
        """A symbol by which hosts know what a source is of."""
        return self._values[channel][0].pair[1]

    def _look(self) -> None:
        """Make what is fed be what is wished of the shards that are ours."""
        parts, epochs = self._teller.parts, self._shards.epochs
        for shard in [shard for shard, part in parts.items() if epochs.get(shard) != part.epoch]:
            for value in list(parts[shard].values.values()):
                self._leave(value)
            del parts[shard]
        if begun := epochs.keys() - parts.keys():
            for shard in begun:
                self._teller.begin(shard, epochs[shard])
            self._doubt(self.wishes.doubtful)
        now_s = self._clock()
        wanted = self.wishes.wanted(now_s)
        for part in parts.values():
            for pair in part.values.keys() - wanted:
                self._leave(part.values[pair])
        self._channels = {pair: channel for pair, channel in self._channels.items() if pair in wanted}
        for pair in wanted:
            if (channel := self._channels.get(pair) or self._channel(pair, now_s)) is not None:
                self._channels[pair] = channel
                ours = parts.get(self._shard(channel))
                if ours is not None and pair not in ours.values:
                    ours.values[pair] = Value(pair, ours)
                    self._follow(channel, ours.values[pair])

    def _channel(self, pair: Pair, now_s: float) -> Channel | None:
        """What feeds a pair; None, and the wish ends, where nothing can."""
        try:
            kind, period_m = market.base(pair[0])
            if kind not in self._feed.feeds:
                raise BadRequest(f"{self.exchange} feeds no {kind}")
            channel = self._feed.channel(kind, pair[1], period_m)
        except (BadRequest, LookupError, TypeError, ValueError, ArithmeticError) as e:  # what a venue makes of a symbol that a host chose
            log.warning("cannot be fed", extra={"fields": {"exchange": self.exchange, "why": f"{type(e).__name__}: {e}"}})
            self.wishes.bar(pair, now_s)
            return None
        return channel

    def _follow(self, channel: Channel, value: Value) -> None:
        self._values[channel].append(value)
        if channel not in self.sources:
            self.sources[channel] = Source(channel, self._settings.depth_levels, self._feed.checksum)
            self.lines.follow(channel)
        else:  # for another spelling
            self._tell_soon(self.sources[channel])

    def _leave(self, value: Value) -> None:
        self._teller.end(value)
        channel = self._channels[value.pair]
        self._values[channel].remove(value)
        if not self._values[channel]:
            del self._values[channel]
            self._dirty.pop(self.sources.pop(channel), None)
            self.lines.leave(channel)

    # ---------------------------------------------------------------- what is told

    def _tell_soon(self, source: Source) -> None:
        self._dirty[source] = None
        self._work.set()

    def tell_all(self) -> None:
        """Tell everything once more: the bus was away, and what was told meanwhile is lost."""
        for part in self._teller.parts.values():
            part.whole = True
        for source in self.sources.values():
            self._tell_soon(source)

    async def _keep_telling(self) -> None:
        while True:
            await self._work.wait()
            if self._teller.waits:
                await asyncio.sleep(FULL_S)  # nats-py has nothing that one could wait for
                continue
            rest_s = self._clock() + SLICE_S
            while self._dirty and not self._teller.waits and self._clock() < rest_s:
                source = next(iter(self._dirty))
                changes = source.changes
                await self._tell(source)
                if source.changes == changes:  # until here nothing that was told before counts as proven
                    self._dirty.pop(source, None)
            if not self._dirty:
                self._work.clear()
            await asyncio.sleep(0)

    async def _tell(self, source: Source) -> None:
        for value in list(self._values.get(source.channel, ())):
            if source.known:
                await self._teller.tell(value, source.content(value.pair[1]), source.proven_s)
            elif value.n:  # else there is nothing to withdraw
                await self._teller.tell(value, None, market.NEVER)
            else:
                continue
            self._metrics.values.labels(self.exchange, source.channel.kind).inc()

    async def _keep_claiming(self) -> None:
        while True:
            if claimed := self._shards.claims():
                log.info("feeding", extra={"fields": {"exchange": self.exchange, "shards": claimed}})
                self._look()
            await asyncio.sleep(CLAIM_S)

    async def _keep_looking(self) -> None:
        while True:
            self._look()
            for source in self.sources.values():
                waits_s = min(FIRST_MOST_S, FIRST_S * 2**source.silences)
                if not (source.known or source.empty) and self.lines.silent_s(source.channel) > waits_s:
                    source.silences += 1
                    self.lines.again(source.channel, "nothing came")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._looks.wait()
            self._looks.clear()

    @property
    def presence(self) -> fleet.Feed:
        values = [value for part in self._teller.parts.values() for value in part.values.values()]
        ages = self._settings.max_age_s
        return fleet.Feed(
            kinds=sorted(self._feed.feeds),
            shards=sorted(self._teller.parts),
            symbols=sum(value.n > 0 for value in values),
            waiting=sum(value.n == 0 for value in values),
            refused=self.wishes.refused(self._clock()),
            provable=int(self._settings.audits_per_s * self.part_of_exchange * min(ages.ticker, ages.depth)),
        )

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Feed until left; then say so, that another feeder takes over at once."""
        nc = self._bus.nc
        subscriptions = [
            await nc.subscribe(subjects.wish(self.exchange), cb=self.hear_wish),
            await nc.subscribe(subjects.tick("*"), cb=self._teller.hear_tick),
            await nc.subscribe(subjects.beat(self.exchange, "*"), cb=self.hear_beat),
        ]
        await nc.publish(subjects.WISH_CALL)
        jobs = (self._keep_telling(), self._keep_claiming(), self._keep_looking(), self._teller.keep_beating())
        async with running(self.lines.run(), *jobs):
            try:
                yield
            finally:
                await self._teller.beat(leaving=True)
                if not nc.is_closed:
                    for subscription in subscriptions:
                        await subscription.unsubscribe()
