"""What is wrong with answers, given all that was ever true. Pure.

An answer is **right** where it equals a state that was true at some moment between max_age_s before it was asked and when it was
answered; **stale** where it equals an older one only; **wrong** where it equals none, or is no answer in the host's shape at all. A
clear error is neither: whether one is allowed depends on what is broken.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from decimal import Decimal

import msgspec
from msgspec import Struct

LEVELS = 20
"""Of each side, all of which are compared."""
HIT = "hit"
SHOWN = 5
"""Findings of one kind that are told in full."""

Value = Hashable
"""What a ticker or a depth says, but for its time and the spelling of its symbol."""
Spans = list[tuple[float, float]]
"""[since, until) of a value, ascending, by the clock of this process."""


class Ticker(Struct):
    """As the host reads it; time and symbol are not compared."""

    buy: Decimal
    sell: Decimal
    last: Decimal
    high: Decimal
    low: Decimal
    open: Decimal
    vol: Decimal = msgspec.field(name="vol")


class Depth(Struct):
    asks: list[tuple[Decimal, Decimal]]
    bids: list[tuple[Decimal, Decimal]]


class _Ticker(Struct):
    data: Ticker | None = None
    error: str | None = None


class _Depth(Struct):
    data: Depth | None = None
    error: str | None = None


_ticker = msgspec.json.Decoder(_Ticker).decode
_depth = msgspec.json.Decoder(_Depth).decode


class Seen(Struct):
    """One answer. market: the exchange's own symbol for what was asked. source: "hit", "shared" or "miss", "" for no answer; content: the
    body, or what went wrong in place of one."""

    bridge: str
    kind: str
    symbol: str
    market: str
    asked_s: float
    answered_s: float
    source: str
    content: bytes


class Finding(Struct, frozen=True):
    """kind: "stale" or "wrong"."""

    kind: str
    why: str


class Verdict(Struct):
    """Of all answers of a case. oldest_s: how long before it was asked the oldest right answer had ended to be true."""

    answers: int = 0
    hits: int = 0
    stale: int = 0
    wrong: int = 0
    errors: int = 0
    oldest_s: float = 0.0
    findings: list[Finding] = []
    said: dict[str, int] = {}
    """Errors by their text."""

    def found(self, kind: str, one: Seen, why: str, began_s: float) -> None:
        if kind == "stale":
            self.stale += 1
        else:
            self.wrong += 1
        if sum(finding.kind == kind for finding in self.findings) < SHOWN:
            where = f"{one.kind} {one.symbol} from {one.bridge} ({one.source})"
            self.findings.append(Finding(kind, f"{where}, asked {one.asked_s - began_s:.3f} s after the case began: {why}"))


def value(kind: str, content: bytes) -> tuple[Value | None, str]:
    """-> (what an answer says, "") or (None, its error). Raises ValueError for what is neither."""
    try:
        envelope = _ticker(content) if kind == "ticker" else _depth(content)
    except msgspec.MsgspecError as e:
        raise ValueError(f"no answer in the host's shape ({e})") from e
    if (envelope.data is None) == (envelope.error is None):
        raise ValueError("neither data nor error")
    match envelope.data:
        case Ticker() as said:
            return (said.buy, said.sell, said.last, said.high, said.low, said.open, said.vol), ""
        case Depth() as said:
            return (tuple(said.asks), tuple(said.bids)), ""
    return None, str(envelope.error)


def judge(seen: Sequence[Seen], spans: Callable[[str, str], Mapping[Value, Spans]], *, max_age_s: float, began_s: float = 0.0) -> Verdict:
    """spans: of a kind and a market, all its values and when they were true."""
    verdict = Verdict(findings=[], said={})
    true: dict[tuple[str, str], Mapping[Value, Spans]] = {}
    read: dict[tuple[str, bytes], tuple[Value | None, str]] = {}
    for one in seen:
        verdict.answers += 1
        verdict.hits += one.source == HIT
        try:
            if (one.kind, one.content) not in read:
                read[one.kind, one.content] = value(one.kind, one.content) if one.source else (None, one.content.decode())
            said, error = read[one.kind, one.content]
        except ValueError as e:
            verdict.found("wrong", one, f"{e}: {one.content[:200]!r}", began_s)
            continue
        if said is None and one.source == HIT:
            verdict.found("wrong", one, f"an error from the cache: {error}", began_s)
        elif said is None:
            verdict.errors += 1
            verdict.said[error] = verdict.said.get(error, 0) + 1
        else:
            place = one.kind, one.market
            if place not in true:
                true[place] = spans(*place)
            _compare(verdict, one, true[place].get(said, ()), max_age_s, began_s)
    return verdict


def _compare(verdict: Verdict, one: Seen, spans: Sequence[tuple[float, float]], max_age_s: float, began_s: float) -> None:
    ends = [until_s for since_s, until_s in spans if since_s <= one.answered_s]
    if not ends:
        verdict.found("wrong", one, f"this was never true: {one.content[:300]!r}", began_s)
        return
    age_s = max(0.0, one.asked_s - max(ends))
    if age_s > max_age_s:
        verdict.found("stale", one, f"of a state that had ended {age_s:.3f} s before", began_s)
    else:
        verdict.oldest_s = max(verdict.oldest_s, age_s)
