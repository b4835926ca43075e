"""Which contract a bare symbol means: what workers read of the futures state, remembered until somebody changes it.

A worker says with each answer whose state it rests on; a bridge keys it by what a host sends: (path, access key, secret key). A change
is told to all bridges (bus/sessions.py), and a bridge that may not have heard of it, because it was cut off or stood still, knows
nothing: then a worker answers, who reads the state.
"""

import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from bridge.fmz import HostCall
from bridge.routes import Route
from bus import market, subjects
from bus.connection import Bus
from bus.errors import BusError
from bus.fleet import Venue
from bus.messages import Robot
from bus.sessions import Forgot, decode_changed, in_contract

MOST = 10_000
SURE_S = market.BEAT_OLD_S - market.TICK_S
"""So long after a tick of its own that came back a bridge relies on what it knows: less than a change waits for a silent bridge."""

KNOWN_S = 30.0
"""So long what a worker read is relied on: a change may be told to nobody, by a worker that was killed over it."""

Who = tuple[str, str, str]
"""(path, access key, secret key)"""


class Asked(Struct, frozen=True):
    """The moment at which a request left. changes: heard until then; reconnects: of the connection, during which a change is missed."""

    changes: int
    reconnects: int


class _Known(Struct, frozen=True):
    session: str
    contract: str
    learned_s: float


class Resolver:
    """venues: what workers say of their exchanges (fleet.Fleet.venues)."""

    def __init__(self, bus: Bus, venues: Mapping[str, Venue], *, most: int = MOST, clock: Callable[[], float] = market.clock) -> None:
        self._bus = bus
        self._venues = venues
        self._most = most
        self._clock = clock
        self._sure_s = market.NEVER
        self._known: OrderedDict[Who, _Known] = OrderedDict()
        self._who: dict[str, set[Who]] = {}
        self._changed: OrderedDict[str, int] = OrderedDict()
        self._changes = self._forgotten_changes = self._reconnects = 0

    def resolve(self, route: Route, call: HostCall, symbol: str) -> str | None:
        """The symbol with the contract that this robot means by it, None where that is not known."""
        venue = self._venues.get(route.exchange)
        if venue is None:
            return None
        if "." in symbol or not venue.contracts:
            return symbol
        if self._bus.nc.stats["reconnects"] != self._reconnects:
            self._heed_connection()
        who = (route.path, call.access_key, call.secret_key)
        known = self._known.get(who)
        now_s = self._clock()
        if known is None or now_s - self._sure_s >= SURE_S or now_s - known.learned_s >= KNOWN_S:
            return None
        self._known.move_to_end(who)
        return in_contract(symbol, known.contract) if known.contract else symbol

    def asked(self) -> Asked:
        """To be called before a request leaves; learn() wants it."""
        self._heed_connection()
        return Asked(self._changes, self._reconnects)

    def learn(self, route: Route, call: HostCall, robot: Robot, asked: Asked) -> None:
        """Keep what a worker read, unless it may have changed since it was asked."""
        self._heed_connection()
        if asked.reconnects != self._reconnects or self._changed.get(robot.session, self._forgotten_changes) > asked.changes:
            return
        who = (route.path, call.access_key, call.secret_key)
        self._drop(who)
        self._known[who] = _Known(robot.session, robot.contract, self._clock())
        self._who.setdefault(robot.session, set()).add(who)
        if len(self._known) > self._most:
            self._drop(next(iter(self._known)))

    async def hear(self, message: Msg) -> None:
        """Forget a state that was changed, unless what is known of it is what it is now, and say so."""
        try:
            changed = decode_changed(message.data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return  # a stranger's noise
        self._changes += 1
        self._changed[changed.session] = self._changes
        self._changed.move_to_end(changed.session)
        if len(self._changed) > self._most:
            self._forgotten_changes = self._changed.popitem(last=False)[1]
        for who in list(self._who.get(changed.session, ())):
            if self._known[who].contract != changed.contract:
                self._drop(who)
        if changed.teller:
            with contextlib.suppress(BusError, nats.errors.Error):
                self._bus.check()
                answer = msgspec.json.encode(Forgot(self._bus.process, changed.number))
                await self._bus.nc.publish(subjects.forgot(changed.teller), answer)

    async def hear_tick(self, message: Msg) -> None:
        """Our own tick, which came back: whatever was told before it was sent has been heard."""
        with contextlib.suppress(ValueError):
            self._sure_s = max(self._sure_s, market.read_tick(message.data)[0] / 1000)

    def _drop(self, who: Who) -> None:
        known = self._known.pop(who, None)
        if known is not None:
            same = self._who[known.session]
            same.discard(who)
            if not same:
                del self._who[known.session]

    def _heed_connection(self) -> None:
        """What was changed while the connection was lost was told to others only."""
        reconnects = self._bus.nc.stats["reconnects"]
        if reconnects != self._reconnects:
            self._reconnects = reconnects
            self._known.clear()
            self._who.clear()


@asynccontextmanager
async def resolving(bus: Bus, venues: Mapping[str, Venue]) -> AsyncIterator[Resolver]:
    """A resolver for the life of a bridge; bus/follow.py sends its ticks."""
    resolver = Resolver(bus, venues)
    subscriptions = [
        await bus.nc.subscribe(subjects.CHANGED, cb=resolver.hear),
        await bus.nc.subscribe(subjects.tick(bus.process), cb=resolver.hear_tick),
    ]
    try:
        yield resolver
    finally:
        if not bus.nc.is_closed:
            for subscription in subscriptions:
                await subscription.unsubscribe()
