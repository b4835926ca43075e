"""Checks of orders while all is well: ids, statuses, numbers on the wire, refusals."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec

from bus import messages as m
from bus.errors import SILENCED
from workers.check.bench import MARKET, WORTH, Bench, NotApplicable, check, expect, is_number, listed, order_id, wrong
from workers.check.proxy import Fault
from workers.check.wire import digits, numbers

NOT_PASSED_ON = Fault("a 503 in the exchange's place", executed=False, how="answer", status=503)
LARGE = "9007199254740993123"
"""Above 2^53, and no float has its digits."""
LONG = Decimal("1234567.123456789567")
EXACT = (Decimal("0.1"), Decimal("1E-8"), Decimal("0.30000000000000004"), LONG)
STATUSES = ("open", "closed", "cancelled")
HUGE = Decimal(9_000_000_000)


@check(
    "orders",
    expects="open orders only: a placed one is listed with its amounts and status open, and is gone once it is cancelled; none are []",
    where="orders",
    section="order and orders",
    trades=True,
)
async def orders(bench: Bench) -> str:
    bench.offers("orders")
    told, _, order = await bench.place()
    other, _, _ = await bench.place()
    await bench.call("cancel", bench.reference(other))
    rows = list(listed(await bench.data("orders", m.OrderList(bench.symbol)), "orders"))
    for row in rows:
        _row(row, bench)
        expect(row["status"] == "open", f"{row['id']!r} is listed with status {row['status']}; only open orders belong here")
    ids = [row["id"] for row in rows]
    expect(told in ids, f"order {told!r} was placed and is not among {ids[:8]!r}")
    expect(other not in ids, f"order {other!r} was cancelled and is still listed")
    _amounts(next(row for row in rows if row["id"] == told), order)
    list(listed(await bench.data("orders", m.OrderList()), "orders of every symbol"))
    await bench.call("cancel", bench.reference(told))
    return f"{len(rows)} open"


@check(
    "order-status",
    expects="order tells what was placed, status open, then cancelled once it is",
    where="order",
    section="order and orders, status values",
    trades=True,
)
async def order_status(bench: Bench) -> str:
    bench.offers("order")
    told, _, order = await bench.place()
    row = await bench.data("order", bench.reference(told))
    _row(row, bench)
    expect(row["status"] == "open", f"a resting order has status {row['status']}")
    expect(row["deal_amount"] == 0, f"a resting order has deal_amount {row['deal_amount']}")
    _amounts(row, order)
    expect(await bench.data("cancel", bench.reference(told)) is True, "cancel: expected true")
    row = await bench.data("order", bench.reference(told))
    expect(row["status"] == "cancelled", f"a cancelled order has status {row['status']}")
    return "open, then cancelled"


@check(
    "ids-exact",
    expects="trade, order and orders tell one id, same JSON type, and cancel sends it byte for byte",
    where="trade",
    section="ids: keep bytes exact",
    trades=True,
)
async def ids_exact(bench: Bench) -> str:
    told, _, _ = await bench.place()
    row = await bench.data("order", bench.reference(told)) if hasattr(bench.boundary.venue, "order") else {"id": told}
    expect(_same(row["id"], told), f"trade told {told!r}, order {row['id']!r}")
    listed_ids = [row["id"] for row in await bench.data("orders", m.OrderList(bench.symbol))]
    expect(any(_same(one, told) for one in listed_ids), f"trade told {told!r}, orders tells {listed_ids[:8]!r}")
    cancelled = await bench.call("cancel", bench.reference(told))
    expect(not cancelled.failed, f"cancel did not accept the id {told!r} that trade had told: {cancelled}")
    expect(any(seen.names(str(told)) for seen in cancelled.sent), f"cancel of {told!r} sent {[seen.text[:100] for seen in cancelled.sent]}")
    return f"{told!r}"


@check(
    "ids-large",
    expects="an id above 2^53 keeps its digits, leaves as text, and comes back to the exchange unchanged",
    where="trade",
    section="ids: keep bytes exact; text above 2^53",
    trades=True,
)
async def ids_large(bench: Bench) -> str:
    paths = await id_paths(bench)
    real = ""

    def enlarged(body: bytes) -> bytes:
        nonlocal real
        answer = msgspec.json.decode(body)
        real = str(at(answer, paths[0]))
        if not real.replace(",", "").isdecimal():
            return body
        for path in paths:
            at(answer, path[:-1])[path[-1]] = int(LARGE) if isinstance(at(answer, path), int) else LARGE
        return msgspec.json.encode(answer)

    order = await bench.order()
    fault = Fault("a large order id", executed=True, how="edit", edit=enlarged)
    with bench.proxy.failing(fault, lambda seen: seen.carries(order.amount)):
        answered = await bench.call("trade", order, during=fault.name)
    expect(real, f"the order of this check was not placed: {answered}")
    try:
        if not real.replace(",", "").isdecimal():
            raise NotApplicable(f"ids are text such as {real!r}")
        expect(not answered.failed, str(answered))
        told = order_id(answered)
        expect(str(told) == LARGE, f"the exchange said {LARGE}, the host is told {told!r}")
        for method in ("order", "cancel"):
            asked = await bench.failing(NOT_PASSED_ON, method, bench.reference(told))
            expect(any(seen.names(LARGE) for seen in asked.sent), f"{method} of {LARGE} sent {[seen.text[:100] for seen in asked.sent]}")
        expect(isinstance(told, str), f"the id left as the number {told}: hosts and JavaScript lose its last digits; make it text")
    finally:
        if not bench.stuck:
            await bench.call("cancel", bench.reference(real.replace(",", "")))
    return f"{told!r}"


@check(
    "numbers-exact",
    expects="price and amount go out digit for digit and in plain notation: 0.1, 0.00000001, never 1e-08 or 0.30000000000000004 for 0.3",
    where="trade",
    section="accept and emit: numbers; Decimal for what is forwarded",
)
async def numbers_exact(bench: Bench) -> str:
    bench.offers("trade")
    said = []
    for amount in EXACT:
        price = LONG if amount != LONG else Decimal("0.1")
        answered = await bench.failing(NOT_PASSED_ON, "trade", m.Trade(bench.symbol, "buy", price, amount))
        text = "\n".join(seen.text for seen in answered.sent)
        if not answered.sent and answered.code in ("bad_request", "venue_rejected"):
            said.append(f"{amount:f} refused")
            continue
        for number, what in ((amount, "amount"), (price, "price")):
            found = list(numbers(text))
            exponent = [one for one in found if "e" in one.lower() and Decimal(one) == number]
            expect(not exponent, f"{what} {number:f} was sent as {exponent[:1]}")
            exact = any(digits(one) == digits(f"{number:f}") for one in found)
            # Fewer digits at the end are a lot size; other digits are a float.
            cut = any(len(digits(one)) > 3 and digits(f"{number:f}").startswith(digits(one)) for one in found)
            expect(exact or cut, f"{what} {number:f} was sent as {_nearest(found, number)}")
        said.append(f"{amount:f}")
    return "sent " + ", ".join(said)


@check(
    "market-orders",
    expects="price -1 is a market order; a buy's amount is money in the quote currency, a sell's is in base",
    where="trade",
    section="trade; market orders",
    trades=True,
)
async def market_orders(bench: Bench) -> str:
    if not bench.settings.play:
        raise NotApplicable("it would spend money: made on an exchange for play only")
    spend = bench.settings.amount * await bench.price() if bench.settings.amount else Decimal(WORTH)
    sell = (await bench.amount()) * 10
    worths = []
    side: Any
    for side, amount in (("buy", spend), ("sell", sell)):
        answered = await bench.call("trade", m.Trade(bench.symbol, side, MARKET, amount))
        expect(not answered.failed, f"{side} {amount:f} at the market: {answered}")
        expect(
            any(seen.carries(amount) for seen in answered.sent), f"{side} {amount:f}: the amount is not in {answered.sent[-1].text[:160]}"
        )
        row = await bench.data("order", bench.reference(order_id(answered)))
        _row(row, bench)
        if not row["deal_amount"]:
            raise NotApplicable("the exchange does not fill market orders at once; only what was sent was looked at")
        average = row["avg_price"] or (await bench.data("ticker", bench.market))["last"]
        worth = Decimal(str(row["deal_amount"])) * Decimal(str(average))
        if side == "buy":
            expect(
                worth <= spend * Decimal("1.02"),
                f"a buy for {spend} of the quote currency bought for {worth:.2f}: was amount taken as base?",
            )
        else:
            expect(row["deal_amount"] == amount, f"a sell of {amount} in base sold {row['deal_amount']}")
        expect(row["type"] == side, f"a {side} is told as {row['type']}")
        worths.append(f"{side} {row['deal_amount']}")
    return ", ".join(worths)


# ---------------------------------------------------------------- refusals


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
    expects="a signature by another secret is VenueRejected, not a transport error",
    where="accounts",
    section="what the host does with a failure",
)
async def refused_keys(bench: Bench) -> str:
    access_key, secret_key = bench.settings.keys
    if (await bench.call("accounts", m.Empty())).failed:  # it goes first: an exchange may bind the key to the first secret it sees
        raise NotApplicable("accounts fails with the right one, too")
    answered = await bench.call("accounts", m.Empty(), keys=(access_key, f"{secret_key[::-1]}x"), during="a wrong secret")
    expect(answered.failed, f"with a wrong secret {answered}: is the call signed?")
    expect(answered.code == "venue_rejected", f"{answered}; expected VenueRejected")
    return answered.text


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


# ---------------------------------------------------------------- reading answers


def _row(row: Any, bench: Bench) -> None:
    """The shape of an order. Raises Wrong."""
    if not isinstance(row, dict):
        wrong(f"expected an order, got {row!r:.80}")
    expect(isinstance(row.get("id"), int | str), f"id: expected a number or text, got {row.get('id')!r:.60}")
    for key in ("amount", "price", "deal_amount", "avg_price"):
        expect(is_number(row.get(key)), f"{key}: expected a JSON number, got {row.get(key)!r:.60}")
    expect(row.get("status") in STATUSES, f"status {row.get('status')!r}: expected {', '.join(STATUSES)}")
    expect(row.get("type") in ("buy", "sell"), f"type {row.get('type')!r}: expected buy or sell")
    symbol = row.get("symbol")
    expect(symbol is None or str(symbol).upper() == bench.symbol.upper(), f"symbol {symbol!r}: hosts know it as {bench.symbol!r}")
    if row.get("time") is not None:
        expect(isinstance(row["time"], int) and row["time"] >= 10**12, f"time {row['time']!r}: expected ms")


def _amounts(row: dict[str, Any], order: m.Trade) -> None:
    for key, expected in (("amount", order.amount), ("price", order.price), ("type", order.side)):
        expect(row[key] == expected, f"{key} {row[key]}, and {expected} was ordered")


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _nearest(found: list[str], number: Decimal) -> str:
    """What was probably meant to be it."""
    return min(found, key=lambda one: abs(Decimal(one) - number), default="nothing")


def _words(answer: bytes) -> list[str]:
    """Texts of an answer that are words of a person, the longest first."""
    try:
        texts = [text for _, text in leaves(msgspec.json.decode(answer)) if isinstance(text, str)]
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return []
    return sorted((text for text in texts if re.search(r"[^\W\d_]{2,}[\s,.:]+\S|[^\x00-\x7f]", text)), key=len, reverse=True)


def _bare(text: str) -> str:
    return re.sub(r"[\s-]", "", text).lower()[:120]


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, value) of everything in a JSON document that is neither list nor object."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path, node


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


async def id_paths(bench: Bench) -> list[tuple[Any, ...]]:
    """Where in the exchange's answer to an order its id stands. Raises NotApplicable where it cannot be found."""
    if "id_paths" not in bench.facts:
        told, answered, order = await bench.place()
        await bench.call("cancel", bench.reference(told))
        answer = next((seen.answer for seen in answered.sent if seen.carries(order.amount)), b"")
        wanted = str(told).rpartition(",")[2]
        try:
            found = [path for path, value in leaves(msgspec.json.decode(answer)) if path and str(value).replace(",", "") == wanted]
        except (msgspec.MsgspecError, UnicodeDecodeError):
            found = []
        named = [path for path in found if str(path[-1]).lower().endswith("id")]
        bench.facts["id_paths"] = named or found
    paths: list[tuple[Any, ...]] = bench.facts["id_paths"]
    if not paths:
        raise NotApplicable("the id cannot be found in the exchange's answer to an order")
    return paths
