"""The journal as people read it: what was asked for, what became of it, and what is open. It only reads.

A whole journal is read through a consumer, 5,000 records at a time: 10,000 of them take 0.15 s, and 3 s one by one (measured). On a
cluster such a read may come from a follower and miss the last moment; what is asked about one order is asked of the leader.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from bus import subjects
from bus.connection import Bus
from bus.errors import BusDown, from_wire
from bus.journal import Entry as Kept
from bus.journal import Intent, Journal, Outcome, entry_of
from bus.streams import Record

BATCH = 5000
WAIT_S = 5.0
"""For one batch, or one page of subjects."""
AT_ONCE = 64
IDLE_NS = 30_000_000_000
"""After which the server forgets a consumer whose reader has died."""
LEAST_PREFIX = 6
KEY_LENGTH = 32

State = Literal["placed", "refused", "absent", "done", "unknown", "in flight"]
"""An outcome's states, and those of what has none. in flight: its deadline is not over."""


class NotOne(Exception):
    """What was typed names no order, or several; the text says which."""


class Entry(Struct, frozen=True, kw_only=True):
    """One order, raw write or cancel; each *_ms is when that was written, 0 for never.

    waiting: it lies among the unsettled. sealed: with the credentials to look it up. fenced: it was placed, its host may not know, and
    an equal one is refused; asked of single orders only.
    """

    intent: Intent
    intent_ms: int = 0
    unknown: Outcome | None = None
    unknown_ms: int = 0
    outcome: Outcome | None = None
    outcome_ms: int = 0
    waiting: bool = False
    sealed: bool = False
    fenced: bool = False

    def state(self, now_ms: int) -> State:
        if self.outcome is not None:
            return self.outcome.state
        if self.unknown is not None:
            return "unknown"
        if now_ms <= self.intent.expires_at_ms:
            return "in flight"
        return "unknown"

    @property
    def needs_a_person(self) -> bool:
        """Nobody can look it up: a raw write, or an order at an exchange without look-ups, which the settlers leave as unknown."""
        return self.waiting and (not self.sealed or (self.unknown is not None and self.unknown.by == "settler"))

    @property
    def order_id(self) -> str:
        """The exchange's, "" while it is not known. For a cancel: what it cancels."""
        known = self.outcome.order_id if self.outcome else None
        return self.intent.order_id if known is None else str(known)

    @property
    def told(self) -> str:
        """The error a host reads about it, "" for none."""
        last = self.outcome or self.unknown
        return told(last) if last else ""

    def fields(self, now_ms: int) -> dict[str, Any]:
        """Everything, for programs."""
        records = {
            name: msgspec.structs.asdict(one) if one else None for name, one in (("unknown", self.unknown), ("outcome", self.outcome))
        }
        written = {name: getattr(self, name) for name in ("intent_ms", "unknown_ms", "outcome_ms")}
        seen = {
            "state": self.state(now_ms),
            "waiting": self.waiting,
            "needs_a_person": self.needs_a_person,
            "fenced": self.fenced,
            "told": self.told,
        }
        return msgspec.structs.asdict(self.intent) | {"asked_for": self.intent.asked_for, "fenced": self.fenced} | seen | written | records


def told(outcome: Outcome) -> str:
    """The error a host reads, "" for none."""
    return from_wire(outcome.code, outcome.message).text if outcome.code else ""


# ---------------------------------------------------------------- many


async def written(bus: Bus, journal: Journal, *, exchange: str = "", since_ms: int) -> list[Entry]:
    """Everything that was asked for since then, oldest first. exchange: "" for all. Raises BusDown."""
    where = subjects.token(exchange) if exchange else "*"
    # In this order: what is settled meanwhile is in both, and in neither never.
    entries = {entry.intent.key: entry for entry in await waiting(bus, where)}
    async for record in read(bus, subjects.settled(where, "*", "*"), since_ms=since_ms):
        entry = _entry(record)
        if entry.outcome is not None or entry.intent.key not in entries:
            entries[entry.intent.key] = entry
    return sorted((entry for entry in entries.values() if entry.intent.asked_ms >= since_ms), key=lambda entry: entry.intent.asked_ms)


async def waiting(bus: Bus, exchange: str = "*") -> list[Entry]:
    """Everything without an outcome, oldest first. Raises BusDown."""
    entries = [_entry(record) async for record in read(bus, subjects.unsettled(exchange, "*", "*", "*"))]
    return sorted(entries, key=lambda entry: entry.intent.asked_ms)


async def cancels(bus: Bus, journal: Journal, order: Entry) -> list[Entry]:
    """Those of one order, by its id, account and exchange. Raises BusDown."""
    if order.intent.method != "trade" or not order.order_id:
        return []
    wanted = subjects.settled(order.intent.exchange, "*", "cancel")
    found = [_entry(record) async for record in read(bus, wanted, since_ms=order.intent.asked_ms)]
    same = (order.intent.account, order.order_id)
    mine = [entry for entry in found if (entry.intent.account, entry.intent.order_id) == same]
    return sorted(mine, key=lambda entry: entry.intent.asked_ms)


# ---------------------------------------------------------------- one


async def one(journal: Journal, key: str) -> Entry | None:
    """Raises BusDown."""
    held = await journal.held("*", key)  # first: it goes after its outcome has come
    settled = await journal.settled("*", key)
    if settled is not None:
        return msgspec.structs.replace(_seen(settled, waiting=False), fenced=await journal.is_fenced(key))
    return _seen(held.entry, waiting=True) if held is not None else None


async def several(journal: Journal, keys: list[str]) -> dict[str, Entry]:
    """By key, in that order; without those that the journal has forgotten. Raises BusDown."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(key: str) -> Entry | None:
        async with slots:
            return await one(journal, key)

    found = await asyncio.gather(*map(ask, keys))
    return {entry.intent.key: entry for entry in found if entry is not None}


async def find(bus: Bus, journal: Journal, typed: str) -> Entry:
    """By its key, or the first characters of it. Raises NotOne, BusDown."""
    prefix = typed.strip().lower()
    if not LEAST_PREFIX <= len(prefix) <= KEY_LENGTH or set(prefix) - set("0123456789abcdef"):
        raise NotOne(f"{subjects.shown(typed)} is no key: give {LEAST_PREFIX} to {KEY_LENGTH} characters of [0-9a-f]")
    found = [prefix] if len(prefix) == KEY_LENGTH else await keys(bus, prefix)
    if len(found) > 1:
        named = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise NotOne(f"{len(found)} orders begin with {prefix}: {named}; give more of it")
    entry = await one(journal, found[0]) if found else None
    if entry is None:
        raise NotOne(
            f"the journal has no order {prefix}: nothing is sent before it is there, and it stays [orders] keep_days;"
            " `fmzbus orders --since 1d --cancels` lists what it has"
        )
    return entry


async def keys(bus: Bus, prefix: str) -> list[str]:
    """All that begin so. Raises BusDown."""
    found: set[str] = set()
    for wanted in ("orders.>", "unsettled.>"):
        offset, total = 0, 1
        while offset < total:
            page = await _ask(bus, f"$JS.API.STREAM.INFO.{subjects.JOURNAL}", {"subjects_filter": wanted, "offset": offset})
            names = page["state"].get("subjects") or {}
            found.update(key for key in (name.split(".")[2] for name in names) if key.startswith(prefix))
            offset, total = offset + (len(names) or BATCH), page.get("total", 0)
    return sorted(found)


def _entry(record: Record) -> Entry:
    return _seen(entry_of(record), waiting=record.subject.startswith("unsettled."), written_ms=record.written_ms)


def _seen(kept: Kept, *, waiting: bool, written_ms: int = 0) -> Entry:
    return Entry(
        intent=kept.intent,
        intent_ms=kept.journaled_ms,
        unknown=kept.unknown,
        unknown_ms=kept.unknown_ms,
        outcome=kept.outcome,
        outcome_ms=(kept.outcome_ms or written_ms) if kept.outcome else 0,
        waiting=waiting,
        sealed=bool(kept.frame),
    )


# ---------------------------------------------------------------- a stream, read in batches


async def read(bus: Bus, wanted: str, *, since_ms: int = 0) -> AsyncIterator[Record]:
    """What the journal has on these subjects, written since then, oldest first. To be read to its end. Raises BusDown."""
    stream = subjects.JOURNAL
    began = datetime.fromtimestamp(since_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    start = {"deliver_policy": "by_start_time", "opt_start_time": began} if since_ms > 0 else {"deliver_policy": "all"}
    quiet = {"ack_policy": "none", "mem_storage": True, "num_replicas": 1, "inactive_threshold": IDLE_NS}
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    inbox = bus.nc.new_inbox()
    subscription = await bus.nc.subscribe(inbox, cb=arrived.put)
    try:
        made = await _ask(
            bus, f"$JS.API.CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": start | quiet | {"filter_subject": wanted}}
        )
        name, left = made["name"], int(made.get("num_pending", 0))
        while left:
            batch = min(BATCH, left)
            question = msgspec.json.encode({"batch": batch, "no_wait": True})
            await bus.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", question, reply=inbox)
            for _ in range(batch):
                async with asyncio.timeout(WAIT_S):
                    message = await arrived.get()
                if message.headers and "Status" in message.headers:  # the rest was purged meanwhile
                    left = 0
                    break
                about = message.metadata
                yield Record(message.subject, about.sequence.stream, round(about.timestamp.timestamp() * 1000), message.data)
                left = about.num_pending
        await bus.nc.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{name}")
    except (nats.errors.Error, TimeoutError) as e:
        raise BusDown("the journal does not answer") from e
    finally:
        if not bus.nc.is_closed:
            await subscription.unsubscribe()


async def _ask(bus: Bus, subject: str, question: dict[str, Any]) -> dict[str, Any]:
    bus.check()
    try:
        reply = await bus.nc.request(subject, msgspec.json.encode(question), timeout=WAIT_S)
    except (nats.errors.Error, TimeoutError) as e:
        raise BusDown("the journal does not answer") from e
    answer: dict[str, Any] = msgspec.json.decode(reply.data)
    if "error" in answer:
        raise BusDown(f"the journal cannot be read: {answer['error'].get('description', 'it does not answer')}")
    return answer
