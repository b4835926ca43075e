"""The kill switch: one record of what is halted, since when, by whom and why.

Kept in a bucket on disk, so that it survives a restart of everything, and changed by compare-and-set, so that two commands at once both
count. Workers read it twice a second (workers/guard.py); `fmzbus halt` and `fmzbus resume` write it.
"""

import functools
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.js.api import KeyValueConfig, StorageType
from nats.js.kv import KeyValue

from bus import subjects
from bus.connection import Bus
from bus.errors import BusDown
from bus.streams import lost_means

TIMEOUT_S = 1.0
ATTEMPTS = 20
STREAM_NOT_FOUND = 10059
"""The server's err_code; a record that was not written yet has another."""


class Halt(Struct, frozen=True, omit_defaults=True):
    """by: who, "root@host". since_ms: bus time. reason: "" where none was given."""

    by: str
    since_ms: int
    reason: str = ""

    @property
    def since(self) -> str:
        return f"{datetime.fromtimestamp(self.since_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"

    def __str__(self) -> str:
        return f"since {self.since} by {self.by}" + (f": {self.reason}" if self.reason else "")


class Record(Struct, frozen=True, omit_defaults=True):
    """all: everything is halted. accounts: by their hash. paths: by path_name(); one without a session means all robots there."""

    all: Halt | None = None
    accounts: dict[str, Halt] = {}
    paths: dict[str, Halt] = {}

    def rows(self) -> list[tuple[str, Halt]]:
        """Every halt, as it is told: "everything", "account 1f2e...", "path okx/robot-7"."""
        rows = [("everything", self.all)] if self.all else []
        rows += [(f"account {name}", halt) for name, halt in sorted(self.accounts.items())]
        return rows + [(f"path {name}", halt) for name, halt in sorted(self.paths.items())]

    def stops(self, account: str, exchange: str, path: str) -> tuple[str, Halt] | None:
        """The halt that an order meets, or None."""
        if self.all:
            return "everything", self.all
        if account in self.accounts:
            return f"account {account}", self.accounts[account]
        if self.paths:
            for name in path_names(exchange, path):
                if name in self.paths:
                    return f"path {name}", self.paths[name]
        return None

    def halted(self, halt: Halt, account: str, path: str) -> "Record":
        """With that much halted besides, everything where neither is named. What was halted before keeps its time and reason."""
        return Record(
            all=self.all if account or path else self.all or halt,
            accounts={account: halt} | self.accounts if account else self.accounts,
            paths={path: halt} | self.paths if path else self.paths,
        )

    def resumed(self, account: str, path: str) -> "Record":
        """Without that halt; other halts stay."""
        return Record(
            all=self.all if account or path else None,
            accounts={name: halt for name, halt in self.accounts.items() if name != account},
            paths={name: halt for name, halt in self.paths.items() if name != path},
        )


def path_name(text: str) -> str:
    """A path as halts and limits spell it: "/OKX/Robot-7" -> "okx/robot-7"; addresses are matched without regard to case."""
    return text.strip().strip("/").lower()


@functools.lru_cache(maxsize=4096)
def path_names(exchange: str, path: str) -> tuple[str, ...]:
    """What a halt or a limit may call a request's path, the narrowest first.

    Both as its host wrote it and by the exchange behind a route, with the session and without: halting "paper" halts "digitalasset/r1".
    """
    first, _, session = path.lower().partition("/")
    whole = [f"{first}/{session}", f"{exchange}/{session}"] if session else []
    return tuple(dict.fromkeys([*whole, first, exchange]))


_decode = msgspec.json.Decoder(Record).decode


class Halts:
    """The bucket, found or made at first use: nothing was ever halted where there is none yet."""

    def __init__(self, bus: Bus, replicas: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        self._bus = bus
        self._js = bus.nc.jetstream(timeout=timeout_s)
        self._replicas = replicas
        self._bucket: KeyValue | None = None

    async def _open(self) -> KeyValue:
        if self._bucket is None:
            with lost_means("the halt record cannot be kept: JetStream does not answer"):
                try:
                    self._bucket = await self._js.key_value(subjects.HALT)
                except nats.js.errors.NotFoundError:
                    self._bucket = await self._js.create_key_value(
                        KeyValueConfig(bucket=subjects.HALT, history=1, storage=StorageType.FILE, replicas=self._replicas)
                    )
        return self._bucket

    async def read(self) -> tuple[Record, int]:
        """-> (record, revision); revision 0: it was never written. Raises BusDown when it cannot be known."""
        self._bus.check()
        await self._open()
        with lost_means("the halt record cannot be read"):
            try:
                # Asked of the stream's leader, not of any replica: one that is cut off would go on answering what was true before.
                found = await self._js.get_msg(f"KV_{subjects.HALT}", subject=f"$KV.{subjects.HALT}.{subjects.HALT_KEY}")
            except nats.js.errors.NotFoundError as e:
                if e.err_code != STREAM_NOT_FOUND:
                    return Record(), 0
                self._bucket = None  # a server that came back without its disk: the next call makes the bucket again
                raise
        try:
            return _decode(found.data or b"{}"), found.seq or 0
        except msgspec.MsgspecError as e:
            raise BusDown("the halt record is not readable by this version") from e

    async def change(self, edit: Callable[[Record], Record]) -> Record:
        """Put an edit on top of what is there; it is on disk on return. Raises BusDown."""
        for _ in range(ATTEMPTS):
            record, revision = await self.read()
            changed = edit(record)
            bucket = await self._open()
            with lost_means("the halt record cannot be written"):
                try:
                    await bucket.update(subjects.HALT_KEY, msgspec.json.encode(changed), last=revision)
                except nats.js.errors.KeyWrongLastSequenceError:
                    continue  # another command was first: again, on top of its change
                return changed
        raise BusDown("the halt record changes too fast to be written")
