"""Order intents and outcomes, on disk before they count.

One stream, synced before an ack. An order lies under `unsettled.` from before it is sent until its outcome is known, with the request's
own frame, whose credentials are sealed: what lies there is exactly what somebody has to look up. Then it lies under `orders.`, without
the frame. A second intent under one idempotency key is refused without a time window, because a write may demand that nothing at all
lies under that key. One write before the send and one after it are all that an order waits for.

The stream captures no subject that is requested and replied to: it would answer in the worker's place.
"""

import contextlib
import shutil
import time
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from bus import config, subjects
from bus.connection import Bus
from bus.errors import BusDown, JournalFull
from bus.messages import plain
from bus.streams import ACK_S, FIRST, Duplicate, Record, Streams

DISK_ROOM = 1 << 30
"""Bytes of free disk that count as an empty journal."""
LEAST_DISK = 16 << 20
"""Bytes of free disk with which a journal that does not answer is called full."""
NEARLY_FULL = 0.8
"""Of its room: whoever watches is told."""


class Intent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An order, a raw write or a cancel, as a worker was about to send it. Nothing in it is secret.

    key: the idempotency key, which is the client order id. account: the keyed hash. side to amount: an order's, in plain terms
    (side buy or sell; price "market" or a number). resource: verb and path of a raw write. order_id: what a cancel cancels.
    asked_ms: the bridge took it from the host; received_ms: a worker did; expires_at_ms: its deadline, and the expiry it is signed
    with. worker: whose order it is while that process lives.
    """

    exchange: str
    path: str
    account: str
    method: str
    key: str
    asked_ms: int
    received_ms: int
    expires_at_ms: int
    worker: str
    symbol: str = ""
    side: str = ""
    offset: str = ""
    price: str = ""
    amount: str = ""
    resource: str = ""
    order_id: str = ""

    @property
    def fence(self) -> str:
        """The same for equal orders of an account; a raw write, which nobody can compare, is equal to none."""
        if self.method != "trade":
            return self.key
        price, amount = (text if text == "market" else plain(Decimal(text).normalize()) for text in (self.price, self.amount))
        parts = msgspec.msgpack.encode((self.symbol.upper(), self.side, self.offset, price, amount))
        return blake2b(parts, digest_size=8).hexdigest()

    @property
    def asked_for(self) -> str:
        """For people: "buy 0.01 BTC_USDT at 50000"."""
        if self.method == "trade":
            if self.side == "buy" and self.price == "market" and not self.offset:  # its amount is money
                return f"buy {self.symbol} for {self.amount} {self.symbol.partition('_')[2]} at market"
            words = (self.side, self.offset, self.amount, self.symbol, "at", self.price)
            return " ".join(word for word in words if word)
        return f"cancel {self.order_id} {self.symbol}".rstrip() if self.method == "cancel" else self.resource


class Outcome(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of an intent.

    placed: the exchange has the order; refused: it said no, or nothing was sent; absent: looked for after its expiry, and not there;
    done: a cancel or raw write was executed; unknown: sent, and nobody knows.
    by: the worker that sent it, a settler that looked it up, or a person. code, message: the error the host was told (bus/errors.py).
    sent_ms, answered_ms: the call to the exchange, 0 where there was none. looked: look-ups until it was known. reason: a person's.
    """

    state: Literal["placed", "refused", "absent", "done", "unknown"]
    by: Literal["worker", "settler", "person"] = "worker"
    process: str = ""
    order_id: int | str | None = None
    code: str = ""
    message: str = ""
    sent_ms: int = 0
    answered_ms: int = 0
    looked: int = 0
    reason: str = ""


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that is known of one order. frame: the request as it travelled, its credentials sealed, b"" for what nobody can look up, and
    once there is an outcome. journaled_ms, unknown_ms, outcome_ms: when the intent, that nobody knows, and the outcome were written."""

    intent: Intent
    frame: bytes = b""
    journaled_ms: int = 0
    unknown: Outcome | None = None
    unknown_ms: int = 0
    outcome: Outcome | None = None
    outcome_ms: int = 0


class Held(Struct, frozen=True):
    """An order under `unsettled.`, and the sequence of that record."""

    entry: Entry
    sequence: int

    @property
    def intent(self) -> Intent:
        return self.entry.intent


_decode = msgspec.json.Decoder(Entry).decode


def entry_of(record: Record) -> Entry:
    """Decode one record, with the time at which it was written where it says none itself."""
    entry = _decode(record.data)
    return entry if entry.journaled_ms else msgspec.structs.replace(entry, journaled_ms=record.written_ms)


class Journal:
    """disk: the folder of the stream where it lies on this machine, so that a disk that fills is seen in time."""

    def __init__(self, bus: Bus, settings: config.Orders, replicas: int = 1, disk: Path | None = None) -> None:
        self._bus = bus
        self._streams = Streams(bus, self._has_no_room, direct=replicas == 1)
        self._settings = settings
        self._replicas = replicas
        self._disk = disk if disk and disk.exists() else None
        self.used = 0.0
        """How much of its room is taken, 0 to 1, as of the last sweep()."""

    @property
    def is_full(self) -> bool:
        """Whether a record was refused for want of room since the last sweep()."""
        return self._streams.is_full

    async def open(self) -> None:
        """Find or make the stream. Raises BusDown."""
        await self._streams.make(
            StreamConfig(
                name=subjects.JOURNAL,
                subjects=["orders.>", "unsettled.>"],
                storage=StorageType.FILE,
                num_replicas=self._replicas,
                discard=DiscardPolicy.NEW,
                max_msgs=2 * self._settings.keep_orders,  # sweep() keeps it half full; beyond that new orders are refused
                max_msgs_per_subject=1,
                allow_msg_ttl=True,
                allow_direct=self._replicas == 1,
            )
        )

    # ---------------------------------------------------------------- one order's life

    async def begin(self, intent: Intent, frame: bytes, within_s: float = ACK_S) -> Held:
        """It is on disk on return. Raises Duplicate, JournalFull, BusDown; then the order must not be sent."""
        entry = Entry(intent=intent, frame=frame)
        among = subjects.anywhere(intent.exchange, intent.key)
        sequence = await self._streams.write(_place(intent), msgspec.json.encode(entry), after=FIRST, among=among, within_s=within_s)
        return Held(msgspec.structs.replace(entry, journaled_ms=self._bus.now_ms()), sequence)

    async def equal(self, intent: Intent, within_s: float = ACK_S, before: int | None = None) -> Entry | None:
        """An equal order that its host may not know of: told to be unknown, past its deadline without an outcome, placed untold; or on its
        way, begun before this one. before: this one's sequence, None where it has none yet. Raises BusDown."""
        wanted = subjects.equal(intent.exchange, intent.account, intent.fence)
        sequence, until_s = 1, time.monotonic() + within_s
        while record := await self._streams.next(subjects.JOURNAL, wanted, sequence, until_s - time.monotonic()):
            sequence = record.sequence + 1
            other = _decode(record.data)
            if other.intent.key != intent.key and (before is None or record.sequence < before or self.may_be_unknown(other)):
                return other
            if time.monotonic() > until_s:
                raise BusDown("too many equal orders are on their way; order not sent")
        return None

    def may_be_unknown(self, entry: Entry) -> bool:
        """Whether the host of an order may not know what became of it; else it waits for the answer still."""
        return bool(entry.unknown or entry.outcome or self._bus.now_ms() > entry.intent.expires_at_ms)

    async def mark_unknown(self, held: Held, unknown: Outcome, within_s: float = ACK_S) -> Held:
        """From here on an equal order is refused. Raises BusDown, JournalFull."""
        entry = msgspec.structs.replace(held.entry, unknown=unknown, unknown_ms=self._bus.now_ms())
        return Held(entry, await self._streams.write(_place(held.intent), msgspec.json.encode(entry), within_s=within_s))

    async def finish(self, held: Held, outcome: Outcome, within_s: float = ACK_S) -> Outcome:
        """Write the outcome; -> the first one where there was one. It is still held: let it go with told() or untold().

        Raises BusDown, JournalFull.
        """
        intent = held.intent
        entry = msgspec.structs.replace(held.entry, frame=b"", outcome=outcome, outcome_ms=self._bus.now_ms())
        try:
            await self._streams.write(_settled(intent), msgspec.json.encode(entry), after=FIRST, within_s=within_s)
        except Duplicate:
            first = await self.settled(intent.exchange, intent.key)
            return first.outcome if first is not None and first.outcome is not None else outcome
        except JournalFull:
            # What takes another record's place needs no room; a settler moves it as soon as there is some.
            try:
                await self._streams.write(_place(intent), msgspec.json.encode(entry), after=held.sequence, within_s=within_s)
            except Duplicate:
                there = await self.held(intent.exchange, intent.key)
                if there is None or there.entry.outcome is None:
                    raise JournalFull("its outcome is not written yet") from None
                return there.entry.outcome
        return outcome

    async def move(self, held: Held) -> None:
        """Write an outcome that found no room before where it belongs. Raises BusDown, JournalFull."""
        with contextlib.suppress(Duplicate):
            await self._streams.write(_settled(held.intent), msgspec.json.encode(held.entry), after=FIRST)

    async def told(self, held: Held) -> None:
        """Its host knows its outcome, or there is no order: nothing is left to settle, and an equal one may go out. Without waiting."""
        await self._streams.forget(subjects.JOURNAL, held.sequence)

    async def untold(self, held: Held, outcome: Outcome) -> None:
        """It was placed, and its host may not know: an equal order is taken for its repetition until nobody has tried for fence_s.
        Raises BusDown, JournalFull."""
        await self.fence(msgspec.structs.replace(held.entry, frame=b"", outcome=outcome))
        await self.told(held)

    async def fence(self, entry: Entry) -> None:
        """Let its fence stand for fence_s from now on. Raises BusDown, JournalFull."""
        await self._streams.write(_fence(entry.intent), msgspec.json.encode(entry), ttl_s=self._settings.fence_s)

    async def lift(self, intent: Intent) -> None:
        """Its host was told after all. Raises BusDown."""
        await self._streams.purge(subjects.JOURNAL, _fence(intent))

    async def is_fenced(self, key: str) -> bool:
        """Whether it was placed, and an equal one is still refused. Raises BusDown."""
        return await self._streams.next(subjects.JOURNAL, subjects.fenced("*", key, "*", "*")) is not None

    async def note(self, intent: Intent, outcome: Outcome | None = None) -> None:
        """Write a cancel's intent, or its outcome, without waiting for anything: a cancel goes out whatever the journal does."""
        outcome_ms = 0 if outcome is None else self._bus.now_ms()
        entry = Entry(intent=intent, journaled_ms=intent.received_ms, outcome=outcome, outcome_ms=outcome_ms)
        await self._streams.say(_settled(intent), msgspec.json.encode(entry))

    async def settled(self, exchange: str, key: str, within_s: float = ACK_S) -> Entry | None:
        """What has an outcome, None while it has none; a cancel in any case. exchange: "*" for any. Raises BusDown."""
        record = await self._streams.next(subjects.JOURNAL, subjects.settled(exchange, key, "*"), within_s=within_s)
        return entry_of(record) if record else None

    async def held(self, exchange: str, key: str, within_s: float = ACK_S) -> Held | None:
        """What has no outcome yet, or has not been let go. exchange: "*" for any. Raises BusDown."""
        return await self.hold(subjects.unsettled(exchange, key, "*", "*"), within_s)

    # ---------------------------------------------------------------- what has no outcome

    async def unsettled(self) -> list[str]:
        """Where they lie: subjects.unsettled() of each. Raises BusDown."""
        return await self._streams.subjects(subjects.JOURNAL, subjects.unsettled("*", "*", "*", "*"))

    async def hold(self, place: str, within_s: float = ACK_S) -> Held | None:
        """One of those, None where it was let go meanwhile. Raises BusDown."""
        record = await self._streams.next(subjects.JOURNAL, place, within_s=within_s)
        return Held(entry_of(record), record.sequence) if record else None

    # ---------------------------------------------------------------- room

    async def sweep(self) -> None:
        """Forget what is older than keep_days, or more than about keep_orders; never an order without an outcome. Raises BusDown."""
        state = await self._streams.state(subjects.JOURNAL)
        kept_ms = self._bus.now_ms() - int(self._settings.keep_days * 86_400_000)
        too_many = max(0, state["messages"] - self._settings.keep_orders)
        # Orders that were let go left gaps, about as many everywhere.
        cut = state["first_seq"] + too_many * (state["last_seq"] + 1 - state["first_seq"]) // max(1, state["messages"])
        oldest = max(cut, await self._streams.since(subjects.JOURNAL, kept_ms))
        if oldest > state["first_seq"]:
            for place in await self.unsettled():
                await self._carry(place, oldest)
            await self._streams.cut(subjects.JOURNAL, oldest)
        self.used, self._streams.is_full = await self.room(), False

    async def room(self) -> float:
        """How much of it is taken, 0 to 1. Raises BusDown."""
        state = await self._streams.state(subjects.JOURNAL)
        disk = 1 - shutil.disk_usage(self._disk).free / DISK_ROOM if self._disk is not None else 0.0
        return min(1.0, max(state["messages"] / (2 * self._settings.keep_orders), disk))

    def _has_no_room(self) -> bool:
        return self.used >= 1 or (self._disk is not None and shutil.disk_usage(self._disk).free < LEAST_DISK)

    async def _carry(self, place: str, oldest: int) -> None:
        """Write an unsettled order again, at the young end, where a cut does not reach it."""
        held = await self.hold(place)
        if held is not None and held.sequence < oldest and held.entry.outcome is None:
            with contextlib.suppress(Duplicate):  # settled, or written again by another worker, meanwhile
                await self._streams.write(place, msgspec.json.encode(held.entry), after=held.sequence)


def _place(intent: Intent) -> str:
    return subjects.unsettled(intent.exchange, intent.key, intent.account, intent.fence)


def _fence(intent: Intent) -> str:
    return subjects.fenced(intent.exchange, intent.key, intent.account, intent.fence)


def _settled(intent: Intent) -> str:
    return subjects.settled(intent.exchange, intent.key, intent.method)
