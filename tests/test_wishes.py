"""workers/wishes.py: what a feeder is wished to feed."""

from bus.market import WISHES_GONE_S, Wish
from workers.wishes import REFUSED_S, Wishes

TICKER, DEPTH, OTHER = ("ticker", "BTC_USDT"), ("depth", "BTC_USDT"), ("ticker", "ETH_USDT")


def wish(follower: str, *pairs: tuple[str, str], whole: bool = False) -> Wish:
    return Wish(follower=follower, keys=list(pairs), whole=whole)


def test_a_pair_is_wanted_as_long_as_one_follower_wishes_it() -> None:
    wishes = Wishes(10)
    wishes.hear(wish("a", TICKER), 0)
    wishes.hear(wish("b", TICKER, DEPTH), 0)
    wishes.hear(wish("b", DEPTH, whole=True), 1)
    assert wishes.wanted(1) == {TICKER, DEPTH}
    wishes.hear(wish("a", whole=True), 2)
    assert wishes.wanted(2) == {DEPTH}


def test_what_only_dead_followers_wished_ends() -> None:
    wishes = Wishes(10)
    wishes.hear(wish("a", TICKER), 0)
    wishes.hear(wish("b", TICKER), 0)
    wishes.hear(wish("b", DEPTH), 10)
    assert wishes.wanted(WISHES_GONE_S) == {TICKER, DEPTH}
    assert wishes.wanted(WISHES_GONE_S + 1) == {DEPTH}


def test_what_is_beyond_the_limit_is_counted_and_finds_room_later() -> None:
    wishes = Wishes(2)
    assert wishes.hear(wish("a", TICKER, DEPTH, OTHER), 0) == 1
    assert wishes.wanted(0) == {TICKER, DEPTH}
    assert wishes.hear(wish("a", TICKER, DEPTH, OTHER), 5) == 0
    assert wishes.refused(5) == 1
    assert wishes.hear(wish("a", DEPTH, OTHER, whole=True), 6) == 0
    assert wishes.wanted(6) == {DEPTH, OTHER}
    assert wishes.refused(6) == 0


def test_what_cannot_be_fed_is_not_wanted_again_for_a_minute() -> None:
    wishes = Wishes(10)
    wishes.hear(wish("a", TICKER), 0)
    wishes.bar(TICKER, 0)
    wishes.hear(wish("a", TICKER), 1)
    assert wishes.wanted(1) == set()
    wishes.hear(wish("a", TICKER), REFUSED_S)
    assert wishes.wanted(REFUSED_S) == {TICKER}


def test_a_market_that_nobody_knows_is_wanted_once_it_is_found() -> None:
    wishes = Wishes(10)
    doubtful = Wish(follower="a", unproven=[TICKER, DEPTH], whole=True)
    wishes.hear(doubtful, 0)
    assert wishes.wanted(0) == set()
    assert wishes.unknown([TICKER, DEPTH], 0) == [TICKER, DEPTH]
    wishes.found(TICKER, 0)
    wishes.bar(DEPTH, 0)
    assert wishes.unknown([TICKER, DEPTH], 0) == []
    assert wishes.wanted(0) == {TICKER}
    wishes.hear(doubtful, 1)
    assert wishes.wanted(1) == {TICKER}
    wishes.hear(Wish(follower="a", whole=True), 2)
    assert wishes.wanted(2) == set()
