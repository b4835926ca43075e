"""Checks of orders while all is well: ids, statuses, numbers on the wire, refusals."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import msgspec

from bus import messages as m
from workers.check.bench import MARKET, UNKNOWN, WORTH, Bench, NotApplicable, check, expect, is_number, listed, order_id, wrong
from workers.check.boundary import Answered
from workers.check.proxy import NOT_PASSED_ON, Fault
from workers.check.wire import digits, numbers

LARGE = "9007199254740993123"
"""Above 2^53, and no float has its digits."""
LONG = Decimal("1234567.123456789567")
EXACT = (
    *((LONG, amount) for amount in (Decimal("0.1"), Decimal("1E-8"), Decimal("0.30000000000000004"))),
    (Decimal("0.1"), LONG),
    (Decimal("1.3E-7"), Decimal("1745.2")),
    (Decimal("0.031234"), Decimal("1745.2")),
)
"""(price, amount)"""
STATUSES = ("open", "closed", "cancelled")


@check(
    "orders",
    expects="open orders of the symbol only: a placed one is listed with its amounts, status open, and is gone once cancelled; none are []",
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
    elsewhere = await bench.call("orders", m.OrderList(UNKNOWN), during="an unknown symbol")
    if not elsewhere.failed and not any(UNKNOWN[:6] in seen.text.upper() for seen in elsewhere.sent):
        also = [row["id"] for row in listed(elsewhere.data, "orders")]
        expect(told not in also, f"orders of {UNKNOWN} lists order {told!r} of {bench.symbol}: the symbol is ignored")
    await bench.call("cancel", bench.reference(told))
    return f"{len(rows)} open"


@check(
    "order-status",
    expects="order tells what was placed, status open, then cancelled once it is; a status that is in no table is an error, not a guess",
    where="order",
    section="order and orders, status values",
    trades=True,
)
async def order_status(bench: Bench) -> str:
    bench.offers("order")
    told, _, order = await bench.place()
    resting = await bench.call("order", bench.reference(told))
    expect(not resting.failed, str(resting))
    row = resting.data
    _row(row, bench)
    expect(row["status"] == "open", f"a resting order has status {row['status']}")
    _amounts(row, order)
    expect(await bench.data("cancel", bench.reference(told)) is True, "cancel: expected true")
    gone = await bench.call("order", bench.reference(told))
    expect(not gone.failed, str(gone))
    expect(gone.data["status"] == "cancelled", f"a cancelled order has status {gone.data['status']}")
    paths = _changed(resting, gone)
    if not paths:
        return "open, then cancelled (where the exchange tells the status was not found)"

    def unheard_of(body: bytes) -> bytes:
        answer = msgspec.json.decode(body)
        for path in paths:
            at(answer, path[:-1])[path[-1]] = 987 if isinstance(at(answer, path), int) else "zzz"
        return msgspec.json.encode(answer)

    fault = Fault("a status that nobody has heard of", executed=True, how="edit", edit=unheard_of)
    answered = await bench.failing(fault, "order", bench.reference(told))
    expect(answered.failed, f"the exchange said status zzz, and {answered}; expected an error")
    return "open, then cancelled; an unknown status is an error"


def _changed(before: Answered, after: Answered) -> list[tuple[Any, ...]]:
    """Where the exchange tells an order's status: under a name such as status or state, and no longer the same once it is cancelled."""
    try:
        old, new = (dict(leaves(msgspec.json.decode(one.sent[-1].answer))) for one in (before, after))
    except (msgspec.MsgspecError, UnicodeDecodeError, IndexError):
        return []
    return [path for path, value in old.items() if path and "stat" in str(path[-1]).lower() and new.get(path, value) != value]


@check(
    "balances-frozen",
    expects="while an order rests what it needs is `frozen`, and no longer `free`",
    where="accounts",
    section="accounts",
    trades=True,
)
async def frozen(bench: Bench) -> str:
    if not bench.settings.play:
        raise NotApplicable("balances move by themselves there: made on an exchange for play only")
    before = await _balances(bench)
    told, _, _ = await bench.place()
    after = await _balances(bench)
    await bench.call("cancel", bench.reference(told))
    moved = {name: (free - before[name][0], held - before[name][1]) for name, (free, held) in after.items() if name in before}
    moved = {name: by for name, by in moved.items() if any(by)}
    if not moved and not bench.settings.paper:
        raise NotApplicable("an order changes no balance here")
    seen = ", ".join(f"{name} free {free:+f} frozen {held:+f}" for name, (free, held) in moved.items())
    expect(any(free < 0 < held for free, held in moved.values()), f"while an order rests: {seen or 'nothing is frozen'}")
    return seen


async def _balances(bench: Bench) -> dict[str, tuple[Decimal, Decimal]]:
    rows = listed(await bench.data("accounts", m.Empty()), "accounts")
    return {row["currency"]: (Decimal(str(row["free"])), Decimal(str(row["frozen"]))) for row in rows}


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
    for price, amount in EXACT:
        answered = await bench.failing(NOT_PASSED_ON, "trade", m.Trade(bench.symbol, "buy", price, amount))
        text = "\n".join(seen.text for seen in answered.sent)
        if not answered.sent and answered.code in ("bad_request", "venue_rejected"):
            said.append(f"{amount:f} at {price:f} refused")
            continue
        for number, what in ((amount, "amount"), (price, "price")):
            found = list(numbers(text))
            exponent = [one for one in found if "e" in one.lower() and Decimal(one) == number]
            expect(not exponent, f"{what} {number:f} was sent as {exponent[:1]}")
            exact = any(digits(one) == digits(f"{number:f}") for one in found)
            # Fewer digits at the end are a lot size; other digits are a float.
            cut = any(len(digits(one)) > 3 and digits(f"{number:f}").startswith(digits(one)) for one in found)
            expect(exact or cut, f"{what} {number:f} was sent as {_nearest(found, number)}")
        said.append(f"{amount:f} at {price:f}")
    return "sent " + ", ".join(said)


@check(
    "market-orders",
    expects="price -1 is a market order; a buy's amount is money in quote, a sell's in base; filled, it is closed and tells its price",
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
        if bench.settings.paper:
            await _filled(row, bench, None if side == "buy" else amount)
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


async def _filled(row: dict[str, Any], bench: Bench, asked: Decimal | None) -> None:
    """The paper exchange fills a market order whole, at once."""
    now = await bench.data("ticker", bench.market)
    expect(row["status"] == "closed", f"a filled order has status {row['status']}; expected closed")
    expect(row["deal_amount"] > 0, f"a filled order has deal_amount {row['deal_amount']}")
    near = now["low"] * Decimal("0.98") <= row["avg_price"] <= now["high"] * Decimal("1.02")
    expect(near, f"a filled order has avg_price {row['avg_price']}; the day's prices were {now['low']} to {now['high']}")
    expect(asked is None or row["amount"] == asked, f"a filled sell of {asked} has amount {row['amount']}; it is what was asked for")


def _amounts(row: dict[str, Any], order: m.Trade) -> None:
    """Of an order that rests."""
    for key in ("deal_amount", "avg_price"):
        expect(row[key] == 0, f"a resting order has {key} {row[key]}")
    for key, expected in (("amount", order.amount), ("price", order.price), ("type", order.side)):
        expect(row[key] == expected, f"{key} {row[key]}, and {expected} was ordered")


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _nearest(found: list[str], number: Decimal) -> str:
    """What was probably meant to be it."""
    return min(found, key=lambda one: abs(Decimal(one) - number), default="nothing")


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
