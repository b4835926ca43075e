"""What is right and what is not: pure functions over what hosts were told, what the exchange did and what the journal says.

An *order* is what a strategy meant to place, once: all its requests, with one nonce or with several, count as one. A *key* is the
identity of one nonce, which the exchange knows as client order id.

doubles    more than one order of the exchange for an order, or one that nobody asked for
lost       executed, and not placed in the journal; or its id was told, and the exchange does not have it
lies       a host or the journal was told something else than what happened
unsettled  an intent without an outcome after everything was brought back

A host may be told that nothing was placed, and place it with a later request of the same nonce. It may be told that *this request* did
nothing (there was no bus, no worker) while an earlier one with the same nonce was executed: that is true, and a strategy repeats it.
Any other word than "outcome unknown" for an order that exists is a lie.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from msgspec import Struct

UNKNOWN = "outcome unknown"
ONLY_THIS_REQUEST = re.compile(
    r"^(network|timeout).*(no worker|no connection to the bus|bus takes no more|in flight|nothing was sent|not sent|body did not arrive)"
)
"""Said before anything of the request could have been written or sent: it tells nothing of another request with the same nonce."""
NEVER_SENT = "refused"
"""How an attempt broke off that found nobody listening."""

Kind = Literal["double", "lost", "lie", "unsettled"]


class Asked(Struct, kw_only=True, omit_defaults=True):
    """One request of a host. Times in ms since the epoch, by this machine's clock.

    order: number of the order it is about; key: of its nonce. cancels: the exchange's id of the order that it cancels, "" for a trade.
    until_ms: when the answer came, or the connection broke, or the host lost patience. data, error: of the envelope. broke: why there
    is no answer; "refused" where nobody listened.
    """

    order: int
    key: str
    bridge: str
    sent_ms: float
    cancels: str = ""
    until_ms: float = 0.0
    data: Any = None
    error: str = ""
    broke: str = ""

    @property
    def told_id(self) -> str:
        return str(self.data["id"]) if isinstance(self.data, dict) and "id" in self.data else ""

    @property
    def denied(self) -> bool:
        """Whether its host was told that nothing was placed, or cancelled."""
        return bool(self.error) and not self.error.startswith(UNKNOWN)


class Received(Struct, kw_only=True, omit_defaults=True):
    """One line of the exchange's ledger. executed: None where it died first. id, now: of the order placed or cancelled, as it is now."""

    verb: str
    key: str
    at_ms: float
    executed: bool | None
    id: str = ""
    now: str = ""
    code: int | None = None
    fault: str = ""


class Written(Struct, kw_only=True, omit_defaults=True):
    """One record of the journal. sequence: in its stream. record: intent, unknown or outcome; state: of an outcome. process: whose."""

    key: str
    record: str
    at_ms: float
    sequence: int = 0
    state: str = ""
    id: str = ""
    by: str = ""
    process: str = ""


class Killed(Struct, kw_only=True):
    """One SIGKILL. part: "nats", "paper", "bridge-1", "worker-1"; process: how a worker names itself in the journal."""

    part: str
    at_ms: float
    process: str = ""


class Facts(Struct):
    """All that is known of one case. left: keys whose sealed credentials are still on the bus at the end."""

    asked: list[Asked] = []
    received: list[Received] = []
    written: list[Written] = []
    killed: list[Killed] = []
    left: list[str] = []


class Finding(Struct, frozen=True):
    """order: 0 where it belongs to none."""

    kind: Kind
    order: int
    key: str
    why: str


class Verdict(Struct):
    """orders: meant by hosts. Of those, ambiguous: unclear for a time; kills: with a part killed between intent and outcome."""

    findings: list[Finding] = []
    orders: int = 0
    ambiguous: int = 0
    kills: int = 0


class _Key(Struct):
    """What is known of one key: each list in order of time."""

    key: str
    order: int
    asked: list[Asked]
    placed: list[Received]
    intent: Written | None
    unknown: Written | None
    outcome: Written | None


def judge(facts: Facts) -> Verdict:
    """Compare everything with everything."""
    keys = _by_key(facts)
    orders: dict[int, list[_Key]] = {}
    for one in keys:
        orders.setdefault(one.order, []).append(one)
    findings = [*_strangers(facts, {one.key for one in keys}), *_cancels(facts)]
    for number, of_order in orders.items():
        findings += _doubles(number, of_order)
        for one in of_order:
            findings += _journal(one)
            findings += _answers(one, facts.received)
            if one.key in facts.left and one.outcome is not None:
                findings.append(Finding("unsettled", number, one.key, "it has an outcome, and its sealed credentials are still on the bus"))
    return Verdict(
        findings=findings,
        orders=len(orders),
        ambiguous=sum(any(_ambiguous(one) for one in of_order) for of_order in orders.values()),
        kills=sum(any(_hit(one, kill) for one in of_order for kill in facts.killed) for of_order in orders.values()),
    )


def _by_key(facts: Facts) -> list[_Key]:
    keys: dict[str, _Key] = {}
    for one in sorted(facts.asked, key=lambda one: one.sent_ms):
        if not one.cancels:
            keys.setdefault(one.key, _Key(one.key, one.order, [], [], None, None, None)).asked.append(one)
    for row in facts.received:
        if row.verb == "POST" and row.executed and row.key in keys:
            keys[row.key].placed.append(row)
    for record in facts.written:
        if (found := keys.get(record.key)) and record.record in ("intent", "unknown", "outcome"):
            setattr(found, record.record, record)
    return list(keys.values())


def _strangers(facts: Facts, known: set[str]) -> Iterable[Finding]:
    for row in facts.received:
        if row.verb == "POST" and row.executed and row.key not in known:
            yield Finding("double", 0, row.key, f"the exchange has order {row.id}, which no host asked for under this key")


def _doubles(number: int, keys: list[_Key]) -> Iterable[Finding]:
    placed = [(one, row) for one in keys for row in one.placed]
    if len(placed) > 1:
        (first, _), (second, row) = placed[:2]
        known = first.outcome is not None and second.intent is not None and first.outcome.at_ms < second.intent.at_ms
        when = "under one key" if first is second else f"the second was begun {'after' if known else 'before'} the first had an outcome"
        yield Finding("double", number, row.key, f"{len(placed)} orders for one: {', '.join(row.id for _, row in placed)}; {when}")


def _journal(one: _Key) -> Iterable[Finding]:
    ids = [row.id for row in one.placed]
    settled = one.outcome is not None and one.outcome.state != "unknown"
    if one.intent is not None and not settled:
        yield Finding("unsettled", one.order, one.key, "an intent without an outcome")
    if ids and not settled:
        missing = "no outcome" if one.intent is not None else "no intent"
        yield Finding("lost", one.order, one.key, f"the exchange executed it as {ids[0]}, the journal has {missing}")
    if one.outcome is None or not settled:
        return
    if ids and one.outcome.state != "placed":
        yield Finding("lie", one.order, one.key, f"the journal says {one.outcome.state}, the exchange executed it as {ids[0]}")
    if one.outcome.state == "placed" and one.outcome.id not in ids:
        has = f"has {', '.join(ids)}" if ids else "never executed it"
        yield Finding("lie", one.order, one.key, f"the journal says placed as {one.outcome.id!r}, the exchange {has}")


def _answers(one: _Key, received: list[Received]) -> Iterable[Finding]:
    ids = [row.id for row in one.placed]
    for asked in one.asked:
        if (told := asked.told_id) and told not in ids:
            if ids or any(row.id == told for row in received):
                yield Finding(
                    "lie", one.order, one.key, f"the host was told id {told}, the exchange has {', '.join(ids) or 'no such order'}"
                )
            else:
                yield Finding("lost", one.order, one.key, f"the host was told id {told}, which the exchange does not have")
        if asked.denied and one.placed and not all(_of_another(asked, one.asked, row) for row in one.placed):
            yield Finding("lie", one.order, one.key, f"the host was told {asked.error!r}, the exchange executed it as {ids[0]}")


def _of_another(asked: Asked, all_asked: list[Asked], row: Received) -> bool:
    """Whether an execution may be another request's of the same nonce, made later, or what was told is about this request alone."""
    others = [other for other in all_asked if other is not asked and other.sent_ms <= row.at_ms and other.broke != NEVER_SENT]
    later = row.at_ms > asked.until_ms and any(other.sent_ms >= asked.until_ms for other in others)
    return later or bool(others and ONLY_THIS_REQUEST.search(asked.error))


def _cancels(facts: Facts) -> Iterable[Finding]:
    cancels = [asked for asked in facts.asked if asked.cancels]
    for asked in cancels:
        now = [row.now for row in facts.received if row.verb == "POST" and row.executed and row.id == asked.cancels]
        if asked.data is True and now == ["open"]:
            yield Finding("lie", asked.order, asked.key, f"the host was told that {asked.cancels} is cancelled, it is open")
        done = [row for row in facts.received if row.verb == "DELETE" and row.executed and row.id == asked.cancels]
        alone = sum(other.cancels == asked.cancels for other in cancels) == 1
        if asked.denied and alone and done:
            yield Finding("lie", asked.order, asked.key, f"the host was told {asked.error!r}, the exchange has cancelled {asked.cancels}")


def _ambiguous(one: _Key) -> bool:
    """The journal or a host did not know, a host had no answer, or another process than its worker found out."""
    return (
        one.unknown is not None
        or (one.outcome is not None and one.outcome.by != "worker")
        or any(asked.error.startswith(UNKNOWN) or asked.broke not in ("", NEVER_SENT) for asked in one.asked)
    )


def _hit(one: _Key, kill: Killed) -> bool:
    """Whether a part on the order's way was killed after its intent and before its outcome was on disk."""
    if one.intent is None or kill.at_ms <= one.intent.at_ms or (one.outcome is not None and one.outcome.at_ms <= kill.at_ms):
        return False
    if kill.part.startswith("worker"):
        return bool(kill.process) and kill.process == one.intent.process
    if kill.part.startswith("bridge"):
        return any(asked.bridge == kill.part and asked.sent_ms <= kill.at_ms <= asked.until_ms for asked in one.asked)
    return True


def story(facts: Facts, order: int, key: str) -> list[str]:
    """Everything about one order, or one key that belongs to none, in order of time: one JSON object a line, ms since its first request."""
    keys = {asked.key for asked in facts.asked if asked.order == order} if order else {key}
    ids = {row.id for row in facts.received if row.key in keys and row.id}
    lines: list[tuple[float, str, Struct]] = []
    lines += [(asked.sent_ms, "asked", asked) for asked in facts.asked if asked.key in keys or (order and asked.order == order)]
    lines += [(row.at_ms, "exchange", row) for row in facts.received if row.key in keys or row.id in ids]
    lines += [(record.at_ms, "journal", record) for record in facts.written if record.key in keys]
    lines += [(kill.at_ms, "killed", kill) for kill in facts.killed]
    lines.sort(key=lambda line: line[0])
    first = lines[0][0] if lines else 0.0
    return [f"{at - first:9.1f} {what:8} {msgspec.json.encode(_since(one, first)).decode()}" for at, what, one in lines]


def _since(one: Struct, first: float) -> dict[str, Any]:
    """As a dictionary, its times relative."""
    content: dict[str, Any] = msgspec.to_builtins(one)
    return {name: round(value - first, 1) if name.endswith("_ms") else value for name, value in content.items()}
