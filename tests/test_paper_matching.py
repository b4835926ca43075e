"""Who trades with whom: price first, then time, users before the market; checked against a plain reference book."""

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.venues.paper.market import Depth, Print
from workers.venues.paper.matching import Book, Match, Plan, passing, plan
from workers.venues.paper.orders import Order

DEPTH = Depth(asks=((101, 5), (103, 5), (110, 50)), bids=((99, 5), (97, 5), (90, 50)))


def resting(number: int, side: str, price: int, lots: int, account: int = 1) -> Order:
    return Order(number, account, None, "BTC_USDT", side, "limit", None, price, lots, 0, 1, 0, 0)


def book_of(*orders: Order) -> Book:
    book = Book()
    for order in orders:
        book.sides[order.side].add(order)
    return book


def matches(book: Book, side: str, *, limit: int | None, lots: int | None, money: int = 0, account: int = 9) -> Plan:
    return plan(book, DEPTH, side, account=account, limit=limit, lots=lots, money=money, lot_notional=1)


def taken(found: Plan) -> list[tuple[int, int, int | None]]:
    return [(m.price, m.lots, m.maker.number if m.maker else None) for m in found.matches]


def test_the_best_price_trades_first_then_the_earlier_order_then_the_market() -> None:
    book = book_of(resting(1, "sell", 103, 2), resting(2, "sell", 101, 1), resting(3, "sell", 101, 1), resting(4, "sell", 100, 1))
    found = matches(book, "buy", limit=103, lots=12)
    assert taken(found) == [(100, 1, 4), (101, 1, 2), (101, 1, 3), (101, 5, None), (103, 2, 1), (103, 2, None)]


def test_a_limit_is_never_passed() -> None:
    assert taken(matches(book_of(), "sell", limit=97, lots=99)) == [(99, 5, None), (97, 5, None)]
    assert matches(book_of(), "sell", limit=100, lots=99) == Plan([], [], complete=False)


def test_money_buys_whole_lots_and_never_more_than_there_is() -> None:
    found = matches(book_of(), "buy", limit=None, lots=None, money=1_000)
    assert (taken(found), found.complete) == ([(101, 5, None), (103, 4, None)], True)
    assert matches(book_of(), "buy", limit=None, lots=None, money=100) == Plan([], [], complete=False)
    everything = 5 * 101 + 5 * 103 + 50 * 110
    found_all = [matches(book_of(), "buy", limit=None, lots=None, money=everything + more) for more in (0, 109, 110)]
    assert [found.complete for found in found_all] == [True, True, False]


def test_what_was_taken_of_the_market_is_not_there_again_until_the_next_second() -> None:
    book = book_of()
    book.turn(10)
    for match in matches(book, "buy", limit=None, lots=7).matches:
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


def test_an_own_order_in_the_way_is_named_and_passed_by_as_far_as_the_taker_comes() -> None:
    book = book_of(resting(1, "sell", 100, 4, account=9), resting(2, "sell", 101, 3), resting(3, "sell", 102, 1, account=9))
    found = matches(book, "buy", limit=103, lots=8)
    assert (taken(found), [order.number for order in found.own], found.complete) == ([(101, 3, 2), (101, 5, None)], [1], True)
    found = matches(book, "buy", limit=103, lots=9)
    assert (taken(found)[2:], [order.number for order in found.own]) == ([(103, 1, None)], [1, 3])


def passed(orders: list[Order], tape: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    side = orders[0].side
    levels = DEPTH.asks if side == "buy" else DEPTH.bids
    found = passing(book_of(*orders).sides[side], [Print(0, n, price, lots, "buy") for n, (price, lots) in enumerate(tape)], levels)
    return [(order.number, lots) for order, lots in found.fills], [(match.price, match.lots) for match in found.taken]


def test_the_market_fills_what_it_trades_through_and_no_more() -> None:
    assert passed([resting(1, "buy", 99, 5)], [(98, 3), (99, 9), (98, 1)]) == ([(1, 4)], [])
    assert passed([resting(1, "sell", 100, 5)], [(100, 9), (101, 2)]) == ([(1, 2)], [])
    assert passed([resting(1, "sell", 100, 5)], [(100, 9)]) == ([], [])


def test_the_market_serves_the_best_price_first_then_the_earlier_order() -> None:
    orders = [resting(1, "buy", 98, 5), resting(2, "buy", 99, 2), resting(3, "buy", 98, 5), resting(4, "buy", 99, 2)]
    assert passed(orders, [(98, 3), (97, 7)]) == ([(2, 2), (4, 2), (1, 5), (3, 1)], [])


def test_the_markets_own_book_goes_to_whom_it_reaches_until_it_reaches_no_more() -> None:
    assert passed([resting(1, "buy", 104, 7)], []) == ([(1, 7)], [(101, 5), (103, 2)])
    assert passed([resting(1, "buy", 104, 3), resting(2, "buy", 102, 9)], [(103, 2)]) == ([(1, 3), (2, 4)], [(101, 5)])
    # The first at 104 gets the trade and both levels it reaches; the second, at 102, what is left of the level at 101: nothing.
    assert passed([resting(1, "buy", 104, 90), resting(2, "buy", 102, 9)], [(103, 2)]) == ([(1, 12)], [(101, 5), (103, 5)])
    assert passed([resting(1, "sell", 97, 90)], []) == ([(1, 10)], [(99, 5), (97, 5)])


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
    assert taken(matches(book, "buy", limit=limit, lots=lots)) == expected
