"""Accounts and orders without HTTP: money is conserved whatever happens, and every refusal changes nothing."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.venues.paper import funding
from workers.venues.paper import market as model
from workers.venues.paper.accounts import MARKET_ACCOUNT, PositionKey
from workers.venues.paper.engine import MOST_OPEN_ORDERS, Engine, Ticket
from workers.venues.paper.errors import Code, Refused
from workers.venues.paper.fees import NO_FEES
from workers.venues.paper.markets import MARKETS, PLAY_MONEY, find
from workers.venues.paper.money import UNIT, plain, units
from workers.venues.paper.orders import Order

pytestmark = pytest.mark.slow

NOW_MS = 1_795_168_693_000


def ticket(
    symbol: str, side: str, price: int = 0, lots: int = 0, *, money: int = 0, offset: str | None = None, cid: str | None = None
) -> Ticket:
    market = find(symbol)
    offset = (offset or "open") if market.is_swap else None
    kind = "limit" if price else "market"
    return Ticket(market=market, side=side, kind=kind, offset=offset, price=price, lots=lots, quote_amount=money, client_order_id=cid)


def place(engine: Engine, account: int, order: Ticket, now_ms: int = NOW_MS) -> Order:
    engine.advance(order.market.symbol, now_ms)
    return engine.place(account, order, now_ms)


def balance(engine: Engine, account: int, currency: str) -> tuple[str, str]:
    held = engine.accounts.balances[account][currency]
    return plain(held.free), plain(held.frozen)


@pytest.fixture
def engine() -> Engine:
    made = Engine(seed=7, rates=NO_FEES)
    for account in (1, 2):
        made.accounts.open(account)
    for symbol in MARKETS:
        made.advance(symbol, NOW_MS)
    return made


def sound(engine: Engine) -> None:
    """What holds at every moment."""
    accounts = engine.accounts
    for currency in PLAY_MONEY:
        held = [b[currency] for number, b in accounts.balances.items() if currency in b]
        assert sum(b.free + b.frozen for b in held) == 0
    for number, balances in accounts.balances.items():
        if number != MARKET_ACCOUNT:
            assert all(b.free >= 0 and b.frozen >= 0 for b in balances.values()), (number, balances)
    for account, balances in accounts.balances.items():
        if account == MARKET_ACCOUNT:
            continue
        expected = dict.fromkeys(balances, 0)
        for order in engine.open_orders.get(account, {}).values():
            expected[order.held_currency] += order.held(order.remaining)
        for key, position in accounts.positions.items():
            if key.account == account:
                expected["USDT"] += position.margin
        assert expected == {currency: b.frozen for currency, b in balances.items()}
    for key, position in accounts.positions.items():
        closing = [o for o in engine.open_orders.get(key.account, {}).values() if o.offset == "close" and o.symbol == key.symbol]
        assert position.frozen == sum(o.remaining for o in closing if o.position_side == key.side) <= position.lots
        assert position.lots > 0
        assert position.margin >= 0
    for symbol, book in engine.books.items():
        depth = engine.depth(symbol)
        assert book.best("buy", depth) < book.best("sell", depth)


steps = st.lists(
    st.fixed_dictionaries(
        {
            "account": st.sampled_from([1, 2]),
            "symbol": st.sampled_from(["BTC_USDT", "ETH_BTC", "BTC_USDT.swap"]),
            "side": st.sampled_from(["buy", "sell"]),
            "what": st.sampled_from(["limit", "limit", "limit", "market", "money", "cancel", "wait", "leverage"]),
            "offset": st.sampled_from(["open", "open", "close"]),
            "away": st.integers(-30_000, 30_000),
            "lots": st.integers(1, 400_000),
            "seconds": st.integers(1, 100_000),
        }
    ),
    max_size=40,
)


@given(steps, st.sampled_from([1000, 250]))
@settings(max_examples=120, deadline=None)
def test_money_is_conserved_and_nothing_is_negative(engine_steps: list[dict[str, Any]], step_ms: int) -> None:
    engine, now_ms = Engine(seed=7, step_ms=step_ms), NOW_MS
    engine.accounts.open(1)
    engine.accounts.open(2)
    for symbol in MARKETS:
        engine.advance(symbol, now_ms)
    for step in engine_steps:
        before = copy.deepcopy(engine.accounts.balances)
        try:
            now_ms = apply(engine, step, now_ms)
        except Refused:
            assert engine.accounts.balances == before
        sound(engine)


def apply(engine: Engine, step: dict[str, Any], now_ms: int) -> int:
    account, symbol, side = step["account"], step["symbol"], step["side"]
    mine = list(engine.open_orders.get(account, {}).values())
    if step["what"] == "wait":
        # Long waits, and short ones within the second.
        now_ms += step["seconds"] * 1000 if step["away"] % 2 else step["lots"] % 1000
        for each in MARKETS:
            engine.advance(each, now_ms)
    elif step["what"] == "cancel" and mine:
        engine.cancel(mine[step["lots"] % len(mine)], now_ms)
    elif step["what"] == "leverage":
        engine.accounts.set_leverage(account, "BTC_USDT.swap", 1 + step["lots"] % 101)
    else:
        market = find(symbol)
        lots = min(step["lots"], market.max_amount // market.lot)
        price = max(1, engine.last(symbol) * (1_000_000 + step["away"]) // 1_000_000) if step["what"] == "limit" else 0
        money = lots * UNIT if step["what"] == "money" and symbol != "BTC_USDT.swap" and side == "buy" else 0
        engine.place(account, ticket(symbol, side, price, 0 if money else lots, money=money, offset=step["offset"]), now_ms)
    return now_ms


def test_a_limit_buy_far_above_the_market_pays_the_markets_prices(engine: Engine) -> None:
    order = place(engine, 1, ticket("ETH_BTC", "buy", price=1000 * 10**6, lots=10_000))
    assert (order.status, order.filled) == ("closed", 10_000)
    assert order.spent < units("0.0404")
    assert balance(engine, 1, "BTC") == (plain(units("10000") - order.spent), "0")
    assert balance(engine, 1, "ETH") == ("100001", "0")


def test_a_limit_sell_far_above_the_market_rests_and_freezes(engine: Engine) -> None:
    order = place(engine, 1, ticket("ETH_BTC", "sell", price=1000 * 10**6, lots=10_000))
    assert order.status == "open"
    assert balance(engine, 1, "ETH") == ("99999", "1")
    engine.cancel(order, NOW_MS)
    assert balance(engine, 1, "ETH") == ("100000", "0")
    assert order.document()["status"] == "cancelled"


def test_users_trade_with_each_other_at_the_price_of_the_one_who_waited(engine: Engine) -> None:
    bid = engine.depth("BTC_USDT").bids[0][0]
    ask = engine.depth("BTC_USDT").asks[0][0]
    assert ask - bid >= 2, "this second has room inside its spread"
    maker = place(engine, 1, ticket("BTC_USDT", "sell", price=bid + 1, lots=1_000_000))
    taker = place(engine, 2, ticket("BTC_USDT", "buy", price=ask, lots=400_000))
    assert (taker.status, taker.spent, maker.filled) == ("closed", (bid + 1) * 400_000 * 10**4, 400_000)
    assert balance(engine, 1, "BTC") == ("9999", "0.6")
    fills = engine.drain().fills
    assert [(f.account, f.role, f.side, f.price, f.lots) for f in fills] == [
        (2, "taker", "buy", bid + 1, 400_000),
        (1, "maker", "sell", bid + 1, 400_000),
    ]
    assert engine.tapes["BTC_USDT"][-1].side == "buy"


def test_money_is_spent_as_far_as_whole_lots_go(engine: Engine) -> None:
    order = place(engine, 1, ticket("BTC_USDT", "buy", money=units("100")))
    assert order.status == "closed"
    assert units("99.9") < order.spent <= units("100")
    assert balance(engine, 1, "USDT") == (plain(units("1000000") - order.spent), "0")


def test_a_market_order_that_finds_too_little_is_cancelled_with_what_it_got(engine: Engine) -> None:
    order = place(engine, 1, ticket("BTC_USDT", "sell", lots=1_000 * 10**6))
    there = sum(lots for _, lots in engine.depth("BTC_USDT").bids)
    assert (order.status, order.filled) == ("cancelled", there)
    assert engine.books["BTC_USDT"].visible("buy", engine.depth("BTC_USDT"), 5) == []


def test_a_resting_order_fills_at_its_price_once_the_market_has_passed_it(engine: Engine) -> None:
    price = engine.last("BTC_USDT") * 999 // 1000
    order = place(engine, 1, ticket("BTC_USDT", "buy", price=price, lots=1_000))
    assert order.status == "open"
    second = NOW_MS // 1000
    while model.second(7, "BTC_USDT", second).low >= price:
        second += 1
    engine.advance("BTC_USDT", (second - 1) * 1000)
    assert order.status == "open"
    engine.advance("BTC_USDT", second * 1000)
    assert (order.status, order.spent, order.update_ms) == ("closed", price * 10**7, second * 1000)


def test_an_order_restored_after_a_stop_meets_the_market_of_the_meantime(engine: Engine) -> None:
    price = engine.last("BTC_USDT") * 999 // 1000
    order = place(engine, 1, ticket("BTC_USDT", "buy", price=price, lots=1_000_000))
    later = Engine(seed=7)
    later.accounts = engine.accounts
    later.restore([order], {"BTC_USDT": NOW_MS // 1000})
    later.advance("BTC_USDT", NOW_MS + 20 * 86_400_000)
    assert order.status == ("closed" if model.span(7, "BTC_USDT", NOW_MS // 1000 + 1, NOW_MS // 1000 + 20 * 86_400).low < price else "open")
    assert order.status == "closed"


def test_a_swap_is_opened_hedged_and_closed_with_its_profit(engine: Engine) -> None:
    long = place(engine, 1, ticket("BTC_USDT.swap", "buy", lots=100))
    short = place(engine, 1, ticket("BTC_USDT.swap", "sell", lots=50))
    margins = long.spent // 10 + short.spent // 10
    assert balance(engine, 1, "USDT") == (plain(units("1000000") - margins), plain(margins))
    closing = place(engine, 1, ticket("BTC_USDT.swap", "sell", lots=40, offset="close"), NOW_MS + 60_000)
    position = engine.accounts.positions[PositionKey(1, "BTC_USDT.swap", "long")]
    assert position.lots == 60
    assert position.cost == long.spent - long.spent * 40 // 100
    profit = closing.spent - long.spent * 40 // 100
    free, frozen = (units(text) for text in balance(engine, 1, "USDT"))
    assert free + frozen == units("1000000") + profit
    place(engine, 1, ticket("BTC_USDT.swap", "buy", lots=50, offset="close"), NOW_MS + 61_000)
    assert PositionKey(1, "BTC_USDT.swap", "short") not in engine.accounts.positions


def test_no_more_can_be_closed_than_is_held_and_not_spoken_for(engine: Engine) -> None:
    place(engine, 1, ticket("BTC_USDT.swap", "buy", lots=100))
    far = engine.last("BTC_USDT.swap") * 2
    place(engine, 1, ticket("BTC_USDT.swap", "sell", price=far, lots=70, offset="close"))
    with pytest.raises(Refused, match=r"only 0\.03 of the long position can be closed") as refused:
        place(engine, 1, ticket("BTC_USDT.swap", "sell", lots=31, offset="close"))
    assert refused.value.code == Code.NO_POSITION
    with pytest.raises(Refused, match="only 0 of the short position"):
        place(engine, 1, ticket("BTC_USDT.swap", "buy", lots=1, offset="close"))
    document = engine.accounts.positions[PositionKey(1, "BTC_USDT.swap", "long")].document(far)
    assert (document["amount"], document["frozen"]) == ("0.1", "0.07")


def test_a_ruined_position_is_taken_and_costs_its_margin_alone(engine: Engine) -> None:
    engine.accounts.set_leverage(1, "BTC_USDT.swap", 100)
    opened = place(engine, 1, ticket("BTC_USDT.swap", "buy", lots=100))
    resting = place(engine, 1, ticket("BTC_USDT.swap", "sell", price=opened.spent, lots=100, offset="close"))
    key = PositionKey(1, "BTC_USDT.swap", "long")
    ruin = units(str(engine.accounts.positions[key].document(1)["liquidation_price"])) // find("BTC_USDT.swap").tick
    second = NOW_MS // 1000
    while funding.mark(7, find("BTC_USDT.swap"), second) > ruin:
        second += 1
    engine.advance("BTC_USDT.swap", (second - 1) * 1000)
    assert key in engine.accounts.positions
    engine.advance("BTC_USDT.swap", second * 1000)
    assert key not in engine.accounts.positions
    assert resting.status == "cancelled"
    changes = engine.drain()
    paid = sum(payment.value for payment in changes.payments)
    assert balance(engine, 1, "USDT") == (plain(units("1000000") - opened.spent // 100 + paid), "0")
    last = max(changes.orders.values(), key=lambda order: order.number)
    assert (last.side, last.offset, last.status, last.filled) == ("sell", "close", "closed", 100)
    sound(engine)


def test_leverage_of_later_does_not_change_what_an_order_froze(engine: Engine) -> None:
    order = place(engine, 1, ticket("ETH_USDT.swap", "buy", price=1000_00, lots=100))
    engine.accounts.set_leverage(1, "ETH_USDT.swap", 1)
    assert balance(engine, 1, "USDT") == ("999900", "100")
    engine.cancel(order, NOW_MS)
    assert balance(engine, 1, "USDT") == ("1000000", "0")


@pytest.mark.parametrize(
    ("order", "code"),
    [
        (ticket("BTC_USDT", "buy", price=6_000_000, lots=20_000_000), Code.INSUFFICIENT_BALANCE),
        (ticket("BTC_USDT", "buy", money=units("1000000.01")), Code.INSUFFICIENT_BALANCE),
        (ticket("ETH_BTC", "sell", price=10**9, lots=200_000 * 10_000), Code.INSUFFICIENT_BALANCE),
        (ticket("BTC_USDT.swap", "buy", price=600_000, lots=200_000), Code.INSUFFICIENT_BALANCE),
        (ticket("BTC_USDT", "buy", price=100, lots=999_999), Code.BELOW_MINIMUM),
        (ticket("BTC_USDT", "sell", lots=1), Code.BELOW_MINIMUM),
        (ticket("BTC_USDT", "buy", money=units("0.99")), Code.BELOW_MINIMUM),
    ],
)
def test_what_cannot_be_paid_or_is_too_small_is_refused_and_changes_nothing(engine: Engine, order: Ticket, code: int) -> None:
    engine.drain()
    with pytest.raises(Refused) as refused:
        place(engine, 1, order)
    assert refused.value.code == code
    assert not engine.drain()


def test_a_client_order_id_is_used_once_by_an_account_and_belongs_to_it_alone(engine: Engine) -> None:
    place(engine, 1, ticket("BTC_USDT", "buy", lots=1_000, cid="a"))
    with pytest.raises(Refused) as refused:
        place(engine, 1, ticket("BTC_USDT", "buy", lots=1_000, cid="a"))
    assert refused.value.code == Code.DUPLICATE_CLIENT_ORDER_ID
    assert place(engine, 2, ticket("BTC_USDT", "buy", lots=1_000, cid="a")).status == "closed"
    with pytest.raises(Refused):
        engine.place(1, ticket("BTC_USDT", "buy", lots=1_000, cid="b"), NOW_MS, client_id_known=True)


def test_a_refused_order_leaves_its_client_order_id_free(engine: Engine) -> None:
    with pytest.raises(Refused):
        place(engine, 1, ticket("BTC_USDT", "buy", money=units("9000000"), cid="a"))
    assert place(engine, 1, ticket("BTC_USDT", "buy", lots=1_000, cid="a")).status == "closed"


def test_an_account_may_have_so_many_open_orders(engine: Engine) -> None:
    for _ in range(MOST_OPEN_ORDERS):
        place(engine, 1, ticket("DOGE_USDT", "buy", price=1_000, lots=10_000))
    with pytest.raises(Refused) as refused:
        place(engine, 1, ticket("DOGE_USDT", "buy", price=1_000, lots=10_000))
    assert refused.value.code == Code.TOO_MANY_ORDERS
    assert place(engine, 2, ticket("DOGE_USDT", "buy", price=1_000, lots=10_000)).status == "open"


def test_the_depths_sequence_only_grows(engine: Engine) -> None:
    book, seen = engine.books["BTC_USDT"], []
    for step in range(20):
        order = place(engine, 1, ticket("BTC_USDT", "buy", price=4_000_000, lots=1_000), NOW_MS + step * 300)
        seen.append(book.sequence)
        engine.cancel(order, NOW_MS + step * 300)
        seen.append(book.sequence)
    assert seen == sorted(set(seen))


def test_a_clock_that_steps_back_moves_nothing(engine: Engine) -> None:
    engine.advance("BTC_USDT", NOW_MS - 5_000)
    assert engine.books["BTC_USDT"].second == NOW_MS // 1000
    assert place(engine, 1, ticket("BTC_USDT", "buy", lots=1_000), NOW_MS - 5_000).time_ms == NOW_MS
