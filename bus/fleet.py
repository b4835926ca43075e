"""Presence: who is alive, what it serves, where its admin listener is.

Each process says so every half second on its own subject, plain and un-acked, so that presence works when JetStream does not and
nothing has to be re-created after a restart of NATS. Whoever listens knows the whole fleet after one beat.
"""

import asyncio
import contextlib
import os
import platform
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from bus import subjects
from bus.connection import Bus
from bus.lifecycle import running

BEAT_S = 0.5
GONE_S = 2.0
MANY = 256


class Venue(Struct, frozen=True, omit_defaults=True):
    """What a worker says of an exchange that it serves. public: methods whose answer is the same for everybody; contracts: whether
    the futures state of a robot applies to it."""

    public: list[str] = []
    contracts: bool = False


class Feed(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a feeder says of an exchange. kinds: those it can feed; shards: the parts that it feeds now; symbols: (kind, symbol) pairs fed;
    provable: so many quiet ones the budget of audits can prove; waiting: pairs wished that have no value yet; refused: beyond the limit."""

    kinds: list[str] = []
    shards: list[int] = []
    symbols: int = 0
    waiting: int = 0
    refused: int = 0
    provable: int = 0


class Presence(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process. serves: exchanges, for a worker; venues: more about them. feeds: by exchange, for a feeder. address: where it listens
    to hosts, for a bridge. up_s: how long it runs."""

    process: str
    role: str
    host: str
    pid: int
    admin: str
    version: str
    up_s: float = 0.0
    serves: list[str] = []
    venues: dict[str, Venue] = {}
    feeds: dict[str, Feed] = {}
    address: str = ""
    ready: bool = True
    leaving: bool = False


_decode = msgspec.json.Decoder(Presence).decode


@asynccontextmanager
async def announced(
    bus: Bus,
    *,
    admin: str,
    version: str,
    serves: Sequence[str] = (),
    venues: Mapping[str, Venue] | None = None,
    feeds: Callable[[], dict[str, Feed]] = dict,
    address: str = "",
    ready: Callable[[], bool],
) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Say that we live, every half second; say good-bye on the way out, or earlier by calling what this yields."""
    started = time.monotonic()
    subject = subjects.presence(bus.role, bus.process)
    leaving = False

    def now() -> bytes:
        return msgspec.json.encode(
            Presence(
                process=bus.process,
                role=bus.role,
                host=platform.node(),
                pid=os.getpid(),
                admin=admin,
                version=version,
                up_s=round(time.monotonic() - started, 1),
                serves=list(serves),
                venues=dict(venues or {}),
                feeds=feeds(),
                address=address,
                ready=ready(),
                leaving=leaving,
            )
        )

    async def say() -> None:
        if bus.nc.is_connected:
            with contextlib.suppress(nats.errors.Error):
                await bus.nc.publish(subject, now())

    async def called(_message: Msg) -> None:
        await say()

    async def leave() -> None:
        nonlocal leaving
        leaving = True
        await say()

    async def beat() -> None:
        while True:
            await say()
            await asyncio.sleep(BEAT_S)

    roll_call = await bus.nc.subscribe(subjects.ROLL_CALL, cb=called)
    async with running(beat()):
        try:
            yield leave
        finally:
            if not bus.nc.is_closed:
                await roll_call.unsubscribe()
            await leave()


class Fleet:
    """What the beats heard so far add up to."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._heard: dict[str, tuple[float, Presence]] = {}
        self.exchanges: set[str] = set()
        """Every exchange that a worker was ever heard to serve: a name keeps its meaning while its workers restart."""
        self.venues: dict[str, Venue] = {}
        """What was last said of each."""

    async def hear(self, message: Msg) -> None:
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):  # a stranger's noise is nobody's presence
            presence = _decode(message.data)
            self.exchanges.update(presence.serves)
            self.venues.update(presence.venues)
            if presence.leaving:
                self._heard.pop(presence.process, None)
            else:
                self._heard[presence.process] = (self._clock(), presence)
                if len(self._heard) > MANY:
                    self.alive()  # a process that was killed says no good-bye: forget those, or a year of restarts adds up

    @property
    def settled(self) -> bool:
        """Whether everybody who is alive had time to be heard."""
        return self._clock() - self._since >= GONE_S

    def alive(self) -> list[Presence]:
        """Whoever was heard within 2 s, by role and name."""
        horizon = self._clock() - GONE_S
        self._heard = {process: heard for process, heard in self._heard.items() if heard[0] >= horizon}
        return sorted((presence for _, presence in self._heard.values()), key=lambda p: (p.role, p.process))


@asynccontextmanager
async def followed(bus: Bus) -> AsyncIterator[Fleet]:
    """Listen to the beats, after asking everybody for one."""
    fleet = Fleet()
    subscription = await bus.nc.subscribe(f"{subjects.FLEET}.>", cb=fleet.hear)
    await bus.nc.publish(subjects.ROLL_CALL)
    try:
        yield fleet
    finally:
        if not bus.nc.is_closed:
            await subscription.unsubscribe()
