"""Checks of what is told when the exchange understood, and refused."""

import re
from decimal import Decimal

import msgspec

from bus import messages as m
from bus.errors import SILENCED
from workers.check.bench import Bench, NotApplicable, check, expect, wrong
from workers.check.orders import leaves

HUGE = Decimal(9_000_000_000)


@check(
    "refusals",
    expects="what the exchange refuses is VenueRejected, in the exchange's own words, and never one of the texts that hosts silence",
    where="trade",
    section="what the host does with a failure",
    trades=True,
)
async def refusals(bench: Bench) -> str:
    order = await bench.order()
    answered = await bench.call("trade", m.Trade(bench.symbol, "buy", order.price, HUGE), during="an order far too large")
    if not answered.failed:
        wrong(f"the exchange said {_words(answered.sent[-1].answer)[:1] or '?'} to an order of {HUGE}; {answered}")
    expect(answered.code == "venue_rejected", f"{answered}; the exchange understood and refused: VenueRejected")
    expect(not SILENCED.search(answered.text), f"hosts silence {answered.text!r}")
    words = _words(answered.sent[-1].answer) if answered.sent else []
    kept = _bare(answered.text)
    expect(not words or any(_bare(word) in kept for word in words), f"the exchange said {words[0]!r}, the host reads {answered.text!r}")
    return answered.text


@check(
    "refusals-keys",
    expects="a signature by another secret is VenueRejected, not a transport error, and not an empty list",
    where="accounts",
    section="what the host does with a failure",
)
async def refused_keys(bench: Bench) -> str:
    access_key, secret_key = bench.settings.keys
    if (await bench.call("accounts", m.Empty())).failed:  # it goes first: an exchange may bind the key to the first secret it sees
        raise NotApplicable("accounts fails with the right one, too")
    told = ""
    for method, params in (("accounts", m.Empty()), ("orders", m.OrderList(bench.symbol))):
        if bench.has(method):
            answered = await bench.call(method, params, keys=(access_key, f"{secret_key[::-1]}x"), during="a wrong secret")
            expect(answered.failed, f"with a wrong secret {answered}: is the call signed, and the refusal looked at?")
            expect(answered.code == "venue_rejected", f"{answered}; expected VenueRejected")
            told = told or answered.text
    return told


@check(
    "order-unknown",
    expects="order and cancel of an id that the exchange does not know are errors, never null or true",
    where="order",
    section="order for an unknown id: error, not null",
    trades=True,
)
async def unknown_order(bench: Bench) -> str:
    bench.offers("order")
    told, _, _ = await bench.place()
    await bench.call("cancel", bench.reference(told))
    unknown = str(int(told) + 10**9) if str(told).isdecimal() else f"{str(told)[:-4]}zzzz"
    for method in ("order", "cancel"):
        answered = await bench.call(method, bench.reference(unknown), during="an unknown order id")
        expect(answered.failed, f"{answered} for the unknown id {unknown!r}")
        expect(answered.code in ("venue_rejected", "bad_request"), f"{answered}; that an order is unknown is a refusal")
    return answered.text


@check(
    "cancel-refused",
    expects="a cancel that the exchange refuses, here of an order that is cancelled already, is an error and not true",
    where="cancel",
    section="cancel",
    trades=True,
)
async def cancel_refused(bench: Bench) -> str:
    bench.offers("cancel")
    told, _, _ = await bench.place()
    expect(await bench.data("cancel", bench.reference(told)) is True, "cancel: expected true")
    again = await bench.call("cancel", bench.reference(told), during="a second cancel")
    if not again.failed and again.sent and not _words(again.sent[-1].answer):
        raise NotApplicable("the exchange accepts a second cancel")
    expect(again.failed, f"the exchange said {again.sent[-1].answer[:120].decode(errors='replace') if again.sent else 'nothing'}; {again}")
    expect(again.code in ("venue_rejected", "bad_request"), f"{again}; expected VenueRejected")
    return again.text


def _words(answer: bytes) -> list[str]:
    """Texts of an answer that are words of a person, the longest first."""
    try:
        texts = [text for _, text in leaves(msgspec.json.decode(answer)) if isinstance(text, str)]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return []
    return sorted((text for text in texts if re.search(r"[^\W\d_]{2,}[\s,.:]+\S|[^\x00-\x7f]", text)), key=len, reverse=True)


def _bare(text: str) -> str:
    return re.sub(r"[\s-]", "", text).lower()[:120]
