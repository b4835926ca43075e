"""Futures state, which FMZ's protocol leaves to the plugin: contract, direction and leverage per (whole path, account).

Kept in a bucket on disk, so that it survives a restart. Two changes at once (a strategy's `exchange.Go`) both count: each is a
compare-and-set. Where the state cannot be read the caller is refused; a contract is never guessed.
"""

from decimal import Decimal
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KeyValue

from bus import subjects
from bus.connection import Bus
from bus.errors import BusDown
from bus.streams import LOST, lost_means

TIMEOUT_S = 1.0
ATTEMPTS = 20


class Session(Struct, frozen=True, omit_defaults=True):
    """contract: "swap", ... or "" for spot. direction: "buy", "sell", "closebuy", "closesell" or "" before SetDirection."""

    contract: str = ""
    direction: str = ""
    level: Decimal | None = None


_decode = msgspec.json.Decoder(Session).decode


class Sessions:
    """The bucket, found or made at first use."""

    def __init__(self, bus: Bus, replicas: int = 1) -> None:
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
        """Change some of its fields and keep the others; the result is on disk on return. Raises BusDown."""
        key = subjects.session_key(path, account)
        for _ in range(ATTEMPTS):
            session, revision = await self._entry(key)
            changed = msgspec.structs.replace(session, **changes)
            bucket = await self.open()
            with lost_means("futures state cannot be kept"):
                try:
                    await bucket.update(key, msgspec.json.encode(changed), last=revision)
                except nats.js.errors.KeyWrongLastSequenceError:
                    continue  # another worker was first: again, on top of its change
                return changed
        raise BusDown("futures state changes too fast to be kept")

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
        with lost_means("futures state cannot be cleared"):
            # Not the bucket's delete(): it leaves a marker whose revision nats-py's get() does not tell, so that no change could follow.
            await self._js.purge_stream(f"KV_{subjects.SESSIONS}", subject=f"$KV.{subjects.SESSIONS}.{key}")
