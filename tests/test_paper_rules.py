"""Fees, self-trade and partial fills: each rule of the README with the values it gives."""

from pathlib import Path
from typing import Any

import pytest

from tests.paper import README, Clock, exchange
from tests.test_paper_engine import NOW_MS, balance, place, sound, ticket
from workers.venues.paper import market as model
from workers.venues.paper.accounts import FEE_ACCOUNT, PositionKey
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.fees import NO_FEES, STANDARD, fee
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.money import plain, units
from workers.venues.paper.orders import Fill, Order

SWAP = "BTC_USDT.swap"
NOW_S = NOW_MS // 1000

# In the second NOW_S, LTC_BTC is bid at 15143 ticks and offered at 15145; ETH_BTC at 40304 and 40305.


@pytest.fixture
def engine() -> Engine:
    return opened()


def opened(accounts: int = 3, **options: Any) -> Engine:
    made = Engine(seed=7, **options)
    for account in range(1, accounts + 1):
        made.accounts.open(account)
    for symbol in MARKETS:
        made.advance(symbol, NOW_MS)
    made.drain()
    return made


def shown(fills: list[Fill]) -> list[tuple[object, ...]]:
    return [tuple(fill.document()[name] for name in ("order_id", "role", "amount", "price", "fee", "fee_currency")) for fill in fills]


# Fees


def test_a_spot_buy_pays_its_fee_in_what_it_receives_and_a_sell_in_quote(engine: Engine) -> None:
    place(engine, 1, ticket("LTC_BTC", "sell", price=15144, lots=10_000))
    place(engine, 2, ticket("LTC_BTC", "buy", price=15144, lots=4_000))
    assert shown(engine.drain().fills) == [
        ("2", "taker", "4", "0.0015144", "0.004", "LTC"),
        ("1", "maker", "4", "0.0015144", "0.00000484608", "BTC"),
    ]
    assert (balance(engine, 2, "LTC"), balance(engine, 2, "BTC")) == (("100003.996", "0"), ("9999.9939424", "0"))
    assert (balance(engine, 1, "LTC"), balance(engine, 1, "BTC")) == (("99990", "6"), ("10000.00605275392", "0"))
    assert (balance(engine, FEE_ACCOUNT, "LTC"), balance(engine, FEE_ACCOUNT, "BTC")) == (("0.004", "0"), ("0.00000484608", "0"))
    sound(engine)


def test_an_order_shows_amounts_and_prices_before_fees(engine: Engine) -> None:
    document = place(engine, 2, ticket("LTC_BTC", "buy", price=15145, lots=40)).document()
    assert (document["filled"], document["average_price"], document["status"]) == ("0.04", "0.0015145", "closed")
    assert balance(engine, 2, "LTC")[0] == "100000.03996"


def test_a_buy_for_money_spends_no_more_than_asked(engine: Engine) -> None:
    order = place(engine, 1, ticket("ETH_BTC", "buy", money=units("0.05")))
    assert (order.status, order.filled, plain(order.spent)) == ("closed", 12_404, "0.0499981476")
    assert balance(engine, 1, "BTC")[0] == "9999.9500018524"
    assert balance(engine, 1, "ETH")[0] == "100001.2391596"


def test_a_fee_is_rounded_down_and_what_it_is_goes_to_the_exchange(engine: Engine) -> None:
    assert [fee(value, 800) for value in (1, 1_249, 1_250, 2_500)] == [0, 0, 1, 2]
    place(engine, 1, ticket("LTC_BTC", "sell", price=15144, lots=7))
    place(engine, 2, ticket("LTC_BTC", "buy", price=15144, lots=7))
    # 0.007 LTC are worth 0.0000106008 BTC, of which 0.08 % are 0.00000000848064.
    assert balance(engine, 1, "BTC")[0] == plain(units("10000") + 10_600_800 - 8_480)
    sound(engine)


def test_a_swap_pays_its_fees_in_quote_from_what_is_free(engine: Engine) -> None:
    order = place(engine, 1, ticket(SWAP, "buy", lots=100))
    assert (order.filled, order.spent) == (100, units("5299.06"))
    assert balance(engine, 1, "USDT") == ("999467.44447", "529.906")
    assert shown(engine.drain().fills) == [("1", "taker", "0.1", "52990.6", "2.64953", "USDT")]
    close = place(engine, 1, ticket(SWAP, "sell", lots=100, offset="close"))
    assert close.spent == units("5299.03")
    assert balance(engine, 1, "USDT") == (plain(units("1000000") - units("0.03") - units("2.64953") - units("2.649515")), "0")
    sound(engine)


def test_a_resting_swap_order_freezes_its_margin_and_its_makers_fee(engine: Engine) -> None:
    order = place(engine, 1, ticket(SWAP, "buy", price=529_904, lots=100))
    assert balance(engine, 1, "USDT") == ("999469.036192", "530.963808")
    place(engine, 2, ticket(SWAP, "sell", price=529_904, lots=40))
    assert engine.drain().fills[-1].fee == units("0.4239232")
    assert balance(engine, 1, "USDT") == ("999469.036192", "530.5398848")
    engine.cancel(order, NOW_MS)
    assert balance(engine, 1, "USDT") == (plain(units("1000000") - units("211.9616") - units("0.4239232")), "211.9616")


def test_a_close_costs_no_more_than_it_gives_back(engine: Engine) -> None:
    engine.accounts.set_leverage(1, SWAP, 100)
    place(engine, 1, ticket(SWAP, "buy", lots=100))
    before = engine.accounts.free(1, "USDT")
    fields: dict[str, Any] = {
        "kind": "market",
        "offset": "close",
        "price": 0,
        "quote_amount": 0,
        "leverage": 1,
        "time_ms": 0,
        "update_ms": 0,
    }
    close = Order(number=99, account=1, client_order_id=None, symbol=SWAP, side="sell", lots=100, **fields)
    # 52.9 of the margin of 52.9906 are lost: 0.0906 are left, the fee would be 2.62.
    assert engine.accounts.fill(close, 524_616, 100, rate=500, resting=False) == units("0.0906")
    assert engine.accounts.free(1, "USDT") == before
    sound(engine)


def test_margin_and_fee_must_both_be_free(engine: Engine) -> None:
    free = engine.accounts.free(1, "USDT")
    engine.accounts.balances[1]["USDT"].free -= free - units("532.555529")
    with pytest.raises(Refused, match=r"amount: insufficient balance, 532\.55553 USDT needed, 532\.555529 free"):
        place(engine, 1, ticket(SWAP, "buy", lots=100))
    engine.accounts.balances[1]["USDT"].free += 1_000_000
    assert place(engine, 1, ticket(SWAP, "buy", lots=100)).status == "closed"
    assert balance(engine, 1, "USDT") == ("0", "529.906")


def test_an_order_pays_the_makers_rate_of_when_it_was_placed() -> None:
    before = opened(rates=NO_FEES)
    resting = place(before, 1, ticket(SWAP, "buy", price=529_904, lots=100))
    later = Engine(seed=7)
    later.accounts = before.accounts
    later.restore([resting], {SWAP: NOW_S})
    later.place(2, ticket(SWAP, "sell", price=529_904, lots=100), NOW_MS)
    assert [fill.fee for fill in later.drain().fills if fill.account == 1] == [0]
    assert balance(later, 1, "USDT") == ("999470.096", "529.904")


def test_the_readme_has_the_rates() -> None:
    for kind, rates in STANDARD.items():
        listed = rates.listing()
        assert f"| {kind} | {listed['maker_fee']} | {listed['taker_fee']} |" in README.read_text()


# Self-trade


def test_an_own_order_in_the_way_is_cancelled_and_the_rest_goes_on(engine: Engine) -> None:
    own = place(engine, 1, ticket("LTC_BTC", "sell", price=15144, lots=10))
    other = place(engine, 2, ticket("LTC_BTC", "sell", price=15144, lots=10))
    behind = place(engine, 1, ticket("LTC_BTC", "sell", price=15145, lots=10))
    taker = place(engine, 1, ticket("LTC_BTC", "buy", price=15145, lots=10))
    assert [(order.status, order.filled) for order in (own, other, behind, taker)] == [
        ("cancelled", 0),
        ("closed", 10),
        ("open", 0),
        ("closed", 10),
    ]
    assert balance(engine, 1, "LTC")[1] == "0.01"
    assert {fill.account: fill.order for fill in engine.drain().fills} == {1: taker.number, 2: other.number}
    sound(engine)


def test_an_own_order_that_is_partly_filled_keeps_its_fills_when_it_makes_way(engine: Engine) -> None:
    own = place(engine, 1, ticket("LTC_BTC", "buy", price=15144, lots=100))
    place(engine, 2, ticket("LTC_BTC", "sell", price=15144, lots=30))
    taker = place(engine, 1, ticket("LTC_BTC", "sell", price=15144, lots=50))
    assert [(order.status, order.filled) for order in (own, taker)] == [("cancelled", 30), ("open", 0)]
    assert balance(engine, 1, "BTC") == ("9999.999954568", "0")
    assert balance(engine, 1, "LTC") == ("99999.979976", "0.05")


def test_a_refused_order_cancels_nothing(engine: Engine) -> None:
    own = place(engine, 1, ticket("LTC_BTC", "sell", price=15144, lots=10))
    with pytest.raises(Refused) as refused:
        place(engine, 1, ticket("LTC_BTC", "buy", price=10**9, lots=10**8))
    assert (refused.value.code, own.status) == (Code.INSUFFICIENT_BALANCE, "open")


def test_the_sides_of_a_swap_make_way_too_and_their_margin_comes_back(engine: Engine) -> None:
    place(engine, 1, ticket(SWAP, "buy", lots=10))
    close = place(engine, 1, ticket(SWAP, "sell", price=529_905, lots=10, offset="close"))
    short = place(engine, 1, ticket(SWAP, "sell", price=529_905, lots=10))
    frozen = units(balance(engine, 1, "USDT")[1])
    taker = place(engine, 1, ticket(SWAP, "buy", price=529_905, lots=20))
    assert [order.status for order in (close, short, taker)] == ["cancelled", "cancelled", "open"]
    assert units(balance(engine, 1, "USDT")[1]) == frozen - short.held(10) + taker.held(20)
    assert engine.accounts.positions[PositionKey(1, SWAP, "long")].frozen == 0
    sound(engine)


# Partial fills


def supply(symbol: str, price: int, second: int) -> int:
    """What a resting sell order can get in a second: trades above its price, and bids at its price or above."""
    through = sum(trade.lots for trade in model.prints(7, symbol, second) if trade.price > price)
    return through + sum(lots for bid, lots in model.depth(7, symbol, second).bids if bid >= price)


def expected(symbol: str, price: int, lots: int, seconds: int) -> list[tuple[int, int]]:
    """(second, lots) of a lone sell order's fills."""
    parts = []
    for second in range(NOW_S + 1, NOW_S + 1 + seconds):
        part = min(lots, supply(symbol, price, second))
        lots -= part
        if part:
            parts.append((second, part))
    return parts


def test_a_large_order_is_filled_second_by_second_as_far_as_the_market_trades(engine: Engine) -> None:
    order = place(engine, 1, ticket("SOL_USDT", "sell", price=139_630, lots=5_000_000))
    parts, seen = expected("SOL_USDT", 139_630, 5_000_000, 60), []
    assert 10 < len(parts) < 60, "a market that trades at that price in some seconds and not in others"
    for second in range(NOW_S + 1, NOW_S + 61):
        before = order.filled
        engine.advance("SOL_USDT", second * 1000)
        sound(engine)
        if order.filled > before:
            seen.append((second, order.filled - before))
    assert seen == parts
    document = order.document()
    assert (document["status"], document["average_price"]) == ("open", "139.63")
    assert document["filled"] == plain(sum(lots for _, lots in parts) * 10**9)
    fills = engine.drain().fills
    assert [(fill.time_ms // 1000, fill.lots, fill.price, fill.role) for fill in fills] == [(*part, 139_630, "maker") for part in parts]
    engine.cancel(order, NOW_MS + 60_000)
    assert balance(engine, 1, "SOL") == (plain(units("100000") - order.filled * 10**9), "0")
    brought = order.spent - sum(fee(fill.price * fill.lots * 10**6, 800) for fill in fills)
    assert balance(engine, 1, "USDT") == (plain(units("1000000") + brought), "0")


def test_a_stop_changes_nothing_about_the_fills_of_the_meantime() -> None:
    engines = opened(), opened()
    orders = [
        [
            place(engine, account, ticket("SOL_USDT", side, price=price, lots=300_000))
            for account, side, price in ((1, "sell", 139_640), (2, "sell", 139_636), (3, "buy", 139_610))
        ]
        for engine in engines
    ]
    for second in range(NOW_S + 1, NOW_S + 901):
        engines[0].advance("SOL_USDT", second * 1000)
    engines[1].advance("SOL_USDT", (NOW_S + 900) * 1000)
    fills = [engine.drain().fills for engine in engines]
    assert len(fills[0]) > 10
    assert fills[0] == fills[1]
    assert [order.document() for order in orders[0]] == [order.document() for order in orders[1]]


async def test_over_restarts_each_second_serves_an_order_once(tmp_path: Path) -> None:
    clock = Clock(NOW_S)
    async with exchange(tmp_path, clock) as client:
        await client.order("SOL_USDT", "sell", type="limit", price="139.63", amount="5000")
        clock.now_s += 30
        half = await client.get("/api/v1/fills")
    async with exchange(tmp_path, clock) as client:
        assert await client.get("/api/v1/fills") == half
    clock.now_s += 20
    async with exchange(tmp_path, clock) as client:
        clock.now_s += 10
        fills = await client.get("/api/v1/fills")
    parts = expected("SOL_USDT", 139_630, 5_000_000, 60)
    assert [(fill["time"], fill["amount"]) for fill in fills] == [(second * 1000, plain(lots * 10**9)) for second, lots in parts]
    assert half == fills[: len(half)]


def test_users_are_served_by_price_then_by_time(engine: Engine) -> None:
    lots = 100_000
    prices = (139_634, 139_630, 139_634, 139_630)
    orders = [place(engine, 1 + n % 3, ticket("SOL_USDT", "sell", price=price, lots=lots)) for n, price in enumerate(prices)]
    for second in range(NOW_S + 1, NOW_S + 900):
        engine.advance("SOL_USDT", second * 1000)
        assert all(order.filled == 0 for order in orders[3:] if orders[1].remaining)
        assert all(
            order.filled == 0 for order in (orders[0], orders[2]) if orders[3].remaining and supply("SOL_USDT", 139_634, second) == 0
        )
        assert orders[2].filled == 0 or orders[0].remaining == 0
    assert [order.status for order in orders] == ["closed"] * 4
    fills = [fill.order for fill in engine.drain().fills]
    assert sorted(set(fills), key=fills.index) == [orders[n].number for n in (1, 3, 0, 2)]


def test_after_a_restart_within_the_second_nobody_faces_what_was_taken(engine: Engine) -> None:
    order = place(engine, 1, ticket("LTC_BTC", "buy", price=15_150, lots=5_000))
    assert (order.status, engine.books["LTC_BTC"].best("sell", engine.depth("LTC_BTC")) > 15_150) == ("open", True)
    later = Engine(seed=7)
    later.accounts = engine.accounts
    later.restore([order], engine.drain().seconds)
    later.advance("LTC_BTC", NOW_MS + 900)
    assert order.status == "open"
    assert later.books["LTC_BTC"].best("sell", later.depth("LTC_BTC")) > 15_150
    filled = order.filled
    later.advance("LTC_BTC", NOW_MS + 1_000)
    assert order.filled > filled


# Positions


def test_a_position_shows_the_leverage_its_margin_comes_from(engine: Engine) -> None:
    key = PositionKey(1, SWAP, "long")
    place(engine, 1, ticket(SWAP, "buy", lots=10))
    engine.accounts.set_leverage(1, SWAP, 50)
    assert engine.accounts.positions[key].document(529_904)["leverage"] == 10
    place(engine, 1, ticket(SWAP, "buy", lots=10))
    assert engine.accounts.positions[key].document(529_904)["leverage"] == 50
