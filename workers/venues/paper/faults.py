"""What goes wrong on purpose: the kinds of faults, which of them are armed, and what a request or a socket meets. Pure; no socket here.

A fault is armed by the control API (control.py), strikes where its path, symbol and key fit, and is gone after its count or its time.
Whether it strikes is drawn from a generator of its own, seeded by the exchange's seed and by how many were armed before it: the same
faults armed in the same order strike the same requests again.
"""

import random
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Struct

from workers.venues.paper.markets import MARKETS

ORDERS = "POST /api/v1/orders|DELETE /api/v1/orders*"
"""Requests that place or cancel."""

PLACES = "POST /api/v1/orders"

MOST_ARMED = 1_000
LONGEST_S = 86_400.0


class Kind(NamedTuple):
    """One kind of fault. takes: its own parameters with their defaults; path: where it strikes by default."""

    does: str
    takes: dict[str, float | bool]
    path: str = ""
    socket: bool = False


KINDS: dict[str, Kind] = {
    "latency": Kind("the request is looked at `seconds` later, up to `jitter` more or less", {"seconds": 1.0, "jitter": 0.0}),
    "late-reply": Kind("executed at once, answered `seconds` later, up to `jitter` more or less", {"seconds": 5.0, "jitter": 0.0}, ORDERS),
    "execute-then-drop": Kind("executed, then the connection is closed without a reply", {}, ORDERS),
    "drop": Kind("not executed; the connection is closed without a reply", {}),
    "http-503": Kind("503 in plain text, with or without having executed", {"executed": False}),
    "http-502-html": Kind("502 with a gateway's HTML page, with or without having executed", {"executed": False}),
    "html-200": Kind("200 with an HTML page where JSON belongs, with or without having executed", {"executed": False}),
    "truncated-json": Kind("200 with the first half of the JSON, with or without having executed", {"executed": True}),
    "no-id": Kind("executed; the reply lacks the order's id", {}, PLACES),
    "duplicate-client-id": Kind("an order whose client order id was used before is accepted, as a second order", {}, PLACES),
    "rate-limit": Kind("429 with Retry-After: until the fault ends, else `seconds`; not executed", {"seconds": 1.0}),
    "ban": Kind("418 with Retry-After: until the fault ends, else `seconds`; not executed", {"seconds": 60.0}),
    "maintenance": Kind("503, code 1103, with Retry-After: until the fault ends, else `seconds`; not executed", {"seconds": 60.0}),
    "clock-skew": Kind("the exchange's clock is `seconds` ahead (below 0: behind), and its windows with it", {"seconds": 30.0}),
    "stale-read": Kind("orders of the last `seconds` are not found and not listed yet", {"seconds": 5.0}, "GET /api/v1/orders*"),
    "book-gap": Kind("the next `amount` depth deltas are left out, the sequence goes on", {"amount": 1.0}, socket=True),
    "bad-checksum": Kind("a depth message carries a wrong checksum", {}, socket=True),
    "crossed-book": Kind("a depth delta puts the best bid `amount` ticks above the best ask", {"amount": 1.0}, socket=True),
    "stall": Kind("nothing is sent for `seconds` while the socket stays open and answers pings", {"seconds": 10.0}, socket=True),
    "slow-socket": Kind("each message is sent `seconds` late, up to `jitter` more or less", {"seconds": 1.0, "jitter": 0.0}, socket=True),
    "socket-cut": Kind("the connection is cut without a close frame", {}, socket=True),
    "stale-snapshot": Kind("a snapshot is the book of `seconds` ago, with its sequence of then", {"seconds": 5.0}, socket=True),
}
"""Every kind there is; the README has the same table."""

STOPS = ("maintenance", "ban", "rate-limit", "drop", "http-503", "http-502-html", "html-200", "truncated-json")
"""Kinds that answer instead of the exchange, in the order in which they are asked."""

SPOILS = ("execute-then-drop", "http-503", "http-502-html", "html-200", "truncated-json", "no-id")
"""Kinds that spoil the reply to what was executed, in the order in which they are asked."""


class FaultError(ValueError):
    """A fault cannot be armed as asked for; the text names the field."""


class Fault(Struct, frozen=True, kw_only=True):
    """A fault that strikes now. seconds: with the jitter drawn. left_s: until its time is over, None without an end."""

    kind: str
    number: int
    seconds: float = 0.0
    amount: float = 0.0
    executed: bool = False
    left_s: float | None = None


class Wanted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fault as asked for, by the control API or in a schedule. What is left out has the default of its kind.

    path: VERB and path, or one of them alone; on a socket its channel, or the socket's path. `*` and `?` as in file names, `|` between
    alternatives.
    symbol, key: strikes only requests that name them. count: strikes that often; probability: of each strike; neither: every time.
    at_s, for_s: begins that long after it was armed, and is over that long after it began.
    """

    kind: str
    path: Annotated[str, Meta(max_length=500)] | None = None
    symbol: Annotated[str, Meta(max_length=64)] = ""
    key: Annotated[str, Meta(max_length=128)] = ""
    count: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    probability: Annotated[float, Meta(gt=0, le=1)] | None = None
    seconds: Annotated[float, Meta(ge=-LONGEST_S, le=LONGEST_S)] | None = None
    jitter: Annotated[float, Meta(ge=0, le=LONGEST_S)] | None = None
    amount: Annotated[float, Meta(gt=0, le=10**9)] | None = None
    executed: bool | None = None
    at_s: Annotated[float, Meta(ge=0, le=LONGEST_S * 365)] = 0.0
    for_s: Annotated[float, Meta(gt=0, le=LONGEST_S * 365)] | None = None


class Armed(Struct, kw_only=True):
    """A fault in waiting, as the control API lists it. count: strikes left, None without end; struck: how often it has struck."""

    number: int
    kind: str
    path: str
    symbol: str
    key: str
    count: int | None
    probability: float
    seconds: float
    jitter: float
    amount: float
    executed: bool
    begins_in_s: float
    left_s: float | None
    struck: int = 0


@dataclass(slots=True)
class _Entry:
    armed: Armed
    since_s: float
    until_s: float | None
    chance: random.Random

    def over(self, now_s: float) -> bool:
        return self.armed.count == 0 or (self.until_s is not None and now_s >= self.until_s)


class Faults:
    """What is armed. clock: UTC in seconds, the exchange's own."""

    def __init__(self, clock: Callable[[], float], seed: int) -> None:
        self._clock = clock
        self._seed = seed
        self._entries: list[_Entry] = []
        self._next = 1

    def arm(self, wanted: Wanted) -> Armed:
        """Arm one fault. Raises FaultError."""
        return self.schedule([wanted])[0]

    def schedule(self, wanted: Iterable[Wanted]) -> list[Armed]:
        """Arm all of them, or none. Raises FaultError."""
        now_s = self._clock()
        self._sweep(now_s)
        made = [self._entry(one, self._next + place, now_s) for place, one in enumerate(wanted)]
        if len(self._entries) + len(made) > MOST_ARMED:
            raise FaultError(f"at most {MOST_ARMED} faults can be armed; clear some")
        self._entries += made
        self._next += len(made)
        return [_shown(entry, now_s) for entry in made]

    def clear(self, kind: str = "") -> int:
        """Disarm all faults of a kind, "" for all there are; returns how many. Raises FaultError for an unknown kind."""
        self._sweep(self._clock())
        if kind:
            known(kind)
        before = len(self._entries)
        self._entries = [entry for entry in self._entries if kind and entry.armed.kind != kind]
        return before - len(self._entries)

    def armed(self) -> list[Armed]:
        """Those that can still strike, in the order in which they were armed."""
        now_s = self._clock()
        self._sweep(now_s)
        return [_shown(entry, now_s) for entry in self._entries]

    @property
    def idle(self) -> bool:
        """Whether nothing at all is armed."""
        return not self._entries

    def take(self, kind: str, *, path: str = "", symbol: str = "", key: str = "", executed: bool | None = None) -> Fault | None:
        """The fault of this kind that strikes here and now; taking it counts. The one that was armed first comes first.

        path: "POST /api/v1/orders"; on a socket the channel, or channel and path. executed: only one that executes, or only one that
        does not.
        """
        if not self._entries:
            return None
        now_s = self._clock()
        self._sweep(now_s)
        for entry in self._entries:
            armed = entry.armed
            if (
                armed.kind == kind
                and entry.since_s <= now_s
                and executed in (None, armed.executed)
                and armed.symbol in ("", symbol)
                and armed.key in ("", key)
                and _fits(path, armed.path)
                and (armed.probability == 1 or entry.chance.random() < armed.probability)
            ):
                armed.struck += 1
                if armed.count is not None:
                    armed.count -= 1
                return Fault(
                    kind=kind,
                    number=armed.number,
                    seconds=_drawn(armed, entry.chance),
                    amount=armed.amount,
                    executed=armed.executed,
                    left_s=None if entry.until_s is None else entry.until_s - now_s,
                )
        return None

    def _sweep(self, now_s: float) -> None:
        self._entries = [entry for entry in self._entries if not entry.over(now_s)]

    def _entry(self, wanted: Wanted, number: int, now_s: float) -> _Entry:
        kind = known(wanted.kind)
        given = {name: value for name in ("seconds", "jitter", "amount", "executed") if (value := getattr(wanted, name)) is not None}
        if strange := given.keys() - kind.takes.keys():
            takes = ", ".join(kind.takes) or "none"
            raise FaultError(f"{min(strange)}: {wanted.kind} does not take it; its parameters are: {takes}")
        if (seconds := given.get("seconds", 0.0)) < 0 and wanted.kind != "clock-skew":
            raise FaultError(f"seconds: expected 0 or more, got {seconds:g}; only clock-skew may be below")
        if wanted.count is not None and wanted.probability is not None:
            raise FaultError("either count or probability")
        if wanted.symbol and wanted.symbol not in MARKETS:
            raise FaultError(f"symbol: no market is called {wanted.symbol[:64]!r}; there are: {', '.join(MARKETS)}")
        values = kind.takes | given
        since_s = now_s + wanted.at_s
        armed = Armed(
            number=number,
            kind=wanted.kind,
            path=kind.path if wanted.path is None else wanted.path,
            symbol=wanted.symbol,
            key=wanted.key,
            count=wanted.count,
            probability=1.0 if wanted.probability is None else wanted.probability,
            seconds=float(values.get("seconds", 0.0)),
            jitter=float(values.get("jitter", 0.0)),
            amount=float(values.get("amount", 0.0)),
            executed=bool(values.get("executed", False)),
            begins_in_s=wanted.at_s,
            left_s=None,
        )
        until_s = None if wanted.for_s is None else since_s + wanted.for_s
        return _Entry(armed, since_s, until_s, random.Random(f"{self._seed}/{number}"))


class Encounter:
    """One request and the faults that it met, in their order. `request`: "POST /api/v1/orders"."""

    __slots__ = ("_faults", "_key", "_request", "_symbol", "met")

    def __init__(self, faults: Faults, request: str, symbol: str, key: str) -> None:
        self._faults = faults
        self._request = request
        self._symbol = symbol
        self._key = key
        self.met: list[str] = []

    def take(self, kind: str, *, executed: bool | None = None) -> Fault | None:
        """Faults.take() for this request, remembered in `met`."""
        fault = self._faults.take(kind, path=self._request, symbol=self._symbol, key=self._key, executed=executed)
        if fault:
            self.met.append(kind)
        return fault

    def stops(self) -> Fault | None:
        """What answers instead of the exchange; nothing is executed then."""
        return next((fault for kind in STOPS if (fault := self.take(kind, executed=False))), None)

    def spoils(self, *, has_id: bool) -> Fault | None:
        """What becomes of the reply to something that was executed. has_id: there is an id that the reply could lack."""
        for kind in SPOILS:
            if (kind != "no-id" or has_id) and (fault := self.take(kind, executed=True if "executed" in KINDS[kind].takes else None)):
                return fault
        return None


def known(kind: str) -> Kind:
    """The kind of that name. Raises FaultError."""
    if found := KINDS.get(kind):
        return found
    raise FaultError(f"kind: no fault is called {kind[:64]!r}; there are: {', '.join(KINDS)}")


def wanted(document: bytes) -> Wanted:
    """One fault from JSON. Raises FaultError."""
    try:
        return msgspec.json.decode(document, type=Wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise FaultError(str(e)) from None


def scheduled(text: str) -> list[Wanted]:
    """The faults of a schedule in TOML: [[fault]] tables with at_s, for_s and whatever a fault has. Raises FaultError, naming the table."""
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise FaultError(f"not TOML: {e}") from None
    if strange := tree.keys() - {"fault"}:
        raise FaultError(f"{min(strange)}: a schedule has [[fault]] tables only")
    tables = tree.get("fault")
    if not isinstance(tables, list) or not tables:
        raise FaultError("no [[fault]] table in it")
    found = []
    for place, table in enumerate(tables, 1):
        try:
            one = msgspec.convert(table, Wanted)
            Faults(lambda: 0.0, 0).arm(one)
        except (msgspec.ValidationError, FaultError) as e:
            raise FaultError(f"fault {place}: {e}") from None
        found.append(one)
    return found


def _shown(entry: _Entry, now_s: float) -> Armed:
    return msgspec.structs.replace(
        entry.armed,
        begins_in_s=round(max(0.0, entry.since_s - now_s), 3),
        left_s=None if entry.until_s is None else round(entry.until_s - max(now_s, entry.since_s), 3),
    )


def _fits(path: str, pattern: str) -> bool:
    names = (path, *path.split(" ", 1))
    return not pattern or any(fnmatchcase(name, one) for one in pattern.split("|") for name in names)


def _drawn(armed: Armed, chance: random.Random) -> float:
    seconds = armed.seconds + (chance.uniform(-armed.jitter, armed.jitter) if armed.jitter else 0.0)
    return seconds if armed.kind == "clock-skew" else max(0.0, seconds)
