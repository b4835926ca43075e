"""The order book: what a plain dict would hold, and what is wrong with a book that must not be told."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from decimal import Decimal, InvalidOperation
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.messages import Level
from workers.book import BadChecksum, Book, BookError, CrossedBook, DoubleLevel, EmptyBook, SequenceGap

Rows = list[Level]


def rows(text: str) -> Rows:
    """ "100:1 101:2.5" -> levels."""
    pairs = (row.split(":") for row in text.split())
    return [(Decimal(price), Decimal(amount)) for price, amount in pairs]


def book(bids: str = "99:1 98:2", asks: str = "101:1 102:2", sequence: int | None = 7) -> Book:
    made = Book()
    made.snapshot(rows(bids), rows(asks), sequence)
    return made


# ---------------------------------------------------------------- what it holds


def test_a_snapshot_is_told_best_first_whatever_its_order() -> None:
    for bids in permutations(rows("97:3 98:2 99:1")):
        for asks in permutations(rows("101:1 102:2 103:3")):
            made = Book()
            made.snapshot(bids, asks, 1)
            assert made.top(2) == (rows("101:1 102:2"), rows("99:1 98:2"))
            assert made.top(3) == made.top(200) == (rows("101:1 102:2 103:3"), rows("99:1 98:2 97:3"))


@pytest.mark.parametrize(
    ("bids", "asks", "told"),
    [
        ("", "", ("101:1 102:2", "99:1 98:2")),
        ("99.5:3", "100.5:4", ("100.5:4 101:1 102:2", "99.5:3 99:1 98:2")),
        ("99:5", "102:6", ("101:1 102:6", "99:5 98:2")),
        ("99:0", "101:0.000", ("102:2", "98:2")),
        ("50:0 99.9:0", "150:0 100.1:0", ("101:1 102:2", "99:1 98:2")),
        ("99:0 99:3", "101:3 101:0", ("102:2", "99:3 98:2")),
        ("99:0 98:0 97:1", "101:0 102:0 100:1", ("100:1", "97:1")),
    ],
    ids=["nothing", "new best", "another amount", "gone", "gone and never there", "twice: the last holds", "all others"],
)
def test_a_delta_sets_and_removes_levels(bids: str, asks: str, told: tuple[str, str]) -> None:
    made = book()
    made.apply(rows(bids), rows(asks), 7, 8)
    assert made.top(9) == (rows(told[0]), rows(told[1]))
    assert made.sequence == 8


def test_a_level_keeps_the_digits_that_were_sent_last() -> None:
    made = book("99.10:1.50", "101:1")
    made.apply(rows("99.1:2.500"), [], 7, 8)
    assert [tuple(map(str, level)) for level in made.top(5)[1]] == [("99.1", "2.500")]


def test_what_was_told_stays_as_it_was() -> None:
    made = book()
    told = made.top(2)
    made.apply(rows("99:0"), rows("100:9"), 7, 8)
    assert told == (rows("101:1 102:2"), rows("99:1 98:2"))


def test_the_next_snapshot_leaves_nothing_of_the_one_before() -> None:
    made = book()
    made.snapshot(rows("10:1"), rows("11:1 12:0"), 3)
    assert (made.top(9), made.sequence) == ((rows("11:1"), rows("10:1")), 3)


# ---------------------------------------------------------------- what is wrong with it


def after(break_it: Callable[[Book], None], error: type[BookError]) -> Book:
    made = book()
    with pytest.raises(error):
        break_it(made)
    return made


BREAKS: dict[str, tuple[Callable[[Book], None], type[BookError]]] = {
    "a delta is missing": (lambda b: b.apply([], [], 8, 9), SequenceGap),
    "a delta comes twice": (lambda b: b.apply([], [], 6, 7), SequenceGap),
    "the delta does not say what it goes on from": (lambda b: b.apply([], [], None, 8), SequenceGap),
    "the bid stands at the ask": (lambda b: b.apply(rows("101:1"), [], 7, 8), CrossedBook),
    "the bid stands above the ask": (lambda b: b.apply(rows("101.01:1"), [], 7, 8), CrossedBook),
    "the ask stands at the bid": (lambda b: b.apply([], rows("99:1"), 7, 8), CrossedBook),
    "the snapshot is crossed": (lambda b: b.snapshot(rows("99:1 100:1"), rows("101:1 99:1"), 8), CrossedBook),
    "the snapshot has a bid twice": (lambda b: b.snapshot(rows("99:1 99.0:2"), rows("101:1"), 8), DoubleLevel),
    "the snapshot has a bid and not": (lambda b: b.snapshot(rows("99:1 99:0"), rows("101:1"), 8), DoubleLevel),
    "the snapshot has an ask twice": (lambda b: b.snapshot(rows("99:1"), rows("101:1 102:1 101:1"), 8), DoubleLevel),
    "the checksum is another": (lambda b: b.check(checksum, checksum([], [])), BadChecksum),
    "we have no checksum": (lambda b: b.check(lambda bids, asks: None, 0), BadChecksum),
}


def checksum(bids: Sequence[Level], asks: Sequence[Level]) -> int:
    return zlib.crc32(repr((list(bids), list(asks))).encode())


@pytest.mark.parametrize(("break_it", "error"), BREAKS.values(), ids=BREAKS.keys())
def test_a_book_that_is_wrong_is_of_no_use_until_the_next_snapshot(break_it: Callable[[Book], None], error: type[BookError]) -> None:
    made = after(break_it, error)
    for _ in range(2):
        for use in (
            lambda: made.top(5),
            lambda: made.check(checksum, 0),
            lambda: made.apply([], [], made.sequence, 9),
            lambda: made.apply([], [], 7, 8),
        ):
            with pytest.raises(SequenceGap, match="no snapshot yet"):
                use()
    made.snapshot(rows("99:1"), rows("101:1"), 20)
    made.apply(rows("98:1"), [], 20, 21)
    assert made.top(5) == (rows("101:1"), rows("99:1 98:1"))


def test_a_delta_before_any_snapshot_is_a_gap() -> None:
    for previous in (None, 0, 7):
        with pytest.raises(SequenceGap, match="no snapshot yet"):
            Book().apply(rows("99:1"), rows("101:1"), previous, 8)


def test_an_exchange_without_sequences_is_not_asked_for_them() -> None:
    made = book(sequence=None)
    made.apply(rows("98.5:1"), [])
    made.apply(rows("98.5:0"), rows("100:1"))
    assert made.top(9) == (rows("100:1 101:1 102:2"), rows("99:1 98:2"))
    with pytest.raises(SequenceGap, match="goes on from 3, the book is at None"):
        made.apply([], [], 3, 4)


@pytest.mark.parametrize(
    ("bids", "asks", "missing"), [("99:0 98:0", "", "bids"), ("", "101:0 102:0", "asks"), ("99:0 98:0", "101:0 102:0", "asks")]
)
def test_an_empty_side_is_not_told_and_the_book_goes_on(bids: str, asks: str, missing: str) -> None:
    made = book()
    made.apply(rows(bids), rows(asks), 7, 8)
    for _ in range(2):
        with pytest.raises(EmptyBook, match=f"the book has no {missing}"):
            made.top(5)
    made.apply(rows("90:1"), rows("110:1"), 8, 9)
    asks_now, bids_now = made.top(5)
    assert (asks_now[-1], bids_now[-1]) == (rows("110:1")[0], rows("90:1")[0])


def test_an_empty_snapshot_is_not_told_either() -> None:
    made = book(bids="", asks="101:0")
    with pytest.raises(EmptyBook, match="the book has no asks"):
        made.top(5)


def test_the_checksum_is_of_the_whole_book_best_first() -> None:
    made = book("97:3 99:1 98:2", "103:3 101:1 102:2")
    made.check(checksum, checksum(rows("99:1 98:2 97:3"), rows("101:1 102:2 103:3")))
    assert made.top(1) == (rows("101:1"), rows("99:1"))


def test_what_is_no_number_leaves_no_half_applied_book() -> None:
    made = book()
    with pytest.raises(InvalidOperation):
        made.apply(rows("98:0 NaN:1"), [], 7, 8)
    with pytest.raises(SequenceGap):
        made.top(5)


# ---------------------------------------------------------------- any sequence of messages

amounts = st.sampled_from(["0", "0.0", "1", "1.0", "2.5"])


def side(lowest: int, highest: int) -> st.SearchStrategy[Rows]:
    prices = st.builds("{}{}".format, st.integers(lowest, highest), st.sampled_from(["", ".0", ".5"]))
    return st.lists(st.tuples(prices.map(Decimal), amounts.map(Decimal)), max_size=8)


@st.composite
def messages(draw: st.DrawFn) -> list[tuple[str, Rows, Rows]]:
    """Some books never cross, some do now and then."""
    overlap = draw(st.sampled_from([-1, 0, 3]))
    pairs = st.tuples(st.sampled_from(["snapshot", "delta", "delta", "delta", "delta"]), side(1, 9 + overlap), side(10, 19))
    return draw(st.lists(pairs, max_size=30))


@given(messages())
def test_any_messages_give_the_book_that_a_dict_would(told: list[tuple[str, Rows, Rows]]) -> None:
    made = Book()
    bids: dict[Decimal, Level] = {}
    asks: dict[Decimal, Level] = {}
    whole = False
    for sequence, (kind, new_bids, new_asks) in enumerate(told):
        if kind == "snapshot":
            bids, asks = {}, {}
            whole = all(len(new) == len({price for price, _ in new}) for new in (new_bids, new_asks))
        for mine, new in ((bids, new_bids), (asks, new_asks)):
            for price, amount in new:
                mine.pop(price, None)
                if amount:
                    mine[price] = (price, amount)
        had, crossed = whole, bool(bids and asks) and max(bids) >= min(asks)
        whole = whole and not crossed
        expected: type[BookError] | None = SequenceGap if not had else CrossedBook if crossed else None
        if kind == "snapshot" and not had:
            expected = DoubleLevel
        with pytest.raises(expected) if expected else nullcontext():
            if kind == "snapshot":
                made.snapshot(new_bids, new_asks, sequence)
            else:
                made.apply(new_bids, new_asks, sequence - 1, sequence)
        if expected:
            continue
        best_bids = sorted(bids.values(), reverse=True)
        best_asks = sorted(asks.values())
        made.check(checksum, checksum(best_bids, best_asks))
        for levels in (1, 3, 100):
            if bids and asks:
                assert repr(made.top(levels)) == repr((best_asks[:levels], best_bids[:levels]))
            else:
                with pytest.raises(EmptyBook):
                    made.top(levels)
