"""workers/rules.py: an order is made to fit, never to the worse for its owner; and what is known of a market is kept for a while."""

import asyncio
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from bus.errors import BadRequest
from bus.messages import Trade
from workers.rules import EXACT, Kept, Rules, fitted

BTC = Rules(tick=Decimal("0.05"), lot=Decimal("0.001"), min_amount=Decimal("0.002"), min_value=Decimal(5), contract_size=Decimal(1))


def order(side: Any, price: str, amount: str, symbol: str = "BTC_USDT", offset: Any = "") -> Trade:
    return Trade(symbol, side, Decimal(price), Decimal(amount), offset)


@pytest.mark.parametrize(
    ("trade", "said"),
    [
        (order("buy", "100.03", "1"), "price: 100.03 does not fit the tick 0.05: 100.00 or 100.05"),
        (order("buy", "0.01", "1000"), "price: 0.01 does not fit the tick 0.05: 0.05"),
        (order("sell", "100", "1.2345"), "amount: 1.2345 does not fit the lot 0.001: 1.234 or 1.235"),
        (order("sell", "-1", "1.2345"), "amount: 1.2345 does not fit the lot 0.001: 1.234 or 1.235"),
        (order("buy", "100000", "0.001"), "amount: 0.001 is below the smallest that is allowed, 0.002"),
        (order("buy", "100000", "0.0004"), "amount: 0.0004 is below the smallest that is allowed, 0.002"),
        (
            order("buy", "1000", "0.004"),
            "amount: 0.004 at 1000 is worth 4.000, below the smallest value that is allowed, 5; the nearest amount is 0.005",
        ),
        (order("buy", "999.95", "0.004"), "value that is allowed, 5; the nearest amount is 0.006"),
        (order("buy", "10000", "0.0001"), "amount: 0.0001 is below the smallest that is allowed, 0.002"),
        (order("buy", "-1", "4.99"), "amount: 4.99 is below the smallest value that is allowed, 5"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_allowed(trade: Trade, said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        fitted(trade, BTC, "refuse")
    assert str(refused.value).endswith(said)


@pytest.mark.parametrize(
    ("trade", "price", "amount"),
    [
        (order("buy", "100.03", "1.2349"), "100.00", "1.234"),
        (order("sell", "100.03", "1.2349"), "100.05", "1.234"),
        (order("sell", "0.01", "1000"), "0.05", "1000"),
        (order("sell", "-1", "0.0029"), "-1", "0.002"),
        (order("buy", "-1", "5.123456789"), "-1", "5.123456789"),
        (order("buy", "-1", "1.0009", "BTC_USDT.swap", "close"), "-1", "1.000"),
    ],
)
def test_down_rounds_the_amount_down_and_no_price_to_the_worse(trade: Trade, price: str, amount: str) -> None:
    result = fitted(trade, BTC, "down")
    assert (f"{result.price:f}", f"{result.amount:f}") == (price, amount)


@pytest.mark.parametrize(
    "trade",
    [
        order("buy", "0.04", "1000"),  # rounded down it would be 0, which is a market order
        order("sell", "100000", "0.0019"),
        order("buy", "1000", "0.0049"),
        order("buy", "-1", "4"),
    ],
)
def test_what_is_below_a_minimum_is_refused_in_both_modes(trade: Trade) -> None:
    for rounding in ("refuse", "down"):
        with pytest.raises(BadRequest):
            fitted(trade, BTC, rounding)


@pytest.mark.parametrize(
    "trade",
    [
        order("buy", "100.05", "1.234"),
        order("sell", "-1", "0.002"),  # what a market order is worth is the exchange's to judge
        order("sell", "100", "0.002", "BTC_USDT.swap", "close"),  # the small rest of a position may be closed
        order("buy", "-1", "5.0000001"),
    ],
)
def test_what_fits_is_left_as_it_is(trade: Trade) -> None:
    for rounding in ("refuse", "down"):
        assert fitted(trade, BTC, rounding) is trade


def test_a_market_without_rules_takes_everything() -> None:
    trade = order("buy", "0.000000001", "1e-30")
    assert fitted(trade, Rules(), "refuse") is trade
    assert fitted(trade, Rules(tick=Decimal(0), lot=Decimal(0), min_amount=Decimal(0), min_value=Decimal(0)), "refuse") is trade


def test_a_contract_of_unknown_size_has_no_known_value() -> None:
    trade = order("buy", "1", "1", "BTC_USDT.swap", "open")
    assert fitted(trade, Rules(min_value=Decimal(5)), "refuse") is trade
    with pytest.raises(BadRequest, match=r"is worth 1\.0, below"):
        fitted(trade, Rules(min_value=Decimal(5), contract_size=Decimal("1.0")), "refuse")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1"])
def test_a_rule_that_is_no_number_of_0_or_more_is_not_taken(value: str) -> None:
    with pytest.raises(ValueError, match="rule of a market"):
        Rules(tick=Decimal(value))


# What a host or an exchange can write: bus/messages.py, decimal().
numbers = st.decimals(min_value=Decimal("1e-12"), max_value=Decimal("1e15"), places=12).filter(lambda value: value > 0)
wide = st.one_of(
    numbers, st.builds(lambda digits, exponent: Decimal(digits).scaleb(exponent), st.integers(1, 10**20), st.integers(-60, 60))
)
steps = st.one_of(st.none(), wide, st.sampled_from([Decimal(text) for text in ("1", "0.1", "0.05", "0.00000001", "10", "3")]))
trades = st.builds(
    lambda side, price, amount, offset: Trade("A_B.swap" if offset else "A_B", side, price, amount, offset),
    st.sampled_from(["buy", "sell"]),
    st.one_of(wide, st.just(Decimal(-1))),
    wide,
    st.sampled_from(["", "open", "close"]),
)
some_rules = st.builds(Rules, tick=steps, lot=steps, min_amount=steps, min_value=steps, contract_size=steps)
modes: st.SearchStrategy[Literal["refuse", "down"]] = st.sampled_from(["refuse", "down"])


@given(trade=trades, rules=some_rules, rounding=modes)
def test_a_fitted_order_fits_and_is_never_more_and_never_worse(trade: Trade, rules: Rules, rounding: Literal["refuse", "down"]) -> None:
    try:
        result = fitted(trade, rules, rounding)
    except BadRequest:
        return
    money = trade.is_market and trade.side == "buy" and not trade.offset
    assert result.is_market == trade.is_market
    assert 0 < result.amount <= trade.amount
    assert result.price <= trade.price if trade.side == "buy" else result.price >= trade.price
    assert rounding == "down" or result is trade
    assert money is False or result.amount == trade.amount
    if rules.tick and not trade.is_market:
        assert EXACT.remainder(result.price, rules.tick) == 0
        assert EXACT.abs(EXACT.subtract(result.price, trade.price)) < rules.tick
    if not money:
        assert not rules.lot or EXACT.remainder(result.amount, rules.lot) == 0
        assert not rules.lot or EXACT.subtract(trade.amount, result.amount) < rules.lot
        assert not rules.min_amount or result.amount >= rules.min_amount
    if rules.min_value and not trade.is_market and not trade.offset:
        worth = EXACT.multiply(EXACT.multiply(result.price, result.amount), rules.contract_size or Decimal(1))
        assert worth >= rules.min_value


@given(trade=trades, rules=some_rules, rounding=modes)
def test_what_was_fitted_fits_without_rounding(trade: Trade, rules: Rules, rounding: Literal["refuse", "down"]) -> None:
    try:
        result = fitted(trade, rules, rounding)
    except BadRequest:
        reject()
    assert fitted(result, rules, "refuse") is result


@given(trade=trades, rules=some_rules)
def test_the_nearest_that_is_named_is_accepted(trade: Trade, rules: Rules) -> None:
    """A host that takes the last number of each refusal arrives at an order that passes, in as many steps as there are rules."""
    for _ in range(4):
        try:
            fitted(trade, rules, "refuse")
        except BadRequest as e:
            what, named = str(e).partition(":")[0], Decimal(str(e).rpartition(" ")[2])
            trade = Trade(
                trade.symbol,
                trade.side,
                named if what == "price" else trade.price,
                named if what == "amount" and (rules.lot or "smallest that" in str(e) or trade.is_market) else trade.amount,
                trade.offset,
            )
            if not rules.lot and "at " in str(e):
                return  # without a lot every larger amount fits, and none is nearest
        else:
            return
    pytest.fail(f"{trade} does not pass {rules}")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_an_answer_is_kept_from_the_moment_of_asking_until_it_is_too_old() -> None:
    clock, asked = Clock(), 0
    kept: Kept[int] = Kept(clock)

    async def ask() -> tuple[int, float]:
        nonlocal asked
        asked += 1
        clock.now_s += 0.4  # the answer took its time
        return asked, 1.0

    assert await kept.get("key", ask) == 1
    clock.now_s = 0.99
    assert await kept.get("key", ask) == 1
    clock.now_s = 1.0
    assert kept.fresh("key") is None
    assert await kept.get("key", ask) == 2
    assert await kept.get("other", ask) == 3


async def test_equal_questions_at_once_are_one_and_a_failure_is_asked_again() -> None:
    kept: Kept[str] = Kept()
    go_on, asked = asyncio.Event(), 0

    async def ask() -> tuple[str, float]:
        nonlocal asked
        asked += 1
        await go_on.wait()
        if asked == 1:
            raise BadRequest("first")
        return "answer", 60.0

    waiting = [asyncio.ensure_future(kept.get("key", ask)) for _ in range(5)]
    await asyncio.sleep(0)
    go_on.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [BadRequest, str, str, str, str]
    assert asked == 2
