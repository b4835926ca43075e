"""Market data on the bus: entries, beats, epochs, and the one rule that says whether a value may still be told.

A feeder tells each value on its key's own subject, all of them numbered in one row (`n`) within its epoch, and proves them by beats:
twice a second it lists what changed, key -> (n, how long ago it was proven), and everything when somebody asks for it, at least every
5 s. A follower sends ticks of its own clock, and a beat carries the newest tick that its feeder had heard from each. So a follower
knows by its own clock alone that a beat was made after that tick: whatever lay about in a socket, a buffer or a stopped process
meanwhile counts as old. Pure; bus/follow.py has the connection.
"""

import re
import time
from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from bus import subjects
from bus.errors import BadRequest

KINDS = ("ticker", "depth", "trades", "candles")
MOST_MINUTES = 43_200
PERIOD = re.compile(r"[1-9][0-9]{0,5}")

BEAT_S = 0.5
WHOLE_S = 5.0
"""How often a beat lists everything, asked or not."""
BEAT_OLD_S = 1.5
"""A feeder whose newest beat is that old proves nothing any more, and is replaced."""
SILENT_S = 10.0
"""An epoch that was silent for so long may be followed by a lower one."""
TICK_S = 0.25
WISHES_S = 5.0
"""How often a follower repeats all that it wishes."""
WISHES_GONE_S = 15.0
"""Wishes that were not repeated for so long are those of a dead follower."""

HEADER = "Fmzbus-Feed"
WITHDRAWN = -1
"""In place of an age: the value is not true any more, or nobody knows."""
NEVER = float("-inf")

clock: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
"""Of all that proves or is proven: monotonic, and where the system has one a clock that goes on while the machine sleeps."""


class Proof(Struct, frozen=True, array_like=True):
    """What a value carries. epoch: of its feeder, n: counts all its values in it; age_ms: since it was proven, or WITHDRAWN; shard: which
    of the exchange's beats tells of it."""

    epoch: int
    n: int
    age_ms: int
    shard: int

    def header(self) -> str:
        return f"{self.epoch} {self.n} {self.age_ms} {self.shard}"

    @classmethod
    def read(cls, header: str) -> "Proof":
        """Raises ValueError."""
        epoch, n, age_ms, shard = map(int, header.split(" "))
        return cls(epoch, n, age_ms, shard)


class Beat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a feeder proves. number: counts the beats of an epoch; top: the n of its newest value; whole: keys has everything, else what
    changed since the beat before.

    keys: "ticker.BTC_USDT" -> (n, age_ms). heard: follower -> its newest tick. leaving: the feeder stops, another one may take over.
    """

    feeder: str
    epoch: int
    number: int
    top: int
    whole: bool = False
    leaving: bool = False
    keys: dict[str, tuple[int, int]] = {}
    heard: dict[str, int] = {}


class Wish(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a follower wants of an exchange: (kind, symbol) pairs. whole: these and no others. lost: keys to be told once more. unproven:
    those of markets of which the follower does not know whether they exist."""

    follower: str
    keys: list[tuple[str, str]] = []
    unproven: list[tuple[str, str]] = []
    whole: bool = False
    lost: list[tuple[str, str]] = []


encode = msgspec.json.Encoder().encode
decode_beat = msgspec.json.Decoder(Beat).decode
decode_wish = msgspec.json.Decoder(Wish).decode
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError)
"""What a stranger's bytes raise in the decoders and in Proof.read()."""


def base(kind: str) -> tuple[str, int]:
    """A kind as it is written in subjects -> (its name, minutes of a candle): "candles-15" -> ("candles", 15), "candles" is of one minute.

    Raises BadRequest.
    """
    name, dash, minutes = kind.partition("-")
    wrong = dash and (name != "candles" or not PERIOD.fullmatch(minutes) or int(minutes) > MOST_MINUTES)
    if name not in KINDS or wrong:
        raise BadRequest(f"kind: expected one of {', '.join(KINDS)}, or candles-15 for another period, got {subjects.shown(kind)}")
    return name, int(minutes or 1) if name == "candles" else 0


def key(kind: str, symbol: str) -> str:
    """As beats name it: "ticker.BTC_USDT"; symbol in the host's spelling, with its contract."""
    return f"{kind}.{symbol}"


def reply(data: bytes) -> bytes:
    """The finished FMZ reply that travels as a value."""
    return b'{"data":%b}' % data


def withdrawal(why: str) -> bytes:
    """What travels in place of a value that is not true any more."""
    return msgspec.json.encode({"error": f"stale: {why}"})


def tick(now_s: float, *, whole: bool = False) -> bytes:
    """A follower's clock, in ms. whole: it asks for a beat that lists everything."""
    return b"%d%b" % (int(now_s * 1000), b" whole" if whole else b"")


def read_tick(data: bytes) -> tuple[int, bool]:
    """-> (ms, whole). Raises ValueError."""
    ms, _, whole = data.partition(b" ")
    return int(ms), bool(whole)


class Listed(Struct):
    """What the beats so far say of a key. proven_s: by the follower's clock, not later than it really was."""

    n: int
    proven_s: float


class Shard:
    """What a follower knows of one part of an exchange. beat_s: the newest beat was made after that, by the follower's clock; heard_s: so
    was the newest of any epoch."""

    __slots__ = ("beat_s", "complete", "epoch", "feeder", "heard_s", "listed", "number", "top")

    def __init__(self) -> None:
        self.heard_s = NEVER
        self.feeder = ""
        self.epoch = self.number = self.top = 0
        self.complete = False
        """Whether every beat since a whole one was heard."""
        self.beat_s = NEVER
        self.listed: dict[str, Listed] = {}

    def hear(self, beat: Beat, asked_s: float | None) -> bool:
        """Take a beat. asked_s: when the tick was sent that it answers, None where it answers none. -> whether it counts."""
        if asked_s is not None and asked_s - self.heard_s > SILENT_S and beat.epoch < self.epoch:
            self._begin(beat.epoch, beat.feeder)  # whoever had the higher epoch has gone for good, and the clock of the bus was set back
        if (beat.epoch, beat.feeder) < (self.epoch, self.feeder):
            return False  # of a feeder that was replaced and does not know it yet
        if (beat.epoch, beat.feeder) == (self.epoch, self.feeder):
            if beat.number <= self.number:
                return False  # late
        else:
            self._begin(beat.epoch, beat.feeder)
        self.complete = beat.whole or (self.complete and beat.number == self.number + 1)
        self.number, self.top = beat.number, beat.top
        if beat.whole:
            self.listed = {name: self.listed[name] for name in beat.keys if name in self.listed}
        for name, (n, age_ms) in beat.keys.items():
            proven_s = asked_s - age_ms / 1000 if asked_s is not None and age_ms != WITHDRAWN else NEVER
            listed = self.listed.get(name)
            if listed is None:
                self.listed[name] = Listed(n, proven_s)
            else:
                listed.proven_s = max(proven_s, listed.proven_s) if n == listed.n and age_ms != WITHDRAWN else proven_s
                listed.n = n
        if beat.leaving:
            self.beat_s = NEVER
        elif asked_s is not None:
            self.beat_s = self.heard_s = max(self.beat_s, asked_s)
        return True

    def _begin(self, epoch: int, feeder: str) -> None:
        self.epoch, self.feeder, self.complete, self.beat_s, self.listed = epoch, feeder, False, NEVER, {}
        self.number = self.top = 0

    def tells_of(self, epoch: int) -> bool:
        """Take note of a value's epoch. -> whether it is the newest: a newer one makes all that was proven before worth nothing."""
        if epoch > self.epoch:
            self._begin(epoch, "")
        return epoch == self.epoch


class Entry:
    """One value as a follower has it. content: the finished reply, or a withdrawal; proven_s: by the follower's clock, as the value
    itself says it. used_s: when somebody asked for it."""

    __slots__ = (
        "content",
        "epoch",
        "exchange",
        "key",
        "kind",
        "known",
        "max_age_s",
        "n",
        "proven_s",
        "shard",
        "symbol",
        "used_s",
        "withdrawn",
    )

    def __init__(self, exchange: str, kind: str, symbol: str, now_s: float, max_age_s: float) -> None:
        self.exchange, self.kind, self.symbol = exchange, kind, symbol
        self.max_age_s = max_age_s
        self.key = key(kind, symbol)
        self.content = b""
        self.epoch = self.n = 0
        self.proven_s = NEVER
        self.shard: Shard | None = None
        self.withdrawn = True
        self.used_s = now_s
        self.known = False
        """Whether its market is known to exist."""

    def take(self, content: bytes, proof: Proof, shard: Shard) -> bool:
        """Take a value as it arrived. -> whether it is news."""
        if not shard.tells_of(proof.epoch) or (proof.epoch == self.epoch and proof.n <= self.n):
            return False
        # A number above that of the newest beat was given after that beat was made: the value was proven at most its own age before it.
        self.proven_s = shard.beat_s - proof.age_ms / 1000 if proof.n > shard.top and proof.age_ms != WITHDRAWN else NEVER
        self.content, self.epoch, self.n, self.shard = content, proof.epoch, proof.n, shard
        self.withdrawn = proof.age_ms == WITHDRAWN
        return True


def fresh(entry: Entry, now_s: float) -> bool:
    """The freshness rule: whether the value may be told as true at most entry.max_age_s ago. now_s: the follower's monotonic clock.

    Its feeder is the newest known and was alive 1.5 s ago, no beat was missed, the value is at least as new as the beats say, and
    it was proven recently enough.
    """
    shard = entry.shard
    if shard is None or entry.withdrawn or entry.epoch != shard.epoch or not shard.complete or now_s - shard.beat_s >= BEAT_OLD_S:
        return False
    listed = shard.listed.get(entry.key)
    proven_s = entry.proven_s
    if listed is not None:
        if entry.n < listed.n:
            return False
        if entry.n == listed.n and listed.proven_s > proven_s:
            proven_s = listed.proven_s
    return now_s - proven_s <= entry.max_age_s


def stream(replicas: int, max_age_s: float) -> StreamConfig:
    """MARKET: the newest value of each subject, for those who come later. In memory, so it is made again after a restart of NATS."""
    return StreamConfig(
        name=subjects.MARKET,
        subjects=["feed.>"],
        storage=StorageType.MEMORY,
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        max_age=max_age_s,
        max_bytes=256 << 20,
        num_replicas=replicas,
        allow_direct=True,
    )
