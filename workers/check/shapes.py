"""Checks of what reads answer: shapes, units, the order of rows, symbols."""

import re
import time
from decimal import Decimal
from itertools import pairwise
from typing import Any

from bus import messages as m
from workers.check.bench import MARKET, UNKNOWN, Bench, NotApplicable, check, expect, is_number, listed, wrong
from workers.check.proxy import NOT_PASSED_ON
from workers.check.wire import Seen

MS = (10**12, 10**14)
SECONDS = (10**9, 10**11)


@check(
    "base-url",
    expects="every request goes to settings.base_url, so that a test network, a proxy or this suite can stand in",
    where="__init__",
    section="how a venue is found (workers/venues/__init__.py)",
)
async def base_url(bench: Bench) -> str:
    answered = await bench.call("ticker", bench.market)
    expect(answered.sent, f"{answered}, but no request came to {bench.proxy.url}, which was settings.base_url")
    first = answered.sent[0]
    expect(first.status, first.answer.decode(errors="replace"))
    return f"{first.verb} {first.target[:80]}"


@check(
    "ticker",
    expects="time in ms; buy, sell, last, high, low above 0 and vol as JSON numbers; buy below sell",
    where="ticker",
    section="ticker",
)
async def ticker(bench: Bench) -> str:
    row = await bench.data("ticker", bench.market)
    expect(isinstance(row, dict), f"expected an object, got {row!r:.80}")
    _time(row.get("time"), "time", MS)
    for key in ("buy", "sell", "last", "high", "low", "vol"):
        _numeric(row.get(key), key, least=0 if key == "vol" else None)
    expect(row["buy"] < row["sell"], f"buy {row['buy']} is not below sell {row['sell']}: are bid and ask exchanged?")
    expect(row["low"] <= row["high"], f"low {row['low']} is above high {row['high']}")
    expect(row.get("symbol") in (None, bench.symbol), f"symbol {row.get('symbol')!r} is not the caller's {bench.symbol!r}")
    return f"buy {row['buy']}, sell {row['sell']}"


@check(
    "depth",
    expects="time in ms; asks ascending, bids descending, best first, each row two numbers above 0; not crossed",
    where="depth",
    section="depth",
)
async def depth(bench: Bench) -> str:
    book = await bench.data("depth", bench.market)
    expect(isinstance(book, dict), f"expected an object, got {book!r:.80}")
    _time(book.get("time"), "time", MS)
    prices: dict[str, list[Any]] = {}
    for side in ("asks", "bids"):
        rows = list(listed(book.get(side), side))
        for row in rows:
            expect(isinstance(row, list) and len(row) == 2, f"{side}: expected rows of two, got {row!r:.80}")
            _numeric(row[0], f"{side}: price")
            _numeric(row[1], f"{side}: amount")
        prices[side] = [row[0] for row in rows]
    asks, bids = prices["asks"], prices["bids"]
    expect(asks == sorted(asks), f"asks do not ascend: {_some(asks)}; the best ask comes first")
    expect(bids == sorted(bids, reverse=True), f"bids do not descend: {_some(bids)}; the best bid comes first")
    if asks and bids:
        expect(bids[0] < asks[0], f"the book is crossed: best bid {bids[0]}, best ask {asks[0]}")
    return f"{len(asks)} asks, {len(bids)} bids"


@check(
    "trades",
    expects="rows with id, time in ms, price, amount and type buy or sell; oldest first",
    where="trades",
    section="trades (the public tape)",
)
async def trades(bench: Bench) -> str:
    rows = list(listed(await bench.data("trades", bench.market), "trades"))
    for row in rows:
        expect(isinstance(row, dict) and isinstance(row.get("id"), int | str), f"expected an id in each row, got {row!r:.80}")
        _time(row.get("time"), "time", MS)
        _numeric(row.get("price"), "price")
        _numeric(row.get("amount"), "amount")
        expect(row.get("type") in ("buy", "sell"), f"type {row.get('type')!r}: expected buy or sell")
    times = [row["time"] for row in rows]
    expect(times == sorted(times), f"times do not ascend: {_some(times)}; the newest trade comes last")
    return f"{len(rows)} trades"


@check(
    "records",
    expects="rows [time, open, high, low, close, volume], time in SECONDS, UTC, at the start of the bar; of the period; oldest first, "
    "no time twice; limit kept; the last one is the current bar",
    where="records",
    section="records",
)
async def records(bench: Bench) -> str:
    seen: list[str] = []
    asked: list[tuple[list[str], list[int]]] = []
    for period_m, limit in ((1, None), (1440, 3), (5, 3)):
        answered = await bench.call("records", m.Records(bench.symbol, period_m, limit))
        expect(not answered.failed, str(answered))
        rows = list(listed(answered.data, "records"))
        for row in rows:
            expect(isinstance(row, list) and len(row) == 6, f"expected rows of six, got {row!r:.100}")
            _time(row[0], "time of a bar", SECONDS)
            for value, what in zip(row[1:5], ("open", "high", "low", "close"), strict=True):
                _numeric(value, what)
            _numeric(row[5], "volume", least=0)
            low, high = row[3], row[2]
            expect(low <= min(row[1], row[4]) and max(row[1], row[4]) <= high, f"open or close outside low and high: {row!r:.140}")
        times = [row[0] for row in rows]
        expect(times == sorted(times), f"times do not ascend: {_some(times)}; the current bar comes last")
        expect(len(set(times)) == len(times), f"a time comes twice: {_some(times)}")
        spans = {later - sooner for sooner, later in pairwise(times)}
        expect(limit is None or len(rows) <= limit, f"limit {limit}, and {len(rows)} rows")
        requests = [_steady(one) for one in answered.sent]
        deaf = bench.settings.play and not bench.settings.paper and any(sent != requests and same == times for sent, same in asked)
        asked.append((requests, times))
        if deaf:
            seen.append(f"this exchange answers {period_m} min as any period")
            continue
        expect(not any(span % (period_m * 60) for span in spans), f"bars of {period_m} minutes are {sorted(spans)[:3]} s apart")
        if times:
            await _current(bench, times[-1], period_m)
        opens = sum(abs(later[1] - sooner[4]) for sooner, later in pairwise(rows))
        closes = sum(abs(later[4] - sooner[1]) for sooner, later in pairwise(rows))
        expect(len(rows) < 20 or opens <= closes, "a bar opens far from where the one before closed: are open and close exchanged?")
        seen.append(f"{len(rows)} bars of {period_m} min")
    return ", ".join(seen)


async def _current(bench: Bench, newest: int, period_m: int) -> None:
    """That the newest bar is of now: by the clock or, of a stand-in whose time may stand still, by its ticker."""
    stand_in = bench.settings.play and not bench.settings.paper
    now = (await bench.data("ticker", bench.market))["time"] // 1000 if stand_in else int(time.time())
    ahead = newest - now
    expect(ahead <= 60, f"the newest bar of {period_m} minutes begins {ahead} s in the future: is its time UTC?")
    old = bench.settings.play and -ahead > 2 * 60 * period_m
    expect(not old, f"the newest bar of {period_m} minutes is {-ahead} s old: is its time UTC, and is it the newest?")


@check(
    "accounts",
    expects="a list of rows currency, free, frozen as JSON numbers; one row a currency",
    where="accounts",
    section="accounts",
)
async def accounts(bench: Bench) -> str:
    rows = list(listed(await bench.data("accounts", m.Empty()), "accounts"))
    names = []
    for row in rows:
        expect(isinstance(row, dict) and isinstance(row.get("currency"), str) and row["currency"], f"currency: got {row!r:.80}")
        for key in ("free", "frozen"):
            _numeric(row.get(key), f"{row['currency']}: {key}", least=0)
        names.append(row["currency"].upper())
    twice = {name for name in names if names.count(name) > 1}
    expect(not twice, f"{', '.join(sorted(twice))}: more than one row")
    return f"{len(rows)} currencies"


@check(
    "positions",
    expects="where contracts is true: rows Symbol, Type 0 or 1, Amount, FrozenAmount, Price, Profit, MarginLevel, Margin, ContractType",
    where="positions",
    section="io, code 3, and the position structure",
    trades=True,
)
async def positions(bench: Bench) -> str:
    if not bench.boundary.venue.contracts:
        raise NotApplicable("contracts is False")
    for function in ("positions", "margin_level"):
        expect(callable(getattr(bench.boundary.venue, function, None)), f"contracts is True, but there is no {function}()")
    symbol, opened, bought = f"{bench.symbol}.swap", False, None
    before = list(listed(await bench.data("positions", m.Positions()), "positions"))
    if bench.settings.play:
        bought = await bench.call("trade", m.Trade(symbol, "buy", MARKET, await bench.contracts()))
        opened = not bought.failed
    rows = list(listed(await bench.data("positions", m.Positions()), "positions"))
    for row in rows:
        expect(isinstance(row, dict) and row.get("Type") in (0, 1), f"Type: expected 0 long or 1 short, got {row!r:.100}")
        for key in ("Amount", "FrozenAmount", "Price", "Profit", "MarginLevel", "Margin"):
            expect(is_number(row.get(key)), f"{key}: expected a number, got {row.get(key)!r:.60}")
        expect(row["Amount"] > 0, f"Amount {row['Amount']}: positive for a short one too, and none of 0")
        for key in ("Symbol", "ContractType"):
            expect(isinstance(row.get(key), str) and row[key], f"{key}: expected text, got {row.get(key)!r:.60}")
    if opened:
        new = [row for row in rows if row not in before]
        expect(new, "a position was opened, and is not listed")
        await bench.call("trade", m.Trade(symbol, "closebuy", MARKET, Decimal(str(new[0]["Amount"]))))
    elif not rows:
        raise NotApplicable(f"there is no position, and none was opened: {bought if bought else 'made on an exchange for play only'}")
    return f"{len(rows)} positions"


# ---------------------------------------------------------------- symbols


@check(
    "symbols-any-case",
    expects="a pair is matched without regard to case: btc_usdt and BTC_USDT are one market",
    where="ticker",
    section="symbol forms",
)
async def any_case(bench: Bench) -> str:
    sent = {}
    for symbol in (bench.symbol.upper(), bench.symbol.lower()):
        answered = await bench.call("ticker", m.Market(symbol))
        expect(not answered.failed, f"{symbol}: {answered}")
        sent[symbol] = [_steady(seen) for seen in answered.sent]
    upper, lower = sent.values()
    expect(upper == lower, f"{bench.symbol.lower()} is asked for as {lower[-1:]}, {bench.symbol.upper()} as {upper[-1:]}")
    return f"both ask for {upper[-1].split()[1][:80] if upper else '?'}"


@check(
    "symbols-unknown",
    expects="a symbol that the exchange does not know is passed on or refused; never another market's price, and never an order there",
    where="ticker",
    section="symbol forms, pass-through",
)
async def unknown_symbol(bench: Bench) -> str:
    said, answers_any = "", False
    for method in (name for name in ("ticker", "depth", "trades", "records") if bench.has(name)):
        params = m.Records(UNKNOWN, 1) if method == "records" else m.Market(UNKNOWN)
        answered = await bench.call(method, params, during="an unknown symbol")
        if answered.failed:
            expect(answered.code in ("venue_rejected", "bad_request"), f"{answered}; a symbol that is not there is a refusal")
            said = said or answered.text
            continue
        passed = any(UNKNOWN[:6] in seen.text.upper() for seen in answered.sent)
        requests = [seen.target[:80] for seen in answered.sent]
        expect(passed, f"{method}: {UNKNOWN} was asked for as {requests} and answered with a price")
        if method == "ticker":
            prices: list[Any] = [answered.data.get(key) for key in ("buy", "sell", "last")] if isinstance(answered.data, dict) else []
            expect(prices and all(is_number(price) and price > 0 for price in prices), f"no error: {answered}")
        answers_any = True
    if bench.has("trade"):
        order = m.Trade(UNKNOWN, "buy", Decimal("0.3719"), Decimal("0.1723"))
        for seen in (await bench.failing(NOT_PASSED_ON, "trade", order)).sent:
            passed = not seen.carries(order.amount) or UNKNOWN[:6] in seen.text.upper()
            expect(passed, f"trade: an order of {UNKNOWN} was sent as {seen.text[:160]}")
    if answers_any:
        raise NotApplicable(f"this exchange answers {UNKNOWN} as any market")
    return said


def _steady(seen: Seen) -> str:
    """A request without what changes from call to call: times, nonces, signatures."""
    return re.sub(
        r"(?<!\w)(\d{9,}|(?=\w*\d)[0-9A-Fa-f]{16,})(?!\w)", "*", f"{seen.verb} {seen.target} {seen.body.decode(errors='replace')}"
    )


def _numeric(value: object, what: str, *, least: int | None = None) -> None:
    """Above 0, or at least `least`."""
    if not is_number(value):
        wrong(f"{what}: expected a JSON number, got {value!r:.60}")
    found = Decimal(str(value))
    if least is None:
        expect(found > 0, f"{what} is {value}; expected above 0")
    else:
        expect(found >= least, f"{what} is {value}; expected at least {least}")


def _time(value: object, what: str, span: tuple[int, int]) -> None:
    unit = "ms" if span is MS else "whole SECONDS"
    if not isinstance(value, int) or isinstance(value, bool):
        wrong(f"{what}: expected {unit} as a whole number, got {value!r:.60}")
    if not span[0] <= value < span[1]:
        looks = "ms" if MS[0] <= value < MS[1] else "seconds" if SECONDS[0] <= value < SECONDS[1] else "neither seconds nor ms"
        wrong(f"{what}: {value} is {looks}; expected {unit}")


def _some(values: list[Any]) -> str:
    """Where a list leaves its order, or its beginning."""
    text = ", ".join(map(str, values[:4]))
    return f"{text}, ..." if len(values) > 4 else text
