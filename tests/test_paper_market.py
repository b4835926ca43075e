"""The paper market's price model: pure, the same everywhere, and consistent over all scales."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.venues.paper import funding
from workers.venues.paper import market as model
from workers.venues.paper.markets import MARKETS, PLAY_MONEY
from workers.venues.paper.money import UNIT

NOW_S = 1_795_168_693
symbols = st.sampled_from(sorted(MARKETS))
seconds = st.integers(min_value=0, max_value=4_000_000_000)
seeds = st.integers(min_value=0, max_value=2**63)


def merged(bars: list[model.Bar]) -> model.Bar:
    return model.Bar(bars[0].open, max(b.high for b in bars), min(b.low for b in bars), bars[-1].close, sum(b.volume for b in bars))


def test_a_seed_gives_these_prices_for_ever() -> None:
    """Pinned: whoever changes the model changes every recorded chart, and has to say so here."""
    assert model.second(7, "BTC_USDT", NOW_S) == model.Bar(open=5299217, high=5299227, low=5298919, close=5299049, volume=18180)
    assert model.depth(7, "ETH_BTC", NOW_S).asks[:2] == ((40305, 1748), (40306, 3669))


def test_another_process_sees_the_same_market() -> None:
    swap = "MARKETS['ETH_USDT.swap']"
    shown = (
        f"m.span(7, 'LTC_BTC', {NOW_S - 10_000}, {NOW_S}), m.tape(7, 'SOL_USDT', 5, {NOW_S}), m.depth(7, 'ETH_BTC', {NOW_S}),"
        f" f.mark(7, {swap}, {NOW_S}), f.rate(7, 'ETH_USDT.swap', 60_000)"
    )
    code = f"from workers.venues.paper import funding as f, market as m; from workers.venues.paper.markets import MARKETS; print({shown})"
    seen = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": hashseed}, capture_output=True, text=True, check=True).stdout
        for hashseed in ("1", "2")
    }
    prices = model.span(7, "LTC_BTC", NOW_S - 10_000, NOW_S), model.tape(7, "SOL_USDT", 5, NOW_S), model.depth(7, "ETH_BTC", NOW_S)
    swaps = funding.mark(7, MARKETS["ETH_USDT.swap"], NOW_S), funding.rate(7, "ETH_USDT.swap", 60_000)
    assert seen == {" ".join(map(str, (*prices, *swaps))) + "\n"}


@given(seeds, symbols, seconds, st.sampled_from([(604_800, 86_400), (86_400, 3_600), (3_600, 900), (3_600, 60), (60, 1), (604_800, 3_600)]))
@settings(max_examples=60, deadline=None)
def test_small_bars_add_up_to_the_large_one(seed: int, symbol: str, second_s: int, sizes: tuple[int, int]) -> None:
    large, small = sizes
    start = second_s // large * large
    parts = [model.span(seed, symbol, at, at + small) for at in range(start, start + large, small)]
    assert merged(parts) == model.span(seed, symbol, start, start + large)
    assert all(b.low <= min(b.open, b.close) <= max(b.open, b.close) <= b.high and b.low > 0 and b.volume > 0 for b in parts)


@given(seeds, symbols, seconds, st.integers(1, 20_000), st.integers(1, 20_000))
@settings(max_examples=60, deadline=None)
def test_any_span_is_the_sum_of_two_spans(seed: int, symbol: str, start: int, first: int, then: int) -> None:
    middle, end = start + first, start + first + then
    both = [model.span(seed, symbol, start, middle), model.span(seed, symbol, middle, end)]
    assert merged(both) == model.span(seed, symbol, start, end)
    assert both[0].close == both[1].open


@given(seeds, symbols, seconds)
@settings(max_examples=60, deadline=None)
def test_the_tape_adds_up_to_the_bars(seed: int, symbol: str, second_s: int) -> None:
    tape = model.prints(seed, symbol, second_s)
    prices = [p.price for p in tape]
    assert model.Bar(prices[0], max(prices), min(prices), prices[-1], sum(p.lots for p in tape)) == model.second(seed, symbol, second_s)
    assert all(p.lots > 0 and p.side in ("buy", "sell") for p in tape)
    assert [p.number for p in tape] == list(range(len(tape)))


@given(seeds, symbols, seconds)
@settings(max_examples=60, deadline=None)
def test_the_markets_book_is_sorted_and_never_crossed(seed: int, symbol: str, second_s: int) -> None:
    book = model.depth(seed, symbol, second_s)
    asks, bids = [p for p, _ in book.asks], [p for p, _ in book.bids]
    price = model.second(seed, symbol, second_s).close
    assert asks == sorted(set(asks))
    assert bids == sorted(set(bids), reverse=True)
    assert len(asks) == len(bids) == model.LEVELS
    assert bids[0] <= price < asks[0]
    assert bids[-1] > 0
    assert all(lots > 0 for _, lots in book.asks + book.bids)


@given(symbols, seconds, st.integers(1, 5_000), st.integers(-30, 30), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_the_first_second_that_reaches_a_price_is_found(symbol: str, start: int, length: int, away: int, apart: int) -> None:
    """The reference looks at every second."""
    down = model.second(7, symbol, start).open + away
    bars = ((at, model.second(7, symbol, at)) for at in range(start, start + length))
    first = next((at for at, bar in bars if bar.low <= down or bar.high >= down + apart), None)
    assert model.reaching(7, symbol, start, start + length, down=down, up=down + apart) == first


@given(seeds, symbols, st.integers(0, 6_000))
@settings(max_examples=100, deadline=None)
def test_the_price_stays_within_a_factor_of_three(seed: int, symbol: str, week: int) -> None:
    bar, usual = model.span(seed, symbol, week * 604_800, (week + 1) * 604_800), MARKETS[symbol].usual_price
    assert usual / 3 < bar.low <= bar.high < usual * 3


def test_a_swap_follows_its_spot_market_to_the_tick() -> None:
    spot, swap = model.span(3, "BTC_USDT", NOW_S - 500, NOW_S), model.span(3, "BTC_USDT.swap", NOW_S - 500, NOW_S)
    assert swap[:4] == tuple(price // 10 for price in spot[:4])


@pytest.mark.parametrize("interval_s", [60, 180, 3_540, 3_600, 86_340, 86_400, 604_800])
def test_candles_stand_on_the_grid_and_end_with_the_unfinished_bar(interval_s: int) -> None:
    rows = model.candles(7, "ETH_USDT", interval_s=interval_s, limit=50, end_ms=10**14, now_s=NOW_S)
    starts = [start_ms for start_ms, _ in rows]
    assert starts == [(NOW_S // interval_s - back) * interval_s * 1000 for back in range(49, -1, -1)]
    assert rows[-1][1] == model.span(7, "ETH_USDT", starts[-1] // 1000, NOW_S + 1)
    assert [before.close for _, before in rows[:-1]] == [after.open for _, after in rows[1:]]


def test_candles_of_the_past_are_those_that_were_shown_then() -> None:
    then = model.candles(7, "XRP_USDT", interval_s=300, limit=4, end_ms=10**14, now_s=NOW_S)
    later = model.candles(7, "XRP_USDT", interval_s=300, limit=3, end_ms=then[-1][0], now_s=NOW_S + 400_000)
    assert later == then[:3]


def test_no_candle_begins_before_1970() -> None:
    assert [start for start, _ in model.candles(7, "XRP_USDT", interval_s=60, limit=1000, end_ms=120_001, now_s=NOW_S)] == [
        0,
        60_000,
        120_000,
    ]


def test_the_tape_ends_now_and_is_as_long_as_asked() -> None:
    tape = model.tape(7, "BTC_USDT", 100, NOW_S)
    assert len(tape) == 100
    assert tape == sorted(tape, key=lambda p: (p.second, p.number))
    assert (tape[-1].second, tape[-1].price) == (NOW_S, model.second(7, "BTC_USDT", NOW_S).close)


def test_the_table_of_markets_keeps_money_exact() -> None:
    for market in MARKETS.values():
        assert market.tick * market.lot % UNIT == 0
        assert market.min_amount % market.lot == market.max_amount % market.lot == 0
        assert {market.base, market.quote} <= set(PLAY_MONEY)
        assert market.week_volume * UNIT // market.lot // 2 > model.PRINTS * 604_800
