"""Checks of what is told, and what is sent, when an exchange fails."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from bus import messages as m
from bus.errors import SILENCED
from workers.check.bench import Bench, NotApplicable, Wrong, check, expect
from workers.check.boundary import Answered, Stuck
from workers.check.orders import at, id_paths
from workers.check.proxy import Fault
from workers.check.wire import Seen

HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
HALF = b'{"code": 0, "data": {"id": "12'
TEXT_HTML = (("Content-Type", "text/html"),)

READ_FAULTS = (
    Fault("no answer in time", executed=False, how="silence"),
    Fault("a connection dropped without an answer", executed=False, how="drop"),
    Fault("a connection dropped in the middle of the answer", executed=True, how="cut"),
    Fault("503", executed=False, how="answer", status=503, body=b'{"message": "overloaded"}'),
    Fault("HTML with status 200", executed=False, how="answer", headers=TEXT_HTML, body=HTML),
    Fault("JSON that ends in the middle", executed=False, how="answer", body=HALF),
)
WRITE_FAULTS = (
    Fault("no answer in time, not executed", executed=False, how="silence"),
    Fault("no answer in time, executed", executed=True, how="silence"),
    Fault("a connection dropped before the exchange executed", executed=False, how="drop"),
    Fault("a connection dropped after the exchange executed", executed=True, how="drop"),
    Fault("a connection dropped in the middle of the answer", executed=True, how="cut"),
    Fault("503 after the exchange executed", executed=True, how="answer", status=503, body=b'{"message": "overloaded"}'),
    Fault("HTML with status 200 after the exchange executed", executed=True, how="answer", headers=TEXT_HTML, body=HTML),
    Fault("JSON that ends in the middle after the exchange executed", executed=True, how="answer", body=HALF),
)
LIMITED = Fault("429", executed=False, how="answer", status=429, headers=(("Retry-After", "7"),), body=b'{"message": "slow down"}')


class Observed(Struct, frozen=True):
    """A write while the exchange failed so. sent: how many requests carried it."""

    fault: Fault
    answered: Answered
    sent: int

    def __str__(self) -> str:
        return f"on {self.fault.name} {self.answered}"


def carrying(order: m.Trade) -> Callable[[Seen], bool]:
    """Whether a request places this very order."""
    return lambda seen: seen.carries(order.amount)


async def _trades(bench: Bench) -> list[Observed]:
    """An order for each fault, made once for all checks that look at it."""
    if "trades" not in bench.facts:
        found = []
        for fault in (*WRITE_FAULTS, LIMITED):
            order = await bench.order()
            answered = await bench.failing(fault, "trade", order, when=carrying(order))
            found.append(Observed(fault, answered, sum(map(carrying(order), answered.sent))))
            if not found[-1].sent:
                raise Wrong(f"the amount {order.amount:f} is in no request of trade's: {[seen.text[:120] for seen in answered.sent]}")
        bench.facts["trades"] = found
    observed: list[Observed] = bench.facts["trades"]
    return observed


async def _cancels(bench: Bench) -> list[Observed]:
    if "cancels" not in bench.facts:
        bench.offers("cancel")
        found = []
        for fault in (*WRITE_FAULTS, LIMITED):
            told, _, _ = await bench.place()

            def names(seen: Seen, told: object = told) -> bool:
                return seen.names(str(told))

            answered = await bench.failing(fault, "cancel", bench.reference(told), when=names)
            found.append(Observed(fault, answered, sum(map(names, answered.sent))))
        bench.facts["cancels"] = found
    observed: list[Observed] = bench.facts["cancels"]
    return observed


@check(
    "reads-fail-as-transport",
    expects="a read without a readable answer is a transport error (network, timeout) that hosts may silence; never a refusal or a value",
    where="ticker",
    section="what the host does with a failure",
)
async def reads(bench: Bench) -> str:
    count = 0
    for method, params in (("ticker", bench.market), ("accounts", m.Empty()), ("orders", m.OrderList(bench.symbol))):
        for fault in READ_FAULTS if bench.has(method) else ():
            answered = await bench.failing(fault, method, params)
            expect(answered.sent, f"{method} sent nothing: {answered}")
            expect(answered.failed, f"on {fault.name} {answered}")
            expect(answered.code in ("venue_unavailable", "timed_out"), f"on {fault.name} {answered}")
            expect(SILENCED.search(answered.text), f"on {fault.name} the host reads {answered.text!r}, which it does not silence")
            count += 1
    return f"{count} failures"


@check(
    "rate-limits",
    expects="429 is told with its Retry-After, as what nothing was placed by, and is not tried again",
    where="_send",
    section="what the host does with a failure",
)
async def rate_limits(bench: Bench) -> str:
    answered = await bench.failing(LIMITED, "ticker", bench.market)
    expect(answered.code == "rate_limited" and "7" in answered.text, f"on 429 with Retry-After 7 {answered}")
    expect(len(answered.sent) == 1, f"on 429 ticker was sent {len(answered.sent)} times")
    return answered.text


def reading(bench: Bench) -> Iterator[tuple[str, Any]]:
    """A public and a private read, as far as there are such."""
    for method, params in (("ticker", bench.market), ("accounts", m.Empty())):
        if bench.has(method):
            yield method, params


async def _unclear(observed: list[Observed]) -> str:
    for one in observed:
        if one.fault is LIMITED:
            expect(one.answered.code == "rate_limited", f"{one}; expected rate_limited: an exchange that answers 429 placed nothing")
            continue
        expect(one.answered.code == "outcome_unknown", f"{one}; expected outcome unknown, for it may have been executed")
        expect(not SILENCED.search(one.answered.text), f"{one}: hosts silence that")
        key = one.answered.client_order_id
        expect(key in one.answered.text, f"{one}: the client order id {key} is missing")
    return f"{len(observed)} failures"


@check(
    "orders-unclear",
    expects="an order without a readable answer is OutcomeUnknown with its client order id, whether the exchange executed it or not",
    where="trade",
    section="what the host does with a failure; promises about orders",
    trades=True,
)
async def orders_unclear(bench: Bench) -> str:
    return await _unclear(await _trades(bench))


@check(
    "cancels-unclear",
    expects="a cancel without a readable answer is OutcomeUnknown: the order may be alive or gone",
    where="cancel",
    section="cancel; promises about orders",
    trades=True,
)
async def cancels_unclear(bench: Bench) -> str:
    return await _unclear(await _cancels(bench))


@check(
    "orders-without-id",
    expects="a success without an order id is OutcomeUnknown: the order is alive, and nobody can name it",
    where="trade",
    section="trade; promises about orders",
    trades=True,
)
async def without_id(bench: Bench) -> str:
    paths = await id_paths(bench)

    def removed(body: bytes) -> bytes:
        answer = msgspec.json.decode(body)
        for path in paths:
            parent = at(answer, path[:-1])
            if isinstance(parent, dict):
                parent.pop(path[-1], None)
            else:
                parent[path[-1]] = None
        return msgspec.json.encode(answer)

    def emptied(body: bytes) -> bytes:
        answer = msgspec.json.decode(body)
        for path in paths:
            at(answer, path[:-1])[path[-1]] = None
        return msgspec.json.encode(answer)

    for what, edit in (("an answer without the id", removed), ("an answer with null for the id", emptied)):
        order = await bench.order()
        fault = Fault(what, executed=True, how="edit", edit=edit)
        answered = await bench.failing(fault, "trade", order, when=carrying(order))
        expect(answered.code == "outcome_unknown", f"on {what} {answered}; expected outcome unknown")
        expect(answered.client_order_id in answered.text, f"on {what} {answered}: the client order id is missing")
    return answered.text


@check(
    "writes-sent-once",
    expects="nothing that writes is sent twice, whatever happens: not after a timeout, a 503, or on a kept connection that turns out dead",
    where="trade",
    section="never double-place an order on a retry of your own",
    trades=True,
)
async def sent_once(bench: Bench) -> str:
    observed = [*await _trades(bench), *await _cancels(bench)]
    for one in observed:
        expect(one.sent == 1, f"{one}: the exchange got it {one.sent} times")
    return f"{len(observed)} failures, each one request"


@check(
    "nothing-sent",
    expects="where no connection comes about nothing was sent: a transport error, also for an order",
    where="trade",
    section="what the host does with a failure",
    trades=True,
)
async def nothing_sent(bench: Bench) -> str:
    tried: list[tuple[str, Any]] = [("ticker", bench.market), ("trade", await bench.order())]
    for method, params in tried:
        answered = await bench.call(method, params, exchange="dead", during="no connection")
        expect(not answered.sent, f"{method} of a venue with another base_url reached this one's: {answered.sent}")
        expect(answered.code == "venue_unavailable", f"without a connection {answered}; expected a transport error")
    return answered.text


@check(
    "deadline",
    expects="a call ends before its deadline, by itself: an exchange that says nothing does not make a host wait longer",
    where="_send",
    section="time limits",
)
async def deadline(bench: Bench) -> str:
    left_s, silence = 1.3, READ_FAULTS[0]
    took = []
    for method, params in reading(bench):
        answered = await bench.failing(silence, method, params, left_s=left_s)
        expect(answered.failed, f"of an exchange that says nothing {answered}")
        expect(answered.took_s < left_s + 0.3, f"{method} took {answered.took_s:.1f} s, and its deadline was after {left_s} s")
        took.append(f"{method} {answered.took_s:.2f} s of {left_s} s")
    return ", ".join(took)


@check(
    "slow-calls-apart",
    expects="a call that waits for the exchange holds up no other: nothing blocks the event loop, no lock is held while waiting",
    where="_send",
    section="the host calls concurrently",
)
async def apart(bench: Bench) -> str:
    bench.offers("depth")
    outcome: list[Answered] = []
    gave_up: list[Seen] = []

    async def meanwhile() -> bool:
        arrived = await bench.proxy.until(lambda: len(bench.proxy.seen) > before, 3.0)
        if arrived:
            outcome.append(await bench.call("depth", bench.market, left_s=2.5, during="another call that waits"))
            gave_up.extend(seen for seen in bench.proxy.seen[before : before + 1] if seen.left)
        return arrived

    before = len(bench.proxy.seen)
    with bench.proxy.failing(READ_FAULTS[0], times=1):
        try:
            wrong = await bench.boundary.cancelled("ticker", bench.market, bench.settings.keys, meanwhile)
        except Stuck as e:
            bench.proxy.cut_all()
            raise Wrong(str(e)) from None
    if not outcome:
        raise NotApplicable(f"ticker: {wrong}")
    expect(not outcome[0].failed, f"while ticker waited for the exchange {outcome[0]}")
    expect(not gave_up, f"depth was answered after {outcome[0].took_s:.1f} s, when ticker had given up: ticker blocked the event loop")
    standstill = bench.boundary.ear.standstill
    expect(not standstill, f"the event loop stood still, and every other call with it: {standstill}")
    return f"depth answered in {outcome[0].took_s:.2f} s while ticker waited"


@check(
    "cancellation",
    expects="a call that is cancelled ends at once, raises CancelledError again, and leaves no task and no connection behind",
    where="_send",
    section="always answer; an un-answered call pins a routine",
)
async def cancellation(bench: Bench) -> str:
    for method, params in reading(bench):
        await _cancel(bench, method, params)
    return "no task, no connection left"


async def _cancel(bench: Bench, method: str, params: Struct) -> None:
    seen = bench.proxy.seen
    before = len(seen)

    async def waiting() -> bool:
        return await bench.proxy.until(lambda: len(seen) > before, 5.0)

    with bench.proxy.failing(READ_FAULTS[0]):
        try:
            wrong = await bench.boundary.cancelled(method, params, bench.settings.keys, waiting)
        except Stuck as e:
            wrong = str(e)
    expect(not wrong, f"{method}: {wrong}")
    gone = await bench.proxy.until(lambda: all(one.left for one in seen[before:]), 2.0)
    expect(gone, f"{method}: its connection to the exchange stayed open")
