"""What was true when: every state that anybody could see is found again in the history, and nothing else."""

import random
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.paper import NOW_S, Client, Clock
from tests.reader import depth
from tests.test_paper_engine import place, ticket
from workers.venues.paper import history as module
from workers.venues.paper import market as model
from workers.venues.paper import quotes
from workers.venues.paper.engine import Engine
from workers.venues.paper.errors import Refused
from workers.venues.paper.history import KEPT_MS, LEVELS, History
from workers.venues.paper.markets import MARKETS
from workers.venues.paper.quotes import View

NOW_MS = NOW_S * 1000


async def then(client: Client, time_ms: int, *, limit: int = LEVELS, symbol: str = "BTC_USDT") -> Any:
    return await client.get(f"/api/v1/history/depth?symbol={symbol}&time={time_ms}&limit={limit}", signed=False)


async def test_every_state_is_found_again(client: Client, clock: Clock) -> None:
    dice, market, middle = random.Random(3), MARKETS["BTC_USDT"], model.second(7, "BTC_USDT", NOW_S).close
    seen: list[tuple[int, Any, Any]] = []
    for _ in range(50):
        clock.now_s += dice.choice((0.003, 0.4, 1, 2))
        side, price = dice.choice(("buy", "sell")), market.price_text(middle + dice.randrange(-300, 300))
        await client.order("BTC_USDT", side, type="limit", price=price, amount="0.4")
        if dice.random() < 0.2:
            assert (await client("DELETE", "/api/v1/orders?symbol=BTC_USDT"))[0] == 200
        book = await depth(client, limit=LEVELS)
        seen.append((book["time"], book, await client.get("/api/v1/ticker?symbol=BTC_USDT", signed=False)))
    for time_ms, book, ticker in seen:
        old = await then(client, time_ms)
        assert old["since"] <= time_ms
        assert old["until"] is None or time_ms < old["until"]
        assert {name: old[name] for name in book} == book
        old = await client.get(f"/api/v1/history/ticker?symbol=BTC_USDT&time={time_ms}", signed=False)
        assert {name: old[name] for name in ticker} == ticker
        assert old["sequence"] == book["sequence"]


async def test_states_follow_each_other_without_a_hole(client: Client, clock: Clock) -> None:
    begun_ms = int(clock.now_s * 1000)
    for n in range(5):
        clock.now_s += 1.5
        await client.order("ETH_USDT", "buy", type="market", quote_amount="10")
        placed = await client.order("ETH_USDT", "buy", type="limit", price="100", amount=f"0.{n + 1}")
        clock.now_s += 0.25
        await client("DELETE", f"/api/v1/orders/{placed['id']}")
    at_ms, sequences, begins = begun_ms, [], set()
    while True:
        state = await then(client, at_ms, symbol="ETH_USDT")
        assert state["since"] == at_ms or at_ms == begun_ms
        sequences.append(state["sequence"])
        begins.add(state["since"])
        assert state["asks"][0][0] > state["bids"][0][0]
        if state["until"] is None:
            break
        at_ms = state["until"]
    assert sequences == sorted(set(sequences))
    assert sequences[-1] == (await depth(client, "ETH_USDT"))["sequence"]
    # Each second began a new state; nobody's order rested over the turn of one.
    assert begins >= set(range(NOW_MS, int(clock.now_s * 1000), 1000))


async def test_a_market_nobody_touched_is_told_as_the_model_has_it(client: Client, clock: Clock) -> None:
    clock.now_s += 60.7
    market, own = MARKETS["SOL_USDT"], model.depth(7, "SOL_USDT", NOW_S + 33)
    assert await then(client, (NOW_S + 33) * 1000 + 250, limit=2, symbol="SOL_USDT") == {
        "symbol": "SOL_USDT",
        "time": (NOW_S + 33) * 1000 + 250,
        "since": (NOW_S + 33) * 1000,
        "until": (NOW_S + 34) * 1000,
        "sequence": (NOW_S + 33) * 1_000_000,
        "asks": [[market.price_text(price), market.amount_text(lots)] for price, lots in own.asks[:2]],
        "bids": [[market.price_text(price), market.amount_text(lots)] for price, lots in own.bids[:2]],
    }
    assert (await then(client, int(clock.now_s * 1000), symbol="SOL_USDT"))["until"] is None


@pytest.mark.parametrize(("query", "names"), [("", "time"), (f"&time={NOW_MS - 1}", "reaches"), (f"&time={NOW_MS + 1}", "reaches")])
async def test_a_moment_out_of_range_is_refused(client: Client, query: str, names: str) -> None:
    for what in ("depth", "ticker"):
        status, refused = await client("GET", f"/api/v1/history/{what}?symbol=BTC_USDT{query}", signed=False)
        assert (status, refused["code"]) == (400, 2002)
        assert names in refused["message"]


async def test_it_reaches_back_ten_minutes(client: Client, clock: Clock) -> None:
    clock.now_s += 700
    now_ms = int(clock.now_s * 1000)
    assert (await then(client, now_ms - KEPT_MS))["time"] == now_ms - KEPT_MS
    status, refused = await client("GET", f"/api/v1/history/depth?symbol=BTC_USDT&time={now_ms - KEPT_MS - 1}", signed=False)
    assert (status, refused["message"]) == (400, f"time: the history of BTC_USDT reaches from {now_ms - KEPT_MS} to {now_ms}")


def note(history: History, engine: Engine, now_ms: int) -> None:
    engine.advance("BTC_USDT", now_ms)
    history.note(View(engine, "BTC_USDT", now_ms))


def test_memory_is_bounded_and_what_went_early_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 20_000)
    engine, history = Engine(seed=7), History(7, step_ms=1000, since_ms=NOW_MS)
    engine.accounts.open(1)
    place(engine, 1, ticket("BTC_USDT", "buy", 100, 1_000_000), NOW_MS)
    for second in range(400):
        note(history, engine, NOW_MS + second * 1000)
    kept = len(history._logs["BTC_USDT"])
    assert 10 < kept <= 40
    first_ms = NOW_MS + (400 - kept) * 1000
    history.check("BTC_USDT", first_ms, NOW_MS + 400_000)
    with pytest.raises(Refused):
        history.check("BTC_USDT", first_ms - 1, NOW_MS + 400_000)
    history.check("ETH_USDT", NOW_MS, NOW_MS + 400_000)


def test_the_records_of_ten_minutes_are_kept_and_older_ones_go() -> None:
    engine, history = Engine(seed=7), History(7, step_ms=1000, since_ms=NOW_MS)
    engine.accounts.open(1)
    place(engine, 1, ticket("BTC_USDT", "buy", 100, 1_000_000), NOW_MS)
    for second in range(1000):
        note(history, engine, NOW_MS + second * 1000)
    assert len(history._logs["BTC_USDT"]) == 601
    assert history._size == sum(record.size for record in history._logs["BTC_USDT"])


levels = st.dictionaries(st.integers(1, 120), st.integers(1, 5), max_size=100)


@settings(max_examples=200, deadline=None)
@given(own=levels, seen=levels, sign=st.sampled_from([1, -1]))
def test_the_kept_differences_restore_the_best_levels(own: dict[int, int], seen: dict[int, int], sign: int) -> None:
    def best_first(side: dict[int, int]) -> list[tuple[int, int]]:
        return sorted(side.items(), key=lambda level: sign * level[0])

    rows = module._difference(tuple(best_first(own)), best_first(seen), sign)
    assert isinstance(rows, array)
    assert module._restored(tuple(best_first(own)), rows, sign) == best_first(seen)[:LEVELS]


def test_the_ticker_of_any_second_is_that_which_was_shown() -> None:
    engine = Engine(seed=7)
    engine.advance("BTC_USDT", NOW_MS)
    shown = quotes.ticker(engine, "BTC_USDT", NOW_MS)
    history = History(7, step_ms=1000, since_ms=NOW_MS)
    told = history.ticker("BTC_USDT", NOW_MS, NOW_MS + 5000)
    assert told == shown | {"since": NOW_MS, "until": NOW_MS + 1000, "sequence": NOW_S * 1_000_000}
