"""Who trades with whom: price first, then time, users before the market; checked against a plain reference book."""

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.venues.paper.market import Bar, Depth
from workers.venues.paper.matching import Book, Match, matches, reached
from workers.venues.paper.orders import Order

DEPTH = Depth(asks=((101, 5), (103, 5), (110, 50)), bids=((99, 5), (97, 5), (90, 50)))


def resting(number: int, side: str, price: int, lots: int) -> Order:
    return Order(number, 1, None, "BTC_USDT", side, "limit", None, price, lots, 0, 1, 0, 0)


def book_of(*orders: Order) -> Book:
    book = Book()
    for order in orders:
        book.sides[order.side].add(order)
    return book


def taken(found: list[Match]) -> list[tuple[int, int, int | None]]:
    return [(m.price, m.lots, m.maker.number if m.maker else None) for m in found]


def test_the_best_price_trades_first_then_the_earlier_order_then_the_market() -> None:
    book = book_of(resting(1, "sell", 103, 2), resting(2, "sell", 101, 1), resting(3, "sell", 101, 1), resting(4, "sell", 100, 1))
    found = matches(book, DEPTH, "buy", limit=103, lots=12, money=0, lot_notional=1)
    assert taken(found) == [(100, 1, 4), (101, 1, 2), (101, 1, 3), (101, 5, None), (103, 2, 1), (103, 2, None)]


def test_a_limit_is_never_passed() -> None:
    assert taken(matches(book_of(), DEPTH, "sell", limit=97, lots=99, money=0, lot_notional=1)) == [(99, 5, None), (97, 5, None)]
    assert matches(book_of(), DEPTH, "sell", limit=100, lots=99, money=0, lot_notional=1) == []


def test_money_buys_whole_lots_and_never_more_than_there_is() -> None:
    found = matches(book_of(), DEPTH, "buy", limit=None, lots=None, money=1_000, lot_notional=1)
    assert taken(found) == [(101, 5, None), (103, 4, None)]
    assert matches(book_of(), DEPTH, "buy", limit=None, lots=None, money=100, lot_notional=1) == []


def test_what_was_taken_of_the_market_is_not_there_again_until_the_next_second() -> None:
    book = book_of()
    book.turn(10)
    for match in matches(book, DEPTH, "buy", limit=None, lots=7, money=0, lot_notional=1):
        book.take("sell", match)
    assert book.visible("sell", DEPTH, 2) == [(103, 3), (110, 50)]
    book.turn(11)
    assert book.visible("sell", DEPTH, 2) == [(101, 5), (103, 5)]


def test_depth_shows_users_and_market_together() -> None:
    book = book_of(resting(1, "buy", 99, 2), resting(2, "buy", 98, 1), resting(3, "buy", 99, 1))
    assert book.visible("buy", DEPTH, 3) == [(99, 8), (98, 1), (97, 5)]
    assert (book.best("buy", DEPTH), book.best("sell", DEPTH)) == (99, 101)


def test_a_side_that_is_all_taken_still_has_a_price_that_does_not_cross() -> None:
    book = book_of(resting(1, "buy", 120, 2))
    for price, lots in DEPTH.asks:
        book.take("sell", Match(price, lots, None))
    assert book.visible("sell", DEPTH, 5) == []
    assert (book.best("buy", DEPTH), book.best("sell", DEPTH)) == (120, 121)
    assert book_of(resting(1, "sell", 80, 1)).best("sell", DEPTH) == 80


def test_an_order_fills_when_the_market_trades_through_it_or_offers_it() -> None:
    quiet = Bar(100, 100, 98, 100, 1)
    assert reached(resting(1, "buy", 99, 1), quiet, DEPTH)
    assert not reached(resting(1, "buy", 98, 1), quiet, DEPTH)
    assert reached(resting(1, "buy", 101, 1), Bar(101, 101, 101, 101, 1), DEPTH)
    assert reached(resting(1, "sell", 99, 1), Bar(99, 99, 99, 99, 1), DEPTH)
    assert not reached(resting(1, "sell", 100, 1), quiet, DEPTH)


@given(
    st.lists(st.tuples(st.integers(95, 112), st.integers(1, 5)), max_size=20),
    st.integers(95, 115),
    st.integers(1, 120),
    st.lists(st.sampled_from([101, 103, 110]), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_matching_equals_a_sorted_list_of_all_offers(users: list[tuple[int, int]], limit: int, lots: int, eaten: list[int]) -> None:
    """The reference: every offer as (price, market or user, order of arrival, lots), sorted, taken from the front."""
    book = book_of(*(resting(number, "sell", price, amount) for number, (price, amount) in enumerate(users)))
    for price in eaten:
        book.take("sell", Match(price, 1, None))
    offers = [(price, 0, number, amount) for number, (price, amount) in enumerate(users)]
    offers += [(price, 1, 0, amount - eaten.count(price)) for price, amount in DEPTH.asks]
    expected, wanted = [], lots
    for price, own, number, amount in sorted(offers):
        if price <= limit and wanted and amount:
            expected.append((price, min(wanted, amount), None if own else number))
            wanted -= min(wanted, amount)
    assert taken(matches(book, DEPTH, "buy", limit=limit, lots=lots, money=0, lot_notional=1)) == expected
