"""JetStream for what must not be lost: a record on disk or an error that says what to think, and reads from the stream's leader."""

import asyncio
import base64
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.js.api import StreamConfig

from bus.connection import Bus
from bus.errors import BusDown, BusError, Internal, JournalFull

MUTE = "the journal does not answer"
ACK_S = 1.0
"""How long the journal may take for one record."""
WRONG_SEQUENCE = 10071
NOT_DECIDED, DECIDED_S = 10164, 0.01
"""A cluster is about to write another record there: what comes of it is known a moment later."""
FULL = (10002, 10023, 10047, 10077)
"""Err codes of nats-server for a stream, an account or a disk without room."""
NO_MESSAGE = 10037
NOT_FOUND = "404"
LAST, LAST_AMONG = "Nats-Expected-Last-Subject-Sequence", "Nats-Expected-Last-Subject-Sequence-Subject"
FIRST = 0
"""What a subject without a message has for its last sequence."""
LOST = (nats.errors.Error, nats.js.errors.Error, TimeoutError, OSError)
"""What nats-py raises where JetStream does not answer, or not as asked."""


@contextmanager
def lost_means(text: str) -> Iterator[None]:
    """Raises BusDown with that text for any of LOST."""
    try:
        yield
    except LOST as e:
        raise BusDown(text) from e


class Record(Struct, frozen=True):
    """One message of a stream. written_ms: by the server's clock."""

    subject: str
    sequence: int
    written_ms: int
    data: bytes


class Duplicate(Exception):
    """The subject has another last message than was expected."""


class _Got(Struct):
    class Message(Struct):
        subject: str
        seq: int
        time: datetime
        data: str = ""

    class Error(Struct):
        err_code: int = 0
        description: str = ""

    message: Message | None = None
    error: Error | None = None


_decode_got = msgspec.json.Decoder(_Got).decode


class Streams:
    """is_full: whether a record was refused for want of room. has_no_room: tells whether a silence is that of a full disk. direct: the
    streams have one replica, which answers reads by itself."""

    def __init__(self, bus: Bus, has_no_room: Callable[[], bool], *, direct: bool) -> None:
        self._bus = bus
        self._direct = direct
        self._js = bus.nc.jetstream(timeout=ACK_S)
        self._has_no_room = has_no_room
        self.is_full = False

    async def make(self, wanted: StreamConfig) -> None:
        """Find or make a stream, or change its limits. Raises BusDown."""
        with lost_means(MUTE):
            try:
                await self._js.add_stream(wanted)
            except nats.js.errors.BadRequestError:  # there with other limits
                await self._js.update_stream(wanted)

    async def write(
        self,
        subject: str,
        data: bytes,
        *,
        after: int | None = None,
        among: str = "",
        within_s: float = ACK_S,
        ttl_s: float | None = None,
    ) -> int:
        """-> its sequence, once it is on disk.

        after: the sequence of the last message on the subject, or among those that a filter finds; FIRST for none, None for whatever.
        ttl_s: how long it lies there, in whole seconds; None for ever. Raises Duplicate, JournalFull, BusDown.
        """
        headers = {} if after is None else {LAST: str(after)} | ({LAST_AMONG: among} if among else {})
        self._bus.check()
        until_s = time.monotonic() + min(ACK_S, within_s)
        try:
            return (await self._js.publish(subject, data, timeout=min(ACK_S, within_s), headers=headers or None, msg_ttl=ttl_s)).seq
        except nats.js.errors.APIError as e:
            if e.err_code == NOT_DECIDED and (left_s := until_s - time.monotonic() - DECIDED_S) > 0:
                await asyncio.sleep(DECIDED_S)
                return await self.write(subject, data, after=after, among=among, within_s=left_s, ttl_s=ttl_s)
            if e.err_code == WRONG_SEQUENCE:
                raise Duplicate from None
            if e.err_code in FULL:
                self.is_full = True
                raise JournalFull("order not sent") from e
            raise Internal(f"the journal refused a record: {e.description}") from e
        except LOST as e:
            if self._has_no_room():  # a disk that ran full leaves JetStream mute
                raise JournalFull("order not sent") from e
            raise BusDown(f"{MUTE}; order not sent") from e

    async def say(self, subject: str, data: bytes) -> None:
        """Without waiting, and without an error: what gets lost is made up for by the settlers, or was worth no wait."""
        try:
            self._bus.check()
            await self._bus.nc.publish(subject, data)
        except (BusError, nats.errors.Error):
            return

    async def purge(self, stream: str, subject: str) -> None:
        """All on a subject. Slow for whoever writes next: for what is rare. Raises BusDown."""
        await self._ask(f"$JS.API.STREAM.PURGE.{stream}", {"filter": subject})

    async def forget(self, stream: str, sequence: int) -> None:
        """One message, without waiting, as say(). Not overwritten on the disk, which takes four times as long: what is secret is sealed."""
        await self.say(f"$JS.API.STREAM.MSG.DELETE.{stream}", msgspec.json.encode({"seq": sequence, "no_erase": True}))

    async def cut(self, stream: str, sequence: int) -> None:
        """Forget everything before that. Raises BusDown."""
        await self._ask(f"$JS.API.STREAM.PURGE.{stream}", {"seq": sequence})

    async def next(self, stream: str, subject: str, sequence: int = 1, within_s: float = ACK_S) -> Record | None:
        """The first message on the subject, wildcards allowed, from a sequence on; never from a follower, which may be late.

        Raises BusDown.
        """
        question = {"seq": sequence, "next_by_subj": subject}
        if self._direct:
            return _direct(await self._ask(f"$JS.API.DIRECT.GET.{stream}", question, within_s=within_s))
        got = _decode_got((await self._ask(f"$JS.API.STREAM.MSG.GET.{stream}", question, within_s=within_s)).data)
        if got.message is None:
            if got.error is not None and got.error.err_code != NO_MESSAGE:
                raise BusDown(f"the journal cannot be read: {got.error.description}")
            return None
        message = got.message
        return Record(message.subject, message.seq, _ms(message.time), base64.b64decode(message.data))

    async def state(self, stream: str) -> dict[str, int]:
        """messages, first_seq, last_seq, ... Raises BusDown."""
        reply = msgspec.json.decode((await self._ask(f"$JS.API.STREAM.INFO.{stream}", None)).data)
        if "state" not in reply:
            raise BusDown(MUTE)
        state: dict[str, int] = reply["state"]
        return state

    async def since(self, stream: str, since_ms: int) -> int:
        """The first sequence written then or later. Raises BusDown."""
        state = await self.state(stream)
        low, high = state["first_seq"], state["last_seq"] + 1
        while low < high:
            middle = (low + high) // 2
            record = await self.next(stream, ">", middle)
            if record is None or record.written_ms >= since_ms:
                high = middle
            else:
                low = record.sequence + 1
        return low

    async def subjects(self, stream: str, wanted: str) -> list[str]:
        """Of every message there, in order. Raises BusDown."""
        found: list[str] = []
        total = 1
        while len(found) < total:  # the server tells 100,000 at a time
            question = {"subjects_filter": wanted, "offset": len(found)}
            page = msgspec.json.decode((await self._ask(f"$JS.API.STREAM.INFO.{stream}", question)).data)
            if "state" not in page:
                raise BusDown(MUTE)
            names = page["state"].get("subjects") or {}
            if not names:
                break
            found += names
            total = page.get("total", 0)
        return sorted(found)

    async def _ask(self, subject: str, question: Any, *, within_s: float = ACK_S) -> Msg:
        self._bus.check()
        content = b"" if question is None else msgspec.json.encode(question)
        with lost_means(MUTE):
            return await self._bus.nc.request(subject, content, timeout=min(ACK_S, within_s))


def _direct(reply: Msg) -> Record | None:
    """A message as a stream hands it out itself, at a tenth of the server's time. Raises BusDown."""
    headers = reply.headers or {}
    if status := headers.get("Status"):
        if status == NOT_FOUND:
            return None
        raise BusDown(f"the journal cannot be read: {status} {headers.get('Description', '')}")
    written = msgspec.convert(headers["Nats-Time-Stamp"], datetime)
    return Record(headers["Nats-Subject"], int(headers["Nats-Sequence"]), _ms(written), reply.data)


def _ms(time: datetime) -> int:
    return int(time.timestamp() * 1000)
