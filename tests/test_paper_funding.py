"""The mark price and funding of the swaps: pure, bounded, exchanged once an interval, and no money made or lost by it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paper import Client, Clock, exchange
from tests.test_paper_engine import balance, place, sound, ticket
from workers.venues.paper import funding
from workers.venues.paper import market as model
from workers.venues.paper.accounts import PositionKey
from workers.venues.paper.engine import Engine
from workers.venues.paper.fees import NO_FEES
from workers.venues.paper.markets import MARKETS, find
from workers.venues.paper.money import plain, units

SWAP = "BTC_USDT.swap"
MARKET = find(SWAP)
END_S = 1_795_190_400
"""2026-11-20 16:00 UTC, where an interval ends."""

swaps = st.sampled_from([symbol for symbol, market in MARKETS.items() if market.is_swap])


def opened(now_s: int, **options: Any) -> Engine:
    made = Engine(seed=7, **options)
    for account in (1, 2):
        made.accounts.open(account)
    for symbol in MARKETS:
        made.advance(symbol, now_s * 1000)
    return made


# The functions


def test_a_seed_gives_these_rates_and_marks_for_ever() -> None:
    first = END_S // funding.INTERVAL_S - 1
    assert [funding.rate(7, SWAP, first + n) for n in range(4)] == [3570, 8096, 12175, 15049]
    assert [funding.rate_text(rate) for rate in (3570, -2988, 0)] == ["0.0000357", "-0.00002988", "0"]
    spot = model.second(7, "BTC_USDT", END_S - 14_400).close
    assert funding.index(7, MARKET, END_S - 14_400) == (spot + 5) // 10
    assert funding.mark(7, MARKET, END_S - 14_400) == round(spot / 10 * (1 + 0.0000357 / 2))


@given(st.integers(0, 2**63), swaps, st.integers(0, 4_000_000_000))
@settings(max_examples=200, deadline=None)
def test_rates_are_bounded_and_the_mark_price_stays_by_the_spot_price(seed: int, symbol: str, second: int) -> None:
    assert -40_000 <= funding.rate(seed, symbol, second // funding.INTERVAL_S) <= 60_000
    index, mark = (price(seed, MARKETS[symbol], second) for price in (funding.index, funding.mark))
    assert abs(mark - index) <= index // funding.MOST_BASIS + 1
    last = model.second(seed, symbol, second).close
    assert last <= index <= last + 1


def test_the_mark_price_reaches_the_spot_price_as_the_interval_ends() -> None:
    assert funding.mark(7, MARKET, END_S - 1) == funding.index(7, MARKET, END_S - 1)
    assert funding.mark(7, MARKET, END_S) - funding.index(7, MARKET, END_S) == round(funding.index(7, MARKET, END_S) * 0.00008096)


def test_intervals_end_at_0_8_and_16_utc() -> None:
    day = END_S // 86_400 * 86_400
    ends, at = [], day
    for _ in range(3):
        at = funding.next_end(at)
        ends.append((at - day) // 3600)
    assert ends == [8, 16, 24]


def test_longs_pay_shorts_at_a_rate_above_zero_and_the_other_way_round() -> None:
    assert [funding.due(side, 10**8, rate) for rate in (3, -3, 0) for side in ("long", "short")] == [-3, 3, 3, -3, 0, 0]
    assert [funding.due(side, 10**8 - 1, 3) for side in ("long", "short")] == [-2, 2], "rounded towards zero"


# The exchange


def test_funding_is_paid_by_the_long_and_received_by_the_short() -> None:
    engine = opened(END_S - 10, rates=NO_FEES)
    place(engine, 1, ticket(SWAP, "buy", lots=100), (END_S - 10) * 1000)
    place(engine, 2, ticket(SWAP, "sell", lots=40), (END_S - 10) * 1000)
    before = [units(balance(engine, account, "USDT")[0]) for account in (1, 2)]
    engine.drain()
    engine.advance(SWAP, (END_S - 1) * 1000)
    assert not engine.drain().payments
    engine.advance(SWAP, END_S * 1000)
    price = units(MARKET.price_text(funding.index(7, MARKET, END_S)))
    long, short = price * 100 // 1000 * 3570 // 10**8, price * 40 // 1000 * 3570 // 10**8
    assert [units(balance(engine, account, "USDT")[0]) for account in (1, 2)] == [before[0] - long, before[1] + short]
    payments = [payment.document() for payment in engine.drain().payments]
    shown = {"symbol": SWAP, "time": END_S * 1000, "rate": "0.0000357", "price": plain(price), "currency": "USDT"}
    assert payments == [
        shown | {"side": "long", "amount": "0.1", "payment": plain(-long)},
        shown | {"side": "short", "amount": "0.04", "payment": plain(short)},
    ]
    engine.advance(SWAP, END_S * 1000 + 999)
    engine.advance(SWAP, (END_S + 28_799) * 1000)
    assert not engine.drain().payments
    sound(engine)


def test_who_is_in_at_the_end_of_the_interval_pays_and_who_comes_with_it_does_not() -> None:
    engine = opened(END_S - 1)
    place(engine, 1, ticket(SWAP, "buy", lots=10), END_S * 1000 - 1)
    place(engine, 2, ticket(SWAP, "buy", lots=10), END_S * 1000)
    assert [payment.account for payment in engine.drain().payments] == [1]


def test_funding_takes_the_margin_when_nothing_is_free_and_no_more_than_there_is() -> None:
    engine = opened(END_S - 1, rates=NO_FEES)
    order = place(engine, 1, ticket(SWAP, "buy", lots=100), (END_S - 1) * 1000)
    (position,) = engine.accounts.positions.values()
    usdt, market = engine.accounts.balances[1]["USDT"], engine.accounts.balances[0]["USDT"]
    market.free += usdt.free - 1_000
    usdt.free = 1_000
    engine.accounts.fund(position, rate=10_000, price=500_000, time_ms=0)
    assert (usdt.free, position.margin, usdt.frozen) == (0, order.spent // 10 - units("0.5") + 1_000, position.margin)
    sound(engine)
    engine.accounts.fund(position, rate=funding.SCALE, price=500_000, time_ms=0)
    assert (usdt.free, position.margin, usdt.frozen) == (0, 0, 0)
    assert [payment.value for payment in engine.drain().payments] == [-units("0.5"), -(order.spent // 10 - units("0.5") + 1_000)]
    sound(engine)


def test_a_stop_of_days_settles_each_interval_once_and_liquidates_where_it_would_have() -> None:
    """The same from second to second, where every second is looked at, and at one go."""
    start = END_S - 30_000
    engines = opened(start), opened(start)
    for engine in engines:
        for account, leverage in ((1, 2), (2, 100)):
            engine.accounts.set_leverage(account, SWAP, leverage)
            place(engine, account, ticket(SWAP, "buy", lots=100), start * 1000)
            place(engine, account, ticket(SWAP, "sell", lots=30), start * 1000)
        place(engine, 1, ticket(SWAP, "sell", price=engine.last(SWAP) + 500, lots=400), start * 1000)
    for second in range(start + 1, END_S + 40_000):
        engines[0].advance(SWAP, second * 1000)
    engines[1].advance(SWAP, (END_S + 39_999) * 1000)
    step, leap = (engine.drain() for engine in engines)
    assert [payment.time_ms for payment in leap.payments if (payment.account, payment.side) == (1, "long")] == [
        (END_S + n * 28_800) * 1000 for n in (-1, 0, 1)
    ]
    assert PositionKey(2, SWAP, "long") not in engines[0].accounts.positions
    assert (leap.payments, leap.fills) == (step.payments, step.fills)
    assert engines[1].accounts.balances == engines[0].accounts.balances
    assert engines[1].accounts.positions == engines[0].accounts.positions
    sound(engines[1])


def test_liquidation_goes_by_the_mark_price_and_not_by_the_last() -> None:
    engine = opened(END_S)
    engine.accounts.set_leverage(1, SWAP, 100)
    place(engine, 1, ticket(SWAP, "sell", lots=100), END_S * 1000)
    (position,) = engine.accounts.positions.values()
    # A margin that the mark price, above the last price in this second, uses up, and the last price would not.
    position.margin, spare = position.profit(engine.last(SWAP)) * -1 + MARKET.notional(20, 100), position.margin
    engine.accounts.balances[1]["USDT"].frozen -= spare - position.margin
    assert engine.mark(SWAP) - engine.last(SWAP) == 42
    assert position.margin + position.profit(engine.last(SWAP)) > 0
    engine.books[SWAP].second -= 1
    engine.advance(SWAP, END_S * 1000)
    (order,) = [order for order in engine.drain().orders.values() if order.leverage == 1]
    assert (order.side, order.offset, order.document()["average_price"]) == ("buy", "close", MARKET.price_text(engine.mark(SWAP)))


# Over HTTP


@pytest.fixture
def clock() -> Clock:
    return Clock(END_S - 100)


async def test_mark_price_and_funding_are_public(client: Client) -> None:
    now_s = END_S - 100
    assert await client.get(f"/api/v1/mark?symbol={SWAP}", signed=False) == {
        "symbol": SWAP,
        "time": now_s * 1000,
        "mark_price": MARKET.price_text(funding.mark(7, MARKET, now_s)),
        "index_price": MARKET.price_text(funding.index(7, MARKET, now_s)),
    }
    assert await client.get(f"/api/v1/funding?symbol={SWAP}&limit=2", signed=False) == {
        "symbol": SWAP,
        "time": now_s * 1000,
        "rate": "0.0000357",
        "next_time": END_S * 1000,
        "history": [{"time": (END_S - 57_600) * 1000, "rate": "-0.00002988"}, {"time": (END_S - 28_800) * 1000, "rate": "-0.00000771"}],
    }
    for path in ("mark", "funding"):
        assert await client("GET", f"/api/v1/{path}?symbol=BTC_USDT", signed=False) == (
            400,
            {"code": 2002, "message": "symbol: BTC_USDT is no swap; the nearest is BTC_USDT.swap"},
        )


async def test_payments_are_listed_once_each_whatever_stops_in_between(tmp_path: Path, clock: Clock) -> None:
    path = "/api/v1/funding/payments"
    async with exchange(tmp_path, clock) as client:
        await client.order(SWAP, "buy", type="market", amount="0.5")
        await client.order("ETH_USDT.swap", "sell", type="market", amount="3")
        assert await client.get(path) == []
        clock.now_s = END_S
        now = await client.get(path)
        assert [(row["symbol"], row["side"], row["time"]) for row in now] == [
            (SWAP, "long", END_S * 1000),
            ("ETH_USDT.swap", "short", END_S * 1000),
        ]
        assert now[0]["rate"] == "0.0000357"
    clock.now_s = END_S + 3 * 28_800
    async with exchange(tmp_path, clock) as client:
        later = await client.get(path)
        assert later[:2] == now
        assert [row["time"] for row in later] == [(END_S + n * 28_800) * 1000 for n in range(4) for _ in range(2)]
        assert [row["rate"] for row in await client.get(f"{path}?symbol={SWAP}&limit=3")] == ["0.00008096", "0.00012175", "0.00015049"]
        money = await client.get("/api/v1/account")
    async with exchange(tmp_path, clock) as client:
        assert await client.get(path) == later
        assert await client.get("/api/v1/account") == money
        assert await client.other("key-2", "s").get(path) == []
