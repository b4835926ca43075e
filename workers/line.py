"""One socket of an exchange, as workers/lines.py keeps it: its channels, what is to be said on it, and what its pings prove."""

import asyncio

from msgspec import Struct, field

from bus.market import NEVER
from workers.updates import Channel

INFINITE = float("inf")


class State(Struct):
    """Of a channel on its connection. asked: it is subscribed to, or waits for its turn. due_s: when to do that, or when it was done,
    infinite before its turn. tries: again() in a row. snapshot_by_s: until then a delta may be of the subscription before."""

    asked: bool = False
    refused: bool = False
    due_s: float = NEVER
    tries: int = 0
    snapshot_by_s: float = NEVER


class Line(Struct, eq=False):
    """One connection. dropped: channels to unsubscribe. changed: there is something to say. pings: when each was sent that was not answered
    yet; since_s: whatever comes now was sent after that."""

    channels: dict[Channel, State] = field(default_factory=dict)
    dropped: dict[Channel, None] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    open: bool = False
    pings: dict[bytes, float] = field(default_factory=dict)
    since_s: float = NEVER

    def drop(self, channel: Channel, state: State) -> None:
        if state.asked:
            self.dropped[channel] = None
            state.asked = False
        self.changed.set()

    def answered(self, ping: bytes) -> None:
        """aiohttp's own pings, which are empty, and those that a later one was answered for mean nothing."""
        if (sent_s := self.pings.get(ping)) is not None:
            self.since_s = sent_s
            self.pings = {payload: later_s for payload, later_s in self.pings.items() if later_s > sent_s}
