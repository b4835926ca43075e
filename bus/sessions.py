"""Futures state, which FMZ's protocol leaves to the plugin: contract, direction and leverage per (whole path, account).

Kept in a bucket on disk, so that it survives a restart. Two changes at once (a strategy's `exchange.Go`) both count: each is a
compare-and-set. Where the state cannot be read the caller is refused; a contract is never guessed.

Bridges remember contracts, to answer market data by themselves. So nobody is told that a contract is set before every bridge that is
alive has said that it forgot the old one, or was silent for so long that it has no fresh market data either.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.aio.msg import Msg
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KeyValue

from bus import subjects
from bus.connection import Bus
from bus.errors import BusDown, BusError
from bus.market import BEAT_OLD_S
from bus.streams import LOST, lost_means

TIMEOUT_S = 1.0
ATTEMPTS = 20
TELL_EVERY_S = 0.1


class Session(Struct, frozen=True, omit_defaults=True):
    """contract: "swap", ... or "" for spot. direction: "buy", "sell", "closebuy", "closesell" or "" before SetDirection."""

    contract: str = ""
    direction: str = ""
    level: Decimal | None = None


class Changed(Struct, frozen=True, array_like=True):
    """What travels on subjects.CHANGED. teller: the process that says it, "" where it waits for no answer; number: of its words.
    session: the key of the state; contract: what it says now, None where nobody knows."""

    teller: str
    number: int
    session: str
    contract: str | None


class Forgot(Struct, frozen=True, array_like=True):
    """A bridge's answer on subjects.forgot(teller)."""

    bridge: str
    number: int


_decode = msgspec.json.Decoder(Session).decode
decode_changed = msgspec.json.Decoder(Changed).decode
_decode_forgot = msgspec.json.Decoder(Forgot).decode


def in_contract(symbol: str, contract: str) -> str:
    """A bare symbol under a session's contract: "BTC_USDT" after SetContractType("swap") is "BTC_USDT.swap"."""
    return symbol if not contract or "." in symbol or contract == "spot" else f"{symbol}.{contract}"


class Sessions:
    """The bucket, found or made at first use. bridges: the processes that have to forget before a change of contract is told."""

    def __init__(self, bus: Bus, replicas: int = 1, bridges: Callable[[], Iterable[str]] = tuple) -> None:
        self._bus = bus
        self._bridges = bridges
        self._numbers = itertools.count(1)
        self._forgetting: dict[int, tuple[set[str], asyncio.Event]] = {}
        self._js = bus.nc.jetstream(timeout=TIMEOUT_S)
        self._replicas = replicas
        self._bucket: KeyValue | None = None

    async def open(self) -> KeyValue:
        """Find or make the bucket. Raises BusDown."""
        if self._bucket is None:
            with lost_means("futures state cannot be kept: JetStream does not answer"):
                self._bucket = await self._js.create_key_value(
                    KeyValueConfig(bucket=subjects.SESSIONS, history=1, storage=StorageType.FILE, replicas=self._replicas)
                )
        return self._bucket

    async def read(self, path: str, account: str) -> Session:
        """The state of one robot, empty before its first call. Raises BusDown when it cannot be known."""
        return (await self._entry(subjects.session_key(path, account)))[0]

    async def change(self, path: str, account: str, **changes: Any) -> Session:
        """Change some of its fields and keep the others; the result is on disk on return, and no bridge goes by another contract.

        What is so already is not written. Its contract is told all the same: whoever wrote it may have died before it told.
        Raises BusDown.
        """
        key = subjects.session_key(path, account)
        try:
            session = await self._change(key, changes)
        except BusDown:
            if "contract" in changes:
                await self._say(Changed("", 0, key, None))  # it may have been written
            raise
        if "contract" in changes:
            await self._tell(key, session.contract)
        return session

    async def _change(self, key: str, changes: dict[str, Any]) -> Session:
        for _ in range(ATTEMPTS):
            session, revision = await self._entry(key)
            changed = msgspec.structs.replace(session, **changes)
            if changed == session:
                return session
            bucket = await self.open()
            if changed.contract != session.contract:
                await self._say(Changed("", 0, key, None))  # a worker that is killed once it has written tells nothing any more
            with lost_means("futures state cannot be kept"):
                try:
                    await bucket.update(key, msgspec.json.encode(changed), last=revision)
                except nats.js.errors.KeyWrongLastSequenceError:
                    continue  # another worker was first: again, on top of its change
                return changed
        raise BusDown("futures state changes too fast to be kept")

    async def _tell(self, key: str, contract: str) -> None:
        """Say what the contract is now, again and again until every bridge has answered, or cannot have fresh market data any more."""
        number = next(self._numbers)
        waiting, all_have = set(self._bridges()), asyncio.Event()
        self._forgetting[number] = waiting, all_have
        until_s = time.monotonic() + BEAT_OLD_S
        try:
            await self._say(Changed(self._bus.process, number, key, contract))
            while waiting and (left_s := until_s - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(TELL_EVERY_S, left_s)):
                        await all_have.wait()
                        return
                await self._say(Changed(self._bus.process, number, key, contract))
        finally:
            del self._forgetting[number]

    async def hear(self, message: Msg) -> None:
        """A bridge's answer, on subjects.forgot() of this process."""
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
            forgot = _decode_forgot(message.data)
            waiting, all_have = self._forgetting.get(forgot.number, (set[str](), asyncio.Event()))
            waiting.discard(forgot.bridge)
            if not waiting:
                all_have.set()

    async def _say(self, changed: Changed) -> None:
        with contextlib.suppress(BusError, nats.errors.Error):
            self._bus.check()
            await self._bus.nc.publish(subjects.CHANGED, msgspec.json.encode(changed))

    async def _entry(self, key: str) -> tuple[Session, int]:
        """-> (state, revision); revision 0 means that there is no entry."""
        bucket = await self.open()
        try:
            entry = await bucket.get(key)
        except nats.js.errors.KeyNotFoundError:
            return Session(), 0
        except LOST as e:
            self._bucket = None  # a server that came back without its disk: the next call makes the bucket again
            raise BusDown("futures state cannot be read; nothing was guessed, nothing was sent") from e
        try:
            return _decode(entry.value or b"{}"), entry.revision or 0
        except msgspec.MsgspecError as e:
            raise BusDown("futures state is not readable by this version; nothing was guessed, nothing was sent") from e

    async def all(self) -> dict[str, Session]:
        """Every state there is: "okx=2Frobot-7.<account>" -> state."""
        await self.open()
        prefix = f"$KV.{subjects.SESSIONS}."
        with lost_means("futures state cannot be read"):
            # The server's own list of subjects: the bucket's keys() listens to a watch, and may end early on a busy machine.
            info = await self._js.stream_info(f"KV_{subjects.SESSIONS}", subjects_filter=f"{prefix}>")
        keys = [subject.removeprefix(prefix) for subject in info.state.subjects or {}]
        return {key: (await self._entry(key))[0] for key in sorted(keys)}

    async def clear(self, key: str) -> None:
        """Forget one state, by its key as all() tells it."""
        await self.open()
        try:
            with lost_means("futures state cannot be cleared"):
                # Not the bucket's delete(): it leaves a marker whose revision nats-py's get() does not tell; no change could follow.
                await self._js.purge_stream(f"KV_{subjects.SESSIONS}", subject=f"$KV.{subjects.SESSIONS}.{key}")
        finally:
            await self._say(Changed("", 0, key, None))
